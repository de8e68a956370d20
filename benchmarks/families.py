"""Which families of vision models shrink, and how much of each: one small model with random weights a family.

Every model has random weights, biases, norms and layer scales. Of each it is said what was found, by how much all sites
at full rank (and all hidden units) change the output, whether ``compress(0.4)`` works on a random batch, whether a
saved model gives the same output when loaded, and why what did not shrink did not.

    python benchmarks/families.py --out benchmarks/results/families.json --table docs/families.md
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from families_of import TIMM, TRANSFORMERS, Family
from torch import Tensor, nn

import comcat
from comcat.apply import apply_
from comcat.hosts import find_sites
from comcat.measure import model_output
from comcat.methods.costs import share_that_can_shrink
from comcat.plan import Plan, SitePlan
from comcat.sites import ProductSite, Sites

LIMIT = 1e-5


def randomised(model: nn.Module) -> nn.Module:
    """A model whose every parameter is random, so that nothing hides behind a zero, in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.numel():
                p.copy_(noise * p[0].numel() ** -0.5 if p.ndim > 1 else p + 0.1 * noise)
    model.eval()
    return model


@torch.no_grad()
def settled(model: nn.Module, inputs: Any) -> nn.Module:
    """The model with batch norms that know what flows through them: else numbers grow, and rounding hides all."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    if norms:
        run(model, inputs)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
    model.eval()
    return model


def flat(output: Any) -> Tensor:
    """All numbers of an output in one row."""
    if isinstance(output, Tensor):
        return output.flatten().float()
    values = output.values() if isinstance(output, Mapping) else output
    return torch.cat([flat(v) for v in values if isinstance(v, Tensor | Mapping | tuple | list) and len(v)])


@torch.no_grad()
def run(model: nn.Module, inputs: Any) -> Tensor:
    torch.manual_seed(0)
    return flat(model(**inputs)) if isinstance(inputs, dict) else flat(model_output(model, inputs))


def relative(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-12))


def full(sites: Sites, kinds: Sequence[str]) -> Plan:
    """Everything of some kinds at full rank, or with all units in another order."""
    chosen = {n: s for n, s in sites.items() if s.kind in kinds}
    form = {"units": "units"}
    return Plan(
        sites={n: SitePlan(keep=s.full, full=s.full, form=form.get(s.kind, "product")) for n, s in chosen.items()}
    )


def examine(family: Family) -> dict[str, Any]:
    """What becomes of one family."""
    torch.manual_seed(0)
    started = time.perf_counter()
    row: dict[str, Any] = {"library": family.library, "family": family.name, "model": family.model}
    model = randomised(family.build())
    inputs = family.inputs(model)
    settled(model, inputs)
    before = run(model, inputs)
    sites = find_sites(model)
    row |= found(model, sites)
    errors = []
    for kinds in (("qk", "vo", "linear"), ("units",)):
        handle = apply_(model, full(sites, kinds))
        errors.append(relative(run(model, inputs), before))
        handle.revert()
    row["error"] = max(errors)
    small = comcat.compress(model, [inputs], reduce=min(0.4, 0.8 * row["share"]), statistic="activation")
    after = run(small, inputs)
    row["compressed"] = bool(after.isfinite().all()) and comcat_size(small) < comcat_size(model)
    with tempfile.TemporaryDirectory() as folder:
        comcat.save(small, Path(folder) / "model")
        row["loaded"] = run(comcat.load(Path(folder) / "model"), inputs).equal(after)
    row["seconds"] = round(time.perf_counter() - started, 1)
    return row


def comcat_size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def found(model: nn.Module, sites: Sites) -> dict[str, Any]:
    """How many products and units were found, the share of parameters that can shrink, and reasons of what cannot."""
    attention = {s.path for s in sites.values() if isinstance(s, ProductSite)}
    whole = [r for r in sites.refused if "no known shape" in r.reason]
    reasons: dict[str, int] = {}
    for r in sites.refused:
        reasons[r.reason] = reasons.get(r.reason, 0) + 1
    return {
        "attention": len(attention), "qk": len(sites.only("qk")), "vo": len(sites.only("vo")),
        "units": len(sites.only("units")), "linear": len(sites.only("linear")), "refused": len(whole),
        "share": share_that_can_shrink(model, sites), "reasons": reasons,
    }  # fmt: skip


def safely(examined: Callable[[Family], dict[str, Any]], family: Family) -> dict[str, Any]:
    """A row even where something fails: that is what the table is about."""
    try:
        return examined(family)
    except Exception as error:
        text = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        return {"library": family.library, "family": family.name, "model": family.model, "failed": text}


def is_whole(row: Mapping[str, Any]) -> bool:
    """Whether all that a family has shrinks, exactly, and comes back from disk."""
    if "failed" in row:
        return False
    return bool(row["error"] <= LIMIT and row["compressed"] and row["loaded"] and row["share"] >= 0.1)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        "| library | family | QK / VO of attention | units | can shrink | error | compressed | loaded | why not |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = f"| {row['library']} | {row['family']} |"
        if "failed" in row:
            lines.append(f"{start} | | | | no | no | {row['failed']} |")
            continue
        seen = f"{row['qk']} / {row['vo']} of {row['attention'] + row['refused']}"
        reasons = "; ".join(
            f"{count} × {reason}" for reason, count in row["reasons"].items() if "so small" not in reason
        )
        yes = ["yes" if row[k] else "no" for k in ("compressed", "loaded")]
        lines.append(
            f"{start} {seen} | {row['units']} | {100 * row['share']:.0f} % | {row['error']:.1e} | "
            f"{' | '.join(yes)} | {reasons} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="families by name")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    rows = []
    for family in (*TIMM, *TRANSFORMERS):
        if not options.only or family.name in options.only:
            rows.append(row := safely(examine, family))
            print(json.dumps(row), flush=True)
            if options.out:
                options.out.write_text(json.dumps(rows, indent=1) + "\n")
    for library in ("timm", "transformers"):
        of = [row for row in rows if row["library"] == library]
        if of:
            print(f"{library}: {sum(map(is_whole, of))} of {len(of)} families shrink as far as they can")
    if options.table:
        options.table.write_text(table(rows))


if __name__ == "__main__":
    main()
