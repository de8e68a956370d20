"""A block that runs on fewer tokens, behind the block's own signature and name.

The block keeps its weights, its children and their names, its hooks and its class's base: its class becomes one that
reduces the tokens, calls the block's own forward, and hands its update back to all tokens (:mod:`comcat.tokens`). So
the stream between blocks holds the whole grid: dense heads, recorded hidden states and pooled outputs see what they
saw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import zip_longest
from threading import get_ident
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_leaves

from ..errors import ModelError
from ..tokens import Chosen, Groups, Windows, exporting, highest, look_alikes

COMPARED = 128
"""Channels by which tokens are compared; more find hardly better pairs, and cost more."""

_Reduction = Groups | Windows | Chosen


class TokenReduction(nn.Module):
    """How a block's tokens become fewer; a child of the block, so that it is seen when the model is printed.

    Args:
        keep, full: of ``full`` tokens of the grid, ``keep`` are run; of another number the same share.
        prefix: tokens beside the grid's (class, registers, detection) that pass by, of which ``suffix`` come last;
            inside, all of them are in front. stream: the name of the block's first argument.
        residual: the update is added to what each token was; without, tokens that were merged leave as one.
        names: the block's other arguments, in their order.
    """

    names: tuple[str, ...]

    def __init__(
        self,
        keep: int,
        full: int,
        prefix: int,
        stream: str,
        *,
        residual: bool = True,
        names: Sequence[str] = (),
        suffix: int = 0,
    ) -> None:
        super().__init__()
        self.names, self.suffix = tuple(names), suffix
        self.keep, self.full, self.prefix, self.stream, self.residual = keep, full, prefix, stream, residual

    @property
    def comcat_identity(self) -> str:
        """All that it was made with, as text: what runs know it by (:func:`comcat.runs.state.fingerprint`)."""
        made = {
            name: value for name, value in vars(self).items() if name[0] != "_" and name not in ("training", "seen")
        }
        return f"{type(self).__name__} {sorted(made.items())}"

    def tokens(self, x: Tensor) -> int:
        """How many tokens there are behind those in front; torch.jit.trace makes tensors of sizes."""
        rows = x.shape[1]
        return (int(rows) if isinstance(rows, Tensor) else rows) - self.prefix

    def count(self, tokens: int) -> int:
        """How many of so many tokens are run."""
        return self.keep if tokens == self.full else max(1, round(tokens * self.keep / self.full))

    def reduction(self, block: nn.Module, x: Tensor) -> _Reduction | None:
        """What becomes of the tokens ``x`` (batch, prefix + tokens, channels); None where all of them run."""
        raise NotImplementedError

    def bias(self, reduction: Any) -> tuple[str, Tensor] | None:
        """What is added to the logits of the reduced tokens, (batch, prefix + count), with its argument's name."""
        return None

    def forward(self, block: nn.Module, run: Callable[..., Any], args: tuple, kwargs: Mapping[str, Any]) -> Any:
        """Run a block on fewer tokens and hand what it did to all of them."""
        x = args[0] if args else kwargs[self.stream]
        if isinstance(x, torch.fx.Proxy):
            raise ModelError(
                f"torch.fx cannot trace a {_kind(block)} on fewer tokens, because how many run depends on the "
                "picture's size; use torch.export, or take the merges back by handle.revert()"
            )
        rest = args[1:], {name: value for name, value in kwargs.items() if name != self.stream or args}
        if exporting():
            rest = self._without_masks(*rest)
        x = self._last_behind_first(x)
        reduction = self.reduction(block, x)
        if reduction is None:
            return run(*args, **kwargs)
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(rest)):
            raise ModelError(
                f"got a tensor beside the tokens of a {_kind(block)} (as an attention mask), expected none: "
                "it has a row for every token, and the block runs on fewer; take the merges back by handle.revert()"
            )
        few = self._reduced(x, reduction)
        named: dict[str, Any] = dict(rest[1])
        if (bias := self.bias(reduction)) is not None:
            name, sizes = bias
            named |= dict(zip(self.names, rest[0], strict=False)) | {name: sizes[:, None, None].to(x.dtype)}
            rest = (), named
        said = run(few, *rest[0], **named)
        after = said[0] if isinstance(said, tuple) else said
        whole = self._last_again(self._restored(x, few, after, reduction))
        return (whole, *said[1:]) if isinstance(said, tuple) else whole

    def _last_behind_first(self, x: Tensor) -> Tensor:
        """Tokens with those of the suffix right behind the others in front; blocks do not care in which order."""
        if not self.suffix:
            return x
        front = self.prefix - self.suffix
        return torch.cat((x[:, :front], x[:, -self.suffix :], x[:, front : -self.suffix]), 1)

    def _last_again(self, x: Tensor) -> Tensor:
        """The order that the host has them in."""
        if not self.suffix:
            return x
        front = self.prefix - self.suffix
        return torch.cat((x[:, :front], x[:, self.prefix :], x[:, front : self.prefix]), 1)

    def _without_masks(self, args: tuple, kwargs: Mapping[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """The block's other arguments without masks. An exported model gets pictures alone, so nothing is hidden, and a
        mask is one of ones that its host makes while it is traced, where it makes none else (transformers).
        """

        def kept(name: str, value: Any) -> Any:
            return None if isinstance(value, Tensor) and "mask" in name else value

        placed = tuple(kept(name, value) for name, value in zip_longest(self.names[: len(args)], args, fillvalue=""))
        return placed, {name: kept(name, value) for name, value in kwargs.items()}

    def _reduced(self, x: Tensor, reduction: _Reduction) -> Tensor:
        p = self.prefix
        if isinstance(reduction, Groups):  # tokens in front are among the groups
            return reduction.mean(x)
        if isinstance(reduction, Windows) and _writes(x):
            few = x.new_empty(x.shape[0], p + reduction.count, x.shape[2])
            few[:, :p] = x[:, :p]
            reduction.mean(x[:, p:], out=few[:, p:])
            return few
        return torch.cat((x[:, :p], reduction.mean(x[:, p:])), 1)

    def _restored(self, x: Tensor, few: Tensor, after: Tensor, reduction: _Reduction) -> Tensor:
        if isinstance(reduction, Groups):
            return reduction.added(x, after - few) if self.residual else reduction.spread(after)
        p = self.prefix
        if not self.residual and not isinstance(reduction, Chosen):
            return torch.cat((after[:, :p], reduction.spread(after[:, p:])), 1)
        update = after[:, p:] - few[:, p:]
        if isinstance(reduction, Windows) and _writes(x, after):
            whole = torch.empty_like(x)
            whole[:, :p] = after[:, :p]
            reduction.added(x[:, p:], update, out=whole[:, p:])
            return whole
        return torch.cat((after[:, :p], reduction.added(x[:, p:], update)), 1)

    def extra_repr(self) -> str:
        return f"{self.keep} of {self.full} tokens"


def _writes(x: Tensor, *others: Tensor) -> bool:
    """Whether parts of a tensor may be written where they belong, which saves a copy of all: nobody learns, traces a
    graph (whose compiler saves the copy by itself) or differentiates forwards or transforms by torch.func, which cannot
    write; and all is of one type.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    transforms: Any = torch._C._functorch  # type: ignore[attr-defined]
    if transforms.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return False
    return all(other.dtype == x.dtype for other in others)


class SimilarTokens(TokenReduction):
    """Tokens that look alike run as one (:func:`comcat.tokens.look_alikes`).

    Args:
        mask: the argument by which the block takes an additive attention mask. Groups then weigh as many tokens as they
            hold, by the logarithm of their size (Bolya et al. 2023, Eq. 1). None: every group weighs as one.
        norm: the block's own norm, if tokens are to be compared by what it makes of them; None: by themselves.
    """

    def __init__(self, *args: Any, mask: str | None = None, norm: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.mask, self.norm = mask, norm

    def reduction(self, block: nn.Module, x: Tensor) -> Groups | None:
        tokens = self.tokens(x)
        count = self.count(tokens)
        if count >= tokens:
            return None
        metric = x.detach()
        if self.norm is not None:
            with torch.no_grad():
                metric = block.get_submodule(self.norm).forward(metric)  # no one's hooks: the block will call it itself
        return look_alikes(metric[:, self.prefix :, :COMPARED], count, self.prefix)

    def bias(self, reduction: Groups) -> tuple[str, Tensor] | None:
        return None if self.mask is None else (self.mask, reduction.sizes().log())


class GridTokens(TokenReduction):
    """Neighbours on the grid run as one (:class:`comcat.tokens.Windows`).

    Args:
        window: rows and columns of a window. grid: rows and columns at the size that the model was made for.
    """

    def __init__(self, *args: Any, window: tuple[int, int], grid: tuple[int, int], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.window, self.grid = window, grid
        self.seen: dict[Any, tuple[int, int]] = {}  # of the last picture, and by thread

    def reduction(self, block: nn.Module, x: Tensor) -> Windows | None:
        if self.window == (1, 1):
            return None
        return Windows(self.grid_of(self.tokens(x)), self.window)

    def grid_of(self, tokens: int) -> tuple[int, int]:
        """Rows and columns of so many tokens: those of the picture, where its patches were seen; else those that the
        model was made for, else a square.
        """
        last = self.seen.get("grid")
        if not torch.compiler.is_compiling():
            last = self.seen.get(get_ident(), last)
        if last is not None:
            rows, columns = last
            if rows * columns == tokens:
                return rows, columns
            raise ModelError(
                f"got {tokens} tokens of a picture of {rows} × {columns} patches, expected all of them: some were left "
                "out, as by a mask or patch dropout, or the plan is of a model with other tokens in front; "
                "how='similar' needs no grid"
            )
        side = round(tokens**0.5)
        for rows, columns in (self.grid, (side, side)):
            if rows * columns == tokens:
                return rows, columns
        raise ModelError(
            f"got {tokens} tokens, expected {self.grid[0]} × {self.grid[1]} or a square: the grid of this picture is "
            f"unknown"
        )

    def watch(self, patches: nn.Module) -> Any:
        """Learn each picture's rows and columns from the convolution that cuts it into patches; the hook's handle."""
        return patches.register_forward_hook(_Watch(self.seen))

    def extra_repr(self) -> str:
        return f"windows of {self.window[0]} × {self.window[1]}, {super().extra_repr()}"


class _Watch:
    """Writes down the height and width of what a convolution puts out, for each thread that it runs in."""

    def __init__(self, seen: dict[Any, tuple[int, int]]) -> None:
        self.seen = seen

    def __call__(self, module: nn.Module, inputs: tuple, output: Tensor) -> None:
        if torch.compiler.is_compiling():  # knows no threads, and what they saw before is no longer the last
            self.seen.clear()
        else:
            self.seen[get_ident()] = (output.shape[-2], output.shape[-1])
        self.seen["grid"] = (output.shape[-2], output.shape[-1])


class ChosenTokens(TokenReduction):
    """The tokens that the class token looks at most run, the others rest (a baseline, as in EViT, Liang et al. 2022).

    Its attention is computed by calling the block's own projections once more, so this saves less time than merging.

    Args:
        query, key: the block's child that projects, with its first and last row; None: tokens are chosen at random,
            anew for every picture. heads: of the attention. scale: of its logits. norm: what comes before it, or None.
    """

    def __init__(
        self,
        *args: Any,
        query: tuple[str, int, int] | None = None,
        key: tuple[str, int, int] | None = None,
        heads: int = 1,
        scale: float = 1.0,
        norm: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.query, self.key, self.heads, self.scale, self.norm = query, key, heads, scale, norm

    def reduction(self, block: nn.Module, x: Tensor) -> Chosen | None:
        tokens = self.tokens(x)
        count = self.count(tokens)
        if count >= tokens:
            return None
        if self.query is None:
            return highest(torch.rand(x.shape[0], tokens, device=x.device), count)
        with torch.no_grad():
            return highest(self._attention_of_class(block, x)[:, self.prefix :], count)

    def _attention_of_class(self, block: nn.Module, x: Tensor) -> Tensor:
        """How much the class token looks at every token, mean over heads: (batch, tokens)."""
        x = x if self.norm is None else block.get_submodule(self.norm).forward(x)
        q, k = (self._heads(block, place, rows) for place, rows in ((self.query, x[:, :1]), (self.key, x)))
        return torch.einsum("bqhd,bnhd->bhn", q, k).mul(self.scale).softmax(-1).mean(1)

    def _heads(self, block: nn.Module, place: tuple[str, int, int] | None, rows: Tensor) -> Tensor:
        path, start, stop = place  # type: ignore[misc]
        return block.get_submodule(path).forward(rows)[..., start:stop].unflatten(-1, (self.heads, -1))


class RunsOnFewerTokens:
    """Mixed into the class of a block whose tokens are reduced by its child ``token_reduction``."""

    token_reduction: TokenReduction

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.token_reduction(self, super().forward, args, kwargs)  # type: ignore[misc]

    def __prepare_scriptable__(self) -> Any:
        raise ModelError(
            f"TorchScript cannot compile a {_kind(self)} on fewer tokens, as its forward is chosen at run time; use "
            "torch.export or torch.jit.trace, or take the merges back by handle.revert()"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:  # a class made at run time is not found by its name
        return _made, (type(self).__mro__[2],), self.__dict__


def _kind(block: Any) -> str:
    """What the library calls the block's class."""
    return type(block).__mro__[2].__name__


def _made(base: type[nn.Module]) -> nn.Module:
    made = fewer_tokens(base)
    return made.__new__(made)  # type: ignore[return-value]


@cache
def fewer_tokens(base: type[nn.Module]) -> type[nn.Module]:
    """The class of a block that runs on fewer tokens, given the block's own."""
    return type(f"{base.__name__}OnFewerTokens", (RunsOnFewerTokens, base), {"__module__": base.__module__})  # type: ignore[return-value]
