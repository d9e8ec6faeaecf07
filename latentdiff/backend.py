"""The one place that compiles functions, per backend and per device.

On a CPU a plain TensorFlow graph on oneDNN is fastest, on a GPU XLA; JAX compiles with XLA always.
"""

from __future__ import annotations

import ctypes
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops


class Compiled:
    """A function of arrays, compiled once for each set of shapes and dtypes.

    The networks' weights are no arguments of `function`: TensorFlow's graph refers to its variables, and on JAX they
    are handed to the compiled function behind the scenes, so that they are never constants in it.

    Args:
        function: takes and gives arrays; is run in Python only to be traced.
        models: every network that `function` calls.

    Attributes:
        traces: how often `function` was traced.
    """

    def __init__(self, function: Callable[..., Any], models: Sequence[keras.Model]):
        self.traces = 0
        self._function = function
        self._models = tuple(models)
        if keras.backend.backend() == "jax":
            self._run = self._jax()
        elif keras.backend.backend() == "tensorflow":
            self._run = self._tensorflow()
        else:
            self._run = self._traced

    def __call__(self, *arrays: Any) -> Any:
        """What `function` gives for these arrays, NumPy's or the backend's; Python numbers would be traced anew."""
        return self._run(*(array if ops.is_tensor(array) else ops.convert_to_tensor(array) for array in arrays))

    def _traced(self, *arrays):
        self.traces += 1
        return self._function(*arrays)

    def _tensorflow(self):
        import tensorflow as tf

        return tf.function(self._traced, jit_compile=has_gpu(), autograph=False)

    def _jax(self):
        import jax

        variables = [variable for model in self._models for variable in model.variables]

        @jax.jit
        def pure(values, *arrays):
            with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
                return self._traced(*arrays)

        return lambda *arrays: pure([variable.value for variable in variables], *arrays)


@functools.cache
def has_gpu() -> bool:
    """Whether the backend computes on a GPU."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return bool(tf.config.list_physical_devices("GPU"))
    if keras.backend.backend() == "jax":
        import jax

        return jax.default_backend() == "gpu"
    return False


@functools.cache
def default_dtype() -> str:
    """What networks compute in where no dtype is asked for: bfloat16 where the device multiplies it, else float32."""
    if has_gpu():
        return "bfloat16"
    if keras.backend.backend() != "tensorflow":
        return "float32"
    # On a CPU without these instructions oneDNN emulates bfloat16, several times slower than float32.
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    flags = cpuinfo.read_text(errors="replace") if cpuinfo.is_file() else ""
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def to_numpy(array: Any, dtype: str | None = None) -> np.ndarray:
    """A tensor or a variable as a NumPy array, in its own dtype or another."""
    if dtype is not None:
        array = ops.cast(array, dtype)
    # `convert_to_numpy` of a variable makes NumPy 2 warn; a variable is an array already.
    return np.asarray(array if isinstance(array, keras.Variable) else ops.convert_to_numpy(array))


def assign(variable: keras.Variable, array: np.ndarray, size: int = 2**26) -> None:
    """Gives a variable the numbers of an array; a large one in slices, where TensorFlow would copy it twice on the way.

    Args:
        variable: of any shape.
        array: of the same shape and dtype.
        size: bytes from which an array is large; slices have a quarter. They take three times as long as all at once.
    """
    if keras.backend.backend() != "tensorflow" or array.nbytes < size or array.ndim < 2:
        variable.assign(array)
        return
    import tensorflow as tf

    if tf.distribute.has_strategy():
        variable.assign(array)
        return
    rows = max(1, size // 4 // (array.nbytes // len(array)))
    for begin in range(0, len(array), rows):
        part = array[begin : begin + rows]
        # Not `variable.value[...].assign`, which reads the variable, and so has all of it copied before it changes.
        tf.raw_ops.ResourceStridedSliceAssign(
            ref=variable.value.handle, begin=[begin], end=[begin + len(part)], strides=[1], value=part
        )


def keep_freed_memory() -> bool:
    """Tells the C library to keep what tensors leave free, rather than to give it back to the system at once.

    The first dataset that TensorFlow makes of a Python generator, as `fit` does of every `PyDataset`, has glibc return
    each freed array of 128 kB; fetching the pages again takes up to a third of a training step on a CPU. To be called
    after that dataset was made: when the first batch begins.

    Returns:
        Whether the C library has such a setting: glibc.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # macOS, musl, Windows
        return False
    trim_threshold, mmap_threshold = -1, -3  # malloc.h
    return bool(mallopt(mmap_threshold, 32 * 2**20) and mallopt(trim_threshold, 2**30))
