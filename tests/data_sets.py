"""Small pictures with captions, and the folders, tars and shards that hold them."""

import io
import json
import tarfile

import numpy as np
from PIL import Image


def pixels(seed, height=12, width=16):
    """uint8 (H, W, 3)."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image, form="PNG", **options):
    """A picture's file, as bytes."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, form, **options)
    return file.getvalue()


def write_folder(folder, count, sizes=((12, 16),), caption="picture {}"):
    """`count` PNG files with a text file each."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        (folder / f"{i:03}.png").write_bytes(encoded(pixels(i, *sizes[i % len(sizes)])))
        (folder / f"{i:03}.txt").write_text(caption.format(i), encoding="utf-8")
    return folder


def write_metadata(folder, rows):
    """A `metadata.jsonl` of these dictionaries."""
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_tar(path, members):
    """A tar of (name, bytes)."""
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path
