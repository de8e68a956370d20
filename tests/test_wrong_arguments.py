"""Something of another kind where a path, batches, a module or a plan is due: errors say what to write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import comcat
from comcat.cli import main
from comcat.errors import DataError, ModelError, PlanError, StoreError

from .models import tiny_vit

PICTURES = torch.zeros(2, 3, 32, 32)

BATCHES: dict[str, tuple[Any, str]] = {
    "a place": ("data/train", r"got 'data/train' \(str\), .*comcat\.open_pictures"),
    "a path": (Path("data"), r"got .*data.*, .*comcat\.open_pictures"),
    "one batch": (PICTURES, r"got \(2, 3, 32, 32\) \(Tensor\), .* put it into a list"),
    "one batch by name": ({"image": PICTURES}, r"\(dict\), .* put it into a list"),
    "a number": (7, r"got 7 \(int\), .* a list of tensors"),
}
USES: dict[str, Callable[[Any], Any]] = {
    "compress": lambda given: comcat.compress(tiny_vit(), given, reduce=0.3),
    "calibrate": lambda given: comcat.calibrate(tiny_vit(), given),
    "evaluate": lambda given: comcat.evaluate(tiny_vit(), given),
    "merge": lambda given: comcat.merge(tiny_vit(), given, keep=0.5),
}


@pytest.mark.parametrize("use", list(USES))
@pytest.mark.parametrize("name", list(BATCHES))
def test_what_yields_no_batches_of_pictures(use: str, name: str) -> None:
    given, said = BATCHES[name]
    with pytest.raises(DataError, match=said):
        USES[use](given)


MODULES: dict[str, Callable[[Any], Any]] = {
    "compress": lambda given: comcat.compress(given, [PICTURES], reduce=0.3),
    "evaluate": lambda given: comcat.evaluate(given, [PICTURES]),
    "evaluate against": lambda given: comcat.evaluate(tiny_vit(), [PICTURES], against=given),
    "tune with a teacher": lambda given: comcat.tune(tiny_vit(num_classes=10), "digits:train", steps=1, teacher=given),
    "tune": lambda given: comcat.tune(given, "digits:train", steps=1),
    "merge": lambda given: comcat.merge(given, [PICTURES], keep=0.5),
    "allocate": lambda given: comcat.allocate(given, reduce=0.3),
    "prune": lambda given: comcat.prune(given, "digits:train", reduce=0.3, steps=2),
    "prune with a teacher": lambda given: comcat.prune(
        tiny_vit(num_classes=10), "digits:train", reduce=0.3, steps=2, teacher=given
    ),
    "search": lambda given: comcat.search(given, "digits:train", reduce=0.3),
    "explore": lambda given: comcat.explore(given, [PICTURES]),
    "count_parameters": comcat.count_parameters,
    "count_macs": lambda given: comcat.count_macs(given, PICTURES),
}


@pytest.mark.parametrize("use", list(MODULES))
def test_what_is_no_module_is_told_in_a_line(use: str) -> None:
    for given in ("timm:vit", dict(tiny_vit().state_dict())):
        with pytest.raises(ModelError, match="expected a module") as caught:
            MODULES[use](given)
        assert len(str(caught.value)) < 200 and "\n" not in str(caught.value)


WRAPPERS: dict[str, Callable[[torch.nn.Module], torch.nn.Module]] = {
    "compiled": lambda model: torch.compile(model, backend="eager"),  # type: ignore[dict-item, return-value]
    "data parallel": torch.nn.DataParallel,
}
SEEN = comcat.data.Preprocess(size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
FEW = {"batch_size": 4, "preprocess": SEEN}
PLANS: dict[str, Callable[[torch.nn.Module], comcat.Plan]] = {
    "merge": lambda model: comcat.merge(model, [torch.randn(4, 3, 32, 32)], keep=0.5),
    "allocate": lambda model: comcat.allocate(model, reduce=0.3),
    "search": lambda model: comcat.search(
        model, comcat.open_pictures("digits:train").take(40, 0), reduce=0.3, rounds=1, rank_steps=1, weight_steps=0,
        **FEW,
    ),
    "prune": lambda model: comcat.prune(
        model, comcat.open_pictures("digits:train").take(16, 0), reduce=0.3, steps=2, **FEW
    ).comcat_record.plan,
}  # fmt: skip


@pytest.mark.parametrize("wrapper", list(WRAPPERS))
@pytest.mark.parametrize("use", list(PLANS))
def test_a_plan_for_a_wrapped_model_is_for_the_model_inside(use: str, wrapper: str) -> None:
    inside = tiny_vit(num_classes=10)
    plan = PLANS[use](WRAPPERS[wrapper](inside))
    assert plan.sites and all(name.startswith(("blocks.", "head")) for name in plan.sites)
    comcat.apply_(WRAPPERS[wrapper](inside), plan)


def test_budgets_of_a_wrapped_model_are_explored() -> None:
    found = comcat.explore(torch.nn.DataParallel(tiny_vit()), [torch.randn(4, 3, 32, 32)], points=2, measured=0)
    assert "blocks.0" in found.dense.parts


@pytest.mark.parametrize("wrapper", list(WRAPPERS))
def test_a_wrapped_model_is_tuned_inside(wrapper: str) -> None:
    inside = tiny_vit(num_classes=10)
    given, before = WRAPPERS[wrapper](inside), inside.head.weight.clone()
    assert comcat.tune(given, comcat.open_pictures("digits:train").take(8, 0), steps=1, **FEW) is given
    assert not inside.head.weight.equal(before)


PATHS: dict[str, Callable[[Any], Any]] = {
    "load": comcat.load,
    "load_model": comcat.load_model,
    "save": lambda given: comcat.save(tiny_vit(), given, plan=comcat.Plan(sites={})),
    "export": lambda given: comcat.export(tiny_vit(), out=given),
    "open_exported": comcat.open_exported,
    "compress_to": lambda given: comcat.compress_to(given, tiny_vit(), "digits:train", reduce=0.3),
    "merge_to": lambda given: comcat.merge_to(given, tiny_vit(), "digits:train", keep=0.5),
    "tune_to": lambda given: comcat.tune_to(given, tiny_vit(), "digits:train", steps=1),
    "search_to": lambda given: comcat.search_to(given, tiny_vit(), "digits:train", reduce=0.3),
    "prune_to": lambda given: comcat.prune_to(given, tiny_vit(), "digits:train", reduce=0.3, steps=1),
    "import_paper": lambda given: comcat.import_paper(given, given, "timm:vit_tiny_patch16_224"),
}


@pytest.mark.parametrize("use", list(PATHS))
def test_what_is_no_path(use: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for given, said in ((7, r"got 7 \(int\), expected a path"), (None, "expected a path"), ("a\0b.onnx", r"\\x00")):
        with pytest.raises(StoreError, match=said):
            PATHS[use](given)
    assert not list(tmp_path.iterdir())


def test_what_is_no_plan() -> None:
    with pytest.raises(PlanError, match=r"got sites \[1\], expected a SitePlan for each name"):
        comcat.Plan(sites=[1])  # type: ignore[arg-type]
    with pytest.raises(PlanError, match="got keep 'a' and full 3, expected whole numbers"):
        comcat.SitePlan(keep="a", full=3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "~nobody-of-that-name/vit"],
        ["search", "x", "--data", "digits:train", "--reduce", ".3", "--out", "~nobody-of-that-name/p.json"],
        ["export", "~nobody-of-that-name/vit", "--out", "x.onnx"],
        ["tune", "~nobody-of-that-name/vit", "--data", "digits:train", "--steps", "1"],
    ],
)
def test_a_home_folder_of_nobody(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 1
    assert capsys.readouterr().err.startswith("comcat: ")
