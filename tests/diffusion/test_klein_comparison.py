"""The comparison by PEFT's protocol runs whole, on a tiny FLUX.2 and random features of pictures."""

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from .newer import NEWER

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = ("common", "peers", "card.flux2", "card", "klein_comparison")


@pytest.fixture
def klein(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import common

    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    import klein_comparison

    yield klein_comparison
    for name in SCRIPTS:
        sys.modules.pop(name, None)


@pytest.fixture
def concept(tmp_path):
    folder = tmp_path / "concept"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(8):
        Image.fromarray(random.integers(0, 255, (20, 16, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    (folder / "prompts.txt").write_text("".join(f"a sks cat {number}\n" for number in range(8)))
    return folder


@pytest.fixture
def words(klein, concept, tmp_path, monkeypatch):
    from diffusers import Flux2KleinPipeline
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    features = Dinov2Model(Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28,
        patch_size=14))  # fmt: skip
    features.save_pretrained(tmp_path / "features")
    BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(
        tmp_path / "features"
    )
    read = Flux2KleinPipeline._get_qwen3_prompt_embeds

    def shorter(**given):
        return read(**given | {"max_sequence_length": 24})

    monkeypatch.setattr(Flux2KleinPipeline, "_get_qwen3_prompt_embeds", staticmethod(shorter))  # 512 tokens take long
    (tmp_path / "drift.txt").write_text("a dog\na house\n")
    pipe = NEWER["flux2"](tmp_path / "parts")
    monkeypatch.setattr(klein.diffusion, "load_pipeline", lambda folder, **_: copy.deepcopy(pipe))  # opened eight times
    given = {
        "--model": tmp_path / "pipe", "--concept": concept, "--features": tmp_path / "features",
        "--work": tmp_path / "work", "--steps": 2, "--batch": 2, "--resolution": 16, "--sample-steps": 1,
        "--dtype": "float32", "--device": "cpu", "--drift-prompts": tmp_path / "drift.txt",
    }  # fmt: skip
    return [str(x) for pair in given.items() for x in pair]


def test_it_runs_whole_and_goes_on(klein, words, tmp_path, capsys):
    words = [*words, "--rates", "1e-2", "--only", "transformer_blocks:vo"]
    found = klein.main(words)
    ours, same, everywhere, peft = found["results"]
    assert ours == "comcat, transformer_blocks:vo" and same.endswith("in the modules of transformer_blocks:vo")
    assert everywhere.endswith("in all attention") and peft == "LoRA, rank 32, as PEFT's"
    for run in found["results"].values():
        assert -1 <= run["similarity"] <= 1 and 0 < run["drift"] < 2 and run["seconds"] > 0 and run["peak_bytes"] > 0
        assert run["validation"] == run["tried"][str(run["lr"])]
    near = found["results"][same]["parameters"] / found["results"][ours]["parameters"]
    assert 0.5 <= near <= 2 and found["results"][peft]["lr"] == 1e-4
    assert found["pictures"] == {"train": 2, "validation": 2, "test": 4} and len(found["drift_prompts"]) == 2
    said = capsys.readouterr().out
    assert "target: similarity ≥ 0.70 at drift ≤ 0.26 in ≤ 2 MB" in said and "LoKr (published)" in said
    written = json.loads(next((tmp_path / "results").rglob("klein-comparison.json")).read_text())
    assert written["results"] == found["results"]
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").glob("*.json")}
    assert len(kept) == 5 and klein.main(words)["results"] == found["results"]
    assert kept == {path: path.stat().st_mtime_ns for path in kept}


def test_the_rate_is_chosen_by_the_validation_pictures(klein, words, monkeypatch):
    work = klein.Comparison(klein.arguments([*words, "--rates", "1e-3", "1e-2"]))
    figures = {1e-3: (0.5, 0.6, 0.2), 1e-2: (0.4, 0.9, 0.1)}

    def taught(one, rate, folder, settings):
        return {"lr": rate, "bytes": 1, **dict(zip(("validation", "similarity", "drift"), figures[rate], strict=True))}

    monkeypatch.setattr(work, "_taught", taught)
    found = work.result(klein.Contender("one", None, (1e-3, 1e-2)))
    assert found["lr"] == 1e-3 and found["tried"] == {"0.001": 0.5, "0.01": 0.4} and not found["meets_target"]
    assert len(list(work.a.work.glob("one-*.json"))) == 2


@pytest.mark.parametrize(
    ("similarity", "drift", "size", "met"),
    [(0.7, 0.26, 2e6, True), (0.69, 0.2, 1, False), (0.8, 0.3, 1, False), (1, 0, 3e6, False)],
)
def test_the_target(klein, similarity, drift, size, met):
    assert klein.meets({"similarity": similarity, "drift": drift, "bytes": size}) is met


def test_without_an_adapter_nothing_drifts(klein, words):
    work = klein.Comparison(klein.arguments(words))
    assert 1 - klein.cosine(work.drawn(work.pipe(), work.unrelated), work.before) == pytest.approx(0, abs=1e-6)
    images = work.test.images
    assert klein.cosine(work.features(images), work.features(images)) == pytest.approx(1)
    assert klein.cosine(work.features(images), work.features(images[::-1])) < 0.9999


def test_the_split_is_peft_s(klein, concept):
    """Of NumPy's seed 0: the first are trained on, then two, then four."""
    order = np.arange(8)
    np.random.RandomState(0).shuffle(order)
    train, validation, test = klein.split(concept)
    said = [f"a sks cat {number}" for number in order]
    assert [train.prompts, validation.prompts, test.prompts] == [said[:2], said[2:4], said[4:]]
    with Image.open(concept / f"{order[-1]}.png") as last:
        assert np.array_equal(np.asarray(test.images[-1]), np.asarray(last))


@pytest.mark.parametrize(("prompts", "says"), [(None, "is not there"), ("a sks cat\n", "expected one for each of 8")])
def test_a_concept_without_its_prompts(klein, concept, prompts, says):
    (concept / "prompts.txt").unlink()
    if prompts:
        (concept / "prompts.txt").write_text(prompts)
    with pytest.raises(SystemExit, match=says):
        klein.split(concept)


def test_a_run_that_was_stopped_goes_on(klein, words, monkeypatch):
    words = [*words, "--rates", "1e-2", "--only", "transformer_blocks:vo"]
    work = klein.Comparison(klein.arguments(words))
    one = work.contenders()[0]
    apart = klein.Comparison(klein.arguments([*words, "--work", f"{work.a.work}-whole"]))
    whole = apart.result(one)
    steps, step = [], klein.Optimisation.step

    def stopped(run, number, watch):
        if len(steps) == 1:
            steps.append("stopped")
            raise KeyboardInterrupt
        steps.append(number)
        return step(run, number, watch)

    monkeypatch.setattr(klein.Optimisation, "step", stopped)
    monkeypatch.setattr(klein, "EVERY", 1)
    with pytest.raises(KeyboardInterrupt):
        work.result(one)
    again = work.result(one)
    assert steps == [0, "stopped", 1, 1]  # the last is repeated to measure its memory
    for figure in ("similarity", "drift", "validation"):
        assert again[figure] == pytest.approx(whole[figure], abs=1e-9)
