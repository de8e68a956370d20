"""COMCAT, Figures 10 and 11: pictures by method and prompt, one figure for each concept.

    python benchmarks/paper/figures1011.py --model FOLDER --concepts FOLDER --work runs/paper-customization

Writes figure-CONCEPT.png into ``--work``: a row a method, the untouched pipeline first, a column a prompt, two pictures
each from the same noise in every row. Runs that Tables 5 and 6 made are not repeated.
"""

from __future__ import annotations

from pathlib import Path

import taught
from PIL import Image


def main(given: list[str] | None = None) -> dict:
    a = taught.arguments(__doc__, given)
    work = taught.Taught(a)
    methods = list(work.every())
    return taught.finish(a, "figures1011", {
        "figures": {c.name: _drawn(work, c, methods).name for c in work.concepts},
        "methods": methods, "prompts": {c.name: c.scenes() for c in work.concepts},
    })  # fmt: skip


def _drawn(work: taught.Taught, concept: taught.Concept, methods: list[str]) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.4 * len(methods) + 0.7), layout="constrained")
    axes = figure.subplots(len(methods), 1, squeeze=False)[:, 0]
    for axis, method in zip(axes, methods, strict=True):
        with Image.open(work.sheet(concept, method)) as sheet:
            axis.imshow(sheet.convert("RGB"))
            width = sheet.width
        axis.set_xticks([]), axis.set_yticks([])
        axis.set_ylabel(method, rotation=0, ha="right", va="center", fontsize=8)
    scenes = concept.scenes()
    axes[0].set_xticks([width * (i + 0.5) / len(scenes) for i in range(len(scenes))], scenes, fontsize=8)
    axes[0].tick_params(top=True, labeltop=True, bottom=False, labelbottom=False, length=0)
    path = work.a.work / f"figure-{concept.name}.png"
    figure.savefig(path, dpi=130)
    print(f"wrote {path}")
    return path


if __name__ == "__main__":
    main()
