"""The blocks of the networks: convolution, residual blocks, resampling, embeddings.

Layout is channels last, (B, H, W, C); sequences are (B, N, D). Blocks take ints, in the order of the documents' code.
References: Ronneberger et al. 2015, arXiv:1505.04597; Ho et al. 2020, appendix B, arXiv:2006.11239;
Rombach et al. 2022, appendix E, arXiv:2112.10752.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator

import keras
from keras import ops

from latentdiff.backend import has_gpu, is_learning, on_onednn, unwritten
from latentdiff.models.norms import check_groups, group_norm, register

MANY_POSITIONS = 2048  # of all examples

_blank = contextvars.ContextVar("blank", default=False)


@contextlib.contextmanager
def blank_weights() -> Iterator[None]:
    """A scope in which no layer's start is drawn, or even written: for networks that are about to be loaded."""
    token = _blank.set(True)
    try:
        yield
    finally:
        _blank.reset(token)


@register
class Blank(keras.initializers.Zeros):
    """Zeros; within `blank_weights` whatever the memory holds, since filling it takes a second for a gigabyte."""

    def __call__(self, shape, dtype=None):
        return unwritten(shape, dtype) if _blank.get() and dtype else super().__call__(shape, dtype)


def kernel_initializer(zero: bool = False) -> str | keras.Initializer:
    """The initializer of a kernel; `zero` marks the last layer of a residual branch."""
    if _blank.get():
        return Blank()
    return "zeros" if zero else "glorot_uniform"


def embedding_initializer() -> keras.Initializer:
    """The initializer of token and position embeddings: CLIP's normal of standard deviation 0.02."""
    return Blank() if _blank.get() else keras.initializers.RandomNormal(stddev=0.02)


@register
class Dense(keras.layers.Dense):
    """Keras' dense layer; of a sequence of many positions, with a bias, in the way that is fastest on a CPU.

    There a 1 x 1 convolution by oneDNN adds the bias within its pass, and takes half as long as its product and bias.

    It has the name of Keras' own since that is what Keras calls a layer in its files.
    """

    def call(self, inputs, training=None):
        """inputs: (..., D) -> (..., units)."""
        if not self.is_convolution(inputs):
            return super().call(inputs, training=training)
        _, count, width = inputs.shape
        x = ops.reshape(inputs, (-1, 1, count, width))
        x = ops.add(ops.conv(x, ops.reshape(self.kernel, (1, 1, width, self.units))), self.bias)  # in one rounding
        return ops.reshape(x, (-1, count, self.units))

    def is_convolution(self, inputs) -> bool:
        """Whether a convolution is taken for these."""
        plain = self.use_bias and not self.quantization_mode and not self.lora_enabled
        return plain and len(inputs.shape) == 3 and has_many_positions(inputs)


def has_many_positions(x) -> bool:
    """Whether a 1 x 1 convolution of x (B, ..., C) takes less time by oneDNN than a product does: without gradients."""
    if not on_onednn() or is_learning() or None in x.shape[1:]:
        return False
    return (x.shape[0] or 2) * math.prod(x.shape[1:-1]) >= MANY_POSITIONS


def dense(units: int, name: str, dtype=None, use_bias: bool = True, zero: bool = False) -> Dense:
    """A dense layer (..., D) -> (..., units)."""
    return Dense(units, use_bias=use_bias, kernel_initializer=kernel_initializer(zero), name=name, dtype=dtype)


@register
class Conv(keras.layers.Conv2D):
    """Keras' convolution, of stride 1, that keeps the size; on a CPU in the way that is fastest there.

    oneDNN turns a kernel into a layout of its own at every call. That takes longer than the convolution itself where
    the array has few positions for the kernel's size: a product of matrices takes the kernel as it lies, and wins
    there. A 1 x 1 kernel makes a product but where it `has_many_positions`. And where neighbouring positions lie a
    multiple of 2 kB apart, and so share their places in the cache, oneDNN's convolution takes up to twice as long as
    those of parts of the channels, added up.
    """

    def call(self, inputs):
        """inputs: (B, H, W, C) -> (B, H, W, filters)."""
        return self.as_product(inputs) if self.is_product(inputs) else super().call(inputs)

    def is_product(self, inputs) -> bool:
        """Whether a product of matrices is taken for these."""
        batch, height, width, _ = inputs.shape
        if not self._on_known_sizes(inputs):
            return False
        if self.kernel_size[0] == 1:
            return not has_many_positions(inputs)
        return (batch or 2) * height * width <= self.filters

    def as_product(self, inputs):
        """inputs: (B, H, W, C), of a known size -> (B, H, W, filters), as a product of matrices."""
        _, height, width, channels = inputs.shape
        size = self.kernel_size[0]
        rows = ops.reshape(patches_of(inputs, size), (-1, size * size * channels))
        rows = ops.add(ops.matmul(rows, ops.reshape(self.kernel, (-1, self.filters))), self.bias)  # in one rounding
        return ops.reshape(rows, (-1, height, width, self.filters))

    def convolution_op(self, inputs, kernel):
        """inputs: (B, H, W, C), kernel: (h, w, C, filters) -> (B, H, W, filters), before the bias."""
        convolve, channels = super().convolution_op, inputs.shape[-1]
        if not self._on_known_sizes(inputs) or channels % 512 or inputs.dtype != "float32":
            return convolve(inputs, kernel)
        parts = channels // 256
        return functools.reduce(
            ops.add, map(convolve, ops.split(inputs, parts, axis=-1), ops.split(kernel, parts, axis=-2))
        )

    def _on_known_sizes(self, inputs) -> bool:
        """Whether oneDNN computes this; an export of open sizes is for others to make fast."""
        return keras.backend.backend() == "tensorflow" and not has_gpu() and None not in inputs.shape[1:3]


def patches_of(x, size: int):
    """What each position of a convolution sees: (B, H, W, C) -> (B, H, W, size^2 C), rows first; zeros at the edges."""
    if size == 1:
        return x
    shape = ops.shape(x)
    edge = size // 2
    x = ops.pad(x, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
    # not x[:, i : i + height]: TensorFlow's gradient of an index takes fifteen times that of a slice
    return ops.concatenate([ops.slice(x, (0, i, j, 0), shape) for i in range(size) for j in range(size)], axis=-1)


def conv(channels: int, size: int, name: str, dtype=None, zero: bool = False) -> Conv:
    """A convolution of stride 1 that keeps the size: (B, H, W, C) -> (B, H, W, channels)."""
    return Conv(channels, size, padding="same", kernel_initializer=kernel_initializer(zero), name=name, dtype=dtype)


def heads_of(width: int, heads: int) -> int:
    """The width of one head; raises ValueError where `heads` does not divide `width`."""
    if heads < 1 or width % heads:
        raise ValueError(f"`width` must be divisible by `heads`. Received: width={width}, heads={heads}.")
    return width // heads


class Block(keras.layers.Layer):
    """A layer that is made of layers, remembers its constructor's arguments and builds its parts by their shapes."""

    def __init__(self, arguments: dict, name=None, dtype=None):
        super().__init__(name=name, dtype=dtype)
        self.arguments = {k: v for k, v in arguments.items() if k not in ("self", "__class__", "name", "dtype")}

    def get_config(self) -> dict:
        return {**super().get_config(), **self.arguments}

    @classmethod
    def from_config(cls, config: dict):
        return super().from_config({k: v for k, v in config.items() if k != "trainable"})

    def build_parts(self, **shapes) -> None:
        """Builds each named sublayer for the shape it will see."""
        for name, shape in shapes.items():
            getattr(self, name).build(shape)


@register
class ResnetBlock(Block):
    """Two convolutions, each behind a norm and swish, added to their input; told the time where `time` is set.

    Args:
        channels: channels that come out; a 1 x 1 convolution joins the input where it has another number.
        groups: groups of the norms.
        norm_epsilon: epsilon of the norms.
        time: whether a timestep's embedding (B, E) is added between the convolutions.
        zero: whether the block starts as the identity (the UNet's do).

    Raises:
        ValueError: `groups` does not divide the channels.

    Reference: Ho et al. 2020, appendix B; `documents`' ResnetBlock.
    """

    def __init__(self, channels: int, groups: int, norm_epsilon=1e-5, time=False, zero=False, name=None, dtype=None):
        super().__init__(locals(), name=name, dtype=dtype)
        check_groups(channels, groups)
        policy = self.dtype_policy
        self.norm_1 = group_norm(groups, norm_epsilon, "norm_1", policy, swish=True)
        self.conv_1 = conv(channels, 3, "conv_1", policy)
        self.time = dense(channels, "time", policy) if time else None
        self.norm_2 = group_norm(groups, norm_epsilon, "norm_2", policy, swish=True)
        self.conv_2 = conv(channels, 3, "conv_2", policy, zero=zero)
        self.skip = None

    def build(self, x_shape, time_shape=None):
        channels = self.arguments["channels"]
        middle = (*x_shape[:-1], channels)
        self.build_parts(norm_1=x_shape, conv_1=x_shape, norm_2=middle, conv_2=middle)
        if self.time is not None:
            self.time.build(time_shape)
        if x_shape[-1] != channels:
            self.skip = conv(channels, 1, "skip", self.dtype_policy)
            self.skip.build(x_shape)

    def call(self, x, time=None):
        """x: (B, H, W, C), time: (B, E) or None -> (B, H, W, channels)."""
        h = self.conv_1(self.norm_1(x))
        if self.time is not None:
            h = h + self.time(ops.silu(time))[:, None, None, :]
        h = self.conv_2(self.norm_2(h))
        return (x if self.skip is None else self.skip(x)) + h

    def compute_output_shape(self, x_shape, time_shape=None):
        return (*x_shape[:-1], self.arguments["channels"])


@register
class Downsample(Block):
    """A 3 x 3 convolution of stride 2.

    Args:
        channels: channels that come out.
        padding: "all" pads one all round (the UNet's), "after" only at the bottom and right (the autoencoder's).

    Raises:
        ValueError: `padding` is neither.
    """

    def __init__(self, channels: int, padding="all", name=None, dtype=None):
        super().__init__(locals(), name=name, dtype=dtype)
        if padding not in ("all", "after"):
            raise ValueError(f'`padding` must be "all" or "after". Received: padding={padding!r}.')
        self.padding = (1, 1) if padding == "all" else (0, 1)
        self.conv = keras.layers.Conv2D(
            channels, 3, 2, "valid", kernel_initializer=kernel_initializer(), name="conv", dtype=self.dtype_policy
        )

    def build(self, x_shape):
        self.conv.build(x_shape)

    def call(self, x):
        """x: (B, H, W, C) -> (B, ceil(H / 2), ceil(W / 2), channels); with "after", floor for odd sizes."""
        return self.conv(ops.pad(x, ((0, 0), self.padding, self.padding, (0, 0))))

    def compute_output_shape(self, x_shape):
        batch, height, width, _ = x_shape
        half = [None if n is None else (n + sum(self.padding) - 3) // 2 + 1 for n in (height, width)]
        return (batch, *half, self.arguments["channels"])


@register
class Upsample(Block):
    """Nearest-neighbour doubling and a 3 x 3 convolution.

    Args:
        channels: channels that come out.
    """

    def __init__(self, channels: int, name=None, dtype=None):
        super().__init__(locals(), name=name, dtype=dtype)
        self.conv = conv(channels, 3, "conv", self.dtype_policy)

    def build(self, x_shape, like_shape=None):
        self.conv.build(x_shape)

    def call(self, x, like=None):
        """x: (B, H, W, C); like: (B, H', W', ...) cuts the doubled array to its odd size -> (B, 2 H, 2 W, channels)."""
        _, height, width, channels = ops.shape(x)
        x = ops.broadcast_to(x[:, :, None, :, None, :], (ops.shape(x)[0], height, 2, width, 2, channels))
        x = ops.reshape(x, (-1, 2 * height, 2 * width, channels))
        if like is not None:
            _, height, width, _ = ops.shape(like)
            x = x[:, :height, :width]
        return self.conv(x)

    def compute_output_shape(self, x_shape, like_shape=None):
        batch, height, width, _ = x_shape
        size = [None if n is None else 2 * n for n in (height, width)] if like_shape is None else like_shape[1:3]
        return (batch, *size, self.arguments["channels"])


def timestep_embedding(timestep, width: int, flip_sin_to_cos: bool = True, freq_shift: float = 0):
    """Sines and cosines of a timestep, in float32.

    Args:
        timestep: (B,) as the network is told it, 0 .. T - 1; may be fractional.
        width: even width of the embedding.
        flip_sin_to_cos: cosines first (SD); otherwise sines first (Ho).
        freq_shift: frequencies are exp(-ln(10000) i / (half - freq_shift)); 0 in SD, 1 in Ho.

    Returns:
        float32 (B, width).

    Reference: Vaswani et al. 2017, sec. 3.5; Ho et al. 2020, appendix B.
    """
    half = width // 2
    frequencies = ops.exp(ops.arange(half, dtype="float32") * (-math.log(10000) / (half - freq_shift)))
    angles = ops.cast(timestep, "float32")[:, None] * frequencies[None, :]  # (B, half)
    parts = [ops.cos(angles), ops.sin(angles)] if flip_sin_to_cos else [ops.sin(angles), ops.cos(angles)]
    return ops.concatenate(parts, axis=-1)


@register
class TimestepEmbedding(Block):
    """`timestep_embedding` as a layer; it stays in float32, since bfloat16 would turn 951 into 952."""

    def __init__(self, width: int, flip_sin_to_cos=True, freq_shift: float = 0, name=None, dtype="float32"):
        super().__init__(locals(), name=name, dtype="float32")
        if width % 2:
            raise ValueError(f"`width` must be even. Received: width={width}.")

    def call(self, timestep):
        """timestep: (B,) -> float32 (B, width)."""
        return timestep_embedding(timestep, **self.arguments)

    def compute_output_shape(self, x_shape):
        return (x_shape[0], self.arguments["width"])


@register
class PositionEmbedding(Block):
    """A learnt vector for each position, added to a sequence.

    Args:
        length: the longest sequence.
        width: D.
    """

    def __init__(self, length: int, width: int, name=None, dtype=None):
        super().__init__(locals(), name=name, dtype=dtype)
        self.length, self.width = length, width
        self.initializer = embedding_initializer()

    def build(self, x_shape):
        self.embeddings = self.add_weight((self.length, self.width), self.initializer, name="embeddings")

    def call(self, x):
        """x: (B, S, D), S <= length -> (B, S, D)."""
        return x + self.embeddings[: ops.shape(x)[1]]

    def compute_output_shape(self, x_shape):
        return x_shape


@register
class ClassToken(Block):
    """A learnt vector, put before a sequence, in which a transformer gathers what the whole sequence says.

    Args:
        width: D.

    Reference: Dosovitskiy et al. 2021, eq. 1, arXiv:2010.11929.
    """

    def __init__(self, width: int, name=None, dtype=None):
        super().__init__(locals(), name=name, dtype=dtype)
        self.width = width
        self.initializer = embedding_initializer()

    def build(self, x_shape):
        self.embedding = self.add_weight((self.width,), self.initializer, name="embedding")

    def call(self, x):
        """x: (B, N, D) -> (B, 1 + N, D)."""
        first = ops.broadcast_to(ops.cast(self.embedding, x.dtype), (ops.shape(x)[0], 1, self.width))
        return ops.concatenate([first, x], axis=1)

    def compute_output_shape(self, x_shape):
        batch, length, width = x_shape
        return (batch, None if length is None else 1 + length, width)
