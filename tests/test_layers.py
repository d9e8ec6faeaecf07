"""The networks' blocks against NumPy."""

import math
import re
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops
from numpy_layers import convolved, group_normalized, random_weights, silu
from tiny_models import numbers, relative_error, run, to_numpy

from latentdiff.backend import Compiled, has_gpu, running_here
from latentdiff.models.attention import Attention, AttentionBlock, CLIPLayer, SpatialTransformer, TransformerBlock
from latentdiff.models.layers import (
    ClassToken,
    Conv,
    Downsample,
    PositionEmbedding,
    ResnetBlock,
    TimestepEmbedding,
    Upsample,
    blank_weights,
    dense,
    timestep_embedding,
)
from latentdiff.models.norms import GroupNorm


@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 5, 3, 8), 4), ((1, 4, 4, 6), 1), ((3, 7, 6), 6), ((2, 2, 3, 2, 4), 2)]
)
def test_group_norm_equals_that_of_keras(shape, groups):
    x = numbers(*shape, scale=3) + 1
    ours = GroupNorm(groups=groups, epsilon=1e-3)
    theirs = keras.layers.GroupNormalization(groups=groups, epsilon=1e-3)
    for layer in (ours, theirs):
        layer.build(shape)
        layer.gamma.assign(numbers(shape[-1], seed=1))
        layer.beta.assign(numbers(shape[-1], seed=2))
    np.testing.assert_allclose(to_numpy(run(ours, x)), to_numpy(run(theirs, x)), atol=2e-5)


def test_group_norm_survives_a_constant_offset():
    x = numbers(2, 16, 16, 8)
    expected = group_normalized(x, 4, 1e-5)
    norm = GroupNorm(groups=4, epsilon=1e-5)
    norm.build(x.shape)
    assert np.abs(to_numpy(run(norm, x + np.float32(100))) - expected).max() < 5e-3


def test_group_norm_of_a_constant_is_its_shift():
    norm = GroupNorm(groups=2, epsilon=1e-6)
    norm.build((1, 4, 4, 4))
    norm.beta.assign([1.0, 2.0, 3.0, 4.0])
    # A constant's variance must not come out below zero and turn into NaN.
    out = to_numpy(run(norm, np.full((1, 4, 4, 4), 0.1, "float32")))
    np.testing.assert_allclose(out, np.broadcast_to([1.0, 2.0, 3.0, 4.0], out.shape), atol=1e-2)


def test_timestep_embedding_has_cosines_first_as_stable_diffusion_does():
    expected = [[math.cos(951), math.cos(9.51), math.sin(951), math.sin(9.51)]]  # 10000 ** -0.5 = 0.01
    np.testing.assert_allclose(to_numpy(timestep_embedding(np.array([951.0]), 4)), expected, atol=2e-5)


def test_timestep_embedding_has_sines_first_as_ho_does():
    embedding = timestep_embedding(np.array([7]), 4, flip_sin_to_cos=False, freq_shift=1)
    expected = [[math.sin(7), math.sin(7e-4), math.cos(7), math.cos(7e-4)]]  # freq_shift=1 ends at 1 / 10000
    np.testing.assert_allclose(to_numpy(embedding), expected, atol=1e-6)


def test_timestep_embedding_stays_in_float32_in_a_bfloat16_model():
    layer = TimestepEmbedding(2, dtype="bfloat16")
    embedding = layer(np.array([951.0], "float32"))
    assert keras.backend.standardize_dtype(embedding.dtype) == "float32"
    np.testing.assert_allclose(to_numpy(embedding), [[math.cos(951), math.sin(951)]], atol=2e-5)


@pytest.mark.parametrize(("padding", "pads"), [("all", (1, 1)), ("after", (0, 1))])
@pytest.mark.parametrize("size", [(4, 6), (5, 7), (4, 5)])
def test_downsample_pads_where_it_says(padding, pads, size):
    x = numbers(2, *size, 3)
    layer, weights = random_weights(Downsample(4, padding, name="down"), x.shape)
    out = run(layer, x)
    expected = convolved(x, weights["conv/kernel"], weights["conv/bias"], pads, stride=2)
    np.testing.assert_allclose(to_numpy(out), expected, atol=1e-5)
    assert layer.compute_output_shape(x.shape) == expected.shape


@pytest.mark.parametrize(("kernel", "channels"), [(1, 3), (3, 3), (3, 512)])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 5), (None, None)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_convolution_is_that_of_keras_however_it_is_computed(kernel, channels, size, dtype):
    x = numbers(2, *(n or 4 for n in size), channels)
    settings = {"padding": "same", "dtype": dtype, "bias_initializer": "normal"}
    inputs = keras.Input((*size, channels), dtype=dtype)
    ours, theirs = Conv(16, kernel, **settings), keras.layers.Conv2D(16, kernel, **settings)
    model = keras.Model(inputs, [ours(inputs), theirs(inputs)])
    for variable, other in zip(theirs.variables, ours.variables, strict=True):
        variable.assign(other.value)
    out, expected = (to_numpy(ops.cast(y, "float32")) for y in run(model, x))
    assert out.shape == expected.shape == (*x.shape[:3], 16)
    assert relative_error(out, expected) < (1e-5 if dtype == "float32" else 3e-2)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow" or has_gpu(), reason="a choice for oneDNN")
@pytest.mark.parametrize(
    ("kernel", "size", "channels", "kinds"),
    [
        (3, (2, 4), 3, ["MatMul"]),
        (3, (3, 3), 3, ["Conv2D"]),
        (3, (None, None), 3, ["Conv2D"]),
        (3, (3, 3), 512, ["Conv2D", "Conv2D"]),
        (1, (9, 9), 512, ["MatMul"]),
        (1, (None, None), 512, ["Conv2D"]),
    ],
)
def test_a_convolution_is_computed_as_is_fastest_on_a_cpu(kernel, size, channels, kinds):
    import tensorflow as tf

    layer = Conv(16, kernel, padding="same")
    layer.build((2, *size, channels))
    graph = tf.function(layer).get_concrete_function(tf.TensorSpec((2, *size, channels))).graph
    assert [op.type for op in graph.get_operations() if op.type in ("MatMul", "Conv2D")] == kinds


@pytest.mark.skipif(keras.backend.backend() != "tensorflow" or has_gpu(), reason="a choice for oneDNN")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("positions", [(1024,), (32, 32)])
def test_many_positions_are_a_convolution_where_the_graph_runs_here_and_does_not_learn(positions, dtype):
    import tensorflow as tf

    layer = dense(16, "dense", dtype) if len(positions) == 1 else Conv(16, 1, padding="same", dtype=dtype)
    layer.build((2, *positions, 24))
    layer.set_weights([numbers(24, 16, seed=1).reshape(layer.kernel.shape), numbers(16, seed=2)])

    def kinds(x):
        graph = tf.function(lambda x: layer(x)).get_concrete_function(x).graph
        return [op.type for op in graph.get_operations() if op.type in ("MatMul", "Conv2D", "Tensordot")]

    x = ops.cast(numbers(2, *positions, 24), dtype)
    with running_here():
        assert kinds(x) == ["Conv2D"]
        assert kinds(x[:, 1:]) == ["MatMul"]
    with running_here(learning=True):
        assert kinds(x) == ["MatMul"]
    assert kinds(x) == ["MatMul"]
    exact = [to_numpy(ops.cast(array, "float32")).astype("float64") for array in (x, layer.kernel, layer.bias)]
    expected = exact[0] @ exact[1].reshape(24, 16) + exact[2]
    one_rounding = 2**-8 if dtype == "bfloat16" else 1e-6  # of the sum, the bias included
    out = to_numpy(ops.cast(Compiled(layer, [layer])(x), "float32"))
    np.testing.assert_allclose(out, expected, rtol=1.01 * one_rounding, atol=1e-5)


def test_upsample_doubles_each_position():
    x = numbers(2, 3, 2, 3)
    layer, weights = random_weights(Upsample(4, name="up"), x.shape)
    doubled = x.repeat(2, axis=1).repeat(2, axis=2)
    expected = convolved(doubled, weights["conv/kernel"], weights["conv/bias"])
    np.testing.assert_allclose(to_numpy(run(layer, x)), expected, atol=1e-5)


def test_upsample_comes_out_at_the_odd_size_of_what_it_joins():
    x, like = numbers(2, 3, 2, 3), numbers(2, 5, 3, 9)
    layer, weights = random_weights(Upsample(4, name="up"), x.shape)
    doubled = x.repeat(2, axis=1).repeat(2, axis=2)[:, :5, :3]
    expected = convolved(doubled, weights["conv/kernel"], weights["conv/bias"])
    np.testing.assert_allclose(to_numpy(run(layer, x, like)), expected, atol=1e-5)
    assert layer.compute_output_shape(x.shape, like.shape) == expected.shape


@pytest.mark.parametrize("channels", [8, 12])
def test_resnet_block_is_two_convolutions_added_to_their_input(channels):
    x, time = numbers(2, 3, 4, 8), numbers(2, 6, seed=1)
    block, w = random_weights(ResnetBlock(channels, 4, 1e-5, time=True, name="block"), x.shape, time.shape)
    h = silu(group_normalized(x, 4, 1e-5, w["norm_1/gamma"], w["norm_1/beta"]))
    h = convolved(h, w["conv_1/kernel"], w["conv_1/bias"])
    h = h + (silu(time) @ w["time/kernel"] + w["time/bias"])[:, None, None]
    h = silu(group_normalized(h, 4, 1e-5, w["norm_2/gamma"], w["norm_2/beta"]))
    h = convolved(h, w["conv_2/kernel"], w["conv_2/bias"])
    joined = x if channels == 8 else x @ w["skip/kernel"][0, 0] + w["skip/bias"]
    np.testing.assert_allclose(to_numpy(run(block, x, time)), joined + h, atol=2e-5)


def test_position_embedding_adds_the_first_vectors():
    layer, weights = random_weights(PositionEmbedding(5, 4, name="positions"), (2, 3, 4))
    x = numbers(2, 3, 4)
    np.testing.assert_allclose(to_numpy(run(layer, x)), x + weights["embeddings"][:3], atol=1e-6)


def test_class_token_goes_first():
    layer, weights = random_weights(ClassToken(4, name="token"), (2, 3, 4))
    x = numbers(2, 3, 4)
    out = to_numpy(run(layer, x))
    np.testing.assert_array_equal(out[:, 1:], x)
    np.testing.assert_allclose(out[:, 0], np.broadcast_to(weights["embedding"], (2, 4)), rtol=1e-6)
    assert layer.compute_output_shape((None, 3, 4)) == (None, 4, 4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ResnetBlock(30, 32), "`channels` must be divisible by `groups`. Received: channels=30, groups=32."),
        (lambda: ResnetBlock(8, 0), "`channels` must be divisible by `groups`. Received: channels=8, groups=0."),
        (lambda: ResnetBlock(8, 4).build((1, 2, 2, 6)), "Received: channels=6, groups=4."),
        (lambda: AttentionBlock(8, 3), "`channels` must be divisible by `groups`. Received: channels=8, groups=3."),
        (lambda: SpatialTransformer(8, 2, groups=3), "`channels` must be divisible by `groups`"),
        (
            lambda: SpatialTransformer(8, 3, groups=4),
            "`width` must be divisible by `heads`. Received: width=8, heads=3",
        ),
        (lambda: CLIPLayer(8, 0, 16), "`width` must be divisible by `heads`. Received: width=8, heads=0."),
        (lambda: TransformerBlock(8, 2, gelu="relu"), "`gelu` must be one of exact, tanh. Received: gelu='relu'."),
        (
            lambda: CLIPLayer(8, 2, 16, "relu"),
            "one of ['gelu', 'gelu_tanh', 'quick_gelu']. Received: activation='relu'.",
        ),
        (lambda: Downsample(8, "before"), '`padding` must be "all" or "after". Received: padding=\'before\'.'),
        (lambda: TimestepEmbedding(5), "`width` must be even. Received: width=5."),
    ],
)
def test_bad_argument_is_told(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)


@pytest.mark.parametrize(
    "layer",
    [
        GroupNorm(groups=2, epsilon=1e-3),
        ResnetBlock(8, 4, 1e-6, time=True, zero=True),
        Attention(8, 2, use_bias=True, causal=True),
        AttentionBlock(8, 4, 1e-5),
        TransformerBlock(8, 2, 1e-6, "tanh"),
        SpatialTransformer(8, 2, 2, 4, True, 1e-6, 1e-5, "tanh"),
        Downsample(8, "after"),
        Upsample(8),
        TimestepEmbedding(8, False, 1),
        PositionEmbedding(5, 8),
        ClassToken(8),
        CLIPLayer(8, 2, 16, "gelu", 1e-6, False),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layer_is_made_again_from_its_config(layer):
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(layer))
    assert type(again) is type(layer)
    assert again.get_config() == layer.get_config()


def test_blank_weights_are_a_scope():
    with blank_weights():
        blank = dense(4, "blank")
        blank.build((None, 4))
    drawn = dense(4, "drawn")
    drawn.build((None, 4))
    assert to_numpy(drawn.kernel).all()
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(blank))
    assert not to_numpy(again.kernel).any()


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="only TensorFlow has memory that is not written")
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="Linux says what memory a process has")
def test_blank_weights_take_no_memory():
    def anonymous():
        return int(re.search(r"RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10

    before = anonymous()
    with blank_weights():
        blank = dense(8192, "blank", "float32")
        blank.build((None, 8192))
    assert blank.kernel.shape == (8192, 8192)
    assert anonymous() - before < 32  # MiB, of 256
