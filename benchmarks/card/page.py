"""The sections on one card of the page of results."""

from __future__ import annotations

from typing import Any

from common import rows_of, where
from real.page import real


def card_speed(r: dict[str, Any]) -> str:
    head = ["model", "plan", "batch", "", "speed-up", "quartiles", "MAC ratio", "share of it", "× ranks alone"]
    rows = [
        [x["model"], x["plan"], x["batch"], x["mode"], x["speed_up"],
         "–".join(f"{q:.2f}" for q in x["speed_up_quartiles"]), x["mac_ratio"], x["of_mac_ratio"], x["of_ranks"][0]]
        for x in r["rows"]
    ]  # fmt: skip
    keep = r["subject"].get("keep", 1.0)
    fewer = f", {100 * keep:g} % of the tokens where tokens are fewer" if keep < 1 else ""
    about = f"bfloat16, −{100 * r['subject']['reduce']:g} % of the parameters{fewer}.{caveat(r)}"
    return f"{about}\n\n{rows_of(head, rows)}\n\n{where(r)}"


def card_accuracy(r: dict[str, Any]) -> str:
    return f"{real(r)}\n\nWeights {r['weights']}.{caveat(r)}"


def caveat(r: dict[str, Any]) -> str:
    """What a reader must know of a result that was stopped, or tried with tiny settings."""
    return ("" if r["whole"] else " **Stopped before its end.**") + (
        " **Tiny settings: no figures.**" if r["tiny"] else ""
    )
