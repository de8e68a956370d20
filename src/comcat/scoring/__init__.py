"""Scoring generated pictures: KID, FID, CLIP-I, CLIP-T and DINO.

scores = score("pictures/", against="./dog")  # what `comcat score` prints
kid(x, y).mean, fid(x, y)  # of features (pictures, features) from anywhere
"""

from typing import TYPE_CHECKING

from ..lazy import attributes_of

if TYPE_CHECKING:
    from .distances import KID as KID
    from .distances import fid as fid
    from .distances import kid as kid
    from .distances import mmd2 as mmd2
    from .distances import paired_cosine as paired_cosine
    from .distances import pairwise_cosine as pairwise_cosine
    from .features import Extractor as Extractor
    from .features import Opening as Opening
    from .features import clean_resize as clean_resize
    from .features import distance_extractor as distance_extractor
    from .features import embed as embed
    from .features import similarity_extractor as similarity_extractor
    from .scoring import Scores as Scores
    from .scoring import score as score
    from .settings import METRICS as METRICS
    from .settings import ScoreSettings as ScoreSettings

_WHERE = {
    "Extractor": "features", "KID": "distances", "METRICS": "settings", "Opening": "features",
    "ScoreSettings": "settings", "Scores": "scoring", "clean_resize": "features", "distance_extractor": "features",
    "embed": "features", "fid": "distances", "kid": "distances", "mmd2": "distances", "paired_cosine": "distances",
    "pairwise_cosine": "distances", "score": "scoring", "similarity_extractor": "features",
}  # fmt: skip

__all__ = sorted(_WHERE)

__getattr__ = attributes_of(__name__, _WHERE)


def __dir__() -> list[str]:
    return __all__
