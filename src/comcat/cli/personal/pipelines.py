"""What the verbs on text-to-image pipelines share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from ..common import pick_device


@dataclass(frozen=True, kw_only=True)
class PipelineCommand:
    """Options of every verb that loads a pipeline."""

    ALTERNATIVES: ClassVar[tuple[str, ...]] = ()
    """See :class:`~comcat.cli.common.Common`."""

    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the pipeline's weights."""
    variant: str | None = None
    """Which of several sets of stored weights to read, fp16; left out, those without a variant, or the only one."""
    offload: bool = False
    """Keep the denoiser's weights in the CPU's memory; each layer's come to the device as it computes."""


def open_pipeline(command: PipelineCommand, spec: str, device: Any = None) -> Any:
    """The pipeline of a command, on ``device`` if one is given."""
    import torch

    from ...diffusion import load_pipeline

    dtype = getattr(torch, command.dtype)
    device = device or pick_device(command.device)
    return load_pipeline(spec, device=device, dtype=dtype, variant=command.variant, offload=command.offload)
