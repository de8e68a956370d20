"""COMCAT, Figures 1 and 2: cumulative singular values of W_Q, W_K, W_V, W_O, QK and VO per head and layer, and the
parameters that 90 % of them need.

    python benchmarks/paper/figures12.py --model timm:deit_base_patch16_224 --out figures/

Needs no data. Writes figure1.svg, figure2.svg and the numbers behind Figure 2.
"""

from __future__ import annotations

import json
from pathlib import Path

from tables import arguments

from comcat import find_sites, load_model
from comcat.report import figure_parameters_for_energy, figure_spectra, rank_for_energy
from comcat.report.collect import weight_spectra


def main(given: list[str] | None = None) -> dict:
    a = arguments(__doc__, "deit_base_patch16_224", given, data=False)
    model = load_model(
        a.model if ":" in a.model or Path(a.model).exists() else f"timm:{a.model}", pretrained=a.pretrained
    )
    spectra = weight_spectra(model, find_sites(model))
    out = Path(a.out)
    out.mkdir(parents=True, exist_ok=True)
    figure_spectra(spectra).savefig(out / "figure1.svg")
    figure_parameters_for_energy(spectra).savefig(out / "figure2.svg")
    needed: dict[str, float] = {}
    for s in spectra:
        needed[s.matrix] = needed.get(s.matrix, 0.0) + s.parameters_per_rank * rank_for_energy(s.singular_values, 0.9)
    for matrices, product in ((("W_Q", "W_K"), "QK"), (("W_V", "W_O"), "VO")):
        apart = sum(needed.get(m, 0.0) for m in matrices)
        print(
            f"90 % of the singular values: {' + '.join(matrices)} {apart / 1e6:.2f} M parameters, {product} "
            f"{needed.get(product, 0.0) / 1e6:.2f} M"
        )
    (out / "figure2.json").write_text(json.dumps(needed, indent=1) + "\n")
    return needed


if __name__ == "__main__":
    main()
