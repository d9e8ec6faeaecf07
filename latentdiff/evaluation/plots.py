"""What a report shows: sheets of pictures, the losses of a run, and bars; matplotlib is imported when it is needed."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 12  # pictures of a sheet's row


def sheet(rows: Iterable[Iterable[np.ndarray]]) -> Image.Image:
    """Rows of as many pictures each, uint8 (H, W, 3), as one picture."""
    return Image.fromarray(np.concatenate([np.concatenate(list(row), axis=1) for row in rows]))


def bars_by_t(values: Sequence[float]) -> Figure:
    """The loss in as many equal parts of t / T."""
    figure, axes = _empty()
    count = len(values)
    axes.bar((np.arange(count) + 0.5) / count, values, width=0.9 / count)
    axes.set(xlabel="t / T", ylabel="loss")
    return figure


def losses_of_run(model: Path) -> np.ndarray | None:
    """(steps, losses) of the run whose `model/` this is, float64 (2, steps); None where it is no run's."""
    path = model.resolve().parent / "losses.csv"
    if model.name != "model" or not path.is_file():
        return None
    with path.open(newline="", encoding="utf-8") as file:
        rows = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
    return np.array(rows).T if rows else None


def curve(losses: np.ndarray) -> Figure:
    """The loss of every batch, and its moving average.

    Args:
        losses: (2, steps), as `losses_of_run` gives them.
    """
    steps, loss = losses
    width = max(1, len(loss) // 50)
    smooth = np.convolve(loss, np.ones(width) / width, mode="valid")
    low, high = np.quantile(loss, (0.01, 0.99))
    figure, axes = _empty()
    axes.plot(steps, loss, alpha=0.25, linewidth=0.5)
    axes.plot(steps[width - 1 :], smooth)
    axes.set(xlabel="batch", ylabel="loss", ylim=(min(0.0, float(low) * 1.1), float(high) * 1.1))
    return figure


def _empty():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    return figure, figure.subplots()
