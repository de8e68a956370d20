"""The type that weights are stored in, and the sizes that are told."""

import copy
import json
from dataclasses import replace

import pytest
import torch

import comcat
from comcat import files
from comcat.errors import SettingsError, StoreError
from comcat.files import read_tensors
from comcat.record import Results
from comcat.store import load, load_model, save

from ..test_store import DEIT, deit, output


def half_source(tmp_path, **changed):
    """A folder of timm whose weights are stored in 16 bits."""
    model = deit(**changed).half()
    folder = tmp_path / "source"
    folder.mkdir()
    files.write_tensors(folder / "model.safetensors", model.state_dict())
    cfg = {"architecture": "deit_tiny_patch16_224", "num_classes": 5, "model_args": {**DEIT, **changed}}
    cfg["model_args"].pop("num_classes", None)
    cfg["pretrained_cfg"] = {"num_classes": 5, "input_size": [3, 32, 32]}
    (folder / "config.json").write_text(json.dumps(cfg))
    return folder


def kinds_of(folder):
    return {t.dtype for t in read_tensors(folder / "model.safetensors").values()}


def test_a_model_keeps_the_precision_of_its_source_on_the_disk(tmp_path):
    """A source in 16 bits, worked on in 32, must not come out larger than it went in."""
    source = half_source(tmp_path)
    model = load_model(source)
    assert model.head.weight.dtype == torch.float32
    small = comcat.compress(model, reduce=0.3, statistic="weights")
    folder = save(small, tmp_path / "small")
    assert kinds_of(folder) == {torch.float16}
    assert (folder / "model.safetensors").stat().st_size < (source / "model.safetensors").stat().st_size
    loaded = load(folder)
    assert loaded.head.weight.dtype == torch.float16
    torch.testing.assert_close(output(loaded.float()), output(small), atol=1e-2, rtol=0)
    assert kinds_of(save(load_model(folder), tmp_path / "again")) == {torch.float16}  # loaded in 32 bits once more
    assert kinds_of(save(small, tmp_path / "wide", dtype=torch.float32)) == {torch.float32}
    assert torch.equal(output(load(tmp_path / "wide")), output(small))
    assert kinds_of(save(small, tmp_path / "brain", dtype=torch.bfloat16)) == {torch.bfloat16}


def test_values_too_large_for_the_type_are_not_lost(tmp_path):
    small = comcat.compress(load_model(half_source(tmp_path)), reduce=0.3, statistic="weights")
    with torch.no_grad():
        small.head.bias[0] = 1e6
    with pytest.raises(StoreError, match=r"head\.bias holds values too large for torch\.float16"):
        save(small, tmp_path / "small", dtype=torch.float16)
    assert kinds_of(save(small, tmp_path / "small")) == {torch.float32}  # rather than infinity
    assert torch.equal(output(load(tmp_path / "small")), output(small))


@pytest.mark.parametrize("dtype", ["float16", torch.int8, 16])
def test_only_floating_point_types_hold_weights(tmp_path, dtype):
    small = comcat.compress(deit(), reduce=0.3, statistic="weights")
    with pytest.raises(SettingsError, match="floating-point"):
        save(small, tmp_path / "small", dtype=dtype)
    assert not list(tmp_path.iterdir())


def test_sizes_told_are_those_of_the_files(tmp_path):
    from comcat.methods.compress import CompressSettings, compress_
    from comcat.report.collect import collect

    source = half_source(tmp_path)
    model = load_model(source)
    before = copy.deepcopy(model)
    done = compress_(model, None, CompressSettings(reduce=0.3, statistic="weights"))
    report = collect(before, model, done, model=str(source))
    assert report.before["size_bytes"] == (source / "model.safetensors").stat().st_size
    model.comcat_record = replace(model.comcat_record, results=Results(before=report.before, after=report.after))
    folder = save(model, tmp_path / "small", report=report)
    size = (folder / "model.safetensors").stat().st_size
    assert 0 <= size - load(folder).comcat_record.results.after["size_bytes"] < 200  # the hash in its header
    wide = save(model, tmp_path / "wide", report=report, dtype=torch.float32)
    size = (wide / "model.safetensors").stat().st_size
    assert load(wide).comcat_record.results.after["size_bytes"] == size > 1.5 * report.after["size_bytes"]
    assert report.title == "source, compressed"
