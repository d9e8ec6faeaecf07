"""Large pictures decoded in strips of rows, of which no array is held whole more than twice; the whole's numbers.

Nothing is blended. A strip's convolutions see the rows beside it, and a norm's sums go over the strips of all the
picture before the first of them is normalised: one pass over the strips for each convolution, not for each strip.
What attends, the middle, and all else at the latent's own size is computed whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np
from keras import ops

from latentdiff.backend import Compiled, to_numpy
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.models.layers import ResnetBlock
from latentdiff.models.norms import GroupNorm, moments

STRIP = 2**17  # pixels of the picture in a strip, about: an array of 128 channels in float32 has 64 MiB of them


class TiledDecoder:
    """An autoencoder's decoder that holds little at a time, and gives what the whole one gives.

    By TensorFlow, with strips as large as they are by default, it is the same number by number; JAX rounds otherwise.

    Args:
        autoencoder: whose decoder it is, with the weights that it has at each call.
        rows: of the latent, at most, in a strip; None is as many as make about `STRIP` pixels.

    Raises:
        ValueError: `rows` is no positive whole number.

    Reference:
        Wu and He 2018, sec. 3.1, arXiv:1803.08494: what a norm must know of the whole picture.
    """

    def __init__(self, autoencoder: Autoencoder, rows: int | None = None):
        if rows is not None and (not isinstance(rows, int) or isinstance(rows, bool) or rows < 1):
            raise ValueError(f"`rows` must be a whole number, at least 1. Received: rows={rows!r}.")
        self._rows, self._factor = rows, autoencoder.factor
        decoder, levels = autoencoder.decoder, len(autoencoder.config["channels"])
        first = decoder.get_layer("up_0_upsample" if levels > 1 else "norm_out")
        head = keras.Model(decoder.input, first.input)

        self._head = Compiled(lambda latent: head(autoencoder.unscale(latent)), [head])
        self._stages: list[_Convolution | _Resnet] = []
        for i in range(1, levels):
            self._stages.append(_Convolution(decoder.get_layer(f"up_{i - 1}_upsample"), doubles=True))
            for j in range(autoencoder.config["blocks_per_level"] + 1):
                self._stages.append(_Resnet(decoder.get_layer(f"up_{i}_resnet_{j}")))
        self._stages.append(_Convolution(decoder.get_layer("conv_out"), decoder.get_layer("norm_out")))

    @property
    def traces(self) -> int:
        """How often a function was traced: once for each layer and size of a strip, however many strips there are."""
        return self._head.traces + sum(stage.traces for stage in self._stages)

    def __call__(self, latent: Any) -> np.ndarray:
        """Scaled latents (B, h, w, c) -> images float32 (B, H, W, C) in [-1, 1], not clipped, one after the other."""
        return np.concatenate([self._decoded(latent[i : i + 1]) for i in range(latent.shape[0])])

    def _decoded(self, latent) -> np.ndarray:
        _, height, width, _ = latent.shape
        rows = self._rows or max(1, STRIP // (width * self._factor**2))
        count = math.ceil(height / rows)
        rows = math.ceil(height / count)
        x = self._head(latent)  # (1, h, w, C)
        x = ops.pad(x, ((0, 0), (0, count * rows - height), (0, 0), (0, 0)))
        x = _Strips([x[:, i * rows : (i + 1) * rows] for i in range(count)], height)
        for stage in self._stages:
            x = stage(x)
        return np.concatenate([to_numpy(strip, "float32") for strip in x.arrays], axis=1)[:, : x.height]


@dataclass
class _Strips:
    """An array (1, H, W, C) as equal strips of rows, one below the other; rows beyond the last one do not count.

    Attributes:
        arrays: (1, R, W, C) each; those that are used up are None.
        height: H.
    """

    arrays: list[Any]
    height: int


class _Convolution:
    """A 3 x 3 convolution over strips, behind a norm where there is one, or behind a doubling of the size."""

    def __init__(self, layer: keras.layers.Layer, norm: GroupNorm | None = None, doubles: bool = False):
        self._layer, self._norm, self._scale = layer, norm, 2 if doubles else 1
        self._compiled = Compiled(self._strip, [layer] if norm is None else [layer, norm])
        self._moments = Compiled(_moments, [])

    @property
    def traces(self) -> int:
        return self._compiled.traces + self._moments.traces

    def __call__(self, x: _Strips, leave: Callable[[Any], Any] | None = None, added: _Strips | None = None) -> _Strips:
        """The strips of what comes out.

        Args:
            x: is used up, strip by strip.
            leave: what is made of a strip of `x` in its place, rather than nothing.
            added: to what comes out; is used up.
        """
        statistics = () if self._norm is None else self._statistics(self._norm, x)
        before = x.arrays[0]
        rows = before.shape[1]
        made = []
        for i, this in enumerate(x.arrays):
            after = x.arrays[min(i + 1, len(x.arrays) - 1)]
            place = np.array([i * rows, x.height], "int32")
            others = () if added is None else (added.arrays[i],)
            made.append(self._compiled(before, this, after, place, *statistics, *others))
            x.arrays[i], before = leave and leave(this), this
            if added is not None:
                added.arrays[i] = None
        return _Strips(made, x.height * self._scale)

    def _statistics(self, norm: GroupNorm, x: _Strips):
        """A norm's of the whole array, from the same sums as the whole decoder's, so that both round alike."""
        parts = [ops.concatenate(moment, axis=1) for moment in zip(*map(self._moments, x.arrays), strict=True)]
        rows = len(x.arrays) * x.arrays[0].shape[1]
        return norm.statistics(*(moment[:, : moment.shape[1] // rows * x.height] for moment in parts))

    def _strip(self, before, this, after, place, *others):
        """The strip of `this`, with a row of either neighbour; a strip without one has any beside it."""
        first, height = place[0], place[1]
        x = ops.concatenate([before[:, -1:], this, after[:, :1]], axis=1)
        if self._norm is not None:
            mean, inverse, *others = others
            x = self._norm.normalize(x, mean, inverse)
        # Around the picture, and not around the strip, the convolution has zeros.
        x = ops.where(_inside(first - 1, x.shape[1], height)[..., None], x, ops.zeros((), x.dtype))
        y = self._layer(x)
        for other in others:  # before the rows are cut, as TensorFlow may make one rounding of both
            y = ops.pad(other, ((0, 0), (1, 1), (0, 0), (0, 0))) + y
        return y[:, self._scale : -self._scale]


class _Resnet:
    """A residual block over strips."""

    def __init__(self, block: ResnetBlock):
        self._first = _Convolution(block.conv_1, block.norm_1)
        self._second = _Convolution(block.conv_2, block.norm_2)
        self._skip = None if block.skip is None else Compiled(block.skip, [block.skip])

    @property
    def traces(self) -> int:
        return self._first.traces + self._second.traces + (0 if self._skip is None else self._skip.traces)

    def __call__(self, x: _Strips) -> _Strips:
        h = self._first(x, leave=self._skip or (lambda strip: strip))
        return self._second(h, added=x)


def _inside(first, count: int, height):
    """Which of `count` rows from `first` on lie in a picture of so many: bool (1, count, 1)."""
    rows = first + ops.arange(count, dtype="int32")
    return ops.logical_and(rows >= 0, rows < height)[None, :, None]


def _moments(x):
    """`moments` of (1, R, W, C), the parts in a row: float32 (1, n, C) each."""
    return [ops.reshape(moment, (1, -1, x.shape[-1])) for moment in moments(x)]
