"""Compressed models on disk and on the hub.

comcat.save(small, "small/")  # weights, plan, settings, model card: whole or not at all
small = comcat.load("small/")  # or "user/repo" of the hub
comcat.save(small, "stock/", stock=True)  # where the plan allows it: a checkpoint for plain transformers
comcat.push_to_hub("small/", "user/repo")
model = comcat.import_paper("checkpoint.pth", "ranks.txt", "timm:deit_small_patch16_224")
"""

from .hub import push_to_hub
from .loading import load, load_model
from .paper import import_paper
from .saving import save

__all__ = ["import_paper", "load", "load_model", "push_to_hub", "save"]
