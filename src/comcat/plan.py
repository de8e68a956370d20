"""A plan says what each part of a model becomes. It is data: frozen, JSON on disk, readable by a person, versioned.

Methods only propose plans; :func:`comcat.apply_` is the only thing that changes a model's structure.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from types import MappingProxyType
from typing import Any

from .errors import PlanError, in_short, nearest
from .files import parsed, write_text
from .sites import HiddenSite, Site, Sites

VERSION = 2
_OLD = ("rank", "full_rank", "head_ranks", "shape")


@dataclass(frozen=True, init=False)
class SitePlan:
    """What one site becomes.

    Attributes:
        form: ``"product"`` (thin factors), ``"units"`` (fewer hidden units), ``"similar"`` or ``"grid"`` (a block runs
            on merged tokens), or a baseline: ``"drop"`` (a block runs on some tokens), ``"matrix"`` (each matrix of a
            pair apart), ``"tucker"``, ``"tensor_train"``.
        keep: what stays: columns in every head or of the linear layer, hidden units, or tokens of the grid.
        full: what there was, checked against the model.
        details: what else a form needs, as JSON holds it. ``head_ranks`` (product): fewer columns for some heads,
            padded with zeros to ``keep``. ``shape`` (tensor forms): how the weight is seen, and its ranks. ``tokens``
            (tokens): what a reduction needs to know of the block.
    """

    form: str
    keep: int
    full: int
    details: Mapping[str, Any] = field(default_factory=dict)

    def __init__(
        self,
        *,
        keep: int | None = None,
        full: int | None = None,
        form: str = "product",
        details: Mapping[str, Any] | None = None,
        **old: Any,
    ) -> None:
        if unknown := [name for name in old if name not in _OLD]:
            raise TypeError(f"SitePlan takes no {unknown[0]!r}")
        if old:
            _warn_of_old("SitePlan(rank=, full_rank=, head_ranks=, shape=)", "SitePlan(keep=, full=, details=)")
        keep, full = old.get("rank", keep), old.get("full_rank", full)
        if keep is None or full is None:
            raise TypeError("SitePlan needs keep and full")
        if not (isinstance(keep, Integral) and isinstance(full, Integral)):
            raise PlanError(f"got keep {in_short(keep)} and full {in_short(full)}, expected whole numbers")
        keep, full = int(keep), int(full)
        more = {name: old[name] for name in ("head_ranks", "shape") if old.get(name)}
        given = {**(details or {}), **more}
        if given.get("head_ranks") is not None:
            given["head_ranks"] = tuple(given["head_ranks"])
        for name, value in (("form", form), ("keep", keep), ("full", full), ("details", MappingProxyType(given))):
            object.__setattr__(self, name, value)

    def __reduce__(self):  # mapping proxies do not pickle
        return _site_plan, (self.form, self.keep, self.full, dict(self.details))

    def __hash__(self) -> int:
        return hash((self.form, self.keep, self.full, json.dumps(dict(self.details), sort_keys=True)))

    @property
    def head_ranks(self) -> tuple[int, ...] | None:
        """Columns of each head, where heads have ranks of their own."""
        return self.details.get("head_ranks")

    @property
    def shape(self) -> Mapping[str, Any]:
        """How a tensor form sees the weight, and its ranks."""
        return self.details.get("shape", {})

    @property
    def rank(self) -> int:
        """The old word for ``keep``."""
        _warn_of_old("SitePlan.rank", "SitePlan.keep")
        return self.keep

    @property
    def full_rank(self) -> int:
        """The old word for ``full``."""
        _warn_of_old("SitePlan.full_rank", "SitePlan.full")
        return self.full


def _site_plan(form: str, keep: int, full: int, details: Mapping[str, Any]) -> SitePlan:
    return SitePlan(form=form, keep=keep, full=full, details=details)


def _warn_of_old(old: str, new: str) -> None:
    warnings.warn(f"{old} goes with the next release; use {new}", DeprecationWarning, stacklevel=3)


@dataclass(frozen=True, kw_only=True)
class MadeFor:
    """Which model a plan was made for.

    Attributes:
        model: what a person calls it. sites: every site of the model by name, each in a word or two (:func:`shape_of`).
        chosen: the sites that the method could choose from, where these are not all.
    """

    model: str | None = None
    sites: Mapping[str, str] = field(default_factory=dict)
    chosen: tuple[str, ...] | None = None

    @property
    def fingerprint(self) -> str:
        """A short hash of the sites' names and shapes."""
        return fingerprint(self.sites)

    def to_dict(self) -> dict[str, Any]:
        data = {"model": self.model, "fingerprint": self.fingerprint, "sites": dict(self.sites)}
        return data if self.chosen is None else {**data, "chosen": list(self.chosen)}

    @classmethod
    def from_dict(cls, data: Any) -> MadeFor:
        """Raises PlanError where the data does not say it, or its hash does not fit."""
        sites = data.get("sites") if isinstance(data, dict) else None
        if not isinstance(sites, dict) or not all(isinstance(v, str) for v in sites.values()):
            raise PlanError(f"got made_for {data!r}, expected an object with the model's 'sites'")
        if data.get("fingerprint") != fingerprint(sites):
            raise PlanError("made_for: its fingerprint is not that of its sites, so it was changed by hand")
        chosen = data.get("chosen")
        return cls(model=data.get("model"), sites=sites, chosen=None if chosen is None else tuple(chosen))

    def check(self, sites: Sites) -> None:
        """Raises PlanError where a model's sites differ; the message names the first difference."""
        theirs = shapes_of(sites)
        name = self.model or "another model"
        for site, shape in self.sites.items():
            if site in theirs and theirs[site] != shape:
                raise PlanError(f"the plan was made for {name}: there {site} is {shape}, here {theirs[site]}")
            if site not in theirs:
                raise PlanError(f"the plan was made for {name}, which has {site}{nearest(site, theirs)}")
        if extra := next((site for site in theirs if site not in self.sites), None):
            raise PlanError(f"the plan was made for {name}, which has no {extra}")


def shape_of(site: Site) -> str:
    """A site in a word or two: ``"qk 3 × 64 of 192"``, ``"linear 192 → 768"``, ``"units 768 of 192 → 192"``."""
    ends = f"{site.in_features} → {site.out_features}"
    if isinstance(site, HiddenSite):
        return f"units {site.full} of {ends}" + (" gated" if len(site.ups) > 1 else "")
    return f"linear {ends}" if site.kind == "linear" else f"{site.kind} {site.heads} × {site.full} of {ends}"


def shapes_of(sites: Sites) -> dict[str, str]:
    """Every site by name in a word or two."""
    return {name: shape_of(site) for name, site in sites.items()}


def fingerprint(shapes: Mapping[str, str]) -> str:
    """A short hash of sites' names and shapes; their order does not matter."""
    return hashlib.sha256(json.dumps(sorted(shapes.items())).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What sites become, how that was found, and for which model. A site that is not named stays as it is."""

    sites: Mapping[str, SitePlan]
    made_by: Mapping[str, Any] = field(default_factory=dict)
    made_for: MadeFor | None = None
    version: int = VERSION

    def __post_init__(self) -> None:
        if not isinstance(self.sites, Mapping) or not all(isinstance(s, SitePlan) for s in self.sites.values()):
            raise PlanError(f"got sites {in_short(self.sites)}, expected a SitePlan for each name")
        object.__setattr__(self, "sites", MappingProxyType(dict(self.sites)))
        object.__setattr__(self, "made_by", MappingProxyType(dict(self.made_by)))

    def __reduce__(self):  # mapping proxies do not pickle
        return Plan.from_dict, (self.to_dict(),)

    def to_dict(self) -> dict:
        data: dict[str, Any] = {"comcat_plan": VERSION}
        if self.made_for is not None:
            data["made_for"] = self.made_for.to_dict()
        sites = {
            n: {"form": s.form, "keep": s.keep, "full": s.full, **_plain(s.details)} for n, s in self.sites.items()
        }
        return {**data, "made_by": dict(self.made_by), "sites": sites}

    @classmethod
    def from_dict(cls, data: Any) -> Plan:
        """Reads versions 1 and 2. Raises PlanError where the data is not a plan; the message names the entry."""
        if not isinstance(data, dict) or "comcat_plan" not in data or not isinstance(data.get("sites"), dict):
            raise PlanError("not a plan: expected an object with 'comcat_plan' and 'sites'")
        version, made_by, made_for = data["comcat_plan"], data.get("made_by", {}), data.get("made_for")
        if version not in (1, VERSION):
            raise PlanError(f"got a plan of version {version!r}, expected 1 or {VERSION}; a newer comcat may read it")
        if not isinstance(made_by, dict):
            raise PlanError(f"got made_by {made_by!r}, expected an object")
        return cls(
            sites={name: _entry(name, entry, version) for name, entry in data["sites"].items()},
            made_by=made_by,
            made_for=None if made_for is None else MadeFor.from_dict(made_for),
        )

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        try:
            return cls.from_dict(parsed(text, _named_once))
        except PlanError:
            raise
        except json.JSONDecodeError as error:
            raise PlanError(f"not a plan: {error.msg} in line {error.lineno}") from None
        except ValueError as error:
            raise PlanError(f"not a plan: {error}") from None

    def save(self, path: str | Path) -> None:
        write_text(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        path = Path(path)
        if not path.is_file():
            known = [p.name for p in path.parent.glob("*.json")] if path.parent.is_dir() else []
            inside = path / "plan.json"
            near = f"; did you mean {str(inside)!r}?" if inside.is_file() else nearest(path.name, known)
            raise PlanError(f"no plan at {str(path)!r}{near}")
        try:
            text = path.read_text(encoding="utf-8-sig")  # some editors begin a file with a mark of its encoding
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"{path} cannot be read: {error}") from error
        try:
            return cls.from_json(text)
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from None


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises PlanError where it has a name twice: JSON's reader would keep the last in silence."""
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise PlanError(f"{name!r} is there twice, expected it once")
        found[name] = value
    return found


def _entry(name: str, entry: Any, version: int) -> SitePlan:
    """One site's entry as JSON has it. Version 1 said ``rank`` and ``full_rank``, and left out the form ``product``."""
    keep, full = ("rank", "full_rank") if version == 1 else ("keep", "full")
    if not isinstance(entry, dict) or not {keep, full} <= set(entry):
        raise PlanError(f"{name}: got {entry!r}, expected an object with {keep!r} and {full!r}")
    known = {keep, full, "form", "head_ranks", "shape", "tokens"}
    if unknown := next((key for key in entry if key not in known), None):
        raise PlanError(f"{name}: got {unknown!r}{nearest(str(unknown), known)}; expected {', '.join(sorted(known))}")
    if not (_is_whole(entry[keep]) and _is_whole(entry[full])):
        raise PlanError(f"{name}: got {keep} {entry[keep]!r} and {full} {entry[full]!r}, expected whole numbers")
    form, heads = entry.get("form", "product"), entry.get("head_ranks")
    if not isinstance(form, str):
        raise PlanError(f"{name}: got form {form!r}, expected a name")
    if heads is not None and not (isinstance(heads, list | tuple) and all(map(_is_whole, heads))):
        raise PlanError(f"{name}: got head_ranks {heads!r}, expected a list of whole numbers")
    details = {k: entry[k] for k in ("head_ranks", "shape", "tokens") if entry.get(k) not in (None, {})}
    return SitePlan(form=form, keep=entry[keep], full=entry[full], details=details)


def _plain(details: Mapping[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in details.items()}


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
