"""A folder of transformers', and a stock checkpoint that plain transformers loads."""

import torch
from plain import batches
from transformers import ViTConfig, ViTForImageClassification

import comcat

config = ViTConfig(
    hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=32, patch_size=8,
    num_labels=10,
)  # fmt: skip
ViTForImageClassification(config).eval().save_pretrained("theirs")
model = comcat.load_model("theirs")
small = comcat.compress(model, calibration=batches, reduce=0.2, ranks="equal", only=("qk", "vo"), multiple=1)
comcat.save(small, "small")
assert comcat.count_parameters(comcat.load("small")) < comcat.count_parameters(model)
comcat.save(small, "stock", stock=True)
stock = ViTForImageClassification.from_pretrained("stock").eval()
with torch.no_grad():
    assert torch.allclose(stock(batches[0]).logits, small(batches[0]).logits, atol=1e-4)
