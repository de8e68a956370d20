"""What flows through the sites, measured on a few pictures."""

from .calibrate import calibrate, show, watch_gradients
from .examples import examples_of, packed_pictures, pictures_of
from .seen import STATISTICS, StatisticName, Statistics

__all__ = [
    "STATISTICS",
    "StatisticName",
    "Statistics",
    "calibrate",
    "examples_of",
    "packed_pictures",
    "pictures_of",
    "show",
    "watch_gradients",
]
