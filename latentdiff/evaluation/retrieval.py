"""Whether what was drawn is nearest to its own picture, of all pictures of a data set.

A picture is described by oriented gradients and mean colours of 8 x 8 cells; both halves, less the data set's mean,
have unit length, and nearness is the inner product.
Reference: Dalal and Triggs 2005, "Histograms of oriented gradients for human detection", for the gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

CELLS, ORIENTATIONS = 8, 8


@dataclass(frozen=True)
class Retrieval:
    """How often a drawing's own picture is the nearest.

    Attributes:
        nearest: share of drawings whose own picture is the nearest of all.
        in_five: share of those where it is among the five nearest.
        median_rank: how many pictures are nearer, in the middle of all drawings; 0 is the best.
        chance: what `nearest` would be of drawings that know nothing.
    """

    nearest: float
    in_five: float
    median_rank: float
    chance: float


class Gallery:
    """Pictures to find drawings among, described once.

    Args:
        images: uint8 (N, H, W, 3), H and W multiples of 8.

    Raises:
        ValueError: H or W is no multiple of 8.
    """

    def __init__(self, images: np.ndarray):
        self.size = images.shape[1:]
        described = describe(images)
        self._mean = described.mean(axis=0)
        self._described = _unit(described - self._mean)  # (N, 704)

    def find(self, drawn: np.ndarray, own: np.ndarray) -> Retrieval:
        """Retrieval of drawings.

        Args:
            drawn: uint8 (M, H, W, 3).
            own: int (M,), the row in the gallery of the picture that each drawing should be.

        Raises:
            ValueError: the drawings have another size.
        """
        if self.size != drawn.shape[1:]:
            raise ValueError(f"Drawings must have the gallery's size. Received: {drawn.shape[1:]}, {self.size}.")
        nearness = _unit(describe(drawn) - self._mean) @ self._described.T  # (M, N)
        rank = (nearness > nearness[np.arange(len(own)), own][:, None]).sum(axis=1)
        return Retrieval(
            float((rank == 0).mean()), float((rank < 5).mean()), float(np.median(rank)), 1 / len(self._described)
        )


def describe(images: np.ndarray) -> np.ndarray:
    """uint8 (N, H, W, 3) -> float32 (N, 704): gradients of 64 cells in 8 directions, then their mean colours."""
    height, width = images.shape[1:3]
    if height % CELLS or width % CELLS:
        raise ValueError(f"Height and width must be multiples of {CELLS}. Received: {height}, {width}.")
    return np.concatenate([_describe(images[i : i + 64]) for i in range(0, len(images), 64)])


def _describe(images: np.ndarray) -> np.ndarray:
    colour = images.astype("float32") / 255
    grey = colour.mean(axis=-1)
    across = np.diff(grey, axis=2, append=grey[:, :, -1:])
    down = np.diff(grey, axis=1, append=grey[:, -1:])
    strength = np.hypot(across, down)
    direction = (np.arctan2(down, across) % np.pi) * (ORIENTATIONS / np.pi)
    # A gradient between two directions counts for both, by its nearness.
    apart = np.abs(
        (direction[..., None] - np.arange(ORIENTATIONS) + ORIENTATIONS / 2) % ORIENTATIONS - ORIENTATIONS / 2
    )
    gradients = np.sqrt(_cells(strength[..., None] * np.clip(1 - apart, 0, None)).reshape(len(images), -1))
    gradients /= np.sqrt((gradients**2).sum(axis=1, keepdims=True) + 1e-3)
    size = images.shape[1] * images.shape[2] / CELLS**2
    return np.concatenate([gradients, _cells(colour).reshape(len(images), -1) / size], axis=1)


def _cells(x: np.ndarray) -> np.ndarray:
    """Sums over the cells: (N, H, W, C) -> (N, 8, 8, C)."""
    count, height, width, channels = x.shape
    return x.reshape(count, CELLS, height // CELLS, CELLS, width // CELLS, channels).sum(axis=(2, 4))


def _unit(described: np.ndarray) -> np.ndarray:
    """Both halves at unit length."""
    halves = np.split(described, [CELLS**2 * ORIENTATIONS], axis=1)
    return np.concatenate([half / (np.linalg.norm(half, axis=1, keepdims=True) + 1e-12) for half in halves], axis=1)
