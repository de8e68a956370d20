"""Tuning, alone and in several processes."""

from __future__ import annotations

from statistics import median
from typing import Any

from common import rows_of, where


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


def trained(r: dict[str, Any]) -> str:
    return (
        f"{r['parameters']:,} parameters, top-1 {r['top1']:.2f} % of {r['pictures']} validation pictures after "
        f"{r['settings']['epochs']:g} epochs, {r['seconds'] / 60:.0f} minutes.\n\n{where(r)}"
    )


def cait(r: dict[str, Any]) -> str:
    def with_spread(x: dict[str, Any], key: str) -> str:
        spread = x[f"{key}_std"]
        return f"{x[key]:.2f}" + ("" if spread is None else f" ± {spread:.2f}")

    head = ["variant", "MACs", "parameters", "times as fast", "top-1 before tuning", "after", "seeds"]
    model = {"dinov2-small": "DINOv2-small with a linear CIFAR-10 head, 112 pixels"}
    rows = []
    for x in r["rows"]:
        each = [
            f"{run['speed_up'][0]:.2f}" for run in r["runs"] if run["variant"] == x["variant"] and "speed_up" in run
        ]
        fast = f"{x['speed_up'][0]:.2f} ({x['speed_up'][1]:.2f}–{x['speed_up'][2]:.2f})"
        fast += f"; by seed {', '.join(each)}" if len(each) > 1 else ""
        shares = [f"{x[key]:.2f}" for key in ("macs", "parameters")]
        rows.append([x["variant"], *shares, fast, with_spread(x, "before"), with_spread(x, "after"), x["seeds"]])
    about = (
        f"{model.get(r['settings']['model'], 'The small CIFAR ViT')}, dense {r['dense']:.2f}; "
        f"{r['settings']['epochs']:g} epoch of tuning, the dense model being the teacher."
    )
    return f"{about}\n\n{rows_of(head, rows)}\n\n{where(r)}"


def cdcp(r: dict[str, Any]) -> str:
    """Gates that are trained beside the closed form on the same sites, at equal cost and equal training."""
    called = {
        "ranks + units": "closed form, every form", "channels": "closed form, the sites that gates act on",
        "cdcp": "gates that begin at the closed form", "cdcp blind": "gates that begin at nothing",
    }  # fmt: skip
    rows = [
        [f"−{100 * x['saving']:g} %", called[x["way"]], f"{x['top1_mean']:.2f} ± {x['top1_spread']:.2f}",
         f"{x['returned_mean']:.0f}", x["seeds"]] for x in r["rows"]
    ]  # fmt: skip
    s = r["settings"]
    about = (
        f"`{s['model']}`, dense {r['dense']:.2f}; {s['tune']['epochs']:g} epochs of training for every way, the dense "
        "model being the teacher; mean ± standard deviation over seeds. What came back are channels that gates had "
        "shut and opened again."
    )
    return f"{about}\n\n{rows_of(['parameters', 'way', 'top-1', 'came back', 'seeds'], rows)}\n\n{where(r)}"


def search_runs(r: dict[str, Any]) -> str:
    """Where long searches end."""
    rows = [
        [x["run"], str(x["steps"]), f"{x['seconds'] / 60:.0f}", f"{x['moved']} of {len(x['sizes'])}",
         *(f"{x[k]:.2f}" for k in ("kept", "derived", "closed")), f"{x['closed_seconds']:.0f} s"] for x in r["rows"]
    ]  # fmt: skip
    head = ["search", "steps", "minutes", "sizes moved", "weights kept", "weights derived anew", "closed form", "in"]
    sizes = []
    for x in r["rows"]:
        told = ", ".join(f"{site} {'–' if a is None else a} → {'–' if b is None else b}"
                         for site, (a, b) in x["sizes"].items())  # fmt: skip
        sizes.append(f"Sizes of *{x['run']}*, closed form → search (– is left as it is): {told}.")
    return "\n\n".join([
        f"−{100 * r['reduce']:g} % of the parameters, {r['judged']} validation pictures, dense {r['dense']:.2f}, "
        "nothing tuned after. The closed form beside a search has the same forms. Minutes and seconds are of a machine "
        "that did other work beside.",
        rows_of(head, rows), *sizes, where(r),
    ])  # fmt: skip
