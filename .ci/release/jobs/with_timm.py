"""A folder of timm's, through the command line: inspect, compress, explore, merge, evaluate, time."""

import json
from pathlib import Path

import timm
from plain import picture_folder
from safetensors.torch import save_file

from comcat.cli import main

arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 10}
model = timm.create_model("vit_tiny_patch16_224", pretrained=False, **arguments)
folder = Path("theirs")
folder.mkdir()
save_file(model.state_dict(), folder / "model.safetensors")
data = {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 10, "crop_pct": 1.0}
about = {"architecture": "vit_tiny_patch16_224", "num_classes": 10, "model_args": arguments, "pretrained_cfg": data}
(folder / "config.json").write_text(json.dumps(about))
pictures = str(picture_folder())
assert main(["inspect", "theirs"]) == 0
assert main(["compress", "theirs", "--data", pictures, "--pictures", "16", "--reduce", "0.4", "--out", "small"]) == 0
assert main(["explore", "theirs", "--data", pictures, "--pictures", "16", "--out", "page.html"]) == 0
assert main(["merge", "theirs", "--data", pictures, "--keep", "0.7", "--out", "merged"]) == 0
assert main(["eval", "small", "--data", pictures]) == 0
assert main(["bench", "small", "--against", "theirs", "--repeats", "2"]) == 0
