"""The demonstration end to end, with a pipeline that is hardly trained: what it shows must be what it measured."""

import re

import pytest
import torch
from PIL import Image

from comcat.cli import main
from comcat.diffusion.digits import demo
from comcat.diffusion.digits.recogniser import train_recogniser
from comcat.diffusion.digits.scans import INKS, LEFT_OUT, WORDS, digit_pictures, inks_of


@pytest.fixture(scope="module")
def recogniser():
    """Hardly trained: here nothing depends on how well it reads, and ``test_digits_pipeline`` looks at that."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("comcat.diffusion.digits.recogniser._EPOCHS", 1)
        return train_recogniser()


@pytest.fixture
def quick(monkeypatch, recogniser):
    pipeline = demo.digits_pipeline
    monkeypatch.setattr(demo, "train_recogniser", lambda: recogniser)
    monkeypatch.setattr(demo, "digits_pipeline", lambda folder, **more: pipeline(folder, steps=2, **more))
    monkeypatch.setattr(demo, "SETTINGS", {"steps": 3, "batch_size": 2, "rank": 2, "lr": 0.01})
    monkeypatch.setattr(demo, "SAMPLING", {"steps": 2, "guidance": 3.0, "batch_size": 60, "seed": 0})
    monkeypatch.setattr(demo, "CONCEPTS", 6)
    monkeypatch.setattr(demo, "OTHERS", 2)


def test_the_command(quick, tmp_path, capsys):
    assert main(["demo", "customize", "--out", str(tmp_path / "demo"), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert f"V* is a {WORDS[LEFT_OUT]}" in said and "V* in red" in said and "the other nine in white" in said
    assert "report.html" in said and (tmp_path / "demo" / "report.html").is_file()


def test_demo(quick, tmp_path, capsys):
    shown = demo.run(tmp_path / "demo", progress=False)
    assert (tmp_path / "cache" / "digits-pipeline-0" / "model_index.json").is_file()
    assert shown.adapter.is_file() and shown.seconds > 0
    before, after = shown.before, shown.after
    assert {ink: len(own) for ink, own in before.concept.items()} == {"white": 6, "red": 6, "green": 6}
    assert all(set(own) == set(range(10)) - {LEFT_OUT} for own in after.survived.values())
    for ink in ("white", "red", "green"):
        assert [p.tobytes() for p in before.concept[ink]] != [p.tobytes() for p in after.concept[ink]]
    page = shown.report.read_text()
    assert f"The digit {WORDS[LEFT_OUT]}, taught as V*" in page
    rows = re.findall(r'<h3>(.*?) <span class="figure">([\d.]+) % of (\d+) right</span></h3>', page)
    assert len(rows) == 10 and page.count("<h3>") == 11, "every row but that of the examples has its figure"
    assert rows[3] == ("“a photo of V* in red” after", f"{100 * after.right['red']:.0f}", "6")
    assert rows[-1] == ("The other nine in red after", f"{100 * after.mean_survived('red'):.1f}", "18")
    assert page.count("data:image/png") == 10 + 3 * 2 * 6 + 2 * 2 * 18
    again = demo.run(tmp_path / "demo", progress=False)
    assert again.after.right == after.right and again.after.survived == after.survived
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("ink", INKS)
def test_an_ink_is_read_from_a_picture(ink):
    assert inks_of(digit_pictures(3, 4, ink=ink)) == [ink] * 4


def test_a_picture_without_strokes_has_no_ink():
    assert inks_of([Image.new("RGB", (32, 32), (9, 9, 9))]) == ["none"]


def test_a_picture_is_right_only_in_the_ink_that_was_asked_for():
    class SeesSevens:
        def recognise(self, pictures):
            return torch.full((len(pictures),), LEFT_OUT)

    mixed = digit_pictures(LEFT_OUT, 3, ink="red") + digit_pictures(LEFT_OUT, 1, ink="green")
    assert demo._share(SeesSevens(), mixed, LEFT_OUT, "red") == 0.75
    assert demo._share(SeesSevens(), mixed, 3, "red") == 0
