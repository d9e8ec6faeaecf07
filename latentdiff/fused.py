"""One pass over memory where TensorFlow makes one for each operation: on a CPU, of what is not a product of matrices.

XLA compiles such a function as one operation of TensorFlow's graph, for the processor at hand, and oneDNN's products
stay what they are. Only graphs that run in this process have such operations: an export is for others to open.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from keras import ops

from latentdiff.backend import is_learning, on_onednn, unwritten

ROWS = 32  # of an array that XLA sums at a time, still many columns at once
LARGE = 2**19  # numbers of an array, from which on a pass over memory takes longer than XLA's compilation is worth
KEPT = 32  # graphs of one function, of shapes and dtypes that were used last
MEANWHILE = 2**24  # numbers of an array, up to which a first call for XLA's sake needs little memory
OPEN = 16  # is taken for every size that is not known yet

_compiling = ThreadPoolExecutor(1)


def fused(function: Callable[..., Any], plain: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """A function of arrays that computes element by element, or along axes, in one pass over memory.

    So it is where `fuses` says so; elsewhere it is what it was, or `plain`. Its gradient is `learnt`'s to say.

    XLA computes many numbers at a time in what it makes of elements, of slices of an array, and of sums of up to
    `ROWS` rows; in longer sums, and in those along the last axis, it goes from number to number.

    Args:
        function: takes and gives arrays.
        plain: the same in the words that are best where each operation is a pass of its own.
    """
    one_pass, passes = _graph_of(function, jit_compile=True), plain or function

    def call(*arrays):
        return (one_pass if fuses(*arrays) else passes)(*arrays)

    return call


def learnt(function: Callable[..., Sequence[Any]], gradient: Callable[..., Sequence[Any]]) -> Callable[..., Any]:
    """A function of arrays with a gradient by hand, where it learns and `fuses`; elsewhere that is the backend's.

    Where it neither learns nor `fuses`, `on_onednn`, it is traced once for all layers of a shape, since that is most of
    what a small one costs.

    Args:
        function: arrays -> what is given, and whatever else the gradient is to know.
        gradient: (arrays, all that `function` gave, the gradient of the first of it) -> those of all arrays.
    """
    often = _graph_of(lambda *arrays: function(*arrays)[0])

    def by_hand(*arrays):
        import tensorflow as tf

        @tf.custom_gradient  # TensorFlow keeps the graph of a gradient of one's own for ever
        def learning(*arrays):
            given = function(*arrays)
            return given[0], lambda upstream: gradient(arrays, given, upstream)

        return learning(*_tensors(arrays))

    def call(*arrays):
        large = fuses(*arrays)
        if is_learning():
            return by_hand(*arrays) if large else function(*arrays)[0]
        return often(*arrays) if on_onednn() and not large else function(*arrays)[0]

    return call


def _graph_of(function, jit_compile: bool = False):
    """A function that is traced once for equal shapes and dtypes, and a single operation wherever it is called."""

    @functools.lru_cache(KEPT)
    def graph(*kinds):  # of shapes and dtypes
        import tensorflow as tf

        # Partial, since TensorFlow warns of what is traced often, and counts all uses of a piece of code as one.
        made = tf.function(functools.partial(function), autograph=False, jit_compile=jit_compile)
        if jit_compile and all(None not in shape and math.prod(shape) <= MEANWHILE for shape, _ in kinds):
            _compile_meanwhile(made.get_concrete_function(*(tf.TensorSpec(*kind) for kind in kinds)))
        return made

    def call(*arrays):
        arrays = _tensors(arrays)
        return graph(*((tuple(array.shape), array.dtype) for array in arrays))(*arrays)

    return call


def _compile_meanwhile(graph) -> None:
    """Has XLA compile a graph while the rest is traced, on another processor; else the first call would wait for it.

    XLA finds what it compiled for a call within another graph, as the real one will be, but not for one alone.
    """
    import tensorflow as tf

    def call():
        arrays = [unwritten(spec.shape.as_list(), spec.dtype) for spec in graph.structured_input_signature[0]]
        tf.function(functools.partial(graph), autograph=False)(*arrays)

    with contextlib.suppress(RuntimeError):  # no thread can begin: the first call will compile
        _compiling.submit(call)


def _tensors(arrays):
    import tensorflow as tf

    # Keras' conversion computes in the layer's dtype, but may give a variable as itself.
    return [tf.convert_to_tensor(array) for array in map(ops.convert_to_tensor, arrays)]


def divisor(size: int | None, most: int) -> int:
    """The largest number up to `most` that divides a size; 1 where that is not known."""
    return 1 if size is None else max(n for n in range(1, most + 1) if size % n == 0)


def sums_of_slices(terms: Callable[[slice], Sequence[Any]], size: int | None, parts: int) -> Sequence[Any]:
    """Arrays of terms, added up over slices of one axis.

    Args:
        terms: a slice of the axis -> arrays.
        size: of the axis.
        parts: at most so many slices.
    """
    parts = divisor(size, parts)
    slices = [slice(None)] if size is None else [slice(i, i + size // parts) for i in range(0, size, size // parts)]
    sums = list(terms(slices[0]))
    for part in slices[1:]:
        sums = [a + b for a, b in zip(sums, terms(part), strict=True)]
    return sums


def fuses(*arrays: Any) -> bool:
    """Whether one pass over these is worth XLA's compilation: one is large, none is of float64, `on_onednn`."""
    if any("float64" in str(array.dtype) for array in arrays):  # what is fused computes in float32
        return False
    sizes = (math.prod(OPEN if size is None else size for size in array.shape) for array in arrays)
    return on_onednn() and max(sizes) >= LARGE


def weighted(scores: Any, value: Any) -> Any:
    """softmax(scores) value: (..., N, S), (..., S, D) -> (..., N, D).

    Where it learns `on_onednn` the gradient of the softmax is fused, and sums over D what would be sums over S:

        P = softmax(S),  C = V - its mean over S,  dP = dO C^T,  dS = P (dP - sums of dP P) = P (dP - sums of dO P C)

    C stands for V, since a row of dS does not see what its row of dP has in common; in bfloat16 the rounding of that
    would be the same for all keys of a query, and add up.
    Reference: Dao et al. 2022, appendix B.2, arXiv:2205.14135.
    """
    if not on_onednn() or not is_learning():
        return ops.matmul(ops.cast(ops.softmax(scores, axis=-1), value.dtype), value)
    import tensorflow as tf

    @tf.custom_gradient
    def call(scores, value):
        weights = tf.cast(tf.nn.softmax(scores), value.dtype)
        out = tf.matmul(weights, value)

        def gradient(upstream):
            mean = tf.reduce_mean(tf.cast(value, "float32"), axis=-2, keepdims=True)
            centred = tf.cast(tf.cast(value, "float32") - mean, value.dtype)
            around = tf.cast(tf.matmul(weights, centred), "float32")
            sums = tf.reduce_sum(tf.cast(upstream, "float32") * around, axis=-1, keepdims=True)
            of_weights = tf.matmul(upstream, centred, transpose_b=True)
            of_scores = tf.cast(_softmax_gradient(weights, of_weights, sums), scores.dtype)
            return of_scores, tf.matmul(weights, upstream, transpose_a=True)

        return out, gradient

    return call(scores, value)


@fused
def _softmax_gradient(weights, of_weights, sums):
    return ops.cast(ops.cast(weights, "float32") * (ops.cast(of_weights, "float32") - sums), weights.dtype)
