"""Batches by their step: a `keras.utils.PyDataset` of which each batch is a function of (seed, step) alone.

So a run that is killed goes on with `first_step` where it was, and any step can be looked at again with `batch_at`. Any
other `PyDataset` or `tf.data.Dataset` that gives the same dictionaries can be handed to `fit` in its place.
"""

import threading
import warnings
from typing import Any

import keras
import numpy as np

from latentdiff.data.draws import CAPTION, integers
from latentdiff.data.order import Order

Batch = dict[str, Any]


class OrderWarning(UserWarning):
    """Batches were asked for in another order than the run's."""


class Steps(keras.utils.PyDataset):
    """What the data sets of this package share: the order of examples, the slice of a process, and where a run stands.

    Hand it to `fit` with `shuffle=False`. It has one worker, as reading ahead is its own business.

    Args:
        order: which examples a step holds.
        first_step: the step of the run that this begins with.
        steps: the step of the run that this ends before; None is the end of the epoch that `first_step` lies in.
        shard_index, num_shards: which slice of each batch this process takes: the rows from
            `shard_index * B / num_shards` on.

    Raises:
        ValueError: the run would have no step, or `num_shards` does not divide the batch.
    """

    def __init__(self, order: Order, *, first_step: int = 0, steps: int | None = None, shard_index=0, num_shards=1):
        super().__init__()
        if num_shards < 1 or order.batch_size % num_shards:
            rule = "`batch_size` must be a multiple of `num_shards`"
            raise ValueError(f"{rule}. Received: batch_size={order.batch_size}, num_shards={num_shards}.")
        if not 0 <= shard_index < num_shards:
            rule = "`shard_index` must be from 0 to num_shards - 1"
            raise ValueError(f"{rule}. Received: shard_index={shard_index}, num_shards={num_shards}.")
        self.first_step = first_step
        self.steps = order.first_step(order.epoch_of(first_step) + 1) if steps is None else steps
        if not 0 <= first_step < self.steps:
            rule = "`first_step` must be from 0 to steps - 1"
            raise ValueError(f"{rule}. Received: first_step={first_step}, steps={self.steps}.")
        self.order = order
        each = order.batch_size // num_shards
        self._lock, self._next, self._warned = threading.Lock(), 0, False
        self._slots = np.arange(shard_index * each, (shard_index + 1) * each)

    @property
    def steps_per_epoch(self) -> int:
        """Steps in which each example is seen once, within a batch of each bucket."""
        return self.order.steps_per_epoch

    def __len__(self) -> int:
        return self.steps - self.first_step

    def __getitem__(self, index: int) -> tuple[Batch]:
        if not 0 <= index < len(self):
            raise IndexError(f"`index` must be from 0 to {len(self) - 1}. Received: index={index}.")
        with self._lock:
            # Keras looks at the first two batches before it begins.
            if index not in (0, 1, self._next - 1, self._next) and not self._warned:
                self._warned = True
                rule = "Steps are asked for out of their order, so this run is no function of its seed"
                warnings.warn(f"{rule}. Call `fit` with shuffle=False.", OrderWarning, stacklevel=2)
            batch = self._read(index, follows=index == self._next)
            self._next = index + 1
        return (batch,)

    def on_epoch_begin(self) -> None:
        """Keras' own; refuses what TensorFlow would stumble over some steps later."""
        if len(self.order.buckets) > 1 and keras.backend.backend() == "tensorflow":
            rule = "On TensorFlow batches of several sizes reach `fit` through `latentdiff.data.to_tf_dataset`"
            raise ValueError(f"{rule}. Received: a data set of {len(self.order.buckets)} buckets.")

    def _read(self, index: int, follows: bool) -> Batch:
        """The batch of a place in this data set; `follows` where the one before it was the last that was read."""
        return self.batch_at(self.first_step + index)

    def batch_at(self, step: int) -> Batch:
        """The batch of any step of the run, this process's slice of it."""
        raise NotImplementedError


def chosen_captions(counts: np.ndarray, seed: int, step: int, slots: np.ndarray) -> np.ndarray:
    """Which caption of each example a step shows: int64, as many as slots.

    Args:
        counts: captions of the examples in these slots.
        seed: of the run.
        step: of the run.
        slots: places in the batch of all processes.
    """
    return integers(counts, seed, CAPTION, step, slots)
