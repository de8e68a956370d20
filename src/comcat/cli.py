"""The command line: one thin function a verb. Settings are dataclasses; tyro makes the options from them."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from .errors import ComcatError, DataError, SettingsError, nearest
from .methods.compress import CompressSettings
from .terminal import LABELS, number, print_report, table

Positional = tyro.conf.Positional
FEW = 20
"""So few pictures are not split into some to calibrate on and some to measure on."""


@dataclass(frozen=True, kw_only=True)
class Common:
    """Options that every verb takes."""

    device: str = "auto"
    """Where to compute: auto, cpu, cuda, cuda:1, mps."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights."""
    pretrained: bool = True
    """Load the model's published weights (--no-pretrained: random ones, to look at structure and speed)."""
    seed: int = 0
    """Seed of everything random: which pictures, sampled labels, random weights."""


@dataclass(frozen=True, kw_only=True)
class Inspect(Common):
    """Show every site of a model, its ranks and cost, and what cannot shrink and why."""

    model: Positional[str]
    """timm:NAME, hf:NAME or a folder."""
    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True, kw_only=True)
class Compress(Common, CompressSettings):
    """Make a model smaller and faster: calibrate, choose ranks, factorise, measure, save."""

    model: Positional[str]
    """timm:NAME, hf:NAME or a folder."""
    data: str
    """Pictures to calibrate on: a folder, parquet, .tar shards, hf:DATASET or digits. Labels are not needed."""
    out: Path
    """Folder to save to."""
    eval: str | None = None
    """Pictures with labels to report accuracy on. Nothing is chosen by them."""
    eval_limit: int | None = None
    """Evaluate on so many pictures only."""
    plan: Path | None = None
    """Use the ranks of this plan.json instead of choosing them."""
    recipe: Path | None = None
    """Read options from a YAML file; options given on the command line win."""
    batch_size: int = 32
    """Pictures a batch, for calibration, evaluation and timing."""
    bench: bool = True
    """Time the model before and after."""
    stock: bool = False
    """Save a checkpoint that plain transformers loads (attention at one uniform rank only)."""
    overwrite: bool = False
    """Replace a folder that holds an earlier result."""


@dataclass(frozen=True, kw_only=True)
class Eval(Common):
    """Accuracy of a model on pictures, and agreement with another."""

    model: Positional[str]
    """timm:NAME, hf:NAME or a folder."""
    data: str
    """Pictures, with labels for accuracy."""
    against: str | None = None
    """A model to compare predictions with."""
    batch_size: int = 32
    """Pictures a batch."""
    limit: int | None = None
    """Use so many pictures only, drawn at random."""
    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True, kw_only=True)
class Bench(Common):
    """Time a model, side by side with another in one interleaved run."""

    model: Positional[str]
    """timm:NAME, hf:NAME or a folder."""
    against: str | None = None
    """A model to time beside it."""
    batch_size: int = 16
    """Pictures a batch."""
    repeats: int = 20
    """Rounds, at least."""
    compile: bool = False
    """Time under torch.compile."""
    threads: int | None = None
    """CPU threads."""
    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True, kw_only=True)
class Demo(Common):
    """See it work without any download: train a small ViT on the built-in digits, compress it, report."""

    what: Positional[Literal["compress"]] = "compress"
    """Which demo."""
    out: Path = Path("runs/demo-compress")
    """Folder to save to."""
    reduce: float = 0.8
    """Share of the parameters to save."""


Command = (
    Annotated[Inspect, tyro.conf.subcommand("inspect")]
    | Annotated[Compress, tyro.conf.subcommand("compress")]
    | Annotated[Eval, tyro.conf.subcommand("eval")]
    | Annotated[Bench, tyro.conf.subcommand("bench")]
    | Annotated[Demo, tyro.conf.subcommand("demo")]
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status. Errors that a user can cause are told in one line, without a traceback."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments[:1] == ["--version"]:
        from ._version import __version__

        print(f"comcat {__version__}")
        return 0
    try:
        command = tyro.cli(
            Command,
            args=_with_recipe(arguments),
            prog="comcat",
            description="Attention-based vision models, smaller and faster.",
        )  # type: ignore[arg-type]
        return {Inspect: inspect, Compress: compress, Eval: evaluate, Bench: bench, Demo: demo}[type(command)](command)  # type: ignore[index,operator]
    except ComcatError as error:
        print(f"comcat: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("comcat: interrupted; nothing was left half-written", file=sys.stderr)
        return 130
    except BrokenPipeError:
        with suppress(Exception):
            sys.stdout.close()
        return 141


def _with_recipe(arguments: list[str]) -> list[str]:
    """Options from ``--recipe FILE`` put in front of those given, so that the latter win."""
    if arguments[:1] != ["compress"] or "--recipe" not in arguments[:-1]:
        return arguments
    import yaml

    path = Path(arguments[arguments.index("--recipe") + 1])
    if not path.is_file():
        known = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise SettingsError(f"no recipe at {str(path)!r}{nearest(path.name, known)}")
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: expected options by name, got {type(content).__name__}")
    known = {f.name for f in fields(Compress)} - {"recipe"}
    options: list[str] = []
    for name, value in content.items():
        name = str(name).replace("-", "_")
        if name not in known:
            raise SettingsError(f"{path}: unknown option {name!r}{nearest(name, known)}")
        flag = "--" + name.replace("_", "-")
        if name == "model":
            if len(arguments) < 2 or arguments[1].startswith("-"):
                options.insert(0, str(value))
        elif isinstance(value, bool):
            options.append(flag if value else "--no-" + flag[2:])
        elif value is not None:
            options += [flag, *([str(v) for v in value] if isinstance(value, list) else [str(value)])]
    given = {a.split("=")[0] for a in arguments}
    if {"--reduce", "--max-drop"} & given:  # one of them said by hand replaces either in the recipe
        options = _without(options, {"--reduce", "--max-drop"})
    return ["compress", *options, *arguments[1:]]


def _without(options: list[str], flags: set[str]) -> list[str]:
    kept, skip = [], False
    for option in options:
        if option.startswith("--"):
            skip = option in flags
        if not skip:
            kept.append(option)
    return kept


def inspect(command: Inspect) -> int:
    from .factors import Weights, factorize_site
    from .hosts import find_sites
    from .measure import count_parameters
    from .report import rank_for_energy

    model = _load(command, command.model)
    sites, total = find_sites(model), count_parameters(model)
    rows = []
    for name, site in sites.items():
        found = factorize_site(model, site, Weights()).singular_values
        values = found.sum(0) if found.ndim > 1 else found
        rows.append({
            "site": name, "kind": site.kind, "heads": site.heads, "full_rank": site.full_rank, "parameters": site.parameters(),
            "share": site.parameters() / total, "parameters_per_rank": site.parameters_per_rank, "break_even_rank": site.break_even,
            "rank_for_90_percent": rank_for_energy(values.tolist(), 0.9),
        })  # fmt: skip
    if command.json:
        print(
            json.dumps(
                {
                    "model": command.model,
                    "parameters": total,
                    "sites": rows,
                    "refused": [{"site": r.name, "reason": r.reason} for r in sites.refused],
                },
                indent=1,
            )
        )
        return 0
    table(
        ["site", "kind", "full rank", "90 % energy", "saves up to rank", "parameters", "share"],
        [
            [r["site"], r["kind"], f"{r['full_rank']} × {r['heads']}" if r["heads"] > 1 else str(r["full_rank"]), str(r["rank_for_90_percent"]), str(r["break_even_rank"]),
             f"{r['parameters']:,}", f"{100 * r['share']:.1f} %"] for r in rows
        ],
    )  # fmt: skip
    shrinkable = sum(r["parameters"] for r in rows)
    print(f"\n{len(rows)} sites hold {shrinkable:,} of {total:,} parameters ({100 * shrinkable / total:.1f} %).")
    if sites.refused:
        print("\nCannot shrink:")
        for refusal in sites.refused:
            print(f"  {refusal.name}: {refusal.reason}")
    return 0


def compress(command: Compress) -> int:
    model = _load(command, command.model)
    return _compress(command, model)


def _compress(command: Compress, model: Any, *, shown: str | None = None) -> int:
    import copy

    from . import measure
    from .data import open_pictures, overlap
    from .methods.compress import compress_
    from .models import preprocess_of
    from .plan import Plan
    from .report.collect import collect
    from .store import save

    started = time.monotonic()
    _check_out(command.out, command.overwrite)
    pictures = open_pictures(command.data)
    evaluation = None if command.eval is None else open_pictures(command.eval)
    if command.eval is not None and _same_place(command.data, command.eval):
        raise DataError(
            f"--data and --eval are both {command.eval!r}: accuracy on pictures that were calibrated on says nothing; give separate ones"
        )
    plan = None if command.plan is None else Plan.load(command.plan)
    rest, held = pictures.split(0.2, command.seed)
    notes: list[str] = []
    if pictures.count is not None and pictures.count < FEW:
        rest = held = pictures
        notes.append(f"Only {pictures.count} pictures: calibration and measurement had to share them.")
    calibration = rest.take(command.pictures, command.seed)
    judged = held.take(1000, command.seed) if evaluation is None else evaluation
    judged = judged if command.eval_limit is None else judged.take(command.eval_limit, command.seed)
    _check_classes(model, judged)
    preprocess = preprocess_of(model)
    load = _Loader(preprocess, command.batch_size)
    if evaluation is not None and (shared := overlap(calibration, judged)):
        raise DataError(
            f"{shared} of the calibration pictures are also in --eval {command.eval!r}: accuracy there would not be honest"
        )
    settings = CompressSettings(**{f.name: getattr(command, f.name) for f in fields(CompressSettings)})
    before = copy.deepcopy(model)
    done = compress_(
        model,
        load(calibration),
        settings,
        held_out=load(held.take(2000, command.seed)) if command.max_drop is not None else None,
        plan=plan,
        progress=True,
    )
    notes += _skipped(calibration)
    if evaluation is None:
        notes.append("Measured on pictures of --data that calibration did not see, for want of --eval.")
    say = (
        measure.evaluate(before, load(judged), progress=True),
        measure.evaluate(model, load(judged), reference=before, progress=True),
    )
    timings = _time({"before": before, "after": model}, done.prepared.example, command) if command.bench else None
    report = collect(
        before, model, done, title=f"{command.model}, compressed", model=command.model, command=shown or "comcat " + shlex.join(sys.argv[1:]),
        settings=_plain(command), evaluations=say, timings=timings, notes=tuple(notes),
    )  # fmt: skip
    model.comcat_record = _with_results(model.comcat_record, report)
    save(model, command.out, report=report, stock=command.stock)
    print_report(report, time.monotonic() - started)
    print(f"\nSaved to {command.out}; report: {(command.out / 'report.html').resolve()}")
    return 0


def evaluate(command: Eval) -> int:
    from .data import open_pictures
    from .measure import evaluate as judge
    from .models import preprocess_of

    model = _load(command, command.model)
    against = None if command.against is None else _load(command, command.against)
    pictures = open_pictures(command.data)
    if command.limit is not None:
        pictures = pictures.take(command.limit, command.seed)
    _check_classes(model, pictures)
    load = _Loader(preprocess_of(model), command.batch_size)
    result = {
        k: v
        for k, v in judge(model, load(pictures), reference=against, progress=not command.json).to_dict().items()
        if v is not None
    }
    if command.json:
        print(json.dumps({"model": command.model, "data": command.data, **result}, indent=1))
        return 0
    table(["measure", "value"], [[LABELS.get(k, k), number(k, v)] for k, v in result.items()])
    for note in _skipped(pictures):
        print(note)
    return 0


def bench(command: Bench) -> int:
    import torch

    from .measure import count_macs, count_parameters, environment, peak_memory, ratio, size_on_disk
    from .models import preprocess_of

    if command.threads is not None:
        torch.set_num_threads(command.threads)
    models = {command.model: _load(command, command.model)}
    if command.against is not None:
        models = {command.against: _load(command, command.against), **models}
    first = next(iter(models.values()))
    prepared = preprocess_of(first)
    p = next(first.parameters())
    example = torch.randn(
        command.batch_size, prepared.channels, *prepared.size, generator=torch.Generator().manual_seed(command.seed)
    ).to(p)
    timings = _time(models, example, command)
    rows = {
        name: {
            "parameters": count_parameters(m), "macs": count_macs(m, example[:1]), "size_bytes": size_on_disk(m), "peak_memory_bytes": peak_memory(m, example),
            "latency_s": timings[name].median_s, "low_s": timings[name].low_s, "high_s": timings[name].high_s, "throughput": timings[name].throughput,
        } for name, m in models.items()
    }  # fmt: skip
    speed = None if command.against is None else ratio(timings, command.against, command.model)
    if command.json:
        print(
            json.dumps(
                {
                    "models": rows,
                    "speed_up": speed,
                    "batch_size": command.batch_size,
                    "compiled": command.compile,
                    "environment": environment(),
                },
                indent=1,
            )
        )
        return 0
    keys = ["parameters", "macs", "size_bytes", "peak_memory_bytes", "latency_s", "low_s", "high_s", "throughput"]
    table(["measure", *rows], [[LABELS[k], *(number(k, r[k]) for r in rows.values())] for k in keys])
    if speed is not None:
        print(
            f"\nSpeed-up {speed[0]:.2f}× (quartiles {speed[1]:.2f}–{speed[2]:.2f}), batch {command.batch_size}, {'compiled' if command.compile else 'eager'}, {command.dtype}, interleaved."
        )
    return 0


def demo(command: Demo) -> int:
    from .demo import digits_model
    from .store import save  # noqa: F401  (fails early where an extra is missing)

    model = digits_model(command.out.parent / "cache" / f"digits-vit-{command.seed}.safetensors", seed=command.seed).to(
        _device(command.device)
    )
    settings = Compress(
        model="a small ViT trained on digits", data="digits:train", eval="digits:test", out=command.out, reduce=command.reduce, seed=command.seed, device=command.device, overwrite=True,
    )  # fmt: skip
    return _compress(settings, model, shown=f"comcat demo compress --reduce {command.reduce:g} --seed {command.seed}")


class _Loader:
    """Pictures to batches for one model's preprocessing."""

    def __init__(self, preprocess: Any, batch_size: int) -> None:
        self.preprocess, self.batch_size = preprocess, batch_size
        if batch_size < 1:
            raise SettingsError(f"got --batch-size {batch_size}, expected at least 1")

    def __call__(self, pictures: Any) -> Any:
        from .data import batches

        return batches(pictures, self.preprocess, batch_size=self.batch_size)


def _load(command: Common, spec: str) -> Any:
    import torch

    from .models import load_model

    torch.manual_seed(command.seed)
    return load_model(
        spec, pretrained=command.pretrained, device=_device(command.device), dtype=getattr(torch, command.dtype)
    )


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"got --device {name!r}, which cannot be used: {str(error).splitlines()[0]}") from None
    return name


def _time(models: dict[str, Any], example: Any, command: Any) -> Any:
    import torch

    from .measure import benchmark

    p = next(next(iter(models.values())).parameters())
    size = command.batch_size
    if len(example) != size:
        example = torch.randn(size, *example.shape[1:], generator=torch.Generator().manual_seed(0))
    return benchmark(
        models, example.to(p), repeats=getattr(command, "repeats", 10), compile=getattr(command, "compile", False)
    )


def _check_out(out: Path, overwrite: bool) -> None:
    if out.is_file():
        raise SettingsError(f"--out {str(out)!r} is a file, expected a folder to write to")
    if out.is_dir() and any(out.iterdir()) and not overwrite:
        raise SettingsError(
            f"--out {str(out)!r} is not empty; say --overwrite to replace an earlier result, or name another folder"
        )


def _check_classes(model: Any, pictures: Any) -> None:
    from .models import class_names_of

    ours, theirs = class_names_of(model), pictures.class_names
    if ours and theirs and len(theirs) > len(ours):
        raise DataError(f"the pictures have {len(theirs)} classes, the model {len(ours)}")


def _same_place(a: str, b: str) -> bool:
    return a == b or (Path(a).exists() and Path(b).exists() and Path(a).resolve() == Path(b).resolve())


def _skipped(pictures: Any) -> list[str]:
    return (
        [f"{len(pictures.skipped)} unreadable pictures were skipped, the first: {pictures.skipped[0]}"]
        if pictures.skipped
        else []
    )


def _plain(command: Any) -> dict[str, Any]:
    return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(command).items() if v is not None}


def _with_results(record: Any, report: Any) -> Any:
    from dataclasses import replace

    return replace(
        record,
        results={
            "before": report.before,
            "after": report.after,
            "agreement": report.agreement,
            "predicted_loss": report.predicted_loss,
            "measured_loss": report.measured_loss,
        },
    )


if __name__ == "__main__":
    raise SystemExit(main())
