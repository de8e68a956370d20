"""COMCAT, Table 6: what customization does to prompts that have nothing to do with the concept: FID and KID of their
pictures after it against those before it.

    python benchmarks/paper/table6.py --model FOLDER --concepts FOLDER --unrelated prompts.txt

Both are drawn from the same noise, so that the untouched pipeline is at 0 but for KID's estimate; the row "other noise"
is how far it is from itself. ``taught.py`` says what the folders hold and how each method is run; runs that Table 5
made are not repeated.
"""

from __future__ import annotations

import taught
from taught import shown


def main(given: list[str] | None = None) -> dict:
    a = taught.arguments(__doc__, given)
    work = taught.Taught(a)
    every, floor = work.every(), work.floor()
    means = {method: taught.means(results) for method, results in every.items()}
    rows = [[m, shown(v["unrelated_fid"]), shown(v["unrelated_kid"], 1, 3)] for m, v in means.items()]
    rows.insert(1, [taught.OTHER_NOISE, f"{floor['unrelated_fid']:.2f}", f"{floor['unrelated_kid']:.3f}"])
    taught.common.table(["method", "FID to before", "KID to before"], rows)
    return taught.finish(a, "table6", {"prompts": work.unrelated, "floor": floor, "means": means, "concepts": every})


if __name__ == "__main__":
    main()
