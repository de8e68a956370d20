"""Builds the wheel and the sdist and tries them in fresh environments, one after another.

    python .ci/release/run.py                 # everything
    python .ci/release/run.py core timm       # these alone

Core alone: it imports, works on a model of plain torch, names the missing extra for each verb, and its types reach a
user's type checker. Each extra alone: it does its job. The sdist: it builds and installs. Needs uv, a package index,
and some 6 GB for its cache; environments are removed when they have been tried.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
EXTRAS = ("timm", "transformers", "diffusion", "data", "report", "train", "baselines", "onnx", "openvino", "torchao")
MODEL = "timm:vit_tiny_patch16_224"
NAMED = {
    ("inspect", MODEL): "timm",
    ("inspect", "hf:facebook/deit-tiny-patch16-224"): "transformers",
    ("compress", MODEL, "--data", "pictures", "--out", "out"): "timm",
    ("merge", MODEL, "--data", "pictures", "--out", "out"): "timm",
    ("explore", MODEL, "--data", "pictures", "--out", "out"): "timm",
    ("eval", MODEL, "--data", "pictures"): "timm",
    ("bench", MODEL): "timm",
    ("demo", "compress"): "timm",
    ("search", MODEL, "--data", "pictures", "--out", "plan.json"): "train",
    ("tune", MODEL, "--data", "pictures", "--out", "out"): "train",
    ("prune", MODEL, "--data", "pictures", "--out", "out"): "train",
    ("customize", "a/pipe", "--images", "pictures", "--prompt", "a V* dog", "--out", "v.safetensors"): "train",
    ("generate", "a/pipe", "--prompt", "a dog", "--out", "out"): "diffusion",
    ("demo", "customize"): "diffusion",
    ("export", MODEL, "--out", "m.onnx"): "onnx",
}
"""What a user without extras types, and the extra that the answer must name."""


def main() -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("parts", nargs="*", help=f"core, sdist, {', '.join(EXTRAS)}; by default all")
    p.add_argument("--uv", default=shutil.which("uv") or f"{sys.executable} -m uv")
    a = p.parse_args()
    parts = a.parts or ["core", "sdist", *EXTRAS]
    failed = []
    with tempfile.TemporaryDirectory(prefix="comcat-release-") as folder:
        trial = Trial(a.uv.split(), Path(folder))
        for part in parts:
            try:
                trial.part(part)
            except (subprocess.CalledProcessError, AssertionError) as error:
                failed.append(part)
                print(f"FAILED {part}: {error}", flush=True)
            else:
                print(f"ok {part}", flush=True)
    print(f"failed: {', '.join(failed)}" if failed else f"all {len(parts)} parts are as they should be")
    return int(bool(failed))


class Trial:
    """A folder with what was built, and one environment at a time."""

    def __init__(self, uv: Sequence[str], folder: Path) -> None:
        self.uv, self.folder = list(uv), folder
        self.built, self.environment, self.work = folder / "dist", folder / "environment", folder / "work"
        self._uv("build", "--quiet", "--out-dir", str(self.built), str(ROOT))
        (self.wheel,) = self.built.glob("*.whl")
        (self.sdist,) = self.built.glob("*.tar.gz")

    def part(self, part: str) -> None:
        """Try one part in an environment of its own."""
        self._uv("venv", "--quiet", "--clear", "--python", sys.executable, str(self.environment))
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(HERE / "jobs", self.work)
        try:
            what = self.sdist if part == "sdist" else self.wheel
            extra = f"[{part}]" if part in EXTRAS else ""
            self._uv("pip", "install", "--quiet", "--python", self._bin("python"), f"comcat{extra} @ {what.as_uri()}")
            said = self._comcat("--version").stdout.strip()
            assert said == f"comcat {self.wheel.name.split('-')[1]}", said
            self._python(f"with_{'core' if part == 'sdist' else part}.py")
            if part == "core":
                self._names_extras()
                self._types()
        finally:
            shutil.rmtree(self.environment, ignore_errors=True)

    def _names_extras(self) -> None:
        for words, extra in NAMED.items():
            done = self._comcat(*words, check=False)
            assert done.returncode == 1 and "Traceback" not in done.stderr, (words, done.stderr[-500:])
            assert f"comcat[{extra}]" in done.stderr.splitlines()[-1], (words, done.stderr[-500:])

    def _types(self) -> None:
        """A user's own type checker finds our types: what is right passes, and the one mistake is found."""
        done = subprocess.run(
            [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", self._bin("python"), "typed.py"],
            cwd=self.work, capture_output=True, text=True,
        )  # fmt: skip
        found = [d for d in json.loads(done.stdout)["generalDiagnostics"] if d["severity"] == "error"]
        assert [d.get("rule") for d in found] == ["reportAssignmentType"], found

    def _uv(self, *words: str) -> None:
        subprocess.run([*self.uv, *words], check=True)

    def _bin(self, name: str) -> str:
        return str(self.environment / "bin" / name)

    def _python(self, script: str) -> None:
        subprocess.run([self._bin("python"), script], cwd=self.work, check=True, env=_clean())

    def _comcat(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [self._bin("comcat"), *words], cwd=self.work, check=check, env=_clean(), capture_output=True, text=True
        )


def _clean() -> dict[str, str]:
    """Without this checkout on the path, and without a network for models."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return {**kept, "HF_HUB_OFFLINE": "1"}


if __name__ == "__main__":
    sys.exit(main())
