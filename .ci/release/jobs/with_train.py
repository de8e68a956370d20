"""Tuning a model of plain torch on a folder of pictures, and a search."""

from plain import batches, model, picture_folder

import comcat
from comcat.data import Preprocess

folder, how = str(picture_folder()), Preprocess(size=(32, 32), mean=(0.5,) * 3, std=(0.5,) * 3)
small = comcat.compress(model, calibration=batches, reduce=0.4)
comcat.tune(small, folder, teacher=model, preprocess=how, steps=2, batch_size=8, out="run")
plan = comcat.search(
    model, folder, preprocess=how, reduce=0.4, rounds=1, rank_steps=2, batch_size=8, pictures=16, statistic="activation"
)
assert plan.made_by["saved"] >= 0.4
