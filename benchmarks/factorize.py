"""Factorising every QK and VO product of DeiT-base: from k × k Grams, against d × d products and a full SVD per head.

The dense way is what COMCAT's published code does, a d × d product and numpy.linalg.svd per head; the same with
torch.linalg.svd is timed as well. All run in this process, and singular values are compared. The ratio is between
medians. Goal: at least 100×, singular values equal to 1e-4 (relative to the largest).
"""

from __future__ import annotations

from functools import partial

import numpy
import torch
from common import interleaved, median, parser, vit, write

from comcat.factors import weight_factors
from comcat.hosts import find_sites
from comcat.linalg import factorize, gram
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

    def dense_way(svd) -> None:
        for name, site in sites.items():
            left, right = (f.float() for f in weight_factors(model, site, with_bias=False) if f is not None)
            products = left[: a.heads] @ right[: a.heads].mT  # (heads, d, d)
            dense[name] = torch.stack([svd(m) for m in products])

    def numpy_svd(m: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(numpy.linalg.svd(m.cpu().numpy(), full_matrices=False)[1]).to(m.device)

    def torch_svd(m: torch.Tensor) -> torch.Tensor:
        return torch.linalg.svd(m, full_matrices=False)[1]

    def from_grams() -> None:
        spectra(model, sites)

    with torch.no_grad():
        from_grams()  # warm-up
        seconds = {"grams": median(interleaved({"grams": from_grams}, 7)["grams"])}
        scale = 1.0 if a.heads is None else next(iter(sites.values())).heads / a.heads
        for way, svd in (("dense, torch", torch_svd), ("dense, numpy", numpy_svd)):
            seconds[way] = interleaved({way: partial(dense_way, svd)}, 1)[way][0] * scale
        worst = 0.0
        for name, site in sites.items():
            left, right = weight_factors(model, site, with_bias=False)
            assert left is not None and right is not None
            ours = factorize(gram(left), gram(right)).singular_values[
                : a.heads
            ]  # without the query bias, which the dense way drops
            difference = (ours - dense[name][:, : site.full_rank]).abs().max(-1).values
            worst = max(worst, float((difference / dense[name][:, 0]).max()))
    ratios = {way: seconds[way] / seconds["grams"] for way in seconds if way != "grams"}
    print(
        f"{a.model}: {', '.join(f'{k} {v:.2f} s' for k, v in seconds.items())}: {ratios['dense, numpy']:.0f}× (torch "
        f"{ratios['dense, torch']:.0f}×)"
    )
    print(f"largest difference of a singular value, relative to the largest: {worst:.1e}")
    if not a.no_write:
        result = {"seconds": seconds, "ratios": ratios, "largest_relative_difference": worst, "heads_measured": a.heads}
        write(f"factorize-{a.model}", result)


if __name__ == "__main__":
    main()
