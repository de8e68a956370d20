"""The page on serving: its server needs neither PyTorch nor comcat, and prepares pictures as the model was trained."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import comcat
from comcat.data import Preprocess

from ..models import tiny_vit

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
(SERVER,) = [b for b in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S) if "def prepare" in b]
ALONE = "import sys; sys.modules.update({name: None for name in ('torch', 'comcat', 'timm', 'transformers')})\n"


def prepare():
    names: dict = {}
    exec(SERVER.partition("about = ")[0], names)
    return names["prepare"]


def test_it_prepares_pictures_as_comcat_does():
    random = np.random.default_rng(0)
    pictures = [Image.fromarray(random.integers(0, 255, (h, w, 3), dtype=np.uint8)) for h, w in ((60, 90), (91, 47))]
    for mode, share, channels in (("center", 0.875, 3), ("squash", 1.0, 3), ("center", 1.0, 1)):
        how = Preprocess(
            size=(32, 32),
            mean=(0.4,) * channels,
            std=(0.2,) * channels,
            crop_mode=mode,
            crop_pct=share,
            channels=channels,
        )
        for picture in pictures:
            got = prepare()(picture, how.to_dict())
            assert got.dtype == np.float32 and np.abs(got - how(picture).numpy()).max() < 1e-6


def test_it_serves_one_and_eight_pictures_without_pytorch(tmp_path):
    model = tiny_vit(num_classes=10)
    comcat.export(model, out=tmp_path / "small.onnx", pictures=2)
    code = ALONE + SERVER + "\nprint(json.dumps([one.tolist(), eight.tolist()]))"
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    one, eight = map(np.array, json.loads(run.stdout.splitlines()[-1]))
    pictures = [Image.new("RGB", (64, 48), (30 * i, 200 - 20 * i, 90)) for i in range(8)]
    how = comcat.preprocess_of(model)
    expected = model(torch.stack([how(p) for p in pictures])).detach().numpy()
    assert (
        one.shape == (1, 10) and np.abs(eight - expected).max() < 1e-5 and np.allclose(one[0], expected[0], atol=1e-5)
    )
