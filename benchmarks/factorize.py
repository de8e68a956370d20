"""Factorising every QK and VO product of DeiT-base: ours from k × k Grams, against three other ways.

    python benchmarks/factorize.py

*Thin QR* is the textbook's: a QR of either factor and a k × k SVD, with the singular vectors that a truncation needs.
The dense ways multiply the d × d product out and take its full SVD a head: that is what COMCAT's published code does
(with numpy). Ours and thin QR are told in float64, in which ours computes, and thin QR in float32 as well. All run in
this process, in turn; the ratio is between medians, with the quartiles of the rounds. Singular values are compared.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import numpy
import torch
from common import interleaved, parser, vit, write
from torch import Tensor, nn

from comcat.factors import weight_factors
from comcat.hosts import find_sites
from comcat.linalg import factorize, gram
from comcat.methods.allocate import spectra
from comcat.sites import ProductSite, Sites


def main(given: list[str] | None = None) -> dict[str, Any]:
    a = arguments(given)
    model = vit(a.model, a.device)
    sites = find_sites(model).only("qk", "vo")
    with torch.no_grad():
        rounds = measured(model, sites, a)
        worst = largest_difference(model, sites, a.heads)
    seconds = {way: median(found) for way, found in rounds.items()}
    ratios = {way: value / seconds["grams"] for way, value in seconds.items() if way != "grams"}
    result = {
        "seconds": seconds,
        "rounds": rounds,
        "ratios": ratios,
        "ratio_quartiles": {way: quartiles_of(rounds[way], seconds["grams"]) for way in ratios},
        "largest_relative_difference": worst,
        "heads_measured": a.heads,
    }
    print(f"{a.model}: {', '.join(f'{k} {v:.2f} s ({ratios.get(k, 1):.1f}×)' for k, v in seconds.items())}")
    print(f"largest difference of a singular value, relative to the largest: {worst:.1e}")
    if not a.no_write:
        write(f"factorize-{a.model}", result)
    return result


def arguments(given: list[str] | None) -> argparse.Namespace:
    p = parser(__doc__)
    p.add_argument("--model", default="deit_base_patch16_224")
    p.add_argument("--heads", type=int, help="dense ways on so many heads a site only, scaled up (a quick look)")
    p.add_argument("--repeats", type=int, default=7, help="of the thin ways; the dense ones run --dense-repeats times")
    p.add_argument("--dense-repeats", type=int, default=3)
    return p.parse_args(given)


def measured(model: nn.Module, sites: Sites, a: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every way, round by round."""
    thin: dict[str, Callable[[], object]] = {
        "grams": partial(spectra, model, sites),
        "thin QR": partial(each, model, sites, thin_qr, torch.float64),
        "thin QR, float32": partial(each, model, sites, thin_qr, torch.float32),
    }
    dense: dict[str, Callable[[], object]] = {
        "dense, torch": partial(each, model, sites, dense_torch, torch.float32, a.heads),
        "dense, numpy": partial(each, model, sites, dense_numpy, torch.float32, a.heads),
    }
    thin["grams"]()  # warm-up
    first: Any = next(iter(sites.values()))
    scale = 1.0 if a.heads is None else first.heads / a.heads
    found = interleaved(thin, a.repeats)
    found |= {way: [scale * s for s in taken] for way, taken in interleaved(dense, a.dense_repeats).items()}
    return found


def each(
    model: nn.Module,
    sites: Sites,
    way: Callable[[Tensor, Tensor], object],
    dtype: torch.dtype,
    heads: int | None = None,
) -> None:
    """Factorise every product one way, of the first ``heads`` heads."""
    for site in products(sites):
        left, right = (f[:heads].to(dtype) for f in weight_factors(model, site, with_bias=False) if f is not None)
        way(left, right)


def products(sites: Sites) -> list[ProductSite]:
    return [site for site in sites.values() if isinstance(site, ProductSite)]


def thin_qr(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """``A Bᵀ = Q_A (R_A R_Bᵀ) Q_Bᵀ`` of all heads at once: the thin factors at full rank, best first."""
    (qa, ra), (qb, rb) = torch.linalg.qr(left), torch.linalg.qr(right)
    u, s, vt = torch.linalg.svd(ra @ rb.mT)
    half = s.sqrt()[..., None, :]
    return qa @ (u * half), qb @ (vt.mT * half)


def dense_torch(left: Tensor, right: Tensor) -> list[Any]:
    return [torch.linalg.svd(m, full_matrices=False) for m in left @ right.mT]


def dense_numpy(left: Tensor, right: Tensor) -> list[Any]:
    return [numpy.linalg.svd(m.cpu().numpy(), full_matrices=False) for m in left @ right.mT]


def quartiles_of(rounds: list[float], base: float) -> list[float]:
    """The quartiles of a way's rounds over the median of ours."""
    low, high = numpy.percentile(rounds, [25, 75])
    return [float(low / base), float(high / base)]


def largest_difference(model: nn.Module, sites: Sites, heads: int | None) -> float:
    """Of a singular value between ours and the dense product's in float32, relative to the product's largest.

    What differs is that product's own rounding: ours is found in float64.
    """
    worst = 0.0
    for site in products(sites):
        left, right = (f[:heads] for f in weight_factors(model, site, with_bias=False) if f is not None)
        ours = factorize(gram(left), gram(right)).singular_values  # without the query bias, which dense ways drop
        theirs = torch.linalg.svdvals(left.float() @ right.float().mT)
        gap = (ours - theirs[:, : site.full_rank]).abs().max(-1).values / theirs[:, 0]
        worst = max(worst, float(gap.max()))
    return worst


if __name__ == "__main__":
    main()
