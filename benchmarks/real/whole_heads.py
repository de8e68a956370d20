"""Does it pay to remove whole heads? Predicted loss at equal parameters, with and without that choice.

    python benchmarks/real/whole_heads.py                     # classifier and saliency at −30, −50 and −60 %
    python benchmarks/real/whole_heads.py --task saliency

Every attention may keep all its heads, with free ranks of QK and VO, or lose the j heads whose VO product is
predicted to lose least (½ Σ σ² of that head); their QK then costs and loses nothing. Other heads keep free ranks.
Feed-forwards choose as usual in both cases. At a price a parameter each site takes what is best for it, so the least
predicted loss of all is the dual value at the budget: exact for equal parameters. Where that falls by more than
``--verify`` (a share), both plans are applied and judged.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common

import comcat
from comcat.errors import BudgetError, ComcatError
from comcat.factors import Spectrum, Statistic
from comcat.linalg import refit
from comcat.measure import count_parameters
from comcat.methods.allocate import of_forms, spectra
from comcat.methods.costs import Parameters
from comcat.methods.ladders import ladders
from comcat.methods.settings import check_forms
from comcat.sites import ProductSite, Site, Sites
from real.measure import paired, resamples
from real.tasks import TASKS, outputs


@dataclass(frozen=True, kw_only=True)
class Option:
    """One state of a part of the model: what it costs and loses, what its sites become, the heads that go."""

    cost: float
    loss: float
    entries: Mapping[str, comcat.SitePlan] = field(default_factory=dict)
    gone: tuple[int, ...] = ()


@dataclass(frozen=True)
class Ladder:
    """A choice to be made at a price: ``parts`` each take their best option; of several such combinations, the best."""

    combinations: tuple[tuple[Option, tuple[tuple[Option, ...], ...]], ...]

    def at(self, price: float) -> Option:
        """The best at a price a parameter."""
        taken = []
        for fixed, parts in self.combinations:
            best = [min(part, key=lambda o: (o.loss + price * o.cost, o.cost)) for part in parts]
            entries = {name: entry for option in best for name, entry in option.entries.items()}
            cost, loss = (getattr(fixed, n) + sum(getattr(o, n) for o in best) for n in ("cost", "loss"))
            taken.append(Option(cost=cost, loss=loss, entries=entries, gone=fixed.gone))
        return min(taken, key=lambda o: (o.loss + price * o.cost, o.cost))


def product_options(site: ProductSite, values: Tensor, kept: Sequence[int] | None = None) -> tuple[Option, ...]:
    """A product at every rank, and as it stands; with ``kept``, of these heads alone. ``values``: (heads, width)."""
    heads = site.heads if kept is None else len(kept)
    values = values if kept is None else values[list(kept)]
    if not heads:
        return (Option(cost=site.parameters(0), loss=0.0),)
    tail, fixed = _tail(values), site.parameters(0)
    each = site.parameters_per_rank / site.heads * heads
    whole = fixed + (site.parameters() - fixed) * heads / site.heads
    ranks = [r for r in range(1, site.full + 1) if fixed + r * each < whole]
    plans = {r: {site.name: comcat.SitePlan(keep=r, full=site.full)} for r in ranks}
    options = [Option(cost=fixed + r * each, loss=tail[r], entries=plan) for r, plan in plans.items()]
    return (*options, Option(cost=whole, loss=0.0))


def _tail(values: Tensor) -> list[float]:
    """Half the squares of the singular values that every rank 0…k leaves out, over all heads, (k + 1)."""
    square = values.double().square()
    square = (square.sum(0) if square.ndim > 1 else square) / 2
    return [*square.flip(0).cumsum(0).flip(0).tolist(), 0.0]


def attention_ladder(qk: ProductSite, vo: ProductSite, qk_values: Tensor, vo_values: Tensor, most: int) -> Ladder:
    """All heads, or without the 1 … ``most`` heads of least loss."""
    losses = vo_values.double().square().sum(1) / 2
    order = losses.argsort().tolist()
    combinations = []
    for gone in (tuple(order[:j]) for j in range(most + 1)):
        kept = [h for h in range(vo.heads) if h not in gone] if gone else None
        fixed = Option(cost=0.0, loss=float(losses[list(gone)].sum()), gone=gone)
        combinations.append((fixed, (product_options(qk, qk_values, kept), product_options(vo, vo_values, kept))))
    return Ladder(tuple(combinations))


def all_ladders(sites: Sites, found: Mapping[str, Spectrum], whole_heads: bool) -> dict[str, Ladder]:
    """One ladder for an attention with both its products; the library's own for all else."""
    made: dict[str, Ladder] = {}
    for site in sites.only("qk").values():
        qk, vo = (sites.by_name.get(f"{site.path}:{kind}") for kind in ("qk", "vo"))
        if isinstance(qk, ProductSite) and isinstance(vo, ProductSite):
            values = (found[s.name].singular_values for s in (qk, vo))  # type: ignore[union-attr]
            made[site.path] = attention_ladder(qk, vo, *values, most=vo.heads if whole_heads else 0)
    rest = sites.without([name for name, site in sites.items() if site.path in made])
    for ladder in ladders(rest, found, Parameters()):
        table, choices = ladder.table(Parameters())
        options = [
            Option(cost=float(cost), loss=float(loss), entries=choice.entries)
            for cost, loss, choice in zip(table.costs, table.losses, choices, strict=True)
        ]
        made[ladder.name] = Ladder(((Option(cost=0.0, loss=0.0), (tuple(options),)),))
    return made


def cheapest(choices: Mapping[str, Ladder], target: float) -> tuple[float, dict[str, Option]]:
    """The least loss at exactly this cost, in proportion between two neighbours on the hull, and a choice within it.

    Raises BudgetError where the cost cannot be reached.
    """

    def at(price: float) -> tuple[float, float, dict[str, Option]]:
        taken = {name: ladder.at(price) for name, ladder in choices.items()}
        return sum(o.cost for o in taken.values()), sum(o.loss for o in taken.values()), taken

    low, high = 0.0, 1e-12
    while at(high)[0] > target:
        low, high = high, high * 8
        if high > 1e30:
            raise BudgetError(f"got {target:.0f} parameters, but the smallest choice has {at(high)[0]:.0f}")
    for _ in range(100):
        middle = (low * high) ** 0.5 if low > 0 else high / 2
        low, high = (middle, high) if at(middle)[0] > target else (low, middle)
    cost, loss, taken = at(high)
    return loss + high * (cost - target), taken


@dataclass(frozen=True)
class KeptHeads:
    """A statistic for a model some of whose heads are gone: the refit of W_O must not lean on them."""

    statistic: Any
    gone: Mapping[str, Sequence[int]]

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "statistic"), name)

    def covariance(self, site: Site) -> Tensor | None:
        covariance = self.statistic.covariance(site)
        if covariance is None or site.path not in self.gone:
            return covariance
        kept = kept_channels(site, self.gone[site.path]).to(covariance)
        return covariance * kept * kept[:, None]


def kept_channels(site: Site, gone: Sequence[int]) -> Tensor:
    """1 for the channels (heads · width,) of heads that stay, 0 for the others."""
    heads = torch.ones(site.heads)
    heads[list(gone)] = 0
    return heads.repeat_interleave(site.full_rank)


def remove_heads_(model: nn.Module, site: Site, gone: Sequence[int], statistic: Statistic) -> None:
    """Take heads out of W_O: their columns become zero, their mean goes into the bias, and the other heads' columns
    are refitted."""
    covariance, mean = statistic.covariance(site), statistic.mean(site)
    assert isinstance(site, ProductSite) and covariance is not None and mean is not None
    out: Any = model.get_submodule(site.attention.out)
    kept = kept_channels(site, gone).to(covariance).bool()
    weight, mean = out.weight.detach().double(), mean.double()
    new = torch.zeros_like(weight)
    if kept.any():
        new[:, kept] = refit(covariance, torch.eye(len(kept)).to(covariance)[:, kept], weight.mT).mT
    with torch.no_grad():
        out.bias += ((weight - new) @ mean).to(out.bias)
        out.weight.copy_(new)


def applied(model: nn.Module, chosen: Mapping[str, Option], sites: Sites, statistic: Statistic) -> nn.Module:
    """A copy of the model as the options say. Heads that are gone keep their place, but say nothing."""
    small = copy.deepcopy(model)
    gone = {path: option.gone for path, option in chosen.items() if option.gone}
    for path, heads in gone.items():
        remove_heads_(small, sites[f"{path}:vo"], heads, statistic)
    plan = comcat.Plan(sites={n: entry for option in chosen.values() for n, entry in option.entries.items()})
    comcat.apply_(small, plan, KeptHeads(statistic, gone), sites=sites)
    return small


def compared(task_name: str, a: Any) -> list[dict[str, Any]]:
    """One task at every budget."""
    task = TASKS[task_name]
    model = task.build()
    sites = comcat.find_sites(model).only(*task.only)
    sites = of_forms(sites, check_forms(a.forms))
    statistic = comcat.calibrate(model, task.calibration_batches(a.seed, a.pictures), sites=sites, seed=a.seed)
    found = spectra(model, sites, statistic)
    both = {whole: all_ladders(sites, found, whole) for whole in (False, True)}
    dense = sum(ladder.at(0.0).cost for ladder in both[False].values())  # at no price everything stays as it is
    whole = count_parameters(model)
    judge = judging(task, model, a)
    rows = []
    for reduce in a.budgets:
        (plain, ranks), (less, heads) = (cheapest(both[w], dense - reduce * whole) for w in (False, True))
        gone = {path: list(o.gone) for path, o in heads.items() if o.gone}
        row: dict[str, Any] = {
            "task": task_name,
            "reduce": reduce,
            "predicted_ranks": plain,
            "predicted_with_heads": less,
            "gain": 1 - less / plain,
            "heads_gone": sum(map(len, gone.values())),
            "heads": sum(s.heads for s in sites.only("vo").values()),
            "gone": gone,
        }
        if row["gain"] > a.verify:
            row |= judge(*(applied(model, chosen, sites, statistic) for chosen in (ranks, heads)))
        print({k: v for k, v in row.items() if k != "tables"}, flush=True)
        rows.append(row)
    return rows


def judging(task: Any, model: nn.Module, a: Any) -> Callable[[nn.Module, nn.Module], dict[str, Any]]:
    """A function that scores a model of ranks alone and one without some heads, and their paired difference."""
    judged = task.pixels("judged").first(a.judged)
    weights = resamples(judged.origins.numpy())
    kept: list[Tensor] = []

    def said(m: nn.Module) -> Tensor:
        return outputs(copy.deepcopy(m).to(torch.bfloat16), judged, task.batch, torch.bfloat16)

    def judge(ranks: nn.Module, heads: nn.Module) -> dict[str, Any]:
        if not kept:
            kept.append(said(model))
        tables = [task.tables(said(m), judged.labels, kept[0]) for m in (model, ranks, heads)]
        first = next(iter(tables[0]))
        scores = {n: t[first].score() for n, t in zip(("dense", "ranks", "with_heads"), tables, strict=True)}
        return {first: scores, "difference": paired([tables[2][first]], [tables[1][first]], weights)}

    return judge


def main(given: list[str] | None = None) -> list[dict[str, Any]]:
    p = common.parser(__doc__)
    p.add_argument("--task", nargs="+", choices=TASKS, default=["classifier", "saliency"])
    p.add_argument("--budgets", type=float, nargs="+", default=[0.3, 0.5, 0.6])
    p.add_argument("--forms", default="ranks,units", help="what parts may become: ranks, units or both")
    p.add_argument("--pictures", type=int, help="calibration pictures; by default the task's own number")
    p.add_argument("--judged", type=int, default=1000)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--verify", type=float, default=0.02, help="apply and judge where the predicted loss falls by more")
    a = p.parse_args(given)
    try:
        rows = [row for task in a.task for row in compared(task, a)]
    except ComcatError as error:
        raise SystemExit(f"error: {error}") from None
    if not a.no_write:
        settings = {k: v for k, v in vars(a).items() if k != "no_write"}
        common.write("whole-heads", {"settings": settings, "rows": rows})
    return rows


if __name__ == "__main__":
    main()
