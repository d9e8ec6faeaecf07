"""Tells which part of the emoji model is the weakest, by pictures seen in training that are not among the judged.

usage: python scripts/emoji/weakest.py [--preset emoji] [--count 100] [--data data/emoji] [--output runs/emoji_weakest]

OUTPUT/weakest.csv has a row for each guidance scale and number of steps: how often a picture's own drawing is the
nearest of all, and how often it is among the five nearest. The row of no steps is of the true pictures, encoded and
decoded, which no drawing by this model can beat but by chance; the others are drawn from the captions.
OUTPUT/weakest.png is the plot. Rows that are there are not drawn again; those of another model are removed.
"""

import argparse
import csv
import pathlib

import numpy as np
from captions import canonical_caption
from draw import digest_of, hash_of
from matplotlib.figure import Figure
from PIL import Image
from records import Record, read_index

import latentdiff as ld
from latentdiff.backend import to_numpy
from latentdiff.data.decode import in_model_range
from latentdiff.evaluation.retrieval import Gallery

JUDGED = 500
GUIDANCE = (1.0, 2.0, 3.0, 5.0, 8.0)
STEPS = (5, 10, 25)
USUAL = (5.0, 25)  # guidance and steps, where the other one is looked at
AUTOENCODER = (0.0, 0)
BATCH = 25
Key = tuple[float, int]


def reconstructed(pipe: ld.TextToImage, images: np.ndarray) -> np.ndarray:
    """uint8 (B, H, W, 3) -> the same through the autoencoder."""
    parts = []
    for start in range(0, len(images), BATCH):
        image = in_model_range(images[start : start + BATCH])
        parts.append(to_numpy(pipe.image(pipe.autoencoder.encode(image))))
    return np.concatenate(parts)


def drawn(pipe: ld.TextToImage, records: list[Record], key: Key) -> np.ndarray:
    """uint8 (B, H, W, 3), one picture of each record's caption, seed 0."""
    prompts = [canonical_caption(record) for record in records]
    seeds = [0] * len(prompts)
    return pipe.generate(prompts, "", 1, key[1], key[0], seeds, batch_size=BATCH, progress=False)


def plot(rows: dict[Key, tuple[float, float]], path: pathlib.Path) -> None:
    figure = Figure(figsize=(8, 3), layout="constrained")
    curves = {
        "guidance scale": {scale: rows[scale, USUAL[1]] for scale in GUIDANCE},
        "sampler's steps": {steps: rows[USUAL[0], steps] for steps in STEPS},
    }
    for axes, (name, curve) in zip(figure.subplots(1, 2, sharey=True), curves.items(), strict=True):
        for label, column in (("nearest of all", 0), ("among the five nearest", 1)):
            shares = [100 * each[column] for each in curve.values()]
            (line,) = axes.plot(list(curve), shares, marker="o", label=label)
            axes.axhline(100 * rows[AUTOENCODER][column], color=line.get_color(), linestyle=":")
        axes.set(xlabel=name, ylim=(0, 102))
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("% of pictures")
    figure.axes[0].legend(
        title="dotted: the true pictures, encoded and decoded", title_fontsize=8, fontsize=8, loc="lower right"
    )
    figure.savefig(path, dpi=120)


def read(path: pathlib.Path) -> dict[Key, tuple[float, float]]:
    if not path.exists():
        return {}
    with path.open(newline="", encoding="utf-8") as file:
        return {
            (float(row["guidance"]), int(row["steps"])): (float(row["nearest"]), float(row["in_five"]))
            for row in csv.DictReader(file)
        }


def main(data: pathlib.Path, preset: str, count: int, output: pathlib.Path) -> None:
    everything = read_index(data / "index.jsonl")
    order = sorted(range(len(everything)), key=lambda i: hash_of(everything[i]))
    seen = [i for i in order if not (everything[i].held_out or everything[i].validation)]
    chosen = seen[JUDGED : JUDGED + count]
    records = [everything[i] for i in chosen]
    paths = [data / "gallery" / r.style / f"{r.codepoints}.png" for r in everything]
    images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])
    true, gallery = images[chosen], Gallery(images)
    pipe = ld.TextToImage.from_preset(preset)
    output.mkdir(parents=True, exist_ok=True)
    table, stamp = output / "weakest.csv", output / "model.sha256"
    judged = f"{digest_of(preset)} {count}"
    if not stamp.exists() or stamp.read_text() != judged:
        table.unlink(missing_ok=True)
        stamp.write_text(judged)
    rows = read(table)
    for key in [AUTOENCODER, *((scale, USUAL[1]) for scale in GUIDANCE), *((USUAL[0], steps) for steps in STEPS)]:
        if key in rows:
            continue
        images = reconstructed(pipe, true) if key == AUTOENCODER else drawn(pipe, records, key)
        found = gallery.find(images, np.array(chosen))
        rows[key] = (found.nearest, found.in_five)
        new = not table.exists()
        with table.open("a", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["guidance", "steps", "nearest", "in_five"])
            writer.writerow([*key, *rows[key]])
        print(f"{key}: nearest {found.nearest:.3f}, in five {found.in_five:.3f}", flush=True)
    plot(rows, output / "weakest.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, default="data/emoji")
    parser.add_argument("--preset", default="emoji")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--output", type=pathlib.Path, default="runs/emoji_weakest")
    main(**vars(parser.parse_args()))
