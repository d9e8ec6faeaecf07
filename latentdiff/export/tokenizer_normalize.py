"""Normalized, lower-case text in a graph, on code points.

    NFC = compose(reorder(decompose(codes)))        Unicode Standard Annex 15, sections 1.2 and 1.3

All prompts of a batch are one sequence, in which marks that no text holds separate them.
"""

import numpy as np
import tensorflow as tf

from latentdiff.export.tokenizer_tables import CodeTable, PairTable, repeats, selected, stored
from latentdiff.export.tokenizer_unicode import CODES, UnicodeTables

__all__ = ["Normalizer"]

_COMBINING, _SECOND, _UNSTABLE = 0x3F, 0x40, 0x80


class Normalizer(tf.Module):
    """NFC and lower case, as the tokenizer's engine has them.

    Args:
        tables: What the engine makes of each code point.
        name: The variables' name.
    """

    def __init__(self, tables: UnicodeTables, *, name: str = "normalizer"):
        super().__init__(name=name)
        flags = tables.combining.astype("int32")
        flags[[second for _, second in tables.composed]] |= _SECOND
        flags[tables.unstable] |= _UNSTABLE
        self._flags = CodeTable(flags, 0, name="normal_flags")

        # a decomposition is its place among all of them, times 8, and its length; 0 is none
        places, parts = np.zeros(CODES, "int64"), []
        for code, decomposition in tables.decomposed.items():
            places[code] = len(parts) << 3 | len(decomposition)
            parts += decomposition
        self._decomposition = CodeTable(places, 0, name="decomposition")
        self._parts = stored(np.array(parts, "int32"), "decomposition_parts")
        self._composed = PairTable(tables.composed, -1, name="composed")
        # as differences, so that pages without a capital letter are alike
        self._lower = CodeTable(tables.lower[:, 0] - np.arange(CODES), 0, name="lower")
        self._lower_second = CodeTable(tables.lower[:, 1], -1, name="lower_second")

    def __call__(self, codes: tf.Tensor) -> tf.Tensor:
        """Normalized, lower-case codes.

        Args:
            codes: int32 (N,), code points and marks; the first is a mark.

        Returns:
            int32 (M,).
        """
        # most text is normalized: nothing in it can be changed, moved or composed
        codes = tf.cond(tf.reduce_any(self._flags(codes) > 0), lambda: self._nfc(codes), lambda: codes)
        pairs = tf.reshape(tf.stack([codes + self._lower(codes), self._lower_second(codes)], axis=1), [-1])
        return selected(pairs, pairs >= 0)

    def _nfc(self, codes: tf.Tensor) -> tf.Tensor:
        codes = self._decompose(codes)
        combining = self._flags(codes) & _COMBINING
        segment = tf.cumsum(tf.cast(combining == 0, tf.int64))  # a starter and the marks that follow it
        order = tf.argsort(segment * (_COMBINING + 1) + tf.cast(combining, tf.int64), stable=True)
        return self._compose(tf.gather(codes, order))

    def _decompose(self, codes: tf.Tensor) -> tf.Tensor:
        packed = self._decomposition(codes)
        length = tf.where(packed == 0, 1, packed & 7)
        source, within = repeats(length)
        packed = tf.gather(packed, source)
        part = tf.gather(self._parts, tf.where(packed == 0, 0, tf.bitwise.right_shift(packed, 3) + within))
        return tf.where(packed == 0, tf.gather(codes, source), part)

    def _compose(self, codes: tf.Tensor) -> tf.Tensor:
        flags = self._flags(codes)
        # each group is composed for itself, from left to right: what starts it never is the second of a pair
        starts = tf.cast(tf.where(flags & (_COMBINING | _SECOND) == 0)[:, 0], tf.int32)
        lengths = tf.concat([starts[1:], [tf.size(codes)]], axis=0) - starts
        longer = lengths > 1
        starts, lengths = selected(starts, longer), selected(lengths, longer)

        def step(index, starter, blocked_by, codes, kept):
            live = index < lengths
            at = starts + tf.minimum(index, lengths - 1)
            combining = tf.gather(flags, at) & _COMBINING
            left, right = tf.gather(codes, starter), tf.gather(codes, at)
            composite = self._composed(tf.cast(left, tf.int64) * 2**32 + tf.cast(right, tf.int64))
            free = (blocked_by == 0) | (blocked_by < combining)
            joins = live & free & (composite >= 0)
            stays = live & tf.logical_not(joins)
            codes = tf.tensor_scatter_nd_update(codes, selected(starter, joins)[:, None], selected(composite, joins))
            gone = selected(at, joins)[:, None]
            kept = tf.tensor_scatter_nd_update(kept, gone, tf.zeros_like(gone[:, 0], tf.bool))
            starter = tf.where(stays & (combining == 0), at, starter)
            blocked_by = tf.where(stays, combining, blocked_by)  # 0 behind a new starter
            return index + 1, starter, blocked_by, codes, kept

        _, _, _, codes, kept = tf.while_loop(
            lambda index, *_: index < tf.reduce_max(lengths),
            step,
            (tf.constant(1), starts, tf.zeros_like(starts), codes, tf.ones_like(codes, tf.bool)),
        )
        return selected(codes, kept)
