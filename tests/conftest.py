"""What every test shares: no network, no screen, the same random numbers, and no GPU test without a GPU."""

import os
import random
import tempfile

# These must be set before any library that reads them is imported, here or in a process that a test starts.
# A cache of its own keeps the tests from leaning on what a developer happened to download.
_cache = tempfile.TemporaryDirectory(prefix="comcat-tests-")
os.environ["HF_HOME"] = _cache.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["MPLBACKEND"] = "Agg"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

SEED = 0

# Tiny models gain nothing from more threads, and several test processes with several threads each fight over the cores.
torch.set_num_threads(1)


class _TorchRandom:
    """Torch's CPU generator in the shape of ``random.Random``, so that hypothesis can replay what an example drew."""

    def seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    def getstate(self) -> bytes:
        return torch.get_rng_state().numpy().tobytes()

    def setstate(self, state: bytes) -> None:
        torch.set_rng_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


_torch_random = _TorchRandom()  # hypothesis holds only a weak reference
hypothesis.register_random(_torch_random)

# No deadline: the first call into torch is slow and says nothing about the code. `make test` sets CI.
hypothesis.settings.register_profile("comcat", deadline=None, database=None, derandomize="CI" in os.environ)
hypothesis.settings.load_profile("comcat")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked ``gpu`` where torch sees no CUDA device."""
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):  # keywords hold the names of folders too
            item.add_marker(no_gpu)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed Python's, NumPy's and torch's generators before each test, and return the seed."""
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    return SEED


@pytest.fixture(autouse=True)
def brief_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds of a timing stop at their least number: no test asserts a duration, so none waits for a steady one.

    ``tests/measure/test_timing.py`` tests the seconds too and leaves this out.
    """
    monkeypatch.setattr("comcat.measure.timing._long_enough", lambda spent, least: True)


@pytest.fixture(autouse=True)
def plain_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports that a test makes by the way have no drawn figures, which take longer than compressing a tiny model.

    ``tests/test_report.py``, which looks at figures, leaves this out; fixtures of a module draw them, too.
    """

    def captioned(name: str, kind: str, caption: str, *_: object) -> dict[str, str]:
        return {"caption": caption, "wide": "", "narrow": ""}

    monkeypatch.setattr("comcat.report.page._picture", captioned)
