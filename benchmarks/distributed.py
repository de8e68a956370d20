"""Tuning over two processes against one, and killed against undisturbed.

    python benchmarks/distributed.py                   # ../shared/models/vit_cifar10 at half its parameters, on
    CIFAR-10

First the same run of 20 steps in one process and in two joined by gloo, at the same global batch, without augmentation
and drop-path: the losses side by side. Then a run with everything random switched on (augmentation, mixup, drop-path,
moving average), once undisturbed and once killed by SIGKILL at three random moments and repeated: the weights, bit by
bit. Every run is a process of its own, started as a user starts it; on the CPU, one thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import torch

PLAIN: dict[str, Any] = {"crop_scale": None, "flip": 0.0, "log_every": 1}
RANDOM: dict[str, Any] = {
    "crop_scale": (0.6, 1.0), "rand_augment": "rand-m9-mstd0.5-inc1", "erase": 0.25, "mixup": 0.8, "cutmix": 1.0,
    "ema": 0.99,
    "repeats": 2, "workers": 1, "log_every": 1, "checkpoint_every": 4,
}  # fmt: skip
KILLS = 3


def main(given: list[str] | None = None) -> dict[str, Any]:
    p = common.parser(__doc__)
    p.add_argument("--model", default=str(common.SHARED / "models" / "vit_cifar10"))
    p.add_argument("--data", default=str(common.SHARED / "data" / "cifar10" / "train.parquet"))
    p.add_argument("--pictures", type=int, default=1000, help="so many training pictures, drawn at random")
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--batch-size", type=int, default=32, help="over all processes")
    p.add_argument("--reduce", type=float, default=0.5)
    p.add_argument("--seed", type=int, default=0, help="of the moments to kill at")
    p.add_argument("--kind", choices=("plain", "random"), help=argparse.SUPPRESS)
    p.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    arguments = p.parse_args(given)
    if arguments.kind:
        return one_run(arguments)
    with tempfile.TemporaryDirectory() as place:
        result = {
            "model": Path(arguments.model).name,
            "steps": arguments.steps,
            "batch_size": arguments.batch_size,
            "reduce": arguments.reduce,
            "processes": compare_processes(arguments, Path(place)),
            "killed": compare_killed(arguments, Path(place)),
        }
    if not arguments.no_write:
        common.write("distributed", result)
    return result


def one_run(arguments: Any) -> dict[str, Any]:
    """What each started process does: tune, and leave the weights behind."""
    import comcat
    from comcat.files import write_tensors
    from comcat.tuning.tune import tune

    torch.set_num_threads(1)
    plain = arguments.kind == "plain"
    teacher = comcat.load_model(arguments.model)
    student = comcat.compress(teacher, statistic="weights", reduce=arguments.reduce)
    module: Any
    for module in student.modules():
        if not plain and hasattr(module, "drop_prob"):
            module.drop_prob = 0.1
    data = comcat.open_pictures(arguments.data).take(arguments.pictures, 0)
    tune(
        student,
        data,
        teacher=teacher,
        out=arguments.out,
        steps=arguments.steps,
        batch_size=arguments.batch_size,
        **(PLAIN if plain else RANDOM),
    )
    if os.environ.get("RANK", "0") == "0":
        write_tensors(arguments.out / "weights.safetensors", student.state_dict())
    return {}


def compare_processes(arguments: Any, place: Path) -> dict[str, Any]:
    """Losses of one process and of two."""
    losses, seconds = {}, {}
    for processes in (1, 2):
        out = place / f"processes-{processes}"
        started = time.monotonic()
        subprocess.run(_command(arguments, "plain", out, processes), env=_environment(), check=True)
        seconds[processes] = time.monotonic() - started
        losses[processes] = [line["loss"] for line in _log(out)]
    apart = [abs(a - b) for a, b in zip(losses[1], losses[2], strict=True)]
    common.table(
        ["step", "one process", "two", "difference"],
        [
            [i + 1, f"{a:.6f}", f"{b:.6f}", f"{d:.1e}"]
            for i, (a, b, d) in enumerate(zip(losses[1], losses[2], apart, strict=True))
        ],
    )
    print(f"largest difference over {len(apart)} steps: {max(apart):.1e}\n")
    return {
        "losses": {str(n): found for n, found in losses.items()},
        "largest_difference": max(apart),
        "seconds": seconds,
    }


def compare_killed(arguments: Any, place: Path) -> dict[str, Any]:
    """Weights of a run that was killed and repeated, and of one that was not."""
    moments = random.Random(arguments.seed)
    undisturbed, killed = place / "undisturbed", place / "killed"
    subprocess.run(_command(arguments, "random", undisturbed, 1), env=_environment(), check=True)
    kills = []
    for number in range(KILLS):
        done = kills[-1]["step"] if kills else 0
        least = min(done + 1, arguments.steps - 1)
        step = moments.randint(least, max(least, arguments.steps * (number + 1) // (KILLS + 1)))
        process = subprocess.Popen(_command(arguments, "random", killed, 1), env=_environment(), start_new_session=True)
        while len(_log(killed)) < step:
            if process.poll() is not None:
                raise SystemExit(f"the run ended with {process.returncode} before it could be killed")
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 1.0) * _step_seconds(killed))
        os.killpg(process.pid, signal.SIGKILL)  # its workers, too
        process.wait()
        checkpoints = sorted(path.name for path in (killed / "checkpoints").glob("step-*"))
        kills.append({"step": len(_log(killed)), "last_checkpoint": checkpoints[-1] if checkpoints else None})
        print(
            f"killed after step {kills[-1]['step']}; goes on from {kills[-1]['last_checkpoint'] or 'the start'}",
            flush=True,
        )
    subprocess.run(_command(arguments, "random", killed, 1), env=_environment(), check=True)
    weights = [(out / "weights.safetensors").read_bytes() for out in (undisturbed, killed)]
    curves = [[line["loss"] for line in _log(out)] for out in (undisturbed, killed)]
    found = {
        "kills": kills,
        "weights_equal_bit_for_bit": weights[0] == weights[1],
        "losses_equal": curves[0] == curves[1],
    }
    print(f"weights equal bit for bit: {found['weights_equal_bit_for_bit']}; losses equal: {found['losses_equal']}")
    shutil.rmtree(killed)
    return found


def _command(arguments: Any, kind: str, out: Path, processes: int) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    options = {
        "model": arguments.model, "data": arguments.data, "pictures": arguments.pictures, "steps": arguments.steps,
        "batch-size": arguments.batch_size, "reduce": arguments.reduce, "kind": kind, "out": out, "device": "cpu",
    }  # fmt: skip
    return [sys.executable, *launcher, __file__, *(word for k, v in options.items() for word in (f"--{k}", str(v)))]


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def _log(out: Path) -> list[dict[str, Any]]:
    path = out / "log.jsonl"
    whole = path.read_text().split("\n")[:-1] if path.is_file() else []
    return [json.loads(line) for line in whole]


def _step_seconds(out: Path) -> float:
    return _log(out)[-1]["seconds"] / _log(out)[-1]["step"]


if __name__ == "__main__":
    main()
