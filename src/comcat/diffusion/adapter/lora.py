"""An adapter as a LoRA: changes of low rank to the projections themselves, which other programs load.

The extra channels of Eq. 8 are no LoRA, but a pair of LoRAs on W_Q and W_K can make ``W_Q W_Kᵀ`` nearly what the term
adds to it, and a pair on W_V and W_O ``W_V W_O``. Nearly is meant for the tokens that come: both sides are weighed by
the Gram of what the projections read while a few prompts are drawn. How near it comes is measured on the denoiser.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..._version import __version__
from ...errors import ComcatError, SettingsError, UnsupportedSite, listed
from ...files import check_writable, home_path, parsed, write_tensors
from ...linalg import nearest_updates, root
from ...linalg.updates import Side
from ...modules.adapters import CONTEXT, LowRankTerms
from ...settings import expect_one_of
from ..pipeline.components import components_of
from ..pipeline.families import check_side, family_of
from .attach import unknown
from .files import is_adapter
from .fuse import not_plain, plain_linear
from .places import Place
from .records import Adapter, Record, adapters, check_unfused, located
from .trial import Trial, drawn

BOUND = 0.03
"""The largest relative difference of the denoiser's output that is written without being forced."""
Keys = Literal["diffusers", "kohya"]
_PRODUCTS = {"qk": ("q_up", "k_down"), "vo": ("v_down", "out_up")}
_SMALL = 1e-3  # of the mean: directions in which no token came are to change as little as need be


@dataclass(frozen=True)
class LoraReport:
    """What was written, and how near it is to the adapter.

    Attributes:
        errors: by ``<path>:qk`` and ``<path>:vo``, ‖what is missing of a term‖ / ‖the term‖ for the tokens that came;
            1 where nothing can stand for it, for the reason in ``left_out``.
        difference: ‖denoiser with LoRA − denoiser with adapter‖ / ‖denoiser with adapter‖. of_change: the same over
            what the adapter changes.
    """

    path: Path
    rank: int
    size_bytes: int
    errors: Mapping[str, float]
    left_out: Mapping[str, str]
    difference: float
    of_change: float

    def __str__(self) -> str:
        worst = max(self.errors, key=lambda site: self.errors[site])
        return (
            f"rank {self.rank}, {self.size_bytes / 1e3:.0f} kB: the denoiser's output differs by {self.difference:.1%} "
            f"from that with the adapter ({self.of_change:.1%} of what the adapter changes); least near is {worst}, "
            f"where {self.errors[worst]:.1%} of the term is missing"
        )


def export_lora(
    pipe: Any,
    path: str | os.PathLike[str],
    *,
    name: str = "default",
    rank: int = 16,
    prompts: str | Sequence[str] = (),
    keys: Keys = "diffusers",
    bound: float = BOUND,
    force: bool = False,
    dtype: torch.dtype = torch.float16,
    steps: int = 8,
    size: int | None = None,
    seed: int = 0,
) -> LoraReport:
    """Write an adapter at its scale as a LoRA. The pipeline stays as it is.

    Args:
        pipe: the pipeline that carries the adapter, and no other. path: a ``.safetensors`` file; what is there is
            replaced. rank: of each projection's change.
        prompts: what tokens come from, beside the adapter's own prompt and the empty one.
        keys: ``"diffusers"``, for ``load_lora_weights``; ``"kohya"``, for ComfyUI and Forge, of UNets alone.
        bound: the largest ``difference`` that is written. force: whatever it is, and whoever loads it.
        steps: of the sampler, for each prompt. size: of those pictures, in pixels; left out, that of the pictures that
            the adapter has learned from, or the pipeline's own where it does not say so.

    Raises:
        SettingsError: for settings that do not fit, an adapter with a token of its own, or a difference beyond the
            bound; it says how far it is. UnsupportedSite: if none of its terms can become LoRAs, or diffusers has no
            loader of LoRAs for the pipeline (unless forced). StoreError: if the file cannot be written.
    """
    adapter = _checked(pipe, name, path, rank, keys)
    if not force and not hasattr(pipe, "load_lora_weights"):
        raise UnsupportedSite(
            f"diffusers loads no LoRAs into a {type(pipe).__name__}; load the adapter itself there, or force it for "
            "another program"
        )
    places = list(located(components_of(pipe), adapter.record))
    left_out = {f"{p.path}:{one}": why for p in places for one in _PRODUCTS if (why := _why_not(p, one, adapter))}
    chosen = [(p, one) for p in places for one in adapter.terms[p.path].products if f"{p.path}:{one}" not in left_out]
    if not chosen:
        raise UnsupportedSite(f"{name!r} cannot become a LoRA: {listed([f'{s}: {w}' for s, w in left_out.items()])}")
    _check_rank(rank, [p for p, _ in chosen])
    prompts = [prompts] if isinstance(prompts, str) else prompts
    asked = list(dict.fromkeys([*(p for p in (adapter.record.prompt, *prompts) if p), ""]))
    size = _learned_at(pipe, adapter.record) if size is None else size
    trial = drawn(pipe, adapter, [p for p, _ in chosen], asked, steps=steps, size=size, seed=seed)
    errors = dict.fromkeys(left_out, 1.0)
    updates: dict[str, tuple[Tensor, Tensor]] = {}
    for place, product in chosen:
        found, errors[f"{place.path}:{product}"] = _update(place, adapter.terms[place.path], product, rank, trial)
        updates |= {f"{place.path}.{at}": update for at, update in found.items()}
    again = drawn(pipe, adapter, [p for p, _ in chosen], asked, steps=steps, size=size, seed=seed + len(asked))
    difference, of_change = again.difference(updates)  # in other noise than the Grams are of
    if difference > bound and not force:
        raise SettingsError(
            f"a LoRA of rank {rank} differs from {name!r} by {difference:.1%} of the denoiser's output, expected at "
            f"most {bound:.1%}: try a higher rank, or force it{_what_lacks(left_out)}"
        )
    path = home_path(path)
    tensors = _tensors(updates, keys, dtype)
    about = {"comcat_version": __version__, "format": "pt", "identifier": adapter.record.identifier or ""}
    write_tensors(path, tensors, about)
    return LoraReport(path, rank, path.stat().st_size, errors, left_out, difference, of_change)


def _what_lacks(left_out: Mapping[str, str]) -> str:
    return f". Left out were {listed([f'{site} ({why})' for site, why in left_out.items()])}" if left_out else ""


def _learned_at(pipe: Any, record: Record) -> int | None:
    """The side, in pixels, of the pictures that an adapter has learned from, or None where it is not known."""
    try:
        side = parsed(record.metadata["settings"])["resolution"]
        check_side("resolution", int(side), family_of(pipe))
    except (LookupError, TypeError, ValueError, ComcatError):  # made by hand, damaged, or at the pipeline's own
        return None
    return int(side)


def _checked(pipe: Any, name: str, path: str | os.PathLike[str], rank: int, keys: str) -> Adapter:
    expect_one_of("keys", keys, get_args(Keys))
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise SettingsError(f"got rank {rank!r}, expected a whole number from 1")
    if Path(path).suffix != ".safetensors":
        raise SettingsError(f"got {str(path)!r}, expected a file name that ends in .safetensors")
    if is_adapter(home_path(path)):
        raise SettingsError(f"{str(path)!r} is an adapter, which the LoRA would replace; name another file")
    check_writable(home_path(path).parent)
    held = adapters(pipe)
    if name not in held:
        raise SettingsError(unknown(name, held))
    if len(held) > 1:
        others = ", ".join(repr(other) for other in held if other != name)
        raise SettingsError(f"{others} would be measured as well: unload the other adapters first")
    check_unfused(pipe)
    if held[name].record.token_embeddings:
        raise SettingsError(
            f"adapter {name!r} has a token of its own, which no key of a LoRA can hold; teach one without new_token"
        )
    if keys == "kohya" and any(not path.startswith("unet.") for path in held[name].terms):
        raise SettingsError("keys='kohya' are for UNets alone; keys='diffusers' fit every family")
    return held[name]


def _check_rank(rank: int, places: Sequence[Place]) -> None:
    """Raises SettingsError for more than the rank of any projection, which would cost memory and time for nothing."""
    linears: list[Any] = [plain_linear(module) for place in places for module in place.projections().values()]
    most = max(min(linear.in_features, linear.out_features) for linear in linears)
    if rank > most:
        raise SettingsError(f"got rank {rank}, expected at most {most}, the rank of the largest projection")


def _why_not(place: Place, product: str, adapter: Adapter) -> str | None:
    """Why a term at a place cannot become a pair of LoRAs, None if it can or there is none."""
    if product not in adapter.terms[place.path].products:
        return None
    paths = place.host.projections(place.attention)
    if len(set(paths.values())) < len(paths):
        return "its projections are one layer with the MLP's"
    if (reason := not_plain(place)) is not None:
        return reason
    if product == "qk" and (between := place.host.between(place.attention)) is not None:
        return f"{between} between W_Q and W_K, which have no product"
    query, key = (plain_linear(place.projections()[paths[f]]) for f in ("q_up", "k_down"))
    assert query is not None and key is not None, "not_plain has seen to it"
    return "several heads share its keys" if key.out_features != query.out_features else None


def _update(
    place: Place, terms: LowRankTerms, product: str, rank: int, trial: Trial
) -> tuple[dict[str, tuple[Tensor, Tensor]], float]:
    """A and B, (in, rank) and (rank, out), of each projection of a product by its path, and what is missing."""
    paths = place.host.projections(place.attention)
    first, second = _PRODUCTS[product]
    left, inputs = _side(place, terms, first, trial)
    right, outputs = _side(place, terms, second, trial)
    one, other, error = nearest_updates(left, right, rank)
    found = {paths[factor]: update for factor, update in zip(inputs, one, strict=True)}
    for factor, (a, b) in zip(outputs, other, strict=True):
        found[paths[factor]] = (b.mT, a.mT) if factor.endswith("out_up") else (a, b)
    return found, error


def _side(place: Place, terms: LowRankTerms, factor: str, trial: Trial) -> tuple[Side, list[str]]:
    """One side of a product in coordinates whitened by the tokens that came, and the factors of its streams."""
    paths = place.host.projections(place.attention)
    factors = [p + factor for p in ("", CONTEXT) if p + factor in paths]
    strength = terms.strength if factor in ("q_up", "v_down") else 1.0
    own, term, roots = [], [], []
    for one in factors:
        linear: Any = plain_linear(place.projections()[paths[one]])
        weight = linear.weight.detach().double().cpu()
        extra = getattr(terms, one, None)
        extra = None if extra is None else extra.detach().double().cpu() * strength
        if factor == "out_up":
            rows = weight.unflatten(1, (terms.heads, -1)).transpose(0, 1)  # (heads, out, width)
            more = None if extra is None else extra.unflatten(1, (terms.heads, -1)).transpose(0, 1)
            whiten = torch.eye(weight.shape[0], dtype=torch.float64)
        else:
            bias = weight.new_zeros(len(weight)) if linear.bias is None else linear.bias.detach().double().cpu()
            rows = (
                torch.cat([weight, bias[:, None]], dim=1).unflatten(0, (terms.heads, -1)).mT
            )  # (heads, in + 1, width)
            more = None if extra is None else extra.unflatten(0, (terms.heads, -1)).mT
            more = None if more is None else torch.cat([more, more.new_zeros(terms.heads, 1, more.shape[-1])], dim=1)
            gram = trial.gram(f"{place.path}.{paths[one]}", centred=factor == "k_down" and len(factors) == 1)
            whiten = root(gram, ridge=_SMALL)[0].mT
        own.append(whiten @ rows)
        term.append(whiten @ (rows.new_zeros(*rows.shape[:2], terms.rank) if more is None else more))
        roots.append(whiten if factor == "out_up" else whiten[:, :-1])
    counts = [len(r) for r in roots]
    blocks = []
    for number, block in enumerate(roots):
        above, below = sum(counts[:number]), sum(counts[number + 1 :])
        blocks.append(torch.nn.functional.pad(block, (0, 0, above, below)))
    return Side(torch.cat(own, dim=1), torch.cat(term, dim=1), tuple(blocks)), factors


def _tensors(updates: Mapping[str, tuple[Tensor, Tensor]], keys: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The file's tensors: ``lora_A`` (rank, in) and ``lora_B`` (out, rank), or kohya's names of them."""
    tensors: dict[str, Tensor] = {}
    for path, (a, b) in updates.items():
        balance = (b.norm() / a.norm().clamp_min(1e-30)).sqrt() if a.norm() > 0 else torch.tensor(1.0)
        down, up = (a * balance).mT.to(dtype).contiguous(), (b / balance.clamp_min(1e-30)).mT.to(dtype).contiguous()
        if keys == "diffusers":
            tensors |= {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}
        else:
            stem = "lora_unet_" + path.removeprefix("unet.").replace(".", "_")
            tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
            tensors[f"{stem}.alpha"] = torch.tensor(float(len(down)))
    return tensors
