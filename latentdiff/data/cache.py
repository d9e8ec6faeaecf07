"""Latents, tokens and contexts of a whole data set, kept on disk; opened here, made by `make_cache`.

A cache is a directory of `.npy` shards, which are memory-mapped, and a `manifest.json`: the key, its parts, and the
shape of every shard.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from latentdiff.checkpoints.files import read_json

MANIFEST = "manifest.json"
SHARD_LENGTH = 1024
"""Rows of a shard, but for the last one of its kind."""


class StaleCacheError(ValueError):
    """A cache was made of other data, other weights or by other preprocessing than what is wanted now."""


class Cache:
    """A whole cache, open to be read.

    Whether it is the right one is `make_cache`'s to say, which knows the data and the networks.

    Args:
        directory: that `make_cache` has written.

    Attributes:
        manifest: what the file says.
        sizes: (H, W) of each bucket.
        buckets: int64 (N,), the bucket of each example.
        first_captions: int64 (N + 1,): example i has the captions first_captions[i] .. first_captions[i + 1] - 1.
        moments: whether the log variance is kept beside the mean.
        flip: whether the mirrored pictures' latents are kept too.
        text: "tokens", "context", or None where no captions are kept.

    Raises:
        FileNotFoundError: there is no manifest.
        ValueError: a shard is missing, cut off or of another shape.
    """

    def __init__(self, directory: str | os.PathLike):
        self.directory = Path(directory)
        self.manifest = read_json(self.directory / MANIFEST)
        self.sizes = [(int(height), int(width)) for height, width in self.manifest["buckets"]]
        self.moments, self.text = bool(self.manifest["moments"]), self.manifest["text"]
        self.flip = bool(self.manifest.get("flip"))  # not said by older ones
        self._shards = {name: self._open(name, tuple(shape)) for name, shape in self.manifest["shards"].items()}
        self.buckets, self.first_captions = self._shards["buckets"], self._shards["first_captions"]
        # The place of each example among those of its bucket.
        order = np.argsort(self.buckets, kind="stable")
        counts = np.bincount(self.buckets, minlength=len(self.sizes))
        self._places = np.empty(len(self), "int64")
        self._places[order] = np.arange(len(self)) - np.repeat(np.cumsum(counts) - counts, counts)

    def __len__(self) -> int:
        return len(self.buckets)

    def latents(self, rows: np.ndarray, mirrored: np.ndarray | None = None) -> np.ndarray:
        """What the encoder says of examples of one bucket, unscaled.

        Args:
            rows: int (B,).
            mirrored: bool (B,), whose left and right are exchanged, in a cache with `flip`; None is none.

        Returns:
            float32 (B, h, w, c), the posteriors' means; with `moments` (B, h, w, 2 c), means and log variances.
        """
        (bucket,) = np.unique(self.buckets[rows])
        mirrored = np.zeros(len(rows), bool) if mirrored is None else mirrored
        kinds = [f"{'mirrored' if exchanged else 'latents'}-{bucket}" for exchanged in mirrored]
        return self._rows(kinds, self._places[rows]).astype("float32")

    def name_sides(self, captions: np.ndarray) -> np.ndarray:
        """Whether captions, int (B,), forbid their pictures to be mirrored: bool (B,), in a cache with `flip`."""
        return self._shards["sided"][captions]

    def texts(self, captions: np.ndarray) -> np.ndarray:
        """Captions by their numbers, int (B,): tokens int32 (B, S), or contexts float32 (B, S, D)."""
        return self._rows([self.text] * len(captions), captions).astype("int32" if self.text == "tokens" else "float32")

    def empty_text(self) -> np.ndarray:
        """The empty caption, for what is trained without one: tokens int32 (S,), or its context float32 (S, D)."""
        return self.texts(self.first_captions[-1:])[0]

    def statistics(self, rows: np.ndarray | None = None) -> tuple[float, float]:
        """Mean and deviation of the posteriors' means, unscaled; a scaling factor is 1 / deviation.

        Args:
            rows: int, the examples that count; None is all.
        """
        rows = np.arange(len(self)) if rows is None else np.asarray(rows)
        total = squares = count = 0
        for bucket in np.unique(self.buckets[rows]):
            members = rows[self.buckets[rows] == bucket]
            for part in np.array_split(members, -(-len(members) // 256)):
                latent = self.latents(part).astype("float64")
                latent = latent[..., : latent.shape[-1] // 2] if self.moments else latent
                total, squares, count = total + latent.sum(), squares + (latent**2).sum(), count + latent.size
        mean = total / count
        return float(mean), float(np.sqrt(squares / count - mean**2))

    def _rows(self, kinds: Sequence[str], places: np.ndarray) -> np.ndarray:
        pairs = zip(kinds, places, strict=True)
        return np.stack([self._shards[f"{kind}-{p // SHARD_LENGTH:05}"][p % SHARD_LENGTH] for kind, p in pairs])

    def _open(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        path = self.directory / f"{name}.npy"
        rule = "a cache's shards must be as its manifest says"
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{rule}. Received: {str(path)!r}: {error}") from error
        if array.shape != shape:
            raise ValueError(f"{rule}. Received: {str(path)!r} of {array.shape}, not {shape}.")
        return array
