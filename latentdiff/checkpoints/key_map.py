"""Key maps: a foreign tensor's names, this package's variable path, and how the one becomes the other.

A convolution lies as (O, I, kh, kw) in torch's files and as (kh, kw, I, O) here, a dense kernel as (out, in) there and
(in, out) here; vectors and embeddings lie alike. A 1 x 1 convolution and a dense kernel hold the same numbers, so that
a file may store either for either.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from latentdiff.checkpoints.files import CheckpointError
from latentdiff.checkpoints.safetensors_files import FLOATS, StoredTensor

DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
_ALIGNMENT = 64  # bytes, TensorFlow's and XLA's
_OUTPUTS, _ROW = 128, 2304  # of a kernel, and of an output's numbers, how many are laid out at a time
_NUMBERS = 2**18  # that are looked at at a time


@dataclass(frozen=True)
class Entry:
    """One line of a key map.

    Attributes:
        path: The variable's path here, without the model's name: "conv_in/kernel".
        keys: The foreign names that it may have; the first is the one that is written.
        layout: "same", "dense" or "conv".
        shape: The variable's shape here.
    """

    path: str
    keys: tuple[str, ...]
    layout: str
    shape: tuple[int, ...]

    @property
    def foreign_shape(self) -> tuple[int, ...]:
        """The shape that is written."""
        if self.layout == "dense":
            return self.shape[::-1]
        if self.layout == "conv":
            height, width, inputs, outputs = self.shape
            return (outputs, inputs, height, width)
        return self.shape

    def fits(self, foreign_shape: tuple[int, ...]) -> bool:
        """Whether a tensor of that shape can be this variable."""
        if foreign_shape == self.foreign_shape:
            return True
        if self.layout == "dense":
            return foreign_shape == (*self.shape[::-1], 1, 1)
        return self.layout == "conv" and self.shape[:2] == (1, 1) and foreign_shape == self.shape[:1:-1]

    def from_foreign(self, array: np.ndarray, dtype: np.dtype | None = None, name: str = "a tensor") -> np.ndarray:
        """A foreign array, laid out as the variable is here: a contiguous copy, in `dtype` or in its own.

        Raises:
            CheckpointError: As `cast`; `name` is what the error calls the array.
        """
        dtype = dtype or array.dtype
        result = _aligned(self.shape, dtype)
        if self.layout == "same":
            flat, numbers = result.reshape(-1), array.reshape(-1)
            for begin in range(0, flat.size, _NUMBERS):
                flat[begin : begin + _NUMBERS] = cast(numbers[begin : begin + _NUMBERS], dtype, name)
            return result
        bits = result.view(f"u{dtype.itemsize}")  # NumPy moves integers faster than bfloat16
        cells = math.prod(self.shape[:-2])
        places = bits.reshape(cells, *self.shape[-2:])  # (kh kw, I, O)
        rows = array.reshape(self.shape[-1], -1)  # (O, I kh kw)
        inputs = max(1, _ROW // cells)
        # A few outputs' few inputs at a time: they stay in the processor's cache, and need no second array.
        for o in range(0, len(rows), _OUTPUTS):
            for i in range(0, self.shape[-2], inputs):
                block = cast(rows[o : o + _OUTPUTS, i * cells : (i + inputs) * cells], dtype, name)
                block = block.view(bits.dtype).reshape(len(block), -1, cells)  # (o, i, kh kw)
                places[:, i : i + inputs, o : o + _OUTPUTS] = block.transpose(2, 1, 0)
        return result

    def to_foreign(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `from_foreign`."""
        if self.layout == "same":
            return array
        bits = array.view(f"u{array.itemsize}")
        axes = (1, 0) if self.layout == "dense" else (3, 2, 0, 1)
        return np.ascontiguousarray(bits.transpose(axes)).view(array.dtype)


class LazyArrays(Mapping[str, np.ndarray]):
    """Variable path -> array, each made when it is asked for; shape and dtype are known without."""

    @abstractmethod
    def shape(self, path: str) -> tuple[int, ...]:
        """The shape of the array."""

    @abstractmethod
    def dtype(self, path: str) -> np.dtype:
        """The dtype of the array."""


class Weights(LazyArrays):
    """Variable path -> array, laid out as the variable is; each is read from its file when it is asked for."""

    def __init__(self, sources: dict[str, tuple[Entry, StoredTensor]], dtype: np.dtype | None):
        self._sources = sources
        self._dtype = dtype

    def __getitem__(self, path: str) -> np.ndarray:
        entry, tensor = self._sources[path]
        array = entry.from_foreign(tensor.view(), self._dtype, _named(tensor))
        tensor.release()
        return array

    def foreign(self, path: str) -> np.ndarray:
        """The array as it lies in the file, from which another file is written without being laid out twice."""
        _, tensor = self._sources[path]
        stored = tensor.view()
        array = cast(stored, self._dtype or stored.dtype, _named(tensor))
        tensor.release()
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def __contains__(self, path: object) -> bool:
        return path in self._sources

    def shape(self, path: str) -> tuple[int, ...]:
        return self._sources[path][0].shape

    def dtype(self, path: str) -> np.dtype:
        return self._dtype or FLOATS[self._sources[path][1].code]


def shape_of(arrays: Mapping[str, Any], path: str) -> tuple[int, ...]:
    """The shape of one of `arrays`; lazy ones are not made for that."""
    return arrays.shape(path) if isinstance(arrays, LazyArrays) else tuple(arrays[path].shape)


def dtype_of(arrays: Mapping[str, Any], path: str) -> np.dtype:
    """The dtype of one of `arrays`; lazy ones are not made for that."""
    return arrays.dtype(path) if isinstance(arrays, LazyArrays) else np.asarray(arrays[path]).dtype


def count_parameters(entries: list[Entry]) -> int:
    """How many numbers the variables of a key map hold."""
    return sum(math.prod(entry.shape) for entry in entries)


def as_dtype(dtype: str | np.dtype | None) -> np.dtype | None:
    """The NumPy dtype of "float16", "bfloat16", "float32" or "float64"; None stays None (as the file stores it)."""
    if dtype is None:
        return None
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}. Received: dtype={dtype!r}")
    return DTYPES[name]


def cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    """A contiguous copy of `array` in `dtype`.

    Raises:
        CheckpointError: If it holds NaN or infinity, or a number too large for `dtype`.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        from_bits = array.dtype == np.float16 and dtype.name in ("float32", "bfloat16")
        result = _from_half(array, dtype) if from_bits else np.array(array, dtype=dtype, order="C")
    if _is_finite(result):
        return result
    if not _is_finite(np.ascontiguousarray(array)):
        raise CheckpointError(f"Weights must be finite. Received: NaN or infinity in {name}.")
    largest = np.abs(array.astype(np.float64)).max()
    raise CheckpointError(f"Weights must fit {dtype.name}. Received: {largest:.6g} in {name}.")


def match(
    entries: list[Entry], tensors: Mapping[str, StoredTensor], ignored: set[str], source: str
) -> dict[str, tuple[Entry, StoredTensor]]:
    """Each variable with the tensor that fills it.

    Args:
        entries: The key map.
        tensors: What the file holds.
        ignored: Names that are left out on purpose.
        source: The directory, for errors.

    Raises:
        CheckpointError: If keys are missing, left over or of another shape or kind; one error lists them all.
    """
    problems: list[str] = []
    sources: dict[str, tuple[Entry, StoredTensor]] = {}
    unused = {name for name in tensors if name not in ignored}
    for entry in entries:
        name = next((key for key in entry.keys if key in unused), None)
        if name is None:
            problems.append(f"missing: {entry.keys[0]} {entry.foreign_shape}")
            continue
        unused.remove(name)
        tensor = tensors[name]
        if not entry.fits(tensor.shape):
            problems.append(f"shape: {name} must be {entry.foreign_shape}, is {tensor.shape}")
        elif not tensor.is_float:
            problems.append(f"dtype: {name} must be float16, bfloat16, float32 or float64, is {tensor.code}")
        sources[entry.path] = (entry, tensor)
    problems += [f"left over: {name} {tensors[name].shape}" for name in sorted(unused)]
    if problems:
        raise CheckpointError(
            f"The weights in `{source}` must be those that its configuration asks for. {len(problems)} are not:\n  "
            + "\n  ".join(problems)
        )
    return sources


def _from_half(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A float16 array in float32 or bfloat16; from the bits, three times faster than NumPy, and with many threads.

    In few arrays: the system takes longer to find memory for one than it takes to compute what it holds.
    """
    half = np.array(array, order="C")
    sign = half.view(np.uint16).astype(f"u{dtype.itemsize}", copy=False)
    magnitude = sign & 0x7FFF  # five bits of exponent, ten of the significand
    spare = magnitude - 0x0400
    odd = np.flatnonzero(spare >= 0x7800)  # below the normal numbers, where the difference wraps around, or above them
    exact = half.reshape(-1)[odd].astype(dtype)
    sign ^= magnitude
    if dtype.itemsize == 4:  # eight bits and 23
        sign <<= 16
        magnitude <<= 13
        magnitude += (127 - 15) << 23
    else:  # eight bits and seven, the nearest, or the even one of two that are
        np.right_shift(magnitude, 3, out=spare)
        spare &= 1
        magnitude += spare
        magnitude += 3
        magnitude >>= 3
        magnitude += (127 - 15) << 7
    magnitude |= sign
    result = magnitude.view(dtype)
    result.reshape(-1)[odd] = exact
    return result


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that begins where frameworks want their tensors to, so that they need not copy it."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    begin = -memory.ctypes.data % _ALIGNMENT
    return memory[begin : begin + size].view(dtype).reshape(shape)


def _named(tensor: StoredTensor) -> str:
    """What errors call a tensor."""
    return f"`{tensor.name}` of `{tensor.file}`"


def _is_finite(array: np.ndarray) -> bool:
    """Whether no element is NaN or infinite; from the bits, which is four times faster than np.isfinite in half."""
    infinity, negative = (int(np.array(x, array.dtype).view(f"u{array.itemsize}")) for x in (np.inf, -np.inf))
    bits = array.reshape(-1).view(f"u{array.itemsize}")
    # The largest with a sign is that of the positive numbers, the largest without one that of the negative ones.
    return not bits.size or bool(bits.view(f"i{array.itemsize}").max() < infinity and bits.max() < negative)
