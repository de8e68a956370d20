"""What stands where a 1×1 convolution stood: a linear layer over positions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class OverMaps(nn.Module):
    """A module of tokens, applied to maps (batch, channels, height, width): ``inner`` sees channels last.

    It answers ``weight``, (out, in, 1, 1), and ``bias`` as the convolution would.
    """

    comcat_module = True

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner: Any = inner
        self.in_channels, self.out_channels = inner.in_features, inner.out_features

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.movedim(1, -1)).movedim(-1, 1)

    @property
    def weight(self) -> Tensor:
        """The matrix that the layer multiplies by, as a convolution has it."""
        return self.inner.weight[..., None, None]

    @property
    def bias(self) -> Tensor | None:
        return self.inner.bias
