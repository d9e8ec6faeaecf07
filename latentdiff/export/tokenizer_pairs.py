"""Byte pairs merged in a graph: of each word's pairs the one that is first among the merges, again and again.

Sennrich et al. 2016, algorithm 1, arXiv:1508.07909.
"""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from latentdiff.export.tokenizer_tables import PairTable, repeats, selected, stored
from latentdiff.export.tokenizer_unicode import CODES, MARKS, byte_characters

__all__ = ["BytePairs"]

_TOKEN = 2**31 - 1
_FIRST = 2**31
_PLACE = 2**32 - 1
_NO_RANK = 2**62


class BytePairs(tf.Module):
    """Words of code points -> tokens.

    Args:
        vocabulary: Tokens to ids, in the byte-level alphabet; "</w>" ends a word.
        merges: Pairs of tokens, the first to be merged first.
        unknown_id: Stands for bytes that the vocabulary lacks.
        added_ids: The token of each mark: of CODES, CODES + 1, ...
        name: The variables' name.
    """

    def __init__(
        self,
        vocabulary: dict[str, int],
        merges: Sequence[tuple[str, str]],
        unknown_id: int,
        added_ids: Sequence[int],
        *,
        name: str = "byte_pairs",
    ):
        super().__init__(name=name)
        # of merges that come twice the later counts, as in the engine
        ranks = {(vocabulary[left], vocabulary[right]): rank << 32 for rank, (left, right) in enumerate(merges)}
        self._ranks = PairTable(ranks, _NO_RANK, dtype="int64", name="merge_ranks")
        merged = [vocabulary[left + right] for left, right in merges]
        self._merged = stored(np.array(merged, "int64"), "merged")

        first_tokens = np.full(2 * 256 + MARKS, unknown_id, "int32")  # of bytes, of bytes that end words, of marks
        for byte, character in byte_characters().items():
            first_tokens[byte] = vocabulary.get(character, unknown_id)
            first_tokens[256 + byte] = vocabulary.get(character + "</w>", unknown_id)
        first_tokens[512 : 512 + len(added_ids)] = added_ids
        self._first_tokens = stored(first_tokens, "first_tokens")

    def __call__(self, codes: tf.Tensor, word: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """The tokens of words.

        Args:
            codes: int32 (N,), code points; a mark is a word for itself.
            word: int32 (N,), the words' numbers, from 0 without a gap, ascending.

        Returns:
            int32 (M,) tokens, and int32 (M,) the word that each belongs to.
        """
        place, word = _bytes(codes, word)
        return self._merge(tf.gather(self._first_tokens, place), word)

    def _merge(self, tokens: tf.Tensor, word: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        # an item is one number: its word, whether it is the word's first, its token; one more ends the last word
        words = tf.reduce_max(tf.concat([word, [-1]], axis=0)) + 1
        tokens, word = (
            tf.cast(tf.concat([values, [end]], axis=0), tf.int64) for values, end in ((tokens, 0), (word, words))
        )
        is_first = tf.concat([[True], word[1:] != word[:-1]], axis=0)
        items = word * 2**32 + tf.where(is_first, tokens + _FIRST, tokens)

        def ranks(left, right):
            # no pair has a right part that is a word's first
            return self._ranks((left & _TOKEN) * 2**32 + (right & (_FIRST | _TOKEN)))

        def step(items, ranked):
            # the lowest rank and, of those, the leftmost place, as one number; at most one pair a word
            size = tf.size(items, tf.int64)
            best = tf.math.unsorted_segment_min(ranked + tf.range(size), tf.bitwise.right_shift(items, 32), words + 1)
            best = selected(best, best < _NO_RANK)
            at = best & _PLACE
            merged = tf.gather(self._merged, tf.bitwise.right_shift(best, 32))
            items = tf.tensor_scatter_nd_update(items, at[:, None], (tf.gather(items, at) & ~_TOKEN) + merged)
            gone = tf.scatter_nd(at[:, None] + 1, tf.ones_like(at), [size])
            kept = tf.where(gone == 0)[:, 0]
            items, ranked = tf.gather(items, kept), tf.gather(ranked, kept)

            at -= tf.range(tf.size(at, tf.int64))  # as many are gone before it
            changed = tf.concat([tf.maximum(at - 1, 0), at], axis=0)
            new = ranks(tf.gather(items, changed), tf.gather(items, changed + 1))
            return items, tf.tensor_scatter_nd_update(ranked, changed[:, None], new)

        some = tf.TensorShape([None])
        ranked = tf.concat([ranks(items[:-1], items[1:]), [_NO_RANK]], axis=0)
        items, _ = tf.while_loop(
            lambda items, ranked: tf.reduce_any(ranked < _NO_RANK), step, (items, ranked), shape_invariants=(some, some)
        )
        items = items[:-1]
        return tf.cast(items & _TOKEN, tf.int32), tf.cast(tf.bitwise.right_shift(items, 32), tf.int32)


def _bytes(codes: tf.Tensor, word: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """UTF-8's bytes, plus 256 where they end words, and 512 plus its number for a mark; and their words."""
    lengths = tf.reduce_sum(tf.cast(codes[:, None] >= [0, 0x80, 0x800, 0x10000], tf.int32), axis=1)
    lengths = tf.where(codes >= CODES, 1, lengths)
    source, within = repeats(lengths)
    ends = tf.concat([word[1:] != word[:-1], [True]], axis=0)[: tf.size(word)]

    codes, length = tf.gather(codes, source), tf.gather(lengths, source)
    sixes = tf.bitwise.right_shift(codes, 6 * (length - 1 - within))
    lead = tf.gather([0, 0, 0xC0, 0xE0, 0xF0], length) + sixes
    byte = tf.where(within == 0, lead, 0x80 + (sixes & 0x3F))
    last = tf.gather(ends, source) & (within == length - 1)
    place = tf.where(codes >= CODES, 512 + codes - CODES, byte + 256 * tf.cast(last, tf.int32))
    return place, tf.gather(word, source)
