"""Checkpoints are written whole or not at all."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from comcat.errors import StoreError
from comcat.runs import checkpoints as module
from comcat.runs.checkpoints import Checkpoints, check_settings, differences

TENSORS = {"model": {"w": torch.arange(6.0).view(2, 3)}, "optimizer": {"exp_avg:w": torch.ones(2, 3)}}


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_what_was_saved_comes_back(tmp_path):
    kept = Checkpoints(tmp_path / "checkpoints")
    assert kept.latest() is None
    path = kept.save(7, TENSORS, {"step": 7, "loss": 0.1 + 0.2})
    found = kept.latest()
    assert found is not None and found.path == path and found.step == 7
    assert found.state == {"step": 7, "loss": 0.1 + 0.2}  # floats to the last bit
    assert torch.equal(found.tensors("model")["w"], TENSORS["model"]["w"])
    assert list(found.tensors("optimizer")) == ["exp_avg:w"]
    assert {name: list(group) for name, group in found.groups().items()} == {"model": ["w"], "optimizer": ["exp_avg:w"]}


def test_the_last_few_are_kept(tmp_path):
    kept = Checkpoints(tmp_path, keep=2)
    for step in (1, 5, 20, 100):
        kept.save(step, TENSORS, {"step": step})
    assert names(tmp_path) == ["step-00000020", "step-00000100"]
    assert kept.latest().step == 100


def test_a_step_can_be_saved_again(tmp_path):
    kept = Checkpoints(tmp_path)
    kept.save(3, TENSORS, {"try": 1})
    kept.save(3, TENSORS, {"try": 2})
    assert names(tmp_path) == ["step-00000003"] and kept.latest().state == {"try": 2}


def test_clear_forgets_all_and_nothing_else(tmp_path):
    kept = Checkpoints(tmp_path)
    kept.save(1, TENSORS, {})
    kept.save(2, TENSORS, {})
    (tmp_path / "mine").mkdir()
    kept.clear()
    assert kept.latest() is None and names(tmp_path) == ["mine"]
    Checkpoints(tmp_path / "nothing").clear()


@pytest.mark.parametrize("place", ["tensors", "second tensors", "state", "sync", "rename"])
def test_a_full_disk_leaves_the_earlier_ones_whole(tmp_path, monkeypatch, place):
    kept = Checkpoints(tmp_path)
    first = kept.save(1, TENSORS, {"step": 1})

    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    calls = []

    def fail(*arguments, **keywords):
        raise full

    def fail_second(path, group):
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half")
            raise StoreError("the weights cannot be written: No space left on device")
        return write_tensors(path, group)

    write_tensors = module.write_tensors
    with monkeypatch.context() as patched:
        if place == "tensors":
            patched.setattr(module, "write_tensors", fail)
        elif place == "second tensors":
            patched.setattr(module, "write_tensors", fail_second)
        elif place == "state":
            patched.setattr(Path, "write_bytes", fail)
        elif place == "sync":
            patched.setattr(os, "fsync", fail)
        else:
            patched.setattr(os, "rename", fail)
        message = rf"step-00000002 cannot be written: .*No space left.*the last good one is {first}"
        with pytest.raises(StoreError, match=message):
            kept.save(2, TENSORS, {"step": 2})
    assert names(tmp_path) == ["step-00000001"]
    assert kept.latest().state == {"step": 1}
    assert torch.equal(kept.latest().tensors("model")["w"], TENSORS["model"]["w"])
    kept.save(2, TENSORS, {"step": 2})  # there is room again
    assert kept.latest().step == 2


def test_the_first_one_that_fails_says_that_there_is_none(tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_tensors", fail)
    with pytest.raises(StoreError, match="there is no earlier one"):
        Checkpoints(tmp_path).save(1, TENSORS, {})


class Killed(BaseException):
    """What a kill leaves undone: nothing after it runs."""


@pytest.mark.parametrize("step", [2, 1])
@pytest.mark.parametrize("call", range(4))
def test_a_kill_while_deleting_leaves_a_whole_newest_one(tmp_path, monkeypatch, step, call):
    """Deleting loses the name first: killed half-way, no folder of a checkpoint's name lacks files."""
    kept = Checkpoints(tmp_path, keep=1)
    kept.save(1, TENSORS, {"step": 1})
    remaining = [call]

    def killed_half_way(path, *arguments, **keywords):
        files = sorted(Path(path).iterdir()) if Path(path).is_dir() else []
        if files and not remaining[0]:
            os.unlink(files[0])
            raise Killed
        remaining[0] -= bool(files)
        return rmtree(path, *arguments, **keywords)

    rmtree = shutil.rmtree
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", killed_half_way)
        try:
            kept.save(step, TENSORS, {"step": step})
        except Killed:
            pass
    for folder in tmp_path.glob("step-*"):
        assert names(folder) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    kept.save(3, TENSORS, {"step": 3})
    assert names(tmp_path) == ["step-00000003"]


def test_a_damaged_one_is_said_and_not_skipped(tmp_path):
    kept = Checkpoints(tmp_path)
    kept.save(1, TENSORS, {"step": 1})
    path = kept.save(2, TENSORS, {"step": 2})
    (path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(StoreError, match=r"model\.safetensors cannot be read"):
        kept.latest().tensors("model")
    (path / "state.json").write_text("{")
    with pytest.raises(StoreError, match=r"damaged.*delete it to go on from the one before"):
        kept.latest()


def test_other_settings_are_refused_by_name(tmp_path):
    kept = Checkpoints(tmp_path)
    kept.save(4, TENSORS, {"settings": {"lr": 0.001, "only": ["attn"], "seed": 0}})
    check_settings(kept.latest(), {"lr": 0.001, "only": ("attn",), "seed": 0})  # tuples are lists on disk
    with pytest.raises(StoreError, match=r"step-00000004 .*: lr was 0.001, now 0\.01\. .*--restart"):
        check_settings(kept.latest(), {"lr": 0.01, "only": ("attn",), "seed": 0})


def test_differences_name_what_came_and_went():
    assert differences({"a": 1, "b": 2}, {"b": 2, "c": 3}) == ["a was 1, now None", "c was None, now 3"]
    assert json.dumps(differences({}, {})) == "[]"
