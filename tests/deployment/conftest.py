"""What every export of these tests would build anew, and is the same each time."""

from collections.abc import Iterator
from functools import cache

import pytest
from torch.onnx._internal.exporter._registration import ONNXRegistry


@pytest.fixture(autouse=True, scope="package")
def one_table_of_operators() -> Iterator[None]:
    """torch fills its table of ONNX operators at each export, which is a fifth of the time that one takes here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(cache(ONNXRegistry.from_torchlib)))
        yield
