"""Small pictures of noise, and files of every kind that hold them."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from comcat.data import Pictures, Preprocess

GREY8 = Preprocess(size=(8, 8), mean=(0.5,), std=(0.5,), channels=1)
RGB8 = Preprocess(size=(8, 8), mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def picture(number: int, size: tuple[int, int] = (10, 12)) -> Image.Image:
    """A picture of noise that depends on the number; size is (width, height)."""
    shape = (size[1], size[0], 3)
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def fill(folder: Path, names: dict[str, int]) -> Path:
    """Writes one picture a name; the numbers choose the pictures."""
    for name, number in names.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(folder / name)
    return folder


def write_parquet(
    file: Path, columns: dict, types: dict | None = None, metadata: dict | None = None, group: int = 4
) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = {name: pa.array(values, type=(types or {}).get(name)) for name, values in columns.items()}
    table = pa.table(arrays)
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": metadata}})})
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, file, row_group_size=group)
    return file


def cells(count: int, start: int = 0) -> list[dict]:
    return [{"bytes": encoded(picture(number)), "path": f"{number}.png"} for number in range(start, start + count)]


def write_tar(file: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"))


def numbers_of(pictures: Pictures) -> list[int]:
    """Which of ``picture(number)`` these are, in order."""
    known = {picture(number).tobytes(): number for number in range(40)}
    return [known[sample.image.tobytes()] for sample in pictures]
