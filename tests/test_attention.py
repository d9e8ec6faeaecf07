"""Attention and its transformers against NumPy."""

import math
import types

import keras
import numpy as np
import pytest
from keras import ops
from numpy_layers import attended, gelu, gelu_tanh, group_normalized, layer_normalized, multi_head, random_weights
from tiny_models import numbers, randomize, relative_error, run, to_numpy

from latentdiff import backend
from latentdiff.models import attention
from latentdiff.models.attention import (
    AttentionBlock,
    CLIPLayer,
    SpatialTransformer,
    TransformerBlock,
    attend,
    has_flash_attention,
)


@pytest.mark.parametrize(
    ("n", "s", "heads", "causal"), [(6, 9, 1, False), (5, 3, 4, False), (7, 7, 2, True), (2, 2, 2, True)]
)
def test_attend_is_attention(n, s, heads, causal):
    q, k, v = numbers(2, n, 8, seed=0), numbers(2, s, 8, seed=1), numbers(2, s, 8, seed=2)
    expected = attended(*(x.astype("float64") for x in (q, k, v)), heads, causal)
    out = attend(*map(ops.convert_to_tensor, (q, k, v)), heads, causal)
    np.testing.assert_allclose(to_numpy(out), expected, atol=1e-5)


@pytest.mark.parametrize(("scores_of_head", "heads", "queries"), [(1, 2, 4), (40, 1, 8)])
@pytest.mark.parametrize("n", [9, 12, 14])
def test_pieces_of_heads_and_queries_make_the_whole(n, scores_of_head, heads, queries, monkeypatch):
    q, k, v = (ops.convert_to_tensor(numbers(2, length, 8, seed=i)) for i, length in enumerate((n, 5, 5)))
    whole = attend(q, k, v, 2)
    shapes = []
    softmax_of_keras = ops.softmax
    monkeypatch.setattr(ops, "softmax", lambda x, axis: shapes.append(x.shape) or softmax_of_keras(x, axis=axis))
    monkeypatch.setattr(attention, "FEWEST", 1)
    monkeypatch.setattr(attention, "SCORES", 4 * 4 * 4 * 5)  # bytes of four queries: two examples, two heads, five keys
    monkeypatch.setattr(attention, "SCORES_OF_HEAD", scores_of_head)
    in_pieces = attend(q, k, v, 2)
    assert {shape[1] for shape in shapes} == {heads} and max(shape[2] for shape in shapes) == queries
    assert sum(shape[1] * shape[2] for shape in shapes) == 2 * n
    np.testing.assert_allclose(to_numpy(in_pieces), to_numpy(whole), atol=1e-6)


@pytest.mark.parametrize(
    ("positions", "width", "heads"), [(4096, 320, 8), (9216, 320, 5), (1024, 640, 8), (4096, 512, 1)]
)
def test_scores_of_all_positions_are_never_held_at_once(positions, width, heads, monkeypatch):
    """At Stable Diffusion's sizes, and only in symbols, so that no score is computed."""
    shapes = []
    softmax_of_keras = ops.softmax
    monkeypatch.setattr(ops, "softmax", lambda x, axis: shapes.append(x.shape) or softmax_of_keras(x, axis=axis))
    x = keras.KerasTensor((2, positions, width))
    assert attend(x, x, x, heads).shape == (2, positions, width)
    assert sum(shape[1] * shape[2] for shape in shapes) == heads * positions
    assert {shape[3] for shape in shapes} == {positions}
    assert max(shape[2] for shape in shapes) <= 1024
    assert all(shape[1:3] == (1, attention.FEWEST) or 4 * math.prod(shape) <= attention.SCORES for shape in shapes)


@pytest.mark.parametrize("causal", [False, True])
def test_flash_attention_is_attention(causal, monkeypatch):
    """In one operation of Keras', which takes cuDNN's kernel on a GPU and XLA's elsewhere."""
    q, k, v = (ops.cast(numbers(2, 6, 16, seed=i), "bfloat16") for i in range(3))
    chunked = attend(q, k, v, 2, causal)
    monkeypatch.setattr(attention, "has_flash_attention", lambda dtype, size: (dtype, size) == ("bfloat16", 8))
    monkeypatch.setattr(ops, "softmax", None)
    flash = attend(q, k, v, 2, causal)
    np.testing.assert_allclose(*(to_numpy(ops.cast(x, "float32")) for x in (flash, chunked)), atol=0.03)


@pytest.mark.parametrize(
    ("gpu", "dtype", "size", "there"),
    [
        (True, "bfloat16", 40, True),
        (True, "float16", 128, True),
        (True, "float32", 40, False),
        (True, "bfloat16", 160, False),
        (False, "bfloat16", 40, False),
    ],
)
def test_flash_attention_is_taken_where_cudnn_has_it(gpu, dtype, size, there, monkeypatch):
    monkeypatch.setattr(attention, "has_cudnn_attention", lambda: gpu)
    assert has_flash_attention(dtype, size) == there


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="TensorFlow has no such operation")
@pytest.mark.parametrize(("capability", "there"), [("9.0", True), ("8.0", True), ("7.5", False), ("gfx942", False)])
def test_cudnn_attention_needs_nvidias_newer_processors(capability, there, monkeypatch):
    import jax

    monkeypatch.setattr(backend, "has_gpu", lambda: True)
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(compute_capability=capability)])
    assert backend.has_cudnn_attention.__wrapped__() == there


@pytest.mark.parametrize(("name", "function"), [("exact", gelu), ("tanh", gelu_tanh)])
def test_transformer_block_attends_twice_and_ends_in_a_geglu(name, function):
    x, context = numbers(2, 5, 8), numbers(2, 3, 6, seed=1)
    block, w = random_weights(TransformerBlock(8, 2, gelu=name, name="block"), x.shape, context.shape)
    h = x + multi_head(*[layer_normalized(x, w, "norm_1")] * 2, w, "self_attention", 2)
    h = h + multi_head(layer_normalized(h, w, "norm_2"), context, w, "cross_attention", 2)
    wide = layer_normalized(h, w, "norm_3") @ w["geglu/kernel"] + w["geglu/bias"]
    value, gate = wide[..., :32], wide[..., 32:]  # the value half comes first
    h = h + (value * function(gate)) @ w["mlp_out/kernel"] + w["mlp_out/bias"]
    np.testing.assert_allclose(to_numpy(run(block, x, context)), h, atol=2e-5)


@pytest.mark.parametrize("dense_projection", [False, True])
def test_spatial_transformer_starts_as_the_identity(dense_projection):
    x, context = numbers(2, 3, 4, 8), numbers(2, 3, 6, seed=1)
    block = SpatialTransformer(8, 2, 1, groups=4, dense_projection=dense_projection)
    block.build(x.shape, context.shape)
    np.testing.assert_array_equal(to_numpy(run(block, x, context)), x)


def test_spatial_transformers_of_both_ages_are_one_function():
    """A 1 x 1 convolution and a dense layer hold the same numbers."""
    x, context = numbers(2, 3, 4, 8), numbers(2, 3, 6, seed=1)
    old = SpatialTransformer(8, 2, 2, groups=4)
    new = SpatialTransformer(8, 2, 2, groups=4, dense_projection=True)
    for block in (old, new):
        block.build(x.shape, context.shape)
    randomize(old)
    for mine, theirs in zip(new.variables, old.variables, strict=True):
        mine.assign(ops.reshape(theirs, mine.shape))
    out = run(new, x, context)
    assert relative_error(out, run(old, x, context)) < 1e-5
    assert relative_error(out, x) > 0.1


def test_spatial_transformer_has_an_epsilon_of_its_own_at_the_entry():
    x = numbers(2, 3, 4, 8)
    block = SpatialTransformer(8, 2, groups=4, norm_epsilon=1e-3, entry_epsilon=0.5)
    block.build(x.shape, (2, 3, 6))
    np.testing.assert_allclose(to_numpy(run(block.norm, x)), group_normalized(x, 4, 0.5), atol=2e-5)


def test_attention_block_attends_over_all_positions():
    x = numbers(2, 3, 4, 8)
    block, w = random_weights(AttentionBlock(8, 4, 1e-6, name="block"), x.shape)
    h = group_normalized(x, 4, 1e-6, w["norm/gamma"], w["norm/beta"]).reshape(2, 12, 8)
    named = {f"block/{path}": value for path, value in w.items()}
    expected = x + multi_head(h, h, named, "block", heads=1).reshape(x.shape)
    np.testing.assert_allclose(to_numpy(run(block, x)), expected, atol=2e-5)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("causal", [True, False])
def test_layer_is_clips(activation, causal):
    x = numbers(2, 5, 8)
    layer, w = random_weights(CLIPLayer(8, 2, 16, activation, causal=causal, name="layer"), x.shape)
    h = x + multi_head(*[layer_normalized(x, w, "norm_1")] * 2, w, "attention", 2, causal)
    wide = layer_normalized(h, w, "norm_2") @ w["mlp_1/kernel"] + w["mlp_1/bias"]
    functions = {"quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)), "gelu": gelu, "gelu_tanh": gelu_tanh}
    wide = functions[activation](wide)
    h = h + wide @ w["mlp_2/kernel"] + w["mlp_2/bias"]
    np.testing.assert_allclose(to_numpy(run(layer, x)), h, atol=2e-5)
