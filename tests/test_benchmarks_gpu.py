"""The script for a card runs on a CPU with tiny settings: what is there is kept, what fails costs its own part only."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from comcat.errors import ComcatError

from .models import tiny_vit

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
OURS = ("common", "latency", "real_weights", "adapter_cost", "peers", "gpu", "gpu_pack", "real", "card")


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu

    yield gpu
    for name in [n for n in sys.modules if n.split(".")[0] in OURS]:
        del sys.modules[name]


@pytest.fixture
def packed(gpu, tmp_path):
    """A packed folder of a tiny classifier and made-up pictures."""
    from card.packed import write_classifier, write_pictures

    folder = tmp_path / "packed"
    folder.mkdir()
    arguments = {"img_size": 112, "patch_size": 28, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
    cfg = {"input_size": [3, 112, 112], "mean": [0.3] * 3, "std": [0.4] * 3, "num_classes": 5}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "model_args": arguments, "pretrained_cfg": cfg}
    write_classifier(folder / "classifier", json.dumps(config), tiny_vit(**arguments).state_dict())
    for name, count in (("calibration-0", 8), ("calibration-1", 8), ("judged", 20)):
        write_pictures(folder / f"{name}.safetensors", [(jpeg(i), i % 5) for i in range(count)])
    return folder


def jpeg(seed):
    file = io.BytesIO()
    Image.effect_noise((32, 32), 40 + seed).convert("RGB").save(file, "JPEG")
    return file.getvalue()


def given(out, packed, *words):
    return ["--device", "cpu", "--tiny", "--out", str(out), "--packed", str(packed), *words]


def read(out, name):
    return json.loads((out / f"{name}.json").read_text())


def test_speed(gpu, tmp_path):
    assert gpu.main(given(tmp_path, tmp_path, "--one", "speed-small")) == 0
    result = read(tmp_path, "speed-small")
    assert result["tiny"] and result["whole"] and result["environment"]["device"]
    rows = result["rows"]
    assert [(r["plan"], r["batch"], r["mode"]) for r in rows] == [
        (plan, batch, "eager") for batch in (2, 1) for plan in ("ranks", "ranks + units")
    ]
    for row in rows:
        low, high = row["speed_up_quartiles"]
        assert low <= row["speed_up"] <= high and row["of_mac_ratio"] == pytest.approx(
            row["speed_up"] / row["mac_ratio"]
        )
        assert row["parameters"] == pytest.approx(0.8, abs=0.02) and row["mac_ratio"] > 1
    forms = {n: {e.get("form") for e in p["sites"].values()} for n, p in result["plans"].items()}
    assert "units" not in forms["ranks"]
    assert not list(tmp_path.glob("*.partial.json"))


def test_the_compiled_part_takes_the_plans_that_the_eager_one_made(gpu, tmp_path, monkeypatch):
    from card import speed

    assert gpu.main(given(tmp_path, tmp_path, "--one", "speed-base")) == 0
    monkeypatch.setattr(speed, "made_plans", None)
    monkeypatch.setattr(speed, "benchmark", lambda *a, compile, **k: benchmark(*a, **k) if compile else None)
    from comcat.measure import benchmark

    assert gpu.main(given(tmp_path, tmp_path, "--one", "speed-base-compiled")) == 0
    first, second = (read(tmp_path, n) for n in ("speed-base", "speed-base-compiled"))
    assert first["plans"] == second["plans"] and {r["mode"] for r in second["rows"]} == {"compiled"}


def test_structures_have_no_chance_bits(gpu):
    from card.speed import Subject, made_plans, structures

    subject = Subject(
        model="vit_tiny_patch16_224", reduce=0.3, multiple=1, size=32, pictures=4,
        arguments={"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5},
    )  # fmt: skip
    plans = made_plans(subject, "cpu")
    once, again = structures(subject, plans, "cpu"), structures(subject, plans, "cpu")
    for name in ("ranks", "ranks + units"):
        for p, q in zip(once[name].parameters(), again[name].parameters(), strict=True):
            assert torch.equal(p, q) and p.dtype == torch.bfloat16 and p.isfinite().all()


def test_fewer_tokens_are_timed_alone_and_with_everything(gpu, tmp_path):
    assert gpu.main(given(tmp_path, tmp_path, "--one", "tokens-small")) == 0
    result = read(tmp_path, "tokens-small")
    macs = {r["plan"]: r["mac_ratio"] for r in result["rows"]}
    assert set(macs) == {"ranks", "ranks + units", "tokens", "ranks + units + tokens"} == set(result["plans"])
    assert macs["ranks + units + tokens"] > max(macs["ranks + units"], macs["tokens"]) > 1
    assert set(result["plans"]["tokens"]["sites"]) < set(result["plans"]["ranks + units + tokens"]["sites"])


def test_latency_tells_what_it_predicted_and_what_was_refused(gpu, tmp_path):
    assert gpu.main(given(tmp_path, tmp_path, "--one", "latency")) == 0
    result = read(tmp_path, "latency")
    met, refused = result["rows"]
    assert met["error"] == pytest.approx(met["predicted"] / met["measured"] - 1) and met["dense_ms"] > 0
    assert result["worst_error"] == abs(met["error"])
    assert "got reduce=0.99" in refused["refused"] and "error" not in refused
    assert not list(tmp_path.glob("*.partial.json"))


def test_accuracy(gpu, packed, tmp_path):
    assert gpu.main(given(tmp_path, packed, "--one", "accuracy")) == 0
    result = read(tmp_path, "accuracy")
    assert result["seeds"] == 2 and result["judged"] == 20 and result["weights"] == "rounded to float16"
    rows = {(r["method"], r["reduce"]): len(r["scores"]) for r in result["rows"]}
    met = {("ranks + units", 0.2), ("ranks + units", 0.3), ("ranks", 0.2), ("ranks", 0.3), ("units", 0.2)}
    assert rows == dict.fromkeys(met, 2)  # units alone cannot save 30 % of so small a model


def test_accuracy_stops_between_seeds_when_the_time_is_up(gpu, packed, tmp_path, monkeypatch, capsys):
    from card import accuracy

    times = iter(range(0, 10**6, 20))  # every look at the clock is 20 s after the one before
    monkeypatch.setattr(accuracy.time, "perf_counter", lambda: float(next(times)))
    assert gpu.main(given(tmp_path, packed, "--one", "accuracy", "--limit", "60")) == 0
    assert read(tmp_path, "accuracy")["seeds"] == 1 and "after 1 of 2 seeds" in capsys.readouterr().out


def test_a_part_that_fails_or_hangs_costs_its_own(gpu, tmp_path, capfd):
    """Without a packed folder accuracy fails; what is there is not made again."""
    (tmp_path / "speed-base.json").write_text("{}")
    parts = ["--limit", "400", "--parts", "accuracy", "speed-base", "speed-small"]
    assert gpu.main(given(tmp_path, tmp_path / "nowhere", *parts)) == 1
    told = capfd.readouterr()
    assert "error: " in told.err and "gpu_pack.py" in told.err and "Traceback" not in told.err
    assert "error: without accuracy (failed with status 1)" in told.err
    assert "speed-base: kept" in told.out and "speed-small: done" in told.out
    assert read(tmp_path, "speed-base") == {} and read(tmp_path, "speed-small")["rows"]
    assert not (tmp_path / "accuracy.json").exists()


def test_limits(gpu, tmp_path, capfd):
    words = given(tmp_path, tmp_path, "--parts", "speed-small")
    assert gpu.main([*words, "--limit", "0.2"]) == 1
    assert "speed-small (stopped after 0 s)" in capfd.readouterr().err
    assert gpu.main([*words, "--minutes", "0.1"]) == 1
    assert "not begun, 6 s are left" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_card_that_is_not_there(gpu, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--device", "cuda", "--out", str(tmp_path)])
    assert stopped.value.code == 2 and "torch sees no card" in capsys.readouterr().err


def asked_of(step, part, gpu, tmp_path, monkeypatch):
    """What a part asks a step of ``adapter_cost`` for, at its own size and with tiny settings."""
    pytest.importorskip("diffusers")
    import adapter_cost

    asked = []

    def refuse(a):
        asked.append(a)
        raise ComcatError("that is all")

    monkeypatch.setattr(adapter_cost, step, refuse)
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path), "--one", part]) == 1
    assert gpu.main(given(tmp_path, tmp_path, "--one", part)) == 1
    real, tiny = asked
    assert real.no_write and tiny.no_write
    return real, tiny


@pytest.mark.parametrize(("part", "model", "side"), [("adapter-sd14", "sd14", 512), ("adapter-sdxl", "sdxl", 1024)])
def test_adapters_are_asked_for_at_their_own_size(part, model, side, gpu, tmp_path, monkeypatch):
    real, tiny = asked_of("build", part, gpu, tmp_path, monkeypatch)
    assert (real.model, real.side, real.dtype, real.smoke) == (model, side, "bfloat16", False)
    assert (tiny.model, tiny.smoke) == ("sd14", True)


@pytest.mark.parametrize("side", [512, 1024])
def test_transformers_are_asked_for_at_their_own_size(side, gpu, tmp_path, monkeypatch):
    real, tiny = asked_of("of_transformer", f"adapter-klein-{side}", gpu, tmp_path, monkeypatch)
    assert (real.model, real.side, real.dtype, real.smoke) == ("flux2-klein", side, "bfloat16", False)
    assert tiny.smoke


def test_packed_pictures_are_what_was_packed(gpu, packed):
    from card.packed import Packed, PackedError
    from real.data import as_bytes, opened, squares

    pixels = Packed(packed).pixels("judged", 3)
    assert len(pixels) == 3 and pixels.labels.tolist() == [0, 1, 2]
    packed_once = Packed(packed).pixels("judged").pixels
    assert packed_once.shape == (20, 3, 112, 112) and torch.equal(pixels.pixels, packed_once[:3])
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (10, 200, 30)).save(file, "PNG")
    from card.packed import unpacked

    sizes = {"bytes": torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)}
    made = unpacked({**sizes, "lengths": torch.tensor([len(file.getvalue())]), "labels": torch.tensor([4])})
    assert torch.equal(made.pixels[0], as_bytes(squares(112).fit(opened(file.getvalue()))))
    with pytest.raises(PackedError, match="got 8 packed pictures, expected 9"):
        Packed(packed).pixels("calibration", 9, seed=1)
    with pytest.raises(PackedError, match="calibration-7"):
        Packed(packed).pixels("calibration", 8, seed=7)
