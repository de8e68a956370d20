"""Scoring generated pictures: KID, FID, CLIP-I, CLIP-T and DINO.

scores = score("pictures/", against="./dog")  # what `comcat score` prints
kid(x, y).mean, fid(x, y)  # of features (pictures, features) from anywhere
"""

from .distances import KID, fid, kid, mmd2, paired_cosine, pairwise_cosine
from .features import Extractor, Opening, clean_resize, distance_extractor, embed, similarity_extractor
from .scoring import Scores, score
from .settings import METRICS, ScoreSettings

__all__ = [
    "KID",
    "METRICS",
    "Extractor",
    "Opening",
    "ScoreSettings",
    "Scores",
    "clean_resize",
    "distance_extractor",
    "embed",
    "fid",
    "kid",
    "mmd2",
    "paired_cosine",
    "pairwise_cosine",
    "score",
    "similarity_extractor",
]
