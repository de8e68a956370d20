"""COMCAT, Table 5: customization on real weights: time, memory, bytes stored, FID and KID of the concepts' pictures.

    python benchmarks/paper/table5.py --model FOLDER --concepts FOLDER

``taught.py`` says what the folders hold and how each method is run. The published figures are of Stable Diffusion 1.4,
500 steps and one A6000; FID there is the mean over the paper's concepts, with its own pictures and settings.
"""

from __future__ import annotations

import taught
from taught import shown

PUBLISHED = {
    "COMCAT": {"seconds": 193, "memory MB": 11765, "stored MB": 6, "FID": 101.2},
    "Custom Diffusion": {"seconds": 237, "memory MB": 11807, "stored MB": 75, "FID": 128.1},
    "DreamBooth": {"seconds": 502, "memory MB": 30979, "stored MB": 11565, "FID": 118.0},
}


def main(given: list[str] | None = None) -> dict:
    a = taught.arguments(__doc__, given)
    every = taught.Taught(a).every()
    rows = [[f"{n} (published)", *map(str, v.values()), "–"] for n, v in PUBLISHED.items()]
    means = {method: taught.means(results) for method, results in every.items()}
    for method, m in means.items():
        rows.append([
            method, shown(m.get("seconds"), 1, 1), shown(m.get("peak_bytes"), 1e-6, 0),
            shown(m.get("stored_bytes"), 1e-6), shown(m["fid"]), shown(m["kid"]),
        ])  # fmt: skip
    taught.common.table(["method", "seconds", "memory MB", "stored MB", "FID", "KID"], rows)
    return taught.finish(a, "table5", {"published": PUBLISHED, "means": means, "concepts": every})


if __name__ == "__main__":
    main()
