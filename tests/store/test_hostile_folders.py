"""Folders that somebody has changed, hashes put right afterwards: each is refused in a sentence of ours."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import comcat
from comcat.errors import ComcatError, ModelError, PlanError, StoreError
from comcat.runs.claims import claimed
from comcat.store.folder import CONFIG, PLAN, WEIGHTS, own_hash, sha256

from ..models import pictures, tiny_vit


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_vit()
    sites = comcat.find_sites(model)
    keep = {"blocks.0.attn:qk": "product", "blocks.0.attn:vo": "product", "blocks.1.mlp:units": "units"}
    plan = {name: comcat.SitePlan(form=form, keep=6, full=sites[name].full) for name, form in keep.items()}
    small = comcat.compress(model, pictures(), plan=comcat.Plan(sites=plan))
    return comcat.save(small, tmp_path_factory.mktemp("saved") / "small")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "small")


def signed(folder: Path) -> Path:
    """The folder with hashes as whoever changed it on purpose would leave them."""
    config = json.loads((folder / CONFIG).read_text())
    config["sha256"] |= {name: sha256(folder / name) for name in (WEIGHTS, PLAN)}
    config["sha256"][CONFIG] = own_hash(config, CONFIG)
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def change(path: Path, by: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    by(content)
    path.write_text(json.dumps(content))


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "results": (lambda c: c.update(results=[1]), r"config\.json: got results \[1\], expected an object"),
    "settings": (lambda c: c.update(settings="x"), "got settings 'x', expected an object"),
    "class names": (lambda c: c.update(class_names=7), "got class_names 7, expected a list"),
    "one class name": (lambda c: c.update(class_names=["a", 7]), "got class_names with 7, expected names"),
    "picture size": (lambda c: c["preprocess"].update(size=[-1, 9]), r"preprocess: size: got \[-1, 9\]"),
    "preprocess": (lambda c: c.update(preprocess={"size": "x"}), "the preprocessing lacks mean, std"),
    "no origin": (lambda c: c.pop("origin"), "an origin lacks library and name"),
    "origin": (lambda c: c.update(origin=[7]), r"an origin is \[7\], expected names and values"),
}


@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_config_that_cannot_be(name: str, folder: Path) -> None:
    by, said = CONFIGS[name]
    change(folder / CONFIG, by)
    with pytest.raises(StoreError, match=said):
        comcat.load(signed(folder))


PLANS = {
    "nested without end": ("[" * 100_000, "nested too deep"),
    "a number without end": ('{"comcat_plan": ' + "9" * 5000 + "}", "not a plan: .*digits"),
    "cut off": ('{"comcat_plan": 2, "sites": {', "not a plan"),
}


@pytest.mark.parametrize("name", list(PLANS))
def test_a_plan_that_is_no_json(name: str, folder: Path) -> None:
    text, said = PLANS[name]
    (folder / PLAN).write_text(text)
    with pytest.raises(PlanError, match=said):
        comcat.Plan.load(folder / PLAN)
    with pytest.raises(StoreError, match=said):
        comcat.load(signed(folder))


@pytest.mark.parametrize("open_it", [comcat.load, comcat.load_model])
def test_a_config_nested_without_end(open_it: Callable[[Path], Any], folder: Path) -> None:
    (folder / CONFIG).write_text("[" * 100_000)
    with pytest.raises(ComcatError, match="nested too deep"):
        open_it(folder)


def test_weights_of_another_kind_of_number(folder: Path) -> None:
    tensors = {name: tensor.int() for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    with pytest.raises(StoreError, match=r"do not fit: .* is torch\.int32, expected torch\.float32"):
        comcat.load(signed(folder))


NO_MODEL: dict[str, Callable[[Path], Any]] = {
    "compress": lambda folder: comcat.compress("timm:vit", reduce=0.3),  # type: ignore[arg-type]
    "find_sites": lambda folder: comcat.find_sites("timm:vit"),  # type: ignore[arg-type]
    "save": lambda folder: comcat.save("timm:vit", folder / "x"),  # type: ignore[arg-type]
    "load into": lambda folder: comcat.load(folder, into="timm:vit"),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("name", list(NO_MODEL))
def test_a_name_where_a_module_is_due(name: str, folder: Path) -> None:
    with pytest.raises(ModelError, match=r"got 'timm:vit' \(str\), expected a module; comcat\.load_model\(name\)"):
        NO_MODEL[name](folder)


def test_a_file_where_a_plan_is_due(folder: Path) -> None:
    for attempt in (
        lambda: comcat.apply_(tiny_vit(), str(folder / PLAN)),  # type: ignore[arg-type]
        lambda: comcat.compress(tiny_vit(), [torch.ones(1, 3, 32, 32)], plan=str(folder / PLAN)),  # type: ignore[arg-type]
    ):
        with pytest.raises(PlanError, match=r"expected a comcat\.Plan; comcat\.Plan\.load\(file\) reads one"):
            attempt()


def test_places_that_cannot_be_claimed_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    places = {
        "/": "'/' itself",
        tmp_path / "file" / "x": r"file/x': '.*file' is a file",
        tmp_path / ("n" * 300): "nnn'",
    }
    for place, said in places.items():
        with pytest.raises(StoreError, match=said), claimed(place):
            pass
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def asks_for(**arguments: Any) -> Callable[[dict[str, Any]], Any]:
    """A config whose model has other arguments of timm."""
    return lambda config: config["origin"]["arguments"].update(arguments)


def claims_of(parameters: int, **arguments: Any) -> Callable[[dict[str, Any]], Any]:
    """The same, that admits to its size."""

    def change(config: dict[str, Any]) -> None:
        asks_for(**arguments)(config)
        config["parameters"]["before"] = parameters

    return change


TOO_LARGE: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "width": (asks_for(embed_dim=30_000), "far larger than the .* parameters"),
    "picture": (asks_for(img_size=200_000), "far larger than"),
    "picture of 10⁹": (asks_for(img_size=10**9), "got img_size 1,000,000,000, expected at most"),
    "depth": (asks_for(depth=10**9), "got depth 1,000,000,000, expected at most"),
    "depth of 10⁷": (asks_for(depth=10**7), "far larger than"),
    "classes": (asks_for(num_classes=10**8), "far larger than"),
    "more than the machine has": (claims_of(10**14, embed_dim=10**6), "parameters take 372,529 GiB, and this machine"),
    "parameters": (claims_of(-1), "expected how many there were before"),
}


@pytest.mark.parametrize("name", list(TOO_LARGE))
def test_a_config_that_asks_for_a_huge_model_is_refused_before_memory_is_taken(
    name: str, folder: Path, nothing_huge: None
) -> None:
    by, said = TOO_LARGE[name]
    change(folder / CONFIG, by)
    with pytest.raises(ComcatError, match=f"small.*{said}"):
        comcat.load(signed(folder))


@pytest.fixture
def nothing_huge(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends the test before a layer takes much memory."""
    empty = torch.empty

    def watched(*shape: Any, **keywords: Any) -> torch.Tensor:
        if empty(*shape, **{**keywords, "device": "meta"}).numel() > 2**26:
            pytest.fail(f"memory for {shape} would have been taken")
        return empty(*shape, **keywords)

    monkeypatch.setattr(torch, "empty", watched)


def entry(kind: str, **values: Any) -> Callable[[dict[str, Any]], Any]:
    """A plan whose first entry of a kind is another."""

    def change(plan: dict[str, Any]) -> None:
        site = next(name for name in plan["sites"] if name.endswith(kind))
        plan["sites"][site] |= values

    return change


TUCKER = {"form": "tucker", "keep": 6, "full": 48, "shape": {"out": [192], "in": [48], "ranks": [10**9, 10**9]}}
HUGE_PLANS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "rank": entry(":qk", keep=10**9),
    "rank of as many": entry(":qk", keep=10**9, full=10**9),
    "ranks of heads": entry(":qk", head_ranks=[10**9] * 3),
    "units": entry(":units", keep=10**9),
    "units of as many": entry(":units", keep=10**9, full=10**9),
    "a form with sizes of its own": lambda plan: plan["sites"].update({"blocks.0.mlp.fc1": TUCKER}),
}


@pytest.mark.parametrize("name", list(HUGE_PLANS))
def test_a_plan_that_asks_for_huge_sizes_is_refused_before_memory_is_taken(
    name: str, folder: Path, nothing_huge: None
) -> None:
    change(folder / PLAN, HUGE_PLANS[name])
    with pytest.raises(StoreError, match=r"small: the plan does not fit .*(10{9}|1(,000){3}|full)"):
        comcat.load(signed(folder))


def test_a_picture_size_that_no_memory_holds(folder: Path) -> None:
    change(folder / CONFIG, lambda config: config["preprocess"].update(size=[10**6, 10**6]))
    with pytest.raises(StoreError, match=r"preprocess: size: got \[1000000, 1000000\], expected at most 100,000,000"):
        comcat.load(signed(folder))


WITH_NUL: dict[str, Callable[[str], Any]] = {
    "load": comcat.load,
    "load_model": comcat.load_model,
    "save": lambda path: comcat.save(tiny_vit(), path, plan=comcat.Plan(sites={})),
    "compress_to": lambda path: comcat.compress_to(path, tiny_vit(), "digits:train", reduce=0.3),
    "compress_to from": lambda path: comcat.compress_to("out", tiny_vit(), path, reduce=0.3),
    "open_pictures": comcat.open_pictures,
    "Plan.load": comcat.Plan.load,
    "Plan.save": comcat.Plan(sites={}).save,
    "claim": lambda path: claimed(path).__enter__(),
}


@pytest.mark.parametrize("name", list(WITH_NUL))
@pytest.mark.parametrize("path", ["a\0b", "a\0b/c", "/tmp/\0"])
def test_a_nul_character_in_a_path(name: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ComcatError, match=r"\\x00"):
        WITH_NUL[name](path)
    assert not list(tmp_path.iterdir())
