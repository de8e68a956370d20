"""``comcat inspect``: what of a model can shrink, and what cannot and why."""

from __future__ import annotations

import json
from dataclasses import dataclass

from ..terminal import table
from .common import Common, Positional, load


@dataclass(frozen=True, kw_only=True)
class Inspect(Common):
    """Show every site of a model, its ranks and cost, and what cannot shrink and why."""

    model: Positional[str]
    """timm:NAME, hf:NAME or a folder."""
    json: bool = False
    """Print JSON instead of a table."""


def run(command: Inspect) -> int:
    from ..factors import Weights, factorize_site
    from ..hosts import find_sites
    from ..measure import count_parameters
    from ..report import rank_for_energy

    model = load(command, command.model)
    sites, total = find_sites(model), count_parameters(model)
    rows = []
    for name, site in sites.items():
        found = factorize_site(model, site, Weights()).singular_values
        values = found.sum(0) if found.ndim > 1 else found
        rows.append({
            "site": name, "kind": site.kind, "heads": site.heads, "full_rank": site.full_rank, "parameters": site.parameters(),
            "share": site.parameters() / total, "parameters_per_rank": site.parameters_per_rank, "break_even_rank": site.break_even,
            "rank_for_90_percent": rank_for_energy(values.tolist(), 0.9),
        })  # fmt: skip
    if command.json:
        print(
            json.dumps(
                {
                    "model": command.model,
                    "parameters": total,
                    "sites": rows,
                    "refused": [{"site": r.name, "reason": r.reason} for r in sites.refused],
                },
                indent=1,
            )
        )
        return 0
    table(
        ["site", "kind", "full rank", "90 % energy", "saves up to rank", "parameters", "share"],
        [
            [r["site"], r["kind"], f"{r['full_rank']} × {r['heads']}" if r["heads"] > 1 else str(r["full_rank"]), str(r["rank_for_90_percent"]), str(r["break_even_rank"]),
             f"{r['parameters']:,}", f"{100 * r['share']:.1f} %"] for r in rows
        ],
    )  # fmt: skip
    shrinkable = sum(r["parameters"] for r in rows)
    print(f"\n{len(rows)} sites hold {shrinkable:,} of {total:,} parameters ({100 * shrinkable / total:.1f} %).")
    if sites.refused:
        print("\nCannot shrink:")
        for refusal in sites.refused:
            print(f"  {refusal.name}: {refusal.reason}")
    return 0
