"""Importing the checkpoints of COMCAT's published code (Xiao et al. 2023).

Its modules hold ``w_qs``, ``w_ks``, ``w_vs`` and ``proj`` of a low-rank attention, heads side by side, and
``first_factor`` and ``last_factor`` of a low-rank linear layer, both under ``selected_rank_layer``. Their biases may
have been trained, and none of them is lost here: the key bias is constant along keys and drops out of softmax, the
value bias moves to the output bias (attention rows sum to one), a bias between two factors moves to the one behind
them. The scale is 1/√k of the original heads.
"""

from __future__ import annotations

import argparse
import copy
import os
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..apply import apply_
from ..errors import PlanError, StoreError, UnknownSite, UnsupportedSite, counted, listed
from ..files import home_path
from ..hosts import find_sites
from ..models import class_names_of, load_model, origin_of, preprocess_of
from ..models.failures import first_line
from ..modules.lowrank import LowRankAttention, LowRankLinear
from ..plan import Plan, SitePlan
from ..record import Record
from ..sites import Attention, ProductSite, Sites
from .rebuilding import fill

_LAYER = "selected_rank_layer"
_DENSE = ("w_qs", "w_ks", "w_vs")


def import_paper(
    checkpoint: str | os.PathLike[str],
    ranks: str | os.PathLike[str] | None = None,
    base: str | nn.Module = "timm:deit_small_patch16_224",
) -> nn.Module:
    """The model in a checkpoint of the paper's published code, ready for :func:`comcat.save`.

    Args:
        checkpoint: its ``checkpoint.pth``, weights under ``"model"`` or at the top; no code in it is run.
        ranks: its ``ranks.txt``: numbers separated by commas, in each block of QK, VO (both summed over heads), fc1 and
            fc2, then of the head. Ranks are read off the weights; the file, if given, is compared with them.
        base: the architecture before compression, a ViT or DeiT of timm by name or as a model, which stays as it is.

    Returns:
        The model in eval mode, with ``comcat_record``.

    Raises:
        StoreError: if a file is missing, damaged or holds more than tensors and plain data, or does not fit the
            architecture or the ranks.
        ModelError: if there is no such architecture.
    """
    state = _read_checkpoint(home_path(checkpoint))
    if isinstance(base, nn.Module):
        model: Any = copy.deepcopy(base)
    else:
        model = load_model(base, pretrained=False, **_classes(state))
    origin = origin_of(model)
    if not hasattr(model, "blocks"):
        raise StoreError(f"base is a {type(model).__name__}, expected a ViT or DeiT of timm, which has blocks")
    sites = find_sites(model)
    reading = _Reading(model, sites, state)
    plan = reading.plan()
    if ranks is not None:
        _compare_ranks(_read_ranks(home_path(ranks)), reading)
    try:
        apply_(model, plan, sites=sites, weights=False)
    except (PlanError, UnknownSite, UnsupportedSite) as error:
        raise StoreError(f"the checkpoint does not fit {origin.name}: {error}") from error
    tensors = reading.tensors()
    if left := reading.unread():
        raise StoreError(
            f"the checkpoint holds what {origin.name} has no place for: {listed(left)}; is base the right architecture?"
        )
    try:
        fill(model, tensors)
    except StoreError as error:
        raise StoreError(
            f"the checkpoint does not fit {origin.name}: {error}; is base the right architecture?"
        ) from None
    names = class_names_of(model)
    model.comcat_record = Record(
        plan=plan, origin=origin.to_dict(), preprocess=preprocess_of(model).to_dict(), class_names=names
    )
    return model.eval()


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise StoreError(f"there is no checkpoint {str(path)!r}, expected the paper's checkpoint.pth")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what is damaged can fail anywhere
        refused = isinstance(error, pickle.UnpicklingError) and re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise StoreError(
                f"{path} is refused: it holds {refused[1]}, and only tensors and plain data are read, "
                "since anything else could run code"
            ) from error
        reason = "no tensors can be read from it" if isinstance(error, pickle.UnpicklingError) else first_line(error)
        raise StoreError(f"{path} is damaged or no checkpoint of torch: {reason}") from error
    state = content.get("model", content) if isinstance(content, Mapping) else content
    if (
        not isinstance(state, Mapping)
        or not state
        or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    ):
        raise StoreError(
            f"{path} holds no weights: expected tensors by name, under 'model' or at the top, got {_kinds(content)}"
        )
    if all(name.startswith("module.") for name in state):  # saved from inside data parallelism
        state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    if not any(f".{_LAYER}." in name for name in state):
        raise StoreError(
            f"{path} is no checkpoint of COMCAT's published code: none of its {len(state)} names holds {_LAYER!r}"
        )
    return dict(state)


def _kinds(content: Any) -> str:
    if isinstance(content, Mapping):
        return ", ".join(f"{k!r} ({type(v).__name__})" for k, v in list(content.items())[:6]) or "nothing"
    return f"a {type(content).__name__}"


def _classes(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The number of classes, read off the head."""
    for name in ("head.weight", f"head.{_LAYER}.last_factor.weight"):
        if name in state and state[name].ndim == 2:
            return {"num_classes": len(state[name])}
    return {}


def _read_ranks(path: Path) -> list[int]:
    try:
        text = path.read_text(encoding="utf-8")
        return [int(part) for part in text.strip().splitlines()[0].strip(" ,[]").split(",")]
    except (ValueError, IndexError):
        raise StoreError(f"{path} is no list of ranks: expected whole numbers separated by commas") from None
    except OSError as error:
        raise StoreError(f"the ranks {str(path)!r} cannot be read: {error.strerror}") from error


@dataclass
class _Reading:
    """Which names of a checkpoint are which parts of the model; ``read`` are those that found their place."""

    model: nn.Module
    sites: Sites
    state: Mapping[str, Tensor]
    read: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        found = {s.path: s.attention for s in self.sites.values() if isinstance(s, ProductSite)}
        self.attentions: dict[str, Attention] = {
            p: a for p, a in found.items() if self._has(f"{p}.{_LAYER}.w_qs.weight")
        }
        self.linears = [
            n
            for n, m in self.model.named_modules()
            if type(m) is nn.Linear and self._has(f"{n}.{_LAYER}.last_factor.weight")
        ]
        # layers that are no sites, because factors of them never pay, become dense again
        self.merged = [
            path
            for path in self.linears
            if path not in self.sites or self.inner_rank(path) > self.sites[path].full_rank
        ]

    def plan(self) -> Plan:
        """The plan that the shapes of the weights tell. Raises StoreError where they do not fit together."""
        sites: dict[str, SitePlan] = {}
        for path, a in self.attentions.items():
            qk, vo = self.attention_ranks(path)
            sites[f"{path}:qk"] = SitePlan(keep=qk, full=a.width)
            sites[f"{path}:vo"] = SitePlan(keep=vo, full=a.width)
        for path in self.linears:
            if path not in self.merged:
                sites[path] = SitePlan(keep=self.inner_rank(path), full=self.sites[path].full)
        return Plan(sites=sites, made_by={"method": "checkpoint of COMCAT's published code"})

    def attention_ranks(self, path: str) -> tuple[int, int]:
        """Ranks per head of QK and VO of one attention."""
        a = self.attentions[path]
        rows = {}
        for name, features in (("w_qs", a.in_features), ("w_ks", a.in_features), ("w_vs", a.in_features)):
            shape = tuple(self._get(f"{path}.{_LAYER}.{name}.weight").shape)
            if len(shape) != 2 or shape[1] != features or shape[0] % a.heads or not shape[0]:
                raise StoreError(
                    f"{path}.{_LAYER}.{name}.weight is {shape}, expected (a multiple of {a.heads} heads, {features})"
                )
            rows[name] = shape[0]
        out = tuple(self._get(f"{path}.{_LAYER}.proj.weight").shape)
        if rows["w_ks"] != rows["w_qs"]:
            raise StoreError(f"{path}: w_qs has {rows['w_qs']} rows and w_ks {rows['w_ks']}, expected as many of each")
        if out != (a.out_features, rows["w_vs"]):
            raise StoreError(
                f"{path}.{_LAYER}.proj.weight is {out}, expected {(a.out_features, rows['w_vs'])} by its w_vs"
            )
        return rows["w_qs"] // a.heads, rows["w_vs"] // a.heads

    def tensors(self) -> dict[str, Tensor]:
        """The state dict of the model after :func:`apply_`; what is missing is left to the strict loading to say."""
        tensors: dict[str, Tensor] = {}
        for path, a in self.attentions.items():
            tensors |= self._attention(path, a)
        for path in self.linears:
            tensors |= self._linear(path)
        for name in self.model.state_dict():
            if name not in tensors and self._has(name):
                tensors[name] = self._get(name)
            elif name not in tensors and (dense := self._unfused(name)) is not None:
                tensors[name] = dense
        return tensors

    def unread(self) -> list[str]:
        """What the checkpoint holds and nothing has read, but for what its modules are known to leave behind."""
        replaced = tuple(f"{p}." for p in (*self.attentions, *self.linears))
        left = (n for n in self.state if n not in self.read)
        return [n for n in left if "rank_alpha" not in n and not (n.startswith(replaced) and f".{_LAYER}." not in n)]

    def _attention(self, path: str, a: Attention) -> dict[str, Tensor]:
        module = self.model.get_submodule(path)
        if not isinstance(module, LowRankAttention):
            raise StoreError(f"{path} is a {type(module).__name__}, expected the plain attention of a ViT or DeiT")
        parts = {name: self._pair(f"{path}.{_LAYER}.{name}") for name in (*_DENSE, "proj")}
        weights, biases = {n: w for n, (w, _) in parts.items()}, {n: b for n, (_, b) in parts.items()}
        found = {"qkv.weight": torch.cat([weights[n] for n in _DENSE]), "proj.weight": weights["proj"]}
        query, value, out = biases["w_qs"], biases["w_vs"], biases["proj"]
        if module.qkv.bias is None and query is not None and query.any():
            raise StoreError(
                f"{path} has a trained query bias, but the architecture has none; build it with qkv_bias=True"
            )
        out = weights["proj"].new_zeros(a.out_features) if out is None else out
        if a.folds_value_bias and value is not None:
            out = (out.double() + weights["proj"].double() @ value.double()).to(out.dtype)
            value = None
        if module.qkv.bias is not None:
            zeros = weights["w_qs"].new_zeros(sum(module.widths)).split(module.widths)
            found["qkv.bias"] = torch.cat(
                [zeros[0] if query is None else query, zeros[1], zeros[2] if value is None else value]
            )
        found["proj.bias"] = out
        return {f"{path}.{name}": tensor for name, tensor in found.items()}

    def _linear(self, path: str) -> dict[str, Tensor]:
        (first, between), (last, bias) = (
            self._pair(f"{path}.{_LAYER}.{name}") for name in ("first_factor", "last_factor")
        )
        if first.ndim != 2 or last.ndim != 2 or len(first) != last.shape[1]:
            raise StoreError(
                f"{path}: first_factor is {tuple(first.shape)} and last_factor {tuple(last.shape)}, "
                "which do not multiply"
            )
        bias = last.new_zeros(len(last)) if bias is None else bias
        if between is not None:
            bias = (bias.double() + last.double() @ between.double()).to(bias.dtype)
        if path in self.merged:
            dense = {"weight": (last.double() @ first.double()).to(last.dtype)}
            if self.model.get_submodule(path).bias is not None or bias.any():
                dense["bias"] = bias
            return {f"{path}.{name}": tensor for name, tensor in dense.items()}
        assert isinstance(self.model.get_submodule(path), LowRankLinear)
        return {f"{path}.first.weight": first, f"{path}.last.weight": last, f"{path}.last.bias": bias}

    def _unfused(self, name: str) -> Tensor | None:
        """Part of a fused projection of an attention left dense, which the paper's code keeps as three."""
        owner, _, kind = name.rpartition(".")
        names = [f"{owner.removesuffix('.qkv')}.{part}.{kind}" for part in _DENSE]
        if not owner.endswith(".qkv") or not all(map(self._has, names)):
            return None
        return torch.cat([self._get(n) for n in names])

    def inner_rank(self, path: str) -> int:
        """Rank of a linear layer."""
        return len(self._get(f"{path}.{_LAYER}.first_factor.weight"))

    def _pair(self, path: str) -> tuple[Tensor, Tensor | None]:
        bias = f"{path}.bias"
        return self._get(f"{path}.weight"), self._get(bias) if self._has(bias) else None

    def _has(self, name: str) -> bool:
        return name in self.state

    def _get(self, name: str) -> Tensor:
        if name not in self.state:
            raise StoreError(f"the checkpoint lacks {name}")
        self.read.add(name)
        return self.state[name]


def _compare_ranks(listed_ranks: list[int], reading: _Reading) -> None:
    """Raise StoreError where ``ranks.txt`` and the weights disagree. A layer that was left dense may have any rank."""
    expected: list[tuple[str, int | None, int]] = []  # what, rank in the weights, heads
    for index in range(len(reading.model.blocks)):  # type: ignore[arg-type]
        path = f"blocks.{index}.attn"
        attention = reading.attentions.get(path)
        qk, vo = reading.attention_ranks(path) if attention is not None else (None, None)
        heads = 1 if attention is None else attention.heads
        expected += [(f"{path}:qk", qk, heads), (f"{path}:vo", vo, heads)]
        for name in (f"blocks.{index}.mlp.fc1", f"blocks.{index}.mlp.fc2"):
            expected.append((name, reading.inner_rank(name) if name in reading.linears else None, 1))
    heads_of_model = [n for n in ("head", "head_dist") if hasattr(reading.model, n)]
    optional = [(n, reading.inner_rank(n) if n in reading.linears else None, 1) for n in heads_of_model]
    if not len(expected) <= len(listed_ranks) <= len(expected) + len(optional):
        raise StoreError(
            f"the ranks file lists {counted(len(listed_ranks), 'rank')}, expected {len(expected)} for the blocks "
            f"and up to {len(optional)} for the head"
        )
    for (what, rank, heads), noted in zip([*expected, *optional], listed_ranks, strict=False):
        if rank is not None and noted // heads != rank:
            of = f" ({rank} in each of {heads} heads)" if heads > 1 else ""
            raise StoreError(f"{what}: the ranks file says {noted}, but the weights have {rank * heads}{of}")
