"""Slow: what compression keeps of a really trained model. Needs ../shared beside the checkout, and is skipped without
it.
"""

import copy
from pathlib import Path

import pytest

import comcat
from comcat.factors import PaperCode, Weights
from comcat.methods.allocate import allocate
from comcat.methods.baselines import mha_sites

SHARED = Path(__file__).resolve().parents[2] / "shared"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (SHARED / "models" / "vit_cifar10").is_dir(), reason="no trained model beside the checkout"),
]


@pytest.fixture(scope="module")
def setting():
    model = comcat.load_model(str(SHARED / "models" / "vit_cifar10"))
    prepare = comcat.preprocess_of(model)
    train = comcat.open_pictures(SHARED / "data" / "cifar10" / "train.parquet")
    judged = comcat.open_pictures(SHARED / "data" / "cifar10" / "validation.parquet").take(1000, seed=0)
    return (
        model,
        list(comcat.batches(train.take(512, seed=0), prepare, batch_size=64)),
        list(comcat.batches(judged, prepare, batch_size=50)),
    )


def top1(model, batches) -> float:
    return comcat.evaluate(model, batches).top1


def test_the_default_wins_back_half_of_what_the_weights_alone_lose(setting):
    model, calibration, judged = setting
    dense = top1(model, judged)
    sites = mha_sites(comcat.find_sites(model))
    total = sum(s.parameters() for s in sites.values())
    kept = {}
    statistics = comcat.calibrate(model, calibration, statistic="loss", sites=sites)
    for name, statistic, rule in (
        ("default", statistics, "waterfill"),
        ("weights", Weights(), "uniform"),
        ("paper", PaperCode(), "uniform"),
    ):
        small = copy.deepcopy(model)
        comcat.apply_(small, allocate(small, statistic, reduce=0.95, rule=rule, sites=sites, total=total), statistic)
        kept[name] = top1(small, judged)
    assert dense > 75
    assert kept["default"] - kept["weights"] >= 0.5 * (dense - kept["weights"])
    assert kept["default"] - kept["paper"] >= 0.6 * (dense - kept["paper"])


def test_half_the_model_costs_at_most_a_point(setting):
    model, calibration, judged = setting
    small = comcat.compress(model, calibration=calibration, reduce=0.5)
    assert comcat.count_parameters(small) <= 0.5 * comcat.count_parameters(model)
    assert top1(small, judged) >= top1(model, judged) - 1.0
