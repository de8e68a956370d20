"""Every test that asks for a ``case`` runs on every model of the registry."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from comcat.hosts import find_sites
from comcat.sites import Sites

from ..models import ranked
from . import zoo


@dataclass(frozen=True)
class Subject:
    """A model of the registry, its sites (those with ranks, and hidden units apart) and its output on two pictures.
    Tests work on copies of the model.
    """

    case: zoo.Case
    original: nn.Module
    sites: Sites
    units: Sites
    images: Tensor
    output: Tensor

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.original)


_SUBJECTS: dict[str, Subject] = {}


def subject_of(name: str) -> Subject:
    """The model of a name, built once a session."""
    if name not in _SUBJECTS:
        case = zoo.CASES[name]
        model = case.model()
        images = case.images()
        sites = find_sites(model)
        output = zoo.run(model, images).detach()
        _SUBJECTS[name] = Subject(case, model, ranked(sites), sites.only("units"), images, output)
    return _SUBJECTS[name]


@pytest.fixture(params=list(zoo.CASES))
def subject(request: pytest.FixtureRequest) -> Subject:
    return subject_of(request.param)


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small spend most of their time waking threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
