"""What a user's type checker must understand; the last line is wrong on purpose."""

import torch
from torch import nn

import comcat

model = nn.Sequential(nn.Linear(8, 8))
sites = comcat.find_sites(model)
plan: comcat.Plan = comcat.Plan.load("plan.json")
plan.save("plan.json")
small: nn.Module = comcat.compress(model, calibration=[torch.randn(1, 3, 32, 32)], reduce=0.5)
count: int = comcat.count_parameters(small)
wrong: str = comcat.count_parameters(small)
