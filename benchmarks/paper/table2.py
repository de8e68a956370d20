"""COMCAT, Table 2: DeiT-small and DeiT-base on ImageNet-1K, ranks found by search, then tuned.

    python benchmarks/paper/table2.py --data /imagenet/train --eval /imagenet/val --out runs/table2

Published rows are printed beside ours, marked as such. Ours follow recipes/, which say where each setting comes from.
MACs are what the paper calls FLOPs. Writes a report for each of our rows.
"""

from __future__ import annotations

from trained import finish, parser, prepared

COLUMNS = ["top-1", "MACs ↓ %", "parameters ↓ %", "top-1 untuned"]
PUBLISHED = {
    "DeiT-small (baseline)": [79.8, None, None], "COMCAT small −50 %": [79.27, 51.21, 49.98],
    "COMCAT small −44 %": [79.58, 44.93, 43.82],
    "COMCAT small −40 %": [79.92, 41.15, 40.11], "UPop small (pruning)": [79.6, 39.0, 39.0],
    "UVC small (pruning)": [78.82, 49.59, None],
    "SCOP small (pruning)": [77.5, 43.6, None], "S²ViTE small (sparse)": [79.22, 31.63, 33.94],
    "ToMe small (token)": [79.4, 41.30, 0.0],
    "PS-ViT small (token)": [79.4, 43.5, 0.0], "HVT small (token)": [78.0, 47.8, 0.0],
    "PoWER small (token)": [78.3, 41.3, 0.0],
    "DeiT-base (baseline)": [81.8, None, None], "COMCAT base −61 %": [82.26, 61.68, 61.06],
    "CT-GFM base (low-rank)": [81.28, None, 40.0],
    "MD-ViT base (pruning)": [81.5, 60.0, None], "UVC base (pruning)": [80.57, 54.5, None],
    "VTP base (pruning)": [80.7, 43.2, 44.44],
    "S²ViTE base (sparse)": [82.22, 33.13, 34.41], "PS-ViT base (token)": [81.5, 44.3, 0.0],
    "IA-RED² base (token)": [80.3, 32.96, 0.0],
}  # fmt: skip
RECIPES = ("deit-small-half", "deit-small-44", "deit-small-40", "deit-base-61")


def main(given: list[str] | None = None) -> dict:
    a = parser(__doc__, RECIPES, "runs/table2").parse_args(given)
    rows = {f"{name} (published)": [*row, None] for name, row in PUBLISHED.items()} if a.pretrained else {}
    settings = {}
    for recipe in a.recipe:
        run = prepared(recipe, a)
        rows[f"{run.name}, as it was"] = [run.dense.top1, None, None, None]
        report, _ = run.tuned(recipe, run.searched(f"{recipe}-plan"))
        saved = [100 * (1 - (report.after[k] or 0.0) / (report.before[k] or 1.0)) for k in ("macs", "parameters")]
        rows[f"{run.name}, {recipe}"] = [report.after["top1"], *saved, report.between["top1"]]
        settings[recipe] = run.settings()
    return finish(a, "table2", COLUMNS, rows, settings=settings)


if __name__ == "__main__":
    main()
