"""Factorising every QK and VO product of DeiT-base: from k × k Grams, against d × d products and a full SVD per head.

The dense way is what COMCAT's published code does; both run in this process, one after the other, and their singular values are compared.
The ratio is between medians. Goal: at least 100×, singular values equal to 1e-4 (relative to the largest).
"""

from __future__ import annotations

import torch
from common import interleaved, median, parser, vit, write

from comcat.factors import weight_factors
from comcat.hosts import find_sites
from comcat.methods.allocate import spectra


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--model", default="deit_base_patch16_224")
    p.add_argument(
        "--heads",
        type=int,
        default=None,
        help="dense way on so many heads a site only, and scaled up (for a quick look)",
    )
    a = p.parse_args()
    model = vit(a.model, a.device)
    sites = find_sites(model).only("qk", "vo")
    dense: dict[str, torch.Tensor] = {}

    def dense_way() -> None:
        for name, site in sites.items():
            left, right = weight_factors(model, site, with_bias=False)
            assert left is not None and right is not None
            products = left.float() @ right.float().mT  # (heads, d, d)
            dense[name] = torch.stack([torch.linalg.svd(m, full_matrices=False)[1] for m in products[: a.heads]])

    with torch.no_grad():
        spectra(model, sites)  # warm-up
        fast = interleaved({"gram": lambda: spectra(model, sites)}, 5)["gram"]
        slow = interleaved({"dense": dense_way}, 1)["dense"]
        found = spectra(model, sites)
        worst = 0.0
        for name, site in sites.items():
            left, right = weight_factors(model, site, with_bias=False)
            assert left is not None and right is not None
            ours = (
                found[name].singular_values[: a.heads] if site.kind == "vo" else _without_bias(model, site)[: a.heads]
            )
            worst = max(
                worst, float(((ours - dense[name][:, : site.full_rank]).abs().max(-1).values / dense[name][:, 0]).max())
            )
    scale = 1.0 if a.heads is None else next(iter(sites.values())).heads / a.heads
    ratio = median(slow) * scale / median(fast)
    print(
        f"{a.model}: dense {median(slow) * scale:.1f} s, Grams {median(fast):.3f} s: {ratio:.0f}×; largest difference of a singular value {worst:.1e}"
    )
    if not a.no_write:
        write(
            f"factorize-{a.model}",
            {
                "dense_s": median(slow) * scale,
                "gram_s": median(fast),
                "ratio": ratio,
                "largest_relative_difference": worst,
                "heads_measured": a.heads,
            },
        )


def _without_bias(model, site):
    """QK carries its query bias as one more row; the dense way has none, so the comparison leaves it out."""
    from comcat.linalg import factorize, gram

    left, right = weight_factors(model, site, with_bias=False)
    return factorize(gram(left), gram(right)).singular_values


if __name__ == "__main__":
    main()
