"""What a search of ranks and a tuning run went through: as series for :func:`comcat.report.figure_curves`, and in
words.

Plain data in, plain data out: what a plan and a saved model carry with them is enough to draw COMCAT's Figures 6 and 7.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import counted
from . import wording

POINTS = 300
"""Points of a line, at most; a longer log is averaged."""

_LOSSES = {"label_loss": "labels", "distillation_loss": "distillation", "feature_loss": "features"}


def search_series(found: Mapping[str, Any], label: str | None = None) -> list[dict[str, Any]]:
    """A search, step by step: expected cost against the budget, loss, held-out top-1 at the end of each round.

    Args:
        found: ``plan.made_by["search"]``, its settings and curve. label: of all lines, where searches are compared
            (COMCAT's Figure 7).
    """
    settings, curve = found["settings"], found["curve"]
    steps = [p["step"] for p in curve]
    goal = 100 * (1 - settings["reduce"])
    what = "MACs" if settings["budget"] == "macs" else settings["budget"]
    cost, rounds = f"expected cost, % of all {what}", [p for p in curve if "top1" in p]
    series = [
        _series(steps, _on_ranks(found, "cost", 100), cost, label or "expected cost"),
        _series([steps[0], steps[-1]], [goal, goal], cost, "budget") | {"reference": True},
        _series(steps, [p["cross_entropy"] for p in curve], "loss", label or "cross-entropy"),
    ]
    if label is None:
        series.append(_series(steps, _on_ranks(found, "loss"), "loss", "with the cost factor (Eq. 6)"))
    held_out = [p["top1"] for p in rounds]
    series.append(_series([p["step"] for p in rounds], held_out, "held-out top-1, %", label or "at a round's end"))
    return series


def tuning_series(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Learning curves: losses, top-1 on training and evaluation pictures, the learning rate, all over epochs.

    Args:
        result: ``model.comcat_record.results.tuning``.
    """
    curve = result["curve"]
    parts = {key: name for key, name in _LOSSES.items() if any(key in p for p in curve)}
    series = [_averaged(curve, "loss", "loss", "training")]
    if len(parts) > 1:  # one alone is the loss itself
        series += [_averaged(curve, key, "loss", name) for key, name in parts.items()]
    series += [
        _evaluated(result, "eval_loss", "loss"),
        _averaged(curve, "train_top1", "top-1, %", "training"),
        _evaluated(result, "top1", "top-1, %"),
        _evaluated(result, "cosine", "cosine to the teacher"),
        _averaged(curve, "lr", "learning rate", "training"),
    ]
    return [one for one in series if one["x"]]


def progress_series(
    label: str, made_by: Mapping[str, Any], tuning: Mapping[str, Any], *, parameters: int, pictures: int
) -> list[dict[str, Any]]:
    """COMCAT's Figure 6: top-1 and parameters over all epochs spent, those of the search before those of tuning.

    Args:
        made_by: the plan's, within a budget of parameters. tuning: ``results.tuning``, with evaluations.
        parameters: of the model before. pictures: training pictures of an epoch.
    """
    accuracy, size = "top-1, %", "parameters, millions"
    found, start = made_by.get("search"), 0.0
    series = []
    sizes: list[tuple[float, float | None]] = []
    if found is not None:
        epochs = [p["step"] * found["settings"]["batch_size"] / pictures for p in found["curve"]]
        start = epochs[-1]
        sizes = list(zip(epochs, _on_ranks(found, "cost", parameters / 1e6), strict=True))
        rounds = [(x, p["top1"]) for x, p in zip(epochs, found["curve"], strict=True) if "top1" in p]
        held_out = f"{label}, held-out training pictures"
        series.append(_series([x for x, _ in rounds], [y for _, y in rounds], accuracy, held_out, "epoch"))
    evaluated = _evaluated(tuning, "top1", accuracy)
    epochs = [start + x for x in evaluated["x"]]
    small = (1 - made_by["saved"]) * parameters / 1e6
    sizes += [(start, small), *((x, small) for x in epochs[-1:])]
    series.append(_series(epochs, evaluated["y"], accuracy, label, "epoch"))
    series.append(_series([x for x, _ in sizes], [y for _, y in sizes], size, label, "epoch"))
    return series


def search_facts(made_by: Mapping[str, Any]) -> dict[str, str]:
    """A search in words. ``made_by`` is the plan's."""
    s = made_by["search"]["settings"]
    what = "MACs" if s["budget"] == "macs" else s["budget"]
    candidates = ", ".join(map(str, s["candidates"])) if s["candidates"] else s["grid"]
    return {
        "Saved": f"{wording.percent(100 * made_by['saved'])} of the {what}; {100 * s['reduce']:g}{wording.SPACE}% were "
        "asked for",
        "Exponent β of the cost": f"{s['beta']:g}" + (", above the budget only" if s["penalty"] == "above" else ""),
        "Candidate ranks": candidates,
        "Length": f"{counted(s['rounds'], 'round')}: {counted(s['rank_steps'], 'step')} on ranks each, "
        f"{s['weight_steps']} on weights between them, {counted(s['batch_size'], 'picture')} a step",
        "Held out": f"{100 * s['held_out']:g}{wording.SPACE}% of the training pictures: ranks are learned on them, "
        "weights never see them",
    }


def tuning_facts(result: Mapping[str, Any]) -> dict[str, str]:
    """A tuning run in words. ``result`` is ``results.tuning`` of a record."""
    s, last = result["settings"], result["curve"][-1]
    learned = [f"{s['distillation'] or 'soft'} distillation"] if "distillation_loss" in last else []
    learned += ["features of its blocks"] if "feature_loss" in last else []
    facts = {
        "Teacher": f"{result['teacher']} ({', '.join(learned)})" if result["teacher"] else "none",
        "Length": f"{wording.counted(last['epoch'], 'epoch')}, {wording.counted(last['step'], 'step')} of "
        f"{wording.counted(s['batch_size'], 'picture')}",
        "Learning rate": f"{s['lr']:g}, by a cosine to {s['min_lr']:g}; weight decay {s['weight_decay']:g}",
    }
    if result.get("images_per_second"):
        facts["Throughput while training"] = wording.rate(result["images_per_second"])
    facts["Took"] = f"{wording.elapsed(result['seconds'])}, evaluations and checkpoints included"
    if best := result.get("best"):
        facts["Best top-1 on the way"] = (
            f"{wording.percent(best['top1'])} after step {wording.plain(float(best['step']))}; "
            "the last weights are what counts"
        )
    return facts


def _on_ranks(found: Mapping[str, Any], key: str, factor: float = 1.0) -> list[float | None]:
    """A column of a search's curve; None while weights are learned, when ranks are decided and nothing is expected."""
    settings = found["settings"]
    cycle = settings["rank_steps"] + settings["weight_steps"]
    return [factor * p[key] if (p["step"] - 1) % cycle < settings["rank_steps"] else None for p in found["curve"]]


def _series(x: list[Any], y: list[Any], panel: str, label: str, x_label: str = "step") -> dict[str, Any]:
    return {"x": x, "y": y, "x_label": x_label, "y_label": panel, "label": label}


def _averaged(curve: Sequence[Mapping[str, Any]], key: str, panel: str, label: str) -> dict[str, Any]:
    """A column of the log, every point the mean of as many lines as keep it short."""
    known = [(p["epoch"], p[key]) for p in curve if key in p]
    size = max(1, -(-len(known) // POINTS))
    parts = [known[i : i + size] for i in range(0, len(known), size)]
    means = [[sum(values) / len(part) for values in zip(*part, strict=True)] for part in parts]
    return _series([x for x, _ in means], [y for _, y in means], panel, label, "epoch")


def _evaluated(result: Mapping[str, Any], key: str, panel: str) -> dict[str, Any]:
    """What evaluations said, from before the first step on."""
    first = (result.get("before") or {}).get(key.removeprefix("eval_"))
    points = [] if first is None else [(0.0, first)]
    points += [(p["epoch"], p[key]) for p in result["curve"] if key in p]
    return _series([x for x, _ in points], [y for _, y in points], panel, "evaluation", "epoch")
