"""Pictures depend on their prompt, number and seed alone, say how they were made, and are not made twice."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from comcat.diffusion import GenerateSettings, customize, generate, generate_to
from comcat.diffusion.draw.pages import Page, Sheet, render_page
from comcat.diffusion.draw.pictures import file_name, grid, read_made, save_picture
from comcat.diffusion.draw.prompts import read_prompts
from comcat.errors import DataError, ModelError, NumericsError, SettingsError, StoreError

from .. import newer, tiny


@pytest.fixture
def pipe(tmp_path):
    return tiny.stable_diffusion(tmp_path / "parts")


HOW = {"steps": 2, "size": 16}


def pixels(generated):
    return {(g.prompt, g.number): np.asarray(g.image).astype(int) for g in generated}


@pytest.mark.parametrize("family", ["stable_diffusion", "stable_diffusion_xl", "stable_diffusion_3", "flux"])
def test_a_picture_does_not_depend_on_what_else_is_generated(family, tmp_path):
    pipe = getattr(tiny, family)(tmp_path)
    every = pixels(generate(pipe, ["a dog", "a red cat"], count=3, batch_size=4, **HOW))
    assert len(every) == 6 and len({v.tobytes() for v in every.values()}) == 6
    alone = pixels(generate(pipe, "a red cat", count=2, batch_size=1, **HOW))
    for of, found in alone.items():
        assert np.abs(found - every[of]).max() <= 1  # rounding, at most one of 255 levels
    other = pixels(generate(pipe, "a red cat", seed=1, **HOW))
    assert np.abs(other["a red cat", 0] - every["a red cat", 0]).max() > 1


def test_files_say_how_they_were_made(tmp_path, pipe):
    out = tmp_path / "out"
    about = {"model": "tiny", "adapters": [{"name": "dog", "scale": 0.8}]}
    written = generate_to(out, pipe, "a photo of «V*» dög", count=2, seed=4, **HOW, about=about)
    assert [p.name for p in written.paths] == sorted(p.name for p in out.iterdir()) and written.kept == 0
    image = Image.open(written.paths[1])
    assert image.size == (16, 16) and image.text["prompt"] == "a photo of «V*» dög"
    made = json.loads(image.text["comcat"])
    assert made == {
        "prompt": "a photo of «V*» dög", "number": 1, "seed": 4, "steps": 2, "size": 16, "guidance": None,
        "negative": None,
        "scheduler": "DDIMScheduler", **about,
    }  # fmt: skip


def test_what_is_there_is_kept(tmp_path, pipe, monkeypatch):
    out, how = tmp_path / "out", {"count": 3, **HOW}
    first = generate_to(out, pipe, ["a dog", "a cat"], **how)
    bytes_before = {p: p.read_bytes() for p in first.paths}
    first.paths[0].unlink()
    first.paths[4].write_bytes(first.paths[4].read_bytes()[:50])  # as a kill in the middle would never leave it
    (out / ".half.png.tmp").write_bytes(b"")
    import comcat.diffusion.draw.generate as module

    asked = []
    batch = module._batch
    monkeypatch.setattr(module, "_batch", lambda p, pictures, s: asked.extend(pictures) or batch(p, pictures, s))
    again = generate_to(out, pipe, ["a cat", "a dog"], count=3, batch_size=1, **HOW)
    assert asked == [("a cat", 1), ("a dog", 0)] and again.kept == 4
    for path, before in bytes_before.items():
        assert np.abs(np.asarray(Image.open(path)).astype(int) - _open(before)).max() <= 1


def _open(content):
    import io

    return np.asarray(Image.open(io.BytesIO(content))).astype(int)


def test_other_settings_are_refused_unless_overwritten(tmp_path, pipe):
    out = tmp_path / "out"
    generate_to(out, pipe, "a dog", **HOW)
    with pytest.raises(StoreError, match=r"made in another way: seed was 0, now 1.*--overwrite"):
        generate_to(out, pipe, "a dog", seed=1, **HOW)
    written = generate_to(out, pipe, "a dog", seed=1, **HOW, overwrite=True)
    assert read_made(written.paths[0])["seed"] == 1
    assert generate_to(out, pipe, "a dog", seed=1, **HOW, overwrite=True).kept == 1
    foreign = out / file_name("a cat", 0)
    Image.new("RGB", (4, 4)).save(foreign)
    with pytest.raises(StoreError, match="not made by comcat"):
        generate_to(out, pipe, "a cat", **HOW)


def test_a_blackened_picture_is_counted(tmp_path, pipe, monkeypatch):
    def flagging(self, image, device, dtype):
        return image, [True] * len(image)

    monkeypatch.setattr(type(pipe), "run_safety_checker", flagging)
    assert generate_to(tmp_path / "out", pipe, "a dog", count=2, **HOW).flagged == 2


def test_a_full_disk_leaves_no_half_picture(tmp_path, monkeypatch):
    path = tmp_path / "a.png"

    def full(self, *args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(StoreError, match="No space left"):
        save_picture(Image.new("RGB", (2, 2)), path, {"prompt": "x"})
    assert not list(tmp_path.iterdir())


def test_file_names():
    assert file_name("V* dog in Times Square!", 7).startswith("v-dog-in-times-square-")
    assert file_name("V* dog", 7).endswith("-0007.png")
    assert file_name("V* dog", 0) != file_name("v dog", 0)
    assert file_name("…", 0).startswith("picture-")


def test_read_made_of_strange_files(tmp_path):
    assert read_made(tmp_path / "absent.png") is None
    about = PngImagePlugin.PngInfo()
    about.add_text("comcat", "[1]")
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png", pnginfo=about)
    assert read_made(tmp_path / "a.png") is None


def test_prompt_files(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("# places\na dog\n\n  a dog on the moon \na dog\n", encoding="utf-8")
    assert read_prompts(file) == ["a dog", "a dog on the moon"]
    file.write_text("\n# nothing\n")
    with pytest.raises(DataError, match="holds no prompt"):
        read_prompts(file)
    with pytest.raises(DataError, match="cannot be read"):
        read_prompts(tmp_path / "absent.txt")


@pytest.mark.parametrize("settings", [{"count": 0}, {"steps": 0}, {"batch_size": 0}, {"size": -8}])
def test_settings(settings):
    with pytest.raises(SettingsError, match="expected a whole number from 1"):
        GenerateSettings(**settings)


def test_grid():
    red, green, blue = (Image.new("RGB", (4, 4), c) for c in ("red", "green", "blue"))
    sheet = grid([red, green, blue], columns=2, gap=1)
    assert sheet.size == (9, 9)
    assert [sheet.getpixel(p) for p in ((0, 0), (4, 0), (5, 0), (0, 5), (8, 8))] == [
        (255, 0, 0), (255, 255, 255), (0, 128, 0), (0, 0, 255), (255, 255, 255),
    ]  # fmt: skip


def test_page_escapes_and_loads_nothing():
    page = render_page(
        Page(
            title="<V*>", lead="a & b", tiles=[("rate", "9 %", "<b>")], notes=["1 < 2"], facts={"prompt": "<i>"},
            sheets=[Sheet("before", [Image.new("RGB", (8, 8))], ["<u>"])], tables=[("T", ["h"], [["<td>"]])],
        )
    )  # fmt: skip
    for text in ("&lt;V*&gt;", "a &amp; b", "&lt;b&gt;", "1 &lt; 2", "&lt;i&gt;", "&lt;u&gt;", "&lt;td&gt;"):
        assert text in page
    assert "<script" not in page and 'src="http' not in page and 'class="sharp"' in page


@pytest.mark.parametrize(
    ("family", "settings", "said"),
    [
        ("stable_diffusion", {"size": 7}, "size: got 7, expected a multiple of 8"),
        ("flux", {"size": 7}, "size: got 7, expected a multiple of"),
        ("stable_diffusion", {"steps": 100_000}, "got 100000 sampler steps, expected at most"),
        ("flux", {"negative": "a cat"}, "negative: this pipeline's guidance is built into the model"),
        ("stable_diffusion", {"guidance": float("nan")}, "got guidance=nan"),
        ("stable_diffusion", {"negative": "a cat", "guidance": 1}, "negative: at guidance 1 .* expected .* above 1"),
        ("stable_diffusion_xl", {"negative": "a cat", "guidance": 0.0}, "negative: at guidance 0 this pipeline does"),
    ],
)
def test_what_a_pipeline_cannot_do_is_said(family, settings, said, tmp_path):
    pipe = getattr(tiny, family)(tmp_path)
    with pytest.raises(SettingsError, match=said):
        list(generate(pipe, "a dog", **{**HOW, **settings}))


def test_a_prompt_that_is_no_unicode_is_said(pipe):
    for prompts in ("a \udcff dog", ["a dog", "a \udcff dog"]):
        with pytest.raises(SettingsError, match=r"prompts: got 'a \\udcff dog', whose character 3 is none of Unicode"):
            list(generate(pipe, prompts, **HOW))
    with pytest.raises(SettingsError, match=r"prompt: got .*none of Unicode"):
        customize(pipe, tiny.pictures(), prompt="a V* \udcff", steps=1)


def test_negative_prompts_are_read_above_the_guidance_that_is_told(pipe, tmp_path):
    """As the pipelines themselves have it; Z-Image guides at every scale above 0."""
    z_image = newer.NEWER["z_image"](tmp_path / "z_image")
    for one, least in ((pipe, 1.0), (z_image, 0.0)):
        how = {**HOW, "guidance": least + 0.5}
        with_one, without = (pixels(generate(one, "a dog", negative=n, **how)) for n in ("a red cat", None))
        assert any((with_one[of] != without[of]).any() for of in without)


def test_a_folder_that_cannot_be_written_to_is_said_before_any_picture(tmp_path, pipe, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(type(pipe), "__call__", lambda *_, **__: pytest.fail("generated"))
    with pytest.raises(StoreError, match="nothing can be written"):
        generate_to(tmp_path / "file", pipe, "a dog", **HOW)


def test_a_picture_of_nan_is_no_picture(tmp_path, pipe):
    pipe.vae.decoder.conv_out.bias.data[0] = float("nan")
    with pytest.raises(NumericsError, match=r"no picture of 'a dog': its VAE decodes to NaN"):
        generate_to(tmp_path / "out", pipe, ["a dog"], **HOW)
    pipe.unet.conv_out.bias.data[0] = float("nan")
    with pytest.raises(NumericsError, match="its denoiser makes NaN"):
        generate_to(tmp_path / "out", pipe, ["a dog"], **HOW)
    assert not list((tmp_path / "out").glob("*.png"))


def test_what_a_pipeline_raises_is_told(tmp_path: Path) -> None:
    """DPMSolverMultistep in one step: PixArt expects the solver of its one-step form there."""
    pipe = newer.pixart(tmp_path)
    with pytest.raises(ModelError, match=r"PixArtAlphaPipeline with DPMSolverM\w+ cannot generate in 1 step at"):
        list(generate(pipe, "a dog", steps=1))
    assert len(list(generate(pipe, "a dog", steps=2, size=16))) == 1
    pipe.transformer.forward = None
    with pytest.raises(ModelError, match=r"in 2 steps at 16 pixels: TypeError"):
        list(generate(pipe, "a dog", steps=2, size=16))


def test_prompts_from_a_text_editor_of_windows(tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbfV* dog\r\na cat\r\n")
    assert read_prompts(tmp_path / "prompts.txt") == ["V* dog", "a cat"]
