"""What the scripts of the paper's tables share."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import table, write

from comcat import batches, calibrate, evaluate, find_sites, load_model, open_pictures, preprocess_of
from comcat.apply import apply_
from comcat.errors import DataError
from comcat.factors import Statistic
from comcat.plan import Plan
from comcat.sites import Sites


def arguments(doc: str | None, model: str, given: list[str] | None, *, data: bool = True) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default=model, help="a timm name, timm:NAME, hf:NAME or a folder")
    p.add_argument("--no-pretrained", dest="pretrained", action="store_false", help="random weights (a smoke test)")
    if data:
        p.add_argument(
            "--data", required=True, help="evaluation pictures with labels, for example ImageNet's val folder"
        )
        p.add_argument(
            "--calibration", help="training pictures to calibrate on; without, only data-free methods are run"
        )
        p.add_argument("--pictures", type=int, default=512, help="calibration pictures")
        p.add_argument("--limit", type=int, help="evaluate on so many pictures only")
        p.add_argument("--batch-size", type=int, default=64)
        p.add_argument("--repeats", type=int, default=10)
        p.add_argument("--multiple", type=int, default=1)
        p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
        p.add_argument("--no-write", action="store_true")
    else:
        p.add_argument("--out", default="figures")
    return p.parse_args(given)


@dataclass
class Run:
    """A model, its sites, and the pictures it is judged on."""

    model: nn.Module
    sites: Sites
    batches: Any
    calibration: Any
    example: Tensor
    published: bool
    arguments: argparse.Namespace
    _statistics: list[tuple[str, Statistic]] = field(default_factory=list)

    def dense_top1(self) -> float:
        return float(evaluate(self.model, self.batches).top1 or 0.0)

    def top1(self, plan: Plan, statistic: Statistic | None) -> float:
        handle = apply_(self.model, plan, statistic, sites=self.sites)
        try:
            return float(evaluate(self.model, self.batches).top1 or 0.0)
        finally:
            handle.revert()

    def data_statistics(self) -> list[tuple[str, Statistic]]:
        if not self._statistics and self.calibration is not None:
            for name in ("activation", "loss"):
                self._statistics.append(
                    (name, calibrate(self.model, self.calibration, statistic=name, sites=self.sites, progress=True))
                )  # type: ignore[arg-type]
        from comcat.factors import Weights

        return self._statistics or [("weights", Weights())]

    def report(self, name: str, head: list[str], rows: dict[str, list[float]]) -> dict:
        print()
        table(["", *head], [[k, *v] for k, v in rows.items()])
        if not self.arguments.no_write:
            said = shlex.join(Path(word).name if word.startswith("../") else word for word in sys.argv)
            result = {"command": f"python {said}", "columns": head, "rows": rows, "published": self.published}
            write(f"paper-{name}", result)
        return rows


def prepared(a: argparse.Namespace, name: str | None = None) -> Run:
    spec = name or a.model
    spec = spec if ":" in spec or Path(spec).exists() else f"timm:{spec}"
    model = load_model(spec, pretrained=a.pretrained, device=a.device)
    prepare = preprocess_of(model)
    pictures = open_pictures(a.data)
    if not pictures.has_labels:
        raise DataError(f"{a.data!r} has no labels, and the table is about accuracy")
    judged = batches(pictures, prepare, batch_size=a.batch_size, limit=a.limit)
    calibration = None
    if a.calibration is not None:
        calibration = batches(
            open_pictures(a.calibration).take(a.pictures, 0), prepare, batch_size=min(32, a.batch_size)
        )
    example = torch.randn(a.batch_size, prepare.channels, *prepare.size, device=a.device)
    return Run(model, find_sites(model), judged, calibration, example, a.pretrained, a)
