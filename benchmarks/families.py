"""Which families of vision models shrink, and how much of each: one small model with random weights a family.

Every model has random weights, biases, norms and layer scales. Of each it is said what was found, by how much all sites
at full rank (and all hidden units) change the output, whether ``compress(0.4)`` works on a random batch, whether a
saved model gives the same output when loaded, and why what did not shrink did not.

    python benchmarks/families.py
    python benchmarks/families.py --library timm --only vit swin
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from common import RESULTS
from families_of import TIMM, TRANSFORMERS, Family
from torch import Tensor, nn

import comcat
from comcat.apply import apply_
from comcat.files import write_json
from comcat.hosts import find_sites
from comcat.measure import environment, model_output
from comcat.methods.costs import share_that_can_shrink
from comcat.plan import Plan, SitePlan
from comcat.sites import ProductSite, Sites

RESULT = RESULTS / "families.json"
PAGE = Path(__file__).resolve().parents[1] / "docs" / "families.md"
LIMIT = 1e-5
SETTLING = 16
"""Pictures from which batch norms take their means and variances."""
INTRO = """# Families of models

What shrinks in one small model a family, with random weights. A family is whole where its attention is found and
understood, every product that it has shrinks, everything at full rank changes the output by at most 1e-5, and it comes
back from disk:
{counts}.
A family that is not in the table was not measured.

*Attention* counts the layers found. *QK*, *VO* and *units* count the products and feed-forwards that can shrink. *Can
shrink* is the share of the parameters in all sites, other linear layers included. *Error* is by how much everything at
full rank changes the output, relative to its largest value, in float32. The last column counts what was refused, with
the reason.

Batch norms first take their means and variances from up to {settling} pictures. One right behind a projection (LeViT,
EfficientFormerV2) is folded into what takes the projection's place: the same in evaluation, and no longer there in
training.

`python benchmarks/families.py` measures this and writes this page.
"""


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
    """The model with batch norms that know what flows through them: else numbers grow, and rounding hides all.

    With very few pictures some channels hardly vary at the last stage, and a division by that makes rounding large.
    """
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
    settled(model, family.inputs(model, pictures=SETTLING, seed=1))
    inputs = family.inputs(model)
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


UNSEEN = re.compile(r"does not know how to call|does not stand in for|attention of no known shape: \w+$")
"""Reasons that say that comcat does not understand something, which may well have a product."""


def is_whole(row: Mapping[str, Any]) -> bool:
    """Whether attention was found and understood, all its products shrink exactly, and the model comes back."""
    if "failed" in row or any(UNSEEN.search(reason) for reason in row["reasons"]):
        return False
    seen = row["attention"] + row["refused"] > 0
    return bool(seen and row["error"] <= LIMIT and row["compressed"] and row["loaded"] and row["share"] >= 0.1)


def page(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a page in Markdown."""
    counts = []
    for library in dict.fromkeys(row["library"] for row in rows):
        of = [row for row in rows if row["library"] == library]
        counts.append(f"{sum(map(is_whole, of))} of {len(of)} families of {library}")
    lines = [
        INTRO.format(counts=" and ".join(counts), settling=SETTLING),
        "| library | family | attention | QK | VO | units | can shrink | error | compressed, loaded | what does not |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(line_of, rows)]) + "\n"


def line_of(row: Mapping[str, Any]) -> str:
    """One row of the table."""
    start = f"| {row['library']} | {row['family']} |"
    if "failed" in row:
        return f"{start} | | | | | | no | {row['failed']} |"
    reasons = "; ".join(f"{n} × {reason}" for reason, n in row["reasons"].items() if "so small" not in reason)
    again = "yes" if row["compressed"] and row["loaded"] else "no"
    return (
        f"{start} {row['attention'] + row['refused']} | {row['qk']} | {row['vo']} | {row['units']} | "
        f"{100 * row['share']:.0f} % | {row['error']:.0e} | {again} | {reasons} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="families by name; the others stay as they were measured")
    parser.add_argument("--library", choices=("timm", "transformers"))
    options = parser.parse_args()
    families = [f for f in (*TIMM, *TRANSFORMERS) if options.library in (None, f.library)]
    chosen = [f for f in families if not options.only or f.name in options.only]
    order = [(f.library, f.name) for f in (*TIMM, *TRANSFORMERS)]
    for family in chosen:
        row = safely(examine, family)
        print(json.dumps(row), flush=True)
        rows = {(r["library"], r["family"]): r for r in (*measured(), row)}  # others may have written meanwhile
        known = [rows[key] for key in order if key in rows]
        write_json(RESULT, {"benchmark": "families", "environment": environment(), "rows": known})
    PAGE.write_text(page(measured()))


def measured() -> list[dict[str, Any]]:
    """The rows that are in the result."""
    return json.loads(RESULT.read_text())["rows"] if RESULT.is_file() else []


if __name__ == "__main__":
    main()
