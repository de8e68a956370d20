"""Writes docs/results.md from the committed results: no figure there is typed by hand.

python benchmarks/summarise.py
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from common import RESULTS, quartiles, spread

PAGE = Path(__file__).resolve().parents[1] / "docs" / "results.md"
INTRO = """# Results

Every figure here was printed by a script in `benchmarks/` on the machine named, and this page is written from their
results by `python benchmarks/summarise.py`.
Ratios compare things measured in one run, interleaved.
"""


def main() -> None:
    found = [json.loads(p.read_text()) for p in sorted(RESULTS.glob("*/*.json"))]
    sections = [INTRO]
    for title, prefix, render in SECTIONS:
        texts = [render(r) for r in found if r["benchmark"].startswith(prefix)]
        if texts:
            sections.append(f"## {title}\n\n" + "\n\n".join(texts) + "\n")
    PAGE.write_text("\n".join(sections))
    print(f"wrote {PAGE}")


def where(r: dict[str, Any]) -> str:
    e = r["environment"]
    device = e.get("device") or e.get("cpu") or "?"
    parts = [str(device), f"{e.get('threads', '?')} thread(s)", f"torch {e.get('versions', {}).get('torch', '?')}"]
    return f"*{', '.join(parts)}; {r['date']}; `{r['command']}`*"


def rows_of(head: list[str], rows: list[list[Any]]) -> str:
    def cell(c: Any) -> str:
        return "–" if c is None else f"{c:.2f}" if isinstance(c, float) else str(c)

    lines = [head, ["---"] * len(head), *[[cell(c) for c in r] for r in rows]]
    return "\n".join("| " + " | ".join(r) + " |" for r in lines)


def factorise(r: dict[str, Any]) -> str:
    name = r["benchmark"].removeprefix("factorize-")
    rows = [[k, v, r["ratios"].get(k)] for k, v in r["seconds"].items()]
    return (
        f"{name}, every QK and VO product; largest difference of a singular value "
        f"{r['largest_relative_difference']:.0e} of the "
        f"largest.\n\n{rows_of(['way', 'seconds', 'times slower'], rows)}\n\n{where(r)}"
    )


def calibrate(r: dict[str, Any]) -> str:
    rows = [[k, v, r["ratios"].get(k)] for k, v in r["seconds"].items()]
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
    texts = [
        f"`{r['model']}`, dense {r['dense_top1']:.2f} % top-1 on {r['pictures']} validation pictures; "
        f"{r['calibration_pictures']} training pictures to calibrate on, "
        f"mean of {r['seeds']} seeds (spread: largest less smallest); no fine-tuning; rank multiple 1. What is won "
        "back is told where a point or more is lost. The classifier head (10 classes) is a site as well: in the whole "
        "model, `uniform` cuts it like any other, which costs it most."
    ]
    for part, title in (("mha", "attention (MHA)"), ("ffn", "feed-forward (FFN)"), ("model", "whole model")):
        rows = [x for x in r["rows"] if x["part"] == part]
        if not rows:
            continue
        methods = list(rows[0]["top1"])
        cells = [[m, *(_mean(x["top1"].get(m)) for x in rows)] for m in methods]
        for baseline in ("weights uniform", "paper code uniform"):
            key = f"won back of {baseline}, %"
            if any(key in x for x in rows):
                cells.append(
                    [
                        f"*default ({r['default']}) wins back of what {baseline} loses*",
                        *(
                            f"{x[key]:.0f} %"
                            if key in x and r["dense_top1"] - x["top1"][baseline]["mean"] >= 1
                            else None
                            for x in rows
                        ),
                    ]
                )
        texts.append(
            f"Top-1 with parameters saved in the {title}:\n\n"
            + rows_of(["method", *(f"−{100 * x['reduce']:g} %" for x in rows)], cells)
        )
    return "\n\n".join([*texts, where(r)])


def _mean(entry: dict[str, Any] | None) -> str | None:
    if entry is None:
        return None
    return f"{entry['mean']:.2f}" + (f" ± {entry['spread'] / 2:.2f}" if entry["spread"] is not None else "")


def prediction(r: dict[str, Any]) -> str:
    together = rows_of(
        ["saved in the whole model", "predicted", "measured KL"],
        [[f"{s:.0%}", f"{p:.4f}", f"{m:.4f}"] for s, p, m in r["together"]],
    )
    alone = rows_of(
        ["one site alone", "rank", "predicted", "measured KL"],
        [[n, k, f"{p:.4f}", f"{m:.4f}"] for n, k, p, m in r["alone"]],
    )
    near = [[k.upper(), v["weights"], v["identity"]] for k, v in r["cosine_to_occurring_moment"].items()]
    return "\n\n".join([
        f"`{r['model']}`, loss-aware statistic, {r['pictures']} validation pictures, nats a picture.", together, alone,
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


def search_step(r: dict[str, Any]) -> str:
    rows = [
        [k, v, r["over_dense"][k], r["naive_over"][k], r["peak_bytes"][k] / 2**20, r["memory_over_dense"][k]] for k,
        v in r["median"].items()
    ]  # fmt: skip
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


def real(r: dict[str, Any]) -> str:
    budgets = sorted({x["reduce"] for x in r["rows"]})
    rows = {(x["method"], x["reduce"]): x for x in r["rows"]}
    methods = list(dict.fromkeys(x["method"] for x in r["rows"]))
    against = f"less {r['settings']['against']}"
    head = ["method", *(f"−{100 * b:g} %" for b in budgets)]

    def scores(x: dict[str, Any] | None) -> str | None:
        return x and f"{x['mean']:.2f}" + ("" if x["std"] is None else f" ± {x['std']:.2f}")

    def difference(x: dict[str, Any] | None) -> str | None:
        found = x and x.get(against)
        return found and f"{found['mean']:+.2f} ({found['seed_error'] or 0:.2f}; {found['picture_error']:.2f})"

    told, paired = (
        rows_of(head, [[m, *(cell(rows.get((m, b))) for b in budgets)] for m in methods if any(cell(rows.get((m,
            b))) for b in budgets)])
        for cell in (scores, difference)
    )  # fmt: skip
    tuned = f"{r['settings']['tune']} steps of distillation" if r["settings"]["tune"] else "nothing tuned"
    return "\n\n".join([
        f"{r['about']}; {r['judged']} pictures judged, {r['calibration_pictures']} to calibrate on, {tuned}. Dense: "
        f"{r['dense']['score']:.2f} (error from the choice of pictures "
        f"{r['dense']['picture_error']:.2f}). {r['measure']} with parameters of the whole model saved, mean ± standard "
        "deviation over seeds:",
        told, f"Paired differences, {against} (in brackets: standard error over seeds; from the choice of pictures):",
        paired, where(r),
    ])  # fmt: skip


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


def start(r: dict[str, Any]) -> str:
    return f"{r['summary']}\n\n{where(r)}"


SECTIONS = [
    ("Real weights: DINOv2-small", "real-", real),
    ("Whether whole heads should go", "whole-heads", heads),
    ("Accuracy without fine-tuning", "accuracy", accuracy),
    ("Tuning, and ranks by search", "tuning", tuning),
    ("Prediction against outcome, product against unilateral", "prediction", prediction),
    ("Speed against MACs", "speed", speed),
    ("Where the time of a forward goes", "time-by-operation", time_by_operation),
    ("Factorisation", "factorize", factorise),
    ("Calibration", "calibrate", calibrate),
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
