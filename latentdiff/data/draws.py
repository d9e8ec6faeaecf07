"""Random numbers and shuffles that are functions of their keys, by integer arithmetic alone, so equal everywhere.

    draw(seed, w1, w2, ...) = mix(... mix(mix(seed) + w1) + w2 ...),    mix: SplitMix's bijection of 64 bits

NumPy's own `Generator` may change what it gives for a seed from one release to the next; a run must not.
References: Steele, Lea and Flood 2014, doi:10.1145/2660193.2660195; Luby and Rackoff 1988, doi:10.1137/0217022;
Black and Rogaway 2002, sec. 3 (walking a cycle until it is back in range), doi:10.1007/3-540-45760-7_9.
"""

import numpy as np

ORDER, TURN, CAPTION, FLIP, CROP_Y, CROP_X, NOISE = range(7)
"""What a draw is for: the first word after the seed."""

_GOLDEN, _FIRST, _SECOND = (np.uint64(n) for n in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_ROUNDS = 6


def draw(seed: int, *words) -> np.ndarray:
    """Random bits of a key: uint64, of the shape that the words broadcast to.

    Args:
        seed: of the run, any int.
        words: ints or integer arrays; the first is what the draw is for.
    """
    bits = _mix(np.asarray(seed & 0xFFFFFFFFFFFFFFFF, "uint64"))
    for word in words:
        bits = _mix(bits + np.asarray(word).astype("uint64"))
    return bits


def uniform(seed: int, *words) -> np.ndarray:
    """float64 in [0, 1), of 53 random bits; arguments as `draw`'s."""
    return (draw(seed, *words) >> np.uint64(11)) * 2.0**-53


def integers(bound, seed: int, *words) -> np.ndarray:
    """int64 in 0 .. bound - 1, all as likely up to bound / 2**53; `bound` broadcasts with the words."""
    return np.floor(uniform(seed, *words) * bound).astype("int64")


def normal(shape: tuple[int, ...], seed: int, *words) -> np.ndarray:
    """float32 standard normals of one key, by Box and Muller 1958, doi:10.1214/aoms/1177706645."""
    count = int(np.prod(shape))
    place = np.arange((count + 1) // 2)
    radius = np.sqrt(-2 * np.log1p(-uniform(seed, *words, 0, place)))
    angle = 2 * np.pi * uniform(seed, *words, 1, place)
    pairs = np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])
    return pairs[:count].reshape(shape).astype("float32")


def shuffled(places, count: int, seed: int, *words) -> np.ndarray:
    """Where a permutation of 0 .. count - 1 takes these places, without making the rest of it.

    A Feistel network permutes the numbers of an even count of bits; whatever lands at `count` or above goes on.

    Args:
        places: ints in 0 .. count - 1, of any shape.
        count: of what is shuffled, at least 1.
        seed, words: the permutation's key; ints.

    Returns:
        int64, of the shape of `places`.
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    keys = [draw(seed, *words, turn) for turn in range(_ROUNDS)]
    found = np.array(places, "uint64").reshape(-1)
    outside = np.arange(found.size)
    while outside.size:
        left, right = found[outside] >> half, found[outside] & low
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & low)
        found[outside] = left << half | right
        outside = outside[found[outside] >= count]
    return found.astype("int64").reshape(np.shape(places))


def _mix(bits: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # NumPy warns of scalars that wrap around, not of arrays
        bits = bits + _GOLDEN
        bits = (bits ^ bits >> np.uint64(30)) * _FIRST
        bits = (bits ^ bits >> np.uint64(27)) * _SECOND
    return bits ^ bits >> np.uint64(31)
