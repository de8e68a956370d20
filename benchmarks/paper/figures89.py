"""COMCAT, Figures 8 and 9: the rank of every layer of DeiT-small and DeiT-base as the search finds it.

    python benchmarks/paper/figures89.py --data /imagenet/train --eval /imagenet/val --out runs/figures89
    python benchmarks/paper/figures89.py --model timm:deit_small_patch16_224 --plan plan.json

The second form draws a plan found before and needs no pictures. Ranks of attention are those of a head, where the paper
states the sum over heads. Writes ranks-RECIPE.svg, or ranks-PLAN.svg.
"""

from __future__ import annotations

from pathlib import Path

from trained import command_of, finish, parser, prepared

from comcat import Plan, find_sites, load_model
from comcat.forms import check_plan
from comcat.report import figure_ranks
from comcat.report.rows import site_rows


def main(given: list[str] | None = None) -> dict:
    p = parser(__doc__, ("deit-small-half", "deit-base-61"), "runs/figures89", required=False)
    p.add_argument("--plan", type=Path, help="draw this plan instead of searching for one")
    a = p.parse_args(given)
    ranks: dict[str, list[int | None]] = {}
    if a.plan is not None:
        plan = Plan.load(a.plan)
        model = load_model(command_of(a.recipe[0], a).model, pretrained=a.pretrained)
        Path(a.out).mkdir(parents=True, exist_ok=True)
        ranks = _draw(model, plan, Path(a.out) / f"ranks-{a.plan.stem}.svg")
    elif a.data is None or a.eval is None:
        p.error("--data and --eval are needed to search, or --plan to draw a plan found before")
    else:
        for recipe in a.recipe:
            run = prepared(recipe, a)
            found = _draw(run.model, run.searched(f"{recipe}-plan"), run.out / f"ranks-{recipe}.svg")
            ranks |= {f"{recipe} {site}": pair for site, pair in found.items()}
    return finish(a, "figures89", ["kept", "of"], ranks)


def _draw(model, plan: Plan, path: Path) -> dict[str, list[int | None]]:
    """Draw ranks and hidden units; returns what is kept (None: it stays as it is) and what there was, by site."""
    sites = find_sites(model)
    check_plan(plan, sites)
    rows = [row for row in site_rows(plan, sites) if row.full]
    figure_ranks(rows).savefig(path)
    print(f"wrote {path}")
    return {row.name: [row.keep, row.full] for row in rows}


if __name__ == "__main__":
    main()
