"""What closing channels did is taken over by those that stay: the closed form's refit, spread over the closing.

A layer reads channels z with mean μ and covariance C. Marked channels R are predicted from those that stay, K, by
``z_R ≈ μ_R + B (z_K − μ_K)`` with ``B = C[R, K] C[K, K]⁻¹``. While R closes, what the layer loses of ``W_R z_R`` goes
into ``W_K`` and the bias. Once R is shut, all of it is there: without any training that is the refit of the closed form
(:func:`comcat.linalg.refit_units`). Hidden units are read so, and the outputs of heads; logits are not linear in Q and
K, so channels of QK have no stand-ins.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...linalg import refit_units
from ...modules.gates import Gate
from ...sites import HiddenSite, ProductSite, Site, Sites, channels_last, part
from ...statistics import examples_of, show
from ...statistics.moments import Moments


@dataclass(frozen=True)
class StandIn:
    """How the marked channels of one site are predicted from the others.

    Attributes:
        weights: B (marked, kept). mean: μ (channels,), of all heads. opening: g of the marked when this was measured,
            (marked,). kept, marked: positions among the channels of all heads; what was shut by then is in neither.
    """

    weights: Tensor
    mean: Tensor
    opening: Tensor
    kept: Tensor
    marked: Tensor

    @torch.no_grad()
    def take_over_(self, reader: nn.Linear, before: Tensor, after: Tensor, rest: Tensor | None) -> None:
        """Let a layer make up for gates that have moved, in place.

        Args:
            before, after: g of all channels (channels,). rest: where shut channels are, (channels,), or zero.
        """
        moved = (before - after)[self.marked].double()
        share = torch.where(self.opening > 0, moved / self.opening.clamp_min(1e-12), 0.0)
        if not share.any():
            return
        weight = reader.weight
        matrix = weight.flatten(1)  # of a 1×1 convolution as well; a view
        lost = matrix[:, self.marked].double() * share  # (out, marked)
        shift = self.mean[self.marked] - self.weights @ self.mean[self.kept]
        shift = shift if rest is None else shift - rest.double()[self.marked]
        matrix[:, self.kept] += (lost @ self.weights).to(weight)
        reader.bias.add_((lost @ shift).to(weight))


def reader_of(model: nn.Module, site: Site) -> nn.Linear | None:
    """The layer that reads a site's channels, where it can make up for them: where it has a bias."""
    if isinstance(site, HiddenSite):
        found = part(model, site.down)
    elif isinstance(site, ProductSite) and site.kind == "vo":
        found = part(model, site.attention.out)
    else:
        return None
    return found if found.bias is not None else None


def stand_ins(
    model: nn.Module, sites: Sites, gates: Mapping[str, Gate], marked: Mapping[str, Tensor], batches: Iterable
) -> dict[str, StandIn]:
    """Measure what the readers of a gated model read, and how its marked channels can be told from the others.

    Args:
        marked: masks (heads, channels) a site.
    """
    readers = {name: reader for name, site in sites.items() if (reader := reader_of(model, site)) is not None}
    closing = {name: (marked[name] & (gates[name].opening != 0)).flatten() for name in readers}
    readers = {name: reader for name, reader in readers.items() if closing[name].any()}
    seen = _read(model, readers, batches) if readers else {}
    return {n: _stand_in(moments, gates[n], marked[n].flatten(), closing[n]) for n, moments in seen.items()}


def _read(model: nn.Module, readers: Mapping[str, nn.Linear], batches: Iterable) -> dict[str, Moments]:
    """Moments of what some layers read, over pictures."""
    moments = {n: Moments(1, r.weight.shape[1], r.weight.device) for n, r in readers.items()}
    pictures = 0

    def begin(count: int) -> None:
        nonlocal pictures
        pictures = count

    def recorder(name: str):
        def keep(module: nn.Module, inputs: tuple) -> None:
            rows = channels_last(module, inputs[0])
            moments[name].add(rows.flatten(1, -2) if rows.ndim > 3 else rows, pictures, centred="all")

        return keep

    with ExitStack() as stack:
        for name, reader in readers.items():  # after the gate, which was there first
            stack.callback(reader.register_forward_pre_hook(recorder(name)).remove)
        home = next(model.parameters())
        show(model, examples_of(model, batches), home.device, begin, lambda: None, None)
    return moments


def _stand_in(seen: Moments, gate: Gate, marked: Tensor, closing: Tensor) -> StandIn:
    here, away = (~marked).nonzero().flatten(), closing.nonzero().flatten()
    chosen = torch.zeros(len(away), len(marked), dtype=torch.float64, device=marked.device)
    chosen[torch.arange(len(away)), away] = 1.0
    weights = refit_units(seen.shrunk_to_diagonal()[0], chosen, here)
    opening = gate.opening.detach().flatten().double()[away]
    return StandIn(weights=weights, mean=seen.mean, opening=opening, kept=here, marked=away)
