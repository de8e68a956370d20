"""Making a model what a plan says, and taking it back: the only thing that changes a model's structure."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from .factors import Spectrum, Statistic, Weights
from .forms import FORMS, Material, Planned, check_plan, site_for
from .grad_mode import outside_inference_mode
from .hosts import check_blocks, find_sites
from .plan import Plan
from .sites import Sites, Undo
from .wrappers import bare


class Handle:
    """What :func:`apply_` did to a model; :meth:`revert` takes it back.

    ``notes`` are sentences on what a user should know of it, as that the plan covers a part of the model only.
    """

    def __init__(self, model: nn.Module, plan: Plan, undo: list[Undo], notes: tuple[str, ...] = ()) -> None:
        self.model, self.plan, self.notes, self._undo = model, plan, notes, undo

    def revert(self) -> nn.Module:
        """Give the model back as it was, bit for bit: the very modules that stood there. A second call does nothing."""
        while self._undo:
            self._undo.pop()()
        return self.model


@outside_inference_mode
def apply_(
    model: nn.Module,
    plan: Plan,
    statistic: Statistic | None = None,
    *,
    sites: Sites | None = None,
    factorizations: Mapping[str, Spectrum] | None = None,
    joint_refit: bool = True,
    weights: bool = True,
) -> Handle:
    """Make a model what a plan says, in place.

    Args:
        statistic: what errors are measured by: what :func:`comcat.calibrate` returned, or None for the weights alone.
        sites: some of the model's sites, if already found; then it is not compared as a whole with the model that the
            plan was made for. factorizations: of these sites under this statistic, if already known.
        joint_refit: refit W_O over all heads where the statistic allows it.
        weights: False builds the structure alone, its new weights unset (for loading a state dict).

    Raises:
        PlanError, UnknownSite, UnsupportedSite: where the plan does not fit; the model is then unchanged.
    """
    model = bare(model)
    whole = sites is None
    sites = find_sites(model) if sites is None else sites
    check_plan(plan, sites, whole=whole)
    planned = [Planned(site_for(name, entry, sites), entry) for name, entry in plan.sites.items()]
    planned.sort(key=lambda p: p.site.kind == "tokens")  # last: some forms look at what became of the projections
    check_blocks(model, [p.site for p in planned])
    material = Material(
        statistic=Weights() if statistic is None else statistic,
        spectra=factorizations or {},
        joint_refit=joint_refit,
        fill=weights,
    )
    together: dict[str, list[Planned]] = {}
    for one in planned:
        together.setdefault(one.site.owner, []).append(one)
    undo: list[Undo] = []
    try:
        for group in together.values():
            undo.append(FORMS[group[0].entry.form].apply(model, group, material))
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    return Handle(model, plan, undo, coverage_notes(plan))


def coverage_notes(plan: Plan) -> tuple[str, ...]:
    """What there is to say where a plan was made for a part of a model."""
    made_for = plan.made_for
    if made_for is None or made_for.chosen is None:
        return ()
    count, whole = len(made_for.chosen), len(made_for.sites)
    return (f"The plan was made for {count} of the model's {whole} sites; the others stay as they are.",)
