"""What is decomposed, what is chosen, and what that keeps of the accuracy."""

from __future__ import annotations

from statistics import mean, stdev
from typing import Any

from common import of_rounds, rows_of, where


def factorise(r: dict[str, Any]) -> str:
    name, quartiles = r["benchmark"].removeprefix("factorize-"), r.get("ratio_quartiles", {})
    rows = [
        [k, v, r["ratios"].get(k), f"{quartiles[k][0]:.2f}–{quartiles[k][1]:.2f}" if k in quartiles else None]
        for k, v in r["seconds"].items()
    ]
    head, told = ["way", "seconds", "times slower", "quartiles"], f"{r['largest_relative_difference']:.0e}"
    about = (
        f"{name}, every QK and VO product; a singular value differs from the float32 product's by at most {told} "
        "of the largest."
    )
    if "thin QR" in r["seconds"]:
        about += " Thin QR is the textbook's way: a QR of either factor and a k × k SVD."
    return f"{about}\n\n{rows_of(head, rows)}\n\n{where(r)}"


def calibrate(r: dict[str, Any]) -> str:
    samples, dense = r["samples"], r["samples"]["forward"]
    rows = [
        [k, of_rounds(v), None if k == "forward" else of_rounds([a / b for a, b in zip(v, dense, strict=True)])]
        for k, v in samples.items()
    ]
    memory = [[k.rpartition("-")[0], int(k.rpartition("-")[2]), v / 2**20] for k, v in r["peak_rss_bytes"].items()]
    return "\n\n".join([
        f"{r['benchmark'].removeprefix('calibrate-')}, {r['pictures']} pictures.",
        rows_of(["", "seconds", "× forward"], rows),
        rows_of(["statistic", "pictures", "peak resident MiB"], memory), where(r),
    ])  # fmt: skip


def accuracy(r: dict[str, Any]) -> str:
    head = r.get("head") == "kept"
    texts = [
        f"`{r['model']}`, dense {r['dense_top1']:.2f} % top-1 on {r['pictures']} validation pictures; "
        f"{r['calibration_pictures']} training pictures to calibrate on, mean ± standard deviation over {r['seeds']} "
        "seeds; no fine-tuning; rank multiple 1. What is won back is told where a point or more is lost"
        f"{', ± the error from the choice of pictures. The classifier head stays for every method' if head else ''}."
    ]
    for part, title in (("mha", "attention (MHA)"), ("ffn", "feed-forward (FFN)"), ("model", "whole model")):
        rows = [x for x in r["rows"] if x["part"] == part and (head or part != "model")]  # else uniform cut the head
        if rows:
            table = rows_of(["method", *(f"−{100 * x['reduce']:g} %" for x in rows)], _accuracies(r, rows))
            texts.append(f"Top-1 with parameters saved in the {title}:\n\n{table}")
    return "\n\n".join([*texts, where(r)])


def _accuracies(r: dict[str, Any], rows: list[dict[str, Any]]) -> list[list[Any]]:
    """A line a method, then what the default wins back of the baselines' losses."""
    cells: list[list[Any]] = [[m, *(_mean(x["top1"].get(m)) for x in rows)] for m in rows[0]["top1"]]
    default = r["default"] if isinstance(r["default"], str) else r["default"][rows[0]["part"]]
    for baseline in ("weights uniform", "paper code uniform"):
        told = [_won_back(r, x, baseline) for x in rows]
        if any(told):
            cells.append([f"*default ({default}) wins back of what {baseline} loses*", *told])
    return cells


def _won_back(r: dict[str, Any], row: dict[str, Any], baseline: str) -> str | None:
    if baseline not in row["top1"] or r["dense_top1"] - row["top1"][baseline]["mean"] < 1:
        return None
    if (found := row.get(f"won back of {baseline}")) is None:
        return f"{row[f'won back of {baseline}, %']:.0f} %"
    return f"{found['mean']:.0f} ± {found['picture_error']:.0f} %"


def _mean(entry: dict[str, Any] | None) -> str | None:
    if entry is None:
        return None
    return f"{entry['mean']:.2f}" + (f" ± {stdev(entry['values']):.2f}" if len(entry["values"]) > 1 else "")


def prediction(r: dict[str, Any]) -> str:
    def told(values: list[float] | float) -> str:
        many = values if isinstance(values, list) else [values]
        return f"{mean(many):.4f}" + (f" ± {stdev(many):.4f}" if len(many) > 1 else "")

    together = rows_of(
        ["saved in the whole model", "predicted", "measured KL"],
        [[f"{s:.0%}", told(p), told(m)] for s, p, m in r["together"]],
    )
    alone = rows_of(
        ["one site alone", "size", "predicted", "measured KL"],
        [[n, k, told(p), told(m)] for n, k, p, m in r["alone"]],
    )
    near = [[k.upper(), v["weights"], v["identity"]] for k, v in r["cosine_to_occurring_moment"].items()]
    seeds = f"mean ± standard deviation over {r['seeds']} calibration samples, " if "seeds" in r else ""
    return "\n\n".join([
        f"`{r['model']}`, loss-aware statistic, {r['pictures']} validation pictures, {seeds}nats a picture.",
        together, alone,
        "Cosine of the left Gram matrix to the second moment that really occurs there, mean over heads and layers:",
        rows_of(["product", "weights (WᵀW)", "unilateral (I)"], near), where(r),
    ])  # fmt: skip
