"""Whether a file is being written for a runtime, which multiplies by one-hot rows instead of scattering."""

from __future__ import annotations

import torch


def exporting() -> bool:
    """Whether the model is being traced into a file for a runtime."""
    return torch.compiler.is_exporting()
