"""Ways to teach a UNet a concept, ours and others', behind one interface: what each trains, what it stores, how it regularises.

Custom Diffusion (Kumari et al. 2023): keys and values of cross-attention, and the embedding of V*. DreamBooth (Ruiz et al. 2023): every weight of
the UNet. LoRA (Hu et al. 2022) and LoKr (Yeh et al. 2024): PEFT's own modules on the attention's projections. All of them train in the same loop
(:class:`comcat.diffusion.optimising.Optimisation`), so that what is timed is the method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

import comcat.diffusion as diffusion
from comcat.diffusion.families import Family
from comcat.diffusion.learning import reading_row
from comcat.diffusion.optimising import Batch
from comcat.diffusion.preparing import Rotation, encode, encode_pixels, frames
from comcat.diffusion.protecting import Protection
from comcat.diffusion.sources import CachedSource, Stream, Texts

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


@dataclass
class Method:
    """One method, set up in a pipeline whose own parameters are frozen.

    Attributes:
        trained: parameters by name, which is also what the method stores. live_text: whether the text encoder takes part in every step.
        regularised: whether it comes with prior preservation as published. constrain: see ``Optimisation``.
    """

    trained: dict[str, nn.Parameter]
    live_text: bool = False
    regularised: bool = False
    constrain: Callable[[], None] = lambda: None
    undo: ExitStack = field(default_factory=ExitStack)

    def stored_bytes(self, folder: Path) -> int:
        """Size of a safetensors file with all that it trains, in float16."""
        from safetensors.torch import save_file

        path = folder / "stored.safetensors"
        save_file({k: p.detach().to("cpu", torch.float16).contiguous() for k, p in self.trained.items()}, path)
        size = path.stat().st_size
        path.unlink()
        return size


def comcat_cross(family: Family, seed: int, **_: Any) -> Method:
    adapter = diffusion.attach(family.pipe, rank=2, where="cross", seed=seed)
    return Method(adapter.named_parameters())


def comcat_all(family: Family, seed: int, **_: Any) -> Method:
    adapter = diffusion.attach(family.pipe, rank=2, where="all", seed=seed)
    return Method(adapter.named_parameters())


def comcat_protected(family: Family, seed: int, protect: Sequence[str] = (), **_: Any) -> Method:
    adapter = diffusion.attach(family.pipe, rank=2, where="cross", seed=seed)
    return Method(adapter.named_parameters(), constrain=Protection(family, adapter, protect).apply)


def custom_diffusion(family: Family, seed: int, token: str | None = None, **_: Any) -> Method:
    """Keys and values of cross-attention; with ``token``, its embedding as well, as published."""
    trained = {
        f"unet.{name}": p
        for name, p in family.denoiser.named_parameters()
        if ".attn2.to_k." in name or ".attn2.to_v." in name
    }
    undo = ExitStack()
    if token is not None:
        for component, (tokenizer, encoder) in family.text_encoders().items():
            number = tokenizer.convert_tokens_to_ids(token)
            row = nn.Parameter(encoder.get_input_embeddings().weight[number].detach().clone())
            undo.callback(encoder.get_input_embeddings().register_forward_hook(reading_row(row, number)).remove)
            trained[f"{component}.{token}"] = row
    return Method(_asking(trained), live_text=token is not None, regularised=True, undo=undo)


def dreambooth(family: Family, seed: int, **_: Any) -> Method:
    return Method(_asking({f"unet.{n}": p for n, p in family.denoiser.named_parameters()}), regularised=True)


def lora(family: Family, seed: int, rank: int = 4, **_: Any) -> Method:
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=ATTENTION)
    inject_adapter_in_model(config, family.denoiser)
    return Method(_of_peft(family, "lora_"))


def lokr(family: Family, seed: int, rank: int = 4, **_: Any) -> Method:
    from peft import LoKrConfig, inject_adapter_in_model

    torch.manual_seed(seed)
    inject_adapter_in_model(LoKrConfig(r=rank, alpha=rank, target_modules=ATTENTION), family.denoiser)
    return Method(_of_peft(family, "lokr_"))


METHODS: dict[str, Callable[..., Method]] = {
    "comcat": comcat_cross,
    "comcat, all attention": comcat_all,
    "comcat, protected": comcat_protected,
    "Custom Diffusion": custom_diffusion,
    "DreamBooth": dreambooth,
    "LoRA": lora,
    "LoKr": lokr,
}


def _asking(trained: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return trained


def _of_peft(family: Family, mark: str) -> dict[str, nn.Parameter]:
    return _asking({f"unet.{n}": p for n, p in family.denoiser.named_parameters() if mark in n})


@dataclass(frozen=True)
class Kind:
    """Pictures under one prompt, with their share of a step and the weight of their loss."""

    images: list[Image.Image]
    prompt: str
    count: int
    weight: float


def cached_source(family: Family, kinds: Sequence[Kind], side: int, seed: int, *, live_text: bool) -> CachedSource:
    """As comcat trains: latents once, prompts once."""
    streams = []
    for number, kind in enumerate(kinds):
        latents = encode(family, kind.images, side, crops=1, flip=False, seed=seed)
        rotation = Rotation(latents.frames_of, seed, str(number))
        streams.append(Stream(latents, rotation, kind.count, kind.weight))
    return CachedSource(streams, Texts(family, [k.prompt for k in kinds], live=live_text))


class EncodingSource:
    """As the published scripts train: every step encodes its pictures and its prompts anew."""

    def __init__(self, family: Family, kinds: Sequence[Kind], side: int, seed: int) -> None:
        self.family, self.kinds, self.side = family, list(kinds), side
        self.rotations = [Rotation([[i] for i in range(len(k.images))], seed, str(n)) for n, k in enumerate(kinds)]

    def __call__(self, step: int, generator: torch.Generator) -> Batch:
        pixels: list[Tensor] = []
        prompts: list[str] = []
        weights: list[float] = []
        framings: list[dict[str, Tensor]] = []
        for kind, rotation in zip(self.kinds, self.rotations, strict=True):
            for place in range(step * kind.count, (step + 1) * kind.count):
                image = kind.images[rotation.frame(place, generator)]
                frame = next(iter(frames(image, self.side, crops=1, flip=False, seed=0)))
                pixels.append(frame.pixels)
                framings.append(self.family.framing(frame.size, frame.corner, self.side))
            prompts += [kind.prompt] * kind.count
            weights += [kind.weight / kind.count] * kind.count
        mean, std = encode_pixels(self.family, torch.stack(pixels))
        latents = mean + std * torch.randn(mean.shape, generator=generator).to(mean)
        framing = {k: torch.cat([f[k] for f in framings]).to(mean.device) for k in framings[0]}
        return Batch(latents, self.family.encode(prompts) | framing, torch.tensor(weights))
