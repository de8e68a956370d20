"""What a workflow measures of the models before and after, and where it is kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..data import Preprocess
from ..measure import Timing, benchmark
from ..methods.splits import Division
from ..record import Record
from ..report import ReportData


def timings(before: nn.Module, after: nn.Module, preprocess: Preprocess, batch_size: int) -> dict[str, Timing]:
    """Seconds a batch of random pictures takes each model, both in one interleaved run, on the device of ``before``."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, preprocess.channels, *preprocess.size, generator=generator)
    return benchmark({"before": before, "after": after}, images.to(next(before.parameters())), repeats=10)


def noted(model: Any, report: ReportData, division: Division) -> Record:
    """The model's record, with what the report says was measured put into it."""
    record = model.comcat_record
    results = replace(
        record.results, before=report.before, after=report.after, judged_on=division.judged_on,
        agreement=report.agreement, predicted_loss=report.predicted_loss, measured_loss=report.measured_loss,
    )  # fmt: skip
    model.comcat_record = replace(record, results=results)
    return model.comcat_record
