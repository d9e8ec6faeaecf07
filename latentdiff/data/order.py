"""Which examples a step trains on: each epoch shuffles every bucket anew and then the buckets' batches.

The pictures of a bucket form one endless stream, shuffled pass by pass, and batches are cut from it one after the
other. So batches are full, nothing is left out at the end of a pass, and with n pictures in a bucket the batches of
epoch e are those that end within the pictures e n + 1 .. (e + 1) n of its stream.
"""

from bisect import bisect_right
from functools import lru_cache

import numpy as np

from latentdiff.data.draws import ORDER, TURN, shuffled


class Order:
    """The map step -> (bucket, rows), without state.

    Args:
        buckets: int (N,), the bucket of each example.
        batch_size: B, of all processes together.
        seed: of the shuffles.

    Attributes:
        buckets: those that have examples.
        steps_per_epoch: steps in which nearly all examples are seen once: at most one batch a bucket more or fewer.

    Raises:
        ValueError: there are fewer examples than a batch holds, or `batch_size` is not positive.
    """

    def __init__(self, buckets: np.ndarray, batch_size: int, seed: int):
        buckets = np.asarray(buckets)
        if not 1 <= batch_size <= len(buckets):
            rule = "`batch_size` must be from 1 to the number of examples"
            raise ValueError(f"{rule}. Received: batch_size={batch_size}, examples={len(buckets)}.")
        self.batch_size, self.seed = batch_size, seed
        self.buckets = [int(name) for name in np.unique(buckets)]
        self._members = [np.flatnonzero(buckets == name) for name in self.buckets]
        self._counts = np.array([len(members) for members in self._members], "int64")
        self.steps_per_epoch = max(1, len(buckets) // batch_size)
        self._turns = lru_cache(4)(self._turns_of)

    def at(self, step: int) -> tuple[int, np.ndarray]:
        """The bucket of a step, from 0, and the rows of its examples, int64 (B,)."""
        if step < 0:
            raise ValueError(f"`step` must be 0 or more. Received: step={step}.")
        epoch = self.epoch_of(step)
        turns = self._turns(epoch)
        place = step - self.first_step(epoch)
        turn = turns[place]
        batch = int(self._batches_before(epoch)[turn]) + int(np.count_nonzero(turns[:place] == turn))
        positions = batch * self.batch_size + np.arange(self.batch_size)
        return self.buckets[turn], self._members[turn][self._stream(turn, positions)]

    def first_step(self, epoch: int) -> int:
        """The first step of an epoch."""
        return int(self._batches_before(epoch).sum())

    def epoch_of(self, step: int) -> int:
        """The epoch that a step belongs to: the last one that begins at it or before."""
        # With B pictures or more each epoch has a step, but for rounding in every bucket: search past that.
        bound = (step + 1 + len(self.buckets)) * self.batch_size // int(self._counts.sum()) + 2
        return bisect_right(range(bound), step, key=self.first_step) - 1

    def _batches_before(self, epoch: int) -> np.ndarray:
        """Batches of each bucket that end before an epoch does begin."""
        return epoch * self._counts // self.batch_size

    def _turns_of(self, epoch: int) -> np.ndarray:
        """The bucket of each step of an epoch, as a place in the list of buckets."""
        counts = self._batches_before(epoch + 1) - self._batches_before(epoch)
        turns = np.repeat(np.arange(len(counts)), counts)
        return turns[shuffled(np.arange(len(turns)), len(turns), self.seed, TURN, epoch)] if len(turns) else turns

    def _stream(self, turn: int, positions: np.ndarray) -> np.ndarray:
        """Members of a bucket at these positions of its stream."""
        count = int(self._counts[turn])
        passes, places = np.divmod(positions, count)
        found = np.empty_like(places)
        for each in np.unique(passes):
            here = passes == each
            found[here] = shuffled(places[here], count, self.seed, ORDER, self.buckets[turn], int(each))
        return found
