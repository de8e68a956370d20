"""COMCAT, Figure 7: how a search goes with several exponents β of the cost (Eq. 6).

    python benchmarks/paper/figure7.py --data /imagenet/train --eval /imagenet/val --out runs/figure7

Shows expected parameters, cross-entropy and held-out top-1 over the steps of each search; prints top-1 on the
evaluation pictures of the model compressed by each plan, without tuning. Writes figure7.svg.
"""

from __future__ import annotations

from trained import finish, parser, prepared

from comcat.report import figure_curves, search_series


def main(given: list[str] | None = None) -> dict:
    p = parser(__doc__, ("deit-small-half",), "runs/figure7")
    p.add_argument("--beta", type=float, nargs="+", default=(0.5, 1.0, 1.5, 2.0))
    a = p.parse_args(given)
    run = prepared(a.recipe[0], a)
    rows, series = {}, []
    for beta in a.beta:
        plan = run.searched(f"beta-{beta:g}", beta=beta)
        found = plan.made_by["search"]
        series += search_series(found, f"β = {beta:g}")
        small, _ = run.small(plan)
        last = [point for point in found["curve"] if "top1" in point][-1]
        rows[f"β = {beta:g}"] = [100 * last["cost"], last["top1"], 100 * plan.made_by["saved"], run.judge(small).top1]
    figure_curves(series, width=9.6).savefig(run.out / "figure7.svg")
    columns = ["expected cost, %", "held-out top-1", "plan saves, %", "top-1 untuned"]
    settings = run.settings()["search"]
    return finish(a, "figure7", columns, rows, model=run.name, series=series, settings=settings)


if __name__ == "__main__":
    main()
