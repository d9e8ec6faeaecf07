"""Attention, and the transformers made of it: the UNet's, the autoencoder's and CLIP's.

Images are channels last, (B, H, W, C); sequences are (B, N, D).
References: Vaswani et al. 2017, eq. 1, arXiv:1706.03762; Rombach et al. 2022, appendix E, arXiv:2112.10752;
Radford et al. 2021, sec. 2.4, arXiv:2103.00020.
"""

import math

import keras
from keras import ops

from latentdiff.backend import default_dtype, has_cudnn_attention, on_cpu, on_onednn
from latentdiff.fused import divisor, fused, learnt, weighted
from latentdiff.models.layers import Block, conv, dense, heads_of, kernel_initializer, register
from latentdiff.models.norms import check_groups, group_norm, layer_norm

SCORES = 2**24  # bytes of scores that are computed at once on a CPU, whose cache they stay in
SCORES_OF_HEAD = 2**20  # how many of one head are, rather than fewer of more heads
SCORES_OF_ACCELERATOR = 2**25  # how many
FEWEST = 128  # queries attended to at once


def attend(query, key, value, heads: int, causal: bool = False):
    """Scaled dot-product attention, softmax in float32; many queries in chunks, or in one operation.

    Args:
        query: (B, N, D); key, value: (B, S, D).
        heads: divides D.
        causal: whether position n sees only positions up to n.

    Returns:
        (B, N, D).

    Reference: Vaswani et al. 2017, eq. 1; chunks: Rabe and Staats 2021, arXiv:2112.05682; one operation: Dao et al.
    2022, arXiv:2205.14135.
    """
    batch, n, width = query.shape
    size = width // heads

    def split(x):
        return ops.reshape(x, (-1, ops.shape(x)[1], heads, size))

    if has_flash_attention(keras.backend.standardize_dtype(query.dtype), size):
        out = ops.dot_product_attention(split(query), split(key), split(value), is_causal=causal)
        return ops.reshape(out, (-1, ops.shape(out)[1], heads * size))
    q = ops.transpose(split(query), (0, 2, 1, 3)) * (1 / math.sqrt(size))  # (B, heads, N, D / heads)
    k = ops.transpose(split(key), (0, 2, 3, 1))  # (B, heads, D / heads, S)
    v = ops.transpose(split(value), (0, 2, 1, 3))  # (B, heads, S, D / heads)

    if keras.backend.standardize_dtype(q.dtype) == "float16":
        q, k = ops.cast(q, "float32"), ops.cast(k, "float32")  # SD 2.x's scores pass 65504

    # Where there are instructions for bfloat16, oneDNN's softmax of it sums in float32.
    scored = q.dtype if on_onednn() and default_dtype() == "bfloat16" else "float32"

    def rows(q, k, v):
        scores = ops.cast(ops.matmul(q, k), scored)  # (B, heads, n, S)
        if causal:
            n = ops.shape(scores)[-1]
            hidden = ops.arange(n)[None, :] > ops.arange(n)[:, None]
            scores = scores + ops.cast(hidden, scored) * -1e9
        return weighted(scores, v)  # (B, heads, n, D / heads)

    if causal:
        out = rows(q, k, v)
    else:
        together, chunk = at_once(batch or 2, heads, n, key.shape[1], 2 if scored == "bfloat16" else 4)
        groups = zip(*(_in_pieces(x, together, axis=1) for x in (q, k, v)), strict=True)
        out = _joined([_joined([rows(p, k, v) for p in _in_pieces(q, chunk, axis=2)], 2) for q, k, v in groups], 1)
    out = ops.transpose(out, (0, 2, 1, 3))  # (B, N, heads, D / heads)
    return ops.reshape(out, (-1, ops.shape(out)[1], width))


def at_once(batch: int, heads: int, queries: int | None, keys: int | None, size: int) -> tuple[int, int | None]:
    """How many heads attend at once, and how many of their queries, that there be no more scores than are good.

    On a CPU rather few heads than few queries, as the keys of a head are laid out anew for each of its pieces.

    Args:
        batch, heads: all examples are in every piece.
        queries, keys: None is a number that is not known yet.
        size: bytes of a score.

    Returns:
        Numbers of at most `heads` and `queries`; the last is None where `queries` or `keys` is.
    """
    if queries is None or keys is None:
        return heads, None

    def queries_of(scores: int) -> int:
        return min(queries, max(FEWEST, 1 << max(scores // keys, 1).bit_length() - 1))

    if not on_cpu():
        return heads, queries_of(SCORES_OF_ACCELERATOR // (batch * heads))
    scores = SCORES // size // batch  # of one example
    chunk = queries_of(max(scores // heads, min(SCORES_OF_HEAD, scores)))
    return divisor(heads, max(1, scores // (chunk * keys))), chunk


def _in_pieces(x, size: int | None, axis: int) -> list:
    """x in pieces of a size, but for the last; None is all of it."""
    count = x.shape[axis]
    if size is None or count is None or size >= count:
        return [x]
    return ops.split(x, list(range(size, count, size)), axis=axis)  # slices' gradients would be of x's size each


def _joined(parts: list, axis: int):
    return parts[0] if len(parts) == 1 else ops.concatenate(parts, axis=axis)


def has_flash_attention(dtype: str, size: int) -> bool:
    """Whether attention in a dtype, with heads of a size, is one operation that never holds its scores: cuDNN's."""
    return has_cudnn_attention() and dtype in ("float16", "bfloat16") and size % 8 == 0 and size <= 128


@register
class Attention(Block):
    """Multi-head attention of a sequence over itself or over a context.

    Args:
        width: D, of the sequence that comes in and goes out.
        heads: divides `width`.
        use_bias: whether query, key and value have biases (out always has).
        causal: whether a position sees only those up to itself.
        zero: whether the block starts at zero.

    Raises:
        ValueError: `heads` does not divide `width`.
    """

    def __init__(self, width: int, heads: int, use_bias=False, causal=False, zero=False, name=None, dtype=None):
        super().__init__(locals(), name=name, dtype=dtype)
        heads_of(width, heads)
        self.heads, self.causal = heads, causal
        policy = self.dtype_policy
        self.query = dense(width, "query", policy, use_bias)
        self.key = dense(width, "key", policy, use_bias)
        self.value = dense(width, "value", policy, use_bias)
        self.out = dense(width, "out", policy, zero=zero)

    def build(self, x_shape, context_shape=None):
        context_shape = context_shape or x_shape
        self.build_parts(query=x_shape, key=context_shape, value=context_shape, out=x_shape)

    def call(self, x, context=None):
        """x: (B, N, D), context: (B, S, E) or None for x itself -> (B, N, D)."""
        context = x if context is None else context
        return self.out(attend(self.query(x), self.key(context), self.value(context), self.heads, self.causal))

    def compute_output_shape(self, x_shape, context_shape=None):
        return x_shape


@register
class AttentionBlock(Block):
    """The autoencoder's attention: one head over all positions, behind a norm, added to its input.

    Args:
        channels: C.
        groups: groups of the norm.
        norm_epsilon: epsilon of the norm.

    Raises:
        ValueError: `groups` does not divide the channels.

    Reference: `documents`' AttentionBlock.
    """

    def __init__(self, channels: int, groups: int, norm_epsilon=1e-6, name=None, dtype=None):
        super().__init__(locals(), name=name, dtype=dtype)
        check_groups(channels, groups)
        policy = self.dtype_policy
        self.norm = group_norm(groups, norm_epsilon, "norm", policy)
        self.query = dense(channels, "query", policy)
        self.key = dense(channels, "key", policy)
        self.value = dense(channels, "value", policy)
        self.out = dense(channels, "out", policy)

    def build(self, x_shape):
        sequence = (x_shape[0], None, x_shape[-1])
        self.build_parts(norm=x_shape, query=sequence, key=sequence, value=sequence, out=sequence)

    def call(self, x):
        """x: (B, H, W, C) -> (B, H, W, C)."""
        h = flatten_positions(self.norm(x))  # (B, N, C)
        h = self.out(attend(self.query(h), self.key(h), self.value(h), heads=1))
        return x + ops.reshape(h, ops.shape(x))

    def compute_output_shape(self, x_shape):
        return x_shape


def flatten_positions(x):
    """(B, H, W, C) -> (B, N, C), N = H * W."""
    _, height, width, channels = ops.shape(x)
    return ops.reshape(x, (-1, height * width, channels))


@register
class GEGLU(keras.layers.Dense):
    """A dense layer of twice the units, of which one half, through GELU, multiplies the other.

    Args:
        units: twice what comes out.
        gelu: "exact" or "tanh".

    Raises:
        ValueError: there is no such `gelu`.

    Reference: Shazeer 2020, arXiv:2002.05202.
    """

    def __init__(self, units: int, gelu: str = "exact", **keywords):
        super().__init__(units, **keywords)
        if gelu not in GATED:
            raise ValueError(f"`gelu` must be one of {', '.join(GATED)}. Received: gelu={gelu!r}.")
        self.gelu = gelu

    def call(self, inputs):
        """inputs: (..., D) -> (..., units / 2)."""
        return GATED[self.gelu](ops.matmul(inputs, self.kernel), self.bias)

    def compute_output_shape(self, shape):
        return (*shape[:-1], self.units // 2)

    def get_config(self) -> dict:
        return {**super().get_config(), "gelu": self.gelu}


@register
class TransformerBlock(Block):
    """Self-attention, cross-attention over the context and a gated MLP, each behind a norm and added.

    Args:
        width: D.
        heads: divides `width`.
        norm_epsilon: epsilon of the layer norms.
        gelu: of the MLP's gate, "exact" or "tanh".

    Raises:
        ValueError: unknown `gelu`, or `heads` does not divide `width`.

    Reference: Rombach et al. 2022, appendix E.2.1; GEGLU: Shazeer 2020, arXiv:2002.05202.
    """

    def __init__(self, width: int, heads: int, norm_epsilon=1e-5, gelu="exact", name=None, dtype=None):
        super().__init__(locals(), name=name, dtype=dtype)
        policy = self.dtype_policy
        self.norm_1 = layer_norm(norm_epsilon, "norm_1", policy)
        self.self_attention = Attention(width, heads, name="self_attention", dtype=policy)
        self.norm_2 = layer_norm(norm_epsilon, "norm_2", policy)
        self.cross_attention = Attention(width, heads, name="cross_attention", dtype=policy)
        self.norm_3 = layer_norm(norm_epsilon, "norm_3", policy)
        self.geglu = GEGLU(8 * width, gelu, kernel_initializer=kernel_initializer(), name="geglu", dtype=policy)
        self.mlp_out = dense(width, "mlp_out", policy)

    def build(self, x_shape, context_shape):
        wide = (*x_shape[:-1], 4 * x_shape[-1])
        self.build_parts(norm_1=x_shape, norm_2=x_shape, norm_3=x_shape)
        self.build_parts(self_attention=x_shape, geglu=x_shape, mlp_out=wide)
        self.cross_attention.build(x_shape, context_shape)

    def call(self, x, context):
        """x: (B, N, D), context: (B, S, E) -> (B, N, D)."""
        x = x + self.self_attention(self.norm_1(x))
        x = x + self.cross_attention(self.norm_2(x), context)
        return x + self.mlp_out(self.geglu(self.norm_3(x)))

    def compute_output_shape(self, x_shape, context_shape):
        return x_shape


@register
class SpatialTransformer(Block):
    """Transformer blocks over the positions of a feature map, behind a norm and projections, added to it.

    Args:
        channels: C, also the width of the blocks.
        heads: divides `channels`.
        depth: how many blocks.
        groups: groups of the norm at the entry.
        dense_projection: projections are dense layers (SD 2.x) and not 1 x 1 convolutions (SD 1.x).
        norm_epsilon: epsilon of the layer norms.
        entry_epsilon: epsilon of the norm at the entry.
        gelu: of the MLPs' gates, "exact" or "tanh".

    Raises:
        ValueError: `heads` or `groups` does not divide the channels, or `gelu` is unknown.

    Reference: Rombach et al. 2022, appendix E.2.1.
    """

    def __init__(
        self,
        channels: int,
        heads: int,
        depth: int = 1,
        groups: int = 32,
        dense_projection: bool = False,
        norm_epsilon: float = 1e-5,
        entry_epsilon: float = 1e-6,
        gelu: str = "exact",
        name=None,
        dtype=None,
    ):
        super().__init__(locals(), name=name, dtype=dtype)
        check_groups(channels, groups)
        policy = self.dtype_policy
        self.dense_projection = dense_projection
        self.norm = group_norm(groups, entry_epsilon, "norm", policy)
        if dense_projection:
            self.proj_in = dense(channels, "proj_in", policy)
            self.proj_out = dense(channels, "proj_out", policy, zero=True)
        else:
            self.proj_in = conv(channels, 1, "proj_in", policy)
            self.proj_out = conv(channels, 1, "proj_out", policy, zero=True)
        self.blocks = [
            TransformerBlock(channels, heads, norm_epsilon, gelu, name=f"block_{i}", dtype=policy) for i in range(depth)
        ]

    def build(self, x_shape, context_shape):
        sequence = (x_shape[0], None, x_shape[-1])
        projected = sequence if self.dense_projection else x_shape
        self.build_parts(norm=x_shape, proj_in=projected, proj_out=projected)
        for block in self.blocks:
            block.build(sequence, context_shape)

    def call(self, x, context):
        """x: (B, H, W, C), context: (B, S, E) -> (B, H, W, C)."""
        h = self.norm(x)
        h = self.proj_in(flatten_positions(h)) if self.dense_projection else flatten_positions(self.proj_in(h))
        for block in self.blocks:
            h = block(h, context)  # (B, N, C)
        if self.dense_projection:
            return x + ops.reshape(self.proj_out(h), ops.shape(x))
        return x + self.proj_out(ops.reshape(h, ops.shape(x)))

    def compute_output_shape(self, x_shape, context_shape):
        return x_shape


@register
class CLIPLayer(Block):
    """One layer of CLIP's transformers: self-attention and an MLP, each behind a norm and added.

    Args:
        width: D.
        heads: divides `width`.
        mlp_width: width between the two dense layers.
        activation: "quick_gelu" (CLIP), "gelu" (OpenCLIP) or "gelu_tanh" (KerasCV's OpenCLIP).
        norm_epsilon: epsilon of the norms.
        causal: whether a position sees only those up to itself, as in the text's transformer and not in the image's.

    Raises:
        ValueError: unknown `activation`, or `heads` does not divide `width`.

    Reference: Radford et al. 2021, sec. 2.4, arXiv:2103.00020.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        activation: str = "quick_gelu",
        norm_epsilon: float = 1e-5,
        causal: bool = True,
        name=None,
        dtype=None,
    ):
        super().__init__(locals(), name=name, dtype=dtype)
        if activation not in ACTIVATIONS:
            raise ValueError(f"`activation` must be one of {sorted(ACTIVATIONS)}. Received: activation={activation!r}.")
        policy = self.dtype_policy
        self.activation = ACTIVATIONS[activation]
        self.norm_1 = layer_norm(norm_epsilon, "norm_1", policy)
        self.attention = Attention(width, heads, use_bias=True, causal=causal, name="attention", dtype=policy)
        self.norm_2 = layer_norm(norm_epsilon, "norm_2", policy)
        self.mlp_1 = dense(mlp_width, "mlp_1", policy)
        self.mlp_2 = dense(width, "mlp_2", policy)

    def build(self, x_shape):
        wide = (*x_shape[:-1], self.arguments["mlp_width"])
        self.build_parts(norm_1=x_shape, attention=x_shape, norm_2=x_shape, mlp_1=x_shape, mlp_2=wide)

    def call(self, x):
        """x: (B, S, D) -> (B, S, D)."""
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp_2(self.activation(self.mlp_1(self.norm_2(x))))

    def compute_output_shape(self, x_shape):
        return x_shape


def quick_gelu(x):
    """x sigmoid(1.702 x), CLIP's activation."""
    return x * ops.sigmoid(1.702 * x)


def gelu(x):
    """x Phi(x), exact."""
    return ops.gelu(x, approximate=False)


def gelu_tanh(x):
    """x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, near x Phi(x).

    Reference: Hendrycks and Gimpel 2016, sec. 2, arXiv:1606.08415.
    """
    return ops.gelu(x, approximate=True)


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": gelu, "gelu_tanh": gelu_tanh}


def _gate(tanh: bool):
    """(product, bias) -> value gelu(gate), the halves of their sum; its gradient in one pass over memory."""

    def gated(product, bias):
        value, gate = _halves(product, bias)
        return [ops.cast(value * gate * _share(gate, tanh), product.dtype)]

    def plain(product, bias):
        value, gate = ops.split(ops.add(product, bias), 2, axis=-1)
        return [value * ops.gelu(gate, approximate=tanh)]

    @fused
    def of_product(product, bias, upstream):
        value, gate = _halves(product, bias)
        upstream, share = ops.cast(upstream, "float32"), _share(gate, tanh)
        halves = upstream * gate * share, upstream * value * (share + gate * _slope(gate, share, tanh))
        # Two rows, not one after the other: XLA asks of every number in which it is, rather than of every row.
        return ops.reshape(ops.cast(ops.stack(halves, axis=-2), product.dtype), ops.shape(product))

    def gradient(arrays, _, upstream):
        of_sum = of_product(*arrays, upstream)
        rows = ops.reshape(of_sum, (-1, of_sum.shape[-1]))
        # a sum in float32, rounded; XLA is slow in sums over rows
        return of_sum, ops.matmul(ops.ones((1, ops.shape(rows)[0]), rows.dtype), rows)[0]

    return learnt(fused(gated, plain), gradient)


def _halves(product, bias):
    return ops.split(ops.cast(product, "float32") + ops.cast(bias, "float32"), 2, axis=-1)


def _share(x, tanh: bool):
    """What GELU multiplies x by: Phi(x), or near it."""
    if tanh:
        return 0.5 + 0.5 * ops.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))
    return 0.5 + 0.5 * ops.erf(x * math.sqrt(0.5))


def _slope(x, share, tanh: bool):
    """The derivative of `_share`, where that is `share`."""
    if tanh:
        return share * (1 - share) * (2 * math.sqrt(2 / math.pi)) * (1 + 3 * 0.044715 * x * x)
    return ops.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))


GATED = {"exact": _gate(tanh=False), "tanh": _gate(tanh=True)}
