"""Pack what ``benchmarks/gpu.py`` needs on a machine without a network: real weights in float16, pictures, wheels.

    python benchmarks/gpu_pack.py                  # .gpu/ and .whl/, and what travels in all

``.gpu/`` has the DINOv2-small classifier and CIFAR-10 pictures as they come (``benchmarks/card/packed.py``): those to
calibrate on for each seed, the same that ``benchmarks/real_weights.py`` draws, and the first ones that are judged.
``.whl/`` has wheels for Python 3.12 of the libraries that such a machine lacks or has too old. Both are left out of
git. A folder that is there is kept; remove it to make it anew. There, without a network:

    pip install --no-index --no-deps .whl/*.whl && PYTHONPATH=src python benchmarks/gpu.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from card.packed import write_classifier, write_pictures
from real.data import Part, data_file
from real.fetch import _pip, _run, fill_whole
from real.models import classifier_folder
from safetensors.torch import load_file

from comcat.data import open_pictures
from comcat.errors import ComcatError

ROOT = Path(__file__).resolve().parents[1]
WHEELS = (
    "timm==1.0.31", "tyro==1.0.17", "docstring_parser==0.18.0", "typeguard==4.6.0",
    "diffusers==0.42.1", "importlib_metadata==10.2.0", "peft==0.21.2",
)  # fmt: skip
"""The first row is for comcat and the classifier, the second for adapters. All else is where transformers is."""
PLATFORMS = ("2_28", "2_27", "2_17")
MOST = 60 * 2**20


def main(given: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=ROOT / ".gpu")
    p.add_argument("--wheels", type=Path, default=ROOT / ".whl", help="where the wheels go")
    p.add_argument("--no-wheels", action="store_true", help="weights and pictures alone")
    p.add_argument("--seeds", type=int, default=5, help="calibration samples")
    p.add_argument("--calibration", type=int, default=512, help="pictures of each")
    p.add_argument("--judged", type=int, default=3000, help="pictures to judge")
    a = p.parse_args(given)
    try:
        if not a.out.is_dir():
            fill_whole(a.out, lambda folder: pack(folder, a))
        if not a.no_wheels and not a.wheels.is_dir():
            fill_whole(a.wheels, fetch_wheels)
    except ComcatError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return told(a)


def pack(folder: Path, a: argparse.Namespace) -> None:
    """The classifier, the calibration pictures of each seed, and those that are judged."""
    source = classifier_folder()
    state = load_file(source / "model.safetensors")
    write_classifier(folder / "classifier", (source / "config.json").read_text(), state)
    for seed in range(a.seeds):
        write_pictures(folder / f"calibration-{seed}.safetensors", cifar10("calibration", a.calibration, seed))
    write_pictures(folder / "judged.safetensors", cifar10("judged", a.judged))


def cifar10(part: Part, count: int, seed: int = 0) -> Iterator[tuple[bytes, int]]:
    """Files and classes of CIFAR-10's pictures, chosen as ``real.data.cifar10`` chooses."""
    pictures = open_pictures(data_file("cifar10", "train" if part == "calibration" else "validation"))
    pictures = pictures.take(count, seed) if part == "calibration" else pictures
    for _, entry in islice(pictures.entries(), count):
        if not isinstance(entry.content, bytes) or entry.label is None:
            raise ComcatError(f"{entry.key}: got no file with a class, expected both")
        yield entry.content, entry.label


def fetch_wheels(folder: Path) -> None:
    """Download the wheels, without what they need: that is there."""
    platforms = [w for v in PLATFORMS for w in ("--platform", f"manylinux_{v}_x86_64")]
    words = [*_pip(), "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder)]
    words += ["--python-version", "3.12", "--implementation", "cp", *platforms, *WHEELS]
    _run(words, "the wheels")


def told(a: argparse.Namespace) -> int:
    """Say what travels: the repository's files and both folders. 1 where that is too much."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    files = {"the repository": [ROOT / name for name in listed.stdout.split("\0") if name]}
    files |= {str(folder): sorted(folder.rglob("*")) for folder in (a.out, a.wheels)}
    sizes = {name: sum(f.stat().st_size for f in found if f.is_file()) for name, found in files.items()}
    for name, size in (*sizes.items(), ("in all", sum(sizes.values()))):
        print(f"{name}: {size / 2**20:.2f} MiB")
    if sum(sizes.values()) > MOST:
        print(f"error: expected at most {MOST / 2**20:.0f} MiB; pack fewer pictures (--judged)", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
