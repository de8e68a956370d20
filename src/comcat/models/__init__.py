"""Finding, building and re-building other people's models.

model = load_model("timm:deit_small_patch16_224")
origin = origin_of(model)  # plain data
same = origin.build()  # the same architecture with random weights
same.load_state_dict(model.state_dict())
preprocess_of(model), class_names_of(model)
"""

from .inputs import class_names_of, in_classes_of, preprocess_of
from .loading import load_model
from .origins import Origin, attach_origin, name_of, origin_of

__all__ = [
    "Origin",
    "attach_origin",
    "class_names_of",
    "in_classes_of",
    "load_model",
    "name_of",
    "origin_of",
    "preprocess_of",
]
