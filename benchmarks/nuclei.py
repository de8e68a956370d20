"""A segmenter of nuclei with fewer tokens, narrower channels, or both, after a short tuning, at measured speed.

    python benchmarks/nuclei.py                                   # every row, one seed
    python benchmarks/nuclei.py --rows all --reduce 0.35          # one of them
    python benchmarks/nuclei.py --tiny                            # tiny shapes, to try the script

The model is a DINOv2-small of real weights with a linear mask head at 392 pixels (784 tokens); the measure is the mean
IoU of nuclei and background over all pixels of the held-out pictures. Every row saves a share of the MACs of the trunk:
``tokens`` (look-alikes merged), ``channels`` (ranks and hidden units) or ``all`` of them in one choice. It is judged
as it stands, and after a short tuning whose only teacher is the dense model, pixel by pixel, without masks
(:func:`comcat.tune`). The dense model is tuned alike. At the end all are timed beside the dense model in one
interleaved run. Goals: within 0.5 point of dense at 1.31 times the speed, and within 1 point at 1.6 times.

Finished rows are kept in ``--work``, so the script can be stopped and goes on.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from real import data, models
from real.measure import Table, paired, picture_error, resamples
from real.tasks import NUCLEI, Task, outputs
from torch import nn

import comcat
from comcat.data import Pictures, Preprocess
from comcat.measure import benchmark, ratio
from comcat.plan import Plan

FORMS = {"tokens": "tokens", "channels": "ranks,units", "all": "ranks,units,tokens"}
TUNE: dict[str, Any] = {"lr": 5e-5, "warmup": 0.1, "crop_scale": (0.6, 1.0), "clip": 1.0}
GOALS = ((1.31, 0.5), (1.6, 1.0))
"""Speed-up, and points of mean IoU that may be lost at it."""


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    p = common.parser(__doc__)
    p.add_argument("--rows", nargs="+", default=list(FORMS), choices=list(FORMS))
    p.add_argument("--reduce", type=float, nargs="+", default=[0.3, 0.45], help="shares of the MACs to save")
    p.add_argument("--seeds", type=int, default=1, help="calibration samples")
    p.add_argument("--pictures", type=int, default=64, help="for calibration")
    p.add_argument("--steps", type=int, default=100, help="of tuning; 0: none")
    p.add_argument("--batch", type=int, default=8, help="of tuning and timing")
    p.add_argument("--judged", type=int, help="judge the first so many pictures; by default all")
    p.add_argument("--precision", default="bf16", choices=("fp32", "bf16"), help="of tuning and judging")
    p.add_argument("--rounds", type=int, default=15, help="of timing")
    p.add_argument("--tiny", action="store_true", help="tiny shapes, to try the script")
    p.add_argument("--work", type=Path, default=Path("runs/benchmark-nuclei"), help="finished rows")
    a = p.parse_args(given)
    bench = Bench(a)
    print(f"{bench.task.about}: dense {bench.dense.score():.2f} on {len(bench.judged)} pictures", flush=True)
    asked = [("dense", 0.0), *((row, reduce) for row in a.rows for reduce in a.reduce)]
    runs = [bench.run(row, reduce, seed) for seed in range(a.seeds) for row, reduce in asked]
    rows = summary(runs, bench.times(runs), bench)
    common.table(
        ["", "−MACs", "speed-up", "untuned", "tuned", "less dense"],
        [[r["row"], f"{r['reduce']:g}", r["speed_up"][0], r["before"], r["after"] or "–", r["loss"]] for r in rows],
    )
    result = {
        "about": bench.task.about, "judged": len(bench.judged), "dense": bench.dense.score(),
        "dense_picture_error": picture_error([bench.dense], bench.weights),
        "settings": {**{k: v for k, v in vars(a).items() if k != "work"}, "tune": TUNE}, "rows": rows,
        "runs": [{k: v for k, v in run.items() if k not in ("plan", "tables")} for run in runs],
    }  # fmt: skip
    if not a.no_write:
        common.write("nuclei-tiny" if a.tiny else "nuclei", result)
    return result


class Bench:
    """The dense model, what it is judged on, and every row."""

    def __init__(self, a: Any) -> None:
        self.a, self.task = a, tiny_task() if a.tiny else NUCLEI
        self.judged = self.task.pixels("judged").first(a.judged)
        self.model = self.task.build().to(a.device)
        self.dtype = torch.bfloat16 if a.precision == "bf16" else torch.float32
        self.said = self._said(self.model)
        self.dense = self._table(self.said)
        self.weights = resamples(self.judged.origins.numpy())

    def _said(self, model: nn.Module) -> torch.Tensor:
        judged = copy.deepcopy(model).to(self.dtype)
        return outputs(judged, self.judged, self.a.batch, self.dtype, self.a.device)

    def _table(self, said: torch.Tensor) -> Table:
        return self.task.tables(said, self.judged.labels, self.said)["mean_iou"]

    def run(self, row: str, reduce: float, seed: int) -> dict[str, Any]:
        """A row, from its file or made now."""
        a = self.a
        kept = ("pictures", "steps", "batch", "judged", "precision", "tiny")
        asked = {name: getattr(a, name) for name in kept} | {"tune": TUNE, "forms": FORMS.get(row)}
        path = a.work / f"{row}-{reduce:g}-{seed}-{a.steps}{'-tiny' if a.tiny else ''}.json"
        found = common.kept_result(path, asked, partial(self._run, row, reduce, seed))
        after = "" if found["after"] is None else f" → {found['after']:.2f}"
        print(f"{row} −{100 * reduce:g} % seed {seed}: {found['before']:.2f}{after}", flush=True)
        return found

    def _run(self, row: str, reduce: float, seed: int) -> dict[str, Any]:
        started = time.monotonic()
        small, plan = self._shrunk(row, reduce, seed)
        choosing = time.monotonic() - started
        tables = [self._table(self._said(small))]
        started = time.monotonic()
        if self.a.steps:
            tuned = comcat.tune(
                small, tuning_pictures(self.a.tiny), teacher=self.model, preprocess=self._preprocess(),
                steps=self.a.steps, batch_size=self.a.batch, seed=seed, precision=self.a.precision, **TUNE,
            )  # fmt: skip
            tables.append(self._table(self._said(tuned)))
        example = next(self.judged.first(1).batches(1))[0].to(self.a.device)
        scores = [t.score() for t in tables]
        return {
            "row": row, "reduce": reduce, "seed": seed, "before": scores[0], "choosing_s": choosing,
            "after": scores[1] if self.a.steps else None, "tuning_s": time.monotonic() - started,
            "macs": comcat.count_macs(small, example) / comcat.count_macs(self.model, example),
            "parameters": comcat.count_parameters(small) / comcat.count_parameters(self.model),
            "plan": plan.to_dict(), "tables": [t.to_dict() for t in tables],
        }  # fmt: skip

    def _shrunk(self, row: str, reduce: float, seed: int) -> tuple[nn.Module, Plan]:
        if row == "dense":
            return copy.deepcopy(self.model), Plan(sites={})
        shown = [x.to(self.a.device) for x in self.task.calibration_batches(seed, self.a.pictures)]
        small = comcat.compress(
            self.model, shown, forms=FORMS[row], budget="macs", reduce=reduce, only=self.task.only,
            pictures=self.a.pictures, seed=seed,
        )  # fmt: skip
        return small, small.comcat_record.plan

    def _preprocess(self) -> Preprocess:
        return data.squares(self.judged.pixels.shape[-1])

    def times(self, runs: Sequence[dict[str, Any]]) -> dict[tuple[str, float], tuple[float, float, float]]:
        """Speed-up of each row (seed 0's plan) over the dense model, in one interleaved run."""
        built = {("dense", 0.0): self.model}
        for run in runs:
            if run["seed"] == 0 and run["plan"]["sites"]:
                built[run["row"], run["reduce"]] = small = copy.deepcopy(self.model)
                comcat.apply_(small, Plan.from_dict(run["plan"]))
        images = next(self.judged.first(self.a.batch).batches(self.a.batch))[0].to(self.a.device)
        named = {f"{row} {reduce:g}": model for (row, reduce), model in built.items()}
        timings = benchmark(named, images, repeats=self.a.rounds)
        return {key: ratio(timings, "dense 0", f"{key[0]} {key[1]:g}") for key in built}


def summary(runs: Sequence[dict[str, Any]], speeds: dict[Any, Any], bench: Bench) -> list[dict[str, Any]]:
    """Means over seeds, and what was lost against the dense model as it stands, paired by pictures."""
    rows = []
    for key in dict.fromkeys((run["row"], run["reduce"]) for run in runs):
        ours = [run for run in runs if (run["row"], run["reduce"]) == key]
        last = [Table.from_dict(run["tables"][-1]) for run in ours]
        less = paired(last, [bench.dense], bench.weights)
        row: dict[str, Any] = {
            "row": key[0], "reduce": key[1], "seeds": len(ours), "speed_up": speeds[key], "loss": -less["mean"],
            "loss_picture_error": less["picture_error"],
        }  # fmt: skip
        for name in ("before", "after", "macs", "parameters"):
            values = [run[name] for run in ours if run[name] is not None]
            row[name] = sum(values) / len(values) if values else None
        row["reached"] = [speed for speed, most in GOALS if row["speed_up"][0] >= speed and row["loss"] <= most]
        rows.append(row)
    return rows


def tuning_pictures(tiny: bool) -> Pictures:
    """Pictures to tune on, none of which is judged; their masks are not read."""
    if tiny:
        return comcat.open_pictures("digits:train").take(32, 0)
    return comcat.open_pictures(data.data_file("nuclei", "train"))


def tiny_task() -> Task:
    """The task in tiny: a mask head on a tiny backbone of random weights, and pictures of noise."""

    def build() -> nn.Module:
        trunk = common.vit(
            "vit_tiny_patch16_224", img_size=56, patch_size=14, embed_dim=48, depth=2, num_heads=3, num_classes=0
        )
        torch.manual_seed(0)
        return models.DenseModel(trunk, nn.Conv2d(48, 1, 1), (56, 56)).eval()

    def pixels(part: data.Part, count: int | None = None, seed: int = 0) -> data.Pixels:
        generator = torch.Generator().manual_seed(seed + (part == "judged") * 1000)
        shown = torch.randint(0, 255, (count or 8, 3, 56, 56), dtype=torch.uint8, generator=generator)
        masks = torch.rand(len(shown), 56, 56, generator=generator) > 0.5
        return data.Pixels(pixels=shown, labels=masks, origins=torch.arange(len(shown)))

    return replace(
        NUCLEI, about="a tiny model of random weights", build=build, pixels=pixels, only=("backbone.blocks",)
    )


if __name__ == "__main__":
    main()
