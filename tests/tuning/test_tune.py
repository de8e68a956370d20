"""Tuning in one process: what it learns, what it refuses, and that it can be killed."""

import copy
import errno
import json
import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from comcat import Plan, SitePlan, apply_
from comcat.data import Preprocess, open_pictures
from comcat.errors import DataError, NumericsError, SettingsError, StoreError
from comcat.hosts import find_sites
from comcat.measure import evaluate
from comcat.models import preprocess_of
from comcat.runs import checkpoints as checkpoints_module
from comcat.tuning.data import TrainingData
from comcat.tuning.learner import Learner
from comcat.tuning.settings import TuneSettings
from comcat.tuning.step import Training
from comcat.tuning.tune import tune, tune_
from tests.models import shake

from .material import CLASSES, folder, model, picture, rows, shards

QUICK = {"batch_size": 8, "lr": 1e-3, "warmup": 0.0, "crop_scale": None}
PLAIN = {**QUICK, "flip": 0.0}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return open_pictures(folder(tmp_path_factory.mktemp("train"), 26))


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory):
    return open_pictures(folder(tmp_path_factory.mktemp("eval"), 13, first=500))


@pytest.fixture(scope="module")
def teacher():
    net = model()
    shake(net, 0.3)
    return net


def same(a: nn.Module, b: nn.Module) -> bool:
    a, b = a.state_dict(), b.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def result(net) -> dict:
    return net.comcat_record.results.tuning


def says(net, pictures):
    """The logits of all pictures, as evaluation prepares them."""
    with torch.no_grad():
        return net.eval()(torch.stack([x for x, _ in inputs(pictures, net)]))


def inputs(pictures, net):
    return [(preprocess_of(net)(sample.image), sample.label) for sample in pictures]


@pytest.fixture
def unlabelled(tmp_path):
    """A folder of pictures without labels."""
    flat = tmp_path / "unlabelled"
    flat.mkdir()
    for number in range(26):
        picture(number % CLASSES, number).save(flat / f"{number}.png")
    return flat


# ---------------------------------------------------------------- what it learns


def test_it_learns_and_says_so(data, tmp_path):
    net = model()
    before = copy.deepcopy(net)
    assert tune_(net, data, TuneSettings(epochs=12, **{**PLAIN, "lr": 1e-2}), evaluation=data, out=tmp_path) is net
    found = result(net)
    assert found["before"]["top1"] < 60 and found["after"]["top1"] > 90
    assert found["steps"] == 12 * 4 and found["images_per_second"] > 0 and found["seconds"] > 0
    assert found["curve"][-1]["loss"] < 0.5 * found["curve"][0]["loss"]
    assert found["curve"][-1]["top1"] == found["after"]["top1"] <= found["best"]["top1"]
    steps = [line["step"] for line in found["curve"]]
    assert steps == sorted(set(steps)) and steps[-1] == 48 and {10, 20, 4, 8} <= set(steps)
    assert all("loss" in line and "lr" in line for line in found["curve"])
    assert found["curve"][-1]["lr"] < 1e-4 < found["curve"][0]["lr"]  # the cosine
    json.dumps(found)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == steps
    assert net.training is before.training and all(p.requires_grad for p in net.parameters())
    again = evaluate(net, [(torch.stack([x]), torch.tensor([y])) for x, y in inputs(data, net)])
    assert again.top1 == found["after"]["top1"]  # what is returned is what was judged


def test_one_plain_step_is_adamws(data):
    """Against torch by hand: cross-entropy, clipping off, AdamW with decay on matrices alone."""
    net = model()
    by_hand = copy.deepcopy(net).train()
    settings = {**PLAIN, "batch_size": 26, "steps": 1, "clip": None, "weight_decay": 0.1, "smoothing": 0.1}
    tune(net, data, **settings)
    batch = next(iter(TrainingData(pictures=data, transform=preprocess_of(by_hand), batch_size=26).epoch(0)))
    F.cross_entropy(by_hand(batch.images), batch.labels, label_smoothing=0.1).backward()
    plain = [n for n, p in by_hand.named_parameters() if p.ndim < 2 or n in ("cls_token", "pos_embed")]
    groups = [
        {"params": [p for n, p in by_hand.named_parameters() if n in plain], "weight_decay": 0.0},
        {"params": [p for n, p in by_hand.named_parameters() if n not in plain], "weight_decay": 0.1},
    ]
    torch.optim.AdamW(groups, lr=1e-3).step()
    for (name, ours), theirs in zip(net.named_parameters(), by_hand.parameters(), strict=True):
        real = (
            theirs.grad.abs() > 1e-6
        )  # the key bias has none but rounding errors, whose sign Adam makes a whole step of
        assert real.float().mean() > 0.6
        torch.testing.assert_close(ours[real], theirs[real], atol=1e-6, rtol=1e-5, msg=name)


def test_accumulation_is_the_bigger_batch(data, teacher):
    nets = [model() for _ in range(3)]
    for net, parts in zip(nets, (1, 2, 4), strict=True):
        tune(net, data, teacher=teacher, features=("all",), steps=6, accumulate=parts, log_every=1, **PLAIN)
    losses = [[line["loss"] for line in result(net)["curve"]] for net in nets]
    for net, found in zip(nets[1:], losses[1:], strict=True):
        assert found == pytest.approx(losses[0], rel=1e-5)
        torch.testing.assert_close(says(net, data), says(nets[0], data), atol=1e-4, rtol=1e-4)
    assert (says(nets[0], data) - says(model(), data)).abs().max() > 0.1


def test_the_average_is_what_is_returned(data, evaluation, tmp_path, monkeypatch):
    """ModelEmaV3's recurrence with its warm-up, by hand, over the weights after each step."""
    seen = []
    update = Learner.update

    def noting(self, step):
        update(self, step)
        seen.append({k: v.clone() for k, v in self.bare.state_dict().items()})

    monkeypatch.setattr(Learner, "update", noting)
    net = model()
    expected = {k: v.clone() for k, v in net.state_dict().items()}
    tune(net, data, evaluation=evaluation, steps=5, ema=0.6, **QUICK)
    for step, weights in enumerate(seen, 1):
        decay = 0.0 if step == 1 else min(0.6, 1 - step ** (-2 / 3))
        expected = {k: decay * v + (1 - decay) * weights[k] for k, v in expected.items()}
    for name, value in net.state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=name)


def test_a_teacher_alone_is_enough(unlabelled, teacher):
    net = model()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(0.9)
    pictures = open_pictures(unlabelled)
    assert not pictures.has_labels
    tune(net, pictures, teacher=teacher, epochs=8, **PLAIN)
    curve = result(net)["curve"]
    assert "label_loss" not in curve[0] and curve[-1]["distillation_loss"] < 0.3 * curve[0]["distillation_loss"]
    assert curve[-1]["loss"] == pytest.approx(curve[-1]["distillation_loss"])


@pytest.mark.parametrize("distillation", ["hard", "soft"])
def test_distillation_goes_to_the_teacher(data, teacher, distillation):
    net = model()
    tune(net, data, teacher=teacher, distillation=distillation, alpha=1.0, temperature=2.0, epochs=12, **PLAIN)
    agreement = evaluate(net, [torch.stack([x]) for x, _ in inputs(data, net)], against=teacher).agreement
    assert agreement > evaluate(model(), [torch.stack([x]) for x, _ in inputs(data, net)], against=teacher).agreement
    assert result(net)["teacher"] == "vit_tiny_patch16_224"


def test_features_go_to_the_teachers_and_their_weight_falls_to_nothing(data, teacher):
    net = model()
    tune(
        net, data, teacher=teacher, distillation="none", features=("every-2",), feature_decay=0.5, alpha=0.0, steps=20,
        log_every=1, **PLAIN,
    )  # fmt: skip
    curve = result(net)["curve"]
    assert curve[9]["feature_loss"] < 0.7 * curve[0]["feature_loss"]
    for line in curve:
        weight = max(0.0, 1 - (line["step"] - 1) / 10)
        assert line["loss"] == pytest.approx(line["label_loss"] + weight * line["feature_loss"], rel=1e-5)


def test_a_backbone_learns_features(data, teacher):
    net, other = model(num_classes=0), copy.deepcopy(teacher)
    other.reset_classifier(0)
    settings = TuneSettings(features=("all",), feature_decay=1.0, epochs=4, **PLAIN)
    tune_(net, data, settings, teacher=other, evaluation=data)  # no leak is looked for here
    found = result(net)
    assert found["after"]["cosine"] > found["before"]["cosine"]
    with pytest.raises(SettingsError, match="no classes to learn: give a teacher and the blocks"):
        tune(net, data, epochs=1, **PLAIN)
    with pytest.raises(SettingsError, match="no logits to distil"):
        tune(net, data, teacher=other, distillation="soft", epochs=1, **PLAIN)


def test_chosen_parts_alone_change(data):
    net = model()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    tune(net, data, only=("attn", "blocks.1", "head.bias"), steps=3, **QUICK)
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    expected = {n for n in before if ".attn." in n or n.startswith("blocks.1.") or n == "head.bias"}
    assert changed == expected
    with pytest.raises(SettingsError, match=r"no weight lies in 'atn'.*did you mean 'attn'"):
        tune(net, data, only=("atn",), **QUICK)


def test_what_is_frozen_stays(data):
    net = model()
    net.patch_embed.requires_grad_(False)
    before = copy.deepcopy(net)
    tune(net, data, steps=2, **QUICK)
    assert same(net.patch_embed, before.patch_embed) and not same(net, before)
    assert not net.patch_embed.proj.weight.requires_grad
    with pytest.raises(SettingsError, match="nothing to tune"):
        tune(net.requires_grad_(False), data, steps=2, **QUICK)


def test_it_trains_in_training_mode(data):
    """Drop-path draws, and each step draws anew: with it off, or with another seed, the result is another."""
    results = []
    for rate, seed in ((0.5, 0), (0.5, 0), (0.5, 1), (0.0, 0)):
        net = model(drop_path_rate=rate)
        tune(net, data, steps=3, seed=seed, **PLAIN)
        results.append(net)
    assert same(results[0], results[1])
    assert not same(results[0], results[2]) and not same(results[0], results[3])


def test_stochastic_depth_is_in_training_alone(data, teacher):
    student = copy.deepcopy(teacher)
    structure = {n: type(m) for n, m in student.named_modules()}
    dropped = []

    def look(module, inputs, output):
        if module.training:
            dropped.append(bool((output == 0).flatten(1).all(1).any()))

    from timm.layers import DropPath

    hook = nn.modules.module.register_module_forward_hook(
        lambda m, i, o: look(m, i, o) if isinstance(m, DropPath) else None
    )
    try:
        tune(student, data, epochs=2, drop_path=0.9, **PLAIN)
    finally:
        hook.remove()
    blocks = len(student.blocks)
    assert len(dropped) == 8 * 2 * blocks  # steps × branches
    assert not any(dropped[i] for i in range(0, len(dropped), 2 * blocks))  # never in the first block
    assert sum(dropped) > 8
    assert {n: type(m) for n, m in student.named_modules()} == structure
    again = tune(copy.deepcopy(teacher), data, epochs=2, drop_path=0.9, **PLAIN)
    assert same(student, again)


def test_both_heads_of_a_distilled_model_learn(data):
    import timm

    arguments = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": CLASSES}
    net = timm.create_model("deit_tiny_distilled_patch16_224", **arguments)
    shake(net)
    before = copy.deepcopy(net)
    tune(net, data, teacher=before, distillation="hard", epochs=2, **QUICK)
    assert not same(net.head, before.head) and not same(net.head_dist, before.head_dist)
    assert net.distilled_training is False


def test_a_compressed_model_of_transformers_learns(data):
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=8, patch_size=4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    config.num_labels = CLASSES
    teacher = ViTForImageClassification(config).eval()
    shake(teacher)
    net = copy.deepcopy(teacher)
    sites = find_sites(net)
    apply_(
        net,
        Plan(sites={n: SitePlan(keep=2, full=s.full_rank) for n, s in sites.items() if s.kind in ("qk", "vo")}),
    )
    prepare = Preprocess(size=(8, 8), mean=(0.5,), std=(0.5,))
    tune(net, data, teacher=teacher, features=("all",), preprocess=prepare, epochs=4, **PLAIN)
    curve = result(net)["curve"]
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert len(net.comcat_record.plan.sites) == 0  # apply_ alone leaves no record; the tuning's is its own


def test_the_record_of_a_compressed_model_is_kept(data):
    from comcat import compress

    net = compress(model(), statistic="weights", reduce=0.2)
    plan = net.comcat_record.plan
    tune(net, data, steps=1, **QUICK)
    assert net.comcat_record.plan == plan and result(net)["steps"] == 1


def test_everything_at_once(data, evaluation, teacher, tmp_path):
    net = model(drop_path_rate=0.1)
    tune(
        net, data, teacher=teacher, evaluation=evaluation, out=tmp_path, epochs=1.5, mixup=0.8, cutmix=1.0,
        smoothing=0.1,
        rand_augment="rand-m9-mstd0.5-inc1", erase=0.25, repeats=3, ema=0.9, accumulate=2, precision="bf16", warmup=0.2,
        features=("blocks.0",), only=("blocks",), workers=1, batch_size=8, epoch_size=24, distillation="hard",
    )  # fmt: skip
    assert result(net)["steps"] == 5 and same(net.patch_embed, model().patch_embed) and not same(net, model())


def test_grey_models_and_streams(tmp_path):
    rows(tmp_path / "train.parquet", 23)
    stream = open_pictures(f"hf:{tmp_path}")
    net = model(in_chans=1)
    settings = {**QUICK, "rand_augment": "rand-m9-mstd0.5-inc1", "crop_scale": (0.6, 1.0)}
    tune(net, stream, epoch_size=23, epochs=2, **settings)
    assert result(net)["steps"] == 6 and not same(net, model(in_chans=1))
    with pytest.raises(DataError, match="--epoch-size N"):
        tune(net, stream, epochs=2, **settings)


# ---------------------------------------------------------------- small and odd input


def test_the_data_is_opened_once_an_epoch(data, tmp_path, monkeypatch):
    """Not once a step: a stream would be read from its beginning each time."""
    opened, epoch = [], TrainingData.epoch

    def counted(self, number, *, start=0):
        opened.append((number, start))
        return epoch(self, number, start=start)

    monkeypatch.setattr(TrainingData, "epoch", counted)
    tune(model(), data, epochs=3, workers=0, **PLAIN)
    assert opened == [(0, 0), (1, 0), (2, 0)]


def test_no_epochs_leave_the_model_as_it_is(data, evaluation):
    for length in ({"epochs": 0}, {"steps": 0}):
        net = model()
        assert tune(net, data, evaluation=evaluation, **length, **QUICK) is net
        assert same(net, model()) and result(net)["curve"] == []


def test_one_class_and_batches_of_one(tmp_path):
    single = open_pictures(folder(tmp_path, 5, classes=1))
    with pytest.raises(
        DataError, match=r"has no labels \(.* has 1 class, the model 4 without names, so nothing says which"
    ):
        tune(model(), single, epochs=3, **QUICK)
    single = single.relabelled([0], None, "by hand")
    net = model()
    tune(net, single, epochs=3, **{**QUICK, "batch_size": 1})
    assert result(net)["steps"] == 15 and result(net)["curve"][-1]["train_top1"] == 100
    with pytest.raises(SettingsError, match="mix pairs, but a process has 1 samples"):
        tune(net, single, mixup=0.8, **{**QUICK, "batch_size": 1})
    with pytest.raises(SettingsError, match="no classes to learn"):  # its loss is 0 from the start
        tune(model(num_classes=1), single, epochs=1, **QUICK)


def test_a_batch_larger_than_the_data_counts_each_picture_once(data):
    """Padding weighs nothing: the update is that of a batch of exactly the pictures."""
    nets = [model(), model()]
    for net, size in zip(nets, (26, 40), strict=True):
        tune(net, data, epochs=2, **{**PLAIN, "batch_size": size})
    torch.testing.assert_close(says(nets[0], data), says(nets[1], data), atol=1e-5, rtol=1e-4)
    assert (says(nets[0], data) - says(model(), data)).abs().max() > 0.01


def test_labels_outside_the_classes_are_refused(tmp_path, data):
    with pytest.raises(DataError, match=r"has no labels \(.* has 6 classes, the model 4: the labels were left out"):
        tune(model(), folder(tmp_path / "named", 12, classes=6), **QUICK)
    net = model(num_classes=3)
    with pytest.raises(DataError, match=r"has no labels \(.* has the label 3, the model 3 classes, 0 to 2"):
        tune(net, shards(tmp_path / "shards", 10), **QUICK)
    (tmp_path / "hub").mkdir()
    rows(tmp_path / "hub" / "train.parquet", 10)  # whole numbers, whose range nobody knows before
    unnamed = open_pictures(f"hf:{tmp_path}/hub")
    with pytest.raises(DataError, match="got the label 3, expected 0 to 2: the model has 3 classes"):
        tune(net, unnamed, epoch_size=10, **QUICK)
    assert same(net, model(num_classes=3))


def test_a_teacher_must_fit(data, teacher):
    net = model()
    for wrong, message in (
        (model(num_classes=5), "the teacher has 5 classes, the student 4; expected the same"),
        (model(num_classes=0), "the teacher has no classes, the student 4"),
        (model(img_size=16), "the teacher takes pictures of 16×16×3, the student of 8×8×3, and both see the same$"),
        (model(img_size=16, dynamic_img_size=True), "it can take the student's as well: load it for them"),
        (model(in_chans=1), "the teacher takes pictures of 8×8×1, the student of 8×8×3"),
    ):
        with pytest.raises(SettingsError, match=message):
            tune(net, data, teacher=wrong, **QUICK)
    named, swapped = copy.deepcopy(net), copy.deepcopy(teacher)
    for which, names in ((named, "abcd"), (swapped, "abdc")):
        which.pretrained_cfg = {**which.pretrained_cfg, "label_names": list(names)}
    with pytest.raises(SettingsError, match="in another order: class 2 is 'd', expected 'c'"):
        tune(named, data, teacher=swapped, **QUICK)
    with pytest.raises(SettingsError, match=r"features: the teacher has no block 'blocks\.7'"):
        tune(net, data, teacher=teacher, features=("blocks.7",), **QUICK)
    with pytest.raises(SettingsError, match=r"blocks\.0 gives \(5, 16\) .* in the student, \(5, 24\) in the teacher"):
        tune(net, data, teacher=model(embed_dim=24), features=("all",), **QUICK)
    with pytest.raises(SettingsError, match="distillation='hard' needs a teacher"):
        tune(net, data, distillation="hard", **QUICK)
    with pytest.raises(SettingsError, match=r"features=.* needs a teacher"):
        tune(net, data, features=("all",), **QUICK)


def test_a_teacher_of_other_normalisation_sees_what_it_is_used_to(data, teacher):
    """The same weights behind another mean and spread: the input is turned into its own, so the logits are those of
    evaluation.
    """
    other = copy.deepcopy(teacher)
    other.pretrained_cfg = {**other.pretrained_cfg, "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.3, 0.2)}
    student = copy.deepcopy(teacher)
    tune(
        student, data, teacher=other, alpha=1.0, steps=1, clip=None, min_lr=0, **{**PLAIN, "lr": 0.0, "batch_size": 26}
    )
    ours, theirs = (torch.stack([x for x, _ in inputs(data, net)]) for net in (student, other))
    with torch.no_grad():
        p, q = teacher(ours).log_softmax(1), other(theirs).log_softmax(1)
    expected = F.kl_div(p, q, log_target=True, reduction="batchmean")
    assert result(student)["curve"][0]["distillation_loss"] == pytest.approx(float(expected), rel=1e-4)


def test_nothing_to_learn_from_is_told(unlabelled, data, teacher):
    with pytest.raises(DataError, match="has no labels: give a teacher to learn from, or give labelled pictures"):
        tune(model(), unlabelled, **QUICK)
    with pytest.raises(DataError, match="has no labels: let it learn of the teacher"):
        tune(model(), unlabelled, teacher=teacher, distillation="none", **QUICK)
    with pytest.raises(DataError, match=r"evaluation: .* has no labels, so there is no top-1"):
        tune_(model(), data, TuneSettings(**QUICK), evaluation=unlabelled)


def test_settings_that_cannot_be_met_are_told(data):
    with pytest.raises(SettingsError, match="got batch_size=8, expected a multiple of 3: 3 parts"):
        tune(model(), data, accumulate=3, **QUICK)
    with pytest.raises(SettingsError, match="is in bfloat16, too coarse"):
        tune(model().to(torch.bfloat16), data, **QUICK)
    with pytest.raises(SettingsError, match="fp16 needs a GPU"):
        tune(model(), data, precision="fp16", **QUICK)
    with pytest.raises(SettingsError, match="trackers=tensorboard need a folder"):
        tune(model(), data, trackers=("tensorboard",), **QUICK)


def test_trackers_get_the_lines_of_the_log(data, tmp_path):
    from accelerate.tracking import GeneralTracker, register_tracker_class

    told = []

    class Notes(GeneralTracker):
        name = "notes-of-a-test"
        requires_logging_directory = False
        tracker = None

        def __init__(self, run_name, **keywords):
            super().__init__()
            told.append(run_name)

        def store_init_configuration(self, values):
            told.append(values)

        def log(self, values, step=None, **keywords):
            told.append((step, values["loss"]))

        def finish(self):
            told.append("finished")

    register_tracker_class(Notes)
    net = model()
    tune(net, data, trackers=("notes-of-a-test",), out=tmp_path, steps=4, log_every=2, **QUICK)
    name, configuration, *lines, end = told
    assert name == "comcat" and configuration["lr"] == 1e-3 and end == "finished"
    assert lines == [(line["step"], line["loss"]) for line in result(net)["curve"]] and len(lines) == 2


def test_unknown_trackers_are_told(data, tmp_path):
    with pytest.raises(SettingsError, match="Unsupported logging capability: nonsense"):
        tune(model(), data, trackers=("nonsense",), out=tmp_path, **QUICK)


def test_trackers_that_are_not_installed_are_told(data, tmp_path, monkeypatch):
    """accelerate itself would leave them out in silence."""
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(SettingsError, match="tracker 'wandb' is not installed"):
        tune(model(), data, trackers=("wandb",), out=tmp_path, **QUICK)


def test_too_many_unreadable_pictures_stop_the_run_and_a_few_do_not(tmp_path):
    path = folder(tmp_path / "p", 24)
    (tmp_path / "p" / "class1" / "0001.png").write_bytes(b"nothing")
    with pytest.warns(UserWarning, match="cannot be read"):
        tune(model(), path, epochs=1, **QUICK)
    with pytest.warns(UserWarning), pytest.raises(DataError, match="cannot be read, and at most 1%"):
        tune(model(), open_pictures(path, max_unreadable=0.01), epochs=1, **QUICK)


# ---------------------------------------------------------------- what goes wrong on the way


def test_a_loss_that_is_no_number_names_step_place_and_checkpoint(data, tmp_path, monkeypatch):
    step = Training.step

    def poisoned(self, number, watch):
        if number == 5:
            with torch.no_grad():
                self.learner.bare.blocks[1].mlp.fc2.weight[0, 0] = float("nan")
        return step(self, number, watch)

    monkeypatch.setattr(Training, "step", poisoned)
    net = model()
    message = (
        r"the loss is nan at step 5, first seen in blocks\.1\.mlp\.fc2\.weight; the last good checkpoint is "
        r".*step-00000004"
    )
    with pytest.raises(NumericsError, match=message):
        tune(net, data, out=tmp_path, epochs=3, **QUICK)
    assert same(net, model())


def test_weights_that_are_no_numbers_are_not_saved(data, tmp_path, monkeypatch):
    update = Learner.update

    def poisoned(self, step):
        update(self, step)
        if step == 3:
            with torch.no_grad():
                self.bare.head.bias[1] = float("inf")

    monkeypatch.setattr(Learner, "update", poisoned)
    with pytest.raises(
        NumericsError, match=r"head\.bias holds NaN or infinity after step 4; the last good .*step-00000002"
    ):
        tune(model(), data, out=tmp_path, epochs=3, checkpoint_every=2, **QUICK)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_disk_that_fills_stops_the_run_and_it_goes_on_when_there_is_room(data, tmp_path, monkeypatch):
    undisturbed = model()
    tune(undisturbed, data, epochs=2, **QUICK)
    write, calls = checkpoints_module.write_tensors, []

    def full(path, group):
        calls.append(path)
        if len(calls) > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, group)

    net = model()
    with monkeypatch.context() as patched:
        patched.setattr(checkpoints_module, "write_tensors", full)
        with pytest.raises(
            StoreError, match=r"step-00000004 cannot be written: .*No space.*last good one is .*step-00000002"
        ):
            tune(net, data, out=tmp_path, epochs=2, checkpoint_every=2, **QUICK)
    assert same(net, model())
    tune(net, data, out=tmp_path, epochs=2, checkpoint_every=2, **QUICK)
    assert same(net, undisturbed)


# ---------------------------------------------------------------- going on


class Killed(BaseException):
    pass


def killed_at(monkeypatch, step: int):
    """A context in which a run ends without warning at the start of a step."""
    one_step = Training.step

    def deadly(self, number, watch):
        if number == step:
            raise Killed
        return one_step(self, number, watch)

    patched = monkeypatch.context()
    patched.__enter__().setattr(Training, "step", deadly)
    return patched


EVERYTHING = {
    **QUICK, "epochs": 3, "ema": 0.9, "mixup": 0.8, "cutmix": 1.0, "rand_augment": "rand-m9-mstd0.5-inc1", "erase": 0.5,
    "repeats": 2, "features": ("all",), "log_every": 3, "checkpoint_every": 2, "eval_every": 1.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(data, evaluation, teacher, tmp_path_factory):
    net, out = model(drop_path_rate=0.3), tmp_path_factory.mktemp("undisturbed")
    tune(net, data, evaluation=evaluation, teacher=teacher, out=out, **EVERYTHING)
    return net, out


def curves(net, out):
    """Everything that does not depend on the clock."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds"), line.pop("images_per_second")
    clock = ("seconds", "images_per_second")
    return lines, {k: v for k, v in result(net).items() if k not in clock}


@pytest.mark.parametrize("steps", [(1,), (2,), (5,), (11,), (3, 3, 4, 9)])
def test_a_run_that_was_killed_ends_as_one_that_was_not(
    data, evaluation, teacher, undisturbed, tmp_path, monkeypatch, steps
):
    for step in steps:
        patched = killed_at(monkeypatch, step)
        with pytest.raises(Killed):
            tune(model(drop_path_rate=0.3), data, evaluation=evaluation, teacher=teacher, out=tmp_path, **EVERYTHING)
        patched.__exit__(None, None, None)
        torch.manual_seed(step)  # what other code draws in between does not matter
    net = model(drop_path_rate=0.3)
    tune(net, data, evaluation=evaluation, teacher=teacher, out=tmp_path, **EVERYTHING)
    assert same(net, undisturbed[0])
    assert curves(net, tmp_path) == curves(*undisturbed)


def test_a_finished_run_is_finished(data, evaluation, teacher, undisturbed, monkeypatch):
    """The same call again takes the result from the last checkpoint and trains nothing."""
    patched = killed_at(monkeypatch, 0)
    net = model(drop_path_rate=0.3)
    tune(net, data, evaluation=evaluation, teacher=teacher, out=undisturbed[1], **EVERYTHING)
    patched.__exit__(None, None, None)
    assert same(net, undisturbed[0]) and curves(net, undisturbed[1]) == curves(*undisturbed)


def test_another_run_is_not_gone_on_with(data, evaluation, teacher, tmp_path):
    tune(model(), data, out=tmp_path, steps=2, **QUICK)
    for change, message in (
        ({"lr": 2e-3}, "lr was 0.001, now 0.002"),
        ({"steps": 3}, "steps was 2, now 3"),
        ({"teacher": teacher}, "teacher was None, now '"),
    ):
        with pytest.raises(StoreError, match=f"made with other settings: {message}.*--restart"):
            tune(model(), data, out=tmp_path, **{**QUICK, "steps": 2, **change})
    other = model()
    shake(other, 0.2)
    with pytest.raises(StoreError, match=r"student was '\w+', now '"):
        tune(other, data, out=tmp_path, steps=2, **QUICK)
    with pytest.raises(StoreError, match=r"data was .*samples was 26, now 13"):
        tune(model(), evaluation, out=tmp_path, steps=2, **QUICK)

    net, fresh = model(), model()
    tune(net, data, out=tmp_path, restart=True, steps=3, **QUICK)
    tune(fresh, data, steps=3, **QUICK)
    assert same(net, fresh)
    assert [json.loads(line)["step"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [3]


def test_a_log_that_was_cut_is_told(data, tmp_path):
    tune(model(), data, out=tmp_path, steps=2, **QUICK)
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(StoreError, match="the checkpoint knows of"):
        tune(model(), data, out=tmp_path, steps=2, **QUICK)


def test_runs_of_different_precision_follow_each_other(data):
    nets = [model(), model(), model()]
    for net, precision in zip(nets, ("fp32", "bf16", "fp32"), strict=True):
        tune(net, data, steps=2, precision=precision, **QUICK)
    assert same(nets[0], nets[2]) and not same(nets[0], nets[1])
    assert replace(nets[0].comcat_record)  # and records are plain dataclasses


def test_nothing_is_left_behind(data, teacher):
    """No hooks, no wrappers, no flags on the models given, and the teacher as it was."""
    net, before = model(), copy.deepcopy(teacher).train()
    given = copy.deepcopy(before)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tune(net, data, teacher=given, features=("all",), steps=2, ema=0.5, precision="bf16", **QUICK)
    assert same(given, before) and given.training and all(p.requires_grad for p in given.parameters())
    for module in (*net.modules(), *given.modules()):
        assert not module._forward_hooks and "forward" not in vars(module)
    assert same(copy.deepcopy(net), net)
