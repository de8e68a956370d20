"""A small search, run by the tests in several processes: ``python -m tests.search_run OUT``."""

import json
import sys
from pathlib import Path

import torch

from comcat.data import Preprocess, open_pictures
from comcat.methods.search import search

from .models import tiny_vit

if __name__ == "__main__":
    torch.set_num_threads(1)
    plan = search(
        tiny_vit(num_classes=10), open_pictures("digits:train").take(70, 0), preprocess=Preprocess(size=(32, 32), mean=(0.3,), std=(0.4,)),
        reduce=0.5, rounds=2, rank_steps=6, weight_steps=8, batch_size=8, pictures=16, statistic="activation", weight_lr=1e-3,
    )  # fmt: skip
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(plan.to_dict()))
