"""Pictures from folders, parquet files, hub data sets, tar shards and built-in digits, and the tensors made of them.

    pictures = open_pictures("imagenet/val")
    for images, labels in batches(pictures.take(256, seed=0), preprocess, batch_size=32):
        ...  # images: (batch, channels, height, width) float32; labels: (batch,) int64

Every source streams: a pass over it holds a few pictures at a time, never all of them.
"""

from .batches import Batches, batches
from .opening import open_pictures
from .pictures import Pictures, Sample, overlap
from .preprocess import Preprocess

__all__ = ["Batches", "Pictures", "Preprocess", "Sample", "batches", "open_pictures", "overlap"]
