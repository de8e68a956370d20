"""The recipes of the paper's Table 2 are what `comcat compress` understands, and say what the paper says."""

from dataclasses import asdict
from pathlib import Path

import pytest
import tyro

from comcat.cli.recipes import with_recipe
from comcat.cli.shrink.compress import Compress
from comcat.methods.search import SearchSettings

RECIPES = Path(__file__).parents[1] / "recipes"
PAPER = {
    "deit-small-half": ("timm:deit_small_patch16_224", 0.4998, 0.005),
    "deit-small-44": ("timm:deit_small_patch16_224", 0.4382, 0.005),
    "deit-small-40": ("timm:deit_small_patch16_224", 0.4011, 0.005),
    "deit-base-61": ("timm:deit_base_patch16_224", 0.6106, 0.05),
}


def parsed(name: str, *given: str) -> Compress:
    arguments = ["compress", "--data", "train", "--out", "out", *given, "--recipe", str(RECIPES / f"{name}.yaml")]
    return tyro.cli(Compress, args=with_recipe(arguments, {"compress": Compress})[1:])


@pytest.mark.parametrize("name", PAPER)
def test_a_recipe_says_what_the_paper_says(name):
    command, (model, reduce, weight_decay) = parsed(name), PAPER[name]
    assert (command.model, command.reduce, command.budget, command.ranks) == (model, reduce, "parameters", "search")
    search = SearchSettings(**asdict(command.search), reduce=reduce, statistic=command.statistic, forms=command.forms)
    assert (search.beta, search.grid, search.start, search.forms) == (1.5, "paper", "blind", "ranks") and command.head
    assert (search.temperature, search.final_temperature) == (5.0, 0.1)
    tune = command.tune
    assert (tune.weight_decay, tune.epochs) == (weight_decay, 300)
    assert (tune.distillation, tune.clip, tune.mixup, tune.cutmix, tune.repeats) == ("hard", None, 0.8, 1.0, 3)


CODE = {  # pictures a step of the search, of its epochs; peak and last learning rate of tuning, blocks aligned
    "deit-small-half": (64, 512, 2e-4, 5e-6, 4),
    "deit-small-44": (64, 512, 2e-4, 5e-6, 4),
    "deit-small-40": (64, 512, 2e-4, 5e-6, 4),
    "deit-base-61": (16, 320, 1e-4, 1e-6, 0),
}
PAPER_TUNES_AT = (1e-4, 1e-6)


@pytest.mark.parametrize("name", PAPER)
def test_a_recipe_runs_as_the_papers_code_does(name):
    command, (batch, epoch_batch, lr, min_lr, aligned) = parsed(name), CODE[name]
    search, tune = command.search, command.tune
    assert (search.batch_size, search.rounds, search.penalty, search.penalised) == (batch, 30, "above", "sites")
    assert (search.rank_lr, search.rank_weight_decay) == (1e-2, 5e-4)
    assert search.weight_lr == pytest.approx(5e-4 * batch / 512, rel=5e-3)
    assert search.rank_steps * batch == pytest.approx(50_000, rel=1e-3)
    assert search.weight_steps * epoch_batch == pytest.approx(1_281_167, rel=1e-3)
    assert search.held_out * 1_281_167 == pytest.approx(50_000, rel=0.03)
    assert (tune.lr, tune.min_lr, tune.warmup, len(tune.features)) == (lr, min_lr, 0.0, aligned)


@pytest.mark.parametrize("name", PAPER)
def test_where_paper_and_code_differ_the_recipe_says_both(name):
    command = parsed(name)
    text = (RECIPES / f"{name}.yaml").read_text()
    lines = {key: line for line in text.splitlines() for key in [line.strip().partition(":")[0]]}
    assert "code" in lines["penalty"] and "Eq. 6" in lines["penalty"]
    assert "the validation set" in text
    for key, paper in zip(("lr", "min_lr"), PAPER_TUNES_AT, strict=True):
        differs = getattr(command.tune, key) != paper
        assert differs == ("the paper, §4.1, says" in lines[key]), lines[key]


def test_the_blocks_aligned_are_the_first_two_and_the_last_two():
    import timm

    from comcat.tuning.teachers import chosen_blocks

    model = timm.create_model("deit_small_patch16_224", pretrained=False)
    found = list(chosen_blocks(parsed("deit-small-half").tune.features, model))
    assert found == [f"blocks.{i}" for i in (0, 1, len(model.blocks) - 2, len(model.blocks) - 1)]


def test_the_recipe_after_cait_takes_tokens_channels_and_tuning_in_one_go():
    command = parsed("cait-deit-small")
    assert (command.model, command.reduce, command.budget) == ("timm:deit_small_patch16_224", 0.5, "macs")
    assert (command.forms, command.ranks, command.statistic) == ("ranks,units,tokens", "waterfill", "loss")
    assert command.tuning is not None and command.tuning.distillation == "soft" and command.tuning.epochs == 30


def test_what_is_given_by_hand_wins():
    command = parsed("deit-small-half", "--reduce", "0.3", "--tune.epochs", "2", "--search.beta", "1")
    assert (command.reduce, command.tune.epochs, command.search.beta) == (0.3, 2, 1.0)
    assert command.tune.lr == 2e-4


def test_their_augmentation_works_at_its_strongest():
    """Pillow 13 refuses what timm asks of Posterize there."""
    from PIL import Image

    from comcat.data import Preprocess
    from comcat.tuning.augmentation import Augment

    augment = Augment(Preprocess(size=(16, 16), mean=(0.5,), std=(0.5,)), parsed("deit-small-half").tune)
    for operation in augment.colours.ops:
        operation.magnitude, operation.magnitude_std, operation.prob = 10, 0, 1.0
        assert operation(Image.new("RGB", (16, 16), "red")).size == (16, 16), operation.name


def test_no_recipe_is_left_out():
    assert {path.stem for path in RECIPES.glob("*deit-*.yaml")} == {*PAPER, "cait-deit-small"}
