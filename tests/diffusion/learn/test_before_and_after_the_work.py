"""What is wrong is said before the work, and by its name; what was learned survives a disk that is full at the end."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import comcat.diffusion as cd
from comcat import files
from comcat.cli import main
from comcat.diffusion.learn.beforehand import notes_on_idle_settings
from comcat.diffusion.learn.customize import Customization
from comcat.diffusion.learn.examples import read_examples
from comcat.diffusion.learn.optimisation import Optimisation
from comcat.diffusion.learn.settings import CustomizeSettings
from comcat.errors import DataError, ModelError, NumericsError, SettingsError, StoreError
from comcat.runs.claims import claimed

from .. import tiny

PROMPT = "a photo of V* dog"
QUICK: dict[str, Any] = {"steps": 3, "resolution": 16}


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    return tiny.stable_diffusion(tmp_path / "parts")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": 2.5}, r"got steps=2\.5, expected a whole number"),
        ({"lr": "fast"}, "got lr='fast', expected a number"),
        ({"resolution": 100000}, "resolution: got 100000, expected at most 128; the pipeline's own is 16"),
    ],
)
def test_a_wrong_setting_is_refused_before_the_work(pipe: Any, settings: dict[str, Any], said: str) -> None:
    pipe.vae.encode = pipe.unet.forward = None  # any work would fail otherwise
    with pytest.raises(SettingsError, match=said):
        cd.customize(pipe, tiny.pictures(), prompt=PROMPT, **settings)
    assert cd.adapters(pipe) == {}


def test_pictures_of_100000_pixels_are_not_generated(pipe: Any, tmp_path: Path) -> None:
    pipe.unet.forward = None
    with pytest.raises(SettingsError, match="size: got 100000, expected at most 128"):
        list(cd.generate(pipe, "a dog", size=100000))


def test_a_transformer_s_table_of_positions_bounds_the_resolution(tmp_path: Path) -> None:
    pipe = tiny.stable_diffusion_3(tmp_path)
    side = pipe.transformer.config.pos_embed_max_size * pipe.transformer.config.patch_size * pipe.vae_scale_factor
    assert side < 8 * 16
    with pytest.raises(SettingsError, match=f"resolution: got {2 * side}, expected at most {side}"):
        cd.customize(pipe, tiny.pictures(), prompt=PROMPT, resolution=2 * side)


@pytest.mark.parametrize("kind", [torch.float32, torch.float16])
def test_a_vae_that_yields_nan_is_named_and_not_the_adapter(pipe: Any, kind: torch.dtype) -> None:
    with torch.no_grad():
        pipe.vae.encoder.conv_in.weight.fill_(float("nan"))
    pipe.vae.to(kind)
    said = r"the pipeline's VAE \(AutoencoderKL, (float32|float16)\) makes NaN or infinity of picture 0"
    with pytest.raises(NumericsError, match=said) as told:
        cd.customize(pipe, tiny.pictures(), prompt=PROMPT, **QUICK)
    assert ("bfloat16 or float32" in str(told.value)) == (kind == torch.float16)
    assert cd.adapters(pipe) == {}


def test_a_text_encoder_that_yields_nan_is_named(pipe: Any) -> None:
    with torch.no_grad():
        pipe.text_encoder.encoder.layers[0].mlp.fc1.weight.fill_(float("nan"))
    with pytest.raises(NumericsError, match=r"the pipeline's text encoders make NaN.*'a photo of V\* dog'"):
        cd.customize(pipe, tiny.pictures(), prompt=PROMPT, **QUICK)


@pytest.mark.parametrize("family", ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux"])
def test_where_is_what_the_family_has_when_left_out(family: str, tmp_path: Path) -> None:
    pipe = getattr(tiny, family)(tmp_path)
    kind = "cross" if hasattr(pipe, "unet") else "joint"
    assert set(cd.attach(pipe).modules) == set(cd.find_adaptable(pipe).only(kind))
    cd.unload(pipe)
    adapter = cd.customize(pipe, tiny.pictures(), prompt=PROMPT, **QUICK)
    assert set(adapter.modules) == set(cd.find_adaptable(pipe).only(kind))


def test_a_run_that_named_the_family_s_own_attention_goes_on_without_naming_it(pipe: Any, tmp_path: Path) -> None:
    out = tmp_path / "dog.safetensors"
    cd.customize(pipe, tiny.pictures(), prompt=PROMPT, out=out, where="cross", **QUICK)
    cd.unload(pipe)
    cd.customize(pipe, tiny.pictures(), prompt=PROMPT, out=out, **QUICK)
    cd.unload(pipe)
    with pytest.raises(StoreError, match="where was 'cross', now 'all'"):
        cd.customize(pipe, tiny.pictures(), prompt=PROMPT, out=out, where="all", **QUICK)


class Disk:
    """A disk that is full for files of more than a number of bytes, once it is told so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
        self.room, self.full = room, False
        sync = files._sync

        def checked(path: Path) -> None:
            if self.full and path.is_file() and path.stat().st_size > self.room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(path)

        monkeypatch.setattr(files, "_sync", checked)


def run(pipe: Any, out: Path, disk: Disk, **settings: Any) -> Customization:
    """A run whose disk fills up before its last step."""
    from comcat.diffusion.learn.settings import CustomizeSettings

    chosen = CustomizeSettings(**{**QUICK, **settings})
    work = Customization(pipe, tiny.pictures(), PROMPT, "V*", "default", chosen, out, False)
    forward = pipe.unet.forward
    calls = []

    def filling(*args: Any, **keywords: Any) -> Any:
        calls.append(1)
        disk.full = len(calls) >= 3
        return forward(*args, **keywords)

    pipe.unet.forward = filling
    return work


def test_a_disk_that_is_full_at_the_end_keeps_the_adapter_without_the_checkpoint(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "dog.safetensors"
    size = cd.save(pipe, tmp_path / "x.safetensors", name=cd.attach(pipe).name).stat().st_size
    cd.unload(pipe)
    work = run(pipe, out, Disk(monkeypatch, room=2 * size))  # a checkpoint holds it in 32 bit, with two moments
    with pytest.warns(UserWarning, match="could not be kept|could not be written") as warned:
        adapter = work.run(False)
    assert len(warned) == 2  # the last checkpoint, and the report with its pictures
    assert cd.read(out).identifier == "V*" and list(cd.adapters(pipe)) == [adapter.name]
    assert any("could not be kept" in note and "No space left" in note for note in work.notes)


def test_a_disk_that_is_full_to_the_last_byte_leaves_the_adapter_in_the_pipe(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, disk = tmp_path / "dog.safetensors", Disk(monkeypatch, room=0)
    said = r"No space left.*acts in the pipeline as 'default': make room and save\(\) it"
    with pytest.warns(UserWarning, match="could not be kept"), pytest.raises(StoreError, match=said):
        run(pipe, out, disk).run(False)
    assert not out.exists() and list(tmp_path.glob(".dog*")) == []
    disk.full = False
    file = cd.read(cd.save(pipe, out))
    assert file.identifier == "V*" and any(f["k_down"].any() for f in file.factors.values())
    assert not any(p.requires_grad for p in cd.adapters(pipe)["default"].parameters())


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"source": None}, DataError, r"got None \(NoneType\) for pictures of the concept, expected a folder"),
        ({"source": [1, 2]}, DataError, r"got 1 \(int\) among pictures of the concept, expected pictures of Pillow"),
        ({"source": "a\0b"}, DataError, r"\\x00"),
        ({"prompt": 7}, SettingsError, r"prompt: got 7 \(int\), expected a text or several"),
        ({"prompt": ["a V* dog", None]}, SettingsError, r"prompt: got None \(NoneType\), expected a text"),
        ({"rank": 10**9}, SettingsError, r"got rank 1000000000, expected at most \d+, the width"),
        ({"out": "a\0b.safetensors"}, StoreError, r"\\x00.* expected a path"),
    ],
)
def test_something_of_another_kind_is_refused_before_the_work(
    pipe: Any, change: dict[str, Any], error: type[Exception], said: str
) -> None:
    given = {"source": tiny.pictures(), "prompt": PROMPT, **QUICK, **change}
    pipe.unet.forward = None
    with pytest.raises(error, match=said):
        cd.customize(pipe, given.pop("source"), **given)
    assert cd.adapters(pipe) == {}


def test_files_that_are_no_pictures_and_pictures_twice_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "dog"
    (folder / "more").mkdir(parents=True)
    for number, picture in enumerate(tiny.pictures(3)):
        picture.save(folder / f"{number}.png")
    shutil.copy(folder / "0.png", folder / "more" / "again.png")
    assert read_examples(folder).notes == ["The same as another of the pictures of the concept: more/again.png"]
    for name in ("1.txt", "2.heic", ".DS_Store"):
        (folder / name).write_bytes(b"none")
    assert read_examples(folder).notes[0] == "Not read, since pictures' names end otherwise: 1.txt; 2.heic"
    assert read_examples(tiny.pictures(3)).notes == []


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff"])
def test_a_film_gives_its_first_frame_and_says_so(kind: str, tmp_path: Path) -> None:
    first, *rest = tiny.pictures(3)
    first.save(tmp_path / f"bounce.{kind}", save_all=True, append_images=rest, lossless=True)
    (tmp_path / "torn.gif").write_bytes(b"GIF89a")
    told = f"Of several frames, the first alone is learned from: bounce.{kind}; store each frame as a file"
    assert told in read_examples(tmp_path).notes
    assert read_examples(tmp_path / f"bounce.{kind}").notes[0] == told
    (tmp_path / f"bounce.{kind}").unlink()
    first.save(tmp_path / "telephone.jpg", format="MPO", save_all=True, append_images=rest)
    first.save(tmp_path / "still.gif")
    assert not any("frames" in note for note in read_examples(tmp_path).notes)


def test_pictures_none_of_which_can_be_read_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("none")
    with pytest.raises(DataError, match=r"1 of the first 1 picture of .* cannot be read: a\.png: Unidentified") as told:
        read_examples(tmp_path)
    assert "max_unreadable" not in str(told.value)


def test_one_run_at_a_time_writes_to_a_file(pipe: Any, tmp_path: Path) -> None:
    out = tmp_path / "dog.safetensors"
    cd.customize(pipe, tiny.pictures(), prompt=PROMPT, out=out, **QUICK)
    cd.unload(pipe)
    made = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for restart in (False, True):
        with claimed(out), pytest.raises(StoreError, match=r"another run is writing to .*dog\.safetensors"):
            cd.customize(pipe, tiny.pictures(), prompt=PROMPT, out=out, restart=restart, **QUICK)
        assert made == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        assert not cd.adapters(pipe)
    cd.customize(pipe, tiny.pictures(), prompt=PROMPT, out=out, restart=True, **QUICK)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"masks": "dog/masks"}, "masks: .*dog/masks' lies in .*dog'"),
        ({"masks": "dog"}, "masks: .*dog' lies in"),
        ({"prior_prompt": "a dog", "prior_images": "dog/class"}, "prior_images: .* lies in"),
        ({"prior_prompt": "a dog", "prior_images": "."}, "prior_images: .* holds .*dog'"),
        ({"out": "dog/dog.safetensors"}, "out: .* lies in .*expected a place outside"),
    ],
)
def test_no_other_folder_s_pictures_are_taken_for_the_concept(
    settings: dict[str, Any], said: str, pipe: Any, tmp_path: Path
) -> None:
    """Sub-folders are read as well, so that masks and samples in one would be learned."""
    for folder in ("dog", "dog/masks", "dog/class"):
        (tmp_path / folder).mkdir()
        tiny.pictures(1)[0].save(tmp_path / folder / "0.png")
    given = {k: str(tmp_path / v) if k != "prior_prompt" else v for k, v in settings.items()}
    with pytest.raises(SettingsError, match=said):
        cd.customize(pipe, tmp_path / "dog", prompt=PROMPT, **QUICK, **given)
    assert not cd.adapters(pipe)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_learns_whatever_mode_its_caller_is_in(mode: Any, pipe: Any, tmp_path: Path) -> None:
    given = {**QUICK, "protect": ("a dog",), "crops": 1}
    wanted = [p.clone() for p in cd.customize(pipe, tiny.pictures(), prompt=PROMPT, **given).parameters()]
    cd.unload(pipe)
    with mode():
        found = cd.customize(pipe, tiny.pictures(), prompt=PROMPT, **given).parameters()
        assert not torch.is_grad_enabled()
    assert all(map(torch.equal, wanted, found))


def test_a_file_says_how_its_adapter_was_taught_whenever_it_is_saved(pipe: Any, tmp_path: Path) -> None:
    cd.customize(pipe, tiny.pictures(), prompt=PROMPT, out=tmp_path / "a.safetensors", **QUICK)
    cd.save(pipe, tmp_path / "b.safetensors")
    one, other = (cd.read(tmp_path / f"{n}.safetensors").metadata for n in "ab")
    assert one == other and json.loads(other["settings"])["steps"] == QUICK["steps"] and other["pictures"] == "3"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sample_prompt": "V*", "sample_count": 2}, ["sample_prompt", "sample_count"]),
        ({"sample_steps": 5, "prior_count": 3}, ["prior_count", "sample_steps"]),
        ({"sample_steps": 5, "sample_every": 3}, []),
        ({"sample_steps": 5, "prior_prompt": "a dog", "prior_count": 3, "prior_weight": 0.5}, []),
        ({"prior_images": "x", "prior_prompt": "a dog", "prior_count": 3}, ["prior_count"]),
        ({}, []),
    ],
)
def test_settings_that_change_nothing_are_told(settings: dict[str, Any], said: list[str]) -> None:
    given = CustomizeSettings(**settings)
    assert [note.split()[0] for note in notes_on_idle_settings(given, out=True)] == said
    more = ["sample_every"] if given.sample_every else []
    assert [note.split()[0] for note in notes_on_idle_settings(given, out=False)] == said + more


@pytest.mark.parametrize("restart", [False, True])
def test_what_is_no_adapter_is_never_replaced(restart: bool, pipe: Any, tmp_path: Path) -> None:
    pipe.unet.save_pretrained(tmp_path / "unet")
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    before = weights.read_bytes()
    with pytest.raises(StoreError, match="is there already, and is no adapter of comcat's"):
        cd.customize(pipe, tiny.pictures(), prompt=PROMPT, out=weights, restart=restart, **QUICK)
    assert weights.read_bytes() == before and not cd.adapters(pipe)


@pytest.mark.parametrize("every", [0, 2])
def test_ctrl_c_promises_no_checkpoint_that_is_not_there(
    every: int, pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe.save_pretrained(tmp_path / "tiny")
    tiny.pictures(1)[0].save(tmp_path / "dog.png")
    step = Optimisation.step

    def interrupted(self: Any, number: int, watch: Any) -> Any:
        if number == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self, number, watch)

    monkeypatch.setattr(Optimisation, "step", interrupted)
    given = ["--images", str(tmp_path / "dog.png"), "--prompt", PROMPT, "--out", str(tmp_path / "dog.safetensors")]
    assert main(["customize", str(tmp_path / "tiny"), *given, "--steps", "4", "--checkpoint-every", str(every)]) == 130
    said = capsys.readouterr().err
    assert ("goes on from the last checkpoint" in said, "begins anew" in said) == (every > 0, every == 0)


def test_a_picture_alone_is_a_concept(pipe: Any) -> None:
    adapter = cd.customize(pipe, tiny.pictures()[0], prompt=PROMPT, **{**QUICK, "steps": 1})
    assert adapter.rank > 0


def test_a_pipeline_that_is_none_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for given, error, said in (
        (7, StoreError, r"got 7 \(int\), expected a path"),
        ("a\0b", StoreError, r"\\x00"),
        (tmp_path / "file", ModelError, "is a file, expected a folder that save_pretrained wrote"),
    ):
        with pytest.raises(error, match=said):
            cd.load_pipeline(given)
    with pytest.raises(SettingsError, match=r"prompts: got 7 \(int\), expected a text or several"):
        list(cd.generate(tiny.stable_diffusion(tmp_path / "parts"), 7))  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match=r"got dtype torch\.int8"):
        cd.attach(tiny.stable_diffusion(tmp_path / "others"), dtype=torch.int8)


def test_who_calls_it_from_python_hears_the_notes_too(tmp_path):
    pipe = tiny.stable_diffusion(tmp_path / "parts")
    with pytest.warns(UserWarning) as heard:
        cd.customize(pipe, tiny.pictures(1), prompt="a photo of V* dog", steps=1, resolution=16)
    said = [str(one.message) for one in heard]
    assert any("Only one of the pictures of the concept" in one for one in said), said
    assert any("splits the identifier 'V*'" in one for one in said), said
    assert not any("Held throughout" in one for one in said)
    assert all(one.filename == __file__ for one in heard if "Only one" in str(one.message))
