"""COMCAT, Figure 6: ranks found by search against ranks set by hand (the same share everywhere): top-1 and parameters
over epochs.

    python benchmarks/paper/figure6.py --data /imagenet/train --eval /imagenet/val --out runs/figure6

The epochs of the search come first, with top-1 on the training pictures that it holds out; then both models are tuned
alike, with top-1 on the evaluation pictures. The search hands over ranks and no weights: tuning begins at the model
compressed by them. Writes figure6.svg.
"""

from __future__ import annotations

from trained import finish, parser, prepared

from comcat.report import figure_curves, progress_series


def main(given: list[str] | None = None) -> dict:
    a = parser(__doc__, ("deit-small-half",), "runs/figure6").parse_args(given)
    run = prepared(a.recipe[0], a)
    rows, series = {"as it was": [run.parameters / 1e6, run.dense.top1, run.dense.top1]}, []
    for label, plan in (("search", run.searched("search-plan")), ("uniform", run.uniform())):
        report, tuning = run.tuned(label, plan)
        rows[label] = [(report.after["parameters"] or 0.0) / 1e6, report.between["top1"], report.after["top1"]]
        series += progress_series(
            label, plan.made_by, tuning, parameters=run.parameters, pictures=len(run.training)
        )  # fmt: skip
    figure_curves(series, columns=2, width=9.6).savefig(run.out / "figure6.svg")
    columns = ["parameters, millions", "top-1 untuned", "top-1 tuned"]
    return finish(a, "figure6", columns, rows, model=run.name, series=series, settings=run.settings())


if __name__ == "__main__":
    main()
