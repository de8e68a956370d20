"""An adapter on a denoiser: attached, saved, loaded and taken off again."""

import torch
from diffusers import UNet2DConditionModel

import comcat

unet = UNet2DConditionModel(
    sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=16, attention_head_dim=4,
    norm_num_groups=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
).eval()  # fmt: skip
x, t, text = torch.randn(1, 4, 8, 8), torch.tensor(3), torch.randn(1, 5, 16)
with torch.no_grad():
    before = unet(x, t, text).sample
    adapter = comcat.diffusion.attach(unet, rank=2, init="random")
    changed = unet(x, t, text).sample
    comcat.diffusion.save(unet, "adapter.safetensors")
    comcat.diffusion.unload(unet)
    assert torch.equal(unet(x, t, text).sample, before) and not torch.equal(changed, before)
    comcat.diffusion.load(unet, "adapter.safetensors")
    assert torch.allclose(unet(x, t, text).sample, changed, atol=1e-2)  # stored in 16 bit
