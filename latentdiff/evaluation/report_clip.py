"""What a CLIP pair is worth: whether a caption finds its own pictures among others, and a picture its own caption."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from latentdiff.backend import Compiled, to_numpy
from latentdiff.data.decode import in_model_range
from latentdiff.evaluation.pictures import Pictures, read_pictures
from latentdiff.evaluation.plots import SHOWN, sheet
from latentdiff.evaluation.report import Report
from latentdiff.models.tokenizer import CLIPTokenizer
from latentdiff.training.clip import CLIPTraining


@dataclass(frozen=True)
class Found:
    """How often what belongs together is found.

    Attributes:
        nearest: share of those that ask whose nearest belongs to them.
        in_five: share of those of whose five nearest one does.
        chance, chance_in_five: what the two would be of a pair that knows nothing.
    """

    nearest: float
    in_five: float
    chance: float
    chance_in_five: float


def clip_report(model: str | Path, pictures: Pictures, batch_size: int, tell: Callable[[str], Any]) -> Report:
    """Of a CLIPModel's directory; see `evaluate`. Figures: "text_to_image" and "image_to_text", a `Found` each.

    Equal captions are one, which asks once, and each of its pictures is right.
    """
    training, tokenizer = CLIPTraining.from_preset(model), CLIPTokenizer.from_preset(model)
    judged = read_pictures(pictures.judged, training.image_encoder.config["image_size"])
    tell(f"{len(judged)} pictures and their captions are compared")
    captions = [example.captions[0] for example in pictures.judged]
    images = _in_batches(Compiled(training.embed_image, [training]), in_model_range(judged), batch_size)
    texts = _in_batches(Compiled(training.embed_text, [training]), tokenizer(captions), batch_size)
    _, first, own = np.unique(captions, return_index=True, return_inverse=True)
    cosine = texts[first] @ images.T  # (captions, pictures)
    right = np.arange(len(first))[:, None] == own
    to_image, to_text = find(cosine, right), find(cosine.T, right.T)
    shown = slice(min(SHOWN, len(judged)))
    finds = judged[cosine.argmax(axis=1)[own[shown]]]
    return Report(
        {"captions": len(first), "text_to_image": asdict(to_image), "image_to_text": asdict(to_text)},
        [
            *_rows(f"the nearest picture to a caption, of {len(judged)}, is its own", to_image),
            *_rows(f"the nearest caption to a picture, of {len(first)}, is its own", to_text),
        ],
        [("nearest.png", "pictures, and which is the nearest to their captions", sheet([judged[shown], finds]).save)],
        note="Equal captions are one.",
    )


def find(nearness: np.ndarray, right: np.ndarray) -> Found:
    """How often the nearest is right. What is wrong and as near as the best of the right counts as nearer.

    Args:
        nearness: (N, M) of each that asks to each that is searched.
        right: bool (N, M), with one in each row or more: what belongs together.
    """
    best = np.where(right, nearness, -np.inf).max(axis=1, keepdims=True)
    nearer = (~right & ~(nearness < best)).sum(axis=1)
    return Found(float((nearer == 0).mean()), float((nearer < 5).mean()), _chance(right, 1), _chance(right, 5))


def _chance(right: np.ndarray, count: int) -> float:
    """How often one of the right is among so many that are drawn without looking."""
    total, wrong = right.shape[1], (~right).sum(axis=1)
    none = [np.maximum(wrong - i, 0) / (total - i) for i in range(min(count, total))]
    return float(1 - np.prod(none, axis=0).mean())


def _in_batches(embed: Compiled, rows: np.ndarray, batch_size: int) -> np.ndarray:
    """float32 (N, E) of unit length."""
    return np.concatenate([to_numpy(embed(rows[i : i + batch_size])) for i in range(0, len(rows), batch_size)])


def _rows(what: str, found: Found) -> list[tuple[str, str]]:
    return [
        (what, f"{found.nearest:.1%} (by chance {found.chance:.1%})"),
        ("one of the five nearest is", f"{found.in_five:.1%} (by chance {found.chance_in_five:.1%})"),
    ]
