"""Reading a model's constructor arguments off its modules, and telling whether two models have one architecture."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import nn

from ..errors import ModelError

# Plain attributes that do not change what a model computes with given weights, and so may differ.
_NOT_ARCHITECTURE = frozenset(
    "training p inplace grad_checkpointing gradient_checkpointing fused_attn distilled_training name_or_path "
    "num_classes init_values head_init_scale weight_init_mode fix_init initializer_range".split()
)
# Attributes of transformers' modules that no forward pass changes; Swin's windows, say, follow the last picture.
_LASTING = frozenset("num_heads num_attention_heads scale scaling eps".split())


def plain(value: Any, where: str) -> Any:
    """``value`` as JSON would give it back (lists for tuples, text for keys). Raises ModelError if it cannot."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [plain(v, where) for v in value]
    raise ModelError(f"{where} is {value!r}, expected plain data that JSON can hold")


def tuples(value: Any) -> Any:
    """Lists as tuples, all the way down."""
    return tuple(tuples(v) for v in value) if isinstance(value, tuple | list) else value


# ------------------------------------------------------------------------------------------------ comparing


def differences(
    model: nn.Module, twin: nn.Module, *, config_known: bool = False, changed: Collection[str] = ()
) -> list[str]:
    """What sets ``model`` apart from ``twin``, one phrase each; nothing if they compute the same with equal weights.

    Compared are names and shapes of the state dicts, and for each module its class and its plain attributes (head
    counts, window sizes, epsilons: what shapes do not show). Dropout, checkpointing and the choice of kernels are left
    out, and so is whatever lies in a module that comcat put in place.

    config_known: ``twin`` comes from the very config of ``model``, so that only what was changed by hand can differ.
        Then the projections within attention, which comcat may have narrowed, are not compared, and of the attributes
        only those that no forward pass changes.
    changed: paths of modules that were made narrower without a module of ours, which are left out too.
    """
    replaced = [*changed, *(n for n, m in model.named_modules() if _is_ours(m))]
    replaced += [p for p in {n.rpartition(".")[0] for n in replaced} if "Attention" in _kind(model.get_submodule(p))]
    narrowed = [n for n, m in model.named_modules() if n and config_known and "Attention" in _kind(m)]

    mine, others = (
        {k: tuple(v.shape) for k, v in m.state_dict().items() if not _is_within(k, replaced + narrowed)}
        for m in (model, twin)
    )
    found = [f"{k} is only in this model" for k in mine if k not in others]
    found += [f"{k} is only in the one built again" for k in others if k not in mine]
    found += [f"{k} is {v} here, {others[k]} built again" for k, v in mine.items() if others.get(k, v) != v]
    modules = dict(twin.named_modules())
    for name, module in model.named_modules():
        if name in modules and not _is_within(name, replaced):
            found += [f"{name or 'the model'}{text}" for text in _unlike(module, modules[name], config_known)]
    return found


def _is_within(name: str, paths: list[str]) -> bool:
    return any(name == p or name.startswith(f"{p}.") for p in paths)


def _kind(module: nn.Module) -> str:
    return type(module).__name__


def _is_ours(module: nn.Module) -> bool:
    return getattr(module, "comcat_module", False) or type(module).__module__.partition(".")[0] == "comcat"


def _unlike(module: nn.Module, twin: nn.Module, config_known: bool) -> Iterator[str]:
    kinds = _kind(module), _kind(twin)
    if kinds[0] != kinds[1]:
        if not all(k == "Identity" or "Drop" in k for k in kinds):
            yield f" is a {kinds[0]} here, a {kinds[1]} built again"
        return
    for name, value in vars(module).items():
        if name.startswith("_") or name in _NOT_ARCHITECTURE or "drop" in name:
            continue
        if config_known and name not in _LASTING:
            continue
        other = vars(twin).get(name, value)
        if _is_setting(value) and _is_setting(other) and tuples(value) != tuples(other):
            yield f".{name} is {value!r} here, {other!r} built again"


def _is_setting(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_setting(v) for v in value)
    return value is None or isinstance(value, bool | int | float | str)


# ------------------------------------------------------------------------------------------- reading timm's


def nominal_size(model: nn.Module) -> tuple[int, int] | None:
    """The picture size (height, width) in pixels that a timm model was made for, or None if it takes any."""
    traits = getattr(model, "_traits", {})
    size = traits["img_size"] if "img_size" in traits else _deep(model, "patch_embed.img_size")
    return None if size is None else _pair(size)


def changeable_arguments(model: nn.Module) -> dict[str, Any]:
    """What timm lets users change in place (``reset_classifier``, ``set_input_size``), as it is now."""
    live = {k: getattr(model, k) for k in ("num_classes", "in_chans") if isinstance(getattr(model, k, None), int)}
    classifier: Any = getattr(model, "get_classifier", None)
    head = classifier() if callable(classifier) else None
    if isinstance(head, nn.Linear):
        live["num_classes"] = head.out_features  # it may have been exchanged by hand
    for path in ("head.global_pool", "head.pool_type", "global_pool"):  # a head that pools knows better
        pool = _deep(model, path)
        pool = getattr(pool, "pool_type", pool)
        if isinstance(pool, str):
            live["global_pool"] = pool
            break
    if (size := nominal_size(model)) is not None:
        live["img_size"] = list(size)
    return live


def read_arguments(model: Any) -> dict[str, Any]:
    """Constructor arguments as far as they can be read off the modules of timm's ViT, BEiT, EVA and Swin families."""
    stages: list[Any] = [s for s in getattr(model, "layers", ()) if hasattr(s, "blocks")]
    blocks = list(getattr(model, "blocks", ())) or [b for s in stages for b in s.blocks]
    if not blocks or _deep(model, "patch_embed.patch_size") is None:
        return {}
    read = {"patch_size": list(_pair(model.patch_embed.patch_size)), **_read_block(blocks[0])}
    read |= _read_swin(model, stages) if stages else _read_vit(model, blocks)
    classes = [c for c in type(model).__mro__ if issubclass(c, nn.Module) and c is not nn.Module]
    accepted = {name for c in classes for name in inspect.signature(c.__init__).parameters}
    return {k: plain(v, k) for k, v in read.items() if v is not None and k in accepted}


def _read_block(block: Any) -> dict[str, Any]:
    read: dict[str, Any] = {}
    attn, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
    projection = getattr(attn, "qkv", None) or getattr(attn, "q_proj", None)
    if projection is not None:
        read["qkv_bias"] = getattr(projection, "bias", None) is not None or _has(attn, "q_bias")
        read["qkv_fused"] = _has(attn, "qkv")
        read["qk_norm"] = _has(attn, "q_norm")
        read["proj_bias"] = _deep(attn, "proj.bias") is not None
    if _has(block, "ls1") or _has(block, "gamma_1"):
        read["init_values"] = _deep(block, "ls1.init_values") or 1e-5  # only where training starts; trained since
    second = getattr(mlp, "fc2", None)
    if isinstance(second, nn.Linear):
        packed = _deep(mlp, "fc1.out_features") == 2 * second.in_features  # both halves of a gated layer in one
        read |= {"swiglu_mlp": packed or _has(mlp, "fc1_g"), "scale_mlp": _has(mlp, "norm")}
        read["mlp_ratio"] = _ratio(second.in_features, second.out_features)
    return read


def _read_vit(model: Any, blocks: list[Any]) -> dict[str, Any]:
    attn = getattr(blocks[0], "attn", None)
    positions, registers = _has(model, "pos_embed"), getattr(model, "num_reg_tokens", 0)
    read = {k: getattr(model, k, None) for k in ("no_embed_class", "dynamic_img_size", "pool_include_prefix")}
    read |= {"embed_dim": model.embed_dim, "depth": len(blocks), "num_heads": getattr(attn, "num_heads", None)}
    read |= {"class_token": _has(model, "cls_token"), "reg_tokens": registers, "num_reg_tokens": registers}
    read |= {"pre_norm": _has(model, "norm_pre"), "final_norm": _has(model, "norm") or _has(model, "fc_norm")}
    read |= {"fc_norm": _has(model, "fc_norm"), "use_fc_norm": _has(model, "fc_norm")}
    read |= {"pos_embed": "learn" if positions else "none", "use_abs_pos_emb": positions}
    read |= {"use_rot_pos_emb": _has(model, "rope"), "use_shared_rel_pos_bias": _has(model, "rel_pos_bias")}
    read["use_rel_pos_bias"] = _has(attn, "relative_position_bias_table")
    return read


def _read_swin(model: Any, stages: list[Any]) -> dict[str, Any]:
    heads = [_deep(s.blocks[0], "attn.num_heads") for s in stages]
    windows = getattr(model, "_ref_window_sizes", None) or [s.blocks[0].window_size for s in stages]
    read: dict[str, Any] = {"embed_dim": stages[0].dim, "depths": [len(s.blocks) for s in stages]}
    return read | {"num_heads": None if None in heads else heads, "window_size": windows}


def _ratio(hidden: int, width: int) -> float:
    """A ratio with ``int(width * ratio) == hidden``, which plain division misses for some widths."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def _has(owner: Any, name: str) -> bool:
    return not isinstance(getattr(owner, name, None), nn.Identity | None)


def _pair(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _deep(owner: Any, path: str) -> Any:
    for name in path.split("."):
        owner = getattr(owner, name, None)
    return owner
