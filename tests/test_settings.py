"""Settings say what is wrong with them before any work: names, types, choices and ranges."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, get_type_hints

import numpy as np
import pytest
import torch

import comcat
from comcat.cli import VERBS, settings_of
from comcat.diffusion import CustomizeSettings, GenerateSettings
from comcat.errors import SettingsError
from comcat.methods.compress import CompressSettings
from comcat.methods.gating import PruneSettings
from comcat.methods.search import SearchOptions, SearchSettings
from comcat.scoring.settings import ScoreSettings
from comcat.settings import check_types, expect, expect_one_of, from_keywords, part_of
from comcat.tuning.settings import TuneSettings

from .models import pictures, tiny_vit

ALL = [
    CompressSettings,
    SearchOptions,
    SearchSettings,
    TuneSettings,
    PruneSettings,
    CustomizeSettings,
    GenerateSettings,
    ScoreSettings,
]
Colour = Literal["red", "blue"]


@dataclass(frozen=True, kw_only=True)
class Inner:
    deep: int = 1


@dataclass(frozen=True, kw_only=True)
class Paint(Inner):
    coats: int = 2
    share: float | None = 0.5
    glossy: bool = False
    colour: Colour | Literal["green"] = "red"
    rooms: tuple[str, ...] = ()
    ramp: tuple[float, float] | None = None
    mix: tuple[Colour, ...] | None = None
    file: Path | None = None
    inner: Inner = field(default_factory=Inner)

    def __post_init__(self) -> None:
        check_types(self)
        expect(self, "coats", "ramp", least=1)
        expect(self, "share", above=0, below=1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"coat": 1}, "unknown setting 'coat'; did you mean 'coats'?"),
        ({"coats": "3"}, "got coats='3', expected a whole number"),
        ({"coats": 2.5}, "got coats=2.5, expected a whole number"),
        ({"coats": 2.0}, "got coats=2.0, expected a whole number"),
        ({"coats": True}, "got coats=True, expected a whole number"),
        ({"coats": None}, "got coats=None, expected a whole number"),
        ({"coats": 0}, "got coats=0, expected a whole number from 1"),
        ({"share": "much"}, "got share='much', expected a number"),
        ({"share": 1}, "got share=1, expected a number above 0 to below 1"),
        ({"share": 0.0}, "got share=0.0, expected a number above 0 to below 1"),
        ({"share": float("nan")}, "got share=nan, expected a number above 0 to below 1"),
        ({"share": torch.tensor(0.5)}, "got share=tensor(0.5000), expected a number"),
        ({"glossy": 1}, "got glossy=1, expected true or false"),
        ({"glossy": "no"}, "got glossy='no', expected true or false"),
        ({"colour": "gren"}, "got colour='gren', expected one of red, blue, green; did you mean 'green'"),
        ({"colour": 3}, "got colour=3, expected one of red, blue, green"),
        ({"rooms": "hall"}, "got rooms='hall', expected a sequence of texts"),
        ({"rooms": ("hall", 3)}, "got rooms=('hall', 3), expected a sequence of texts"),
        ({"ramp": (1, 2, 3)}, "got ramp=(1, 2, 3), expected 2 numbers"),
        ({"ramp": (1, 0.5)}, "got ramp=(1, 0.5), expected 2 numbers from 1"),
        ({"mix": ("red", "blu")}, "got mix=('red', 'blu'), expected some of red, blue; did you mean 'blue'"),
        ({"mix": "red"}, "got mix='red', expected some of red, blue"),
        ({"file": 3}, "got file=3, expected a path"),
        ({"inner": {"deep": 1}}, "got inner={'deep': 1}, expected Inner"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told(wrong, message):
    with pytest.raises(SettingsError) as caught:
        from_keywords(Paint, wrong)
    assert message in str(caught.value)


def test_a_long_value_is_told_in_short():
    with pytest.raises(SettingsError) as caught:
        Paint(coats="3" * 1000)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 150


def test_what_is_as_good_becomes_what_is_annotated():
    made = Paint(coats=np.int64(3), share=np.float32(0.25), rooms=["hall"], ramp=[1, 2], file="x.json")  # type: ignore[arg-type]
    assert (made.coats, made.share, made.rooms, made.ramp, made.file) == (3, 0.25, ("hall",), (1, 2), Path("x.json"))
    assert type(made.coats) is int and type(made.share) is float
    assert Paint(share=None, ramp=(2, 3), mix=("blue",)).mix == ("blue",)


def test_a_part_is_taken_out_of_larger_settings():
    assert part_of(Inner, Paint(deep=7)) == Inner(deep=7)


def test_a_value_is_one_of_those_known():
    expect_one_of("ink", "red", ("red", "blue"))
    with pytest.raises(SettingsError, match="got ink='bleu', expected one of red, blue; did you mean 'blue'"):
        expect_one_of("ink", "bleu", ("red", "blue"))


ALL_FIELDS = [pytest.param(kind, f.name, id=f"{kind.__name__}.{f.name}") for kind in ALL for f in fields(kind)]


@pytest.mark.parametrize(("kind", "name"), ALL_FIELDS)
def test_every_field_of_every_settings_refuses_another_type(kind, name):
    with pytest.raises(SettingsError, match=f"got {name}=.*, expected "):
        kind(**{name: object()})


@pytest.mark.parametrize("verb", VERBS)
def test_the_types_of_a_command_can_be_checked(verb):
    kind = settings_of(verb)
    assert set(get_type_hints(kind)) >= {f.name for f in fields(kind)}


@pytest.mark.parametrize(
    "call",
    [
        lambda model: comcat.compress(model, pictures(), reduce="0.5"),
        lambda model: comcat.compress(model, pictures(), reduce=0.5, pictures=2.5),
        lambda model: comcat.search(model, "digits", rounds="4"),
        lambda model: comcat.tune(model, "digits", lr="fast"),
        lambda model: comcat.tune(model, "digits", steps=2.5),
    ],
)
def test_the_public_functions_refuse_before_any_work(call):
    with pytest.raises(SettingsError, match="expected a"):
        call(tiny_vit())
