"""What is traced: a copy of the model that takes pictures alone and gives named tensors, and its graph."""

from __future__ import annotations

import copy
import linecache
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from ..data import Preprocess
from ..errors import ExportError
from ..measure import is_classifier
from ..measure.running import entry, unwrap
from ..modules.lowrank import LowRankAttention
from .packages import chain, quiet, reason
from .settings import ExportSettings

_DATA_DEPENDENT = {"GuardOnDataDependentSymNode", "DynamicOutputShapeException", "DataDependentOutputException"}


class Graph(nn.Module):
    """A model for export: pictures in, a tuple of tensors out.

    Args:
        model: a copy of the user's model, in eval mode on the CPU. names: of its outputs.
        pixels: if given, the pictures are pixels, uint8 (batch, height, width, channels), and are normalised here.
        half: compute in float16; what goes in and comes out stays float32. width: heads become multiples of it.
    """

    def __init__(
        self,
        model: nn.Module,
        names: tuple[str, ...],
        *,
        pixels: Preprocess | None = None,
        half: bool = False,
        width: int | None = None,
    ) -> None:
        super().__init__()
        self.factor: Any
        self.shift: Any
        self.model, self.names, self.half_precision, self.width = model, names, half, width
        for part in model.modules():
            if isinstance(part, LowRankAttention):
                part.pad = False  # no runtime needs it, and TensorRT is served below
        self.takes_pixels = pixels is not None
        if pixels is not None:
            shape = (1, -1, 1, 1)
            self.register_buffer("factor", 1 / (255 * torch.tensor(pixels.std).view(shape)), persistent=False)
            shift = torch.tensor(pixels.mean) / torch.tensor(pixels.std)
            self.register_buffer("shift", shift.view(shape), persistent=False)
        if half:
            model.half()

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        if self.takes_pixels:
            images = images.permute(0, 3, 1, 2).float() * self.factor - self.shift
        if self.half_precision:
            images = images.half()
        with _WholeAttention(self.width):
            said = named(entry(self.model)(images))
        return tuple(t.float() if t.is_floating_point() else t for t in said.values())


class _WholeAttention(TorchFunctionMode):
    """Attention as the operator of ONNX Runtime and the fusion of TensorRT want it.

    A mask that is one for all queries, such as (batch, 1, 1, keys), gets a row for each of them. Given ``multiple``,
    q, k and v are filled up with zeros to one width, the next multiple of it.
    """

    def __init__(self, multiple: int | None) -> None:
        super().__init__()
        self.multiple = multiple

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is not F.scaled_dot_product_attention or len(args) < 3:
            return function(*args, **kwargs)
        q, k, v, *rest = args
        if rest:
            kwargs["attn_mask"], rest = rest[0], rest[1:]
        mask = kwargs.pop("attn_mask", None)
        if mask is not None and mask.shape[-2] == 1:
            mask = mask.expand(*mask.shape[:-2], q.shape[-2], k.shape[-2])
        scale = kwargs.pop("scale", None)
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        width, own = max(q.shape[-1], v.shape[-1]), v.shape[-1]
        if self.multiple is not None:
            width = -(-width // self.multiple) * self.multiple
            q, k, v = (F.pad(t, (0, width - t.shape[-1])) if t.shape[-1] < width else t for t in (q, k, v))
        return function(q, k, v, mask, *rest, scale=scale, **kwargs)[..., :own]


def named(output: Any) -> dict[str, Tensor]:
    """A model's output as tensors by name. Raises ExportError where there is something else in it."""
    if isinstance(output, Tensor):
        return {"output": output}
    if isinstance(output, Mapping):
        given = {str(name): value for name, value in output.items() if isinstance(value, Tensor)}
    elif isinstance(output, tuple | list):
        given = {f"output_{i}": value for i, value in enumerate(output) if value is not None}
    else:
        given = {}
    if not given or not all(isinstance(value, Tensor) for value in given.values()):
        raise ExportError(f"the model gives a {type(output).__name__} of no plain tensors; expected tensors by name")
    return given


def prepared(model: nn.Module) -> nn.Module:
    """A copy of a model on the CPU, in float32 and eval mode, without wrappers of compilation and data parallelism."""
    try:
        return copy.deepcopy(unwrap(model)).to("cpu", torch.float32).eval()
    except (RuntimeError, NotImplementedError) as error:
        raise ExportError(f"{type(model).__name__} cannot be copied for the export: {reason(error)}") from None


def output_names(model: nn.Module, example: Tensor) -> tuple[str, ...]:
    """What the outputs are called: ``logits`` of a classifier's one output, else as the model calls them.

    Raises ExportError for a model that does not take pictures alone, or whose output changes from call to call.
    """
    label = type(model).__name__
    try:
        with torch.inference_mode():
            first, second = (named(entry(model)(example)) for _ in range(2))
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(
            f"{label} cannot run on pictures {tuple(example.shape)} alone, as a model for export must: "
            f"{type(error).__name__}: {reason(error)}"
        ) from error
    if any(not torch.equal(first[name], second[name]) for name in first):
        raise ExportError(
            f"{label} gives another output each time it is called: there is nothing to compare a file with"
        )
    if (
        list(first) == ["output"]
        and first["output"].dim() == 2
        and (is_classifier(model) or first["output"].shape[1] == 1)
    ):
        return ("logits",)
    return tuple(first)


@dataclass(frozen=True, kw_only=True)
class Traced:
    """A graph as torch has recorded it, and what it was recorded on."""

    program: torch.export.ExportedProgram
    graph: Graph
    example: Tensor


def trace(graph: Graph, example: Tensor, settings: ExportSettings) -> Traced:
    """The graph of a model for any pictures like ``example``.

    Raises ExportError where the forward depends on the values in the pictures, or fixes a size that was to vary.
    """
    sizes = (1, 2) if graph.takes_pixels else (2, 3)
    dims: dict[int, Any] = {} if settings.batch != "dynamic" else {0: torch.export.Dim("batch", min=1)}
    if settings.any_size:
        dims |= dict.fromkeys(sizes, torch.export.Dim.DYNAMIC)
    try:
        with torch.no_grad(), plain_attention(), quiet():
            program = torch.export.export(graph, (example,), dynamic_shapes=(dims,), strict=False)
        return Traced(program=program, graph=graph, example=example)
    except Exception as error:
        raise _untraceable(graph.model, error) from error


@contextmanager
def plain_attention() -> Iterator[None]:
    """Plain attention everywhere: other kernels answer with strides that the graph must not rely on."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _untraceable(model: nn.Module, error: Exception) -> ExportError:
    label, causes = type(model).__name__, chain(error)
    kinds = {kind.__name__ for cause in causes for kind in type(cause).__mro__}
    text = " ".join(str(cause) for cause in causes)
    if kinds & _DATA_DEPENDENT or "data-dependent" in text:
        return ExportError(
            f"the forward of {label} depends on the values in the pictures{_where(causes)}, "
            "so that no one graph holds for all of them"
        )
    if "ConstraintViolation" in " ".join(kinds) or "Constraints violated" in text or "specialized" in text:
        return ExportError(
            f"the forward of {label} fixes a size that was to vary: give a number of pictures (batch=8, --batch 8), "
            "and no any_size"
        )
    return ExportError(f"{label} cannot be traced{_where(causes)}: {type(error).__name__}: {reason(error)}")


def _where(causes: list[BaseException]) -> str:
    """The line of the model's own code that an error came from."""
    for cause in causes:
        for frame in reversed(traceback.extract_tb(cause.__traceback__)):
            if "/torch/" not in frame.filename and "/comcat/" not in frame.filename:
                line = (frame.line or linecache.getline(frame.filename, frame.lineno or 0)).strip()
                return f" ({frame.filename.rpartition('/')[2]}, line {frame.lineno}: {line})"
    return ""
