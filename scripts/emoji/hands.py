"""How often what is nearest to a held-out drawing is of its hand, if its own picture may not be found.

usage: python scripts/emoji/hands.py GALLERY GENERATED
Folders as `judge_emoji.py` has them. Of the true picture of each held-out pair, and of what the model drew for it: the
share whose nearest picture is of the right hand, among all pictures but its own, and among those of other emoji alone.
The true pictures' share is what somebody reaches who draws in that hand without a fault, but knows none of the
drawings that are asked for: the judge finds the same emoji by another hand, where that is drawn alike.
"""

import pathlib
import sys

import numpy as np
from judge_emoji import describe, held_out
from PIL import Image

HALF = 512  # numbers of a description that are gradients; the rest are colours


def read(path: pathlib.Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB").resize((128, 128), Image.Resampling.LANCZOS))


def of_unit_length(described: np.ndarray) -> np.ndarray:
    halves = described[:, :HALF], described[:, HALF:]
    return np.concatenate([half / np.linalg.norm(half, axis=1, keepdims=True) for half in halves], axis=1)


def main(gallery: pathlib.Path, generated: pathlib.Path) -> dict[str, float]:
    """Prints and gives the four shares."""
    files = sorted(gallery.glob("*/*.png"))
    hands, emoji = (np.array(names) for names in zip(*((f.parent.name, f.stem) for f in files), strict=True))
    rows = {name: row for row, name in enumerate(zip(hands, emoji, strict=True))}
    hands_of: dict[str, set[str]] = {}
    for hand, one in rows:
        hands_of.setdefault(one, set()).add(hand)
    described = describe(np.stack([read(f) for f in files]))
    mean = described.mean(axis=0)
    described = of_unit_length(described - mean)

    drawn = {(f.parent.name, f.stem.split(".")[0]): f for f in sorted(generated.glob("*/*.png"))}
    pairs = [(hand, one) for hand, one in drawn if held_out(one, hand, hands_of)]
    own = np.array([rows[pair] for pair in pairs])
    asked = {
        "true": described[own],
        "drawn": of_unit_length(describe(np.stack([read(drawn[pair]) for pair in pairs])) - mean),
    }
    shares = {}
    for what, queries in asked.items():
        nearness = queries @ described.T
        for left, out in (
            ("all but its own picture", np.arange(len(rows)) == own[:, None]),
            ("other emoji", emoji == emoji[own][:, None]),
        ):
            nearest = np.where(out, -np.inf, nearness).argmax(axis=1)
            shares[f"{what}, {left}"] = float((hands[nearest] == hands[own]).mean())
    for name, share in shares.items():
        print(f"{len(pairs)} held-out pairs, {name:32} right hand {share:.3f}")
    return shares


if __name__ == "__main__":
    main(*map(pathlib.Path, sys.argv[1:3]))
