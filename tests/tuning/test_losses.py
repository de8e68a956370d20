"""The losses against their formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

from comcat.tuning.losses import (
    Heads,
    Objective,
    feature_loss,
    hard_distillation,
    heads_of,
    label_loss,
    soft_distillation,
    train_both_heads,
)
from comcat.tuning.settings import TuneSettings
from tests.models import shake

from .material import model


@pytest.fixture
def logits():
    return torch.randn(6, 4), torch.randn(6, 4)


def test_label_loss_is_timms(logits):
    from timm.data.mixup import mixup_target
    from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy

    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    ours = label_loss(logits[0], labels, 0.1)
    assert ours.shape == (6,)
    torch.testing.assert_close(ours.mean(), LabelSmoothingCrossEntropy(0.1)(logits[0], labels))
    mixed = mixup_target(labels, 4, 0.3, 0.1)
    torch.testing.assert_close(label_loss(logits[0], mixed, 0.1).mean(), SoftTargetCrossEntropy()(logits[0], mixed))


def test_hard_distillation_is_the_teachers_class(logits):
    student, teacher = logits
    expected = [-math.log(s.softmax(0)[t.argmax()]) for s, t in zip(student, teacher, strict=True)]
    torch.testing.assert_close(hard_distillation(student, teacher), torch.tensor(expected))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_distillation_is_the_divergence(logits, temperature):
    student, teacher = logits
    p, q = (teacher / temperature).softmax(1), (student / temperature).softmax(1)
    expected = temperature**2 * (p * (p / q).log()).sum(1)
    torch.testing.assert_close(soft_distillation(student, teacher, temperature), expected)
    torch.testing.assert_close(soft_distillation(teacher, teacher + 5, temperature), torch.zeros(6), atol=1e-6, rtol=0)


def test_feature_loss_is_the_relative_error():
    aims = [torch.randn(3, 5, 8), torch.randn(3, 2, 2, 4)]
    torch.testing.assert_close(feature_loss([1.1 * a for a in aims], aims), torch.full((3,), 0.01))
    apart = [aims[0], 0 * aims[1]]
    torch.testing.assert_close(feature_loss(apart, aims), torch.full((3,), 0.5))


def objective(distillation: str, labelled: bool = True, **settings) -> Objective:
    return Objective(TuneSettings(**settings), labelled, distillation)


def test_one_head_learns_both(logits):
    heads, teacher, labels = Heads(logits[0]), logits[1], torch.tensor([0, 1, 2, 3, 0, 1])
    aim = objective("hard", alpha=0.25)
    parts = aim.parts(heads, labels, teacher)
    expected = 0.75 * F.cross_entropy(logits[0], labels) + 0.25 * F.cross_entropy(logits[0], teacher.argmax(1))
    torch.testing.assert_close(aim.total(parts, 0.0).mean(), expected)


def test_two_heads_learn_one_each_as_in_deit(logits):
    """Touvron et al. 2021, Eq. 3: ½ CE(class head, label) + ½ CE(distillation head, teacher's class)."""
    heads, teacher, labels = Heads(logits[0], torch.randn(6, 4)), logits[1], torch.tensor([0, 1, 2, 3, 0, 1])
    aim = objective("hard")
    expected = (F.cross_entropy(heads.label, labels) + F.cross_entropy(heads.distilled, teacher.argmax(1))) / 2
    torch.testing.assert_close(aim.total(aim.parts(heads, labels, teacher), 0.0).mean(), expected)


@pytest.mark.parametrize("distillation", ["none", "hard"])
def test_two_heads_share_what_there_is_one_of(logits, distillation):
    """Labels alone, or a teacher alone: a head that learnt nothing would spoil the average that evaluation takes."""
    heads, labels = Heads(logits[0], torch.randn(6, 4)), torch.tensor([0, 1, 2, 3, 0, 1])
    target, teacher = (labels, None) if distillation == "none" else (None, F.one_hot(labels, 4).float())
    aim = objective(distillation, labelled=target is not None)
    expected = (F.cross_entropy(heads.label, labels) + F.cross_entropy(heads.distilled, labels)) / 2
    torch.testing.assert_close(aim.total(aim.parts(heads, target, teacher), 0.0).mean(), expected)


def test_a_teacher_of_features_alone_leaves_labels_to_both_heads(logits):
    heads, labels = Heads(logits[0], torch.randn(6, 4)), torch.tensor([0, 1, 2, 3, 0, 1])
    aim = objective("none")
    with_teacher, without = (aim.parts(heads, labels, t) for t in (logits[1], None))
    torch.testing.assert_close(with_teacher, without)
    parts = {**with_teacher, "feature_loss": torch.ones(6)}
    torch.testing.assert_close(aim.total(parts, 0.5), with_teacher["label_loss"] + 0.5)


def test_without_labels_distillation_is_all(logits):
    aim = objective("soft", labelled=False, alpha=0.1)
    parts = aim.parts(Heads(logits[0]), None, logits[1])
    torch.testing.assert_close(aim.total(parts, 0.0), soft_distillation(*logits, 1.0))


def distilled_timm():
    import timm

    net = timm.create_model(
        "deit_tiny_distilled_patch16_224", img_size=8, patch_size=4, embed_dim=16, depth=1, num_heads=2, num_classes=4
    )
    shake(net)
    return net


def distilled_transformers():
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

    config = DeiTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    config.num_labels = 4
    net = DeiTForImageClassificationWithTeacher(config)
    shake(net)
    return net


@pytest.mark.parametrize("make", [distilled_timm, distilled_transformers])
def test_both_heads_are_read_in_training(make):
    net, images = make(), torch.randn(3, 3, 8, 8)
    train_both_heads(net)
    found = heads_of(net.train(), images)
    assert found.distilled is not None and found.label.shape == found.distilled.shape == (3, 4)
    assert not torch.allclose(found.label, found.distilled)
    with torch.no_grad():
        output = net.eval()(images)
    torch.testing.assert_close(found.mean, getattr(output, "logits", output))


def test_one_head_is_read_as_it_is():
    net, images = model().train(), torch.randn(3, 3, 8, 8)
    train_both_heads(net)
    found = heads_of(net, images)
    assert found.distilled is None
    torch.testing.assert_close(found.mean, net(images))
