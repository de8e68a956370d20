"""What counts as a model's output, and whether it is classes."""

import pytest
import torch
from torch import nn

from comcat.errors import ModelError
from comcat.measure import is_classifier, model_output

from .models import Calls, hub, timm_distilled, timm_vit


@pytest.mark.parametrize(
    ("kind", "width", "classes"),
    [
        ("vit", 7, True),
        ("vit without head", 16, False),
        ("vit backbone", 16, False),
        ("vit tokens", 16, False),
        ("deit teacher", 7, True),
        ("dinov2", 16, False),
        ("dinov2 head", 7, True),
        ("beit", 16, False),
        ("swin", 7, True),
        ("clip vision", 16, False),
        ("clip projection", 12, False),
        ("clip", 12, False),
        ("siglip vision", 16, False),
    ],
)
def test_transformers_models_give_one_row_a_picture(kind, width, classes):
    model = hub(kind).eval()
    assert model_output(model, torch.randn(3, 3, 32, 32)).shape == (3, width)
    assert is_classifier(model) is classes


def test_transformers_output_is_the_field_that_says_most():
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for kind, field in (("vit", "logits"), ("clip projection", "image_embeds"), ("dinov2", "pooler_output")):
            model = hub(kind).eval()
            assert torch.equal(model_output(model, images), model(pixel_values=images)[field])
        model = hub("vit tokens").eval()
        torch.testing.assert_close(model_output(model, images), model(images).last_hidden_state.mean(1))


def test_output_without_a_known_field_is_refused():
    with pytest.raises(ModelError, match=r"ViTForMaskedImageModeling returns \['reconstruction'\].*expected logits"):
        model_output(hub("masked").eval(), torch.randn(1, 3, 32, 32))


def test_timm_models_and_their_heads():
    images = torch.randn(2, 3, 32, 32)
    assert model_output(timm_vit().eval(), images).shape == (2, 7)
    assert is_classifier(timm_vit()) and not is_classifier(timm_vit(num_classes=0))
    tokens = timm_vit(num_classes=0, global_pool="", class_token=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(model_output(tokens, images), tokens(images).mean(1))


def test_distilled_heads_are_averaged():
    model, images = timm_distilled().eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        model.set_distilled_training(True)
        model.train()
        both = model(images)
        assert isinstance(both, tuple)
        torch.testing.assert_close(model_output(model, images), expected)


def test_plain_modules_and_wrappers():
    assert is_classifier(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)))
    assert not is_classifier(nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3)))
    headed = nn.ModuleDict({"fc": nn.Identity(), "stem": nn.Linear(4, 3)})
    assert not is_classifier(headed)
    headed["fc"] = nn.Linear(4, 3)
    assert is_classifier(headed)
    assert is_classifier(nn.DataParallel(timm_vit())) and not is_classifier(nn.DataParallel(timm_vit(num_classes=0)))
    assert model_output(nn.Flatten(0), torch.ones(3, 1)).shape == (3, 1)
    assert model_output(nn.Identity(), torch.ones(3, 2, 4, 4)).shape == (3, 32)


def test_outputs_that_say_nothing_are_refused():
    images = torch.randn(2, 3)
    with pytest.raises(ModelError, match="Calls returns a str"):
        model_output(Calls(lambda _: "seven"), images)
    with pytest.raises(ModelError, match=r"returns a list of \(2, 3\) float32 on cpu, \(2, 2\)"):
        model_output(Calls(lambda x: [x, x[:, :2]]), images)
    with pytest.raises(ModelError, match=r"returns shape \(1, 3\) for 2 pictures"):
        model_output(Calls(lambda x: x[:1]), images)
    with pytest.raises(ModelError, match=r"Linear cannot run on an input of \(2, 3\) float32 on cpu"):
        model_output(nn.Linear(4, 4), images)
