"""What the scripts of the paper's searched and tuned results share: settings from a recipe, searches, tuned models.

Everything goes to ``--out``: checkpoints, so that the same command goes on where it was stopped, plans, reports and
figures.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import sys
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import common

from comcat import batches, evaluate, load_model, open_pictures, preprocess_of
from comcat.cli.recipes import with_recipe
from comcat.cli.shrink.compress import Compress
from comcat.data import Pictures, Preprocess
from comcat.errors import DataError
from comcat.measure import Evaluation, count_parameters
from comcat.methods.allocate import allocate
from comcat.methods.compress import CompressSettings, compress_
from comcat.methods.search import SearchSettings, search_
from comcat.plan import Plan
from comcat.report import ReportData, write
from comcat.report.collect import collect
from comcat.tuning.leaks import check_apart, same_place
from comcat.tuning.settings import TuneSettings
from comcat.tuning.tune import tune_

RECIPES = (Path(__file__).resolve().parents[2] / "recipes", Path(__file__).resolve().parent)
_OWN = {
    "reduce": (float, [""]), "pictures": (int, [""]), "seed": (int, ["", "tune."]), "epochs": (float, ["tune."]),
    "rounds": (int, ["search."]),
    "rank_steps": (int, ["search."]), "weight_steps": (int, ["search."]), "batch_size": (int, ["search.", "tune."]),
    "precision": (str, ["search.", "tune."]), "workers": (int, ["search.", "tune."]), "features": (str, ["tune."]),
}  # fmt: skip
"""Options that replace settings of the recipe: their type, and the groups of settings that they are in."""


def parser(doc: str | None, recipes: tuple[str, ...], out: str, *, required: bool = True) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "--data", required=required, help="training pictures with labels, for example ImageNet's train folder"
    )
    p.add_argument(
        "--eval", required=required, help="evaluation pictures with labels, for example ImageNet's val folder"
    )
    p.add_argument("--out", default=out, help="folder for figures, plans, reports and checkpoints")
    p.add_argument(
        "--recipe",
        nargs="+",
        default=recipes,
        help="the settings: files in recipes/ or beside this script, without .yaml",
    )
    p.add_argument("--model", help="instead of the recipe's: a timm name, timm:NAME, hf:NAME or a folder")
    p.add_argument("--no-pretrained", dest="pretrained", action="store_false", help="random weights (a smoke test)")
    p.add_argument("--limit", type=int, help="train on so many pictures only")
    p.add_argument("--eval-limit", type=int, help="evaluate on so many pictures only")
    for name, (kind, _) in _OWN.items():
        p.add_argument(f"--{name.replace('_', '-')}", type=kind, help="instead of the recipe's")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--no-write", action="store_true")
    return p


def command_of(recipe: str, a: argparse.Namespace) -> Compress:
    """What ``comcat compress --recipe`` is asked for, with the options given."""
    arguments = ["compress"]
    if a.model is not None:
        arguments.append(a.model if ":" in a.model or Path(a.model).exists() else f"timm:{a.model}")
    for name, (_, groups) in _OWN.items():
        if getattr(a, name) is not None:
            option = name.replace("_", "-")
            arguments += [word for group in groups for word in (f"--{group}{option}", str(getattr(a, name)))]
    places = [folder / f"{recipe}.yaml" for folder in RECIPES]
    place = next((path for path in places if path.is_file()), places[0])
    arguments += ["--data", str(a.data), "--out", a.out, "--recipe", str(place)]
    return tyro.cli(Compress, args=with_recipe(arguments, {"compress": Compress})[1:])


@dataclass(frozen=True)
class Run:
    """A model with its pictures and settings; every search and every tuned model has a label, under which its files
    lie.
    """

    name: str
    model: nn.Module
    preprocess: Preprocess
    training: Pictures
    evaluation: Pictures
    search: SearchSettings
    tune: TuneSettings
    out: Path

    @property
    def parameters(self) -> int:
        return count_parameters(self.model)

    @cached_property
    def dense(self) -> Evaluation:
        return self.judge(self.model)

    def judge(self, model: nn.Module) -> Evaluation:
        judged = batches(self.evaluation, self.preprocess, batch_size=64)
        return evaluate(model, judged, against=None if model is self.model else self.model, progress=True)

    def searched(self, label: str, **changes: Any) -> Plan:
        settings = replace(self.search, **changes)
        plan = search_(
            self.model, self.training, settings, preprocess=self.preprocess, out=self.out / label, progress=True
        )
        plan.save(self.out / f"{label}.json")
        return plan

    def uniform(self) -> Plan:
        """The same share of the full rank everywhere: ranks set by hand."""
        return allocate(self.model, reduce=self.search.reduce, rule="uniform", multiple=self.search.multiple)

    def small(self, plan: Plan) -> tuple[nn.Module, Any]:
        """A copy of the model as a plan has it, and how it came about."""
        s, small = self.search, copy.deepcopy(self.model)
        calibration = batches(self.training.take(s.pictures, s.seed), self.preprocess, batch_size=32)
        settings = CompressSettings(statistic=s.statistic, pictures=s.pictures, seed=s.seed)
        return small, compress_(small, calibration, settings, plan=plan, progress=True)

    def tuned(self, label: str, plan: Plan) -> tuple[ReportData, dict[str, Any]]:
        """The report of a model compressed by a plan and tuned, also as LABEL.html, and the result of tuning."""
        small, done = self.small(plan)
        compressed = self.judge(small)
        tune_(
            small, self.training, self.tune, teacher=self.model, evaluation=self.evaluation, preprocess=self.preprocess,
            out=self.out / f"{label}-tuning", progress=True,
        )  # fmt: skip
        report = collect(
            self.model, small, done, title=f"{self.name}, {label}", model=self.name,
            command="python " + " ".join(sys.argv),
            settings=self.settings(), evaluations=(self.dense, self.judge(small)), compressed=compressed,
        )  # fmt: skip
        write(report, self.out / f"{label}.html")
        return report, small.comcat_record.results.tuning  # type: ignore[union-attr]

    def settings(self) -> dict[str, Any]:
        return {"search": asdict(self.search), "tune": asdict(self.tune)}


def prepared(recipe: str, a: argparse.Namespace) -> Run:
    command = command_of(recipe, a)
    shared = {
        n: getattr(command, n) for n in ("reduce", "budget", "forms", "statistic", "only", "head", "pictures", "seed")
    }
    search = SearchSettings(**asdict(command.search), **shared, multiple=command.multiple or 1)
    if same_place(a.data, a.eval):
        raise DataError(
            f"--data and --eval are both {a.data!r}: accuracy on pictures that were trained on says nothing"
        )
    training, evaluation = open_pictures(a.data), open_pictures(a.eval)
    training = training if a.limit is None else training.take(a.limit, search.seed)
    evaluation = evaluation if a.eval_limit is None else evaluation.take(a.eval_limit, search.seed)
    print(check_apart(training, evaluation))
    model = load_model(command.model, pretrained=a.pretrained, device=a.device)
    name = Path(command.model.rpartition(":")[2]).name
    out = Path(a.out) / name
    out.mkdir(parents=True, exist_ok=True)
    return Run(name, model, preprocess_of(model), training, evaluation, search, command.tune, out)


def finish(
    a: argparse.Namespace, name: str, columns: list[str], rows: dict[str, list], **about: Any
) -> dict[str, list]:
    """Print the table and write it, with all that it is about, as JSON; returns the rows."""
    print()
    common.table(["", *columns], [[row, *("–" if v is None else v for v in values)] for row, values in rows.items()])
    if not a.no_write:
        said = shlex.join(Path(word).name if word.startswith("../") else word for word in sys.argv)
        where = {"data": Path(a.data).name, "eval": Path(a.eval).name} if a.data and a.eval else {}
        result = {"command": f"python {said}", "columns": columns, "rows": rows, "pictures": a.limit, **where, **about}
        common.write(f"paper-{name}", result)
    return rows
