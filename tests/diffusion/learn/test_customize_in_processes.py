"""Two processes that share each batch learn what one would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

SCRIPT = """
import sys
from pathlib import Path
from tests.diffusion import tiny
import comcat.diffusion as cd
folder, rank = Path(sys.argv[1]), sys.argv[2]
import os
pipe = tiny.stable_diffusion(folder / ("parts" + os.environ.get("RANK", "")))
cd.customize(pipe, tiny.pictures(), prompt="a photo of V* dog", out=folder / f"{rank}.safetensors", new_token="dog",
             prior_prompt="a photo of a dog", prior_count=2, sample_steps=1, sample_every=2, sample_count=1,
             steps=4, batch_size=2, resolution=16, checkpoint_every=2)
"""


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    root = str(Path(__file__).parents[3])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "1",
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for start, name in (([sys.executable], "one"), (launch, "two")):
        done = subprocess.run(
            [*start, str(script), str(tmp_path), name], env=environment, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, done.stderr[-2000:]
    one, two = load_file(tmp_path / "one.safetensors"), load_file(tmp_path / "two.safetensors")
    assert one.keys() == two.keys()
    for key in one:
        torch.testing.assert_close(one[key].float(), two[key].float(), atol=1e-4, rtol=1e-3)
    assert any(one[k].float().abs().sum() > 0 for k in one if k.endswith("k_down"))
