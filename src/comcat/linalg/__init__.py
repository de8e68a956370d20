"""The mathematics of smaller layers: tensors in, tensors out."""

from .elimination import Elimination, eliminate, refit_units
from .products import (
    RIDGE,
    Factorization,
    factorize,
    gram,
    match_trace,
    product_singular_values,
    refit,
    root,
    shrinkage_weight,
)
from .updates import nearest_updates

__all__ = ["RIDGE", "Elimination", "Factorization", "eliminate", "factorize", "gram", "match_trace", "nearest_updates",
           "product_singular_values", "refit", "refit_units", "root", "shrinkage_weight"]  # fmt: skip
