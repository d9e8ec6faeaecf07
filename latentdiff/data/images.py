"""Captioned pictures -> batches: resized, cropped and mirrored as (seed, step) says, and read ahead through Grain."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from latentdiff.data.buckets import full_buckets
from latentdiff.data.captions import SIDE_WORDS, names_side
from latentdiff.data.decode import BrokenPicture, decode_crop, in_model_range
from latentdiff.data.draws import CROP_X, CROP_Y, FLIP, uniform
from latentdiff.data.examples import Index
from latentdiff.data.order import Order
from latentdiff.data.sources import read_picture
from latentdiff.data.steps import Batch, Steps, chosen_captions


@dataclass(frozen=True)
class Plan:
    """What a batch shows, before a picture is read.

    Attributes:
        size: (H, W) of its pictures.
        rows: int (B,), rows of the index.
        captions: the chosen one of each.
        places: float (B, 2) in [0, 1], where in the margin each crop lies.
        flips: bool (B,), which pictures are mirrored.
    """

    size: tuple[int, int]
    rows: np.ndarray
    captions: list[str]
    places: np.ndarray
    flips: np.ndarray


class CaptionedImages(Steps):
    """Batches of pictures and captions, a function of (seed, step) alone.

    Args:
        index: the examples; see `index_source`.
        batch_size: B, of all processes together.
        buckets: (H, W) of the sizes; each picture has the one of the nearest aspect ratio, and a batch one size. Those
            that fewer than B pictures have chosen are given up.
        tokenizer: prompts -> int32 (B, S); None leaves the captions text.
        captions: whether batches have them; an autoencoder is trained without.
        seed: of the order, the crops, the flips and the choice among an example's captions.
        crop: "random", or "centre".
        zoom: at least 1: the picture is resized to cover so many times the size, and then cropped.
        flip: whether every other picture is mirrored, where its chosen caption names no side.
        side_words: words that forbid it, in lower case.
        first_step, steps, shard_index, num_shards: as `Steps`.
        threads: that read and decode; 0 reads each batch when it is asked for.
        ahead: batches that are read before they are asked for.

    Batches:
        "image": float32 (B, H, W, 3) in [-1, 1].
        "tokens": int32 (B, S), with a tokenizer; else "text": str (B,), which is not for `fit`.

    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self,
        index: Index,
        batch_size: int,
        *,
        buckets: Sequence[tuple[int, int]],
        tokenizer: Callable[[list[str]], np.ndarray] | None = None,
        captions: bool = True,
        seed: int = 0,
        crop: str = "random",
        zoom: float = 1.0,
        flip: bool = False,
        side_words: Collection[str] = SIDE_WORDS,
        first_step: int = 0,
        steps: int | None = None,
        shard_index: int = 0,
        num_shards: int = 1,
        threads: int = 2,
        ahead: int = 2,
    ):
        if crop not in ("random", "centre"):
            raise ValueError(f'`crop` must be "random" or "centre". Received: crop={crop!r}.')
        if not zoom >= 1:
            raise ValueError(f"`zoom` must be at least 1. Received: zoom={zoom}.")
        chosen = full_buckets(index.heights, index.widths, buckets, batch_size)
        order = Order(chosen, batch_size, seed)
        super().__init__(order, first_step=first_step, steps=steps, shard_index=shard_index, num_shards=num_shards)
        self.index, self.tokenizer, self.captions, self.seed = index, tokenizer, captions, seed
        self.buckets = [(int(height), int(width)) for height, width in buckets]
        self.crop, self.zoom, self.flip, self.side_words = crop, zoom, flip, side_words
        self.threads, self.ahead = threads, ahead
        self._plan = lru_cache(ahead + 2)(self.plan_at)
        self._reader: Any = None

    def plan_at(self, step: int) -> Plan:
        """What the batch of a step shows, this process's slice of it."""
        bucket, rows = self.order.at(step)
        slots, rows = self._slots, rows[self._slots]
        examples = [self.index[row] for row in rows]
        counts = np.array([len(example.captions) for example in examples])
        choices = chosen_captions(counts, self.seed, step, slots)
        captions = [example.captions[choice] for example, choice in zip(examples, choices, strict=True)]
        places = np.full((len(slots), 2), 0.5)
        if self.crop == "random":
            places = np.stack([uniform(self.seed, axis, step, slots) for axis in (CROP_Y, CROP_X)], axis=1)
        flips = np.zeros(len(slots), bool)
        if self.flip:
            free = np.array([not names_side(caption, self.side_words) for caption in captions])
            flips = free & (uniform(self.seed, FLIP, step, slots) < 0.5)
        return Plan(self.buckets[bucket], rows, captions, places, flips)

    def batch_at(self, step: int) -> Batch:
        """The batch of any step of the run, this process's slice of it.

        Raises:
            BrokenPicture: a file has changed since it was indexed, and is no picture any more.
        """
        plan = self._plan(step)
        return self._batch(plan, [self._picture(plan, slot) for slot in range(len(plan.rows))])

    def on_epoch_end(self) -> None:
        """Keras' own; lets go of the reading threads at the end of the run."""
        if self._next == len(self):  # an epoch of `steps_per_epoch` ends before
            self.close()

    def close(self) -> None:
        """Lets go of the reading threads; the next batch that is asked for starts others."""
        with self._lock:
            self._stop()

    def _read(self, index: int, follows: bool) -> Batch:
        if self.threads < 1 or self.ahead < 1:
            return self.batch_at(self.first_step + index)
        reader = self._reader if self._reader is not None and follows else self._start(index)
        try:
            pictures = [next(reader) for _ in self._slots]
        except BaseException:
            self._stop()  # it stands within a batch
            raise
        return self._batch(self._plan(self.first_step + index), pictures)

    def _start(self, index: int) -> Iterator[np.ndarray]:
        """Begins to read ahead, from a place in this data set to its end."""
        import grain

        self._stop()
        count = len(self._slots)
        places = range(index * count, len(self) * count)
        # Grain's own buffer of 500 would read that many pictures before the first step, and throw them away at the end.
        options = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=self.ahead * count)
        self._reader = iter(grain.MapDataset.source(places).map(self._picture_at).to_iter_dataset(options))
        return self._reader

    def _stop(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _picture_at(self, place: int) -> np.ndarray:
        index, slot = divmod(place, len(self._slots))
        return self._picture(self._plan(self.first_step + index), slot)

    def _picture(self, plan: Plan, slot: int) -> np.ndarray:
        """uint8 (H, W, 3)."""
        example = self.index[plan.rows[slot]]
        try:
            place = (plan.places[slot, 0], plan.places[slot, 1])
            return decode_crop(read_picture(example), plan.size, place, plan.flips[slot], self.zoom)
        except BrokenPicture as error:
            rule = f"{example.name} was a picture when it was indexed, and is none now"
            raise BrokenPicture(f"{rule}: {error}") from error

    def _batch(self, plan: Plan, pictures: list[np.ndarray]) -> Batch:
        image = in_model_range(np.stack(pictures))
        if not self.captions:
            return {"image": image}
        if self.tokenizer is None:
            return {"image": image, "text": np.array(plan.captions, object)}
        return {"image": image, "tokens": np.asarray(self.tokenizer(plan.captions), "int32")}
