"""``comcat inspect``: what of a model can shrink, what of a pipeline can carry an adapter, and what cannot and why."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import home_path
from ..common import Common, Positional, load, pick_device
from ..terminal import table

if TYPE_CHECKING:
    from ...sites import Site, Sites


@dataclass(frozen=True, kw_only=True)
class Inspect(Common):
    """Show every site of a model, its ranks and cost, and what cannot shrink and why; of a text-to-image pipeline, what
    can carry an adapter; of an adapter, what it holds.
    """

    model: Positional[str]
    """timm:NAME, hf:NAME or a folder; diffusers:OWNER/NAME or the folder of a pipeline; an adapter's .safetensors file.
    """
    json: bool = False
    """Print JSON instead of a table."""


def run(command: Inspect) -> int:
    path = home_path(command.model)
    if path.suffix == ".safetensors":
        return _inspect_adapter(command, path)
    if command.model.startswith("diffusers:") or (path / "model_index.json").is_file():
        return _inspect_pipeline(command)
    return _inspect_model(command)


def _inspect_model(command: Inspect) -> int:
    from ...errors import counted
    from ...factors import WEAK
    from ...hosts import find_sites
    from ...measure import count_parameters
    from ...methods.allocate import shrinkable
    from ...methods.ladders import searchable

    model = load(command, command.model)
    sites, total = find_sites(model), count_parameters(model)
    decisions = searchable(sites)
    by_default = shrinkable(decisions)
    rows = [_row(model, site, sites, total, name not in by_default) for name, site in decisions.items()]
    told = {layer["site"] for row in rows for layer in row.get("layers", ())}
    refused = [{"site": r.name, "reason": r.reason} for r in sites.refused if r.name not in told]
    tokens = _tokens_of(model)
    if command.json:
        said = {"model": command.model, "parameters": total, "statistic": "weights", "sites": rows}
        print(json.dumps({**said, "refused": refused, "tokens": tokens}, indent=1))
        return 0
    head = ["site", "kind", "full", "90 % energy", "saves up to", "parameters", "share", ""]
    table(head, [_cells(row) for row in rows], left=(1, 7))
    held, kept = (sum(r["parameters"] for r in rows if r["kept_by_default"] in of) for of in ((True, False), (True,)))
    print(f"\n{held:,} of {total:,} parameters ({100 * held / total:.1f} %) are in {counted(len(rows), 'site')}.")
    print(f"The ranks that hold 90 % of the energy are {WEAK}")
    if kept:
        print(f"{kept:,} of them are in classifier heads, which keep their size by default; --head lets them shrink.")
    print("\n" + "\n".join(_said_of_tokens(tokens)))
    if refused:
        print("\nCannot shrink:")
        for row in refused:
            print(f"  {row['site']}: {row['reason']}")
    return 0


def _tokens_of(model: Any) -> dict[str, Any]:
    """The trunk of a model as JSON holds it, found by showing it one blank picture of its input size."""

    from ...errors import ComcatError
    from ...hosts.blocks import reduced_blocks
    from ...models import preprocess_of
    from ...statistics.trunk import find_trunk

    merged = [{"block": name, "keep": r.keep, "tokens": r.full} for name, r in reduced_blocks(model).items()]
    if merged:
        return {"merged": merged}
    try:
        p = preprocess_of(model)
        trunk = find_trunk(model, p.blank(next(model.parameters())))
    except ComcatError as error:
        return {"blocks": [], "reason": str(error)}
    found: dict[str, Any] = {"blocks": [site.path for site in trunk.sites]}
    if trunk.sites:
        site = trunk.sites[0]
        found |= {"tokens": site.full, "in_front": site.front, "grid": site.grid and list(site.grid)}
    refused = [{"block": r.name.removesuffix(":tokens"), "reason": r.reason} for r in trunk.refused]
    return {**found, "picture": list(p.size), "refused": refused}


def _said_of_tokens(found: Mapping[str, Any]) -> Iterator[str]:
    """The same in a few lines for people."""
    from ...errors import counted

    if "merged" in found:
        kept = ", ".join(f"{m['block']} {m['keep']} of {m['tokens']}" for m in found["merged"])
        many = len(found["merged"])
        yield f"{counted(many, 'block')} {'runs' if many == 1 else 'run'} on fewer tokens: {kept}."
    elif "reason" in found:
        yield f"No block can run on fewer tokens: {found['reason']}."
    elif not found["blocks"]:
        yield f"No block can run on fewer tokens: {found['refused'][0]['reason']}."
    else:
        rows = "in no order that is known" if found["grid"] is None else " × ".join(map(str, found["grid"]))
        front = {0: "none in front", 1: "one in front that stays"}.get(found["in_front"])
        front = front or f"{found['in_front']} in front that stay"
        size = " × ".join(map(str, found["picture"]))
        yield (
            f"{counted(len(found['blocks']), 'block')} can run on fewer tokens (comcat merge): {found['tokens']} of a "
            f"picture of {size} ({rows}), {front}."
        )
        for row in found["refused"]:
            yield f"  not {row['block']}: {row['reason']}"


def _row(model: Any, site: Site, sites: Sites, total: int, kept: bool) -> dict[str, Any]:
    """What a site is and what it costs. A feed-forward is told by its hidden units; its layers are the alternative."""
    from ...factors import Weights, factorize_site
    from ...report import rank_for_energy
    from ...sites import HiddenSite

    row = {"site": site.name, "kind": site.kind, "kept_by_default": kept}
    row |= {"parameters": site.parameters(), "share": site.parameters() / total}
    if isinstance(site, HiddenSite):
        layers = [_layer(path, sites) for path in site.modules]
        units = {"full_units": site.full, "break_even_units": site.break_even}
        return {**row, **units, "parameters_per_unit": site.parameters_per_unit, "layers": layers}
    found = factorize_site(model, site, Weights()).singular_values
    values = found.sum(0) if found.ndim > 1 else found
    return {
        **row,
        "heads": site.heads,
        "full_rank": site.full,
        "break_even_rank": site.break_even,
        "parameters_per_rank": site.parameters_per_rank,
        "rank_for_90_percent": rank_for_energy(values.tolist(), 0.9),
    }


def _layer(path: str, sites: Sites) -> dict[str, Any]:
    """A layer of a feed-forward: the ranks that it could have instead of fewer units, or why it can have none."""
    if path in sites:
        return {"site": path, "full_rank": sites[path].full, "break_even_rank": sites[path].break_even}
    reason = next((r.reason for r in sites.refused if r.name == path), "it has no ranks")
    return {"site": path, "refused": reason}


def _cells(row: dict[str, Any]) -> list[str]:
    share = [f"{row['parameters']:,}", f"{100 * row['share']:.1f} %"]
    if row["kind"] == "units":
        prefix = f"{row['site'].partition(':')[0]}."
        ranked = [layer for layer in row["layers"] if "break_even_rank" in layer]
        ranks = [f"{layer['site'].removeprefix(prefix)} up to {layer['break_even_rank']}" for layer in ranked]
        full = [f"{row['full_units']} units", "", str(row["break_even_units"])]
        return [row["site"], "feed-forward", *full, *share, f"or ranks: {', '.join(ranks)}" if ranks else ""]
    full = f"{row['full_rank']} × {row['heads']}" if row["heads"] > 1 else str(row["full_rank"])
    note = "keeps its size by default" if row["kept_by_default"] else ""
    return [
        row["site"], row["kind"], full, str(row["rank_for_90_percent"]), str(row["break_even_rank"]), *share, note
    ]  # fmt: skip


def _inspect_pipeline(command: Inspect) -> int:
    import torch

    from ...diffusion import find_adaptable, load_pipeline

    spec = command.model.removeprefix("diffusers:")
    pipe = load_pipeline(spec, device=pick_device(command.device), dtype=getattr(torch, command.dtype))
    found = find_adaptable(pipe)
    rows = [
        {"attention": p, "where": a.where, "heads": a.heads, "products": list(a.products),
            "parameters_per_rank": a.parameters(1), "missing": a.missing,
            "unread": [*a.unread]}
        for p, a in found.attention.items()
    ]  # fmt: skip
    refused = [{"attention": r.name, "reason": r.reason} for r in found.refused]
    if command.json:
        print(json.dumps({"pipeline": spec, "attention": rows, "refused": refused}, indent=1))
        return 0
    table(
        ["attention", "kind", "heads", "carries", "parameters per rank"],
        [[r["attention"], r["where"], str(r["heads"]), " and ".join(r["products"]),
            f"{r['parameters_per_rank']:,}"] for r in rows],
    )  # fmt: skip
    for where in dict.fromkeys(r["where"] for r in rows):
        count = found.parameters(2, where)
        print(f"\nAn adapter of rank 2 on {where} attention: {count:,} parameters, {2 * count / 1e6:.2f} MB in 16 bit.")
    reasons = {f"{r['attention']}:{product}": reason for r in rows for product, reason in r["missing"].items()} | {
        r["attention"]: r["reason"] for r in refused
    }
    reasons |= {f"{r['attention']} ({', '.join(r['unread'])})": "no later block reads what the text's part would write"
                for r in rows if r["unread"]}  # fmt: skip
    if reasons:
        print("\nCannot carry all or anything:")
        for name, reason in reasons.items():
            print(f"  {name}: {reason}")
    return 0


def _inspect_adapter(command: Inspect, path: Path) -> int:
    from ...diffusion import read

    found = read(path)
    rows = [
        {
            "module": module,
            "factors": {name: list(f.shape) for name, f in factors.items()},
            "alpha": found.alphas.get(module),
        }
        for module, factors in found.factors.items()
    ]
    if command.json:
        print(json.dumps({"adapter": str(path), "metadata": dict(found.metadata), "modules": rows}, indent=1))
        return 0
    table(
        ["module", "factors", "alpha"],
        [[r["module"], ", ".join(f"{n} {'×'.join(map(str, s))}" for n, s in r["factors"].items()),
            f"{r['alpha']:g}" if r["alpha"] is not None else ""] for r in rows],
    )  # fmt: skip
    print()
    for key, value in found.metadata.items():
        print(f"{key}: {value}")
    return 0
