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

import torch
from torch import Tensor, nn

from .errors import PlanError, nearest
from .factors import Linears, Products, Statistic, Values, Weights, factorize_site, truncate_site
from .hosts import find_sites, host_of
from .hosts.anatomy import norm_and_gate
from .linalg import Factorization
from .modules.lowrank import ConcatLinear, LowRankAttention, LowRankLinear, NarrowHeads, PaddedHeads
from .modules.tensor import TENSOR_FORMS, check_shape, matrix_factors, shape_parameters
from .sites import Attention, Replacement, Site, Sites, Undo, part

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
            if not all(isinstance(entry[k], int) and not isinstance(entry[k], bool) for k in ("rank", "full_rank")):
                raise PlanError(
                    f"{name}: got ranks {entry['rank']!r} and {entry['full_rank']!r}, expected whole numbers"
                )
            heads = entry.get("head_ranks")
            sites[name] = SitePlan(**{**entry, "head_ranks": None if heads is None else tuple(heads)})
        return cls(sites=sites, made_by=data.get("made_by", {}))

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise PlanError(f"not a plan: {error.msg} in line {error.lineno}") from None

    def save(self, path: str | Path) -> None:
        path = Path(path)
        temporary = path.with_name(f".{path.name}.tmp")
        temporary.write_text(self.to_json())
        temporary.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        path = Path(path)
        if not path.is_file():
            known = [p.name for p in path.parent.glob("*.json")] if path.parent.is_dir() else []
            raise PlanError(f"no plan at {str(path)!r}{nearest(path.name, known)}")
        return cls.from_json(path.read_text())

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
    build = _Builder(model, statistic, factorizations or {}, joint_refit, weights)
    by_attention: dict[str, dict[str, tuple[Site, SitePlan]]] = {}
    undo: list[Undo] = []
    try:
        for name, entry in plan.sites.items():
            site = sites[name]
            if site.attention is not None:
                by_attention.setdefault(site.path, {})[site.kind] = (site, entry)
            else:
                undo.append(_exchange_linear(model, site, build.linear(site, entry)))
        for path, planned in by_attention.items():
            attention = next(iter(planned.values()))[0].attention
            assert attention is not None
            qk, vo = (planned.get(kind) or _dense(sites, path, kind) for kind in ("qk", "vo"))
            undo.append(host_of(attention).mount(model, attention, build.attention(attention, qk, vo)))
    except BaseException:
        for step in reversed(undo):
            step()
        raise
    return Handle(model, plan, undo)


def _dense(sites: Sites, path: str, kind: str) -> tuple[Site, None] | None:
    """The other product of an attention whose one product alone is planned, at full rank."""
    name = f"{path}:{kind}"
    return (sites[name], None) if name in sites else None


def _exchange_linear(model: nn.Module, site: Site, module: nn.Module) -> Undo:
    from .hosts.mounting import exchange

    return exchange(model, site.path, module)


Planned = tuple[Site, "SitePlan | None"]


class _Builder:
    """Builds the modules of a plan and fills in their weights."""

    def __init__(
        self,
        model: nn.Module,
        statistic: Statistic,
        factorizations: Mapping[str, Factorization],
        joint_refit: bool,
        weights: bool,
    ) -> None:
        self.model, self.statistic, self.known = model, statistic, factorizations
        self.joint_refit, self.weights = joint_refit, weights

    def truncated(self, site: Site, plan: SitePlan | None) -> Any:
        """The thin weights of a site. A dense site's factors are its own weights, as they are."""
        if plan is None:
            return _identity_factors(self.model, site)
        factorization = self.known.get(site.name) or factorize_site(self.model, site, self.statistic)
        return truncate_site(
            self.model, site, factorization, plan.rank, self.statistic, plan.head_ranks, self.joint_refit
        )

    def linear(self, site: Site, plan: SitePlan) -> nn.Module:
        dense = part(self.model, site.path)
        assert isinstance(dense, nn.Linear)
        if plan.form in TENSOR_FORMS:
            return TENSOR_FORMS[plan.form](dense, plan.shape, self.weights)
        module = LowRankLinear(site.in_features, site.out_features, plan.rank, **_factory(dense))
        if self.weights:
            thin: Linears = self.truncated(site, plan)
            _fill(module.first.weight, thin.first)
            _fill(module.last.weight, thin.last)
            _fill(module.last.bias, thin.bias)
        return module

    def attention(self, a: Attention, qk: Planned | None, vo: Planned | None) -> Replacement:
        forms = {p[1].form for p in (qk, vo) if p is not None and p[1] is not None}
        if "matrix" in forms:
            return self._matrices(a, qk, vo)
        if a.mount == "values":
            assert vo is not None and vo[1] is not None
            return self._values_alone(a, vo[0], vo[1])
        if a.mount == "parts":
            assert qk is not None and vo is not None
            return self._parts(a, qk, vo)
        assert qk is not None
        return self._whole(a, qk, vo)

    def _whole(self, a: Attention, qk: Planned, vo: Planned | None) -> Replacement:
        host = part(self.model, a.path)
        norm, gate = norm_and_gate(host)
        out = part(self.model, a.out)
        rank_qk, rank_vo = (a.width if p is None or p[1] is None else p[1].rank for p in (qk, vo))
        dense_vo = vo is None or vo[1] is None  # then its biases stay as they are, and what it costs stays what it cost
        value_bias = a.v.bias_or_none(self.model) is not None and (dense_vo or not a.folds_value_bias)
        module = LowRankAttention(
            a.in_features, a.out_features, a.heads, rank_qk, rank_vo, scale=a.scale,
            query_bias=a.q.bias_or_none(self.model) is not None, value_bias=value_bias, out_bias=out.bias is not None or not dense_vo,
            attention_dropout=getattr(getattr(host, "attn_drop", None), "p", 0.0), projection_dropout=getattr(getattr(host, "proj_drop", None), "p", 0.0),
            norm=norm, gate=gate, **_factory(out),
        )  # fmt: skip
        if self.weights:
            products: Products = self.truncated(*qk)
            values: Values = self.truncated(*vo) if vo is not None else _identity_values(self.model, a)
            _fill(module.qkv.weight, torch.cat([t.flatten(0, 1) for t in (products.q, products.k, values.v)]))
            _fill(module.q_bias, products.q_bias)
            _fill(module.v_bias, values.v_bias)
            _fill(module.proj.weight, values.out)
            _fill(module.proj.bias, values.out_bias)
        return Replacement(whole=module, without_value_bias=True)

    def _parts(self, a: Attention, qk: Planned, vo: Planned) -> Replacement:
        rank_qk, rank_vo = (a.width if plan is None else plan.rank for _, plan in (qk, vo))
        width = max(rank_qk, rank_vo)
        out = part(self.model, a.out)
        factory = _factory(out)
        query_bias = a.q.bias_or_none(self.model) is not None
        dense_vo = vo[1] is None
        value_bias = a.v.bias_or_none(self.model) is not None and (dense_vo or not a.folds_value_bias)
        out_bias = out.bias is not None or not dense_vo
        q, k, v = (
            _heads_linear(a, rank, width, bias, factory)
            for rank, bias in ((rank_qk, query_bias), (rank_qk, False), (rank_vo, value_bias))
        )
        o = (
            nn.Linear(a.heads * width, a.out_features, bias=out_bias, **factory)
            if rank_vo == width
            else NarrowHeads(a.heads, rank_vo, width, a.out_features, bias=out_bias, **factory)
        )
        if self.weights:
            products: Products = self.truncated(*qk)
            values: Values = self.truncated(*vo)
            for module, weight, bias in (
                (q, products.q, products.q_bias),
                (k, products.k, None),
                (v, values.v, values.v_bias),
            ):
                _fill(_inner(module).weight, weight.flatten(0, 1))
                _fill(_inner(module).bias, bias)
            _fill(_inner(o).weight, values.out)
            _fill(_inner(o).bias, values.out_bias)
        return Replacement(
            parts={a.q.path: q, a.k.path: k, a.v.path: v, a.out: o}, width=width, without_value_bias=True
        )

    def _values_alone(self, a: Attention, site: Site, plan: SitePlan) -> Replacement:
        factory = _factory(part(self.model, a.out))
        fused = a.q.path == a.v.path
        host = part(self.model, a.v.path)
        keep = a.v.start if fused else 0
        kept_bias = fused and host.bias is not None
        value_bias = a.v.bias_or_none(self.model) is not None and not a.folds_value_bias
        apart = a.v.bias is not None
        projection = PaddedHeads(
            a.in_features,
            a.heads,
            plan.rank,
            a.width,
            keep=keep,
            bias=kept_bias or (value_bias and not apart),
            **factory,
        )
        out = NarrowHeads(a.heads, plan.rank, a.width, a.out_features, **factory)
        if self.weights:
            values: Values = self.truncated(site, plan)
            weight, bias = values.v.flatten(0, 1), values.v_bias
            if keep:
                weight = torch.cat([host.weight[:keep].double(), weight])
            if projection.linear.bias is not None:
                thin = weight.new_zeros(len(weight) - keep) if bias is None else bias.flatten()
                _fill(projection.linear.bias, torch.cat([host.bias[:keep].double(), thin]) if kept_bias else thin)
            _fill(projection.linear.weight, weight)
            _fill(out.linear.weight, values.out)
            _fill(out.linear.bias, values.out_bias)
        return Replacement(parts={a.v.path: projection, a.out: out}, without_value_bias=a.folds_value_bias)

    def _matrices(self, a: Attention, qk: Planned | None, vo: Planned | None) -> Replacement:
        """Each matrix of a pair at low rank, apart: what factorising products is compared with. Biases stay where they are."""
        ranks = {
            side: plan.rank if plan is not None else None
            for (_, plan), sides in ((qk or (None, None), "qk"), (vo or (None, None), "vo"))
            for side in sides
        }
        layers: dict[str, list[nn.Module]] = {}
        for side, projection in (("q", a.q), ("k", a.k), ("v", a.v)):
            bias = None if projection.bias is not None else projection.bias_or_none(self.model)
            layers.setdefault(projection.path, []).append(
                self._matrix(projection.weight(self.model), bias, ranks[side])
            )
        parts = {path: found[0] if len(found) == 1 else ConcatLinear(found) for path, found in layers.items()}
        out = part(self.model, a.out)
        parts[a.out] = self._matrix(out.get_parameter("weight"), out.bias, ranks["o"])
        return Replacement(parts=parts)

    def _matrix(self, weight: Tensor, bias: Tensor | None, rank: int | None) -> nn.Module:
        factory = {"device": weight.device, "dtype": weight.dtype}
        if rank is None:
            dense = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, **factory)
            _fill(dense.weight, weight.detach())
            _fill(dense.bias, None if bias is None else bias.detach())
            return dense
        module = LowRankLinear(weight.shape[1], weight.shape[0], rank, bias=bias is not None, **factory)
        if self.weights:
            first, last = matrix_factors(weight.detach(), rank)
            _fill(module.first.weight, first)
            _fill(module.last.weight, last)
            _fill(module.last.bias, None if bias is None else bias.detach())
        return module


def _heads_linear(a: Attention, rank: int, width: int, bias: bool, factory: dict) -> nn.Module:
    if rank == width:
        return nn.Linear(a.in_features, a.heads * rank, bias=bias, **factory)
    return PaddedHeads(a.in_features, a.heads, rank, width, bias=bias, **factory)


def _inner(module: nn.Module) -> nn.Linear:
    inner = module if isinstance(module, nn.Linear) else module.linear
    assert isinstance(inner, nn.Linear)
    return inner


def _identity_factors(model: nn.Module, site: Site) -> Products | Values:
    """The weights of a site as they are, so that a full-rank product costs no rounding."""
    a = site.attention
    assert a is not None
    if site.kind == "vo":
        return _identity_values(model, a)
    bias = a.q.bias_or_none(model)
    q, k = (p.weight(model).detach().view(a.heads, a.width, -1) for p in (a.q, a.k))
    return Products(q, None if bias is None else bias.detach().view(a.heads, a.width), k)


def _identity_values(model: nn.Module, a: Attention) -> Values:
    """The values and output projection as they are, biases where they stand."""
    out = part(model, a.out)
    weight = out.weight.detach()
    out_bias = weight.new_zeros(a.out_features) if out.bias is None else out.bias.detach()
    bias = a.v.bias_or_none(model)
    v = a.v.weight(model).detach().view(a.heads, a.width, -1)
    return Values(v, None if bias is None else bias.detach().view(a.heads, a.width), weight, out_bias)


def _factory(module: nn.Module) -> dict:
    weight = module.get_parameter("weight")
    return {"device": weight.device, "dtype": weight.dtype}


def _fill(target: Tensor | None, value: Tensor | None) -> None:
    if target is None or value is None:
        return
    with torch.no_grad():
        target.copy_(value.reshape(target.shape))


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a compressed model carries with it (as ``model.comcat_record``): enough to save it, load it again and say how it came about.

    Attributes:
        origin: ``comcat.models.Origin.to_dict()`` of the model before. settings: what the run was asked for.
        preprocess: ``Preprocess.to_dict()`` of the model's data config, if known. results: numbers measured, as the report shows them.
    """

    plan: Plan
    origin: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    preprocess: dict[str, Any] | None = None
    class_names: tuple[str, ...] | None = None
    results: dict[str, Any] = field(default_factory=dict)
