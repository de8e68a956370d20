"""Models to measure: small ones of each library, and stand-ins that say what they are told."""

import torch
from torch import Tensor, nn

VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 32,
    "patch_size": 16,
}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}


def timm_vit(**changes) -> nn.Module:
    import timm

    settings = {
        "img_size": 32,
        "patch_size": 16,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 7,
    } | changes
    return timm.create_model("vit_tiny_patch16_224", **settings)


def timm_distilled() -> nn.Module:
    import timm

    return timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=32, embed_dim=24, depth=1, num_heads=2, num_classes=7
    )


def hub(kind: str) -> nn.Module:
    import transformers as t

    swin = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 4}
    build = {
        "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**VISION, num_labels=7)),
        "vit without head": lambda: t.ViTForImageClassification(t.ViTConfig(**VISION, num_labels=0)),
        "vit backbone": lambda: t.ViTModel(t.ViTConfig(**VISION)),
        "vit tokens": lambda: t.ViTModel(t.ViTConfig(**VISION), add_pooling_layer=False),
        "deit teacher": lambda: t.DeiTForImageClassificationWithTeacher(t.DeiTConfig(**VISION, num_labels=7)),
        "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**VISION)),
        "dinov2 head": lambda: t.Dinov2ForImageClassification(t.Dinov2Config(**VISION, num_labels=7)),
        "beit": lambda: t.BeitModel(t.BeitConfig(**VISION)),
        "swin": lambda: t.SwinForImageClassification(t.SwinConfig(**swin, num_labels=7)),
        "clip vision": lambda: t.CLIPVisionModel(t.CLIPVisionConfig(**VISION)),
        "clip projection": lambda: t.CLIPVisionModelWithProjection(t.CLIPVisionConfig(**VISION, projection_dim=12)),
        "clip": lambda: t.CLIPModel(t.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=12)),
        "siglip vision": lambda: t.SiglipVisionModel(t.SiglipVisionConfig(**VISION)),
        "masked": lambda: t.ViTForMaskedImageModeling(t.ViTConfig(**VISION)),
    }
    return build[kind]()


class Says(nn.Module):
    """A classifier whose logits are the picture's own numbers, times a weight of one."""

    def __init__(self, classes: int, factor: float = 1.0) -> None:
        super().__init__()
        self.num_classes = classes
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1) * self.factor


class Calls(nn.Module):
    """Hands its input to a function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs, **named):
        return self.function(*inputs, **named)


def pictures(*rows: list[float]) -> Tensor:
    return torch.tensor(rows)[:, :, None, None]


class Cached(nn.Module):
    """Keeps a table for evaluation and drops it when training begins, as timm's LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.table = None

    def train(self, mode: bool = True) -> nn.Module:
        if mode:
            self.table = None
        return super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return x * self.weight
        if self.table is None:
            self.table = self.weight * 1
        return x * self.table
