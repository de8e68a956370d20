"""Exporting: trace, write, load again, compare, and only then put into place."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._version import __version__
from ..data import Preprocess
from ..errors import ComcatError, ExportError, StoreError, counted
from ..files import check_writable, home_path, whole_file, whole_folder, write_json
from ..measure import unsteady
from ..measure.running import entry
from ..models import class_names_of, name_of
from ..settings import from_keywords
from ..store import load_model
from .compare import TOLERANCES, Comparison, check, compare
from .formats import FORMATS, Format, check_name
from .graph import Graph, named, output_names, prepared, trace
from .packages import reason, version_of
from .pictures import Material, Source, gather
from .runtimes import RuntimeModel, description_path, opened
from .settings import ExportSettings
from .speed import Speed, compare_speed

_WIDTH_OF_TENSORRT = 8


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What an export wrote.

    Attributes:
        path: the file or folder. description: the JSON with preprocessing, classes and what was compared.
        comparison: against the model. speed: of int8 against float32 in the same runtime, by number of pictures.
        notes: what a user should know of it.
    """

    path: Path
    description: Path
    comparison: Comparison
    size_bytes: int
    speed: dict[int, Speed] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def export(
    model: nn.Module | str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    data: Source = None,
    preprocess: Preprocess | None = None,
    pictures: int = 32,
    seed: int = 0,
    **settings: Any,
) -> Exported:
    """Write a model as a file that a runtime loads, with a description beside it, whole or not at all.

    What was written is loaded by its runtime and compared with the model on pictures before it takes its place.

    Args:
        model: a model of pictures, or what :func:`comcat.load_model` takes. It is not changed.
        out: the file (``.onnx``, ``.pt2``) or folder (openvino) to write.
        data: pictures to compare and calibrate on: what :func:`comcat.open_pictures` takes, or batches of tensors.
            Without them pictures are generated, and the result says so.
        preprocess: of models that do not say how they want their pictures.
        pictures: how many to compare on, at most; ``seed`` draws them.
        settings: fields of :class:`ExportSettings`; ``to="onnx"``, ``"torch"`` or ``"openvino"``.

    Raises:
        SettingsError: for settings that do not go together. ModelError, StoreError: for a model that cannot be loaded.
        ExportError: if a package is missing (it names the extra), the output exists, the forward depends on the values
            in the pictures, an operator is lacking, or what was written computes something else than the model.
        StoreError: if nothing can be written there.
    """
    chosen = from_keywords(ExportSettings, settings)
    return export_(model, chosen, out=out, data=data, preprocess=preprocess, pictures=pictures, seed=seed)


def export_(
    model: nn.Module | str | os.PathLike[str],
    settings: ExportSettings,
    *,
    out: str | os.PathLike[str],
    data: Source = None,
    preprocess: Preprocess | None = None,
    pictures: int = 32,
    seed: int = 0,
) -> Exported:
    """:func:`export` with its settings in one piece."""
    form, target = FORMATS[settings.to], check_place(out, settings)
    model = model if isinstance(model, nn.Module) else load_model(model)
    material = gather(model, data, preprocess, count=pictures, seed=seed)
    if settings.pixels and material.preprocess is None:
        raise ExportError(
            "the graph cannot normalise pixels: nothing says how; give preprocess=comcat.data.Preprocess(…)"
        )
    job = _Job(model, form, settings, material)
    with _work_folder(target) as work:
        return job.run(work, target)


class _Job:
    """One export."""

    def __init__(self, model: nn.Module, form: Format, settings: ExportSettings, material: Material) -> None:
        self.form, self.settings, self.material = form, settings, material
        self.reference = prepared(model)
        self.batch = None if settings.batch == "dynamic" else settings.batch
        self.batches = material.batches(self.batch)
        if not self.batches:
            raise ExportError(f"got {len(material.images)} {material.source}, too few for a batch of {self.batch}")
        self.names = output_names(self.reference, self._example())
        self.about = {
            "preprocess": None if material.preprocess is None else material.preprocess.to_dict(),
            "class_names": _class_names(model),
            "pixels": settings.pixels,
            "outputs": list(self.names),
        }
        self.model_name = name_of(model)

    def run(self, work: Path, target: Path) -> Exported:
        """Write, compare, and put into place."""
        made = work / target.name
        speed = self._write(made, work)
        description = self._description(target)
        deployed = opened(self.form, made, description, threads=None)
        found = self._compared(deployed)
        check(found, self.settings.precision, self.settings.lose_at_most)
        notes = self._notes(found, speed)
        description |= {
            "comparison": found.to_dict(),
            "speed_against_float32": {str(count): asdict(s) for count, s in speed.items()},
            "notes": list(notes),
        }
        del deployed
        _put_into_place(made, target, self.form, description)
        return Exported(
            path=target,
            description=description_path(target, self.form),
            comparison=found,
            size_bytes=size_of(target),
            speed=speed,
            notes=notes,
        )

    def _write(self, made: Path, work: Path) -> dict[int, Speed]:
        """Write the file, and where it is int8 time it beside the one in float32."""
        settings, form = self.settings, self.form
        graph = Graph(
            prepared(self.reference),
            self.names,
            pixels=self.material.preprocess if settings.pixels else None,
            half=settings.precision == "float16" and settings.to != "openvino",  # which rounds the weights alone
            width=_WIDTH_OF_TENSORRT if settings.target == "tensorrt" else None,
        )
        example = self._input(self._example())
        with _writing():
            traced = trace(graph, example, settings)
            if not settings.quantises:
                form.write(traced, made, settings, self.about)
                return {}
            plain = work / f"float32{form.suffix}"
            form.write(traced, plain, settings, self.about)
            form.quantise(traced, plain, made, settings, [self._input(b).numpy() for b in self.batches])
        plainly, quantised = (opened(form, place, {}, threads=None) for place in (plain, made))
        counts = (1, 8) if self.batch is None else (self.batch,)
        return {count: compare_speed(plainly, quantised, self._input(self._some(count))) for count in counts}

    def _compared(self, deployed: RuntimeModel) -> Comparison:
        def reference(images: Tensor) -> dict[str, Tensor]:
            with torch.inference_mode():
                said = named(entry(self.reference)(self._seen(images)))
            return dict(zip(self.names, said.values(), strict=True))

        return compare(
            reference,
            lambda images: deployed.outputs(self._input(images)),
            self.batches,
            source=self.material.source,
            real=self.material.real,
            tolerance=TOLERANCES.get(self.settings.precision, math.inf),
        )

    def _seen(self, images: Tensor) -> Tensor:
        """The pictures that the model itself gets: where the file gets pixels, what these pixels say."""
        if not self.settings.pixels:
            return images
        prepared = self.material.preprocess
        assert prepared is not None
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (prepared.mean, prepared.std))
        return (self.material.pixels(images).permute(0, 3, 1, 2) / 255 - mean) / std

    def _input(self, images: Tensor) -> Tensor:
        return self.material.pixels(images) if self.settings.pixels else images

    def _example(self) -> Tensor:
        """Two pictures where any number is to do: one would be taken for a constant."""
        return self._some(2 if self.batch is None else self.batch)

    def _some(self, count: int) -> Tensor:
        images = self.material.images
        return images.repeat(-(-count // len(images)), 1, 1, 1)[:count]

    def _description(self, target: Path) -> dict[str, Any]:
        shape = list(self._input(self._example()).shape)
        with torch.inference_mode():
            said = named(entry(self.reference)(self._example())).values()
        shapes = [list(t.shape) for t in said]
        if self.batch is None:
            shape, shapes = ["batch", *shape[1:]], [["batch", *s[1:]] for s in shapes]
        if self.settings.any_size:
            axes = (1, 2) if self.settings.pixels else (2, 3)
            shape = [size if i not in axes else ("height", "width")[axes.index(i)] for i, size in enumerate(shape)]
        return {
            "comcat_version": __version__,
            "model": self.model_name,
            "file": target.name,
            "input": {"name": "images", "shape": shape, "type": "uint8" if self.settings.pixels else "float32"},
            **self.about,
            "outputs": [{"name": n, "shape": s} for n, s in zip(self.names, shapes, strict=True)],
            "settings": {k: v for k, v in asdict(self.settings).items() if k != "overwrite"},
            "checked_with": version_of(self.form.runtime),
        }

    def _notes(self, found: Comparison, speed: dict[int, Speed]) -> tuple[str, ...]:
        notes = []
        if not found.real:
            notes.append("The pictures were generated; give real ones (data=, --data) for figures that mean something.")
        if self.about["preprocess"] is None:
            notes.append("Nothing says how pictures become the input: the description has no preprocessing.")
        if found.unsettled:
            notes.append(
                f"On {found.unsettled} of {counted(found.count, 'picture')} rounding decides what the model says, in "
                "PyTorch as in the file: tokens are alike to the last digit, and which of them merge is chance."
            )
        notes += [f"int8 is {s} at {counted(count, 'picture')} a call." for count, s in speed.items()]
        notes += list(filter(None, (unsteady(s.low, s.high) for s in speed.values())))[:1]
        return tuple(notes)


def check_place(out: str | os.PathLike[str], settings: ExportSettings) -> Path:
    """The output, if it may be written and can be, and what the export needs is installed. Raises as :func:`export`."""
    form, target = FORMATS[settings.to], home_path(out)
    form.check(settings)
    check_name(target, form)
    if target.exists() and bool(form.suffix) == target.is_dir():
        kind = "folder" if target.is_dir() else "file"
        raise ExportError(f"{str(target)!r} is a {kind}, expected a {'file' if form.suffix else 'folder'} to write")
    beside = [p for p in {target, description_path(target, form)} if p.exists()]
    if target.is_dir() and not any(target.iterdir()):
        beside = []
    if beside and not settings.overwrite:
        raise ExportError(f"{str(beside[0])!r} exists; say overwrite=True (--overwrite) to replace it, or name another")
    check_writable(target.parent)
    return target


@contextmanager
def _work_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside the output, gone afterwards."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            yield Path(folder)
    except OSError as error:
        raise StoreError(f"{target} cannot be written: {error.strerror or error}; nothing was") from error


@contextmanager
def _writing() -> Iterator[None]:
    """Raise what other libraries say of a full disk as StoreError."""
    try:
        yield
    except (ComcatError, OSError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ExportError(f"the export failed: {type(error).__name__}: {reason(error)}; nothing was written") from error


def _put_into_place(made: Path, target: Path, form: Format, description: dict[str, Any]) -> None:
    if not form.suffix:
        with whole_folder(target) as new:
            for part in made.iterdir():
                shutil.move(part, new / part.name)
            write_json(description_path(new, form), description)
        return
    with whole_file(target) as new:
        os.replace(made, new)
        write_json(description_path(target, form), description)


def _class_names(model: nn.Module) -> list[str] | None:
    record = getattr(model, "comcat_record", None)
    names = getattr(record, "class_names", None)
    if names is None:
        try:
            names = class_names_of(model)
        except ComcatError:
            return None
    return None if names is None else list(names)


def size_of(path: Path) -> int:
    """Bytes of an exported file, or of all files of an exported folder."""
    return path.stat().st_size if path.is_file() else sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
