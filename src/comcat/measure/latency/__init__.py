"""Milliseconds of every part of a model at every width and number of tokens, measured on this machine.

Each part (attention, feed-forward, linear layer, a block) is timed alone on what it really gets, at a few widths and,
where tokens may become fewer, at a few numbers of tokens, in one interleaved run. Parts of one shape are timed once.
What was measured is kept on the disk under a key of machine, library, type, batch and shape.
"""

from .cost import Latency
from .table import measure_latency

__all__ = ["Latency", "measure_latency"]
