"""A figure of the report, drawn by matplotlib."""

from pathlib import Path

from comcat.report import figure_curves

figure = figure_curves([{"x": [1, 2, 3], "y": [3.0, 2.0, 1.5], "panel": "loss", "label": "tuning", "x_label": "step"}])
figure.savefig("curves.svg")
assert "<svg" in Path("curves.svg").read_text()
