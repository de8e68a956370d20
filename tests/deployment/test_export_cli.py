"""``comcat export`` and ``comcat bench`` on exported files."""

from __future__ import annotations

import json

import pytest

import comcat
from comcat.cli import main

from ..models import pictures, tiny_vit


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    small = comcat.compress(tiny_vit(depth=1, num_classes=10), calibration=pictures(), reduce=0.3)
    return comcat.save(small, tmp_path_factory.mktemp("models") / "small")


def test_export_and_what_it_says(folder, tmp_path, capsys):
    out = tmp_path / "small.onnx"
    assert main(["export", str(folder), "--out", str(out), "--data", "digits:test", "--count", "5"]) == 0
    said = capsys.readouterr().out
    assert f"Wrote {out}" in said and "on 5 pictures of digits" in said and "agreement 100.00 %" in said
    assert comcat.open_exported(out).num_classes == 10
    assert main(["export", str(folder), "--out", str(out)]) == 1
    assert "exists" in capsys.readouterr().err


def test_export_as_json(folder, tmp_path, capsys):
    out = tmp_path / "small.onnx"
    arguments = [
        "export",
        str(folder),
        "--out",
        str(out),
        "--count",
        "2",
        "--for",
        "tensorrt",
        "--batch",
        "2",
        "--json",
    ]
    assert main(arguments) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["path"] == str(out) and said["comparison"]["count"] == 2 and said["notes"]
    assert json.loads(out.with_name("small.onnx.json").read_text())["settings"]["target"] == "tensorrt"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--int8", "--fp16"], "--int8 and --fp16"),
        (["--static"], "--static without --int8"),
        (["--opset", "11"], "opset=11, expected 18 to 23"),
        (["--count", "0"], "--count 0"),
        (["--to", "torch", "--opset", "20"], "a matter of to='onnx'"),
    ],
)
def test_options_that_do_not_go_together(folder, tmp_path, capsys, arguments, words):
    assert main(["export", str(folder), "--out", str(tmp_path / "m.onnx"), *arguments]) == 1
    assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("source", ["adapter.safetensors", "diffusers:owner/name"])
def test_pipelines_and_adapters_are_refused(tmp_path, capsys, source):
    assert main(["export", source, "--out", str(tmp_path / "m.onnx")]) == 1
    assert "text-to-image" in capsys.readouterr().err


def bench(capsys, *arguments) -> dict:
    assert main(["bench", *map(str, arguments), "--repeats", "2", "--batch-size", "2", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_bench_times_a_file_against_a_model_and_a_model_in_a_runtime(folder, tmp_path, capsys):
    out = comcat.export(folder, out=tmp_path / "small.onnx", pictures=2).path
    said = bench(capsys, out, "--against", folder)
    assert [row["runtime"].split()[0] for row in said["models"].values()] == ["PyTorch", "onnxruntime"]
    assert said["models"][str(out)]["size_bytes"] == out.stat().st_size and len(said["speed_up"]) == 3
    said = bench(capsys, out, "--against", folder, "--runtime", "onnxruntime")
    assert {row["runtime"].split()[0] for row in said["models"].values()} == {"onnxruntime"}
    assert said["models"][str(folder)]["parameters"] == comcat.count_parameters(comcat.load(folder))
    assert main(["bench", str(out), "--repeats", "1", "--batch-size", "1"]) == 0
    assert "onnxruntime" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--runtime", "openvino"], "is of the format onnx, which does not run in openvino"),
        (["--compile"], "--compile, which an exported file has had decided"),
    ],
)
def test_bench_refuses_what_a_runtime_does_not_do(tmp_path, capsys, arguments, words):
    (tmp_path / "small.onnx").write_bytes(b"")
    assert main(["bench", str(tmp_path / "small.onnx"), *arguments]) == 1
    assert words in capsys.readouterr().err
