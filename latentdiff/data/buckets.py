"""Aspect-ratio buckets: the few sizes that pictures of every shape are brought to, so that batches have fixed shapes.

    bucket(w, h) = argmin over (H, W) of |log(w / h) - log(W / H)|

References: NovelAI 2022, "Aspect Ratio Bucketing", github.com/NovelAI/novelai-aspect-ratio-bucketing; SDXL, Podell et
al. 2023, sec. 2.3 and appendix I, arXiv:2307.01952.
"""

from collections.abc import Sequence

import numpy as np


def make_buckets(size: int, multiple: int, max_ratio: float = 2.0) -> list[tuple[int, int]]:
    """Sizes of about the same area: for each height the widest width within `size` squared, and the other way round.

    Args:
        size: side of the square, in pixels; no bucket has a larger area.
        multiple: what every side is a multiple of: the autoencoder's factor times the UNet's.
        max_ratio: of the longer side to the shorter, at most; 1 gives the square alone.

    Returns:
        (height, width) of each, from the tallest to the widest.

    Raises:
        ValueError: `size` is no multiple of `multiple`, or `max_ratio` is less than 1.
    """
    if multiple < 1 or size < multiple or size % multiple:
        raise ValueError(f"`size` must be a multiple of `multiple`. Received: size={size}, multiple={multiple}.")
    if not 1 <= max_ratio < np.inf:
        raise ValueError(f"`max_ratio` must be at least 1 and finite. Received: max_ratio={max_ratio}.")
    tall = set()
    for width in range(multiple, size + 1, multiple):
        height = size * size // width // multiple * multiple
        if height <= max_ratio * width:
            tall.add((height, width))
    wide = {(width, height) for height, width in tall}
    return sorted(tall | wide, key=lambda bucket: bucket[1] / bucket[0])


def nearest_buckets(heights, widths, buckets: Sequence[tuple[int, int]]) -> np.ndarray:
    """The bucket of each picture, nearest by the logarithm of its aspect ratio; of two as near, the earlier.

    Args:
        heights, widths: of pictures, (N,).
        buckets: (height, width) of each.

    Returns:
        int64 (N,), indices of `buckets`.
    """
    ratios = np.log(np.asarray(widths, "float64")) - np.log(np.asarray(heights, "float64"))
    edges = np.array([np.log(width) - np.log(height) for height, width in buckets])
    return np.abs(ratios[:, None] - edges[None, :]).argmin(axis=1)


def full_buckets(heights, widths, buckets: Sequence[tuple[int, int]], batch_size: int) -> np.ndarray:
    """As `nearest_buckets`, among the buckets that can fill a batch without showing a picture twice.

    The emptiest bucket with fewer pictures than a batch is given up, its pictures go to the nearest of those that are
    left, and so on; one bucket always stays.

    Args:
        heights, widths: of pictures, (N,).
        buckets: (height, width) of each.
        batch_size: B.

    Returns:
        int64 (N,), indices of `buckets`.
    """
    left = np.arange(len(buckets))
    while True:
        chosen = nearest_buckets(heights, widths, [buckets[int(i)] for i in left])
        counts = np.bincount(chosen, minlength=len(left))
        if len(left) == 1 or counts[counts > 0].min() >= batch_size:
            return left[chosen]
        left = np.delete(left, np.where(counts > 0, counts, np.iinfo("int64").max).argmin())
