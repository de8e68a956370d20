"""The benchmarks of customization run, on pipelines that are hardly trained or tiny."""

import json
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = (
    "common", "peers", "customization", "adapter_cost", "card.flux2", "card", "lora_export", "adapter_bytes",
    "adapter_options", "two_concepts", "embedded_digits",
)  # fmt: skip
PAPER = ("taught", "table5", "table6", "figures1011")
BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def scripts(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import common

    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    yield tmp_path
    for name in (*SCRIPTS, *PAPER):
        sys.modules.pop(name, None)


def test_customization(scripts, capsys, monkeypatch):
    import customization

    monkeypatch.setattr("comcat.diffusion.digits.recogniser._EPOCHS", 1)
    arguments = [
        "--quick",
        "--work",
        str(scripts / "work"),
        "--methods",
        "comcat",
        "comcat, protected",
        "Custom Diffusion",
        "LoKr",
    ]
    first = customization.main(arguments)
    assert first["modes"].keys() == {"published", "equal"} and len(first["runs"]) == 8
    for mode in first["modes"].values():
        assert mode["comcat"]["trained"]["mean"] < mode["Custom Diffusion"]["trained"]["mean"]
    published, equal = (first["modes"][m]["Custom Diffusion"] for m in ("published", "equal"))
    assert published["trained"]["mean"] > equal["trained"]["mean"]  # V*'s embedding learns as well
    assert published["peak_bytes"]["mean"] > equal["peak_bytes"]["mean"]  # VAE and text encoder take part
    assert 0 <= published["recognised"]["mean"] <= 1 and published["stored_bytes"]["mean"] > 0
    said = capsys.readouterr().out
    assert "Table 5, published" in said and "Table 6, equal" in said
    written = json.loads(next((scripts / "results").rglob("customization.json")).read_text())
    assert written["rates"]["equal"]["LoKr"]["lr"] == pytest.approx(1e-3) and written["environment"]
    assert len(list((scripts / "results").rglob("customization-*.png"))) == 2
    again = customization.main(arguments)  # everything is kept
    assert again["runs"] == first["runs"]


@pytest.mark.slow
def test_lora_export(scripts, capsys):
    import lora_export

    found = lora_export.main(["--quick", "--work", str(scripts / "work"), "--ranks", "1", "4", "--steps", "2"])
    low, high = found["rows"]
    assert low["difference"] >= high["difference"] > 0 and high["bytes"] > low["bytes"]
    assert 1 < high["of_plain"] < low["of_plain"]  # a file of a few kB is mostly names
    assert found["met_from_rank"] in (1, 4, None) and "the goal is met" in capsys.readouterr().out
    assert json.loads(next((scripts / "results").rglob("lora-export.json")).read_text())["quick"]


@pytest.fixture
def paper(scripts, monkeypatch):
    """What the paper's scripts on customization are given: the embedded pipeline, hardly trained, and two concepts."""
    from comcat.diffusion.digits.embedded import digits_pipeline
    from comcat.diffusion.digits.scans import digit_pictures

    monkeypatch.syspath_prepend(str(BENCHMARKS / "paper"))
    digits_pipeline(scripts / "digits", steps=2)
    for name, digit, prompt in (("nine", 9, None), ("red_seven", 7, "a photo of V*")):
        folder = scripts / "concepts" / name
        folder.mkdir(parents=True)
        for number, picture in enumerate(digit_pictures(digit, 3, seed=0)):
            picture.save(folder / f"{number}.png")
        if prompt:
            (folder / "prompt.txt").write_text(prompt + "\n")
    (scripts / "unrelated.txt").write_text("a photo of two\na photo of three\n")
    words = {
        "--model": scripts / "digits", "--concepts": scripts / "concepts", "--work": scripts / "work", "--steps": 2,
        "--count": 4, "--unrelated": scripts / "unrelated.txt", "--unrelated-count": 2, "--class-count": 2,
        "--sample-steps": 1, "--features": "timm:test_vit",
    }  # fmt: skip
    return [*(str(x) for pair in words.items() for x in pair), "--no-pretrained"]


def test_the_paper_s_customization_tables_and_figures(paper, scripts, capsys):
    import figures1011
    import table5
    import table6

    methods = ["--methods", "comcat, all attention", "Custom Diffusion"]
    first = table5.main([*paper, *methods])
    assert list(first["means"]) == ["untouched", "comcat, all attention", "Custom Diffusion"]
    ours, theirs = first["concepts"]["comcat, all attention"], first["concepts"]["Custom Diffusion"]
    assert list(ours) == ["nine", "red_seven"] and ours["nine"]["stored_bytes"] < theirs["nine"]["stored_bytes"]
    assert all(r["fid"] > 0 and r["seconds"] > 0 and r["peak_bytes"] > 0 for r in (*ours.values(), *theirs.values()))
    said = capsys.readouterr().out
    assert "COMCAT (published)" in said and "101.2" in said
    kept = {path: path.stat().st_mtime_ns for path in (scripts / "work").glob("*.json")}
    second = table6.main([*paper, *methods])
    assert second["means"]["untouched"]["unrelated_fid"]["mean"] < 1e-3 < second["floor"]["unrelated_fid"]
    assert second["means"]["Custom Diffusion"]["unrelated_fid"]["mean"] > 0
    drawn = figures1011.main([*paper, *methods])
    assert drawn["figures"] == {"nine": "figure-nine.png", "red_seven": "figure-red_seven.png"}
    assert drawn["prompts"]["red_seven"][0] == "a photo of V*" and len(drawn["prompts"]["nine"]) == 4
    assert all((scripts / "work" / name).stat().st_size > 1000 for name in drawn["figures"].values())
    assert kept == {path: path.stat().st_mtime_ns for path in kept}  # what one script made the others do not repeat
    assert len(list((scripts / "results").rglob("paper-*.json"))) == 3


def test_a_folder_without_concepts(paper, scripts):
    import table5

    (scripts / "none").mkdir()
    with pytest.raises(SystemExit, match="expected one for each concept"):
        table5.main([*paper, "--concepts", str(scripts / "none")])


def test_methods_leave_the_pipeline_as_it_was(scripts, tmp_path):
    import peers

    from comcat.diffusion.pipeline.families import family_of

    from . import tiny

    pipe = tiny.stable_diffusion(tmp_path / "parts")
    family = family_of(pipe)
    noisy, times = torch.randn(1, 4, 8, 8), torch.tensor([50])
    conditions = family.encode(["a photo of a cat"])
    before = family.predict(noisy, times, conditions)
    names = [n for n, _ in pipe.unet.named_parameters()]
    for name, set_up in peers.METHODS.items():
        method = set_up(family, seed=0, protect=["a red cat"], token=None)
        assert method.trained and all(p.requires_grad for p in method.trained.values()), name
        assert method.stored_bytes(tmp_path) > 2 * sum(p.numel() for p in method.trained.values())
        method.undo.close()
        assert torch.equal(family.predict(noisy, times, conditions), before), name
        assert [n for n, _ in pipe.unet.named_parameters()] == names, name


def test_encoding_anew_draws_what_the_cache_draws(scripts, tmp_path):
    """The same pictures, latents and prompts by step, whichever way they are had."""
    import peers

    from comcat.diffusion.pipeline.families import family_of

    from . import tiny

    family = family_of(tiny.stable_diffusion(tmp_path / "parts"))
    kinds = [
        peers.Kind(tiny.pictures(3, (16, 16)), "a photo of V* dog", 2, 1.0),
        peers.Kind(tiny.pictures(1), "a dog", 2, 0.5),
    ]
    anew = peers.EncodingSource(family, kinds, 16, seed=3)
    cached = peers.cached_source(family, kinds, 16, seed=3, live_text=False)
    for source in (anew, cached):
        batch = source(5, torch.Generator().manual_seed(0))
        assert batch.latents.shape == (4, 4, 8, 8)
        assert batch.weights.tolist() == [0.5, 0.5, 0.25, 0.25]
    a, b = (s(5, torch.Generator().manual_seed(0)) for s in (anew, cached))
    torch.testing.assert_close(a.conditions["prompt"], b.conditions["prompt"])


def test_bytes_of_choices(scripts, capsys):
    import adapter_bytes

    found = adapter_bytes.main([])
    choices = {name: one["bytes"] for name, one in found["choices"].items()}
    double, single = found["module"]["transformer_blocks"], found["module"]["single_transformer_blocks"]
    assert double["bytes"] == 2 * single["bytes"] == 2 * 8 * 24 * 3072
    assert (
        choices["all"] == 5 * double["bytes"] + 20 * single["bytes"] and choices["values and outputs"] < choices["all"]
    )
    assert choices["one double block"] == double["bytes"] and "three single blocks" in capsys.readouterr().out
    assert any(1e6 <= own <= 2e6 for own in choices.values())
    assert json.loads(next((scripts / "results").rglob("adapter-bytes.json")).read_text())["rank"] == 1


@pytest.mark.slow
def test_options_of_adapters(scripts):
    import adapter_options

    options = ["plain", "with a bar, masked", "rank by time, drawn so too", "orthogonal start", "decoupled scale"]
    given = ["--quick", "--work", str(scripts / "work"), "--options", *options, "words protected, new token"]
    found = adapter_options.main(given)
    assert list(found["options"]) == [*options, "words protected, new token"]
    assert all(0 <= run["recognised"] <= 1 for own in found["runs"].values() for run in own)
    assert adapter_options.has_bar(adapter_options.barred(adapter_options.digit_pictures(7, 1)[0]))


def test_ways_to_train_an_adapter(scripts):
    """Gates leave the first channels at noisy times and all at clean ones; starts and magnitudes are what they say."""
    from types import SimpleNamespace

    import adapter_options

    import comcat.diffusion as cd
    from comcat.diffusion.digits.embedded import build

    pipe = build()
    adapter = cd.attach(pipe, rank=4, init="random")
    learner = SimpleNamespace(adapter=adapter, protection=SimpleNamespace(factors=[]))
    terms = next(iter(adapter.terms.values()))
    tokens = torch.randn(2, 3, terms.q_up.shape[1])
    adapter_options.rank_by_time(pipe, learner)
    text, latents = torch.randn(2, 5, 64), torch.randn(2, 3, 8, 8)
    pipe.unet(latents, torch.tensor([0, 999]), text)
    kept = terms("q", tokens).abs().sum((1, 2)).bool().tolist()
    assert kept == [[True] * 4, [True, False, False, False]]
    with torch.no_grad():
        assert terms("q", tokens).all()  # where pictures are drawn, all channels act
    adapter_options.orthogonal(pipe, learner)
    gram = terms.q_up @ terms.q_up.mT
    assert torch.allclose(gram, gram[0, 0] * torch.eye(len(gram)), atol=1e-5)
    before = pipe.unet(latents, torch.tensor([5, 5]), text).sample
    adapter_options.decoupled(pipe, learner)
    assert not terms.k_down.any() and not terms.out_up.any() and terms.k_down.isfinite().all()
    assert not torch.equal(pipe.unet(latents, torch.tensor([5, 5]), text).sample, before)
    assert learner.protection.factors[0] is terms.parametrizations.k_down.original1


def test_prompts_drawn_from_the_vocabulary(scripts):
    import peers

    from comcat.diffusion.digits.embedded import build

    tokenizer = build().tokenizer
    drawn = peers.drawn_prompts(tokenizer, "a photo of V* dog", "V*", 50, seed=3)
    assert drawn == peers.drawn_prompts(tokenizer, "a photo of V* dog", "V*", 50, seed=3)
    assert len(set(drawn)) > 40 and not any("V*" in prompt for prompt in drawn)
    assert all(prompt.startswith("a photo of ") and prompt.endswith(" dog") for prompt in drawn)
    assert any("three" in prompt for prompt in drawn)


@pytest.mark.slow
def test_two_concepts(scripts, capsys):
    import two_concepts

    given = ["--quick", "--work", str(scripts / "work"), "--methods", "comcat, protected", "LoRA"]
    first = two_concepts.main(given)
    assert (
        list(first["methods"]) == ["comcat, protected", "comcat, protected, told apart", "LoRA"]
        and "kept at least" in capsys.readouterr().out
    )
    assert two_concepts.main(given)["runs"] == first["runs"]  # everything is kept
    assert (
        json.loads(next((scripts / "results").rglob("two-concepts.json")).read_text())["concepts"]["W*"]["digit"] == 4
    )


def test_two_adapters_of_a_kind_act_together(scripts):
    """Also where the later one is PEFT's, which lets only the newest act by itself."""
    import two_concepts

    from comcat.diffusion.digits.embedded import build
    from comcat.diffusion.pipeline.families import family_of

    for name in ("comcat", "LoRA", "LoKr"):
        family = family_of(build())
        noisy, times, conditions = torch.randn(1, 3, 8, 8), torch.tensor([50]), family.encode(["a photo of V*"])
        outputs = [family.predict(noisy, times, conditions)]
        for concept in two_concepts.CONCEPTS:
            method = two_concepts.attached(family, name, concept, seed=0)
            assert len(method.trained) == len(set(method.trained.values()))
            with torch.no_grad():
                for parameter in method.trained.values():
                    parameter.normal_(std=0.2)
            outputs.append(family.predict(noisy, times, conditions))
        both = outputs[2]
        with torch.no_grad():
            for parameter in method.trained.values():
                parameter.zero_()
        torch.testing.assert_close(family.predict(noisy, times, conditions), outputs[1])
        assert not torch.allclose(both, outputs[1]) and not torch.allclose(outputs[1], outputs[0])


def test_adapter_cost(scripts, capsys):
    import adapter_cost

    result = adapter_cost.main(["--smoke", "--rounds", "2", "--repeats", "1"])
    assert len(result["training"]) == 7 and result["stored"]["cross"]["bytes"] < result["stored"]["all"]["bytes"]
    equal = next(r for n, r in result["training"].items() if "cross-attention, bytes as comcat" in n)
    assert abs(equal["parameters"] / result["training"]["comcat"]["parameters"] - 1) < 0.2
    assert result["training"]["DreamBooth as published"]["peak_bytes"] > result["training"]["comcat"]["peak_bytes"]
    assert result["inference"].keys() == {"plain", "adapter", "fused"}
    written = json.loads(next((scripts / "results").rglob("adapter-cost-sd14-64.json")).read_text())
    assert written["smoke"] and written["training"].keys() == result["training"].keys()


def test_cost_of_a_transformer_alone(scripts, capsys):
    import adapter_cost

    words = ["--model", "flux2-klein", "--smoke", "--side", "64", "--device", "cpu", "--rounds", "1", "--repeats", "1"]
    result = adapter_cost.main(words)
    rows = result["training"]
    ours, *others = rows.values()
    assert next(iter(rows)) == "comcat" and len(others) == 3 and all("LoRA" in name for name in list(rows)[1:])
    assert 0.5 < others[0]["parameters"] / ours["parameters"] < 2 and ours["peak_bytes"] > 0
    assert all(row["trained_in"] == "float32" and row["seconds"] > 0 for row in rows.values())
    assert result["inference"].keys() == {"plain", "adapter"} and result["shape_from"] == "tiny shapes"
    written = json.loads(next((scripts / "results").rglob("adapter-cost-flux2-klein-64.json")).read_text())
    assert written["smoke"] and written["shape"]["num_single_layers"] == 2
    assert "bytes as comcat" in capsys.readouterr().out


def test_the_true_shape_of_klein(scripts):
    """By counting alone: the published weights are 3.9 billion, and LoRA at equal bytes is what it says."""
    import card.flux2
    import peers
    from diffusers import Flux2Transformer2DModel

    import comcat.diffusion as cd

    with torch.device("meta"):
        model = Flux2Transformer2DModel(**card.flux2.SHAPE)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(3.88e9, rel=0.01)
    adapter = cd.attach(model, rank=2)
    size = sum(p.numel() for p in adapter.parameters())
    rank = peers.equal_rank(model, card.flux2.AROUND_ATTENTION, size)
    assert peers.equal_rank(model, card.flux2.AROUND_ATTENTION, 3 * size) > rank > 1


def test_goals_of_size_are_met_by_the_true_shapes(scripts):
    """By counting alone: the parameters of Stable Diffusion 1.4's adapter, on the meta device."""
    import adapter_cost
    from diffusers import UNet2DConditionModel

    import comcat.diffusion as cd

    with torch.device("meta"):
        unet = UNet2DConditionModel(**adapter_cost.UNETS["sd14"])
    assert sum(p.numel() for p in unet.parameters()) == 859_520_964  # as published
    for where, goal in adapter_cost.GOALS.items():
        adapter = cd.attach(unet, rank=2, where=where)
        assert adapter.bytes(torch.float16) + 200 * len(adapter.parameters()) < goal
        cd.unload(unet)
