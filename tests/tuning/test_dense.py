"""Segmenters and depth models: tuned on their teacher's maps, and compared pixel by pixel."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import comcat
from comcat.data import Preprocess
from comcat.errors import SettingsError
from comcat.tuning.losses import map_distillation

from ..models import pictures, shake, tiny_vit

SEEN = Preprocess(size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)


class Dense(nn.Module):
    """Maps at every pixel on a vision transformer: scores of classes, logits of a mask, or depths."""

    def __init__(self, channels=1, *, classes=0, positive=False):
        super().__init__()
        self.num_classes, self.positive = classes, positive
        self.backbone, self.head = tiny_vit(num_classes=0), nn.Conv2d(48, channels, 1)
        shake(self.head)

    def forward(self, x):
        y = self.head(self.backbone.forward_features(x)[:, 1:].mT.unflatten(2, (4, -1)))
        y = F.interpolate(y, size=x.shape[-2:], mode="bilinear")
        return {"predicted_depth": y.sigmoid()[:, 0] + 1} if self.positive else y


KINDS = {
    "classes": {"channels": 3, "classes": 3},
    "mask": {"channels": 1},
    "depth": {"channels": 1, "positive": True},
}


def damaged(model):
    """A copy whose head lost most of its weights."""
    worse = copy.deepcopy(model)
    with torch.no_grad():
        worse.head.weight.mul_(0.3)
    return worse


@pytest.mark.parametrize("kind", KINDS)
def test_a_dense_model_learns_its_teachers_maps_without_labels(kind):
    model = Dense(**KINDS[kind]).eval()
    small = damaged(model)
    data = comcat.open_pictures("digits:train").take(64, 0)
    seen = comcat.batches(data, SEEN, batch_size=32)
    before = comcat.evaluate(small, seen, against=model)
    tuned = comcat.tune(
        small, data, teacher=model, preprocess=SEEN, steps=12, batch_size=16, lr=2e-2, warmup=0.0, only=("head",)
    )
    after = comcat.evaluate(tuned, seen, against=model)
    losses = [line["distillation_loss"] for line in tuned.comcat_record.results.tuning["curve"]]
    assert losses and all(math.isfinite(loss) for loss in losses)
    if kind == "depth":
        assert after.cosine > before.cosine and after.divergence is None
    else:
        assert after.divergence < 0.7 * before.divergence


@pytest.mark.parametrize("kind", ["classes", "mask"])
def test_evaluation_of_maps_is_pixel_by_pixel(kind):
    model, other = Dense(**KINDS[kind]).eval(), Dense(**KINDS[kind]).eval()
    with torch.no_grad():
        other.head.weight.mul_(0.6)
        shown = pictures(6, 4)
        found = comcat.evaluate(other, shown, against=model)
        was, now = (torch.cat([m(x) for x in shown]).double() for m in (model, other))
    if kind == "mask":
        was, now = (torch.cat((torch.zeros_like(t), t), 1) for t in (was, now))
    p = was.softmax(1)
    kl = (p * (p.log() - now.softmax(1).log())).sum((1, 2, 3)).mean()
    assert found.count == 6 and found.top1 is None
    assert found.divergence == pytest.approx(float(kl), rel=1e-4)
    assert found.agreement == pytest.approx(100 * float((was.argmax(1) == now.argmax(1)).double().mean()))


def test_map_losses_against_textbook_formulas():
    generator = torch.Generator().manual_seed(0)
    ours, theirs = (torch.randn(2, 4, 3, 5, generator=generator) for _ in range(2))
    t = 2.0
    kl = F.kl_div((ours / t).log_softmax(1), (theirs / t).softmax(1), reduction="none").sum(1).mean((1, 2)) * t**2
    found = map_distillation(ours, theirs, "map of scores", hard=False, temperature=t)
    torch.testing.assert_close(found, kl)
    a, b = ours[:, :1], theirs[:, :1]
    p = b.sigmoid()
    bce = F.binary_cross_entropy_with_logits(a, p, reduction="none") - F.binary_cross_entropy(p, p, reduction="none")
    found = map_distillation(a, b, "map of one score", hard=False, temperature=1.0)
    torch.testing.assert_close(found, bce.mean((1, 2, 3)))
    hard = map_distillation(ours, theirs, "map of scores", hard=True, temperature=1.0)
    torch.testing.assert_close(hard, F.cross_entropy(ours, theirs.argmax(1), reduction="none").mean((1, 2)))
    hard = map_distillation(a, b, "map of one score", hard=True, temperature=1.0)
    torch.testing.assert_close(hard, F.softplus(torch.where(b > 0, -a, a)).mean((1, 2, 3)))
    far = map_distillation(a, b, "values", hard=False, temperature=1.0)
    torch.testing.assert_close(far, (a - b).flatten(1).norm(dim=1) ** 2 / b.flatten(1).norm(dim=1) ** 2)


def test_teachers_of_other_maps_are_refused_before_the_work():
    model, data = Dense(3, classes=3).eval(), comcat.open_pictures("digits:train").take(16, 0)
    for teacher, said in ((Dense(2, classes=2), "2 × 32 × 32"), (tiny_vit(num_classes=3), "3 numbers")):
        with pytest.raises(SettingsError, match=said):
            comcat.tune(copy.deepcopy(model), data, teacher=teacher.eval(), preprocess=SEEN, steps=1, batch_size=4)
    with pytest.raises(SettingsError, match="give a teacher"):
        comcat.tune(copy.deepcopy(model), data, preprocess=SEEN, steps=1, batch_size=4)
