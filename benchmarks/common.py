"""What the benchmark scripts share: where results go, and what a number needs as context."""

from __future__ import annotations

import argparse
import copy
import importlib
import json
import math
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import comcat
from comcat.apply import apply_
from comcat.data import Pictures
from comcat.files import write_json
from comcat.measure import environment
from comcat.plan import Plan
from comcat.sites import Sites

RESULTS = Path(__file__).parent / "results"
SHARED = Path(__file__).resolve().parents[2] / "shared"
REAL = "dinov2-small"


def machine() -> str:
    """A folder name for this machine: its GPU, or its processor and cores."""
    about = environment()
    if torch.cuda.is_available():
        return slug(torch.cuda.get_device_name())
    return slug(f"{about.get('cpu', 'cpu')} {torch.get_num_threads()} threads")


def slug(text: str) -> str:
    """Small letters and digits, joined by dashes: a name for a file."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def write(name: str, result: dict[str, Any]) -> Path:
    """Write a result with its environment to ``results/<machine>/<name>.json``."""
    path = RESULTS / machine() / f"{name}.json"
    content = {
        "benchmark": name,
        "command": "python " + shlex.join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
        "environment": environment(),
        **result,
    }
    write_json(path, content)
    print(f"wrote {path}")
    return path


def kept_result(path: Path, settings: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A result from its file, or made now and kept, so that a long script can be killed and goes on. One of other
    settings is made anew.
    """
    settings = json.loads(json.dumps(settings, default=str))
    if path.is_file() and (kept := json.loads(path.read_text())).get("settings") == settings:
        return kept["result"]
    result = make()
    write_json(path, {"settings": settings, "result": result})
    return result


def added(there: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """A result with the methods of a new one. Exits unless both were asked the same, and of the same pipeline."""
    free = ("modes", "methods")
    for key in new["settings"].keys() - {*free}:
        if there["settings"][key] != new["settings"][key]:
            raise SystemExit(
                f"{key}: got {new['settings'][key]}, the result that is there has {there['settings'][key]}"
            )
    for key, value in new["untouched"].items():
        if not math.isclose(value, there["untouched"][key], rel_tol=1e-3, abs_tol=1e-3):
            raise SystemExit(f"the pipeline is another: {key} is {value:g}, and was {there['untouched'][key]:g}")
    told = there["settings"] | {
        "methods": list(dict.fromkeys([*there["settings"]["methods"], *new["settings"]["methods"]]))
    }
    names = {method for methods in new["modes"].values() for method in methods}
    kept = [run for run in there["runs"] if run["method"] not in names or run["mode"] not in new["modes"]]
    return {
        **{key: value for key, value in there.items() if key in new},
        "settings": told,
        "modes": {mode: own | new["modes"].get(mode, {}) for mode, own in there["modes"].items()},
        "rates": {mode: own | new["rates"].get(mode, {}) for mode, own in there["rates"].items()},
        "runs": [*kept, *new["runs"]],
        "command": _with_this_command(there),
    }


def beside(name: str, new: dict[str, Any], *tables: str) -> dict[str, Any]:
    """The committed result of a name with a new one's rows in its tables. Exits unless both were asked the same."""
    there = json.loads((RESULTS / machine() / f"{name}.json").read_text())
    if there["settings"] != new["settings"]:
        raise SystemExit(f"settings: got {new['settings']}, the result that is there has {there['settings']}")
    rows = {table: there[table] | new[table] for table in tables}
    return there | rows | {"command": _with_this_command(there)}


def _with_this_command(there: dict[str, Any]) -> str:
    return f"{there['command']} && python {shlex.join(sys.argv)}"


def over_seeds(values: Sequence[float]) -> dict[str, float]:
    """Mean and standard deviation."""
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def spread(value: dict[str, float], scale: float = 1.0, digits: int = 1) -> str:
    """A mean and a standard deviation as a table shows them."""
    return f"{scale * value['mean']:.{digits}f} ± {scale * value['std']:.{digits}f}"


def quartiles(value: dict[str, float], digits: int = 2) -> str:
    """A median and quartiles as a table shows them."""
    return f"{value['median']:.{digits}f} ({value['low']:.{digits}f}–{value['high']:.{digits}f})"


def of_rounds(values: list[float]) -> str:
    """Median and quartiles of some rounds, as a table shows them."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return quartiles({"low": low, "median": middle, "high": high})


def ratio_of_rounds(one: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Of times in the same round: median and quartiles."""
    found = sorted(x / y for x, y in zip(one, other, strict=True))
    if len(found) == 1:
        return {"median": found[0], "low": found[0], "high": found[0]}
    low, middle, high = statistics.quantiles(found, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def parser(doc: str | None) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--no-write", action="store_true", help="print only")
    return p


def training_parser(doc: str | None, name: str, calibration: str = "for calibration") -> argparse.ArgumentParser:
    """What every script takes that trains the small CIFAR ViT: open what it names with :func:`opened`.

    Args:
        name: of the result, and of the folder of finished runs. calibration: what ``--pictures`` are for.
    """
    p = parser(doc)
    p.add_argument(
        "--model", default=str(SHARED / "models" / "vit_cifar10"),
        help=f"a model or its folder; {REAL} is the real backbone with a head for CIFAR-10",
    )  # fmt: skip
    p.add_argument("--data", default=str(SHARED / "data" / "cifar10" / "train.parquet"))
    p.add_argument("--eval", default=str(SHARED / "data" / "cifar10" / "validation.parquet"))
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--epochs", type=float, default=1.0)
    p.add_argument("--limit", type=int, help="so many training and evaluation pictures")
    p.add_argument("--pictures", type=int, default=512, help=calibration)
    p.add_argument("--name", default=name)
    p.add_argument("--work", type=Path, default=Path(f"runs/benchmark-{name}"), help="finished runs")
    return p


def _folder_of(model: str) -> str:
    if model != REAL:
        return model
    from real.models import classifier_folder

    return str(classifier_folder())


def opened(a: argparse.Namespace) -> tuple[nn.Module, Pictures, Pictures]:
    """The model, the training pictures and the pictures to judge on that a script was given."""
    model = comcat.load_model(_folder_of(a.model), device=a.device)
    train, judged = comcat.open_pictures(a.data), comcat.open_pictures(a.eval)
    if a.limit:
        train, judged = train.take(a.limit, 0), judged.take(a.limit, 0)
    return model, train, judged


def settings_of(a: argparse.Namespace) -> dict[str, Any]:
    """What a script was asked, as a result keeps it: files and folders by their names alone, wherever they lay."""
    return {k: _named(v) for k, v in vars(a).items() if k not in ("name", "work", "no_write")}


def _named(value: Any) -> Any:
    """The name of a path; what names no place stays as it is."""
    if isinstance(value, list | tuple):
        return [_named(v) for v in value]
    return Path(value).name if isinstance(value, Path) or (isinstance(value, str) and "/" in value) else value


def top1(model: nn.Module, pictures: Pictures) -> float:
    """Top-1 accuracy in per cent on labelled pictures."""
    found = comcat.evaluate(model, comcat.batches(pictures, comcat.preprocess_of(model), batch_size=100))
    assert found.top1 is not None
    return found.top1


def vit(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32, **arguments: Any) -> nn.Module:
    """A model with random weights, enough for time, memory and counts: of timm, or of what stands before a colon.

    ``torchvision:vit_b_16`` is torchvision's; ``open_clip:ViT-B-32`` is the picture tower of open_clip's.
    """
    library, _, short = name.rpartition(":")
    torch.manual_seed(0)
    if library == "torchvision":
        model = importlib.import_module("torchvision.models").get_model(short, **arguments)
    elif library == "open_clip":
        model = importlib.import_module("open_clip").create_model(short, **arguments).visual
    elif not library:
        model = importlib.import_module("timm").create_model(short, pretrained=False, **arguments)
    else:
        raise ValueError(f"got {name!r}, expected a name of timm's, torchvision:NAME or open_clip:NAME")
    for layer in model.modules():  # a fresh head of torchvision's is all zeros: then no layer would matter
        if isinstance(layer, nn.Linear) and not layer.weight.any():
            nn.init.trunc_normal_(layer.weight, std=0.02)
    return model.eval().to(device=device, dtype=dtype)


def side_of(model: Any) -> int:
    """The side of the pictures that a timm model takes."""
    return model.pretrained_cfg["input_size"][-1]


def shaped(model: nn.Module, plan: Plan, sites: Sites) -> nn.Module:
    """A copy in a plan's shapes: values do not matter to its time, if they are numbers."""
    small = copy.deepcopy(model)
    apply_(small, plan, sites=sites, weights=False)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.nan_to_num_(0.0, 0.0, 0.0).clamp_(-1, 1)
    return small


def random_pictures(count: int, batch: int, size: int = 224, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(min(batch, count - i), 3, size, size, generator=generator).to(device)
        for i in range(0, count, batch)
    ]


def interleaved(calls: dict[str, Any], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call, round after round, all in one run."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(head: list[str], rows: list[list[Any]]) -> None:
    cells = [[f"{c:.2f}" if isinstance(c, float) else str(c) for c in r] for r in [head, *rows]]
    widths = [max(len(r[i]) for r in cells) for i in range(len(head))]
    for i, row in enumerate(cells):
        print("  ".join(c.rjust(w) if j else c.ljust(w) for j, (c, w) in enumerate(zip(row, widths, strict=True))))
        if i == 0:
            print("  ".join("-" * w for w in widths))


def where(r: dict[str, Any]) -> str:
    e = r["environment"]
    device = e.get("device") or e.get("cpu") or "?"
    parts = [str(device), f"{e.get('threads', '?')} thread(s)", f"torch {e.get('versions', {}).get('torch', '?')}"]
    return f"*{', '.join(parts)}; {r['date']}; `{r['command']}`*"


def rows_of(head: list[str], rows: list[list[Any]]) -> str:
    def cell(c: Any) -> str:
        return "–" if c is None else f"{c:.2f}" if isinstance(c, float) else str(c)

    lines = [head, ["---"] * len(head), *[[cell(c) for c in r] for r in rows]]
    return "\n".join("| " + " | ".join(r) + " |" for r in lines)
