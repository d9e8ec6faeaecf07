"""Draws captioned pictures for the toy recipes: coloured shapes, whose right answers are known.

usage: python scripts/toy_pictures.py [--output data/toy] [--count 512] [--size 32]
Writes OUTPUT/00000.png and OUTPUT/00000.txt ("a red circle") and so on; the same ones each time.
"""

import argparse
import itertools
import pathlib
import random

from PIL import Image, ImageDraw

COLOURS = {"red": (220, 40, 40), "green": (40, 160, 60), "blue": (50, 80, 220), "yellow": (240, 200, 40)}
SHAPES = ("circle", "square", "triangle")


def draw(colour: str, shape: str, size: int, rng: random.Random) -> Image.Image:
    """One shape somewhere near the middle of a white picture."""
    image = Image.new("RGB", (size * 4, size * 4), "white")
    pen, radius = ImageDraw.Draw(image), size * rng.uniform(1.1, 1.6)
    x, y = (size * rng.uniform(1.8, 2.2) for _ in range(2))
    box = (x - radius, y - radius, x + radius, y + radius)
    if shape == "circle":
        pen.ellipse(box, fill=COLOURS[colour])
    elif shape == "square":
        pen.rectangle(box, fill=COLOURS[colour])
    else:
        pen.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], fill=COLOURS[colour])
    return image.resize((size, size), Image.Resampling.LANCZOS)


def main(output: pathlib.Path, count: int, size: int) -> None:
    output.mkdir(parents=True, exist_ok=True)
    kinds = list(itertools.product(COLOURS, SHAPES))
    for i in range(count):
        colour, shape = kinds[i % len(kinds)]
        draw(colour, shape, size, random.Random(i)).save(output / f"{i:05}.png")
        (output / f"{i:05}.txt").write_text(f"a {colour} {shape}\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=pathlib.Path, default="data/toy")
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--size", type=int, default=32)
    main(**vars(parser.parse_args()))
