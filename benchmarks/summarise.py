"""Writes docs/results.md from the committed results: no figure there is typed by hand.

python benchmarks/summarise.py
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean, median, quantiles, stdev
from typing import Any

from card.page import card_accuracy, card_speed, caveat
from common import RESULTS, quartiles, rows_of, spread, where
from growth import page as growth
from real.page import heads, nuclei, real, times, token_overhead

PAGE = Path(__file__).resolve().parents[1] / "docs" / "results.md"
INTRO = """# Results

**No ImageNet figure exists here**: nobody has run these methods on ImageNet with this library yet. With the data and a
card, `python benchmarks/paper/table2.py` makes the paper's main table, and the other scripts in `benchmarks/paper/` its
other tables and figures. What stands first here was measured on real pretrained weights, a DINOv2-small; the small
vision transformer trained on CIFAR-10 comes second.

Every figure was printed by a script in `benchmarks/` on the machine named, and this page is written from their
results by `python benchmarks/summarise.py`. Ratios compare things measured in one run, interleaved. ± is one thing
everywhere: the standard deviation over seeds. The error from having judged these pictures and no others is from a
bootstrap, and stands beside it where it was measured.
Quartiles stand beside times wherever the rounds were kept.

![Accuracy of a DINOv2-small against what is left of its parameters](real-weights.svg)
"""


def main() -> None:
    PAGE.write_text(page())
    print(f"wrote {PAGE}")


def page() -> str:
    """The whole page, from the results that are committed."""
    found = [json.loads(p.read_text()) for p in sorted(RESULTS.glob("*/*.json"))]
    sections = [INTRO]
    for title, prefix, render in SECTIONS:
        texts = [render(r) for r in found if r["benchmark"].startswith(prefix)]
        if texts:
            before = [PICTURES[prefix]] if prefix in PICTURES else []
            sections.append(f"## {title}\n\n" + "\n\n".join([*before, *texts]) + "\n")
    return "\n".join(sections)


def of_rounds(values: list[float]) -> str:
    """Median and quartiles of some rounds, as a table shows them."""
    low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return quartiles({"low": low, "median": middle, "high": high})


def factorise(r: dict[str, Any]) -> str:
    name, quartiles = r["benchmark"].removeprefix("factorize-"), r.get("ratio_quartiles", {})
    rows = [
        [k, v, r["ratios"].get(k), f"{quartiles[k][0]:.2f}–{quartiles[k][1]:.2f}" if k in quartiles else None]
        for k, v in r["seconds"].items()
    ]
    head, told = ["way", "seconds", "times slower", "quartiles"], f"{r['largest_relative_difference']:.0e}"
    about = f"{name}, every QK and VO product; largest difference of a singular value {told} of the largest."
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


def tuning(r: dict[str, Any]) -> str:
    t = r["settings"]["tune"]
    rows = [
        [f"−{100 * x['saving']:g} %", x["rule"],
            *(f"{x[f'{k}_mean']:.2f}" + (f" ± {x[f'{k}_spread']:.2f}" if x["seeds"] > 1 else "") for k in ("before",
                "after")),
         f"{x['ranks_s_mean']:.0f}", f"{x['tuning_s_mean']:.0f}", x["seeds"]] for x in r["rows"]
    ]  # fmt: skip
    samples = round(t["epochs"] * r["settings"]["training_pictures"])
    return "\n\n".join([
        f"`{r['settings']['model']}`, dense {r['dense']:.2f} % top-1 on 5000 validation pictures; {samples:,} training "
        f"samples of tuning with the dense model as the teacher (batch {t['batch_size']}, "
        f"learning rate {t['lr']:g}); mean ± standard deviation over seeds. The classifier head stays as it is. "
        "Seconds were taken on a machine that did other work beside.",
        rows_of(["parameters", "ranks", "top-1 before tuning", "after", "seconds for ranks and weights", "for tuning",
            "seeds"], rows), where(r),
    ])  # fmt: skip


def adapter_cost(r: dict[str, Any]) -> str:
    stored = ", ".join(f"{k} attention {v['bytes'] / 1e6:.3f} MB" for k, v in r["stored"].items())
    rows = [
        [k, v["seconds"], v["peak_bytes"] / 1e6, f"{v['parameters']:,}", quartiles(v["of_this"]["comcat"])]
        for k, v in r["training"].items()
    ]  # fmt: skip
    inference = [[k, v["seconds"], quartiles(v["of_plain"], 3)] for k, v in r["inference"].items()]
    return "\n\n".join([
        f"{r['model']}, its true shapes with random weights, pictures of {r['side']} pixels, {r['dtype']}, "
        f"{r['rounds']} rounds. Stored at rank 2 in 16 bit: {stored}.",
        rows_of(["training step", "seconds", "peak MB", "trained", "comcat takes"], rows),
        rows_of(["inference", "seconds", "× plain"], inference), where(r),
    ])  # fmt: skip


def card_adapter(r: dict[str, Any]) -> str:
    return adapter_cost(r) + caveat(r)


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


def distributed(r: dict[str, Any]) -> str:
    p, k = r["processes"], r["killed"]
    kills = ", ".join(f"after step {x['step']}" for x in k["kills"])
    same = "bit for bit those" if k["weights_equal_bit_for_bit"] else "**not** those"
    return "\n\n".join([
        f"`{r['model']}` at −{100 * r['reduce']:g} %, {r['steps']} steps of {r['batch_size']} pictures in all. Largest "
        "difference of a step's loss between one process and two (gloo): "
        f"{p['largest_difference']:.1e}. A run killed with SIGKILL {kills}, and repeated each time, ended with weights "
        f"{same} of the undisturbed run.", where(r),
    ])  # fmt: skip


def throughput(r: dict[str, Any]) -> str:
    s = r["settings"]
    rows = [
        [x["tuning"], f"{x['bare']:.0f}", f"{x['comcat']:.0f}", f"{median(x['ratios']):.2f} "
            f"({min(x['ratios']):.2f}–{max(x['ratios']):.2f})"] for x in r["rows"]
    ]  # fmt: skip
    return "\n\n".join([
        f"`{r['model']}` at −{100 * s['reduce']:g} %, batch {s['batch_size']}, {s['precision']}, {s['workers']} "
        "worker(s). The bare loop has its pictures ready in memory; tuning decodes and augments each.",
        rows_of(["tuning", "bare loop, pictures/s", "comcat.tune", "ratio"], rows), where(r),
    ])  # fmt: skip


def customization(r: dict[str, Any]) -> str:
    before, s = r["untouched"], r["settings"]
    parts = [
        f"The embedded pipeline learns its tenth digit from 10 pictures in {s['steps']} steps of {s['batch']}; "
        f"{s['samples']} pictures a number, {len(s['seeds'])} seeds, mean ± standard deviation. Features for KID "
        f"and FID: {r['features']}, a classifier trained apart on real scans, so they compare methods here and nothing "
        "else. Seconds were taken on a machine that did other work beside. The half steps of the learning rates, 207 "
        "pictures instead of 72 to choose them by, and the variants with a new token and with dropout 0.1 were added "
        "after first results of seeds 0 to 2 had been seen; dropout 0.05 after those of dropout 0.1. Seeds 3 to 5 "
        f"were new to all. Before: concept recognised {100 * before['recognised']:.1f} %, KID {before['kid']:.0f}; the "
        f"other nine, in white as their accuracy is taken, {100 * before['others']:.1f} %."
    ]  # fmt: skip
    for mode, methods in r["modes"].items():
        rows = [
            [name, f"{m['lr']['mean']:.2g}", spread(m["seconds"]), spread(m["peak_bytes"], 1e-6),
                spread(m["stored_bytes"], 1e-3), spread(m["recognised"], 100), spread(m["kid"], 1, 0),
             spread(m["fid"]), spread(m["others"], 100), spread(m["others_kid"])] for name, m in methods.items()
        ]  # fmt: skip
        head = [
            "method",
            "rate",
            "seconds",
            "peak MB",
            "stored kB",
            "recognised %",
            "KID",
            "FID",
            "the nine %",
            "their KID",
        ]
        parts.append(f"**{MODES[mode]}**\n\n{rows_of(head, rows)}")
    return "\n\n".join([*parts, where(r)])


MODES = {
    "published": "As published: each with its own regularisation, and all but comcat encoding pictures and prompts at "
    "every step",
    "equal": "Equal: all with comcat's cache and with prior preservation",
}


def trained(r: dict[str, Any]) -> str:
    return (
        f"{r['parameters']:,} parameters, top-1 {r['top1']:.2f} % of {r['pictures']} validation pictures after "
        f"{r['settings']['epochs']:g} epochs, {r['seconds'] / 60:.0f} minutes.\n\n{where(r)}"
    )


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


def start(r: dict[str, Any]) -> str:
    return f"{r['summary']}\n\n{where(r)}"


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


def cait(r: dict[str, Any]) -> str:
    def with_spread(x: dict[str, Any], key: str) -> str:
        spread = x[f"{key}_std"]
        return f"{x[key]:.2f}" + ("" if spread is None else f" ± {spread:.2f}")

    head = ["variant", "MACs", "parameters", "times as fast", "top-1 before tuning", "after", "seeds"]
    rows = []
    for x in r["rows"]:
        fast = f"{x['speed_up'][0]:.2f} ({x['speed_up'][1]:.2f}–{x['speed_up'][2]:.2f})"
        shares = [f"{x[key]:.2f}" for key in ("macs", "parameters")]
        rows.append([x["variant"], *shares, fast, with_spread(x, "before"), with_spread(x, "after"), x["seeds"]])
    return (
        f"The small CIFAR ViT, dense {r['dense']:.2f}; {r['settings']['epochs']:g} epoch of tuning, the dense model "
        f"being the teacher.\n\n{rows_of(head, rows)}\n\n{where(r)}"
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


PICTURES = {"accuracy": "![COMCAT's Tables 1 and 4 on the small CIFAR transformer, not on ImageNet](paper-tables.svg)"}
"""What stands before a section's tables."""
SECTIONS = [
    ("Real weights: DINOv2-small", "real-", real),
    ("Real weights: time of a forward", "forward-", times),
    ("Whether whole heads should go", "whole-heads", heads),
    ("On one card: speed", "gpu speed", card_speed),
    ("On one card: fewer tokens", "gpu tokens", card_speed),
    ("On one card: a budget of time", "gpu latency", latency),
    ("On one card: accuracy", "gpu accuracy", card_accuracy),
    ("On one card: what a diffusion adapter costs", "gpu adapter", card_adapter),
    ("Accuracy without fine-tuning", "accuracy", accuracy),
    ("Tuning, and ranks by search", "tuning", tuning),
    ("Prediction against outcome, product against unilateral", "prediction", prediction),
    ("Speed against MACs", "speed", speed),
    ("A budget of time: predicted and measured", "latency", latency),
    ("Exported files inside their runtimes", "export-speed", export_speed),
    ("Tokens and channels after a short tuning", "cait", cait),
    ("A segmenter of nuclei, tuned on its teacher's maps", "nuclei", nuclei),
    ("What merging tokens costs", "token-overhead", token_overhead),
    ("Where the time of a forward goes", "time-by-operation", time_by_operation),
    ("Factorisation", "factorize", factorise),
    ("Calibration", "calibrate", calibrate),
    ("Cost as the model grows", "growth", growth),
    ("A step of rank search", "search-step", search_step),
    ("What a diffusion adapter costs", "adapter-cost", adapter_cost),
    ("Several processes, and runs that are killed", "distributed", distributed),
    ("Throughput of tuning", "throughput", throughput),
    ("A DeiT-tiny for CIFAR-10", "train-", trained),
    ("A new concept, beside other methods", "customization", customization),
    ("Start-up", "import", start),
]

if __name__ == "__main__":
    main()
