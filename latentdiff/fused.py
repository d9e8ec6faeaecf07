"""One pass over memory where TensorFlow makes one for each operation: on a CPU, of what is not a product of matrices.

XLA compiles such a function as one operation of TensorFlow's graph, for the processor at hand, and oneDNN's products
stay what they are. Only graphs that run in this process have such operations: an export is for others to open.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from keras import ops

from latentdiff.backend import is_learning, on_onednn

LARGE = 2**20  # numbers of an array, from which on a pass over memory takes longer than XLA's compilation is worth
BATCH = 16  # is taken for one that is not known yet
LANES = 16  # numbers that a processor adds at once


def fused(function: Callable[..., Any], others: Callable[[Any], list[Any]] | None = None) -> Callable[..., Any]:
    """A function of arrays that computes element by element, or along the last axes, in one pass over memory.

    So it is where `on_onednn`, and one of the arrays is large; elsewhere it is what it was. Its gradient is then one
    pass too, in which the function's own numbers are computed again rather than kept.

    Args:
        function: takes and gives arrays.
        others: the gradient of the first array -> those of the others, where they follow from it; XLA is slow in sums
            over rows.
    """

    @functools.cache  # of shapes and dtypes: TensorFlow warns of a function that is traced for many
    def compiled(*_):
        import tensorflow as tf

        def gradient(arrays, upstream):
            wanted = arrays if others is None else arrays[:1]
            with tf.GradientTape() as tape:
                tape.watch(wanted)
                given = function(*arrays)
            return tape.gradient(given, wanted, upstream)

        forward, backward = (tf.function(f, jit_compile=True, autograph=False) for f in (function, gradient))

        @tf.custom_gradient
        def learning(*arrays):
            def gradients(*upstream):
                found = backward(arrays, upstream if len(upstream) > 1 else upstream[0])
                return found if others is None else (*found, *others(found[0]))

            return forward(*arrays), gradients

        return forward, learning

    def call(*arrays):
        if not on_onednn() or not any(is_large(array) for array in arrays):
            return function(*arrays)
        import tensorflow as tf

        arrays = [tf.convert_to_tensor(array) for array in map(ops.convert_to_tensor, arrays)]
        forward, learning = compiled(*((tuple(array.shape), array.dtype) for array in arrays))
        # TensorFlow keeps the graph of a gradient of one's own for ever.
        return (learning if is_learning() else forward)(*arrays)

    return call


def is_large(array: Any) -> bool:
    """Whether an array has so many numbers."""
    return math.prod(BATCH if size is None else size for size in array.shape) >= LARGE


def weighted(scores: Any, value: Any) -> Any:
    """softmax(scores) value: (..., N, S), (..., S, D) -> (..., N, D); the softmax is summed in float32.

    Where it learns `on_onednn` the gradient of the softmax is fused:

        P = softmax(S),  O = P V,  dP = dO V^T,  dS = P (dP - row sums of dP P / row sums of P)

    The last divisor is one but for P's rounding, which would be the same for all keys of a query, and add up.
    """
    if not on_onednn() or not is_learning():
        weights = ops.softmax(scores if on_onednn() else ops.cast(scores, "float32"), axis=-1)  # oneDNN's in float32
        return ops.matmul(ops.cast(weights, value.dtype), value)
    import tensorflow as tf

    @tf.custom_gradient
    def call(scores, value):
        weights = tf.cast(tf.nn.softmax(scores), value.dtype)
        out = tf.matmul(weights, value)

        def gradient(upstream):
            of_scores = _softmax_gradient(weights, tf.matmul(upstream, value, transpose_b=True))
            return tf.cast(of_scores, scores.dtype), tf.matmul(weights, upstream, transpose_a=True)

        return out, gradient

    return call(scores, value)


@fused
def _softmax_gradient(weights, of_weights):
    weights, of_weights = ops.cast(weights, "float32"), ops.cast(of_weights, "float32")
    mean = _row_sums(of_weights * weights) / _row_sums(weights)
    return weights * (of_weights - mean)


def _row_sums(x):
    """Sums over the last axis, which stays: of every sixteenth number first, side by side, and then of these sums."""
    size = x.shape[-1]
    if size is not None and size % LANES == 0:
        x = ops.sum(ops.reshape(x, (*ops.shape(x)[:-1], size // LANES, LANES)), axis=-2)
    return ops.sum(x, axis=-1, keepdims=True)
