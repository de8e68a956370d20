"""Writes docs/results.md from the committed results: no figure there is typed by hand.

python benchmarks/summarise.py
"""

from __future__ import annotations

import json
from pathlib import Path

from card.page import card_accuracy, card_speed
from common import RESULTS
from growth import page as growth
from real.page import heads, nuclei, real, times, token_overhead
from sections.choosing import accuracy, calibrate, factorise, prediction
from sections.deploying import commands, equal_time, export_int8, export_parity
from sections.paper import paper
from sections.personal import (
    adapter_bytes,
    adapter_cost,
    adapter_options,
    card_adapter,
    customization,
    lora_export,
    two_concepts,
)
from sections.timing import export_speed, latency, search_step, speed, start, time_by_operation
from sections.training import cait, cdcp, distributed, search_runs, throughput, trained, tuning

PAGE = Path(__file__).resolve().parents[1] / "docs" / "results.md"
INTRO = """# Results

**No ImageNet figure exists here**: nobody has run these methods on ImageNet with this library yet. With the data and a
card, `python benchmarks/paper/table2.py` makes the paper's main table, and the other scripts in `benchmarks/paper/` its
other tables and figures. What stands first here was measured on real pretrained weights, a DINOv2-small; the small
vision transformer trained on CIFAR-10 comes second.

Every figure was printed by a script in `benchmarks/` on the machine named, and this page is written from their
results by `python benchmarks/summarise.py`. Ratios compare things measured in one run, interleaved. ± is one thing
everywhere: the standard deviation over seeds. The error from having judged these pictures and no others is from a
bootstrap, and stands beside it where it was measured.
Quartiles stand beside times wherever the rounds were kept.

![Accuracy of a DINOv2-small against what is left of its parameters](real-weights.svg)
"""


def main() -> None:
    PAGE.write_text(page())
    print(f"wrote {PAGE}")


def page() -> str:
    """The whole page, from the results that are committed."""
    found = [json.loads(p.read_text()) for p in sorted(RESULTS.glob("*/*.json"))]
    sections = [INTRO]
    for title, prefix, render in SECTIONS:
        texts = [render(r) for r in found if r["benchmark"].startswith(prefix)]
        if texts:
            before = [PICTURES[prefix]] if prefix in PICTURES else []
            sections.append(f"## {title}\n\n" + "\n\n".join([*before, *texts]) + "\n")
    return "\n".join(sections)


PICTURES = {"accuracy": "![COMCAT's Tables 1 and 4 on the small CIFAR transformer, not on ImageNet](paper-tables.svg)"}
"""What stands before a section's tables."""
SECTIONS = [
    ("Real weights: DINOv2-small", "real-", real),
    ("Real weights: time of a forward", "forward-", times),
    ("Real weights: every budget at equal measured time", "equal-time", equal_time),
    ("Whether whole heads should go", "whole-heads", heads),
    ("On one card: speed", "gpu speed", card_speed),
    ("On one card: fewer tokens", "gpu tokens", card_speed),
    ("On one card: a budget of time", "gpu latency", latency),
    ("On one card: accuracy", "gpu accuracy", card_accuracy),
    ("On one card: what a diffusion adapter costs", "gpu adapter", card_adapter),
    ("Accuracy without fine-tuning", "accuracy", accuracy),
    ("Tuning, and ranks by search", "tuning", tuning),
    ("Long searches", "search-runs", search_runs),
    ("The paper's search, in small", "paper-", paper),
    ("Prediction against outcome, product against unilateral", "prediction", prediction),
    ("Speed against MACs", "speed", speed),
    ("A budget of time: predicted and measured", "latency", latency),
    ("Exported files inside their runtimes", "export-speed", export_speed),
    ("Exported files against their models", "export-parity", export_parity),
    ("Exported in int8", "export-int8", export_int8),
    ("Tokens and channels after a short tuning", "cait", cait),
    ("Trained channels beside the closed form", "cdcp", cdcp),
    ("A segmenter of nuclei, tuned on its teacher's maps", "nuclei", nuclei),
    ("What merging tokens costs", "token-overhead", token_overhead),
    ("Where the time of a forward goes", "time-by-operation", time_by_operation),
    ("Factorisation", "factorize", factorise),
    ("Calibration", "calibrate", calibrate),
    ("Cost as the model grows", "growth", growth),
    ("A step of rank search", "search-step", search_step),
    ("What a diffusion adapter costs", "adapter-cost", adapter_cost),
    ("Where an adapter's bytes lie", "adapter-bytes", adapter_bytes),
    ("An adapter as a plain LoRA", "lora-export", lora_export),
    ("Options of learning a concept", "adapter-options", adapter_options),
    ("Two concepts at once", "two-concepts", two_concepts),
    ("Several processes, and runs that are killed", "distributed", distributed),
    ("Throughput of tuning", "throughput", throughput),
    ("A DeiT-tiny for CIFAR-10", "train-", trained),
    ("A new concept, beside other methods", "customization", customization),
    ("Whole commands", "commands", commands),
    ("Start-up", "import", start),
]

if __name__ == "__main__":
    main()
