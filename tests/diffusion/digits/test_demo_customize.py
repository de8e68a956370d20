"""The demonstration end to end, with a pipeline that is hardly trained: what it shows must be what it measured."""

import pytest

from comcat.cli import main
from comcat.diffusion.digits import demo
from comcat.diffusion.digits.scans import LEFT_OUT, WORDS


@pytest.fixture
def quick(monkeypatch):
    pipeline = demo.digits_pipeline
    monkeypatch.setattr(demo, "digits_pipeline", lambda folder, **more: pipeline(folder, steps=2, **more))
    monkeypatch.setattr(demo, "SETTINGS", {"steps": 3, "batch_size": 2, "rank": 2, "lr": 0.01})
    monkeypatch.setattr(demo, "SAMPLING", {"steps": 2, "guidance": 3.0, "batch_size": 12, "seed": 0})
    monkeypatch.setattr(demo, "CONCEPTS", 6)
    monkeypatch.setattr(demo, "OTHERS", 2)


def test_the_command(quick, tmp_path, capsys):
    assert main(["demo", "customize", "--out", str(tmp_path / "demo"), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert f"V* recognised as a {WORDS[LEFT_OUT]}" in said and "the other nine recognised" in said
    assert "report.html" in said and (tmp_path / "demo" / "report.html").is_file()


def test_demo(quick, tmp_path, capsys):
    shown = demo.run(tmp_path / "demo", progress=False)
    assert (tmp_path / "cache" / "digits-pipeline-0" / "model_index.json").is_file()
    assert shown.adapter.is_file() and shown.seconds > 0
    assert len(shown.before.concept) == 6 and set(shown.after.survived) == set(range(10)) - {LEFT_OUT}
    assert [p.tobytes() for p in shown.before.concept] != [p.tobytes() for p in shown.after.concept]
    page = shown.report.read_text()
    assert f"The digit {WORDS[LEFT_OUT]}, taught as V*" in page
    assert (
        f"{100 * shown.after.mean_survived:.1f} %" in page and f"before {100 * shown.before.recognised:.0f} %" in page
    )
    assert page.count("data:image/png") == 10 + 2 * 6 + 2 * 2 + 2 * 18
    again = demo.run(tmp_path / "demo", progress=False)
    assert again.after.recognised == shown.after.recognised and again.after.survived == shown.after.survived
    assert capsys.readouterr().out == ""
