"""The one place that compiles functions, per backend and per device.

On a CPU a plain TensorFlow graph on oneDNN is fastest, on a GPU XLA; JAX compiles with XLA always.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

CPUINFO = pathlib.Path("/proc/cpuinfo")  # where Linux says what a processor can

_running_here = contextvars.ContextVar("running_here", default="")


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
        self._run: Any = self._traced
        if keras.backend.backend() == "jax":
            self._run = self._jax()
        elif keras.backend.backend() == "tensorflow":
            self._run = self._tensorflow()

    def __call__(self, *arrays: Any) -> Any:
        """What `function` gives for these arrays, NumPy's or the backend's; Python numbers would be traced anew."""
        return self._run(*(array if ops.is_tensor(array) else ops.convert_to_tensor(array) for array in arrays))

    def trace(self, *shapes: tuple[int, ...]) -> None:
        """Traces for float32 arrays of these shapes, without a call; elsewhere than on TensorFlow nothing is done."""
        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            self._run.get_concrete_function(*map(tf.TensorSpec, shapes))

    def _traced(self, *arrays):
        self.traces += 1
        with running_here():
            return self._function(*arrays)

    def _tensorflow(self):
        import tensorflow as tf

        # Partial, since TensorFlow warns of what is traced often, and counts a method of several objects as one.
        return tf.function(functools.partial(self._traced), jit_compile=has_gpu(), autograph=False)

    def _jax(self):
        import jax

        variables = [variable for model in self._models for variable in model.variables]

        @jax.jit
        def pure(values, *arrays):
            with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
                return self._traced(*arrays)

        return lambda *arrays: pure([variable.value for variable in variables], *arrays)


@contextlib.contextmanager
def running_here(learning: bool = False) -> Iterator[None]:
    """A scope in which what is traced will run in this process, and is in no file that others open.

    Args:
        learning: whether gradients are taken in it.
    """
    token = _running_here.set("learning" if learning else "computing")
    try:
        yield
    finally:
        _running_here.reset(token)


def on_onednn() -> bool:
    """Whether what is traced will run in this process, on a CPU by TensorFlow."""
    return bool(_running_here.get()) and keras.backend.backend() == "tensorflow" and not has_gpu()


def is_learning() -> bool:
    """Whether gradients will be taken of what is traced, within `running_here`."""
    return _running_here.get() == "learning"


def replica() -> tuple[Any, int]:
    """(index, how many) of the replica that this runs on: (0, 1) but within a strategy of `tf.distribute`.

    JAX's devices share one program and one batch, so that there is one replica.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        context = tf.distribute.get_replica_context()
        if context is not None and context.num_replicas_in_sync > 1:
            return context.replica_id_in_sync_group, context.num_replicas_in_sync
    return 0, 1


def mean_of_replicas(x: Any) -> Any:
    """The mean over all replicas of what each has, where there are several; no gradient goes through it."""
    if replica()[1] == 1:
        return x
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    return tf.stop_gradient(context.all_reduce(tf.distribute.ReduceOp.MEAN, x))


def mirrored(devices: Sequence[str] | None = None) -> Any:
    """The scope of TensorFlow's `MirroredStrategy` over this machine's GPUs, or over the devices that are named."""
    import tensorflow as tf

    return tf.distribute.MirroredStrategy(devices).scope()


def gradients(function: Callable[[Any], Any], x: Any) -> Any:
    """d function(x) / dx of a function that gives a scalar, for use within a step that is differentiated itself."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.grad(function)(x)
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(x)
        y = function(x)
    return tape.gradient(y, x)


class FinishedStep:
    """A training step that was done, whose variables may be read and assigned before `result` is given to Keras.

    TensorFlow's variables hold what the step left. JAX's step takes and gives a state, (trainable, non-trainable,
    optimizer's, metrics') values: within `with`, the variables stand for those.

    Args:
        model: whose step it was.
        given: what the model's `train_step` gave.
    """

    def __init__(self, model: keras.Model, given: Any):
        self.result = given
        self._model, self._scope = model, None
        if keras.backend.backend() == "jax":
            trainable, other, optimizer, _ = given[1]
            self._scope = keras.StatelessScope(
                state_mapping=[
                    *zip(model.trainable_variables, trainable, strict=True),
                    *zip(model.non_trainable_variables, other, strict=True),
                    *zip(model.optimizer.variables, optimizer, strict=True),
                ]
            )

    def __enter__(self) -> FinishedStep:
        if self._scope:
            self._scope.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._scope is None:
            return
        self._scope.__exit__(*error)
        logs, (trainable, _, optimizer, metrics) = self.result
        other = [self._scope.get_current_value(variable) for variable in self._model.non_trainable_variables]
        self.result = logs, (trainable, other, optimizer, metrics)


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


def on_cpu() -> bool:
    """Whether the backend computes on the processor, where a product of float32 is one."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.default_backend() == "cpu"
    return not has_gpu()


@functools.cache
def has_cudnn_attention() -> bool:
    """Whether Keras' attention in half precision is one operation of cuDNN's, which never holds its scores."""
    if keras.backend.backend() != "jax" or not has_gpu():
        return False
    import jax

    major, _, _ = str(getattr(jax.devices()[0], "compute_capability", "")).partition(".")
    return major.isdigit() and int(major) >= 8


def fit_compilation() -> bool | str:
    """What "auto" is for a training's `jit_compile`: plain graphs on a CPU by TensorFlow, else Keras' choice."""
    return False if keras.backend.backend() == "tensorflow" and not has_gpu() else "auto"


@functools.cache
def default_dtype() -> str:
    """What networks compute in where no dtype is asked for: bfloat16 where the device multiplies it, else float32."""
    if has_gpu():
        return "bfloat16"
    if keras.backend.backend() != "tensorflow":
        return "float32"
    # On a CPU without these instructions oneDNN emulates bfloat16, several times slower than float32.
    flags = CPUINFO.read_text(errors="replace") if CPUINFO.is_file() else ""
    return "bfloat16" if "avx512_bf16" in flags or "amx_bf16" in flags else "float32"


def to_numpy(array: Any, dtype: str | None = None) -> np.ndarray:
    """A tensor or a variable as a NumPy array, in its own dtype or another.

    Whole on every process: where `is_spread` says so, every process must ask.
    """
    if dtype is not None:
        array = ops.cast(array, dtype)
    if is_spread(array):
        from jax.experimental import multihost_utils

        return np.asarray(multihost_utils.process_allgather(_jax_value(array), tiled=True))
    # `convert_to_numpy` of a variable makes NumPy 2 warn; a variable is an array already.
    return np.asarray(array if isinstance(array, keras.Variable) else ops.convert_to_numpy(array))


def is_spread(array: Any) -> bool:
    """Whether no single process holds all of a tensor or a variable: JAX's, on several hosts."""
    value = _jax_value(array) if keras.backend.backend() == "jax" else array
    return not (getattr(value, "is_fully_addressable", True) or value.is_fully_replicated)


def _jax_value(array):
    return array.value if isinstance(array, keras.Variable) else array


def held(variable: Any) -> Any:
    """The value that a variable has now, to be assigned to it again: in the host's memory, or JAX's own array."""
    return variable.value if keras.backend.backend() == "jax" else to_numpy(variable).copy()


def lay_out_like(variable: Any, other: Any) -> None:
    """Spreads a variable over JAX's devices as another one is, from its next assignment on."""
    layout = getattr(other, "_layout", None)
    if layout is not None:
        variable._layout = layout


def process() -> tuple[int, int]:
    """(index, how many) of the process that this is: (0, 1) but with JAX on several hosts."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.process_index(), jax.process_count()
    return 0, 1


def is_first_process() -> bool:
    """Whether this process writes a run's files."""
    return process()[0] == 0


def every_process_says(number: int) -> list[int]:
    """The numbers with which all processes call this, which they must; none goes on before the last one has called."""
    if process()[1] == 1:
        return [number]
    from jax.experimental import multihost_utils

    return [int(n) for n in np.ravel(multihost_utils.process_allgather(np.int32(number)))]


def sync_state(model: keras.Model) -> None:
    """Puts into a model's variables what `fit` holds elsewhere on JAX, so that a callback may read and assign them."""
    if keras.backend.backend() == "jax":
        model.jax_state_sync()  # pyright: ignore[reportAttributeAccessIssue]


class EventWriter:
    """Writes numbers as TensorBoard's events; `tensorboard` is needed to look at them, not to write them.

    Args:
        directory: where the events' files are.
    """

    def __init__(self, directory: pathlib.Path):
        import tensorflow as tf

        with tf.device("CPU"):
            self._writer = tf.summary.create_file_writer(str(directory))
        plugin = tf.compat.v1.SummaryMetadata.PluginData(plugin_name="scalars")
        self._metadata = tf.compat.v1.SummaryMetadata(plugin_data=plugin)

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        """Each number under its name, at a step."""
        import tensorflow as tf

        with self._writer.as_default():
            for name, number in numbers.items():
                tf.summary.write(name, tf.constant(number, tf.float32), step=step, metadata=self._metadata)
        self._writer.flush()

    def close(self) -> None:
        """Ends the file."""
        self._writer.close()


def gather_replicas(*arrays: Any) -> tuple:
    """What every replica of a TensorFlow strategy has of some arrays, one below the other, with gradients to each.

    Elsewhere there is one replica: on JAX with `keras.distribution` a program sees the whole batch as it is.

    Args:
        arrays: (B, ...), with the same B on every replica.

    Returns:
        Each array as (B', ...), the rows of all replicas; and where this replica's rows begin.
    """
    index, replicas = replica()
    if replicas > 1:
        import tensorflow as tf

        context = tf.distribute.get_replica_context()
        gathered = [context.all_gather(array, axis=0) for array in arrays]
        return (*gathered, index * tf.shape(arrays[0])[0])
    return (*arrays, 0)


def psnr_and_ssim(images: np.ndarray, others: np.ndarray) -> tuple[float, float]:
    """Peak signal to noise in decibels, and structural similarity: means over pairs of uint8 (N, H, W, 3).

    Both are TensorFlow's, on the CPU. Reference: Wang et al. 2004, doi:10.1109/TIP.2003.819861.
    """
    import tensorflow as tf

    with tf.device("CPU"):
        psnr = tf.image.psnr(images, others, max_val=255)
        ssim = tf.image.ssim(tf.constant(images), tf.constant(others), max_val=255)
    return float(np.mean(psnr)), float(np.mean(ssim))


def unwritten(shape: Sequence[int], dtype: str) -> Any:
    """A tensor that says nothing yet, for a variable that is assigned before it is read.

    On TensorFlow its memory is not written, so that a system such as Linux finds none for it; elsewhere it is zero.
    """
    if keras.backend.backend() != "tensorflow":
        return ops.zeros(shape, dtype)
    import tensorflow as tf

    return tf.raw_ops.Empty(shape=shape, dtype=dtype, init=False)


def assign(variable: keras.Variable, array: np.ndarray) -> None:
    """Gives a variable the numbers of an array, and on a CPU the very memory, where that begins at a multiple of 64.

    Args:
        variable: of any shape.
        array: of the same shape and dtype; the caller may not change it afterwards.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        value = tf.raw_ops.Identity(input=array)  # `tf.constant` copies
        if tf.distribute.has_strategy() or isinstance(variable.value, tf.distribute.DistributedValues):
            variable.assign(value)
        else:  # not `variable.assign`, to which one that `release` has emptied has another shape
            tf.raw_ops.AssignVariableOp(resource=variable.value.handle, value=value)
    elif keras.backend.backend() == "jax":
        import jax

        variable.assign(jax.device_put(array))  # `jax.numpy.asarray` copies
    else:
        variable.assign(array)


def release(variables: Iterable[keras.Variable]) -> None:
    """Takes away what variables hold, and gives the memory back; until it is assigned anew, none may be read.

    They stay the same variables, so that a function which refers to them need not be traced again.
    """
    for variable in variables:
        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            tf.raw_ops.AssignVariableOp(resource=variable.value.handle, value=tf.zeros((), variable.dtype))
        else:
            variable._value = ops.zeros((), variable.dtype)
    with contextlib.suppress(AttributeError, OSError, TypeError):  # macOS, musl, Windows
        ctypes.CDLL(None).malloc_trim(0)


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
