"""The model under search: all candidates at once, the probabilities α, the master weights, and what updates them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ...forms.relax import relax_
from ...sites import Sites
from ..prepare import Prepared
from .candidates import start_near
from .schedule import Phase
from .settings import SearchSettings
from .space import Space


class Mixture:
    """A model whose sites are at full rank under soft masks (:func:`comcat.forms.relax.relax_`), with its optimizers.

    ``rank_optimizer`` updates α; ``weight_optimizer`` the weights, and is there from a phase on the weights until the
    channels are put in order anew.
    """

    def __init__(
        self, model: nn.Module, sites: Sites, space: Space, settings: SearchSettings, prepared: Prepared | None
    ) -> None:
        """Put a model under search, in place. Without ``prepared`` it is the structure alone, for :meth:`restore`."""
        self.model, self.sites, self.space, self.settings = model, sites, space, settings
        self._relax(prepared)
        if settings.start == "waterfill":
            choice = space.best(space.losses)
            with torch.no_grad():
                for name, logits in self.relaxation.logits():
                    logits.copy_(start_near(choice[name], len(logits)))
        self.rank_optimizer = self._new_rank_optimizer()
        self.weight_optimizer: torch.optim.Optimizer | None = None

    def _relax(self, prepared: Prepared | None) -> None:
        statistic, known = (None, None) if prepared is None else (prepared.statistic, prepared.factorizations)
        self.relaxation = relax_(self.model, self.sites, self.space.ranks(), statistic, known)

    def _new_rank_optimizer(self) -> torch.optim.Optimizer:
        s, alphas = self.settings, [p for _, p in self.relaxation.logits()]
        return torch.optim.AdamW(alphas, lr=s.rank_lr, weight_decay=s.rank_weight_decay)

    def _new_weight_optimizer(self) -> torch.optim.Optimizer:
        weights = [p for _, p in self.relaxation.weights()]
        return torch.optim.AdamW(weights, lr=self.settings.weight_lr, weight_decay=self.settings.weight_decay)

    # ---------------------------------------------------------------- where it stands

    def likeliest(self) -> dict[str, int]:
        """The choice of the candidates of largest α."""
        return {name: soft.likeliest for name, soft in self.relaxation.soft.items()}

    def probabilities(self) -> dict[str, Tensor]:
        """(candidates,) a site."""
        return {name: soft.probabilities() for name, soft in self.relaxation.soft.items()}

    def losses(self) -> dict[str, list[float]]:
        """What α says that every candidate loses: −log softmax(α)."""
        return {n: (-logits.detach().double().log_softmax(-1)).tolist() for n, logits in self.relaxation.logits()}

    def decide(self) -> None:
        """Fix the ranks at the likeliest."""
        self.relaxation.decide(self.space.ranks_of(self.likeliest()))

    def leave_open(self) -> None:
        """Let the probabilities speak."""
        self.relaxation.decide(None)

    # ---------------------------------------------------------------- phases

    def begin_weights(self) -> None:
        """Begin a phase on the weights, at the likeliest ranks."""
        self.decide()
        self.weight_optimizer = self._new_weight_optimizer()

    def reorder(self, measure: Callable[[], Prepared]) -> None:
        """Put the channels in order anew; α and its moments stay.

        ``measure`` is called while the model is an ordinary dense one, with the weights as they are now.
        """
        logits = {name: p.detach().clone() for name, p in self.relaxation.logits()}
        moments = self.rank_optimizer.state_dict()
        self.relaxation.fold()
        self._relax(measure())
        with torch.no_grad():
            for name, p in self.relaxation.logits():
                p.copy_(logits[name])
        self.rank_optimizer = self._new_rank_optimizer()
        self.rank_optimizer.load_state_dict(moments)
        self.weight_optimizer = None

    def learning(self, phase: Phase) -> torch.optim.Optimizer:
        """The optimizer of a phase, whose parameters alone take gradients from now on."""
        for _, p in self.relaxation.weights():
            p.requires_grad_(phase == "weights")
        for _, p in self.relaxation.logits():
            p.requires_grad_(phase == "ranks")
        optimizer = self.rank_optimizer if phase == "ranks" else self.weight_optimizer
        assert optimizer is not None
        return optimizer

    # ---------------------------------------------------------------- checkpoints

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All to go on with."""
        ranks = {f"logits/{name}": p.detach() for name, p in self.relaxation.logits()}
        ranks |= {f"center/{name}": center for name, center in self.relaxation.centers.items()}
        tensors = {
            "model": dict(self.model.state_dict()),
            "ranks": ranks,
            "rank_optimizer": _moments(self.rank_optimizer),
        }
        if self.weight_optimizer is not None:
            tensors["weight_optimizer"] = _moments(self.weight_optimizer)
        return tensors

    def restore(self, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take up what :meth:`tensors` gave."""
        self.model.load_state_dict(dict(tensors["model"]))
        with torch.no_grad():
            for name, p in self.relaxation.logits():
                p.copy_(tensors["ranks"][f"logits/{name}"])
            for name, center in self.relaxation.centers.items():
                center.copy_(tensors["ranks"][f"center/{name}"])
        _set_moments(self.rank_optimizer, tensors["rank_optimizer"])
        if "weight_optimizer" in tensors:
            self.begin_weights()
            assert self.weight_optimizer is not None
            _set_moments(self.weight_optimizer, tensors["weight_optimizer"])


def _moments(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimizer by the number of the parameter."""
    state = optimizer.state_dict()["state"]
    return {f"{i}/{k}": v for i, entry in state.items() for k, v in entry.items()}


def _set_moments(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        number, key = name.split("/")
        state.setdefault(int(number), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
