"""Hooks that record moments while pictures flow through a model."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor, nn

from ..errors import ModelError, NumericsError
from ..hosts import host_of
from ..sites import Attention, HiddenSite, LinearSite, ProductSite, Projection, Site, Sites, channels_last, over_maps
from .moments import Moments


class Recorder:
    """Hooks on the projections of attention and on linear layers; fused attention can stay."""

    def __init__(self, sites: Sites, *, gradients: bool, device: torch.device) -> None:
        self.sites, self.gradients, self.device = sites, gradients, device
        self.pictures = 0
        self.moments: dict[tuple[str, str], Moments] = {}
        self.rows: dict[str, float] = {}
        self.pairs: dict[str, float] = {}
        self._counted: set[str] = set()
        self._of_gradients: dict[tuple[str, str], Moments] = {}

    def attached(self, model: nn.Module) -> ExitStack:
        stack = ExitStack()
        by_attention: dict[str, dict[str, ProductSite]] = {}
        for site in self.sites.values():
            if isinstance(site, ProductSite):
                by_attention.setdefault(site.path, {})[site.kind] = site
            elif isinstance(site, HiddenSite):
                self._observe_hidden(stack, model, site)
            else:
                self._observe_linear(stack, model, site)
        for found in by_attention.values():
            attention = next(iter(found.values())).attention
            stack.callback(host_of(attention).observe(model.get_submodule(attention.path)))
            if "qk" in found:
                self._observe_qk(stack, model, found["qk"], attention)
            if "vo" in found:
                self._observe_vo(stack, model, found["vo"], attention)
        return stack

    def begin(self, pictures: int) -> None:
        """Say how many pictures the next forward pass holds."""
        self.pictures = pictures
        self._counted.clear()

    def _of(self, site: Site, side: str, heads: int, width: int, groups: int = 1) -> Moments:
        key = (site.name, side)
        if key not in self.moments:
            self.moments[key] = Moments(heads, width, self.device, groups)
        return self.moments[key]

    def _of_gradient(self, site: Site, side: str, heads: int, width: int) -> Moments:
        self._of_gradients[site.name, side] = moments = self._of(site, side, heads, width)
        return moments

    def _observe_qk(self, stack: ExitStack, model: nn.Module, site: ProductSite, a: Attention) -> None:
        def rows_of(projection: Projection, output: Tensor) -> Tensor:
            return output[..., projection.channels]

        waiting: dict[str, float] = {}

        def note(**seen: float) -> None:
            """Queries and keys of one call, whichever are made first."""
            waiting.update(seen)
            if len(waiting) == 2:
                self._count(site, waiting["queries"], waiting["queries"] * waiting["keys"])
                waiting.clear()

        def keep_q(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            q = rows_of(a.q, channels_last(module, output)).detach()
            q = q.flatten(1, -2) if q.ndim > 3 else q
            if a.q.bias is not None:
                q = q + a.q.bias_or_none(model)  # type: ignore[operator]
            tokens = q.shape[:-1].numel() / self.pictures
            note(queries=tokens)
            if not self.gradients:
                self._of(site, "a", a.heads, a.width).add(q, self.pictures)

        def keep_k(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            k = rows_of(a.k, channels_last(module, output))
            k = k.flatten(1, -2) if over_maps(module) else k
            note(keys=k.shape[-2] if k.ndim > 2 else 1)
            self._of(site, "b", a.heads, a.width).add(k, self.pictures, centred="set")
            if self.gradients and output.requires_grad:
                moments, pictures = self._of_gradient(site, "a", a.heads, a.width), self.pictures
                output.register_hook(
                    lambda g: moments.add(rows_of(a.k, channels_last(module, g)), pictures, per="picture")
                )

        stack.enter_context(_hook(model.get_submodule(a.q.called).register_forward_hook(keep_q)))
        stack.enter_context(_hook(model.get_submodule(a.k.called).register_forward_hook(keep_k)))

    def _observe_vo(self, stack: ExitStack, model: nn.Module, site: ProductSite, a: Attention) -> None:
        def keep(module: nn.Module, inputs: tuple) -> tuple:
            o = inputs[0].view_as(inputs[0])  # a tensor of its own, so that its gradient is this layer's alone
            rows = channels_last(module, o)
            tokens = rows.shape[:-1].numel() / self.pictures
            keys = rows.shape[-2] if rows.ndim == 3 else rows.shape[1:-1].numel()
            self._count(site, tokens, tokens * keys)
            self._of(site, "joint", 1, a.v.count, a.heads).add(rows, self.pictures, centred="all")
            if self.gradients and o.requires_grad:
                moments, pictures = self._of_gradient(site, "b", a.heads, a.value_width), self.pictures
                o.register_hook(lambda g: moments.add(channels_last(module, g), pictures, per="picture"))
            return (o, *inputs[1:])

        stack.enter_context(_hook(model.get_submodule(a.out).register_forward_pre_hook(keep)))

    def _observe_linear(self, stack: ExitStack, model: nn.Module, site: LinearSite) -> None:
        narrow_in, width = site.in_features <= site.out_features, site.full_rank

        def keep_input(module: nn.Module, inputs: tuple) -> tuple | None:
            if channels_last(module, inputs[0]).shape[:-1].numel() % self.pictures:
                return None  # a table of positions, say: no rows of pictures
            x = inputs[0].view_as(inputs[0])
            x3 = _as_rows(channels_last(module, x), self.pictures)
            self._count(site, x3.shape[1])
            if narrow_in:
                self._of(site, "a", 1, width).add(x3, self.pictures, centred="all")
                self._on_gradient(x, site, width, module=module)
            else:  # the output's moments are kept below; the input's mean is all that is needed of it
                mean = self._of(site, "mean", site.in_features, 1)
                mean.sum += x3.detach().sum((0, 1)).double()[:, None]
                mean.rows += x3.shape[0] * x3.shape[1]
            return (x, *inputs[1:])

        def keep_output(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            rows = channels_last(module, output)
            if rows.shape[:-1].numel() % self.pictures:
                return
            self._of(site, "a", 1, width).add(_as_rows(rows, self.pictures), self.pictures, centred="all")
            self._on_gradient(output, site, width, module=module)

        module = model.get_submodule(site.path)
        stack.enter_context(_hook(module.register_forward_pre_hook(keep_input)))
        if not narrow_in:
            stack.enter_context(_hook(module.register_forward_hook(keep_output)))

    def _observe_hidden(self, stack: ExitStack, model: nn.Module, site: HiddenSite) -> None:
        down = self.sites.by_name.get(site.down)
        shared = (
            isinstance(down, LinearSite) and down.in_features > down.out_features
        )  # keeps the same gradient's moments

        def keep_units(module: nn.Module, inputs: tuple) -> None:
            rows = channels_last(module, inputs[0])
            if rows.shape[:-1].numel() % self.pictures == 0:
                h = _as_rows(rows, self.pictures)
                self._count(site, h.shape[1])
                self._of(site, "h", 1, site.full).add(h, self.pictures, centred="all")

        def keep_gradient(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            if channels_last(module, output).shape[:-1].numel() % self.pictures == 0:
                self._on_gradient(output, site, site.out_features, "g", module)

        module = model.get_submodule(site.down)
        stack.enter_context(_hook(module.register_forward_pre_hook(keep_units)))
        if not shared:
            stack.enter_context(_hook(module.register_forward_hook(keep_gradient)))

    def _count(self, site: Site, rows: float, pairs: float | None = None) -> None:
        """Note what flows through a site in a call; several calls in one forward add up."""
        again = site.name in self._counted
        self._counted.add(site.name)
        self.rows[site.name] = rows + (self.rows[site.name] if again else 0)
        if pairs is not None:
            self.pairs[site.name] = pairs + (self.pairs[site.name] if again else 0)

    def _on_gradient(self, x: Tensor, site: Site, width: int, side: str = "b", module: nn.Module | None = None) -> None:
        def keep(g: Tensor) -> None:
            g = g if module is None else channels_last(module, g)
            moments.add(_as_rows(g, pictures), pictures, per="picture")

        if self.gradients and x.requires_grad:
            moments, pictures = self._of_gradient(site, side, 1, width), self.pictures
            x.register_hook(keep)

    def check(self) -> None:
        for (name, _), moments in self.moments.items():
            if not moments.finite():
                raise NumericsError(
                    f"{name}: its activations or gradients hold NaN or infinite values on the calibration pictures"
                )

    def check_gradients(self) -> None:
        """Raises :class:`~comcat.errors.ModelError` if every gradient was zero: then nothing would cost anything."""
        if self._of_gradients and not any(moments.square.any() for moments in self._of_gradients.values()):
            raise ModelError(
                "no gradient reaches any layer: the model's output is the same whatever they compute, as with a head "
                "of zeros; train the head first, leave it out, or choose statistic 'activation', which needs none"
            )


class _hook:
    def __init__(self, handle) -> None:
        self.handle = handle

    def __enter__(self):
        return self.handle

    def __exit__(self, *_) -> None:
        self.handle.remove()


def _as_rows(x: Tensor, pictures: int) -> Tensor:
    return x.reshape(pictures, -1, x.shape[-1])
