"""Normalized, lower-case text in a graph, on code points.

    NFC = compose(reorder(decompose(codes)))        Unicode Standard Annex 15, sections 1.2 and 1.3

All prompts of a batch are one sequence, in which marks that no text holds separate them.
"""

import numpy as np
import tensorflow as tf

from latentdiff.export.tokenizer_unicode import CODES, MARKS, UnicodeTables

__all__ = ["CodeTable", "Normalizer", "PairTable"]

_PAGE = 256
_COMBINING, _SECOND, _UNSTABLE = 0x3F, 0x40, 0x80


class CodeTable(tf.Module):
    """A number for each code point and each mark, in pages, so that the many that are alike are stored once.

    Args:
        values: int (CODES,).
        marks: The number of every mark.
        name: The variables' name.
    """

    def __init__(self, values: np.ndarray, marks: int, *, name: str):
        super().__init__(name=name)
        values = np.concatenate([values, np.full(MARKS, marks)]).astype("int32")
        pages = {}  # content -> number
        page_of = [pages.setdefault(page.tobytes(), len(pages)) for page in values.reshape(-1, _PAGE)]
        contents = np.frombuffer(b"".join(pages), "int32")
        self.pages = tf.Variable(contents, trainable=False, name=f"{name}_pages")
        self.page_of = tf.Variable(np.array(page_of, "int32"), trainable=False, name=f"{name}_page_of")

    def __call__(self, codes: tf.Tensor) -> tf.Tensor:
        """int32 of the codes' shape."""
        return tf.gather(self.pages, tf.gather(self.page_of, codes // _PAGE) * _PAGE + codes % _PAGE)


class PairTable(tf.Module):
    """A number for each of some pairs of numbers, found by bisection.

    Args:
        values: Pairs of numbers below 2**31 to numbers.
        missing: The number of any other pair.
        dtype: The numbers' dtype.
        name: The variables' name.
    """

    def __init__(self, values: dict[tuple[int, int], int], missing: int, *, dtype: str = "int32", name: str):
        super().__init__(name=name)
        # one more, greater than all, so that every search ends inside of the table
        pairs = np.array([*sorted(values), (2**31 - 1, 2**31 - 1)], "int64")
        numbers = np.array([*(values[pair] for pair in sorted(values)), missing], dtype)
        self.missing = missing
        self.keys = tf.Variable(pairs[:, 0] << 32 | pairs[:, 1], trainable=False, name=f"{name}_keys")
        self.numbers = tf.Variable(numbers, trainable=False, name=f"{name}_numbers")

    def __call__(self, pairs: tf.Tensor) -> tf.Tensor:
        """The numbers (N,) of int64 (N,) pairs, each left * 2**32 + right."""
        at = tf.raw_ops.LowerBound(sorted_inputs=self.keys[None, :], values=pairs[None, :])[0]
        return tf.where(tf.gather(self.keys, at) == pairs, tf.gather(self.numbers, at), self.missing)


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
        self._parts = tf.Variable(np.array(parts, "int32"), trainable=False, name="decomposition_parts")
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
        return tf.boolean_mask(pairs, pairs >= 0)

    def _nfc(self, codes: tf.Tensor) -> tf.Tensor:
        codes = self._decompose(codes)
        combining = self._flags(codes) & _COMBINING
        segment = tf.cumsum(tf.cast(combining == 0, tf.int64))  # a starter and the marks that follow it
        order = tf.argsort(segment * (_COMBINING + 1) + tf.cast(combining, tf.int64), stable=True)
        return self._compose(tf.gather(codes, order))

    def _decompose(self, codes: tf.Tensor) -> tf.Tensor:
        packed = self._decomposition(codes)
        length = tf.where(packed == 0, 1, packed & 7)
        source = tf.repeat(tf.range(tf.size(codes)), length)
        within = tf.range(tf.size(source)) - tf.gather(tf.cumsum(length, exclusive=True), source)
        packed = tf.gather(packed, source)
        part = tf.gather(self._parts, tf.where(packed == 0, 0, tf.bitwise.right_shift(packed, 3) + within))
        return tf.where(packed == 0, tf.gather(codes, source), part)

    def _compose(self, codes: tf.Tensor) -> tf.Tensor:
        flags = self._flags(codes)
        # each group is composed for itself, from left to right: what starts it never is the second of a pair
        starts = tf.cast(tf.where(flags & (_COMBINING | _SECOND) == 0)[:, 0], tf.int32)
        lengths = tf.concat([starts[1:], [tf.size(codes)]], axis=0) - starts
        longer = lengths > 1
        starts, lengths = tf.boolean_mask(starts, longer), tf.boolean_mask(lengths, longer)

        def step(index, starter, blocked_by, codes, kept):
            live = index < lengths
            at = starts + tf.minimum(index, lengths - 1)
            combining = tf.gather(flags, at) & _COMBINING
            left, right = tf.gather(codes, starter), tf.gather(codes, at)
            composite = self._composed(tf.cast(left, tf.int64) * 2**32 + tf.cast(right, tf.int64))
            free = (blocked_by == 0) | (blocked_by < combining)
            joins = live & free & (composite >= 0)
            stays = live & ~joins
            codes = tf.tensor_scatter_nd_update(
                codes, tf.boolean_mask(starter, joins)[:, None], tf.boolean_mask(composite, joins)
            )
            gone = tf.boolean_mask(at, joins)[:, None]
            kept = tf.tensor_scatter_nd_update(kept, gone, tf.zeros_like(gone[:, 0], tf.bool))
            starter = tf.where(stays & (combining == 0), at, starter)
            blocked_by = tf.where(stays, combining, blocked_by)  # 0 behind a new starter
            return index + 1, starter, blocked_by, codes, kept

        _, _, _, codes, kept = tf.while_loop(
            lambda index, *_: index < tf.reduce_max(lengths),
            step,
            (tf.constant(1), starts, tf.zeros_like(starts), codes, tf.ones_like(codes, tf.bool)),
        )
        return tf.boolean_mask(codes, kept)
