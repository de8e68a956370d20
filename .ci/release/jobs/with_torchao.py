"""A program in int8."""

import torch
from plain import batches, model

import comcat

done = comcat.export(model, out="model.pt2", to="torch", precision="int8", data=batches)
opened = comcat.open_exported("model.pt2")
with torch.no_grad():
    assert torch.allclose(torch.as_tensor(opened(batches[0])), model(batches[0]), atol=0.2)
