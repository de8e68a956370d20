"""Files and folders are written whole or not at all."""

import errno
import json
import os
import stat
from contextlib import suppress

import pytest
import torch

from comcat import files
from comcat.errors import StoreError
from comcat.files import (
    HASH,
    check_writable,
    home_path,
    read_tensors,
    read_tensors_and_metadata,
    surviving,
    whole_file,
    whole_folder,
    write_json,
    write_tensors,
    write_text,
)


def full_disk(*arguments, **keywords):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def names(folder):
    return sorted(p.name for p in folder.iterdir())


WRITERS = {
    "text": lambda path: write_text(path, "new"),
    "json": lambda path: write_json(path, {"new": "né"}),
    "tensors": lambda path: write_tensors(path, {"new": torch.ones(3)}),
}


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_file_is_made_with_the_folders_above_it_and_replaced(write, tmp_path):
    path = tmp_path / "a" / "b" / "file"
    write(path)
    new = path.read_bytes()
    path.write_bytes(b"old")
    write(path)
    assert path.read_bytes() == new and names(path.parent) == ["file"]


@pytest.mark.parametrize("where", ["fsync", "replace"])
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_leaves_the_old_file(write, where, tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    monkeypatch.setattr(os, where, full_disk)
    with pytest.raises(StoreError, match=r"file cannot be written: No space left on device; .*unchanged"):
        write(path)
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_what_fails_inside_the_block_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as new:
        new.write_bytes(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and names(tmp_path) == ["file"]


def test_a_file_keeps_its_link_and_its_permissions(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(real)
    write_text(link, "new")
    assert link.is_symlink() and real.read_text() == "new" and stat.S_IMODE(real.stat().st_mode) == 0o640


def test_tensors_can_be_read_by_others_as_the_umask_says(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    write_tensors(tmp_path / "t.safetensors", {"x": torch.ones(2)})
    assert (tmp_path / "t.safetensors").stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("place", ["", "folder", "file/below"])
def test_a_place_that_is_no_file_is_said(place, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="cannot be written"):
        write_text(tmp_path / place, "x")
    assert names(tmp_path) == ["file", "folder"] and not names(tmp_path / "folder")


def test_the_root_is_no_file():
    with pytest.raises(StoreError, match="expected the name of a file"):
        write_text("/", "x")


def test_what_utf8_cannot_hold_becomes_a_question_mark(tmp_path):
    write_text(tmp_path / "t", "a\udcffb")
    assert (tmp_path / "t").read_text() == "a?b"


def test_json_comes_back(tmp_path):
    write_json(tmp_path / "j", {"é": [1, 2.5, None]})
    assert json.loads((tmp_path / "j").read_text(encoding="utf-8")) == {"é": [1, 2.5, None]}


def test_tensor_files_hold_views_once_and_whole(tmp_path):
    base = torch.arange(12.0)
    state = {"a": base[:6].view(2, 3), "b": base[6:], "c": base[:6].view(2, 3), "d": base[:6], "e": torch.zeros(0)}
    write_tensors(tmp_path / "t.safetensors", state)
    again = read_tensors(tmp_path / "t.safetensors")
    assert set(again) == set(state) and all(torch.equal(again[k], v) for k, v in state.items())
    assert again["a"] is again["c"] and again["d"].data_ptr() != again["a"].data_ptr()
    for bad, reason in ((torch.zeros(2, device="meta"), "meta"), (torch.eye(2).to_sparse(), "sparse"), (3, "int")):
        with pytest.raises(StoreError, match=rf"x cannot be saved.*{reason}"):
            write_tensors(tmp_path / "x", {"x": bad})


def test_metadata_goes_beside_tensors(tmp_path):
    from safetensors import safe_open

    write_tensors(tmp_path / "t", {"x": torch.ones(1)}, {"identifier": "V*"})
    with safe_open(tmp_path / "t", framework="pt") as file:
        metadata = file.metadata()
    assert len(metadata.pop("sha256")) == 64 and metadata == {"identifier": "V*"}


def test_any_bit_that_flips_in_a_tensor_file_is_noticed(tmp_path):
    path = tmp_path / "t"
    tensors = {
        "half": torch.randn(3, 2).half(),
        "none": torch.ones(0),
        "one": torch.tensor(2),
        "brain": torch.ones(5).bfloat16(),
    }
    write_tensors(path, {**tensors, "twin": tensors["half"]}, {"identifier": "V*"})
    assert read_tensors(path)["twin"].equal(tensors["half"])
    whole = path.read_bytes()
    for place in range(len(whole)):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << place % 8
        path.write_bytes(flipped)
        with suppress(StoreError):
            _, metadata = read_tensors_and_metadata(path)
            assert HASH not in metadata, place  # its own name: who needs the hash must ask for it


@pytest.mark.parametrize("content", [b"", b"nonsense"])
def test_a_damaged_tensor_file_is_said(content, tmp_path):
    (tmp_path / "t").write_bytes(content)
    with pytest.raises(StoreError, match="cannot be read"):
        read_tensors(tmp_path / "t")


# ------------------------------------------------------------------------------------------------------------ folders


def fill(folder, text):
    with whole_folder(folder) as new:
        (new / "inner").mkdir()
        (new / "inner" / "file").write_text(text)


def test_a_folder_takes_the_place_of_the_old_one(tmp_path):
    folder = tmp_path / "a" / "folder"
    fill(folder, "old")
    (folder / "more").touch()
    fill(folder, "new")
    assert names(folder) == ["inner"] and (folder / "inner" / "file").read_text() == "new"
    assert names(folder.parent) == ["folder"]


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("where", ["fsync", "rename", "block"])
def test_what_fails_leaves_the_old_folder(where, exchange, tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    fill(folder, "old")
    if not exchange:
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    if where != "block":
        monkeypatch.setattr(os, where, full_disk)
    with pytest.raises(StoreError, match=r"cannot save to .*folder: .*No space left.*unchanged"), whole_folder(folder):
        if where == "block":
            full_disk()
    monkeypatch.undo()
    assert (folder / "inner" / "file").read_text() == "old" and names(tmp_path) == ["folder"]


def test_an_error_inside_names_the_folder_asked_for(tmp_path):
    folder = tmp_path / "folder"
    with pytest.raises(StoreError, match=rf"^{folder}/w cannot be written"), whole_folder(folder) as new:
        (new / "w").mkdir()
        write_text(new / "w", "x")


def test_leftovers_go_unless_somebody_writes_to_them(tmp_path):
    folder = tmp_path / "s[m]all"
    dead, alive = (tmp_path / f".s[m]all.comcat-{name}.tmp" for name in ("dead", "alive"))
    for path in (dead, alive):
        path.mkdir()
    lock = files._lock(alive, wait=False)
    fill(folder, "x")
    assert not dead.exists() and alive.exists()
    os.close(lock)
    fill(folder, "x")
    assert names(tmp_path) == ["s[m]all"]


def test_what_a_kill_between_two_renames_left_is_found_again(tmp_path):
    folder = tmp_path / "folder"
    fill(folder, "old")
    folder.rename(tmp_path / ".folder.comcat-before")
    assert (surviving(folder) / "inner" / "file").read_text() == "old"
    fill(folder, "new")
    assert (folder / "inner" / "file").read_text() == "new" and names(tmp_path) == ["folder"]


def test_a_place_is_tried_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    check_writable(tmp_path / "not" / "there")
    assert names(tmp_path) == ["file"]
    with pytest.raises(StoreError, match="nothing can be written"):
        check_writable(tmp_path / "file" / "below")


def test_the_same_tensors_are_the_same_file_byte_for_byte(tmp_path):
    """safetensors orders metadata by chance, anew for each file."""
    tensors = {"b": torch.arange(6.0).view(2, 3), "a": torch.ones(4, dtype=torch.float16)}
    about = {"format": "pt", "naïve": 'a "quoted"\nline', "z": "1", "y": "2"}
    written = set()
    for number in range(8):
        write_tensors(tmp_path / f"{number}.safetensors", tensors, about)
        written.add((tmp_path / f"{number}.safetensors").read_bytes())
    assert len(written) == 1
    assert read_tensors(tmp_path / "0.safetensors")["b"].equal(tensors["b"])


def test_a_name_that_no_file_system_takes_is_told_before_anything_is_asked_of_it() -> None:
    for path in ("a" * 256, f"/tmp/{'é' * 128}/x.json"):
        with pytest.raises(StoreError, match=r"a name of 256 bytes in a path, .*: expected at most 255"):
            home_path(path)
    assert home_path("/".join(["a" * 255] * 3)).name == "a" * 255
