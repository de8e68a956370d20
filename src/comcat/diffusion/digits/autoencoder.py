"""An ``AutoencoderKL`` with nothing to learn: its weights are set so that it averages squares of pixels, and draws them
again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

LEVEL = 100.0
"""Height of the two constant channels."""
LOG_VARIANCE = -12.0


def averaging_autoencoder(side: int, *, halvings: int, scaling_factor: float) -> Any:
    """Pictures (n, 3, side, side) in −1…1 to latents that are the means of squares of 2^halvings pixels, and back to
    such squares.

    Its parts are an ordinary autoencoder's, and two of them are made harmless:

    - SiLU: every channel v has a partner −v, and SiLU(v) − SiLU(−v) = v.
    - GroupNorm: partners make the mean 0, and two constant channels of ±``LEVEL`` make the deviation LEVEL / 2, to
      within 3 / (2 LEVEL²) of it, whatever the picture.

    Residual blocks add nothing, so pictures of such squares come back to within 0.001.
    """
    from diffusers import AutoencoderKL

    levels = halvings + 1
    shape: Any = {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": (8,) * levels,  # red, green, blue, their partners, two constants
    }
    vae: Any = AutoencoderKL(
        **shape, latent_channels=3, norm_num_groups=1, sample_size=side, scaling_factor=scaling_factor,
        mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    with torch.no_grad():
        for p in vae.parameters():
            p.zero_()
        for half in (vae.encoder, vae.decoder):
            _enter(half.conv_in)
            half.conv_norm_out.weight.fill_(LEVEL / 2)
            _leave(half.conv_out)
        vae.encoder.conv_out.bias[3:] = LOG_VARIANCE
        for block in vae.encoder.down_blocks[:-1]:
            _each_channel(block.downsamplers[0].conv, slice(0, 2), 1 / 4)
        for block in vae.decoder.up_blocks[:-1]:
            _each_channel(block.upsamplers[0].conv, slice(1, 2), 1.0)
    return vae


def _enter(conv: nn.Conv2d) -> None:
    """Three channels x become v = (x + 1) / 2, then −v, then the constants; black is 0, as the padding of
    convolutions.
    """
    assert conv.bias is not None
    for c in range(3):
        conv.weight[c, c, 1, 1], conv.weight[c + 3, c, 1, 1] = 0.5, -0.5
    conv.bias[:6] = torch.tensor([0.5] * 3 + [-0.5] * 3)
    conv.bias[6:] = torch.tensor([LEVEL, -LEVEL])


def _leave(conv: nn.Conv2d) -> None:
    """x = 2 (SiLU(v) − SiLU(−v)) − 1 in the first three channels."""
    assert conv.bias is not None
    for c in range(3):
        conv.weight[c, c, 1, 1], conv.weight[c, c + 3, 1, 1] = 2.0, -2.0
    conv.bias[:3] = -1.0


def _each_channel(conv: nn.Conv2d, taps: slice, value: float) -> None:
    for c in range(conv.weight.shape[0]):
        conv.weight[c, c, taps, taps] = value
