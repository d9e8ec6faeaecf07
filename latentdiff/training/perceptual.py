"""A distance of images by what a network sees in them.

    d(x, y) = sum_l mean_hw sum_c w_lc (f_lc(x) / |f_l(x)| - f_lc(y) / |f_l(y)|)^2

Reference: Zhang et al. 2018, eq. 1 (LPIPS), arXiv:1801.03924.
"""

from keras import ops


def perceptual_distance(features, others, weights=None):
    """LPIPS of two images by their feature maps.

    Args:
        features, others: a feature map (B, h, w, c) of each layer, or one map.
        weights: of the channels of each layer, float (c,) each and not negative; None is 1 everywhere.

    Returns:
        float32 (B,), not negative.

    Raises:
        ValueError: not as many maps on both sides, or not as many weights.
    """
    features, others = ([f] if ops.is_tensor(f) else list(f) for f in (features, others))
    weights = [1.0] * len(features) if weights is None else list(weights)
    if not len(features) == len(others) == len(weights):
        raise ValueError(
            "There must be as many feature maps of both images as weights. Received: "
            f"{len(features)}, {len(others)} and {len(weights)}."
        )
    total = 0.0
    for mine, theirs, weight in zip(features, others, weights, strict=True):
        squares = ops.square(unit_channels(mine) - unit_channels(theirs))
        total = total + ops.mean(ops.sum(ops.cast(weight, "float32") * squares, axis=-1), axis=(1, 2))
    return total


def unit_channels(x):
    """The feature map with channels of unit length at each place, float32; zeros stay zeros."""
    x = ops.cast(x, "float32")
    return x * ops.rsqrt(ops.sum(ops.square(x), axis=-1, keepdims=True) + 1e-10)
