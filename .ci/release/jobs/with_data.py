"""Digits, a parquet file of pictures, and shards."""

import io
import tarfile

import datasets
from plain import picture_folder

import comcat

assert len(comcat.open_pictures("digits:train")) > 1000
folder = picture_folder()
rows = {"image": [str(p) for p in sorted(folder.rglob("*.png"))]}
rows["label"] = [int(p.split("class")[-1].split("/")[0]) for p in rows["image"]]
kept = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
kept.map(lambda row: row, keep_in_memory=True).to_parquet("pictures.parquet")
pictures = comcat.open_pictures("pictures.parquet")
assert len(pictures) == 40 and pictures.has_labels
with tarfile.open("pictures-000.tar", "w") as shard:
    for number, path in enumerate(rows["image"]):
        for name, content in ((f"{number}.png", open(path, "rb").read()), (f"{number}.cls", b"1")):
            about = tarfile.TarInfo(name)
            about.size = len(content)
            shard.addfile(about, io.BytesIO(content))
assert len(list(comcat.open_pictures("pictures-000.tar"))) == 40
