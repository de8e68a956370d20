"""All that a choice needs, found once: sites, what was measured, and the decomposition of every site."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from ..data.batches import expect_batches
from ..errors import DataError, ModelError, SettingsError, counted, nearest
from ..factors import Spectrum, Statistic, Weights, spectra
from ..forms import Flow, check_plan
from ..hosts import find_sites
from ..measure import count_macs, count_parameters
from ..measure.latency import measure_latency
from ..plan import MadeFor, Plan
from ..sites import Sites, TokenSite
from ..statistics import Statistics, calibrate, packed_pictures, pictures_of
from .allocate import allocate, describe, of_forms, of_vision, shrinkable
from .costs import Cost, Macs, Parameters, warn_of_little
from .merging.balance import REFERENCE, balanced
from .merging.blocks import TokenLadder
from .merging.merge import measured_tokens
from .merging.meter import Meter
from .settings import CompressSettings, check_forms


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """All that a choice needs, found once: sites, what was measured, and the decomposition of every site.

    ``sites`` are those that may shrink, ``whole`` are all that the model has.
    """

    sites: Sites
    whole: Sites
    statistic: Statistic
    factorizations: Mapping[str, Spectrum]
    total: float
    made_for: MadeFor
    cost: Cost = field(default_factory=Parameters)
    example: Tensor | None = None
    tokens: tuple[TokenLadder, ...] = ()


def prepare(
    model: nn.Module,
    calibration: Iterable | None,
    settings: CompressSettings,
    *,
    plan: Plan | None = None,
    whole: Sites | None = None,
    progress: bool = False,
) -> Prepared:
    """Find the sites, calibrate, decompose and count: everything that does not depend on the budget's size.

    With a ``plan`` it must fit the model, and its sites alone are looked at. ``whole``: all sites of the model, where
    they are known.

    Raises:
        PlanError, UnknownSite, UnsupportedSite: if the plan does not fit, before any other work.
    """
    whole = find_sites(model) if whole is None else whole
    if plan is None:
        warn_of_little(model, whole)
        sites = chosen_sites(whole, settings)
    else:
        check_plan(plan, whole)
        sites = weighty(plan, whole)
    made_for = describe(model, whole, sites)
    example = None
    if calibration is not None:
        expect_batches(calibration, "calibration")
        calibration = kept(calibration)
        example = _first_picture(model, calibration)
    if settings.statistic == "weights" or not len(sites):
        statistic: Statistic = Weights()
    else:
        if calibration is None:
            raise SettingsError(
                f"statistic {settings.statistic!r} needs calibration pictures; without any, say statistic='weights'"
            )
        statistic = calibrated(model, calibration, settings, sites, progress)
        if len(statistic.unreached) == len(sites):
            raise ModelError(f"{said_of_unreached(statistic.unreached)}; give inputs that reach what is to shrink")
        sites = sites.without(statistic.unreached)
    names = check_forms(settings.forms)
    tokens, meter = (), None
    if plan is None and "tokens" in names:
        if calibration is None:
            raise SettingsError("forms with tokens need calibration pictures, to measure what merging loses")
        tokens, meter = measured_tokens(model, calibration, only=settings.only, progress=progress)
    total, cost = budget_of(
        model, settings, sites, statistic, example, tokens=[t.site for t in tokens], progress=progress
    )
    prepared = Prepared(
        sites=sites,
        whole=whole,
        statistic=statistic,
        factorizations=spectra(model, sites if plan is not None else of_forms(sites, names), statistic),
        total=total,
        made_for=made_for,
        cost=cost,
        example=example,
        tokens=tokens,
    )
    widths = ",".join(name for name in names if name != "tokens")
    if meter is None or not widths:
        return prepared
    return replace(prepared, tokens=_weighed(model, prepared, settings, meter, widths))


def _weighed(
    model: nn.Module, prepared: Prepared, settings: CompressSettings, meter: Meter, widths: str
) -> tuple[TokenLadder, ...]:
    """The ladders of tokens with losses that can be weighed with those of ranks and units."""

    def plan_of(forms: str, tokens: Sequence[TokenLadder]) -> Plan:
        return allocate(
            model, prepared.statistic, reduce=REFERENCE, forms=forms, budget=settings.budget, sites=prepared.sites,
            factorizations=prepared.factorizations, multiple=settings.multiple or 8, total=prepared.total,
            tie=settings.tie is not False, cost=prepared.cost, made_for=prepared.made_for, tokens=tokens,
        )  # fmt: skip

    return balanced(
        prepared.tokens, meter, widths, plan_of, sites=prepared.sites, statistic=prepared.statistic,
        factorizations=prepared.factorizations,
    )  # fmt: skip


def weighty(plan: Plan, whole: Sites) -> Sites:
    """The sites with weights that a plan changes; tokens have none."""
    return Sites({name: whole[name] for name in plan.sites if name in whole}, whole.refused)


def chosen_sites(whole: Sites, settings: CompressSettings) -> Sites:
    """The sites that may shrink, as the settings say, else those of the vision side. Raises where none is left."""
    sites = whole if settings.only else of_vision(whole)
    if settings.only:
        sites = whole.only(*settings.only)
        if not len(sites):
            known = {"qk", "vo", "linear", "units", *(s.path for s in whole.values())}
            raise SettingsError(f"only={', '.join(settings.only)} leaves no site{nearest(settings.only[0], known)}")
    named = [n for n, s in sites.items() if s.path in settings.only]  # a head that is asked for by its path may shrink
    few = shrinkable(sites, head=settings.head)
    sites = Sites({n: s for n, s in sites.items() if n in few or n in named}, sites.refused)
    forms = check_forms(settings.forms)
    sites = sites if "tokens" in forms else of_forms(sites, forms)  # with fewer tokens all of them cost less
    if not len(sites):
        none = f"no attention, feed-forward or layer but the classifier's can have fewer {' or '.join(forms)}"
        reasons = "; ".join(map(str, whole.refused[:3])) or none
        raise ModelError(f"nothing in this model can shrink: {reasons}")
    return sites


def budget_of(
    model: nn.Module,
    settings: CompressSettings,
    sites: Sites,
    statistic: Statistic,
    example: Tensor | None,
    *,
    tokens: Sequence[TokenSite] = (),
    progress: bool = False,
) -> tuple[float, Cost]:
    """What the whole model costs, and how a site's cost is counted."""
    if settings.budget == "parameters":
        return float(count_parameters(model)), Parameters()
    if example is None:
        wanted = "calibration pictures (batch, channels, height, width), at least one"
        raise SettingsError(f"budget {settings.budget!r} needs {wanted}")
    if settings.budget == "latency":
        latency = measure_latency(
            model, sites, example, tokens=tokens, batch=settings.batch, compile=settings.compiled, quick=settings.quick,
            progress=progress,
        )  # fmt: skip
        return latency.whole, latency
    return float(count_macs(model, example)), Macs(_flows(model, sites, statistic, example))


def _flows(model: nn.Module, sites: Sites, statistic: Statistic, example: Tensor) -> dict[str, Flow]:
    """Rows and pairs at every site, from the statistic where it saw them, else from one picture."""
    seen = (
        statistic
        if isinstance(statistic, Statistics)
        else calibrate(model, [example], statistic="activation", sites=sites)
    )
    return {name: Flow(seen.rows.get(name, 0.0), seen.pairs.get(name, 0.0)) for name in sites}


def calibrated(
    model: nn.Module, calibration: Iterable, settings: CompressSettings, sites: Sites, progress: bool
) -> Statistics:
    """Calibrate some sites as the settings say."""
    return calibrate(
        model,
        calibration,
        statistic=settings.statistic,
        sites=sites,
        limit=settings.pictures,
        seed=settings.seed,
        progress=progress,
    )


def kept(batches: Iterable) -> Iterable:
    """Batches that can be gone through more than once: an iterator that would be spent is read into a list."""
    return list(batches) if isinstance(batches, Iterator) else batches


def said_of_unreached(names: Sequence[str]) -> str:
    """Which parts of a model no calibration input reached: the paths of sites up to the number of a block."""
    parts = Counter(re.split(r"\.\d+(?:\.|$)", name.partition(":")[0])[0] for name in names)
    listed = ", ".join(f"{part} ({counted(count, 'site')})" for part, count in parts.items())
    return f"No calibration input reached {listed}"


def _first_picture(model: nn.Module, calibration: Iterable) -> Tensor | None:
    """One picture (1, channels, height, width), on the model's device and in its type: loaders' are on the CPU.

    None where the patches of several pictures lie in one row: no picture can be taken from those.
    """
    for batch in calibration:
        if packed_pictures(batch):
            return None
        return pictures_of(batch)[:1].to(next(model.parameters()))
    raise DataError("no pictures to calibrate on: got an empty iterable")
