"""What the networks may cost: operations of the traced graphs against what the architecture says, so none slips in.

Seconds depend on the machine; these numbers are known beforehand. A matrix product or a convolution costs its
multiply-adds. All else costs passes: a number written for each element of an array of a feature map's size.
References: `documents`' ResnetBlock and Decoder; Rombach et al. 2022, appendix E, arXiv:2112.10752.
"""

import math
from collections import Counter

import keras
import pytest
import tiny_models
from tiny_models import AUTOENCODER, LATENT, TEXT_ENCODER, UNET

from latentdiff import fused
from latentdiff.backend import Compiled
from latentdiff.models.layers import conv
from latentdiff.models.unet import UNet

if keras.backend.backend() != "tensorflow":
    pytest.skip("the graphs are TensorFlow's", allow_module_level=True)

import tensorflow as tf

LARGE = fused.LARGE
TOKENS = 77
HEIGHT, WIDTH = 8, 16
BATCH = 2

# Passes over what goes in, but for those over what comes out where a comment says so.
NORM = 3  # squares, for their sum; times one number for each channel; plus another
SWISH = 3  # Keras' also multiplies by one, which TensorFlow leaves out when it runs the graph
LAYER_NORM = 6  # Keras' own, in two steps
GELU = 5  # exact, by erfc
BIAS = 1  # over what comes out
ADD = 1

PRODUCTS = {"Conv2D", "MatMul", "BatchMatMulV2"}
# Which move no number, or only say where it is.
FREE = {"Const", "Placeholder", "ReadVariableOp", "Identity", "IdentityN", "StopGradient", "NoOp"}
FREE |= {"Reshape", "Squeeze", "StridedSlice"}
SMALL = 512  # elements: fewer have vectors, and the deviations of layer norms, and no feature map here


class Cost:
    """What an architecture costs for one example; each method adds a part that takes (height, width, channels).

    Attributes:
        operations: how many of each kind.
        multiply_adds: of each kind of product.
        passes: numbers written by everything else.
    """

    def __init__(self):
        self.operations, self.multiply_adds, self.passes = Counter(), Counter(), 0

    def conv(self, n, taken, given, size=3):
        kind = "MatMul" if size == 1 else "Conv2D"  # every map here has too many positions for its kernel's size
        self.operations[kind] += 1
        self.multiply_adds[kind] += n * size**2 * taken * given
        self.passes += BIAS * n * given

    def dense(self, n, taken, given, bias=True):
        self.operations["MatMul"] += 1
        self.multiply_adds["MatMul"] += n * taken * given
        self.passes += BIAS * n * given * (bias and n > 1)  # of a timestep's vector: small

    def norm(self, n, width):
        self.passes += NORM * n * width
        self.passes += 2 * math.isqrt(n) * width  # means of each row, of which there are no more than columns

    def resnet(self, n, taken, given, time=0):
        self.norm(n, taken)
        self.norm(n, given)
        self.passes += SWISH * n * (taken + given) + ADD * n * given
        self.conv(n, taken, given)
        self.conv(n, given, given)
        if time:
            self.dense(1, time, given)
            self.passes += ADD * n * given
        if taken != given:
            self.conv(n, taken, given, 1)

    def attend(self, n, width, heads, others, width_of_others, bias=False):
        """Of n positions over others: four projections, scores and values."""
        for rows, taken in ((n, width), (others, width_of_others), (others, width_of_others)):
            self.dense(rows, taken, width, bias)
        self.operations += {"BatchMatMulV2": 2, "Softmax": 1, "Transpose": 4}
        self.multiply_adds["BatchMatMulV2"] += 2 * n * others * width
        self.passes += 2 * n * width  # queries are transposed and scaled
        self.passes += 2 * others * width  # keys and values are transposed
        self.passes += heads * n * others  # softmax
        self.passes += n * width  # and back
        self.dense(n, width, width)

    def transformer(self, n, width, heads, context):
        self.norm(n, width)
        self.conv(n, width, width, 1)
        for others, width_of_others in ((n, width), (TOKENS, context)):
            self.passes += LAYER_NORM * n * width + ADD * n * width
            self.attend(n, width, heads, others, width_of_others)
        self.passes += LAYER_NORM * n * width + ADD * n * width
        self.dense(n, width, 8 * width)
        self.passes += 8 * n * width  # split into value and gate
        self.passes += (GELU + 1) * 4 * n * width
        self.operations["Erfc"] += 1
        self.dense(n, 4 * width, width)
        self.conv(n, width, width, 1)
        self.passes += ADD * n * width

    def upsample(self, n, width):
        self.passes += 4 * n * width  # each position four times
        self.conv(4 * n, width, width)

    def out(self, n, width, given):
        self.norm(n, width)
        self.passes += SWISH * n * width
        self.conv(n, width, given)


def unet_cost(channels, blocks_per_level, attention, heads, context_dim, groups):
    cost, time, last = Cost(), 4 * channels[0], len(channels) - 1
    sizes = [(HEIGHT >> level, WIDTH >> level) for level in range(len(channels))]
    positions = [height * width for height, width in sizes]

    def attend(level):
        cost.transformer(positions[level], channels[level], heads[level], context_dim)

    cost.dense(1, channels[0], time)
    cost.dense(1, time, time)
    cost.conv(positions[0], LATENT[-1], channels[0])
    skips, width = [channels[0]], channels[0]
    for level, n in enumerate(positions):
        for _ in range(blocks_per_level):
            cost.resnet(n, width, channels[level], time)
            width = channels[level]
            if attention[level]:
                attend(level)
            skips.append(width)
        if level < last:
            height, breadth = sizes[level]
            cost.passes += (height + 2) * (breadth + 2) * width  # padded
            cost.conv(positions[level + 1], width, width)
            skips.append(width)
    cost.resnet(positions[last], width, width, time)
    attend(last)
    cost.resnet(positions[last], width, width, time)
    for level in reversed(range(len(channels))):
        for _ in range(blocks_per_level + 1):
            joined = width + skips.pop()
            cost.passes += positions[level] * joined
            cost.resnet(positions[level], joined, channels[level], time)
            width = channels[level]
            if attention[level]:
                attend(level)
        if level > 0:
            cost.upsample(positions[level], width)
    cost.out(positions[0], width, LATENT[-1])
    return cost


def decoder_cost(channels, blocks_per_level, groups):
    cost, n, width, latent = Cost(), HEIGHT * WIDTH, channels[-1], LATENT[-1]
    cost.conv(n, latent, latent, 1)
    cost.conv(n, latent, width)
    cost.resnet(n, width, width)
    cost.passes += NORM * n * width + ADD * n * width
    cost.attend(n, width, 1, n, width, bias=True)
    cost.resnet(n, width, width)
    for level in reversed(range(len(channels))):
        for _ in range(blocks_per_level + 1):
            cost.resnet(n, width, channels[level])
            width = channels[level]
        if level > 0:
            cost.upsample(n, width)
            n *= 4
    cost.out(n, width, 3)
    return cost


def graph_of(function, *shapes):
    return tf.function(function, autograph=False).get_concrete_function(*map(tf.TensorSpec, shapes)).graph


def operations(graph):
    return graph.get_operations()


def counted(graph, kinds):
    return Counter(op.type for op in operations(graph) if op.type in kinds)


def multiply_adds(graph):
    """Of one example."""
    found = Counter()
    for op in operations(graph):
        if op.type in PRODUCTS:
            taken, factor = (tensor.shape.as_list() for tensor in op.inputs)
            inner = factor[0] * factor[1] * factor[2] if op.type == "Conv2D" else taken[-1]
            found[op.type] += op.outputs[0].shape.num_elements() * inner // BATCH
    return found


def passes(graph):
    """Numbers written for one example, but by products; and the kinds of operations that did it."""
    written = Counter()
    for op in operations(graph):
        if op.type not in FREE | PRODUCTS:
            sizes = [tensor.shape.num_elements() for tensor in op.outputs]
            written[op.type] += sum(size for size in sizes if size >= SMALL)
    return sum(written.values()) // BATCH, written


def check(graph, cost):
    assert counted(graph, cost.operations.keys() | {"Cast"}) == cost.operations
    assert multiply_adds(graph) == cost.multiply_adds
    found, written = passes(graph)
    assert found <= cost.passes, written


def call_unet(unet):
    return lambda latent, timestep, context: unet({"latent": latent, "timestep": timestep, "context": context})


UNET_SHAPES = (BATCH, HEIGHT, WIDTH, LATENT[-1]), (BATCH,), (BATCH, TOKENS, TEXT_ENCODER["width"])


@pytest.fixture(scope="module")
def unet_graph(tiny_pipe):
    return graph_of(call_unet(tiny_pipe.unet), *UNET_SHAPES)


def test_unet_costs_what_its_architecture_says(unet_graph):
    check(unet_graph, unet_cost(**UNET))


def test_decoder_costs_what_its_architecture_says(tiny_pipe):
    graph = graph_of(tiny_pipe.autoencoder.decoder, UNET_SHAPES[0])
    check(graph, decoder_cost(**AUTOENCODER))


def test_guided_step_adds_few_passes_over_the_latent_to_one_unet(tiny_pipe, unet_graph):
    """However wide the UNet is: two latents in, two out, guidance, rescaling, x0 and eps, then seven by four sums."""
    latent = (1, *UNET_SHAPES[0][1:])
    shapes = ((4, *latent), UNET_SHAPES[2], (), (), (), (4, 7), latent, (), ())
    graph = graph_of(tiny_pipe.step_function(True, None)._function, *shapes)
    assert counted(graph, PRODUCTS) == counted(unet_graph, PRODUCTS)
    size = HEIGHT * WIDTH * LATENT[-1]
    assert BATCH * (passes(graph)[0] - passes(unet_graph)[0]) <= (2 + 2 + 3 + 7 + 7 + 3 + 7 + 4 * 7 + 4) * size


@pytest.mark.parametrize(("dtype", "large"), [("float32", LARGE), ("float32", 1), ("bfloat16", 1)])
def test_graph_that_runs_here_has_the_products_of_the_one_that_is_exported(dtype, large, monkeypatch):
    """Whether its passes are fused, where arrays are large, or traced once for each shape; and one pass for each."""
    monkeypatch.setattr(fused, "LARGE", large)
    unet = tiny_models.make(UNet, UNET, dtype=dtype)
    exported = graph_of(call_unet(unet), *UNET_SHAPES)
    run = Compiled(call_unet(unet), [unet])._run.get_concrete_function(*map(tf.TensorSpec, UNET_SHAPES)).graph
    assert multiply_adds(run) == multiply_adds(exported)
    passes = [op for op in operations(run) if op.type in ("PartitionedCall", "StatefulPartitionedCall")]
    norms, gates = counted(exported, {"Rsqrt"})["Rsqrt"], counted(exported, {"Erf", "Erfc"}).total()
    group_norms = norms - 3 * gates  # a transformer block has three layer norms and a gate
    assert len(passes) == norms + gates + group_norms * (
        large == 1
    )  # the sums, a root for each group, what comes of it
    assert counted(run, {"Rsqrt"})["Rsqrt"] == group_norms * (large == 1)


def test_no_weight_is_cast_in_a_network_that_holds_bfloat16():
    """Nor is a feature map, but by the norms, the softmax and the timestep, which compute in float32."""
    unet = tiny_models.make(UNet, UNET, dtype="bfloat16")
    graph = graph_of(call_unet(unet), *UNET_SHAPES)
    casts = [op for op in operations(graph) if op.type == "Cast"]
    assert casts
    assert all(op.inputs[0].dtype != op.outputs[0].dtype for op in casts)
    weights = [op for op in casts if op.inputs[0].op.type == "ReadVariableOp"]
    assert all(len(op.inputs[0].shape) == 1 for op in weights)
    maps = sum(op.outputs[0].shape.num_elements() >= SMALL for op in casts)
    kinds = counted(graph, {"Rsqrt", "Softmax", "Erfc"})
    there_and_back = 2 * (kinds["Rsqrt"] + kinds["Softmax"])
    assert maps <= there_and_back + 1 + kinds["Erfc"]  # the latent, and each transformer block's context


def test_gradient_of_a_convolution_by_product_writes_its_patches_once():
    """Two products; the patches' gradient is cut, each cut is put among zeros, and those are added up."""
    layer, shape = conv(128, 3, "conv"), (BATCH, 4, 8, 128)
    layer.build(shape)

    def gradient(x, dy):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
        return tape.gradient(y, [x, layer.kernel.value], dy)

    graph = graph_of(gradient, shape, shape)
    kinds = counted(graph, {"MatMul", "Pad", "AddN", "StridedSliceGrad", "Conv2D", "Conv2DBackpropInput"})
    assert kinds == {"MatMul": 3, "Pad": 1 + 9, "AddN": 1}
