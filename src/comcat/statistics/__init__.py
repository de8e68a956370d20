"""What flows through the sites, measured on a few pictures."""

from .calibrate import calibrate, watch_gradients
from .examples import pictures_of
from .seen import STATISTICS, StatisticName, Statistics

__all__ = ["STATISTICS", "StatisticName", "Statistics", "calibrate", "pictures_of", "watch_gradients"]
