"""Models that say one number a picture: the logit of a binary classifier, or what a regression says."""

import pytest
import torch
from torch import nn

import comcat
from comcat.errors import DataError, ModelError, SettingsError

from ..models import pictures, tiny_vit


class Flat(nn.Module):
    """A regression: (batch,), every number far above zero."""

    def __init__(self):
        super().__init__()
        self.backbone = telling()

    def forward(self, x):
        return 40 + self.backbone(x)[:, 0]


def telling():
    model = tiny_vit(num_classes=1, depth=2)
    for p in model.parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.15)
    return model.eval()


@pytest.mark.parametrize("make", [telling, Flat])
def test_what_is_lost_is_measured_in_the_number_itself(make):
    model = make()
    small = comcat.compress(model, pictures(64), reduce=0.3)
    x = torch.cat(pictures(64))
    with torch.no_grad():
        expected = float((model(x) - small(x)).double().square().mean() / 2)
    found = comcat.evaluate(small, pictures(64), against=model)
    assert found.divergence == pytest.approx(expected, rel=1e-4) and found.divergence > 0
    assert found.agreement is None and found.cosine is None
    assert found.divergence / 5 < small.comcat_record.plan.made_by["predicted_loss"] < 5 * found.divergence
    merged = comcat.merge(model, pictures(16), keep=0.6)
    assert min(merged.made_by["divergences"].values()) > 0


def test_what_needs_classes_is_refused():
    model = telling()
    with pytest.raises(DataError, match="one number a picture; say reduce"):
        comcat.compress(model, pictures(16), max_drop=1.0, held_out=pictures(16))
    with pytest.raises(SettingsError, match="no classes"):
        comcat.tune(model, comcat.open_pictures("digits:train").take(16, 0), teacher=model, steps=1, batch_size=8)


def test_one_number_for_all_pictures_together_is_no_output():
    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = tiny_vit()

        def forward(self, x):
            return self.backbone(x).square().mean()

    with pytest.raises(ModelError, match="one number for all pictures together"):
        comcat.compress(Loss().eval(), pictures(8), reduce=0.3)
