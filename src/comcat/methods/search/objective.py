"""What a search minimises: cross-entropy, times what the cost is over the budget (Eq. 6)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...measure import model_output
from ...runs.processes import Processes
from ...tuning.data import Batch
from .settings import SearchOptions


class Objective:
    """The loss of a batch over all processes.

    Args:
        labeller: whose predictions stand in for labels; None where there are labels.
        goal: what the whole model may cost. fixed: the part of it that is no site's.
    """

    def __init__(
        self, settings: SearchOptions, processes: Processes, labeller: nn.Module | None, *, goal: float, fixed: float
    ) -> None:
        self.settings, self.processes, self.labeller = settings, processes, labeller
        self.outside = fixed if settings.penalised == "sites" else 0.0
        self.goal = goal - self.outside

    def penalty(self, cost: Tensor) -> Tensor:
        """``(cost / ε)^β`` by what the whole model costs, (). Over the sites alone ε is what is left for them."""
        ratio = (cost - self.outside) / self.goal
        return (ratio.clamp(min=1.0) if self.settings.penalty == "above" else ratio) ** self.settings.beta

    def cross_entropy(self, model: nn.Module, batch: Batch, count: float) -> Tensor:
        """This process's part of the mean over the ``count`` samples of the global batch, ()."""
        home = next(model.parameters())
        images, weights = batch.images.to(home.device), batch.weights.to(home.device)
        with torch.autocast(home.device.type, torch.bfloat16, enabled=self.settings.precision == "bf16"):
            output = model_output(model, images.to(home.dtype)).float()
            if self.labeller is None:
                assert batch.labels is not None
                target = batch.labels.to(home.device)
            else:
                with torch.no_grad():
                    target = model_output(self.labeller, images).float().softmax(-1)
            return (F.cross_entropy(output, target, reduction="none") * weights).sum() / max(count, 1.0)

    def over_processes(self, local: Tensor, cost: Tensor | None) -> tuple[Tensor, Tensor, float]:
        """The loss to go back from in this process; cross-entropy and loss over all. All processes must call it.

        The gradients of the processes are added up. Both factors of Eq. 6 have their part in them: cross-entropy
        differs from process to process, the penalty is the same in all. ``cost``: None where it cannot change.
        """
        crossed = local.detach().clone()
        self.processes.add_([crossed])
        if cost is None:
            return local, crossed, float(crossed)
        penalty = self.penalty(cost)
        loss = local * penalty.detach() + crossed * penalty / self.processes.count
        return loss, crossed, float(crossed * penalty.detach())
