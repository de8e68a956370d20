"""The model card: what a saved model says of itself to people and to the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from ..factors import WEAK
from ..models.origins import OWN
from ..plan import Plan
from ..record import Results
from ..report.wording import AGREEMENT, cell, metric, share

_KINDS = {
    "qk": "QK products",
    "vo": "VO products",
    "linear": "linear layers",
    "units": "feed-forwards, hidden units",
    "tokens": "blocks, tokens",
}


def model_card(config: Mapping[str, Any], plan: Plan, *, name: str) -> str:
    """A model card in Markdown, with the front matter that the hub reads.

    config: what ``config.json`` holds (``comcat.json`` of a stock export, which has ``stock``). name: of the folder.
    """
    before, after = config["parameters"]["before"], config["parameters"]["after"]
    origin = config["origin"]
    whose = "" if origin["library"] == OWN else f" of {origin['library']}"
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(config, plan), sort_keys=False, allow_unicode=True)}---",
        f"# {name}",
        f"`{origin['name']}`{whose}, compressed with comcat {config['comcat_version']}: "
        + f"{after:,} parameters"
        + (f" instead of {before:,} ({share(before, after)})." if before else "."),
        "## How to load it",
        _loading(config, name),
        *_input(config),
        "## What was done",
        _what_was_done(plan),
        _table(("what", "how many", "kept of each", "of"), _kept(plan)),
        *_section("How that was chosen", _table(("setting", "value"), _settings(config, plan))),
        *_section("Numbers", _numbers(Results.from_dict(config["results"]))),
        "## Limitations",
        _limitations(config),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(config: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    origin = config["origin"]
    front: dict[str, Any] = {"library_name": config["stock"]["library"] if "stock" in config else "comcat"}
    front["pipeline_tag"] = "image-classification" if _classifies(origin) else "image-feature-extraction"
    endings = {name.partition(":")[2] for name in plan.sites}
    tags = {"low-rank": endings - {"units", "tokens"}, "structured-pruning": endings & {"units"}}
    kinds = [tag for tag, found in {**tags, "token-merging": endings & {"tokens"}}.items() if found]
    front["tags"] = ["comcat", "model-compression", *kinds, "vision"]
    front["tags"] += [] if origin["library"] == OWN else [origin["library"]]
    if base := _base_model(origin):
        front["base_model"] = base
    licence = origin["pretrained_cfg"].get("license")
    if isinstance(licence, str) and re.fullmatch(r"[a-z0-9][a-z0-9.-]*", licence):
        front["license"] = licence
    return front


def _classifies(origin: Mapping[str, Any]) -> bool:
    if origin["library"] == OWN:
        return False
    if origin["library"] == "transformers":
        return "ForImageClassification" in origin["name"]
    return origin["arguments"].get("num_classes", origin["pretrained_cfg"].get("num_classes", 1000)) != 0


def _base_model(origin: Mapping[str, Any]) -> str | None:
    """The hub's name of the model before, if what the user typed says it."""
    source = origin["source"]
    for prefix in ("hf:", "timm:hf-hub:"):
        if re.fullmatch(r"[\w.-]+/[\w.-]+", source.removeprefix(prefix)) and source.startswith(prefix):
            return source.removeprefix(prefix)
    if re.fullmatch(r"timm:[\w.]+", source):
        tag = origin["pretrained_cfg"].get("tag")
        full = source.removeprefix("timm:")
        return f"timm/{full}" if "." in full or not tag else f"timm/{full}.{tag}"
    return None


def _loading(config: Mapping[str, Any], name: str) -> str:
    classifies, library = _classifies(config["origin"]), config["origin"]["library"]
    where = "# this folder, or the name of its repository"
    stock = config.get("stock")
    if stock and stock["library"] == "timm":
        output = "logits" if classifies else "features"
        lines = [
            "import timm",
            f'model = timm.create_model("local-dir:{name}", pretrained=True).eval()  # or "hf-hub:" and its repository',
            f"{output} = model(pictures)",
        ]
        note = "No code of comcat is needed: it is an ordinary model of timm with fewer hidden units (`mlp_ratio`)."
    elif stock:
        automatic = "AutoModelForImageClassification" if classifies else "AutoModel"
        lines = [
            f"from transformers import {automatic}",
            f'model = {automatic}.from_pretrained("{name}").eval()  {where}',
            "logits = model(pictures).logits" if classifies else "outputs = model(pictures)",
        ]
        narrow = {"narrower heads": stock.get("head_dim"), "fewer hidden units": stock.get("hidden_units")}
        said = " and ".join(words for words, there in narrow.items() if there)
        note = f"No code of comcat is needed: it is an ordinary checkpoint with {said}, as its config says."
    elif library == OWN:
        kind = config["origin"]["name"].rpartition(".")[2]
        lines = [
            "import comcat",
            f"model = {kind}(...)  # a new one, as it was before compression",
            f'model = comcat.load("{name}", into=model)  {where}',
            "outputs = model(pictures)",
        ]
        note = "Install it with `pip install comcat`."
    else:
        output = "logits = model(pictures)" + (".logits" if library == "transformers" else "")
        lines = [
            "import comcat",
            f'model = comcat.load("{name}")  {where}',
            output if classifies else "outputs = model(pictures)",
        ]
        note = f"Install it with `pip install 'comcat[{library}]'`."
    return "```python\n" + "\n".join(lines) + f"\n```\n\n{note}"


def _input(config: Mapping[str, Any]) -> list[str]:
    p = config["preprocess"]
    if not p:
        return []
    height, width = p["size"]
    means, stds = (", ".join(f"{v:.4g}" for v in p[k]) for k in ("mean", "std"))
    return [
        f"`pictures` is (batch, {p.get('channels', 3)}, {height}, {width}): "
        f"resized ({p['interpolation']}, {p['crop_mode']}, {100 * p['crop_pct']:.4g} % of the picture), "
        f"scaled to 0…1 and normalised with mean {means} and standard deviation {stds}."
    ]


def _what_was_done(plan: Plan) -> str:
    """What the forms in a plan are, in words."""
    entries = plan.sites
    products = any(name.endswith((":qk", ":vo")) for name in entries)
    layers = any(":" not in name for name in entries)
    parts = ["products of attention weights (W_Q W_Kᵀ and W_V W_O of every head)"] if products else []
    parts += ["linear layers"] if layers else []
    said = [f"{' and '.join(parts)} were replaced by thin factors"] if parts else []
    if any(entry.form == "units" for entry in entries.values()):
        said.append(
            "feed-forwards lost hidden units, and the layers that read them were refitted (Hassibi and Stork, 1993)"
        )
    if any(name.endswith(":tokens") for name in entries):
        said.append("blocks run on fewer tokens, those that look alike or lie side by side being merged")
    text = "; ".join(said) or "nothing was changed"
    where = "`plan.json` says what became of each. It follows COMCAT (Xiao et al., ICML 2023)."
    return f"{text[0].upper()}{text[1:]}. {where}"


def _kept(plan: Plan) -> Iterator[tuple[str, str, str, str]]:
    groups: dict[tuple[str, int, str], list[int]] = {}
    for name, entry in plan.sites.items():
        kind = name.rpartition(":")[2] if name.endswith((":qk", ":vo", ":units", ":tokens")) else "linear"
        groups.setdefault((kind, entry.full, entry.form), []).append(entry.keep)
    for (kind, full, form), kept in groups.items():
        what = _KINDS[kind] + (
            "" if form in ("product", "units") or kind == "tokens" else f" ({form.replace('_', ' ')} form)"
        )
        what += "" if kind in ("units", "tokens") else ", rank"
        lowest, highest = min(kept), max(kept)
        yield what, str(len(kept)), f"{lowest:,}" if lowest == highest else f"{lowest:,} to {highest:,}", f"{full:,}"


def _settings(config: Mapping[str, Any], plan: Plan) -> Iterator[tuple[str, str]]:
    for key, value in {**config["settings"], **plan.made_by}.items():
        if key == "merge":  # what was added to a compressed model
            yield from _flat(value, "merge.")
        elif value not in (None, "", [], {}):
            yield key, _shown(value)


def _numbers(results: Results) -> str:
    before, after = results.before, results.after
    keys = [k for k in {**before, **after} if before.get(k) is not None or after.get(k) is not None]
    parts = [
        _table(
            ("", "before", "after"),
            ((metric(k).label, *(cell(side.get(k), metric(k)) for side in (before, after))) for k in keys),
        ),
        f"Accuracy was measured on {results.judged_on}." if results.judged_on else "",
        "Before: the compressed model whose tokens were merged then. What was measured of it stands under `earlier`."
        if "earlier" in results.others
        else "",
        _table(("what", "value"), [*_against(results), *_untuned(results), *_others(results)]),
    ]
    return "\n\n".join(part for part in parts if part)


def _against(results: Results) -> Iterator[tuple[str, str]]:
    """Rows of agreement with the model before, and of the rise of the loss."""
    for key, value in results.agreement.items():
        if value is not None:
            how = AGREEMENT.get(key, metric(key))
            yield how.label, cell(value, how)
    for what, value in (("predicted", results.predicted_loss), ("measured", results.measured_loss)):
        if value is not None:
            yield f"Rise of the loss by compression, {what}", f"{_shown(value)} nats"


def _untuned(results: Results) -> Iterator[tuple[str, str]]:
    earlier = Results.from_dict(results.untuned)
    accuracy = [(metric(key).label, cell(value, metric(key))) for key, value in earlier.others.items()]
    for what, value in [*accuracy, *_against(earlier)]:
        yield f"Before tuning: {what}", value


def _others(results: Results) -> Iterator[tuple[str, str]]:
    yield from _flat(results.tuning or {}, "tuning.")
    yield from _flat(results.others)


def _flat(results: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in results.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value is not None and not isinstance(value, list):
            yield f"{prefix}{key}", _shown(value)


def _limitations(config: Mapping[str, Any]) -> str:
    points = [
        "What the model before compression gets wrong, this one does too; its licence and terms of use hold.",
        "Compression can cost some classes or kinds of pictures more than others: check it on your own data.",
        "Fewer parameters and operations do not always make a model faster; measure on the device it is to run on.",
    ]
    if not _numbers(Results.from_dict(config["results"])):
        points.insert(0, "Its accuracy was not measured when it was saved.")
    if config["statistic"] == "weights":
        points.insert(0, f"What would be lost was measured {WEAK}")
    return "\n".join(f"- {p}" for p in points)


def _section(title: str, text: str) -> list[str]:
    return [f"## {title}", text] if text else []


def _table(header: tuple[str, ...], rows: Any) -> str:
    lines = ["| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(header) + " |", "|" + " --- |" * len(header), *lines]) if lines else ""


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
