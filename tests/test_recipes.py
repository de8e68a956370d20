"""Options from a YAML file: what comes out is what a user would have typed."""

import sys
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from comcat.cli import VERBS, settings_of
from comcat.cli.common import Common, Positional
from comcat.cli.recipes import with_recipe
from comcat.errors import SettingsError


@dataclass(frozen=True, kw_only=True)
class Paint(Common):
    ALTERNATIVES: ClassVar[tuple[str, ...]] = ("litres", "coats")

    what: Positional[str]
    colour: Positional[str]
    litres: float | None = None
    coats: int | None = None
    rooms: tuple[str, ...] = ()
    dry: bool = False
    gloss: bool | None = None
    recipe: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Sweep(Common):
    where: str = "here"


COMMANDS = {"paint": Paint, "sweep": Sweep}


@pytest.fixture
def recipe(tmp_path):
    def write(text):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return str(path)

    return write


def test_options_of_each_type_come_before_those_given(recipe):
    path = recipe("litres: 2.5\nrooms: [hall, attic]\ndry: true\ngloss: false\nseed: null\n")
    got = with_recipe(["paint", "wall", "red", "--recipe", path, "--rooms", "hall"], COMMANDS)
    assert got == [
        *["paint", "wall", "red"],
        *["--litres", "2.5", "--rooms", "hall", "attic", "--dry", "--gloss", "False"],
        *["--rooms", "hall", "--recipe", path],
    ]


def test_positional_arguments_of_the_recipe_fill_up_those_given(recipe):
    path = recipe("colour: blue\npretrained: false\nwhat: door\n")
    assert with_recipe(["paint", f"--recipe={path}"], COMMANDS)[:4] == ["paint", "door", "blue", "--no-pretrained"]
    assert with_recipe(["paint", "--recipe", path, "wall"], COMMANDS)[:3] == ["paint", "wall", "blue"]
    assert with_recipe(["paint", "wall", "red", "--recipe", path], COMMANDS)[:4] == [
        "paint",
        "wall",
        "red",
        "--no-pretrained",
    ]


@pytest.mark.parametrize("given", [["--coats", "2"], ["--coats=2"], ["--litres", "1"]])
def test_one_of_two_alternatives_given_replaces_both(recipe, given):
    path = recipe("litres: 2.5\ncoats: 3\ndry: true\n")
    assert with_recipe(["paint", "--recipe", path, *given], COMMANDS) == ["paint", "--dry", *given, "--recipe", path]


def test_verbs_without_recipes_and_commands_without_one_stay(recipe):
    for arguments in (
        [],
        ["paint", "wall"],
        ["paint", "--recipe"],
        ["sweep", "--recipe", recipe("where: there")],
        ["nothing"],
    ):
        assert with_recipe(arguments, COMMANDS) == arguments


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lites: 1", "did you mean 'litres'"),
        ("recipe: other.yaml", "unknown option 'recipe'"),
        ("- litres", "got list"),
        ("litres: [", "not YAML"),
        ("litres: {a: 1}", "one value or a list"),
        ("rooms: [[hall]]", "one value or a list"),
        ("litres: 1\ndry: true\nlitres: 2", "'litres' is there twice"),
        ("dry: 'no'", "got dry 'no', expected true or false"),
    ],
)
def test_a_bad_recipe_is_named(recipe, text, said):
    with pytest.raises(SettingsError, match=r"recipe\.yaml") as caught:
        with_recipe(["paint", "--recipe", recipe(text)], COMMANDS)
    assert said in str(caught.value)


def test_every_registered_verb_has_settings_and_a_function():
    for verb in VERBS:
        settings = settings_of(verb)
        assert is_dataclass(settings) and isinstance(settings.ALTERNATIVES, tuple)
        assert callable(sys.modules[settings.__module__].run)
