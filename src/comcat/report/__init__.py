"""One self-contained HTML page that shows what compressing a model did, and its figures for other uses.

Needs the extra ``comcat[report]`` once something is drawn; importing this package does not.
"""

from comcat.report.data import ReportData, SiteRow, Spectrum, rank_for_energy
from comcat.report.figures import figure_curves, figure_parameters_for_energy, figure_ranks, figure_spectra
from comcat.report.page import render, write

__all__ = [
    "ReportData",
    "SiteRow",
    "Spectrum",
    "figure_curves",
    "figure_parameters_for_energy",
    "figure_ranks",
    "figure_spectra",
    "rank_for_energy",
    "render",
    "write",
]
