"""What takes how long."""

from __future__ import annotations

from typing import Any

from common import of_rounds, rows_of, where


def speed(r: dict[str, Any]) -> str:
    rows = [
        [x["model"], f"−{100 * x['reduce']:g} %", x["plan"], x["dtype"], x["batch"],
            "compiled" if x["compiled"] else "eager", x["speed_up"],
         f"{x['speed_up_quartiles'][0]:.2f}–{x['speed_up_quartiles'][1]:.2f}", x["mac_ratio"], x["of_mac_ratio"],
         x["throughput"]] for x in r["rows"]
    ]  # fmt: skip
    head = [
        "model",
        "parameters",
        "plan",
        "dtype",
        "batch",
        "",
        "speed-up",
        "quartiles",
        "MAC ratio",
        "share of it",
        "images/s",
    ]
    return f"{rows_of(head, rows)}\n\n{where(r)}"


def time_by_operation(r: dict[str, Any]) -> str:
    keys = ("products", "attention", "rest", "share_of_rest", "mac_ratio", "most_of_mac_ratio")
    head = [
        "",
        "products, ms",
        "attention",
        "the rest",
        "share of the rest",
        "MAC ratio",
        "most of it that is possible",
    ]
    rows = [[name, *(x[k] for k in keys)] for name, x in r["rows"].items()]
    return (
        f"`{r['model']}` at −{100 * r['reduce']:g} %, batch {r['batch']}, fp32, by torch's "
        f"profiler.\n\n{rows_of(head, rows)}\n\n{where(r)}"
    )


def latency(r: dict[str, Any]) -> str:
    head = ["plan", "dense, ms", "time asked for", "predicted", "measured", "error"]
    rows = []
    for x in r["rows"]:
        plan = f"{x['model']}, {x['dtype']}, batch {x['batch']}, {x['forms'].replace(',', ' + ')}"
        if "refused" in x:
            rows.append([plan, "", x["target"], "refused: " + x["refused"].partition("allow ")[2], "", ""])
            continue
        low, high = x["measured_quartiles"]
        measured = f"{x['measured']:.3f} ({low:.3f}–{high:.3f})"
        rows.append(
            [plan, f"{x['dense_ms']:.1f}", x["target"], f"{x['predicted']:.3f}", measured, f"{100 * x['error']:+.1f} %"]
        )
    return (
        "Plans chosen by the times of parts alone, then timed whole beside the dense model; times as shares of the "
        f"dense model's. Mean error {100 * r['mean_error']:.1f} %, worst {100 * r['worst_error']:.1f} %."
        f"{' ' + r['note'] if 'note' in r else ''}\n\n{rows_of(head, rows)}\n\n{where(r)}"
    )


def export_speed(r: dict[str, Any]) -> str:
    head = ["runtime", "batch", "speed-up", "quartiles", "of PyTorch's", "MAC ratio", "compressed, ms", "× PyTorch"]
    rows = [
        [x["runtime"], x["batch"], f"{x['speed_up']:.2f}", "–".join(f"{q:.2f}" for q in x["quartiles"]),
         f"{x['of_pytorch']:.2f}", f"{x['mac_ratio']:.2f}", f"{1e3 * x['latency_s']['compressed']:.1f}",
         f"{x['against_pytorch']:.2f}"]
        for x in r["rows"]
    ]  # fmt: skip
    return (
        f"DeiT-small at −{100 * r['reduce']:g} % of the parameters against the dense one, inside each runtime; all in "
        f"one interleaved run, fp32, {r['threads']} threads.\n\n{rows_of(head, rows)}\n\n{where(r)}"
    )


def search_step(r: dict[str, Any]) -> str:
    rows = [
        [k, of_rounds(v), r["over_dense"][k], r["naive_over"][k], r["peak_bytes"][k] / 2**20, r["memory_over_dense"][k]]
        for k, v in r["seconds"].items()
    ]
    head = ["step", "seconds", "× dense", "naive is slower by", "peak MiB of tensors", "× dense"]
    return (
        f"{r['model']}, batch {r['batch']}, {r['dtype']}, {r['candidates']} candidates a "
        f"site.\n\n{rows_of(head, rows)}\n\n{where(r)}"
    )


def start(r: dict[str, Any]) -> str:
    return f"{r['summary']}\n\n{where(r)}"
