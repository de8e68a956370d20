"""A plan says what each part of a model becomes; one function applies it, and can take it back.

A plan is data: frozen, JSON on disk, readable, versioned. Methods only propose plans; :func:`apply_` is the only thing that changes a
model's structure, and :meth:`Handle.revert` gives the old model back bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from .errors import PlanError, nearest
from .factors import Statistic, Weights
from .files import write_text
from .grad_mode import outside_inference_mode
from .hosts import find_sites, host_of
from .hosts.mounting import exchange
from .linalg import Factorization
from .modules.tensor import TENSOR_FORMS, check_shape, shape_parameters
from .replacing import Builder
from .sites import Site, Sites, Undo

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class SitePlan:
    """What one site becomes.

    Attributes:
        rank: columns kept in every head (product), or of each matrix (matrix form), or of the linear layer.
        full_rank: the rank of the site as it was; checked against the model.
        form: ``"product"`` (the default: thin factors of the product), or a baseline: ``"matrix"`` (each matrix of a pair apart), ``"tucker"``, ``"tensor_train"``.
        head_ranks: fewer columns for some heads, padded with zeros to ``rank``.
        shape: the reshape of a tensor form's weight, and its ranks, as that form states them.
    """

    rank: int
    full_rank: int
    form: str = "product"
    head_ranks: tuple[int, ...] | None = None
    shape: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Ranks by site, and how they were found. A site that is not named stays as it is."""

    sites: Mapping[str, SitePlan]
    made_by: Mapping[str, Any] = field(default_factory=dict)
    version: int = VERSION

    def __post_init__(self) -> None:
        object.__setattr__(self, "sites", MappingProxyType(dict(self.sites)))
        object.__setattr__(self, "made_by", MappingProxyType(dict(self.made_by)))

    def __reduce__(self):  # mapping proxies do not pickle
        return Plan.from_dict, (self.to_dict(),)

    def to_dict(self) -> dict:
        sites = {
            n: {k: v for k, v in asdict(s).items() if v not in (None, {}) and (k, v) != ("form", "product")}
            for n, s in self.sites.items()
        }
        return {"comcat_plan": self.version, "made_by": dict(self.made_by), "sites": sites}

    @classmethod
    def from_dict(cls, data: Any) -> Plan:
        """Raises PlanError where the data is not a plan; the message names the entry."""
        if not isinstance(data, dict) or "comcat_plan" not in data or not isinstance(data.get("sites"), dict):
            raise PlanError("not a plan: expected an object with 'comcat_plan' and 'sites'")
        if data["comcat_plan"] != VERSION:
            raise PlanError(f"got a plan of version {data['comcat_plan']!r}, expected {VERSION}")
        sites = {}
        for name, entry in data["sites"].items():
            known = set(SitePlan.__dataclass_fields__)
            if not isinstance(entry, dict) or not {"rank", "full_rank"} <= set(entry) <= known:
                raise PlanError(
                    f"{name}: got {entry!r}, expected an object with 'rank' and 'full_rank' out of {', '.join(sorted(known))}"
                )
            if not (_is_whole(entry["rank"]) and _is_whole(entry["full_rank"])):
                raise PlanError(
                    f"{name}: got ranks {entry['rank']!r} and {entry['full_rank']!r}, expected whole numbers"
                )
            heads = entry.get("head_ranks")
            if heads is not None and not (isinstance(heads, list | tuple) and all(map(_is_whole, heads))):
                raise PlanError(f"{name}: got head_ranks {heads!r}, expected a list of whole numbers")
            sites[name] = SitePlan(**{**entry, "head_ranks": None if heads is None else tuple(heads)})
        made_by = data.get("made_by", {})
        if not isinstance(made_by, dict):
            raise PlanError(f"got made_by {made_by!r}, expected an object")
        return cls(sites=sites, made_by=made_by)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise PlanError(f"not a plan: {error.msg} in line {error.lineno}") from None

    def save(self, path: str | Path) -> None:
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        path = Path(path)
        if not path.is_file():
            known = [p.name for p in path.parent.glob("*.json")] if path.parent.is_dir() else []
            raise PlanError(f"no plan at {str(path)!r}{nearest(path.name, known)}")
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"{path} cannot be read: {error}") from error

    def check(self, sites: Sites) -> None:
        """Raise where the plan does not fit the model's sites; the message names the first site that differs."""
        for name, entry in self.sites.items():
            site = sites[name]
            if entry.full_rank != site.full_rank:
                raise PlanError(
                    f"{name}: the plan was made for a full rank of {entry.full_rank}, the model has {site.full_rank}"
                )
            limit = site_rank_limit(site, entry.form)
            if not 1 <= entry.rank <= limit:
                raise PlanError(f"{name}: got rank {entry.rank}, expected 1 to {limit}")
            if entry.form not in ("product", "matrix", *TENSOR_FORMS):
                raise PlanError(
                    f"{name}: got form {entry.form!r}, expected one of product, matrix, {', '.join(TENSOR_FORMS)}"
                )
            if entry.form in TENSOR_FORMS:
                if site.kind != "linear":
                    raise PlanError(f"{name}: form {entry.form!r} is for linear layers")
                try:
                    check_shape(entry.form, entry.shape, site.in_features, site.out_features)
                except PlanError as error:
                    raise PlanError(f"{name}: {error}") from None
            other = self.sites.get(f"{site.path}:{'vo' if site.kind == 'qk' else 'qk'}")
            if (
                site.attention is not None
                and other is not None
                and (other.form == "matrix") != (entry.form == "matrix")
            ):
                raise PlanError(f"{name}: form 'matrix' is for QK and VO of a layer together")
            if entry.head_ranks is not None and (
                len(entry.head_ranks) != site.heads or not all(1 <= r <= entry.rank for r in entry.head_ranks)
            ):
                raise PlanError(
                    f"{name}: got head ranks {entry.head_ranks}, expected {site.heads} of 1 to {entry.rank}"
                )


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def site_rank_limit(site: Site, form: str = "product") -> int:
    """The largest rank a site can have in a form."""
    if form == "matrix" and site.kind != "linear":
        return min(site.in_features, site.out_features, site.heads * site.full_rank)
    return site.full_rank


def planned_parameters(site: Site, entry: SitePlan | None) -> int:
    """Parameters of a site as a plan has it; None for as it stands. Columns that pad a head's rank count, since they are stored."""
    if entry is None or entry.form == "product":
        return site.parameters(None if entry is None else entry.rank)
    if entry.form == "matrix":
        if site.kind == "linear":
            return entry.rank * (site.in_features + site.out_features) + site.biases
        return entry.rank * (site.in_features + site.out_features + 2 * site.heads * site.full_rank) + site.biases
    return shape_parameters(entry.form, entry.shape) + site.biases


class Handle:
    """What :func:`apply_` did to a model; :meth:`revert` takes it back."""

    def __init__(self, model: nn.Module, plan: Plan, undo: list[Undo]) -> None:
        self.model, self.plan, self._undo = model, plan, undo

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
    factorizations: Mapping[str, Factorization] | None = None,
    joint_refit: bool = True,
    weights: bool = True,
) -> Handle:
    """Make a model what a plan says, in place.

    Args:
        statistic: what errors are measured by: what :func:`comcat.calibrate` returned, or None for the weights alone.
        sites: the model's sites, if already found. factorizations: of these sites under this statistic, if already known.
        joint_refit: refit W_O over all heads where the statistic allows it.
        weights: False builds the structure alone, its new weights unset (for loading a state dict).

    Raises:
        PlanError, UnknownSite, UnsupportedSite: where the plan does not fit; the model is then unchanged.
    """
    sites = find_sites(model) if sites is None else sites
    plan.check(sites)
    statistic = Weights() if statistic is None else statistic
    build = Builder(model, statistic, factorizations or {}, joint_refit, weights)
    by_attention: dict[str, dict[str, tuple[Site, SitePlan]]] = {}
    undo: list[Undo] = []
    try:
        for name, entry in plan.sites.items():
            site = sites[name]
            if site.attention is not None:
                by_attention.setdefault(site.path, {})[site.kind] = (site, entry)
            else:
                undo.append(exchange(model, site.path, build.linear(site, entry)))
        for planned in by_attention.values():
            attention = next(iter(planned.values()))[0].attention
            assert attention is not None
            replacement = build.attention(attention, planned.get("qk"), planned.get("vo"))
            undo.append(host_of(attention).mount(model, attention, replacement))
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    return Handle(model, plan, undo)
