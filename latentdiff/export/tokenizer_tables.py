"""Tables in variables, and the few moves on sequences of numbers that a tokenizer in a graph is made of."""

import numpy as np
import tensorflow as tf

from latentdiff.export.tokenizer_unicode import MARKS

__all__ = ["CodeTable", "PairTable", "repeats", "selected", "shifted", "stored"]

_PAGE = 256


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
        self.pages = stored(contents, f"{name}_pages")
        self.page_of = stored(np.array(page_of, "int32"), f"{name}_page_of")

    def __call__(self, codes: tf.Tensor) -> tf.Tensor:
        """int32 of the codes' shape."""
        return tf.gather(self.pages, tf.gather(self.page_of, codes // _PAGE) * _PAGE + (codes & (_PAGE - 1)))


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
        self.keys = stored(pairs[:, 0] << 32 | pairs[:, 1], f"{name}_keys")
        self.numbers = stored(numbers, f"{name}_numbers")

    def __call__(self, pairs: tf.Tensor) -> tf.Tensor:
        """The numbers (N,) of int64 (N,) pairs, each left * 2**32 + right."""
        at = tf.raw_ops.LowerBound(sorted_inputs=self.keys[None, :], values=pairs[None, :])[0]
        return tf.where(tf.gather(self.keys, at) == pairs, tf.gather(self.numbers, at), self.missing)


def stored(values: np.ndarray, name: str) -> tf.Variable:
    """Numbers that a SavedModel stores once, for all of its signatures."""
    return tf.Variable(tf.constant(values), trainable=False, name=name)


def selected(values: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """The values (M, ...) of (N, ...) where a bool (N,) is true; `tf.boolean_mask` in a third of the operations."""
    return tf.gather(values, tf.where(mask)[:, 0])


def repeats(lengths: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """0 as often as the first length says, 1 as often as the second one says, ...

    Args:
        lengths: int32 (N,) of 1 or more.

    Returns:
        int32 (M,), and int32 (M,) that counts from 0 within each of them; M is the lengths' sum.
    """
    starts = tf.cumsum(lengths, exclusive=True)
    source = tf.cumsum(tf.scatter_nd(starts[:, None], tf.ones_like(starts), [tf.reduce_sum(lengths)])) - 1
    return source, tf.range(tf.size(source)) - tf.gather(starts, source)


def shifted(values: tf.Tensor, steps: int, fill: int) -> tf.Tensor:
    """values[i + steps], and `fill` where there is none.

    Args:
        values: (N,).
        steps: Negative ones look back.
        fill: What stands outside.

    Returns:
        (N,), of the same dtype.
    """
    outside = tf.fill([abs(steps)], tf.cast(fill, values.dtype))
    if steps < 0:
        return tf.concat([outside, values], axis=0)[: tf.size(values)]
    return tf.concat([values, outside], axis=0)[steps:]
