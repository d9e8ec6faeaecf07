"""Cached latents with tokens or contexts -> batches, functions of (seed, step) alone."""

from collections.abc import Sequence

import numpy as np

from latentdiff.data.cache import Cache
from latentdiff.data.draws import FLIP, NOISE, normal, uniform
from latentdiff.data.order import Order
from latentdiff.data.steps import Batch, Steps, chosen_captions


class CachedLatents(Steps):
    """Batches of a cache's latents and captions, a function of (seed, step) alone.

    Args:
        cache: see `make_cache`.
        batch_size: B, of all processes together.
        scaling_factor: what latents are multiplied by, the autoencoder's.
        shift_factor: what is taken off before that.
        rows: the examples that are shown, such as a part of a split; one that is named twice is seen twice an epoch.
            None is all.
        seed: of the order, the flips, the choice among an example's captions, and the draws from the posterior.
        first_step, steps, shard_index, num_shards: as `Steps`.

    Batches:
        "latent": float32 (B, h, w, c), scaled: the posterior's mean, or with `cache.moments` a draw from it; with
            `cache.flip` that of every other picture mirrored, where its chosen caption names no side.
        "tokens": int32 (B, S), or "context": float32 (B, S, D), where the cache has them.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        cache: Cache,
        batch_size: int,
        *,
        scaling_factor: float,
        shift_factor: float = 0.0,
        rows: Sequence[int] | np.ndarray | None = None,
        seed: int = 0,
        first_step: int = 0,
        steps: int | None = None,
        shard_index: int = 0,
        num_shards: int = 1,
    ):
        self.cache, self.seed = cache, seed
        self.rows = np.arange(len(cache)) if rows is None else np.asarray(rows)
        self.scaling_factor, self.shift_factor = scaling_factor, shift_factor
        order = Order(cache.buckets[self.rows], batch_size, seed)
        super().__init__(order, first_step=first_step, steps=steps, shard_index=shard_index, num_shards=num_shards)

    def batch_at(self, step: int) -> Batch:
        """The batch of any step of the run, this process's slice of it."""
        _, places = self.order.at(step)
        rows = self.rows[places[self._slots]]
        first, end = self.cache.first_captions[rows], self.cache.first_captions[rows + 1]
        captions = first + chosen_captions(end - first, self.seed, step, self._slots)
        mirrored = None
        if self.cache.flip:
            mirrored = (uniform(self.seed, FLIP, step, self._slots) < 0.5) & ~self.cache.name_sides(captions)
        latent = self.cache.latents(rows, mirrored)
        if self.cache.moments:
            mean, log_variance = np.split(latent, 2, axis=-1)
            eps = np.stack([normal(mean.shape[1:], self.seed, NOISE, step, int(slot)) for slot in self._slots])
            latent = mean + np.exp(0.5 * np.clip(log_variance, -30.0, 20.0)) * eps
        batch = {"latent": (latent - np.float32(self.shift_factor)) * np.float32(self.scaling_factor)}
        if self.cache.text is not None:
            batch[self.cache.text] = self.cache.texts(captions)
        return batch
