"""Settings of tuning say what is wrong with them."""

import pytest

from comcat.errors import SettingsError
from comcat.settings import from_keywords
from comcat.tuning.settings import TuneSettings


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": 1, "steps": 5}, "both epochs and steps"),
        ({"epochs": -1}, "got epochs=-1, expected a number from 0"),
        ({"epochs": float("inf")}, "got epochs=inf"),
        ({"lr": float("nan")}, "got lr=nan"),
        ({"batch_size": 0}, "got batch_size=0, expected a whole number from 1"),
        ({"alpha": 1.5}, "got alpha=1.5, expected a number from 0 to 1"),
        ({"ema": 1.0}, "got ema=1.0, expected a number from 0 to below 1"),
        ({"clip": 0.0}, "got clip=0.0, expected a number above 0"),
        ({"temperature": 0}, "got temperature=0"),
        ({"min_lr": 1e-3}, "got min_lr=0.001, expected at most lr=0.0001"),
        ({"crop_scale": (0.5, 0.1)}, "crop_scale"),
        ({"precision": "fp8"}, "got precision='fp8', expected one of fp32, bf16, fp16"),
        ({"distillation": "sof"}, "got distillation='sof'.*did you mean 'soft'"),
        ({"keep": 0}, "got keep=0"),
        ({"learning_rate": 1}, "unknown setting 'learning_rate'"),
        ({"warm_up": 1}, "unknown setting 'warm_up'; did you mean 'warmup'"),
    ],
)
def test_what_cannot_be_is_told(wrong, message):
    with pytest.raises(SettingsError, match=message):
        from_keywords(TuneSettings, wrong)


def test_what_does_not_touch_the_result_may_change_when_a_run_goes_on():
    one = TuneSettings(workers=0, keep=1, checkpoint_every=5, trackers=("tensorboard",)).lasting()
    assert one == TuneSettings(workers=4, keep=3, eval_every=2).lasting()
    assert one != TuneSettings(lr=1e-3).lasting()
