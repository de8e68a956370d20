"""Ways to teach a UNet a concept, ours and others', behind one interface: what each trains, what it stores, how it
regularises.

Custom Diffusion (Kumari et al. 2023): keys and values of cross-attention, and the embedding of V*. DreamBooth (Ruiz et
al. 2023): every weight of the UNet. LoRA (Hu et al. 2022) and LoKr (Yeh et al. 2024): PEFT's own modules on the
attention's projections. All of them train in the same loop (:class:`comcat.diffusion.learn.optimisation.Optimisation`),
so that what is timed is the method.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

import comcat.diffusion as diffusion
from comcat.diffusion.learn.batches import CachedSource, Stream
from comcat.diffusion.learn.latents import Rotation, encode, encode_pixels, frames
from comcat.diffusion.learn.optimisation import Batch, Optimisation
from comcat.diffusion.learn.protection import Protection, drawn_prompts, tokens_of
from comcat.diffusion.learn.token import reading_row
from comcat.diffusion.pipeline.families import Family
from comcat.measure.memory import LiveBytes
from comcat.runs.watching import LossWatch

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


@dataclass
class Method:
    """One method, set up in a pipeline whose own parameters are frozen.

    Attributes:
        trained: parameters by name, which is also what the method stores. live_text: whether the text encoder takes
            part in every step.
        regularised: whether it comes with prior preservation as published. constrain: see ``Optimisation``.
        caption_dropout: share of the concept's pictures under the empty prompt.
        undo: closed, the pipeline is as before, but for what was trained in place.
    """

    trained: dict[str, nn.Parameter]
    live_text: bool = False
    regularised: bool = False
    constrain: Callable[[], None] = lambda: None
    caption_dropout: float = 0.0
    undo: ExitStack = field(default_factory=ExitStack)

    def stored_bytes(self, folder: Path) -> int:
        """Size of a safetensors file with all that it trains, in float16."""
        from safetensors.torch import save_file

        path = folder / "stored.safetensors"
        save_file({k: p.detach().to("cpu", torch.float16).contiguous() for k, p in self.trained.items()}, path)
        size = path.stat().st_size
        path.unlink()
        return size


def comcat_cross(
    family: Family, seed: int, where: Any = "cross", protect: Sequence[str] = (), token: str | None = None,
    dropout: float = 0.0, adapter: str = "default", words: Sequence[str] = (), prompt: str = "", **_: Any,
) -> Method:  # fmt: skip
    """Eq. 8 at rank 2; with ``token``, its embedding as well. The empty prompt is protected like the others, unless
    pictures are shown under it.
    """
    attached = diffusion.attach(family.pipe, rank=2, where=where, seed=seed, name=adapter)
    constrain: Callable[[], None] = lambda: None  # noqa: E731
    if protect or words:
        own = tokens_of(family, [prompt]) if words else None
        constrain = Protection(family, attached, protect, words=words, own=own, dropout=dropout).apply
    undo = ExitStack()
    undo.callback(diffusion.unload, family.pipe, adapter)
    trained = attached.named_parameters() | _embedding(family, token, undo)
    return Method(trained, live_text=token is not None, constrain=constrain, undo=undo, caption_dropout=dropout)


def comcat_all(family: Family, seed: int, **_: Any) -> Method:
    return comcat_cross(family, seed, where="all")


def comcat_protected(
    family: Family, seed: int, protect: Sequence[str] = (), adapter: str = "default", **_: Any
) -> Method:
    return comcat_cross(family, seed, protect=protect, adapter=adapter)


def comcat_words(
    family: Family, seed: int, prompt: str = "a photo of V*", token: str | None = None, dropout: float = 0.0,
    adapter: str = "default", **_: Any,
) -> Method:  # fmt: skip
    """Protected are prompts that nobody names: see :func:`drawn_prompts`."""
    words = drawn_prompts(family.pipe.tokenizer, prompt, token or "V*", 200, seed)
    return comcat_cross(family, seed, words=words, prompt=prompt, token=token, dropout=dropout, adapter=adapter)


def comcat_plain(family: Family, seed: int, adapter: str = "default", **_: Any) -> Method:
    return comcat_cross(family, seed, adapter=adapter)


def custom_diffusion(family: Family, seed: int, token: str | None = None, **_: Any) -> Method:
    """Keys and values of cross-attention; with ``token``, its embedding as well, as published."""
    trained = {
        f"unet.{name}": p
        for name, p in family.denoiser.named_parameters()
        if ".attn2.to_k." in name or ".attn2.to_v." in name
    }
    undo = ExitStack()
    trained |= _embedding(family, token, undo)
    return Method(_asking(trained), live_text=token is not None, regularised=True, undo=undo)


def _embedding(family: Family, token: str | None, undo: ExitStack) -> dict[str, nn.Parameter]:
    """A token's row of each text encoder's embedding, to be learned; nothing without a token."""
    rows: dict[str, nn.Parameter] = {}
    if token is not None:
        for component, (tokenizer, encoder) in family.text_encoders().items():
            number = tokenizer.convert_tokens_to_ids(token)
            row = nn.Parameter(encoder.get_input_embeddings().weight[number].detach().clone())
            undo.callback(encoder.get_input_embeddings().register_forward_hook(reading_row(row, number)).remove)
            rows[f"{component}.{token}"] = row
    return rows


def dreambooth(family: Family, seed: int, **_: Any) -> Method:
    """Every weight of the UNet."""
    return Method(_asking({f"unet.{n}": p for n, p in family.denoiser.named_parameters()}), regularised=True)


def lora(
    family: Family, seed: int, rank: int = 4, modules: list[str] | str = ATTENTION, adapter: str = "default", **_: Any
) -> Method:  # fmt: skip
    from peft import LoraConfig

    settings = {"r": rank, "lora_alpha": rank, "init_lora_weights": "gaussian", "target_modules": modules}
    return _peft(family, seed, LoraConfig(**settings), "lora_", adapter)


def lokr(
    family: Family, seed: int, rank: int = 4, factor: int = -1, adapter: str = "default", **_: Any
) -> Method:  # fmt: skip
    """``factor``: side of the smaller matrix of each product; −1: as square as may be."""
    from peft import LoKrConfig

    config = LoKrConfig(r=rank, alpha=rank, target_modules=ATTENTION, decompose_factor=factor)
    return _peft(family, seed, config, "lokr_", adapter)


def _peft(family: Family, seed: int, config: Any, mark: str, adapter: str) -> Method:
    """PEFT's adapter of a name, beside those that are there: all act, the new one is trained."""
    denoiser: Any = family.denoiser
    torch.manual_seed(seed)
    denoiser.add_adapter(config, adapter)
    denoiser.set_adapters(list(denoiser.peft_config))
    own = {f"unet.{n}": p for n, p in denoiser.named_parameters() if mark in n and adapter in n.split(".")}
    method = Method(_asking(own))
    method.undo.callback(denoiser.unload_lora)
    return method


def equal_rank(denoiser: torch.nn.Module, modules: list[str] | str, size: int) -> int:
    """The LoRA rank whose parameters come closest to ``size``."""
    per_rank = 0
    for name, module in denoiser.named_modules():
        chosen = re.fullmatch(modules, name) if isinstance(modules, str) else any(name.endswith(m) for m in modules)
        if chosen and isinstance(module, torch.nn.Linear):
            per_rank += module.in_features + module.out_features
    return max(1, round(size / per_rank))


METHODS: dict[str, Callable[..., Method]] = {
    "comcat": comcat_plain,
    "comcat, all attention": comcat_all,
    "comcat, protected": comcat_protected,
    "comcat, protected, new token": comcat_cross,
    "comcat, protected, new token, dropout 0.05": partial(comcat_cross, dropout=0.05),
    "comcat, protected, new token, dropout 0.1": partial(comcat_cross, dropout=0.1),
    "comcat, words protected, new token, dropout 0.05": partial(comcat_words, dropout=0.05),
    "Custom Diffusion": custom_diffusion,
    "DreamBooth": dreambooth,
    "LoRA": lora,
    "LoKr": lokr,
}
WITH_TOKEN = tuple(name for name in METHODS if "new token" in name)
"""Methods that are another one where no token is learned."""


def _asking(trained: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return trained


@dataclass(frozen=True)
class Kind:
    """Pictures under one prompt, with their share of a step, the weight of their loss, and the share of them under the
    empty prompt.
    """

    images: list[Image.Image]
    prompt: str
    count: int
    weight: float
    dropout: float = 0.0


def cached_source(family: Family, kinds: Sequence[Kind], side: int, seed: int, *, live_text: bool) -> CachedSource:
    """As comcat trains: latents once, prompts once."""
    streams = []
    for number, kind in enumerate(kinds):
        latents = encode(family, kind.images, side, crops=1, flip=False, seed=seed)
        rotation = Rotation(latents.frames_of, seed, str(number))
        streams.append(Stream(latents, rotation, [kind.prompt], kind.count, kind.weight, kind.dropout))
    return CachedSource(family, streams, live=live_text)


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
        conditions = self.family.encode(prompts) | framing
        return Batch(latents, conditions, torch.tensor(weights), mean.new_ones(len(mean), 1, 1, 1))


def peak_of_step(run: Optimisation, family: Family, *, encoding: bool, live_text: bool) -> int:
    """The most bytes that one more step needs at once, with all that must be held for it: weights, moments, latents."""
    pipe = family.pipe
    needed = [
        family.denoiser,
        *([pipe.vae] if encoding else []),
        *([pipe.text_encoder] if encoding or live_text else []),
    ]
    held = [p for module in needed for p in module.parameters()]
    held += [
        value for state in run.optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)
    ]
    for stream in getattr(run.source, "streams", []):
        held += [stream.latents.mean, stream.latents.std]
    run.optimizer.zero_grad(set_to_none=True)
    kept = {name: p.detach().clone() for name, p in run.parameters.items()}
    with LiveBytes(held) as memory:
        run.step(run.progress.step - 1, LossWatch())
    run.optimizer.zero_grad(set_to_none=True)
    with torch.no_grad():
        for name, p in run.parameters.items():
            p.copy_(kept[name])
    return memory.peak
