"""Compressing block after block, each on what the smaller blocks before it give."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from ..apply import Handle, apply_, coverage_notes
from ..errors import SettingsError
from ..forms import site_for
from ..plan import Plan
from ..sites import Sites, block_of
from .prepare import Prepared, calibrated
from .settings import CompressSettings


def apply_sequentially(
    model: nn.Module,
    plan: Plan,
    prepared: Prepared,
    calibration: Iterable | None,
    settings: CompressSettings,
    progress: bool,
) -> Handle:
    """Apply a plan block after block, each calibrated on the model whose earlier blocks are already small."""
    if settings.statistic == "weights" or calibration is None:
        raise SettingsError("sequential calibration needs a statistic of activations or of the loss, and pictures")
    groups: dict[str, dict[str, Any]] = {}
    for name, entry in plan.sites.items():
        path = site_for(name, entry, prepared.sites).path
        groups.setdefault(path if name.endswith(":tokens") else block_of(path), {})[name] = entry
    handles: list[Handle] = []
    try:
        for entries in groups.values():
            # paths of later sites do not move while earlier blocks change, so the sites found at the start stay good
            sites = Sites({n: prepared.sites[n] for n in entries if n in prepared.sites}, prepared.sites.refused)
            statistic = calibrated(model, calibration, settings, sites, progress)
            handles.append(apply_(model, Plan(sites=entries), statistic, sites=sites, joint_refit=settings.joint_refit))
    except BaseException:
        for handle in reversed(handles):
            handle.revert()
        raise
    notes = coverage_notes(plan)
    return Handle(model, plan, [h.revert for h in handles], notes)  # type: ignore[list-item]
