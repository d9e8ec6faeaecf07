"""Draws the pictures that the model is judged by, and sheets of them beside the true ones.

usage: python scripts/emoji/draw.py [--data data/emoji] [--preset emoji] [--output runs/emoji_drawn]
Then   python scripts/emoji/judge_emoji.py data/emoji/gallery runs/emoji_drawn

Every held-out pair and the first seen ones, in the order of the split's hash, one picture each: the model's defaults,
seed 0, as they come. The sheets, OUTPUT/seen.png and OUTPUT/held_out.png, show the first of each, the true drawing
above what the model drew; OUTPUT/free.png shows what it draws for free_prompts.txt, row by row in the file's order.
Another model's pictures are removed first: OUTPUT/model.sha256 says whose they are.
"""

import argparse
import hashlib
import pathlib

import numpy as np
from captions import canonical_caption
from PIL import Image
from records import Record, read_index

import latentdiff as ld
from latentdiff.catalogue import resolve_preset

COLUMNS, ROWS = 10, 4
FREE_PROMPTS = pathlib.Path(__file__).with_name("free_prompts.txt")


def hash_of(record: Record) -> bytes:
    """What the split is drawn by, as `judge_emoji.held_out` has it."""
    return hashlib.sha256(f"{record.codepoints}/{record.style}".encode()).digest()


def digest_of(preset: str) -> str:
    """SHA-256 of a model's weights, as hex digits."""
    files = sorted(resolve_preset(preset).glob("*/*.safetensors"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


def start(output: pathlib.Path, preset: str) -> None:
    """Empties OUTPUT of another model's pictures."""
    digest = digest_of(preset)
    stamp = output / "model.sha256"
    if not stamp.exists() or stamp.read_text() != digest:
        for picture in output.glob("*/*.png"):
            picture.unlink()
        output.mkdir(parents=True, exist_ok=True)
        stamp.write_text(digest)


def draw(pipe: ld.TextToImage, records: list[Record], output: pathlib.Path, batch_size: int) -> None:
    """Writes OUTPUT/STYLE/CODEPOINTS.png for each record that has none yet."""
    paths = [output / r.style / f"{r.codepoints}.png" for r in records]
    missing = [i for i, path in enumerate(paths) if not path.exists()]
    for start in range(0, len(missing), batch_size):
        part = missing[start : start + batch_size]
        prompts = [canonical_caption(records[i]) for i in part]
        for i, image in zip(part, pipe.generate(prompts, seed=[0] * len(part), progress=False), strict=True):
            paths[i].parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(paths[i])
        print(f"{start + len(part)} of {len(missing)}", flush=True)


def sheet(records: list[Record], gallery: pathlib.Path, output: pathlib.Path) -> Image.Image:
    """Rows of true drawings, each above the row that the model drew."""
    rows = []
    for start in range(0, min(len(records), COLUMNS * ROWS), COLUMNS):
        row = records[start : start + COLUMNS]
        for folder in (gallery, output):
            cells = [np.asarray(Image.open(folder / r.style / f"{r.codepoints}.png").convert("RGB")) for r in row]
            cells += [np.full_like(cells[0], 255)] * (COLUMNS - len(cells))
            rows.append(np.concatenate(cells, axis=1))
    return Image.fromarray(np.concatenate(rows))


def free_sheet(pipe: ld.TextToImage, prompts: list[str], batch_size: int) -> Image.Image:
    """What the model draws for words of its user's own, one picture each."""
    images = pipe.generate(prompts, seed=[0] * len(prompts), batch_size=batch_size, progress=False)
    rows = [np.concatenate(images[start : start + COLUMNS], axis=1) for start in range(0, len(images), COLUMNS)]
    return Image.fromarray(np.concatenate(rows))


def main(data: pathlib.Path, preset: str, output: pathlib.Path, seen: int, held_out: int, batch_size: int) -> None:
    records = sorted(read_index(data / "index.jsonl"), key=hash_of)
    chosen = {
        "seen": [r for r in records if not (r.held_out or r.validation)][:seen],
        "held_out": [r for r in records if r.held_out][:held_out],
    }
    start(output, preset)
    pipe = ld.TextToImage.from_preset(preset)
    free_sheet(pipe, FREE_PROMPTS.read_text(encoding="utf-8").splitlines(), batch_size).save(output / "free.png")
    for name, part in chosen.items():
        if part:
            draw(pipe, part, output, batch_size)
            sheet(part, data / "gallery", output).save(output / f"{name}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, default="data/emoji")
    parser.add_argument("--preset", default="emoji")
    parser.add_argument("--output", type=pathlib.Path, default="runs/emoji_drawn")
    parser.add_argument("--seen", type=int, default=500)
    parser.add_argument("--held-out", type=int, default=499)
    parser.add_argument("--batch-size", type=int, default=25)
    main(**vars(parser.parse_args()))
