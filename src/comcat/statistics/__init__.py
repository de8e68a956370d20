"""What flows through the sites, measured on a few pictures."""

from .calibrate import calibrate, pictures_of, watch_gradients
from .seen import STATISTICS, StatisticName, Statistics

__all__ = ["STATISTICS", "StatisticName", "Statistics", "calibrate", "pictures_of", "watch_gradients"]
