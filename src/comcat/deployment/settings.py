"""The settings of an export."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import SettingsError
from ..settings import check_types, expect

FormatName = Literal["onnx", "torch", "openvino"]
Precision = Literal["float32", "float16", "int8", "int8-static"]
Target = Literal["any", "tensorrt"]

OPSETS = (18, 23)
"""The oldest and the newest opset of ONNX that torch's exporter writes. From 23 on attention is one operator."""


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """How to export; the command line is made from these fields."""

    to: FormatName = "onnx"
    """onnx (one file), torch (torch.export's .pt2) or openvino (a folder)."""
    precision: Precision = "float32"
    """What the weights become. int8: of matrix products alone, per channel; what flows in is measured at run time
    (onnx, torch) or beforehand (int8-static, and always with openvino)."""
    target: Target = "any"
    """tensorrt: the heads of q, k and v get one width, a multiple of 8, which is what it fuses."""
    opset: int = OPSETS[1]
    """ONNX's version of its operators, 18 to 23."""
    batch: int | Literal["dynamic"] = "dynamic"
    """Pictures a call: a number, or any number."""
    any_size: bool = False
    """Let height and width vary as well, where the model's forward allows it."""
    pixels: bool = False
    """The graph takes pixels, uint8 (batch, height, width, channels), and normalises them itself."""
    lose_at_most: float = 0.1
    """Of float16 and int8: the largest share of agreement (of IoU, of cosine) with the model that may be lost."""
    overwrite: bool = False
    """Replace what is at the output."""

    def __post_init__(self) -> None:
        check_types(self)
        expect(self, "lose_at_most", least=0, most=1)
        if not OPSETS[0] <= self.opset <= OPSETS[1]:
            raise SettingsError(
                f"got opset={self.opset}, expected {OPSETS[0]} to {OPSETS[1]}; attention is one operator from 23 on"
            )
        if self.batch != "dynamic" and self.batch < 1:
            raise SettingsError(f"got batch={self.batch}, expected a number of at least 1, or 'dynamic'")
        if self.opset != OPSETS[1] and self.to != "onnx":
            raise SettingsError(f"got opset={self.opset} with to={self.to!r}; an opset is a matter of to='onnx'")
        if self.target == "tensorrt" and self.to != "onnx":
            raise SettingsError(f"got target='tensorrt' with to={self.to!r}; TensorRT reads ONNX: expected to='onnx'")
        if self.precision == "int8-static" and self.to == "torch":
            raise SettingsError(
                "got precision='int8-static' with to='torch', expected 'int8', which measures at run time"
            )

    @property
    def quantises(self) -> bool:
        return self.precision.startswith("int8")

    @property
    def calibrates(self) -> bool:
        """Whether ranges are measured on pictures beforehand."""
        return self.precision == "int8-static" or (self.precision == "int8" and self.to == "openvino")
