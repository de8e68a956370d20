"""The benchmark on real weights, on tiny models and made-up pictures; the real ones are marked slow."""

import copy
import io
import json
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import comcat
from comcat.errors import BudgetError

from .models import tiny_vit

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def scripts(monkeypatch, tmp_path):
    """The scripts can be imported, and write and cache below a temporary folder."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("COMCAT_BENCHMARK_CACHE", str(tmp_path / "cache"))
    import common

    monkeypatch.setattr(common, "RESULTS", tmp_path / "results")
    yield
    ours = ("common", "equal_time", "summarise", "sections", "card", "growth", "real_weights", "real")
    for name in [n for n in sys.modules if n.split(".")[0] in ours]:
        del sys.modules[name]


def some_pixels(count=20, size=32, seed=0, classes=5):
    from real.data import Pixels

    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, classes, (count,), generator=generator)
    return Pixels(pixels=pixels, labels=labels, origins=torch.arange(count) // 2)


# --- folders -----------------------------------------------------------------------------------------------------


@pytest.fixture
def named():
    """A tiny DINOv2's tensors as the ONNX file names them."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=56, patch_size=14)
    model = Dinov2Model(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model


def test_both_folders_are_one_model(named, tmp_path):
    from real.backbone import write_folders

    named.save_pretrained(tmp_path / "saved")
    tensors = {f"backbone.{k}": v for k, v in load_file(tmp_path / "saved" / "model.safetensors").items()}
    out = tmp_path / "out"
    out.mkdir()
    write_folders({**tensors, "decoder.final_conv.bias": torch.ones(1)}, out)
    timm, theirs = (comcat.load_model(str(out / library)) for library in ("timm", "transformers"))
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        expected = named(pixel_values=images).last_hidden_state
        assert torch.allclose(theirs(pixel_values=images).last_hidden_state, expected, atol=1e-5)
        assert torch.allclose(timm.forward_features(images), expected, atol=1e-5)
    assert load_file(out / "saliency.safetensors").keys() == {"final_conv.bias"}


def test_products_are_known_by_the_bias_added_to_them():
    from real.backbone import _product_names

    def node(op, inputs, output):
        return SimpleNamespace(op_type=op, input=inputs, output=[output])

    nodes = [
        node("MatMul", ["x", "onnx::MatMul_7"], "a"),
        node("Add", ["backbone.encoder.layer.0.mlp.fc1.bias", "a"], "b"),
        node("MatMul", ["q", "k"], "scores"),
        node("Add", ["scores", "mask"], "c"),
    ]
    values = {"onnx::MatMul_7": torch.zeros(2, 2), "backbone.encoder.layer.0.mlp.fc1.bias": torch.zeros(2)}
    assert dict(_product_names(nodes, values)) == {"onnx::MatMul_7": "backbone.encoder.layer.0.mlp.fc1.weight"}


def test_the_classifier_folder(tmp_path):
    from real.models import _write_classifier

    trunk = tmp_path / "trunk"
    trunk.mkdir()
    arguments = {"img_size": 224, "patch_size": 28, "embed_dim": 48, "depth": 1, "num_heads": 3}
    model = tiny_vit(num_classes=0, **arguments)
    save_file(model.state_dict(), trunk / "model.safetensors")
    data = {"input_size": [3, 224, 224], "mean": [0.5] * 3, "std": [0.5] * 3, "num_classes": 0, "crop_pct": 1.0}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 0, "model_args": arguments, "pretrained_cfg": data}
    (trunk / "config.json").write_text(json.dumps(config))
    head = {"weight": torch.randn(10, 48), "bias": torch.randn(10)}
    (tmp_path / "out").mkdir()
    _write_classifier(tmp_path / "out", head, trunk)
    loaded = comcat.load_model(str(tmp_path / "out"))
    assert loaded.pos_embed.shape[1] == 1 + (112 // 28) ** 2
    assert comcat.preprocess_of(loaded).size == (112, 112)
    images = torch.randn(2, 3, 112, 112)
    with torch.no_grad():
        expected = loaded.forward_features(images)[:, 0] @ head["weight"].T + head["bias"]
        assert torch.allclose(loaded(images), expected, atol=1e-4)


def test_a_dense_model_has_one_logit_a_pixel_and_sites_in_its_trunk_alone(named):
    from real.models import DenseModel, resampled_positions, saliency_decoder

    model = DenseModel(named, saliency_decoder((128, 16, 8, 4)), (56, 56)).eval()
    with torch.no_grad():
        said = model(torch.randn(2, 3, 56, 56))
        tokens = named(pixel_values=torch.ones(1, 3, 56, 56)).last_hidden_state
        features = model.features(torch.ones(1, 3, 56, 56))
    assert said.shape == (2, 1, 56, 56) and said.std() > 0
    assert torch.equal(features[0, :, 1, 2], tokens[0, 1 + 1 * 4 + 2])  # row 1, column 2 of a grid of 4
    assert all(site.path.startswith("backbone.") for site in comcat.find_sites(model).values())
    table = torch.randn(1, 17, 8)
    assert torch.allclose(resampled_positions(table, 4), table)
    assert resampled_positions(table, 2).shape == (1, 5, 8)


def test_what_is_missing_is_said(monkeypatch, tmp_path):
    from real import data, models
    from real.fetch import FetchError

    monkeypatch.setattr(models, "SHARED", tmp_path)
    monkeypatch.setattr(data, "SHARED", tmp_path)
    with pytest.raises(FetchError, match=r"cifar10 head.*cifar10_head\.safetensors"):
        models.head_file("cifar10")
    with pytest.raises(FetchError, match=r"nuclei pictures.*validation\.parquet"):
        data.nuclei("judged")
    import real_weights

    with pytest.raises(SystemExit, match="error: the cifar10 pictures are missing"):
        real_weights.main(["--task", "classifier", "--no-write"])


def test_fetching_fails_with_the_reason_and_leaves_nothing_behind(monkeypatch, tmp_path):
    from real import fetch

    def run(words, **_):
        found = words[-1] == "--version"
        return SimpleNamespace(returncode=0 if found else 1, stdout="", stderr="no such release")

    monkeypatch.setattr(fetch.subprocess, "run", run)
    with pytest.raises(fetch.FetchError, match=r"the wheel nothing 1\.0 cannot be fetched.*no such release"):
        fetch.fetch_wheel("nothing", "1.0")
    assert not list((tmp_path / "cache" / "wheels").iterdir())
    monkeypatch.setattr(fetch.shutil, "which", lambda tool: None)
    with pytest.raises(fetch.FetchError, match="apt-get"):
        fetch.debian("nothing")


# --- pictures ----------------------------------------------------------------------------------------------------


def test_photographs_are_split_by_photograph(monkeypatch):
    from real import photographs
    from real.fetch import FetchError

    def png(i):
        image = Image.fromarray(np.random.default_rng(i).integers(0, 256, (80 + i, 120, 3), dtype=np.uint8))
        file = io.BytesIO()
        image.save(file, "png")
        return file.getvalue()

    files = [(i, lambda i=i: png(i)) for i in range(7)]
    monkeypatch.setattr(photographs, "photograph_files", lambda: files)
    with pytest.raises(FetchError, match="got 3 photographs to be judged, expected 15 or more"):
        photographs.photographs("judged")
    monkeypatch.setattr(photographs, "FEWEST", 3)
    judged = photographs.photographs("judged")
    ours, same, other = (photographs.photographs("calibration", 10, seed) for seed in (0, 0, 1))
    assert judged.pixels.shape == (3 * photographs.CROPS, 3, 224, 224) and ours.pixels.shape[0] == 10
    assert set(judged.origins.tolist()) == {1, 3, 5} and set(ours.origins.tolist()) == {0, 2, 4, 6}
    assert torch.equal(ours.pixels, same.pixels) and not torch.equal(ours.pixels, other.pixels)


def test_pixels_become_what_a_model_wants():
    from real.data import squares

    pixels = some_pixels(5, size=16)
    images = torch.cat([x for x, _ in pixels.batches(2)])
    preprocess = squares(16)
    picture = Image.fromarray(pixels.pixels[3].permute(1, 2, 0).numpy())
    assert torch.allclose(images[3], preprocess(picture), atol=1e-6)
    assert len(pixels.first(2)) == 2 and len(pixels.first(None)) == 5


# --- scores ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bool", "uint32", "float32"])
def test_packing_keeps_an_array(dtype):
    from real.measure import packed, unpacked

    values = (np.random.default_rng(0).random((13, 3)) * 5).astype(dtype)
    again = unpacked(json.loads(json.dumps(packed(values))))
    assert again.dtype == values.dtype and np.array_equal(again, values)


def test_a_score_is_recomputed_from_what_is_kept_of_each_picture():
    from real.measure import Table

    rng = np.random.default_rng(0)
    table = Table(rng.integers(0, 9, (30, 2)).astype(np.uint32), rng.integers(9, 20, (30, 2)).astype(np.uint32))
    expected = 100 * (table.numerator.sum(0) / table.denominator.sum(0)).mean()
    assert table.score() == pytest.approx(expected)
    assert Table.from_dict(json.loads(json.dumps(table.to_dict()))).score() == table.score()
    twice = Table(np.repeat(table.numerator, 2, 0), np.repeat(table.denominator, 2, 0))
    assert table.score(np.full((1, 30), 2.0))[0] == pytest.approx(twice.score())


def test_the_error_from_pictures_is_the_binomial_one_and_a_pair_has_less():
    from real.measure import Table, paired, resamples, summary

    rng = np.random.default_rng(7)
    dense = rng.random(1000) < 0.75
    small = dense & (rng.random(1000) < 0.95)
    weights = resamples(np.arange(1000))
    ours, theirs = Table.of_means(small), Table.of_means(dense)
    found = summary([theirs], weights)
    assert found["picture_error"] == pytest.approx(100 * np.sqrt(0.75 * 0.25 / 1000), rel=0.1) and found["std"] is None
    pair = paired([ours], [theirs], weights)
    assert pair["mean"] == pytest.approx(100 * (small.mean() - dense.mean()))
    lost = (dense & ~small).mean()
    assert pair["picture_error"] == pytest.approx(100 * np.sqrt(lost * (1 - lost) / 1000), rel=0.1)
    assert paired([ours], [ours], weights)["picture_error"] == 0


def test_crops_of_a_photograph_are_drawn_together():
    from real.measure import Table, picture_error, resamples

    origins = np.repeat(np.arange(25), 4)
    weights = resamples(origins)
    assert np.all(weights.reshape(len(weights), 25, 4) == weights.reshape(len(weights), 25, 4)[:, :, :1])
    right = np.repeat(np.random.default_rng(0).random(25) < 0.5, 4)  # crops of a photograph are right together
    apart = picture_error([Table.of_means(right)], resamples(np.arange(100)))
    assert picture_error([Table.of_means(right)], weights) == pytest.approx(2 * apart, rel=0.15)


def test_paired_differences_over_seeds():
    from real.measure import Table, paired, resamples

    rng = np.random.default_rng(0)
    free = [Table.of_means(rng.random(50) < 0.5)]
    seeds = [Table.of_means(rng.random(50) < p) for p in (0.6, 0.7, 0.8)]
    found = paired(seeds, free, resamples(np.arange(50)))
    differences = [t.score() - free[0].score() for t in seeds]
    assert found["differences"] == pytest.approx(differences)
    assert found["std"] == pytest.approx(np.std(differences, ddof=1))
    assert found["seed_error"] == pytest.approx(found["std"] / 3**0.5)


def test_tables_count_pixels():
    from real.tasks import against_dense, against_truth

    said = torch.tensor([[1.0, 1, -1, -1], [-1, -1, -1, -1]])
    dense = torch.tensor([[1.0, -1, -1, -1], [-1, -1, -1, -1]])
    truth = torch.tensor([[[1, 0], [1, 0]], [[0, 0], [0, 0]]])
    found = against_dense(said, truth, dense)
    assert found["iou"].numerator[:, 0].tolist() == [0.5, 1.0] and found["pooled_iou"].score() == 50
    tables = against_truth(said, truth, dense)
    assert next(iter(tables)) == "mean_iou"
    assert tables["nuclei"].score() == pytest.approx(100 / 3)
    assert tables["background"].score() == pytest.approx(100 * 5 / 7)
    assert tables["mean_iou"].score() == pytest.approx(50 * (1 / 3 + 5 / 7))
    assert tables["agreement"].score() == pytest.approx(50)


def test_classes_are_told_by_top1_and_agreement():
    from real.tasks import classes

    said, dense = torch.eye(4), torch.eye(4)[[0, 1, 3, 3]]
    tables = classes(said, torch.tensor([0, 0, 2, 3]), dense)
    assert (tables["top1"].score(), tables["agreement"].score()) == (75, 75)
    assert tables["divergence"].numerator[0, 0] == 0 and tables["divergence"].numerator[2, 0] > 0


# --- the runner --------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_task(monkeypatch):
    """A task of a tiny classifier on made-up pictures, in the place of the real ones."""
    from real.tasks import CLASSIFIER, TASKS

    def pixels(part, count=None, seed=0):
        return some_pixels(count or 24, seed=seed + (100 if part == "judged" else 0))

    task = replace(CLASSIFIER, build=lambda: tiny_vit(depth=3), pixels=pixels, calibration=16, batch=8)
    monkeypatch.setitem(TASKS, "classifier", task)
    return task


def run(tmp_path, *words):
    import real_weights

    return real_weights.main([*words, "--work", str(tmp_path / "work"), "--seeds", "2", "--dtype", "float32"])


def test_budgets_are_compared_at_the_time_that_was_measured(tiny_task, tmp_path, monkeypatch):
    import common
    import equal_time

    from comcat import count_parameters as size

    def times(maker, plans):  # the more parameters, the longer, however loaded the machine is
        shares = {
            k: size(common.shaped(maker.model, p, maker.shrinker.sites)) / size(maker.model) for k, p in plans.items()
        }
        return {key: (share, share, share) for key, share in shares.items()}

    monkeypatch.setattr(equal_time.Maker, "times", times)
    monkeypatch.setitem(equal_time.METHODS, "time", {"budget": "macs"})
    asked = {"batch": 2, "pictures": 16, "judged": 8, "repeats": 1, "dtype": "float32", "tune": 1, "tuning-pictures": 8}
    words = [word for name, value in asked.items() for word in (f"--{name}", str(value))]
    methods = ("--methods", "time", "parameters", "--shares", "0.9", "0.7")
    found = equal_time.main([*words, *methods, "--work", str(tmp_path / "work")])
    ours = [row for row in found["rows"] if row["method"] == "time"]
    assert [row["share"] for row in ours] == [0.9, 0.7] and [("tuned" in row) for row in ours] == [False, True]
    assert {row["method"] for row in found["rows"]} == {"time", "parameters"}
    for row in found["rows"]:
        assert row["scores"]["divergence"] >= 0 and ("more than time" in row) == (row["method"] != "time")
    assert equal_time.crossing({0.2: (0.9, 0, 0), 0.5: (0.6, 0, 0)}, 0.75) == pytest.approx(0.35)
    assert equal_time.crossing({0.2: (0.9, 0, 0), 0.5: (0.6, 0, 0)}, 0.5) is None


def test_the_runner_keeps_rows_and_goes_on(tiny_task, tmp_path, monkeypatch, capsys):
    from real.measure import Table
    from real.methods import Shrinker

    names = ("ranks", "ranks + units", "ranks, weights", "matrix + svd", "product + taylor, refitted", "FWSVD")
    words = ("--methods", *names, "--budgets", "0.3", "0.97")
    first = run(tmp_path, *words)
    written = json.loads(next((tmp_path / "results").rglob("real-classifier.json")).read_text())
    assert {(r["method"], r["reduce"]) for r in written["rows"]} == {(name, 0.3) for name in names}  # none saves 97 %
    rows = {r["method"]: r for r in written["rows"]}
    assert {m: len(r["runs"]) for m, r in rows.items()} == dict(zip(names, (2, 2, 1, 1, 2, 2), strict=True))
    for row in written["rows"]:
        assert all(Table.from_dict(r["pictures"]).score() == pytest.approx(r["scores"]["top1"]) for r in row["runs"])
        assert all(r["parameters"] <= 0.7 * written["parameters"] for r in row["runs"])
        assert all(r["saved"] >= 0.3 for r in row["runs"])
    plans = [json.loads(p.read_text())["result"].get("plan") for p in (tmp_path / "work").rglob("*.json")]
    assert any(plans) and not any(name.startswith("head") for plan in plans for name in plan or ())
    assert rows["ranks"]["runs"][0]["predicted_loss"] > 0
    assert "less ranks" in rows["matrix + svd"] and "less ranks" not in rows["ranks"]
    assert written["dense"]["scores"]["agreement"] == 100
    page = __import__("summarise").real(written)
    assert f"| ranks | {rows['ranks']['mean']:.2f} ± {rows['ranks']['std']:.2f} |" in page
    assert f"| matrix + svd | {rows['matrix + svd']['less ranks']['mean']:+.2f} (" in page

    monkeypatch.setattr(Shrinker, "shrink", lambda *_: pytest.fail("a finished row was made again"))
    again = run(tmp_path, *words)
    assert again["rows"] == first["rows"]
    assert "the budget cannot be met" in capsys.readouterr().out


def test_rows_of_one_seed_share_what_is_measured_and_the_model_is_given_back(tiny_task, monkeypatch):
    from real import methods

    calls = []
    prepare = methods.prepare
    monkeypatch.setattr(methods, "prepare", lambda *a: calls.append(1) or prepare(*a))
    model = tiny_task.build()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    shrinker = methods.Shrinker(tiny_task, model)
    for keywords, reduce, seed in (
        ({"forms": "ranks,units"}, 0.3, 0),
        ({"forms": "ranks", "ranks": "uniform"}, 0.5, 0),
        ({}, 0.3, 1),
    ):
        handle, facts = shrinker.shrink(keywords, reduce, seed)
        assert facts["saved"] >= reduce and comcat.count_parameters(model) <= (1 - reduce) * 1.001 * sum(
            t.numel() for t in before.values()
        )
        handle.revert()
    assert len(calls) == 2
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_rows_of_tokens(tiny_task):
    """Shares of the tokens, or of the multiply-accumulates; the model is given back, and can be copied meanwhile."""
    from real import methods

    model, x = tiny_task.build(), torch.randn(2, 3, 32, 32)
    before, macs = model(x), comcat.count_macs(model, x[:1])
    names = [name for name in methods.METHODS if "token" in name]
    shrinker = methods.Shrinker(tiny_task, model, forms="ranks,tokens,units")
    for name in names:
        keywords = methods.METHODS[name]
        assert methods.unknown_settings(keywords) == [] and methods.needs_pictures(keywords) == (
            "published" not in keywords
        )
        handle, _ = shrinker.shrink(keywords, 0.3, 0)
        few, spent = model(x), comcat.count_macs(model, x[:1])
        torch.manual_seed(0)
        again = copy.deepcopy(model)(x)
        handle.revert()
        assert few.shape == before.shape and not few.equal(before), name
        assert "random" in name or torch.allclose(again, few, atol=1e-6), name
        assert spent <= (0.71 if "MACs" in name else 0.97) * macs, (name, spent / macs)
        assert model(x).equal(before), name
    assert methods.unknown_settings({"merge": {"keeps": 1}}) == ["keeps"]


def test_published_merging_is_what_was_published():
    """Against a loop that shares no code with it: blocks, then groups by the keys, weighted by size, with log sizes."""
    from real.published import apply_published_, merges_after_each

    from .tokens.test_tokens import published

    model, x = tiny_vit(depth=3), torch.randn(2, 3, 32, 32)
    model.norm = model.head_drop = torch.nn.Identity()
    merges = merges_after_each(16, 3, 0.7)
    assert merges == 5  # (16 + 11 + 6) / 48 = 0.69
    with torch.no_grad():
        handle = apply_published_(model, x[:1], 0.7)
        got = model.forward_features(x)
        handle.revert()
        for picture in range(2):
            stream = model._pos_embed(model.patch_embed(x[picture : picture + 1]))
            members = [[n] for n in range(16)]
            for number, block in enumerate(model.blocks):
                sizes = torch.tensor([1.0, *(len(m) for m in members)])
                keys = block.attn.qkv(block.norm1(stream))[..., 48:96].unflatten(-1, (3, 16)).mean(2)[:, 1:]
                stream = block(stream, attn_mask=sizes.log().view(1, 1, 1, -1))
                if number < 2:
                    joined = published(keys, merges)[0]
                    rows, size = stream[0, 1:], sizes[1:, None]
                    means = [(rows[j] * size[j]).sum(0) / size[j].sum() for j in joined]
                    stream = torch.cat((stream[:, :1], torch.stack(means)[None]), 1)
                    members = [[token for n in j for token in members[n]] for j in joined]
            for row, group in zip(stream[0, 1:], members, strict=True):
                for token in group:
                    torch.testing.assert_close(got[picture, 1 + token], row, atol=1e-5, rtol=1e-5)
    assert model.forward_features(x).equal(model.forward_features(x))


def test_rows_that_the_library_does_not_know_are_left_out(tiny_task, tmp_path, monkeypatch, capsys):
    from real import methods

    monkeypatch.setitem(methods.METHODS, "wishful", {"wishes": 3})
    result = run(tmp_path, "--methods", "ranks", "wishful", "--budgets", "0.3", "--no-write")
    assert [r["method"] for r in result["rows"]] == ["ranks"]
    assert "without 'wishful': this version of comcat does not know wishes" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"got method 'rank', expected one of .*did you mean 'ranks'"):
        run(tmp_path, "--methods", "rank", "--no-write")


def test_tuning_comes_nearer_to_the_dense_model(tiny_task, tmp_path):
    from real.distil import distance, distil
    from real.tasks import outputs

    dense, student = tiny_task.build(), comcat.compress(tiny_task.build(), reduce=0.5, statistic="weights")
    pixels = some_pixels(32)
    before = {n: t.clone() for n, t in dense.state_dict().items()}

    def away():
        said = [outputs(m, pixels, 8, torch.float32) for m in (student, dense)]
        return float(distance(*said))

    first = away()
    told = distil(student, dense, pixels, steps=30, batch=8, seed=0, rate=1e-3)
    assert away() < 0.7 * first and told["loss"][1] < told["loss"][0]
    assert all(torch.equal(before[n], t) for n, t in dense.state_dict().items())
    result = run(tmp_path, "--methods", "ranks", "--budgets", "0.3", "--tune", "2", "--tuning-pictures", "8")
    assert result["rows"][0]["runs"][0]["tuning"]["steps"] == 2
    assert list((tmp_path / "results").rglob("real-classifier-tuned-2.json"))


# --- whole heads -------------------------------------------------------------------------------------------------


def test_the_cheapest_choice_is_what_brute_force_finds():
    from real.whole_heads import Ladder, Option, cheapest

    rng = np.random.default_rng(0)

    def options(count):
        costs = rng.integers(1, 20, count)
        return tuple(Option(cost=float(c), loss=float(rng.random() / c), entries={f"{c}": int(c)}) for c in costs)

    fixed = [Option(cost=0.0, loss=0.0), Option(cost=1.0, loss=0.3, gone=(1,))]
    choices = {n: Ladder(tuple((f, (options(4), options(3))) for f in fixed)) for n in ("a", "b")}
    per_ladder = [
        [(f.cost + x.cost + y.cost, f.loss + x.loss + y.loss) for f, (xs, ys) in c.combinations for x in xs for y in ys]
        for c in choices.values()
    ]
    every = [(a[0] + b[0], a[1] + b[1]) for a, b in product(*per_ladder)]
    for target in (25.0, 40.0, 60.0):
        bound, taken = cheapest(choices, target)
        cost, loss = (sum(getattr(o, n) for o in taken.values()) for n in ("cost", "loss"))
        assert cost <= target
        assert bound <= min(lost for c, lost in every if c <= target) + 1e-12  # the hull lies below every choice
        assert loss == pytest.approx(
            min(lost for c, lost in every if c <= cost)
        )  # a corner of the hull is a best choice
    with pytest.raises(BudgetError):
        cheapest(choices, 0.5)


def test_options_without_heads_cost_what_the_others_cost():
    from real.whole_heads import attention_ladder, product_options

    model = tiny_vit()
    sites = comcat.find_sites(model)
    qk, vo = sites["blocks.0.attn:qk"], sites["blocks.0.attn:vo"]
    values = torch.rand(3, 16).sort(1, descending=True).values
    values[1] *= 0.1
    every = product_options(vo, values)
    assert every[-1].cost == vo.parameters() and every[0].cost == vo.parameters(1)
    assert every[3].loss == pytest.approx(float(values[:, 4:].square().sum() / 2))
    two = product_options(vo, values, [0, 2])
    assert two[3].cost - vo.parameters(0) == pytest.approx((every[3].cost - vo.parameters(0)) * 2 / 3)
    assert two[3].loss == pytest.approx(float(values[[0, 2], 4:].square().sum() / 2))
    ladder = attention_ladder(qk, vo, values, values, most=3)
    assert [fixed.gone for fixed, _ in ladder.combinations][1] == (1,)  # the head that says least
    assert ladder.at(0.0).gone == () and ladder.at(1e9).gone == (
        1,
        *sorted((0, 2), key=lambda h: values[h].square().sum()),
    )


def test_a_head_that_another_repeats_goes_without_loss(monkeypatch):
    from real.whole_heads import applied, remove_heads_

    model = tiny_vit(depth=1)
    attn = model.blocks[0].attn
    with torch.no_grad():  # head 1 says the same as head 0
        for start in (0, 48, 96):
            attn.qkv.weight[start + 16 : start + 32] = attn.qkv.weight[start : start + 16]
            attn.qkv.bias[start + 16 : start + 32] = attn.qkv.bias[start : start + 16]
    sites = comcat.find_sites(model).only("blocks")
    images = torch.randn(8, 3, 32, 32)
    statistic = comcat.calibrate(model, [images], sites=sites)
    site = sites["blocks.0.attn:vo"]
    plain = statistic.moments[site.name, "joint"].moment[0]  # not shrunk: then the refit is exact
    monkeypatch.setattr(type(statistic), "covariance", lambda *_: plain)
    expected = model(images)
    small = applied(model, {"blocks.0.attn": SimpleNamespace(gone=(1,), entries={})}, sites, statistic)
    assert torch.all(small.blocks[0].attn.proj.weight[:, 16:32] == 0)
    assert torch.allclose(small(images), expected, atol=1e-3)
    bare = tiny_vit(depth=1)
    site = comcat.find_sites(bare)["blocks.0.attn:vo"]
    statistic = comcat.calibrate(bare, [images], sites=comcat.find_sites(bare))
    remove_heads_(bare, site, (0, 1, 2), statistic)
    assert torch.all(bare.blocks[0].attn.proj.weight == 0)  # and the mean is in the bias
    said = []
    bare.blocks[0].attn.register_forward_hook(lambda m, i, o: said.append(o))
    whole = tiny_vit(depth=1)
    whole.blocks[0].attn.register_forward_hook(lambda m, i, o: said.append(o))
    bare(images), whole(images)
    assert torch.allclose(said[0].mean((0, 1)), said[1].mean((0, 1)), atol=1e-4)


def test_the_heads_script_runs(tiny_task, tmp_path, capsys):
    from real import whole_heads

    rows = whole_heads.main(["--task", "classifier", "--budgets", "0.5", "--verify", "-1", "--judged", "20"])
    assert rows[0]["predicted_with_heads"] <= rows[0]["predicted_ranks"] and 0 <= rows[0]["top1"]["with_heads"] <= 100
    written = json.loads(next((tmp_path / "results").rglob("whole-heads.json")).read_text())
    assert f"| {rows[0]['heads_gone']} of {rows[0]['heads']} |" in __import__("summarise").heads(written)
    with pytest.raises(SystemExit, match=r"error: got .* parameters"):
        whole_heads.main(["--task", "classifier", "--budgets", "0.99"])


# --- the real ones -----------------------------------------------------------------------------------------------


@pytest.fixture
def real(monkeypatch):
    """The true cache; the test is skipped where something cannot be fetched."""
    from real.fetch import FetchError

    monkeypatch.delenv("COMCAT_BENCHMARK_CACHE")

    def attempt(make):
        try:
            return make()
        except FetchError as error:
            pytest.skip(str(error))

    return attempt


@pytest.mark.slow
def test_the_real_saliency_model(real):
    from real.models import saliency
    from real.photographs import photographs
    from real.tasks import outputs

    judged = real(lambda: photographs("judged")).first(8)
    said = [outputs(real(lambda lib=lib: saliency(lib)), judged, 4, torch.float32) for lib in ("timm", "transformers")]
    assert torch.allclose(*said, atol=1e-3)
    shares = (said[0] > 0).float().mean(1)
    assert 0.02 < shares.mean() < 0.9 and shares.std() > 0.02


@pytest.mark.slow
def test_the_real_classifier(real):
    from real.data import cifar10
    from real.models import classifier
    from real.tasks import outputs

    judged = real(lambda: cifar10("judged")).first(200)
    said = outputs(real(classifier), judged, 50, torch.float32)
    assert 0.7 < float((said.argmax(1) == judged.labels).float().mean()) < 0.84


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_real_nuclei(real):
    from real.data import nuclei as pictures
    from real.models import nuclei
    from real.tasks import against_truth, outputs

    judged = real(lambda: pictures("judged"))
    said = outputs(real(nuclei), judged, 5, torch.float32)
    tables = against_truth(said, judged.labels, said)
    assert tables["nuclei"].score() == pytest.approx(63.5, abs=0.1)
    assert tables["background"].score() == pytest.approx(91.5, abs=0.1)


def test_the_times_script_runs(tiny_task, tmp_path):
    from real import times

    words = ["--budgets", "0.3", "0.97", "--batch", "2", "--pictures", "8", "--repeats", "2"]
    made = times.main([*words, "--methods", "ranks + units", "product + magnitude"])
    assert [(r["method"], r["reduce"]) for r in made["rows"]] == [("ranks + units", 0.3), ("product + magnitude", 0.3)]
    assert all(r["speed_up"] > 0 and r["parameters"] <= 0.7 * made["parameters"] for r in made["rows"])
    written = json.loads(next((tmp_path / "results").rglob("forward-classifier.json")).read_text())
    assert f"| ranks + units | {written['rows'][0]['speed_up']:.2f} (" in __import__("summarise").times(written)
