"""What sites can become: one file a form. Nothing else in the package asks which form an entry is of."""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import PlanError, nearest
from ..modules.tensor import TENSOR_FORMS
from ..plan import Plan, SitePlan
from ..sites import AnySite, ProductSite, Sites
from .matrix import Matrix
from .product import Product
from .protocol import Flow, Form, Material, Planned
from .tensor import Tensor
from .tokens import Tokens, site_of_entry
from .units import Units

__all__ = [
    "FORMS",
    "Flow",
    "Form",
    "Material",
    "Planned",
    "check_plan",
    "largest",
    "macs_of",
    "parameters_of",
    "site_for",
]

FORMS: Mapping[str, Form] = {
    form.name: form
    for form in (
        Product(),
        Matrix(),
        *(Tensor(name) for name in TENSOR_FORMS),
        Units(),
        *(Tokens(name) for name in ("similar", "grid", "drop")),
    )
}
"""Every form by the name that plans give it."""


def parameters_of(site: AnySite, entry: SitePlan | None) -> float:
    """Parameters of a site as a plan has it; None for as it stands."""
    return float(site.parameters()) if entry is None else FORMS[entry.form].parameters(site, entry)


def macs_of(site: AnySite, entry: SitePlan | None, flow: Flow) -> float:
    """Multiply-accumulates of a site a picture; None for as it stands."""
    return site.macs(None, flow.rows, flow.pairs) if entry is None else FORMS[entry.form].macs(site, entry, flow)


def largest(site: AnySite, form: str = "product") -> int:
    """The largest ``keep`` that a site can have in a form."""
    if form == "matrix" and isinstance(site, ProductSite):
        return min(site.in_features, site.out_features, site.heads * site.full_rank)
    return site.full


def check_plan(plan: Plan, sites: Sites, *, whole: bool = True) -> None:
    """Raise where a plan does not fit a model's sites; the message names the first site that differs.

    Args:
        whole: ``sites`` are all that the model has, so that the model itself can be compared with the one the plan was
            made for.

    Raises:
        PlanError, UnknownSite, UnsupportedSite.
    """
    if not isinstance(plan, Plan):
        raise PlanError(f"got {plan!r} for a plan, expected a comcat.Plan; comcat.Plan.load(file) reads one")
    if whole and plan.made_for is not None:
        plan.made_for.check(sites)
    changed: dict[str, AnySite] = {}
    forms: dict[str, tuple[str, str]] = {}
    for name, entry in plan.sites.items():
        site = site_for(name, entry, sites)
        _check_entry(site, entry)
        for path in site.modules:
            if (other := changed.setdefault(path, site)).owner != site.owner:
                raise PlanError(f"{other.name} and {name} both change {path}: a plan may do one of the two")
        first, form = forms.setdefault(site.owner, (name, entry.form))
        if form != entry.form:
            raise PlanError(f"{name}: got form {entry.form!r} beside {form!r} of {first}, expected one form for both")


def site_for(name: str, entry: SitePlan, sites: Sites) -> AnySite:
    """The site that an entry of a plan is about. Tokens are found by running a model, so there the entry says it all.

    Raises:
        PlanError: for an entry that tells too little. UnknownSite, UnsupportedSite: for one that the model has not.
    """
    form = FORMS.get(entry.form)
    return site_of_entry(name, entry) if form is not None and "tokens" in form.kinds else sites[name]


def _check_entry(site: AnySite, entry: SitePlan) -> None:
    name, form = site.name, FORMS.get(entry.form)
    of = {"units": "number of units", "tokens": "number of tokens"}.get(site.kind, "rank")
    if entry.full != site.full:
        raise PlanError(f"{name}: the plan was made for a full {of} of {entry.full}, the model has {site.full}")
    if form is None:
        raise PlanError(
            f"{name}: got form {entry.form!r}, expected one of {', '.join(FORMS)}{nearest(entry.form, FORMS)}"
        )
    if site.kind not in form.kinds:
        raise PlanError(f"{name}: form {entry.form!r} is for {', '.join(sorted(form.kinds))}, this site is {site.kind}")
    limit = largest(site, entry.form)
    if not 1 <= entry.keep <= limit:
        raise PlanError(f"{name}: got {of} {entry.keep}, expected 1 to {limit}")
    form.check(Planned(site, entry))
