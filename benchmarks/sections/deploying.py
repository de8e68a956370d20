"""Sections on budgets of time, on commands from the shell, and on what has left PyTorch."""

from __future__ import annotations

from typing import Any

from common import rows_of, where


def equal_time(r: dict[str, Any]) -> str:
    """What every budget loses at one measured time, and what a short tuning wins back."""
    rows = [
        [f"{x['share']:g}", x["method"], f"{x['measured'][0]:.2f} ({x['measured'][1]:.2f}–{x['measured'][2]:.2f})",
         f"{x['parameters'] / 1e6:.1f} M", f"{x['scores']['divergence'] / 100:.3f}", f"{x['scores']['top1']:.1f}",
         _more(x.get("more than time")), f"{x['tuned']['top1']:.1f}" if "tuned" in x else None]
        for x in sorted(r["rows"], key=lambda x: (-x["share"], x["method"] != "time", x["scores"]["divergence"]))
    ]  # fmt: skip
    s = r["settings"]
    tuned = f" Tuned: {s['tune']} steps of 64 pictures with the dense model as the teacher." if s["tune"] else ""
    head = [
        "asked",
        "budget",
        "measured share of time",
        "parameters",
        "KL, nats",
        "top-1",
        "KL more than time's",
        "tuned",
    ]
    return "\n\n".join([
        f"{r['about']}, batch {s['batch']}, float32, {r['threads_of_times']} threads: every budget brought to the time "
        f"that the plan under the budget of time measured. {s['judged']} held-out pictures, {s['pictures']} to "
        f"calibrate on, one sample; dense: top-1 {r['dense']['top1']:.1f}. ± is the error from the choice of "
        f"pictures.{tuned}",
        rows_of(head, rows), *_goals(r), where(r),
    ])  # fmt: skip


def _more(found: dict[str, Any] | None) -> str | None:
    return None if found is None else f"{found['mean'] / 100:+.3f} ± {found['picture_error'] / 100:.3f}"


def _goals(r: dict[str, Any]) -> list[str]:
    told = [
        f"at {g['share']:g} of the time {'no more than the best of the others' if g['best'] else 'more than the best'}"
        f", {abs(100 * g['less_than_median']):.0f} % {'less' if g['less_than_median'] >= 0 else 'more'} than their "
        "median"
        for g in r["goals"] if "best" in g
    ]  # fmt: skip
    return [f"The budget of time loses {'; '.join(told)}."] if told else []


def commands(r: dict[str, Any]) -> str:
    """Seconds of whole commands."""
    rows = []
    for name, x in r["rows"].items():
        found = ""
        if "bytes" in x:
            found = f"a page of {x['bytes'] / 1e6:.2f} MB"
        if "speed_up" in x:
            found = f"{x['speed_up']:.2f} times as fast, measured"
        rows.append([name, f"`{x['command'].replace('{data}', 'PICTURES')}`", f"{x['seconds']:.0f}", found])
    return rows_of(["", "command", "seconds", "result"], rows) + f"\n\n{where(r)}"


def export_parity(r: dict[str, Any]) -> str:
    """The largest error of every exported file; a model's forms in one row."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for x in r["rows"]:
        to = x.get("to")
        for at in [to] if to else ["onnx", "openvino"]:
            told = "refused" if "refused" in x else f"{x['relative_error']:.1e}"
            if x.get("unsettled"):
                told += f" ({x['unsettled']} apart)"
            cells.setdefault((x["model"], at), {})[x["compressed"]] = told
    forms = list(dict.fromkeys(x["compressed"] for x in r["rows"]))
    counts = sorted({x["count"] for x in r["rows"] if "count" in x})
    met = sum(x.get("relative_error", 1.0) <= 1e-4 for x in r["rows"])
    largest = max(x.get("max_error", 0.0) for x in r["rows"])
    rows = [[model, to, *(found.get(form) for form in forms)] for (model, to), found in cells.items()]
    refused = sorted({f"{x['model']}, {x['compressed']}: {x['refused']}" for x in r["rows"] if "refused" in x})
    return "\n\n".join([
        f"Largest difference of an output from PyTorch's in float32, in parts of the largest output, over "
        f"{' or '.join(map(str, counts))} real pictures; goal: at most 1e-4. {met} of {len(r['rows'])} files meet it; "
        f"the largest difference itself is {largest:.1e}. Saliency and nuclei have real weights, the others random "
        "ones. Apart are pictures on which rounding decides which tokens merge, in PyTorch as well.",
        rows_of(["model", "file", *forms], rows), *(f"Refused: {line}" for line in refused), where(r),
    ])  # fmt: skip


def export_int8(r: dict[str, Any]) -> str:
    """What int8 costs a segmenter, and what it saves."""
    rows = [
        [x["precision"], f"{x['size_bytes'] / 2**20:.1f} MiB", f"{x['of_float32']:.2f}",
         f"{x['iou']:.3f}" if x.get("iou") is not None else None, f"{x['cosine']:.4f}"]
        for x in r["rows"]
    ]  # fmt: skip
    return "\n\n".join([
        f"The saliency model at −{100 * r['reduce']:g} % of its parameters in ONNX Runtime, against itself in float32 "
        f"in PyTorch on {r['pictures']} photographs; goals: IoU at least 0.92, and a file of at most 0.27.",
        rows_of(["precision", "file", "of float32", "IoU", "cosine"], rows), where(r),
    ])  # fmt: skip
