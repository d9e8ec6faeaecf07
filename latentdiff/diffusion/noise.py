"""Normal noise as a pure function: (seed, step, position) gives the same number on every backend and in every batch.

    (a, b) = Threefry-2x32(key=seed, counter=(position // 2, step))
    u = (a // 2**8 + 1) / 2**24 in (0, 1],   angle = 2 pi (b // 2**8) / 2**24 - pi in [-pi, pi)
    normal = sqrt(-2 log u) * (cos(angle) at even positions, sin(angle) at odd ones)

Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3", doi:10.1145/2063384.2063405 (Threefry, 20 rounds);
Box and Muller 1958, doi:10.1214/aoms/1177706645.
"""

import math
import operator
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
from keras import ops

MAX_SEED = 2**63 - 1

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
_MAX_POSITIONS = 2**31 - 2


def split_seeds(seeds: Iterable[int]) -> np.ndarray:
    """Seeds as the two 32-bit words that a generator without 64-bit integers can take.

    Args:
        seeds: B integers in 0 .. 2**63 - 1, Python's or NumPy's.

    Returns:
        uint32 (B, 2): the low word, the high word.

    Raises:
        TypeError: if a seed is not an integer.
        ValueError: if a seed is out of range.
    """
    words = []
    for seed in seeds:
        if isinstance(seed, (bool, np.bool_)) or not hasattr(seed, "__index__"):
            raise TypeError(f"A seed must be an integer. Received: {seed!r}.")
        seed = operator.index(seed)
        if not 0 <= seed <= MAX_SEED:
            raise ValueError(f"A seed must lie in 0 .. 2**63 - 1. Received: {seed}.")
        words.append((seed & 0xFFFFFFFF, seed >> 32))
    return np.array(words, dtype=np.uint32).reshape(-1, 2)


def normal(seeds: Any, step: Any, shape: tuple[int, ...]) -> Any:
    """Standard normal noise, one independent stream for each image.

    Image i depends on its own seed, on the step and on the position in the image (counted in row-major order), and on
    nothing else: not on the batch, not on the backend. Works in eager mode and inside `tf.function` and `jax.jit`.

    Args:
        seeds: uint32 (B, 2) as `split_seeds` makes them; or (B,) integers in 0 .. 2**63 - 1, which may be a tensor.
        step: integer scalar in 0 .. 2**32 - 1, may be a tensor. Step 0 is the initial noise, step k >= 1 the fresh
            noise of a sampler's row k - 1.
        shape: the shape of one image, for example (h, w, 4). Its sizes may be scalar tensors.

    Returns:
        float32 (B, *shape). Between backends the values agree within 1e-6. None is larger than 5.77.

    Raises:
        TypeError: if a seed or the step is not an integer.
        ValueError: if a seed, the step or the shape is out of range, or `seeds` is neither (B, 2) nor (B,).
    """
    size = math.prod(shape)
    pairs = (size + 1) // 2
    bits = random_bits(seeds, step, pairs)  # (B, P, 2)
    # 24 bits are exact in float32; the 1 keeps the logarithm away from 0.
    uniform = (ops.cast(ops.right_shift(bits[..., 0], 8), "float32") + 1.0) * 2.0**-24
    angle = (ops.cast(ops.right_shift(bits[..., 1], 8), "float32") - 2.0**23) * (2.0 * math.pi * 2.0**-24)
    radius = ops.sqrt(-2.0 * ops.log(uniform))
    values = ops.stack([radius * ops.cos(angle), radius * ops.sin(angle)], axis=-1)  # (B, P, 2)
    values = ops.reshape(values, (-1, 2 * pairs))[:, :size]
    return ops.reshape(values, (-1, *shape))


def random_bits(seeds: Any, step: Any, pairs: int) -> Any:
    """Uniform 32-bit integers, two for each counter; equal bits on every backend.

    Args:
        seeds: as in `normal`.
        step: as in `normal`.
        pairs: P, the number of counters.

    Returns:
        uint32 (B, P, 2).

    Raises:
        TypeError: if a seed or the step is not an integer.
        ValueError: if a seed, the step or `pairs` is out of range, or `seeds` is neither (B, 2) nor (B,).
    """
    if isinstance(pairs, int) and not 0 < 2 * pairs <= _MAX_POSITIONS:
        raise ValueError(f"An image must hold 1 .. {_MAX_POSITIONS} values. Received: {2 * pairs}.")
    low, high = _seed_words(seeds)  # (B,), (B,)
    # TensorFlow's range has no uint32.
    position = ops.cast(ops.arange(pairs, dtype="int32"), "uint32")  # (P,)
    key = (low[:, None], high[:, None])
    counter = (position[None, :], _step_word(step))
    return ops.stack(threefry_2x32(key, counter), axis=-1)


def threefry_2x32(key: tuple[Any, Any], counter: tuple[Any, Any]) -> tuple[Any, Any]:
    """Threefry-2x32 with 20 rounds: a bijection of the counter, another one for each key.

    Args:
        key: two uint32 tensors.
        counter: two uint32 tensors. All four broadcast.

    Returns:
        Two uint32 tensors of the broadcast shape.

    Reference:
        Salmon et al. 2011, doi:10.1145/2063384.2063405, section 4.2; its library is Random123.
    """
    keys = (*key, ops.bitwise_xor(ops.bitwise_xor(key[0], key[1]), _constant(_PARITY)))
    a = counter[0] + keys[0]
    b = counter[1] + keys[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            a = a + b
            b = ops.bitwise_xor(_rotate_left(b, rotation), a)
        a = a + keys[(group + 1) % 3]
        b = b + keys[(group + 2) % 3] + _constant(group + 1)
    return a, b


def _rotate_left(word: Any, by: int) -> Any:
    return ops.bitwise_or(ops.left_shift(word, by), ops.right_shift(word, 32 - by))


def _constant(value: int) -> Any:
    return ops.convert_to_tensor(np.uint32(value), dtype="uint32")


def _seed_words(seeds: Any) -> tuple[Any, Any]:
    if not ops.is_tensor(seeds):
        # As objects, since NumPy would turn integers beyond 64 bits into floats.
        seeds = np.asarray(seeds, dtype=getattr(seeds, "dtype", object))
        if seeds.ndim == 1:
            seeds = split_seeds(seeds)
        elif seeds.dtype != np.uint32:
            raise TypeError(f"`seeds` of shape (B, 2) must be uint32. Received: dtype={seeds.dtype}.")
    dtype = keras.backend.standardize_dtype(seeds.dtype)
    if "int" not in dtype:
        raise TypeError(f"`seeds` must be integers. Received: dtype={dtype}.")
    if len(seeds.shape) == 2 and seeds.shape[1] == 2:
        seeds = ops.convert_to_tensor(seeds, dtype="uint32")
        return seeds[:, 0], seeds[:, 1]
    if len(seeds.shape) != 1:
        raise ValueError(f"`seeds` must have the shape (B, 2) or (B,). Received: shape={tuple(seeds.shape)}.")
    high = ops.right_shift(seeds, 32) if dtype in ("int64", "uint64") else ops.zeros_like(seeds)
    return ops.cast(seeds, "uint32"), ops.cast(high, "uint32")


def _step_word(step: Any) -> Any:
    if not ops.is_tensor(step):
        step = operator.index(step)
        if not 0 <= step < 2**32:
            raise ValueError(f"`step` must lie in 0 .. 2**32 - 1. Received: {step}.")
        return _constant(step)
    dtype = keras.backend.standardize_dtype(step.dtype)
    if "int" not in dtype:
        raise TypeError(f"`step` must be an integer. Received: dtype={dtype}.")
    return ops.cast(step, "uint32")
