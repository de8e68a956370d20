"""An ONNX file that agrees with the model."""

import torch
from plain import batches, model

import comcat

done = comcat.export(model, out="model.onnx", to="onnx", data=batches)
opened = comcat.open_exported("model.onnx")
with torch.no_grad():
    assert torch.allclose(torch.as_tensor(opened(batches[0])), model(batches[0]), atol=1e-3)
