"""Normalisation over groups of channels and over the last axis, each in few passes over memory, forth and back.

References: Wu and He 2018, arXiv:1803.08494; Ba et al. 2016, arXiv:1607.06450.
"""

import functools
import math

import keras
from keras import ops

from latentdiff.fused import ROWS, divisor, fused, fuses, learnt, sums_of_slices

register = keras.saving.register_keras_serializable(package="latentdiff")


def check_groups(channels: int, groups: int) -> None:
    """Raises ValueError where `groups` does not divide `channels`."""
    if groups < 1 or channels % groups:
        raise ValueError(f"`channels` must be divisible by `groups`. Received: channels={channels}, groups={groups}.")


@register
class GroupNorm(keras.layers.GroupNormalization):
    """Group normalisation, equal to Keras' own, as one float32 sum per channel and one multiply-add over the array.

    The variance is a difference of sums: where a mean is r times the deviation, its relative error is about 1e-7 r^2.

    Args:
        groups: how many groups the channels fall into; divides the channels.
        epsilon: added to the variance.
        swish: whether x sigmoid(x) follows, in the same pass where `fused` makes it one.

    Reference: Wu and He 2018, arXiv:1803.08494.
    """

    def __init__(self, groups: int = 32, epsilon: float = 1e-5, swish: bool = False, **keywords):
        super().__init__(groups=groups, epsilon=epsilon, **keywords)
        self.swish = swish

    def build(self, x_shape):
        check_groups(x_shape[-1], self.groups)
        super().build(x_shape)

    def call(self, inputs):
        """inputs: (B, ..., W, C) -> (B, ..., W, C)."""
        return _group_norm(self.groups, self.epsilon, self.swish, self.compute_dtype)(inputs, self.gamma, self.beta)

    def statistics(self, mean, square):
        """`moments` of parts of an array -> each group's mean, and its deviation's inverse: float32 (B, G, 1)."""
        return _statistics(mean, square, self.groups, self.epsilon)

    def normalize(self, x, mean, inverse):
        """x (B, ..., C), by the `statistics` of it or of a larger array -> (B, ..., C)."""
        scale, offset = _per_channel(x, mean, inverse, self.gamma, self.beta)
        return _scaled(self.compute_dtype, self.swish)(x, scale, offset)

    def get_config(self) -> dict:
        return {**super().get_config(), "swish": self.swish}


@functools.cache
def _group_norm(groups: int, epsilon: float, swish: bool, dtype: str):
    """(x, gamma, beta) -> x normalised, and with `swish` through it.

    With y = scale x + offset, h = (x - mean) / sigma and dy the gradient of y, of which d stands for a number:

        d beta = sum of dy over positions,  d gamma = sum of dy h
        d x = (gamma dy - mean of gamma dy over the group - h (mean of gamma dy h over the group)) / sigma
    """

    def forward(x, gamma, beta):
        x = x if fuses(x) else ops.cast(x, "float32")  # once for both passes
        mean, inverse = _statistics(*moments(x), groups, epsilon)
        scale, offset = _per_channel(x, mean, inverse, gamma, beta)
        return _scaled(dtype, swish)(x, scale, offset), scale, offset, mean, inverse

    def gradient(arrays, given, upstream):
        x, gamma, beta = arrays
        _, scale, offset, mean, inverse = given
        channels = x.shape[-1] // groups
        sums, products = (
            ops.reshape(ops.sum(part, axis=1), (-1, groups, channels))
            for part in _sums(swish)(x, upstream, scale, offset)
        )  # of dy and of dy x
        products = (products - mean * sums) * inverse  # of dy h
        weight = ops.reshape(ops.cast(gamma, "float32"), (groups, -1))
        count = ops.cast(_positions(x) or ops.prod(ops.shape(x)[1:-1]), "float32") * channels
        along = ops.sum(products * weight, axis=-1, keepdims=True) / count * ops.square(inverse)
        constant = ops.sum(sums * weight, axis=-1, keepdims=True) / count * inverse - mean * along
        per_channel = [_to_channels(x, ops.repeat(number, channels, axis=-1)) for number in (along, constant)]
        return (
            _gradient_of_scaled(swish)(x, upstream, scale, offset, *per_channel),
            ops.cast(ops.reshape(ops.sum(products, axis=0), (-1,)), gamma.dtype),
            ops.cast(ops.reshape(ops.sum(sums, axis=0), (-1,)), beta.dtype),
        )

    return learnt(forward, gradient)


def _per_channel(x, mean, inverse, gamma, beta):
    """What to multiply x (B, ..., C) by and to add to it; mean and inverse are float32 (B, G, 1)."""
    gamma, beta = (ops.reshape(ops.cast(v, "float32"), (mean.shape[1], -1)) for v in (gamma, beta))
    scale = inverse * gamma  # (B, G, C / G)
    return _to_channels(x, scale), _to_channels(x, beta - mean * scale)


def _to_channels(x, numbers):
    """(B, G, C / G), as many as x (B, ..., C) has channels -> (B, 1, ..., C)."""
    return ops.reshape(numbers, (-1, *(1 for _ in x.shape[1:-1]), x.shape[-1]))


def _positions(x) -> int | None:
    """How many positions x (B, ..., C) has; None where that is not known."""
    return None if None in x.shape[1:-1] else math.prod(x.shape[1:-1])


def _in_rows(x):
    """(B, ..., W, C) -> (B, ..., R, C) of the same numbers; R divides W, and is what XLA sums at a time if it can."""
    positions = _positions(x)
    rows = divisor(x.shape[-2], ROWS) if fuses(x) else 1
    return x if positions is None or rows == 1 else ops.reshape(x, (-1, positions // rows, rows, x.shape[-1]))


def _statistics(mean, square, groups: int, epsilon: float):
    mean, square = (_over_groups(moment, groups) for moment in (mean, square))
    return mean, ops.rsqrt(ops.maximum(square - ops.square(mean), 0.0) + epsilon)


def _over_groups(x, groups: int):
    x = ops.mean(x, axis=tuple(range(1, len(x.shape) - 1)))  # (B, C)
    return ops.mean(ops.reshape(x, (-1, groups, x.shape[-1] // groups)), axis=-1, keepdims=True)


def moments(x):
    """x (B, ..., W, C) -> means of the numbers and of their squares in equal parts of each row: float32 (B, ..., C)."""
    return _moments(_in_rows(x))


@fused
def _moments(x):
    """(B, ..., W, C) -> the means over W of the numbers and of their squares: float32 (B, ..., C)."""
    x = ops.cast(x, "float32")
    return ops.mean(x, axis=-2), ops.mean(ops.square(x), axis=-2)


@functools.cache
def _scaled(dtype: str, swish: bool):
    def scaled(x, scale, offset):
        return ops.cast(ops.cast(x, "float32") * scale + offset, dtype)

    def through_swish(x, scale, offset):
        y = ops.cast(x, "float32") * scale + offset
        return ops.cast(y / (1.0 + ops.exp(-y)), dtype)

    return fused(through_swish, plain=lambda *arrays: ops.silu(scaled(*arrays))) if swish else fused(scaled)


def _through_swish(x, upstream, scale, offset, swish: bool):
    """The gradient of scale x + offset."""
    upstream = ops.cast(upstream, "float32")
    if not swish:
        return upstream
    y = ops.cast(x, "float32") * scale + offset
    gate = 1.0 / (1.0 + ops.exp(-y))
    return upstream * gate * (1.0 + y * (1.0 - gate))


@functools.cache
def _sums(swish: bool):
    """x, the gradient, scale, offset -> sums of dy and of dy x over parts of the positions: float32 (B, n, C) each."""

    def sums(x, upstream, scale, offset):
        channels, positions = x.shape[-1], _positions(x)
        x, upstream = (ops.reshape(a, (-1, positions or ops.prod(ops.shape(a)[1:-1]), channels)) for a in (x, upstream))
        scale, offset = (ops.reshape(a, (-1, 1, channels)) for a in (scale, offset))

        def terms(part):
            through = _through_swish(x[:, part], upstream[:, part], scale, offset, swish)
            return through, through * ops.cast(x[:, part], "float32")

        return sums_of_slices(terms, positions, parts=8)

    return fused(sums)


@functools.cache
def _gradient_of_scaled(swish: bool):
    def gradient(x, upstream, scale, offset, along, constant):
        through = _through_swish(x, upstream, scale, offset, swish)
        return ops.cast(through * scale - ops.cast(x, "float32") * along - constant, x.dtype)

    return fused(gradient)


def group_norm(groups: int, epsilon: float, name: str, dtype=None, swish: bool = False) -> GroupNorm:
    """A group normalisation with the field's three arguments, and whether swish follows it."""
    return GroupNorm(groups=groups, epsilon=epsilon, swish=swish, name=name, dtype=dtype)


@register
class LayerNormalization(keras.layers.LayerNormalization):
    """Keras' own over the last axis, in one pass over memory where `fused` makes it one.

    It has the name of Keras' own since that is what Keras calls a layer in its files.

    Reference: Ba et al. 2016, arXiv:1607.06450.
    """

    def call(self, inputs):
        """inputs: (B, ..., C) -> (B, ..., C)."""
        return ops.cast(_layer_norm(self.epsilon)(inputs, self.gamma, self.beta), self.compute_dtype)


@functools.cache
def _layer_norm(epsilon: float):
    """(x, gamma, beta) -> x normalised.

    With h = (x - mean) / sigma, u the gradient of what comes out and means over the last axis:

        d beta = sum of u over all else,  d gamma = sum of u h
        d x = (gamma u - mean of gamma u - h (mean of gamma u h)) / sigma
    """

    def normalized(x, gamma, beta):
        dtype, x = x.dtype, ops.cast(x, "float32")
        (mean,) = _means(lambda part: [x[..., part]], x.shape[-1])
        x = x - mean
        (variance,) = _means(lambda part: [ops.square(x[..., part])], x.shape[-1])
        inverse = ops.rsqrt(variance + epsilon)
        y = x * inverse * ops.cast(gamma, "float32") + ops.cast(beta, "float32")
        return ops.cast(y, dtype), mean, inverse

    def plain(x, gamma, beta):
        return [ops.layer_normalization(x, gamma, beta, -1, epsilon)]

    def gradient(arrays, given, upstream):
        x, gamma, beta = arrays
        _, mean, inverse = given
        gammas, betas = _sums_over_rows(x, upstream, mean, inverse)
        all_rows = tuple(range(len(x.shape) - 1))
        return (
            _gradient_of_normalized(x, gamma, upstream, mean, inverse),
            ops.cast(ops.sum(gammas, axis=all_rows), gamma.dtype),
            ops.cast(ops.sum(betas, axis=all_rows), beta.dtype),
        )

    return learnt(fused(normalized, plain), gradient)


def _means(terms, size: int):
    """Means over the last axis of arrays of terms, which are functions of a slice of it: (..., 1) each."""
    return [ops.sum(a, axis=-1, keepdims=True) / size for a in sums_of_slices(terms, size, parts=4)]


@fused
def _gradient_of_normalized(x, gamma, upstream, mean, inverse):
    h = (ops.cast(x, "float32") - mean) * inverse
    gu = ops.cast(gamma, "float32") * ops.cast(upstream, "float32")
    mean_gu, mean_guh = _means(lambda part: [gu[..., part], gu[..., part] * h[..., part]], x.shape[-1])
    return ops.cast((gu - mean_gu - h * mean_guh) * inverse, x.dtype)


@fused
def _sums_over_rows(x, upstream, mean, inverse):
    """Sums of the gradient, times what is normalised and as it is, over parts of the rows: float32 (..., n, C) each."""

    def terms(rows):
        u = ops.cast(upstream[..., rows, :], "float32")
        return u * (ops.cast(x[..., rows, :], "float32") - mean[..., rows, :]) * inverse[..., rows, :], u

    return sums_of_slices(terms, x.shape[-2], parts=8)


def layer_norm(epsilon: float, name: str, dtype=None) -> LayerNormalization:
    """A layer normalisation over the last axis."""
    return LayerNormalization(epsilon=epsilon, name=name, dtype=dtype)
