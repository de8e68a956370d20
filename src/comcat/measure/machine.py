"""What a number was measured on."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """What a number needs beside it: devices, threads, versions and numeric settings, ready for JSON.

    ``device`` is the current CUDA device's name, else the processor's; ``memory_bytes`` is that device's, else None.
    A library that is not installed has the version None.
    """

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    cpu, cuda = _cpu_name(), torch.cuda.is_available()
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    properties = torch.cuda.get_device_properties(torch.cuda.current_device()) if cuda else None
    packages = ("comcat", "torch", "timm", "transformers", "diffusers", "safetensors")
    return {
        "device": properties.name if properties else cpu,
        "devices": torch.cuda.device_count() if cuda else 0,
        "memory_bytes": properties.total_memory if properties else None,
        "cuda": torch.version.cuda if cuda else None,
        "cpu": cpu,
        "cores": usable,
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: installed(name) for name in packages},
        "default_dtype": str(torch.get_default_dtype()).removeprefix("torch."),
        "float32_matmul": torch.backends.cuda.matmul.fp32_precision,
    }
