"""What a model costs and how well it does: parameters, MACs, seconds, bytes, accuracy.

Nothing here changes a model: its weights stay, and the training flag of each of its modules is put back.
"""

from .counting import count_macs, count_parameters, size_on_disk
from .evaluation import Evaluation, evaluate
from .machine import environment
from .memory import peak_memory
from .outputs import is_classifier, model_output
from .timing import Timing, benchmark, ratio, unsteady

__all__ = [
    "Evaluation",
    "Timing",
    "benchmark",
    "count_macs",
    "count_parameters",
    "environment",
    "evaluate",
    "is_classifier",
    "model_output",
    "peak_memory",
    "ratio",
    "size_on_disk",
    "unsteady",
]
