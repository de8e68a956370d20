"""The sections on real weights of the page of results."""

from __future__ import annotations

from statistics import mean
from typing import Any

from common import rows_of, where


def real(r: dict[str, Any]) -> str:
    budgets = sorted({x["reduce"] for x in r["rows"]})
    rows = {(x["method"], x["reduce"]): x for x in r["rows"]}
    methods = list(dict.fromkeys(x["method"] for x in r["rows"]))
    against = f"less {r['settings']['against']}"
    head = ["method", *(f"−{100 * b:g} %" for b in budgets)]

    def scores(x: dict[str, Any] | None) -> str | None:
        if x is None:
            return None
        return f"{x['mean']:.2f}" + ("" if x["std"] is None else f" ± {x['std']:.2f}")

    def difference(x: dict[str, Any] | None) -> str | None:
        if x is None or against not in x:
            return None
        found = x[against]
        seeds = "one seed" if found["seed_error"] is None else f"{found['seed_error']:.2f}"
        return f"{found['mean']:+.2f} ({seeds}; {found['picture_error']:.2f})"

    told, paired = (
        rows_of(head, [[m, *(cell(rows.get((m, b))) for b in budgets)] for m in methods if any(cell(rows.get((m,
            b))) for b in budgets)])
        for cell in (scores, difference)
    )  # fmt: skip
    tuned = f"{r['settings']['tune']} steps of distillation" if r["settings"]["tune"] else "nothing tuned"
    return "\n\n".join([
        f"{r['about']}; {r['judged']} pictures judged, {r['calibration_pictures']} to calibrate on, {tuned}. Dense: "
        f"{r['dense']['score']:.2f} (error from the choice of pictures "
        f"{r['dense']['picture_error']:.2f}). {r['measure']} with {_saved(r['settings']['methods'])}, mean ± standard "
        "deviation over seeds:",
        told, *_alike(r, rows, methods, budgets),
        f"Paired differences, {against} (in brackets: standard error over seeds; from the choice of pictures):",
        paired, where(r),
    ])  # fmt: skip


def _saved(methods: dict[str, Any]) -> str:
    """What the budgets of all rows are a share of."""
    kinds = {
        "tokens left out, on the mean over blocks" if {"merge", "published"} & set(k)
        else "multiply-accumulates of the whole model saved" if k.get("budget") == "macs"
        else "parameters of the whole model saved" for k in methods.values()
    }  # fmt: skip
    return " or ".join(sorted(kinds, reverse=True))


def _alike(r: dict[str, Any], rows: dict[Any, Any], methods: list[str], budgets: list[float]) -> list[str]:
    """How like the dense model's masks the masks stay, where the score is against true ones: the two can part."""
    if r["measure"] != "mean_iou":
        return []

    def cell(x: dict[str, Any] | None) -> str | None:
        return x and f"{mean(run['scores']['agreement'] for run in x['runs']):.1f}"

    table = [[m, *(cell(rows.get((m, b))) for b in budgets)] for m in methods]
    head = ["method", *(f"−{100 * b:g} %" for b in budgets)]
    return [
        "IoU of the nuclei with the dense model's own mask, which is what compression is to keep:",
        rows_of(head, table),
    ]


def heads(r: dict[str, Any]) -> str:
    rows = [
        [x["task"], f"−{100 * x['reduce']:g} %", f"{x['predicted_ranks']:.4f}", f"{x['predicted_with_heads']:.4f}",
            f"{100 * x['gain']:.1f} %", f"{x['heads_gone']} of {x['heads']}",
         f"{x['difference']['mean']:+.2f} ± "
         f"{x['difference']['picture_error']:.2f}" if "difference" in x else None] for x in r["rows"]
    ]  # fmt: skip
    columns = [
        "task",
        "parameters",
        "predicted loss, ranks",
        "with whole heads",
        "less by",
        "heads gone",
        "measured gain",
    ]
    return (
        "Predicted loss at equal parameters, in the statistic's own unit; measured where it falls by more than "
        f"{100 * r['settings']['verify']:g} %.\n\n{rows_of(columns, rows)}\n\n{where(r)}"
    )


def times(r: dict[str, Any]) -> str:
    budgets = sorted({x["reduce"] for x in r["rows"]})
    rows = {(x["method"], x["reduce"]): x for x in r["rows"]}

    def cell(x: dict[str, Any] | None) -> str | None:
        return x and f"{x['speed_up']:.2f} ({x['speed_up_quartiles'][0]:.2f}–{x['speed_up_quartiles'][1]:.2f})"

    head = ["method", *(f"−{100 * b:g} %" for b in budgets)]
    table = [[m, *(cell(rows.get((m, b))) for b in budgets)] for m in dict.fromkeys(x["method"] for x in r["rows"])]
    return (
        f"{r['about']}; times as fast as the dense model, batch {r['batch']}, float32, with quartiles. Methods that "
        f"merge tokens run so many fewer tokens and save no parameters.\n\n{rows_of(head, table)}\n\n{where(r)}"
    )


CALLED = {"channels": "ranks and units", "all": "ranks, units and tokens"}


def nuclei(r: dict[str, Any]) -> str:
    """The segmenter with fewer tokens, narrower channels or both, untuned and tuned, at measured speed."""
    s = r["settings"]
    rows = [
        [CALLED.get(x["row"], x["row"]), f"−{100 * (1 - x['macs']):.0f} %", f"−{100 * (1 - x['parameters']):.0f} %",
         f"{x['speed_up'][0]:.2f} ({x['speed_up'][1]:.2f}–{x['speed_up'][2]:.2f})", x["before"], x["after"],
         f"{-x['loss']:+.2f} ± {x['loss_picture_error']:.2f}"] for x in r["rows"]
    ]  # fmt: skip
    head = ["what is less", "MACs", "parameters", "times as fast", "mean IoU untuned", "tuned", "against dense"]
    return "\n\n".join([
        f"{r['about']}: dense {r['dense']:.2f} on {r['judged']} held-out pictures. {s['steps']} steps of tuning with "
        f"{s['batch']} pictures each, whose only teacher is the dense model, pixel by pixel; no mask is read. Times at "
        f"batch {s['batch']}, float32. ± is the error from the choice of pictures.",
        rows_of(head, rows), where(r),
    ])  # fmt: skip


def token_overhead(r: dict[str, Any]) -> str:
    """What merging costs beside the forward that it serves."""
    names = {"similar": "look-alikes", "grid": "windows of the grid"}
    rows = [
        [names[how], f"{x['ms']:.1f}", f"{100 * x['share']:.2f} % ({100 * x['low']:.2f}–{100 * x['high']:.2f})",
         f"{100 * x['goal']:g} %"] for how, x in r["rows"].items()
    ]  # fmt: skip
    return "\n\n".join([
        f"{r['model']}, batch {r['batch']}, float32, {100 * r['keep']:g} % of the tokens: what its blocks "
        "spend beside running, in each forward, as a share of it.",
        rows_of(["merging", "ms a forward", "share of the forward", "goal"], rows),
        "Look-alikes in one block, apart from its forward: " + ", ".join(
            f"{part} {r['ms'][part]:.1f} ms" for part in ("find", "mean", "hand back")) + "; the block itself "
        f"{r['ms']['block']:.1f} ms. Means and handing back move all tokens through memory and compute little.",
        where(r),
    ])  # fmt: skip
