"""One self-contained HTML page that shows what compressing a model did, and its figures for other uses.

Needs the extra ``comcat[report]`` once something is drawn; importing this package does not.
"""

from comcat.report.data import ReportData, ShownPicture, SiteRow, Spectrum, rank_for_energy
from comcat.report.figures import figure_curves, figure_parameters_for_energy, figure_ranks, figure_spectra
from comcat.report.history import progress_series, search_series, tuning_series
from comcat.report.page import render, write

__all__ = [
    "ReportData",
    "ShownPicture",
    "SiteRow",
    "Spectrum",
    "figure_curves",
    "figure_parameters_for_energy",
    "figure_ranks",
    "figure_spectra",
    "progress_series",
    "rank_for_energy",
    "render",
    "search_series",
    "tuning_series",
    "write",
]
