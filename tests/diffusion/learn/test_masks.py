"""A concept learned where its masks say that it is, and masks that do not fit refused before the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

import comcat.diffusion as cd
from comcat.diffusion.learn.latents import encode, frames
from comcat.diffusion.learn.optimisation import Batch, Optimisation
from comcat.diffusion.learn.settings import CustomizeSettings
from comcat.diffusion.pipeline.families import family_of
from comcat.diffusion.pipeline.noising import noising_of
from comcat.errors import DataError, StoreError
from comcat.runs.processes import Processes

from .. import tiny

PROMPT = "a photo of V* dog"
QUICK: dict[str, Any] = {"steps": 2, "resolution": 16, "lr": 0.05}
SIZES = ((24, 16), (16, 16))


@pytest.fixture
def pipe(tmp_path: Path) -> Any:
    return tiny.stable_diffusion(tmp_path / "parts")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "dog"
    folder.mkdir()
    for number, size in enumerate(SIZES):
        tiny.pictures(number + 1, size)[number].save(folder / f"{number}.png")
    return folder


def mask(size: tuple[int, int], *white: int) -> Image.Image:
    made = Image.new("L", size, 0)
    if white:
        ImageDraw.Draw(made).rectangle(white, fill=255)
    return made


def folder_of(masks: dict[str, Image.Image], folder: Path) -> str:
    folder.mkdir()
    for name, image in masks.items():
        image.save(folder / name)
    return str(folder)


def weights(adapter: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in adapter.parameters()])


def learned(pipe: Any, source: Any, masks: str | None, **settings: Any) -> torch.Tensor:
    adapter = cd.customize(pipe, source, prompt=PROMPT, masks=masks, **{**QUICK, **settings})
    found = torch.cat([p.detach().flatten() for p in adapter.parameters()])
    cd.unload(pipe)
    return found


def halves() -> dict[str, Image.Image]:
    """White on the left half."""
    return {f"{n}.png": mask(size, 0, 0, size[0] // 2 - 1, size[1]) for n, size in enumerate(SIZES)}


def test_errors_count_where_the_mask_is_white(pipe: Any) -> None:
    family = family_of(pipe)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    family.predict = lambda noisy, times, conditions: torch.zeros_like(noisy)  # type: ignore[method-assign]
    latents = encode(family, tiny.pictures(1, (16, 16)), 16, crops=1, flip=False, seed=0, masks=[halves()["1.png"]])
    assert latents.masks.shape == (1, 1, 8, 8) and latents.masks.unique().tolist() == [0, 2]
    batch = Batch(latents.mean, family.encode([PROMPT]), torch.ones(1), latents.masks)
    run = Optimisation(
        family, noising_of(pipe.scheduler), {"one": torch.nn.Parameter(torch.zeros(1))}, lambda step, generator: batch,
        CustomizeSettings(), Processes(cpu=True),
    )  # fmt: skip
    run.noising = Known(noise)  # type: ignore[assignment]
    torch.testing.assert_close(run.loss(0), noise[..., :4].square().mean())


class Known:
    """A target that is told."""

    def __init__(self, target: torch.Tensor) -> None:
        self.known = target

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        return torch.zeros(count)

    def mix(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        return latents

    def target(self, latents: torch.Tensor, noise: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
        return self.known

    def weight(self, times: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(times)


def test_white_masks_change_nothing_and_others_do(pipe: Any, images: Path, tmp_path: Path) -> None:
    white = folder_of({f"{n}.png": Image.new("L", size, 255) for n, size in enumerate(SIZES)}, tmp_path / "white")
    left = folder_of(halves(), tmp_path / "left")
    plain = learned(pipe, images, None)
    assert plain.equal(learned(pipe, images, white)) and not torch.allclose(plain, learned(pipe, images, left))
    unnamed = [Image.open(p).convert("RGB") for p in sorted(images.iterdir())]
    assert learned(pipe, unnamed, left).equal(learned(pipe, images, left))  # masks come in the order of their names


def test_masks_are_cut_and_mirrored_with_their_pictures_and_empty_crops_are_left_out(pipe: Any) -> None:
    size = (64, 16)
    marked = mask(size, 0, 0, 9, 15)
    both = encode(
        family_of(pipe), [marked.convert("RGB")], 16, crops=16, flip=True, seed=0, masks=[marked]
    )  # fmt: skip
    every = encode(family_of(pipe), [marked.convert("RGB")], 16, crops=16, flip=True, seed=0)
    assert 0 < len(both.mean) < len(every.mean) and len(both.mean) % 2 == 0
    assert both.masks[0].flip(-1).equal(both.masks[1])
    for frame in frames(marked.convert("RGB"), 16, crops=16, flip=True, seed=0, mask=marked):
        assert frame.mask is not None and torch.equal(frame.mask > 0.5, frame.pixels[:1] > 0)


WRONG: dict[str, tuple[dict[str, Image.Image], str]] = {
    "missing": (
        {"0.png": mask(SIZES[0], 0, 0, 9, 9)},
        r"has no mask for 1\.png; expected one of the same name, 1\.png",
    ),
    "of another size": (
        halves() | {"1.png": mask((8, 16), 0, 0, 9, 9)},
        r"mask of 1\.png has 8×16 pixels, expected 16×16",
    ),
    "black": (halves() | {"0.png": mask(SIZES[0])}, r"the mask of 0\.png is black all over"),
}


@pytest.mark.parametrize("which", list(WRONG))
def test_masks_that_do_not_fit_are_refused_before_the_work(which: str, pipe: Any, images: Path, tmp_path: Path) -> None:
    masks, said = WRONG[which]
    pipe.vae.encode = pipe.unet.forward = None  # any work would fail otherwise
    with pytest.raises(DataError, match=said):
        learned(pipe, images, folder_of(masks, tmp_path / "masks"))
    assert cd.adapters(pipe) == {}


def test_masks_in_number_damaged_or_beside_every_crop(pipe: Any, images: Path, tmp_path: Path) -> None:
    one = folder_of({"0.png": mask((20, 16), 0, 0, 9, 9)}, tmp_path / "one")
    with pytest.raises(DataError, match="got 1 mask for 3 pictures, expected one for each"):
        learned(pipe, tiny.pictures(3), one)
    with pytest.raises(DataError, match="nope"):
        learned(pipe, images, str(tmp_path / "nope"))
    (tmp_path / "one" / "1.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"1 mask cannot be read: 1\.png"):
        learned(pipe, images, one)
    wide = folder_of({"wide.png": mask((64, 16), 0, 0, 3, 15)}, tmp_path / "wide")
    (tmp_path / "long").mkdir()
    tiny.pictures(1, (64, 16))[0].save(tmp_path / "long/wide.png")
    with pytest.raises(DataError, match=r"no crop of wide\.png has anything that its mask shows: raise crops"):
        learned(pipe, tmp_path / "long", wide, crops=1)


def test_a_run_goes_on_with_the_masks_that_it_began_with(pipe: Any, images: Path, tmp_path: Path) -> None:
    left = folder_of(halves(), tmp_path / "left")
    learned(pipe, images, left, out=tmp_path / "dog.safetensors")
    (tmp_path / "left").rename(tmp_path / "moved")
    learned(pipe, images, str(tmp_path / "moved"), out=tmp_path / "dog.safetensors")
    with pytest.raises(StoreError, match="masks"):
        learned(pipe, images, None, out=tmp_path / "dog.safetensors")
