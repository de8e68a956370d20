"""Public packages, fetched by name with pip and apt into a cache folder outside the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from comcat.errors import ComcatError


class FetchError(ComcatError):
    """Something that the benchmark needs is not here and cannot be fetched; the message says what and why."""


def cache(*parts: str) -> Path:
    """A place in the cache folder: ``$COMCAT_BENCHMARK_CACHE``, else ``comcat-benchmarks`` in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(os.environ.get("COMCAT_BENCHMARK_CACHE") or Path(home) / "comcat-benchmarks")
    return root.expanduser().joinpath(*parts)


def fetch_wheel(name: str, version: str) -> Path:
    """The wheel of a release, downloaded once by name with pip.

    Raises :class:`FetchError` where pip is missing or does not get it.
    """
    folder = cache("wheels", f"{name}-{version}")
    if found := sorted(folder.glob("*.whl")):
        return found[0]
    words = [*_pip(), "download", "--no-deps", "--quiet", f"{name}=={version}", "--dest"]
    fill_whole(folder, lambda place: _run([*words, str(place)], f"the wheel {name} {version}"))
    return next(folder.glob("*.whl"))


def library(folder: str, *requirements: str) -> Path:
    """A folder with libraries to append to ``sys.path``, installed once by name with pip, without dependencies.

    Raises :class:`FetchError` where pip is missing or does not get them.
    """
    place = cache("libraries", folder)
    if not place.is_dir():
        words = [*_pip(), "install", "--no-deps", "--quiet", *requirements, "--target"]
        fill_whole(place, lambda new: _run([*words, str(new)], f"the libraries {', '.join(requirements)}"))
    return place


def debian(name: str) -> Path:
    """The files of a Debian package, downloaded once with apt-get and unpacked; nothing is installed.

    Raises :class:`FetchError` where the tools are missing or do not get it.
    """
    folder = cache("debian", name)
    if folder.is_dir():
        return folder
    tools = [shutil.which(tool) for tool in ("apt-get", "dpkg-deb")]
    if None in tools:
        raise FetchError(f"the package {name} is fetched with apt-get and dpkg-deb, which are not here")

    def unpack(place: Path) -> None:
        with tempfile.TemporaryDirectory() as fetched:
            _run(["apt-get", "download", name], f"the Debian package {name}", where=fetched)
            archive = next(Path(fetched).glob("*.deb"))
            _run(["dpkg-deb", "--extract", str(archive), str(place)], f"the files of {archive.name}")

    fill_whole(folder, unpack)
    return folder


def fill_whole(folder: Path, fill: Callable[[Path], object]) -> None:
    """Fill a folder under a temporary name, then move it into place, so that it is never half there.

    Of two processes that make the same folder, the first to be done wins.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as place:
        new = Path(place) / "new"
        new.mkdir()
        fill(new)
        if not folder.is_dir():
            new.rename(folder)


def _pip() -> list[str]:
    own = [sys.executable, "-m", "pip"]
    if subprocess.run([*own, "--version"], capture_output=True).returncode == 0:
        return own
    if found := shutil.which("pip3") or shutil.which("pip"):
        return [found]
    raise FetchError("packages are fetched with pip, which is missing here: python -m ensurepip")


def _run(words: list[str], what: str, where: str | None = None) -> None:
    done = subprocess.run(words, capture_output=True, text=True, cwd=where)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()[-3:]
        raise FetchError(f"{what} cannot be fetched by `{' '.join(words[:6])} …`: {' '.join(said)}")
