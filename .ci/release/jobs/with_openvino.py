"""An OpenVINO folder that agrees with the model."""

import torch
from plain import batches, model

import comcat

done = comcat.export(model, out="model-openvino", to="openvino", data=batches)
opened = comcat.open_exported("model-openvino")
with torch.no_grad():
    assert torch.allclose(torch.as_tensor(opened(batches[0])), model(batches[0]), atol=1e-3)
