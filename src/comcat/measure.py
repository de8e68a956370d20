"""What a model costs and how well it does: parameters, MACs, seconds, bytes, accuracy.

Nothing here changes a model: its weights stay, and the training flag of each of its modules is put back.
"""

import copy
import inspect
import json
import math
import platform
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from .errors import ComcatError, DataError, ModelError, NumericsError, SettingsError, nearest

# ---------------------------------------------------------------- running a model


def _unwrap(model: nn.Module) -> nn.Module:
    """The caller's own module inside ``torch.compile``'s and the data-parallel wrappers."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


@contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        yield
    finally:
        # train() first, parents before children: some modules drop what they cached for evaluation there.
        for module, flag in flags:
            if module.training is not flag:
                module.train(flag)
        for module, flag in flags:
            module.training = flag


def _entry(model: nn.Module) -> Callable[[Tensor], Any]:
    """How to hand pictures to the model: by position, as ``pixel_values``, or to the image half of two towers."""
    inner = _unwrap(model)
    if getattr(inner, "main_input_name", None) == "pixel_values":
        return lambda images: model(pixel_values=images)
    if callable(tower := getattr(inner, "get_image_features", None)):
        return lambda images: tower(pixel_values=images)
    try:
        by_keyword = "pixel_values" in inspect.signature(inner.forward).parameters
    except (TypeError, ValueError):  # a forward without a Python signature
        by_keyword = False
    return (lambda images: model(pixel_values=images)) if by_keyword else model


def _tensors(example: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]


def _describe(example: Any) -> str:
    texts = (f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')} on {t.device}" for t in _tensors(example))
    return ", ".join(texts) or "no tensors"


def _call(model: nn.Module, example: Any, name: str | None = None) -> Any:
    """One forward of ``example``: a tensor is pictures, a tuple positional arguments, a mapping keyword arguments."""
    try:
        if isinstance(example, Tensor):
            return _entry(model)(example)
        return model(**example) if isinstance(example, Mapping) else model(*example)
    except (ComcatError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        label = type(_unwrap(model)).__name__ if name is None else repr(name)
        raise ModelError(
            f"model {label} cannot run on an input of {_describe(example)}: {type(error).__name__}: {error}"
        ) from error


def _checked(example: Any) -> Any:
    example = dict(example) if isinstance(example, Mapping) else example  # a processor's output is no dict
    if not isinstance(example, Tensor | tuple | list | dict) or not _tensors(example):
        raise DataError(f"example: got {type(example).__name__}, expected a tensor, tuple or mapping of pictures")
    for tensor in _tensors(example):
        if tensor.dim() and not tensor.shape[0]:
            raise DataError(f"example: got a tensor of shape {tuple(tensor.shape)}, expected at least one picture")
    return example


def model_output(model: nn.Module, images: Tensor) -> Tensor:
    """What a model says of pictures, as one tensor: class logits where it gives any, else features.

    ``images`` is (batch, channels, height, width); the result is (batch, classes or features). The model's mode and the
    gradients are the caller's business. Models of transformers are called with ``pixel_values=`` and give ``logits``,
    else ``image_embeds``, ``pooler_output``, or ``last_hidden_state`` averaged over tokens; a model of images and text
    gives its image features. A tuple or list of equal (batch, classes) tensors, as distilled models in training mode
    return for their two heads, is averaged. Plain tokens (batch, tokens, features) are averaged over tokens; tensors
    with more dimensions are flattened to one row a picture.

    Raises ModelError where the model fails on these pictures or returns something else.
    """
    output = _call(model, images)
    label = type(_unwrap(model)).__name__
    if isinstance(output, Mapping):
        keys = [key for key in ("logits", "image_embeds", "pooler_output", "last_hidden_state") if key in output]
        said = next((output[key] for key in keys if output[key] is not None), None)
        if said is None:
            raise ModelError(
                f"model {label} returns {sorted(map(str, output))}; "
                "expected logits, image_embeds, pooler_output or last_hidden_state"
            )
        output = said
    if isinstance(output, tuple | list) and output and all(isinstance(part, Tensor) for part in output):
        if len({part.shape for part in output}) == 1 and output[0].dim() == 2:
            output = torch.stack(tuple(output)).mean(0)
    if not isinstance(output, Tensor):
        inside = f" of {_describe(output)}" if isinstance(output, tuple | list) else ""
        raise ModelError(
            f"model {label} returns a {type(output).__name__}{inside}; expected a tensor, a transformers output, "
            "or a tuple of equal (batch, classes) tensors"
        )
    if not output.dim() or output.shape[0] != images.shape[0]:
        raise ModelError(
            f"model {label} returns shape {tuple(output.shape)} for {images.shape[0]} pictures; "
            "expected one row a picture"
        )
    if output.dim() == 3:
        return output.mean(1)
    return output.unsqueeze(1) if output.dim() == 1 else output.flatten(1)


def is_classifier(model: nn.Module) -> bool:
    """Whether the model's output is class logits.

    Models of transformers: an image-classification class or one with a ``classifier``, and at least one label. Others:
    ``num_classes`` (timm, torchvision's ViT) where the model has it; else whether a ``head``, ``heads``, ``fc`` or
    ``classifier`` is there, or the last layer is linear.
    """
    inner = _unwrap(model)
    config = getattr(inner, "config", None)
    if hasattr(inner, "main_input_name") and config is not None:
        head = getattr(inner, "classifier", None)
        named = any("ForImageClassification" in kind.__name__ for kind in type(inner).__mro__)
        has_head = not isinstance(head, nn.Identity) and (named or isinstance(head, nn.Module))
        return has_head and getattr(config, "num_labels", 0) > 0
    classes = getattr(inner, "num_classes", None)
    if isinstance(classes, int):
        return classes > 0
    heads = [child for name, child in inner.named_children() if name in ("head", "heads", "fc", "classifier")]
    if heads:
        return not all(isinstance(head, nn.Identity) for head in heads)
    leaves = [module for module in inner.modules() if not any(True for _ in module.children())]
    return isinstance(leaves[-1], nn.Linear)


# ---------------------------------------------------------------- size and work


def _distinct(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Each stretch of memory once, under its first name; tensors without memory (meta, empty) by identity."""
    seen = set()
    for name, tensor in tensors:
        if nn.parameter.is_lazy(tensor):
            raise ModelError(f"{name!r} has no shape yet; run one forward before measuring the model")
        pointer = tensor.data_ptr() if tensor.device.type != "meta" else 0
        key = (tensor.device, pointer, tensor.dtype, tensor.shape, tensor.stride()) if pointer else id(tensor)
        if key not in seen:
            seen.add(key)
            yield name, tensor


def count_parameters(model: nn.Module) -> int:
    """The number of weights, biases and other parameters; those that several modules share count once.

    Raises ModelError where a lazy parameter has no shape yet.
    """
    return sum(parameter.numel() for _, parameter in _distinct(model.named_parameters()))


# What safetensors calls the types, in the order that it ranks them in (the largest type comes first in a file).
# fmt: off
_SAFETENSORS = {
    "bool": "BOOL", "uint8": "U8", "int8": "I8", "float8_e5m2": "F8_E5M2", "float8_e4m3fn": "F8_E4M3",
    "int16": "I16", "uint16": "U16", "float16": "F16", "bfloat16": "BF16", "int32": "I32", "uint32": "U32",
    "float32": "F32", "complex64": "C64", "float64": "F64", "int64": "I64", "uint64": "U64",
}
# fmt: on


def size_on_disk(model: nn.Module) -> int:
    """Bytes of the model's state dict as a safetensors file without metadata: header and data, shared tensors once.

    Nothing is written, so weights on any device, ``meta`` included, are measured alike. Raises ModelError for a type
    that safetensors cannot hold or a lazy parameter without a shape.
    """
    ranks = {kind: rank for rank, kind in enumerate(_SAFETENSORS)}
    state = model.state_dict(keep_vars=True)  # the tensors themselves, so that shared ones are recognised on meta too
    rows = []
    for name, tensor in _distinct((n, t) for n, t in state.items() if isinstance(t, Tensor)):
        kind = str(tensor.dtype).removeprefix("torch.")
        if kind not in ranks:
            raise ModelError(f"{name!r} is of type {kind}, which safetensors cannot hold")
        rows.append((-ranks[kind], name, kind, tensor))
    header, end = {}, 0
    for _, name, kind, tensor in sorted(rows, key=lambda row: row[:2]):
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _SAFETENSORS[kind], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + math.ceil(len(text) / 8) * 8 + end


def count_macs(model: nn.Module, example: Tensor | tuple | list | Mapping) -> int:
    """Multiply-accumulates of one forward of one picture, the first of ``example``.

    ``example`` is pictures (batch, channels, height, width), or a tuple of positional or a mapping of keyword arguments
    with the batch first. Convolutions, linear layers, matrix products and attention count; elementwise work, softmax
    and normalisation do not (the papers' convention, who call MACs FLOPs). Attention counts in full, N² scores a head,
    whatever its mask and whichever kernel would run it. A compiled model counts as what was compiled.

    Raises DataError for an example without pictures, ModelError where the model fails on it.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    one = tree_map_only(Tensor, lambda tensor: tensor[:1] if tensor.dim() else tensor, _checked(example))
    # torch's counter knows products of matrices, not those with a vector.
    vectors = {
        torch.ops.aten.mv: lambda matrix, vector, **_: 2 * math.prod(matrix),
        torch.ops.aten.addmv: lambda base, matrix, vector, **_: 2 * math.prod(matrix),
        torch.ops.aten.dot: lambda left, right, **_: 2 * math.prod(left),
    }
    counter = FlopCounterMode(display=False, custom_mapping=vectors)
    # nn.MultiheadAttention's fast path is one operation that the counter cannot see into.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with _evaluating(model), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
            _call(_unwrap(model), one)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return counter.get_total_flops() // 2


# ---------------------------------------------------------------- memory


class _LiveBytes(TorchDispatchMode):
    """Follows every storage that the operations under it read or write, from its first sight to its release."""

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._watched: dict[int, weakref.ref] = {}
        for tensor in held:
            self._watch(tensor)

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._watched:
            return

        def release(_: weakref.ref) -> None:
            del self._watched[key]
            self.live -= size

        self._watched[key] = weakref.ref(storage, release)
        self.live += size
        self.peak = max(self.peak, self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            if isinstance(leaf, Tensor):
                self._watch(leaf)
        return result


def peak_memory(model: nn.Module, example: Tensor | tuple | list | Mapping) -> int:
    """The most bytes that a forward of ``example`` (the whole batch, evaluation mode, no gradients) needs at once.

    Weights, buffers and the example count as held throughout. On CUDA it is the allocator's ``max_memory_allocated``
    over a second forward, less what other models and data hold on the device; the allocator's peak statistic is reset.
    Elsewhere a ``TorchDispatchMode`` follows each tensor's storage from the operation that makes it to its release:
    the same number on every machine, though blind to scratch space inside a kernel and to what compiling saves. The
    process's resident size would not do: it counts the libraries and keeps pages that the allocator has freed.

    Raises DataError for an example without pictures, ModelError where the model fails on it.
    """
    tensors = _tensors(example := _checked(example))
    device = tensors[0].device
    held = [*model.parameters(), *model.buffers(), *tensors]
    with _evaluating(model), torch.no_grad():
        if device.type != "cuda":
            _call(model, example)  # tables that a model builds once are then held, not counted as they come
            with _LiveBytes(held) as mode:
                _call(model, example)
            return mode.peak
        storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in held if t.device == device)}
        _call(model, example)  # tables, library handles and workspaces that come once and stay
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        _call(model, example)
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before + sum(storages.values())


# ---------------------------------------------------------------- time


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds that one forward of a batch takes: median and quartiles over ``repeats`` rounds, with every round's."""

    median_s: float
    low_s: float
    high_s: float
    repeats: int
    batch_size: int
    samples_s: tuple[float, ...] = field(default=(), repr=False)

    @property
    def throughput(self) -> float:
        """Pictures per second at the median."""
        return self.batch_size / self.median_s

    def to_dict(self, *, samples: bool = False) -> dict[str, Any]:
        """The numbers as JSON holds them; the rounds' samples only when asked for."""
        numbers = asdict(self) | {"throughput": self.throughput, "samples_s": list(self.samples_s)}
        return numbers if samples else {key: value for key, value in numbers.items() if key != "samples_s"}


_AUTOCAST = (torch.bfloat16, torch.float16)


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, lower and upper quartile."""
    at = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)
    return tuple(torch.tensor(values, dtype=torch.float64).quantile(at).tolist())


def _compiled(
    name: str, model: nn.Module, example: Tensor, cast: Callable[[], AbstractContextManager]
) -> Callable[[Tensor], Any]:
    """A copy of the model under ``torch.compile``, compiled for the example."""
    # Fixed shapes: else the second model of a class is compiled with its ranks as variables, and runs slower for it.
    options: dict[str, Any] = {"dynamic": False}
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:  # not in every supported torch
        options["isolate_recompiles"] = True
    try:
        call = torch.compile(_entry(copy.deepcopy(model)), **options)
        with torch.inference_mode(), cast():
            call(example)
    except Exception as error:
        raise ModelError(f"torch.compile failed for model {name!r}: {type(error).__name__}: {error}") from error
    return call


def _loud_compiler() -> AbstractContextManager:
    """Room to compile many models of one class, and an error instead of a silent return to eager running."""
    import torch._dynamo

    return torch._dynamo.config.patch(
        recompile_limit=2**16,
        accumulated_recompile_limit=2**16,
        fail_on_recompile_limit_hit=True,
        suppress_errors=False,
    )


def benchmark(
    models: Mapping[str, nn.Module],
    example: Tensor,
    *,
    repeats: int = 20,
    warmup: int = 3,
    min_seconds: float = 1.0,
    compile: bool = False,
    autocast_dtype: torch.dtype | None = None,
) -> dict[str, Timing]:
    """Time the forward of each model on ``example`` (batch, channels, height, width), all in one interleaved run.

    Each round times every model once, in an order that rotates from round to round, so that a machine's drift hits all
    alike; compare two of them with :func:`ratio`. There are at least ``repeats`` rounds, and more until they took
    ``min_seconds`` seconds for each model on average. Evaluation and inference mode; where the example is on an
    accelerator, it is synchronised around each sample. ``warmup`` untimed rounds come first. ``compile`` times copies
    under ``torch.compile`` with fixed shapes and no limit on recompilation, leaving the given models as they are.
    ``autocast_dtype`` (bfloat16 or float16) runs each forward in an autocast context of its own, as a service would.

    Raises SettingsError for settings out of range, DataError for an example without pictures, ModelError naming the
    model that cannot run or that ``torch.compile`` fails on.
    """
    if not isinstance(models, Mapping) or not models or not all(isinstance(m, nn.Module) for m in models.values()):
        raise SettingsError(f"models: got {models!r}, expected a mapping of at least one name to a module")
    if repeats < 1 or warmup < 0 or not 0 <= min_seconds < math.inf:
        raise SettingsError(
            f"got repeats={repeats}, warmup={warmup}, min_seconds={min_seconds}; "
            "expected at least 1, at least 0 and a finite number of at least 0"
        )
    if autocast_dtype not in (None, *_AUTOCAST):
        raise SettingsError(f"autocast_dtype: got {autocast_dtype}, expected torch.bfloat16, torch.float16 or None")
    if not isinstance(example, Tensor):
        raise DataError(f"example: got {type(example).__name__}, expected a tensor of pictures")
    device, calls = _checked(example).device, {}
    wait = torch.accelerator.synchronize if device.type not in ("cpu", "meta") else lambda _: None

    def cast() -> AbstractContextManager:
        return nullcontext() if autocast_dtype is None else torch.autocast(device.type, dtype=autocast_dtype)

    with ExitStack() as stack:
        stack.enter_context(_evaluating(*models.values()))
        if compile:
            stack.enter_context(_loud_compiler())
        for name, model in models.items():
            with torch.no_grad(), cast():  # tables a model builds once must not become inference tensors
                _call(model, example, name)
            calls[name] = _compiled(name, model, example, cast) if compile else _entry(model)
        stack.enter_context(torch.inference_mode())
        names, samples, spent = list(calls), {name: [] for name in calls}, 0.0
        rounds = -warmup
        while rounds < repeats or spent < min_seconds * len(names):
            for step in range(len(names)):
                name = names[(rounds + step) % len(names)]
                wait(device)
                start = time.perf_counter()
                with cast():
                    calls[name](example)
                wait(device)
                seconds = time.perf_counter() - start
                if rounds >= 0:
                    samples[name].append(seconds)
                    spent += seconds
            rounds += 1
    timings = {}
    for name, values in samples.items():
        median, low, high = _quartiles(values)
        timings[name] = Timing(
            median_s=median,
            low_s=low,
            high_s=high,
            repeats=len(values),
            batch_size=example.shape[0],
            samples_s=tuple(values),
        )
    return timings


def ratio(timings: Mapping[str, Timing], base: str, other: str) -> tuple[float, float, float]:
    """How many times as fast as ``base`` is ``other``: median, lower and upper quartile of the rounds' paired ratios.

    Pairing takes out what slows a whole round. Raises ModelError for a name that was not timed, SettingsError where the
    two were not timed in one run.
    """
    for name in (base, other):
        if name not in timings:
            raise ModelError(f"no timing of {name!r}, only of {sorted(timings)}{nearest(name, timings)}")
    slow, fast = timings[base], timings[other]
    if not slow.samples_s or len(slow.samples_s) != len(fast.samples_s) or slow.batch_size != fast.batch_size:
        raise SettingsError(
            f"{base!r} has {len(slow.samples_s)} samples of batches of {slow.batch_size}, {other!r} has "
            f"{len(fast.samples_s)} of {fast.batch_size}; expected both from one run of benchmark"
        )
    return _quartiles([a / b for a, b in zip(slow.samples_s, fast.samples_s, strict=True)])


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """What a number needs beside it: devices, threads, versions and numeric settings, ready for JSON.

    ``device`` is the current CUDA device's name, else the processor's; ``memory_bytes`` is that device's, else None.
    A library that is not installed has the version None.
    """
    import os
    from importlib.metadata import PackageNotFoundError, version

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    cpu, cuda = _cpu_name(), torch.cuda.is_available()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    properties = torch.cuda.get_device_properties(torch.cuda.current_device()) if cuda else None
    packages = ("comcat", "torch", "timm", "transformers", "diffusers", "safetensors")
    return {
        "device": properties.name if properties else cpu,
        "devices": torch.cuda.device_count() if cuda else 0,
        "memory_bytes": properties.total_memory if properties else None,
        "cuda": torch.version.cuda if cuda else None,
        "cpu": cpu,
        "cores": usable,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in packages},
        "default_dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "float32_matmul": torch.backends.cuda.matmul.fp32_precision,
    }


# ---------------------------------------------------------------- accuracy


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How a model does on pictures; None where there are no labels, no reference or no classes to say it by.

    ``count`` is the number of pictures. ``top1``, ``top5`` (of more than five classes) and ``agreement`` (whose arg max
    equals the reference's) are percentages, ``loss`` is the mean cross-entropy and ``divergence`` the mean
    KL(reference || model), both in nats, ``cosine`` the mean cosine of the outputs to the reference's.
    """

    count: int
    top1: float | None = None
    top5: float | None = None
    loss: float | None = None
    agreement: float | None = None
    cosine: float | None = None
    divergence: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """The numbers as JSON holds them."""
        return asdict(self)


def _split(batch: Any, where: str) -> tuple[Tensor, Tensor | None]:
    """Pictures and labels of a batch."""
    if isinstance(batch, Mapping):
        if "pixel_values" not in batch:
            raise DataError(f"{where}: got the keys {sorted(map(str, batch))}, expected pixel_values and maybe labels")
        images, labels = batch["pixel_values"], batch.get("labels")
    elif isinstance(batch, tuple | list) and len(batch) in (1, 2):
        images, labels = batch[0], batch[1] if len(batch) == 2 else None
    else:
        images, labels = batch, None
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.dim() < 2:
        got = f"{tuple(images.shape)} {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
        raise DataError(f"{where}: got {got}, expected pictures (batch, channels, height, width) of a floating type")
    if labels is None:
        return images, None
    try:
        labels = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{where}: got {type(labels).__name__} for labels, expected whole numbers: {error}") from error
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    if labels.shape != images.shape[:1] or not (whole or not len(labels)):
        raise DataError(
            f"{where}: got labels of shape {tuple(labels.shape)} {labels.dtype}, "
            f"expected one whole number for each of {images.shape[0]} pictures"
        )
    return images, labels.long()


def _speaker(model: nn.Module, device: Any, dtype: torch.dtype | None, who: str) -> Callable[[Tensor, str], Tensor]:
    """A function from pictures and the batch's name to the model's output in float32, on the model's device."""
    held = [*model.parameters(), *model.buffers()]
    home = held[0].device if held else None
    if device is not None:
        device = torch.device(device)
        for tensor in held:
            if tensor.device.type != device.type or device.index not in (None, tensor.device.index):
                raise ModelError(f"the {who} is on {tensor.device}, expected {device}; move it there first")
        home = home or device
    if home is not None and home.type == "meta":
        raise ModelError(f"the {who} has no weights: they are on the meta device; load them first")
    own = next((tensor.dtype for tensor in held if tensor.is_floating_point()), torch.float32)
    if dtype not in (None, own, *_AUTOCAST):
        raise SettingsError(f"dtype: got {dtype}, expected torch.bfloat16, torch.float16 or the {who}'s own {own}")

    def speak(images: Tensor, where: str) -> Tensor:
        images = images.to(device=home or images.device, dtype=own, non_blocking=True)
        cast = dtype not in (None, own)
        with torch.autocast(images.device.type, dtype=dtype) if cast else nullcontext():
            output = model_output(model, images).float()
        sound = output.isfinite().all(1)
        if not sound.all():
            first = int((~sound).nonzero()[0])
            raise NumericsError(f"{where}: the {who}'s output for picture {first} has NaN or infinity in it")
        return output

    return speak


def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    reference: nn.Module | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Evaluation:
    """How the model does on every picture of ``batches``, each once: against labels, and against another model.

    ``batches`` yields pictures (batch, channels, height, width), tuples of pictures and labels (batch,) or None, or
    mappings with ``pixel_values`` and maybe ``labels``; a DataLoader of any of these will do. Labels count where the
    model is a classifier (:func:`is_classifier`). Against ``reference`` come the cosine of the outputs, be they logits
    or features, and, where both are classifiers, agreement and divergence. Pictures go to each model's own device and
    type; ``device`` states where the models must be. ``dtype`` bfloat16 or float16 computes under autocast where it is
    not the weights' own type. ``progress`` shows a bar.

    Raises DataError for empty or malformed batches, for labels outside the model's classes and where only some batches
    have labels; NumericsError for NaN or infinity in an output; ModelError where a model fails, is on another device,
    or says something of another width than the reference; SettingsError for another ``dtype``.
    """
    scores, votes = is_classifier(model), reference is not None and is_classifier(model) and is_classifier(reference)
    speak = _speaker(model, device, dtype, "model")
    refer = None if reference is None else _speaker(reference, device, dtype, "reference")
    sums = dict.fromkeys(("top1", "top5", "loss", "agreement", "cosine", "divergence"), 0.0)
    count, width, labelled = 0, 0, None
    if progress:
        from tqdm.auto import tqdm

        batches = tqdm(batches, desc="evaluate", unit="batch")
    with _evaluating(model, *([] if reference is None else [reference])), torch.no_grad():
        for index, batch in enumerate(batches):
            where = f"batch {index}"
            images, labels = _split(batch, where)
            if not len(images):
                continue
            if labelled not in (None, labels is not None):
                has, had = ("labels", "none") if labels is not None else ("no labels", "some")
                raise DataError(f"{where} has {has} and those before have {had}; expected all alike")
            labelled = labels is not None
            output = speak(images, where)  # (batch, classes or features)
            count, width = count + len(output), output.shape[1]
            if scores and labels is not None:
                labels = labels.to(output.device)
                wrong = labels[(labels < 0) | (labels >= width)]
                if len(wrong):
                    raise DataError(f"{where}: got label {int(wrong[0])}, expected 0 to {width - 1} of {width} classes")
                sums["loss"] += F.cross_entropy(output, labels, reduction="sum").item()
                ranked = output.topk(min(5, width)).indices == labels[:, None]  # (batch, 5)
                sums["top1"] += ranked[:, 0].sum().item()
                sums["top5"] += ranked.sum().item()
            if refer is not None:
                other = refer(images, where).to(output.device)
                if other.shape != output.shape:
                    raise ModelError(
                        f"the model gives {width} numbers a picture, the reference {other.shape[1]}; expected as many"
                    )
                sums["cosine"] += F.cosine_similarity(output, other).sum().item()
                if votes:
                    sums["agreement"] += (output.argmax(1) == other.argmax(1)).sum().item()
                    logs, aims = output.log_softmax(1), other.log_softmax(1)
                    sums["divergence"] += F.kl_div(logs, aims, log_target=True, reduction="sum").item()
    if not count:
        raise DataError("no pictures to evaluate on: the batches are empty")
    known = set()
    if scores and labelled:
        known |= {"top1", "loss"} | ({"top5"} if width > 5 else set())
    if refer is not None:
        known |= {"cosine"} | ({"agreement", "divergence"} if votes else set())
    percent = {"top1", "top5", "agreement"}
    sums["divergence"] = max(0.0, sums["divergence"])  # rounding alone takes it below
    return Evaluation(count=count, **{key: sums[key] / count * (100 if key in percent else 1) for key in sorted(known)})
