"""What is compared with: the paper's own baselines (Xiao et al. 2023, Tables 1 and 4), and later published methods.

Each proposes a plan that saves a share of the parameters of some sites, every site keeping the same share of its own.
Ranks grow together; the last steps go to the sites in the order of the model, until the next one would not fit. So the
budget is met within one rank step of one site, and ranks of equal sites differ by one step at most.

``total`` is what ``reduce`` is a share of: the parameters of all attention, of all feed-forward layers, of the whole
model. By default it is the parameters of the sites that the plan is for, biases included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from torch import nn

from ...errors import SettingsError
from ...factors import PaperCode, Statistic, Unilateral, Weights
from ...plan import Plan
from ...sites import Sites
from .layerwise import Kind, Layerwise, layerwise
from .matrices import matrix_plan, uniform_plan
from .parts import ffn_sites, found_sites, hidden_sites, mha_sites, some
from .pruning import Scored, scored_units
from .tensors import near_equal, tensor_train_plan, tucker_plan

__all__ = [
    "BASELINES",
    "Baseline",
    "Layerwise",
    "Scored",
    "ffn_sites",
    "hidden_sites",
    "layerwise",
    "matrix_plan",
    "mha_sites",
    "near_equal",
    "tensor_train_plan",
    "tucker_plan",
    "uniform_plan",
]

_PARTS: Mapping[str, tuple[Callable[[Sites], Sites], str]] = {
    "mha": (mha_sites, "attention whose products can shrink"),
    "ffn": (ffn_sites, "feed-forward layer that can shrink"),
    "units": (hidden_sites, "feed-forward whose hidden units can be chosen"),
}


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A way to propose plans, what part of a model it is for, and the statistic to apply its plans with.

    ``baseline(model, sites, reduce, total)`` picks that part's sites itself: give it all of the model's. Where it
    ``needs_pictures``, the statistic comes from :meth:`measured`, and is given to the call as well.
    """

    about: str
    part: Literal["mha", "ffn", "units"]
    propose: Callable[..., Plan]
    statistic: Statistic = field(default_factory=Weights)
    measure: Callable[..., Statistic] | None = None

    @property
    def needs_pictures(self) -> bool:
        return self.measure is not None

    def sites(self, sites: Sites) -> Sites:
        return _PARTS[self.part][0](sites)

    def measured(self, model: nn.Module, sites: Sites, batches: Iterable, *, seed: int = 0) -> Statistic:
        """The statistic of a baseline that looks at pictures (which are gone through twice if need be)."""
        return self.statistic if self.measure is None else self.measure(model, self.sites(sites), batches, seed=seed)

    def __call__(
        self,
        model: nn.Module,
        sites: Sites | None,
        reduce: float,
        total: float | None = None,
        statistic: Statistic | None = None,
    ) -> Plan:
        chosen = some(self.sites(found_sites(model, sites)), _PARTS[self.part][1])
        if self.needs_pictures and statistic is None:
            raise SettingsError(
                "this baseline looks at pictures: pass statistic=baseline.measured(model, sites, batches)"
            )
        seen = {"statistic": statistic} if self.needs_pictures else {}
        return self.propose(model, chosen, reduce, total, **seen)


def _layerwise(kind: Kind, how: str) -> dict[str, Baseline]:
    """A layerwise method for both parts of a model."""
    measure: Any = partial(layerwise, kind)
    attention = Baseline(about=f"each attention matrix {how}", part="mha", propose=matrix_plan, measure=measure)
    feed_forward = Baseline(about=f"each feed-forward matrix {how}", part="ffn", propose=uniform_plan, measure=measure)
    return {f"matrix-{kind}": attention, kind: feed_forward}


BASELINES: dict[str, Baseline] = {
    "matrix": Baseline(about="SVD of each attention matrix", part="mha", propose=matrix_plan),
    "product": Baseline(about="SVD of each head's product", part="mha", propose=uniform_plan),
    "paper-code": Baseline(
        about="SVD of each head's product, biases zeroed",
        part="mha",
        propose=partial(uniform_plan, statistic=PaperCode()),
        statistic=PaperCode(),
    ),
    "unilateral": Baseline(
        about="SVD of W_K and W_O of each head",
        part="mha",
        propose=partial(uniform_plan, statistic=Unilateral()),
        statistic=Unilateral(),
    ),
    "svd": Baseline(about="SVD of each feed-forward matrix", part="ffn", propose=uniform_plan),
    **_layerwise("fwsvd", "by the Fisher information of its rows"),
    **_layerwise("svd-llm", "whitened by its input"),
    **_layerwise("feature-pca", "by the principal components of its output"),
    "tucker": Baseline(about="Tucker form of each feed-forward matrix", part="ffn", propose=tucker_plan),
    "tucker-4": Baseline(
        about="Tucker form of each feed-forward matrix as a tensor of order 4",
        part="ffn",
        propose=partial(tucker_plan, order=4),
    ),
    "tensor-train": Baseline(about="two-core train of each feed-forward matrix", part="ffn", propose=tensor_train_plan),
    "magnitude": Baseline(
        about="hidden units of small weights cut",
        part="units",
        propose=partial(uniform_plan, form="units", statistic=Scored("magnitude")),
        statistic=Scored("magnitude"),
    ),
    "magnitude-refit": Baseline(
        about="hidden units of small weights cut, the rest refitted",
        part="units",
        propose=partial(uniform_plan, form="units"),
        measure=partial(scored_units, "magnitude", refit=True),
    ),
    "taylor": Baseline(
        about="hidden units of small first-order effect on the loss cut",
        part="units",
        propose=partial(uniform_plan, form="units"),
        measure=partial(scored_units, "taylor"),
    ),
    "taylor-refit": Baseline(
        about="hidden units of small first-order effect on the loss cut, the rest refitted",
        part="units",
        propose=partial(uniform_plan, form="units"),
        measure=partial(scored_units, "taylor", refit=True),
    ),
}
"""Baselines by name. Each entry is callable: ``BASELINES["matrix"](model, sites, 0.2)`` is a plan."""
