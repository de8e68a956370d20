"""Small models and sets of pictures for the tests of training. No scikit-learn: subprocesses import this, too."""

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image
from torch import nn

from tests.models import tiny_vit

CLASSES = 4


def model(**arguments) -> nn.Module:
    """A ViT of width 16 and two blocks for 8×8 pictures of four classes."""
    settings = {"img_size": 8, "patch_size": 4, "embed_dim": 16, "num_heads": 2, "num_classes": CLASSES, **arguments}
    return tiny_vit(**settings)


def picture(label: int, number: int) -> Image.Image:
    """A picture whose brightest quarter tells its class; each number is another one."""
    pixels = np.random.default_rng(1000 * label + number).integers(0, 128, (8, 8, 3), dtype=np.uint8)
    row, column = divmod(label % 4, 2)
    pixels[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 127
    return Image.fromarray(pixels)


def folder(path: Path, count: int, *, classes: int = CLASSES, first: int = 0) -> str:
    """A folder of ``count`` PNG files in ``classes`` sub-folders; other pictures for another ``first``."""
    for number in range(count):
        label = number % classes
        target = path / f"class{label}"
        target.mkdir(parents=True, exist_ok=True)
        picture(label, first + number).save(target / f"{number:04d}.png")
    return str(path)


def shards(path: Path, count: int, each: int = 10) -> str:
    """Tar files of ``each`` pictures in WebDataset's convention; the pattern that names them."""
    path.mkdir(parents=True, exist_ok=True)
    for start in range(0, count, each):
        with tarfile.open(path / f"shard-{start // each:03d}.tar", "w") as tar:
            for number in range(start, min(start + each, count)):
                label = number % CLASSES
                buffer = io.BytesIO()
                picture(label, number).save(buffer, "png")
                for suffix, content in (("png", buffer.getvalue()), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return str(path / "shard-*.tar")


def rows(path: Path, count: int, each: int = 5) -> str:
    """A parquet file of ``count`` pictures in row groups of ``each``."""
    import pyarrow
    from pyarrow import parquet

    encoded = []
    for number in range(count):
        buffer = io.BytesIO()
        picture(number % CLASSES, number).save(buffer, "png")
        encoded.append({"bytes": buffer.getvalue(), "path": f"{number:04d}.png"})
    labels = [number % CLASSES for number in range(count)]
    parquet.write_table(pyarrow.table({"image": encoded, "label": labels}), path, row_group_size=each)
    return str(path)
