"""``comcat inspect``: what of a model can shrink, what of a pipeline can carry an adapter, and what cannot and why."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from .common import Common, Positional, load, pick_device
from .terminal import table


@dataclass(frozen=True, kw_only=True)
class Inspect(Common):
    """Show every site of a model, its ranks and cost, and what cannot shrink and why; of a text-to-image pipeline, what can carry an adapter; of an adapter, what it holds."""

    model: Positional[str]
    """timm:NAME, hf:NAME or a folder; diffusers:OWNER/NAME or the folder of a pipeline; an adapter's .safetensors file."""
    json: bool = False
    """Print JSON instead of a table."""


def run(command: Inspect) -> int:
    from ..factors import Weights, factorize_site
    from ..hosts import find_sites
    from ..measure import count_parameters
    from ..report import rank_for_energy
    from ..sites import HiddenSite

    path = Path(command.model).expanduser()
    if path.suffix == ".safetensors":
        return _inspect_adapter(command, path)
    if command.model.startswith("diffusers:") or (path / "model_index.json").is_file():
        return _inspect_pipeline(command)
    model = load(command, command.model)
    sites, total = find_sites(model), count_parameters(model)
    rows = []
    for name, site in sites.items():
        if isinstance(site, HiddenSite):
            continue
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


def _inspect_pipeline(command: Inspect) -> int:
    import torch

    from ..diffusion import find_adaptable, load_pipeline

    spec = command.model.removeprefix("diffusers:")
    pipe = load_pipeline(spec, device=pick_device(command.device), dtype=getattr(torch, command.dtype))
    found = find_adaptable(pipe)
    rows = [
        {"attention": p, "where": a.where, "heads": a.heads, "products": list(a.products), "parameters_per_rank": a.parameters(1), "missing": a.missing}
        for p, a in found.attention.items()
    ]  # fmt: skip
    refused = [{"attention": r.name, "reason": r.reason} for r in found.refused]
    if command.json:
        print(json.dumps({"pipeline": spec, "attention": rows, "refused": refused}, indent=1))
        return 0
    table(
        ["attention", "kind", "heads", "carries", "parameters per rank"],
        [[r["attention"], r["where"], str(r["heads"]), " and ".join(r["products"]), f"{r['parameters_per_rank']:,}"] for r in rows],
    )  # fmt: skip
    for where in dict.fromkeys(r["where"] for r in rows):
        count = found.parameters(2, where)
        print(f"\nAn adapter of rank 2 on {where} attention: {count:,} parameters, {2 * count / 1e6:.2f} MB in 16 bit.")
    reasons = {f"{r['attention']}:{product}": reason for r in rows for product, reason in r["missing"].items()} | {
        r["attention"]: r["reason"] for r in refused
    }
    if reasons:
        print("\nCannot carry all or anything:")
        for name, reason in reasons.items():
            print(f"  {name}: {reason}")
    return 0


def _inspect_adapter(command: Inspect, path: Path) -> int:
    from ..diffusion import read

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
        [[r["module"], ", ".join(f"{n} {'×'.join(map(str, s))}" for n, s in r["factors"].items()), f"{r['alpha']:g}" if r["alpha"] is not None else ""] for r in rows],
    )  # fmt: skip
    print()
    for key, value in found.metadata.items():
        print(f"{key}: {value}")
    return 0
