"""A tensor train in the place of the feed-forwards' weights."""

from plain import batches, model

import comcat
from comcat.methods.baselines import BASELINES

sites, before = comcat.find_sites(model), comcat.count_parameters(model)
part = BASELINES["tensor-train"]
handle = comcat.apply_(model, part(model, sites, 0.4), sites=sites)
assert comcat.count_parameters(model) < before and model(batches[0]).isfinite().all()
handle.revert()
