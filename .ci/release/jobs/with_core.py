"""Compress, save and load a model of plain torch; the pictures are read from a folder."""

import torch
from plain import Plain, batches, model, picture_folder

import comcat

small = comcat.compress(model, calibration=batches, reduce=0.4)
assert comcat.count_parameters(small) <= 0.6 * comcat.count_parameters(model)
comcat.save(small, "small")
again = comcat.load("small", into=Plain()).eval()
assert torch.allclose(again(batches[0]), small(batches[0]), atol=1e-5)
assert len(comcat.open_pictures(str(picture_folder()))) == 40
