"""Accuracy and agreement."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from comcat.errors import DataError, ModelError, NumericsError, SettingsError
from comcat.measure import Evaluation, evaluate

from .models import Says, hub, pictures, timm_vit

LOGITS = pictures(
    [9.0, 0, 0, 0, 0, 0, 0],
    [0.0, 1, 2, 3, 4, 5, 6],
    [6.0, 5, 4, 3, 2, 1, 0],
    [0.0, 0, 5, 0, 0, 0, 1],
    [1.0, 2, 3, 4, 5, 6, 7],
)
LABELS = torch.tensor([0, 2, 6, 2, 0])  # ranks 1, 5, 7, 1, 7


def test_evaluation_by_hand():
    found = evaluate(Says(7), [(LOGITS[:3], LABELS[:3]), (LOGITS[3:], LABELS[3:])])
    flat = LOGITS.flatten(1)
    loss = -sum(float(row[label] - row.exp().sum().log()) for row, label in zip(flat, LABELS, strict=True)) / 5
    assert found == Evaluation(count=5, top1=40.0, top5=60.0, loss=pytest.approx(loss, rel=1e-5))
    assert json.loads(json.dumps(found.to_dict()))["agreement"] is None


def test_evaluation_against_a_reference_by_hand():
    reference = Says(7, factor=-1.0)
    found = evaluate(Says(7), [LOGITS], against=reference)
    p, q = (-LOGITS).flatten(1).softmax(1), LOGITS.flatten(1).softmax(1)
    assert found.count == 5 and found.top1 is found.top5 is found.loss is None
    assert found.cosine == pytest.approx(-1, abs=1e-6) and found.agreement == 0
    assert found.divergence == pytest.approx(float((p * (p / q).log()).sum(1).mean()), rel=1e-5)
    same = evaluate(Says(7), [LOGITS], against=Says(7))
    assert (same.agreement, same.divergence) == (100, 0) and same.cosine == pytest.approx(1)
    rounding = evaluate(Says(7, 1 + 1e-6), [LOGITS * 30], against=Says(7))
    assert 0 <= rounding.divergence < 1e-4
    itself = Says(7)
    assert evaluate(itself, [LOGITS], against=itself).agreement == 100


def test_the_old_word_for_the_other_model_still_counts():
    with pytest.warns(DeprecationWarning, match="say against="):
        assert evaluate(Says(7), [LOGITS], reference=Says(7)).agreement == 100


@pytest.mark.parametrize("size", [1, 2, 5])
def test_every_kind_of_batch_says_the_same(size):
    from torch.utils.data import DataLoader, TensorDataset

    data = TensorDataset(LOGITS, LABELS)
    expected = evaluate(Says(7), [(LOGITS, LABELS)])
    rows = [{"pixel_values": image, "labels": int(label)} for image, label in data]
    streams = [
        DataLoader(data, batch_size=size),
        DataLoader(rows, batch_size=size),
        (list(batch) for batch in zip(LOGITS.split(size), LABELS.split(size), strict=True)),
        [(images, labels.tolist()) for images, labels in DataLoader(data, batch_size=size)],
    ]
    for stream in streams:
        found = evaluate(Says(7), stream)
        assert (found.count, found.top1, found.top5) == (5, expected.top1, expected.top5)
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    unlabelled = [LOGITS.split(size), [(LOGITS, None)], DataLoader(TensorDataset(LOGITS), batch_size=size)]
    for stream in [*unlabelled, [{"pixel_values": LOGITS}], [LOGITS[:0], LOGITS]]:
        assert evaluate(Says(7), stream) == Evaluation(count=5)


def test_few_classes_have_no_top5():
    found = evaluate(Says(5), [(LOGITS[:, :5], LABELS.clamp(max=4))])
    assert found.top5 is None and found.top1 is not None


def test_features_are_compared_by_cosine_alone():
    images = torch.randn(3, 3, 32, 32)
    model, other = hub("dinov2"), hub("dinov2")
    found = evaluate(model, [(images, torch.tensor([0, 1, 999]))], against=other)
    with torch.no_grad():
        a, b = (m.eval()(images).pooler_output for m in (model, other))
    cosine = float((a * b).sum(1).div(a.norm(dim=1) * b.norm(dim=1)).mean())
    assert found == Evaluation(count=3, cosine=pytest.approx(cosine, abs=1e-5))


def test_votes_need_classes_on_both_sides():
    features = nn.Flatten()
    for model, reference in ((features, Says(7)), (Says(7), features)):
        assert evaluate(model, [LOGITS], against=reference) == Evaluation(count=5, cosine=pytest.approx(1))


def test_real_classifiers_evaluate(capsys):
    images, labels = torch.randn(5, 3, 32, 32), torch.tensor([0, 1, 2, 3, 6])
    found = evaluate(hub("vit"), [(images, labels)], against=timm_vit(), progress=True)
    assert None not in found.to_dict().values()
    assert "evaluate" in capsys.readouterr().err


def test_pictures_take_the_models_type_and_autocast_another():
    seen = []

    class Spy(nn.Linear):
        def forward(self, images: Tensor) -> Tensor:
            out = super().forward(images.flatten(1))
            seen.append((images.dtype, out.dtype))
            return out

    evaluate(Spy(7, 7).bfloat16(), [LOGITS])
    evaluate(Spy(7, 7), [LOGITS.double()])
    evaluate(Spy(7, 7), [LOGITS], dtype=torch.bfloat16, device="cpu")
    evaluate(Spy(7, 7).bfloat16(), [LOGITS], dtype=torch.bfloat16)
    half, full = torch.bfloat16, torch.float32
    assert seen == [(half, half), (full, full), (full, half), (half, half)]
    with pytest.raises(SettingsError, match=r"dtype: got torch.float32, expected .* the model's own torch.bfloat16"):
        evaluate(Spy(7, 7).bfloat16(), [LOGITS], dtype=torch.float32)


def test_labels_must_fit():
    with pytest.raises(DataError, match="batch 1: got label 7, expected 0 to 6 of 7 classes"):
        evaluate(Says(7), [(LOGITS, LABELS), (LOGITS, LABELS + 1)])
    with pytest.raises(DataError, match="got label -1"):
        evaluate(Says(7), [(LOGITS, LABELS - 1)])
    for labels in (LABELS[:4], LABELS.float(), F.one_hot(LABELS, 7), 3, ["cat"] * 5, LABELS > 1):
        with pytest.raises(DataError, match=r"batch 0: .*whole number"):
            evaluate(Says(7), [(LOGITS, labels)])
    with pytest.raises(DataError, match="batch 1 has no labels and those before have some"):
        evaluate(Says(7), [(LOGITS, LABELS), LOGITS])
    with pytest.raises(DataError, match="batch 1 has labels and those before have none"):
        evaluate(Says(7), [LOGITS, (LOGITS, LABELS)])


def test_pictures_must_be_pictures():
    for nothing in ([], [LOGITS[:0]], iter(())):
        with pytest.raises(DataError, match="no pictures"):
            evaluate(Says(7), nothing)
    for batch in ("cat.png", LOGITS.to(torch.uint8), (LOGITS, LABELS, LABELS), None, torch.tensor(1.0)):
        with pytest.raises(DataError, match=r"batch 0: .*expected pictures"):
            evaluate(Says(7), [batch])
    with pytest.raises(DataError, match=r"got the keys \['imag'\], expected pictures .*mean 'image'"):
        evaluate(Says(7), [{"imag": LOGITS}])


@pytest.mark.parametrize(("pictures", "labels"), [("pixel_values", "labels"), ("image", "label"), ("img", "labels")])
def test_batches_that_are_mappings_may_use_the_names_of_the_hub(pictures, labels):
    """{'image': tensor} batches raised, though every data set of the hub yields them."""
    named = evaluate(Says(7), [{pictures: LOGITS, labels: LABELS, "id": ["a"] * len(LOGITS)}])
    assert named == evaluate(Says(7), [(LOGITS, LABELS)]) and named.top1 is not None
    assert evaluate(Says(7), [{pictures: LOGITS}]).top1 is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_must_be_sound(bad):
    images = LOGITS.clone()
    images[3, 2] = bad
    with pytest.raises(NumericsError, match="batch 1: the model's output for picture 3 has NaN or infinity"):
        evaluate(Says(7), [LOGITS, images])
    with pytest.raises(NumericsError, match="the other model's output for picture 0"):
        evaluate(Says(7), [LOGITS], against=Says(7, bad))


def test_models_must_match_and_be_there():
    with pytest.raises(ModelError, match="gives 7 numbers a picture, the other model 3"):
        evaluate(Says(7), [LOGITS], against=nn.Sequential(nn.Flatten(), nn.Linear(7, 3)))
    with pytest.raises(ModelError, match="the model is on cpu, expected meta; move it there"):
        evaluate(Says(7), [LOGITS], device="meta")
    with pytest.raises(ModelError, match="the other model has no weights"):
        evaluate(Says(7), [LOGITS], against=Says(7).to("meta"))
    with pytest.raises(ModelError, match="Linear cannot run"):
        evaluate(nn.Linear(3, 3), [LOGITS])
