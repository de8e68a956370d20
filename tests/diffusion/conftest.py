"""What the tests of adapters share: one case for every family of denoisers."""

from __future__ import annotations

import pytest

from .denoisers import CASES, Case


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]
