"""Layers whose passes over memory `fused` makes one: the same numbers, and only in graphs that run where they begin."""

import keras
import numpy as np
import pytest
from keras import ops
from tiny_models import numbers, to_numpy

from latentdiff.backend import LARGE, Compiled, fused
from latentdiff.models.attention import GEGLU, attend
from latentdiff.models.layers import GroupNorm, LayerNorm

LARGE_MAP, LARGE_SEQUENCE = (2, 32, 64, 256), (2, 1024, 512)  # of LARGE numbers each
ROUNDING = {"float32": 1e-5, "bfloat16": 2**-6}
LAYERS = {
    "norm": (GroupNorm, LARGE_MAP, {"groups": 8}),
    "norm and swish": (GroupNorm, LARGE_MAP, {"groups": 8, "swish": True}),
    "layer norm": (LayerNorm, LARGE_SEQUENCE, {}),
    "geglu": (GEGLU, LARGE_SEQUENCE, {"units": 1024}),
    "geglu of tanh": (GEGLU, LARGE_SEQUENCE, {"units": 1024, "approximate": True}),
}


def layer_and_input(name, dtype):
    kind, shape, arguments = LAYERS[name]
    keras.utils.set_random_seed(0)
    layer = kind(**arguments, dtype=dtype)
    x = ops.cast(ops.convert_to_tensor(numbers(*shape, seed=1) + 0.5), dtype)
    assert np.prod(x.shape) == LARGE
    layer.build(x.shape)
    return layer, x


def xla_calls(function, x):
    """How many functions XLA compiles in the graph of a `tf.function`."""
    graph = function.get_concrete_function(x).graph
    return sum(call.get_attr("_XlaMustCompile") for call in graph.get_operations() if "Call" in call.type)


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("name", LAYERS)
def test_a_large_layer_gives_the_same(name, dtype):
    layer, x = layer_and_input(name, dtype)
    plain, compiled = (to_numpy(ops.cast(f(x), "float32")) for f in (layer, Compiled(layer, [layer])))
    assert np.abs(compiled - plain).max() <= ROUNDING[dtype] * np.abs(plain).max()


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="elsewhere all is XLA's")
@pytest.mark.parametrize("name", LAYERS)
def test_passes_are_one_where_the_graph_runs_here_and_in_no_other_graph(name):
    import tensorflow as tf

    layer, x = layer_and_input(name, "float32")
    assert xla_calls(Compiled(layer, [layer])._run, x) >= 1
    assert xla_calls(tf.function(layer), x) == 0  # what is exported, or trained
    assert xla_calls(Compiled(layer, [layer])._run, x[:, :8]) == 0  # too small to be worth it


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="elsewhere all is XLA's")
def test_a_function_is_traced_once_for_each_shape():
    traced = []

    @fused
    def double(x):
        traced.append(x.shape)
        return 2 * x

    twice = Compiled(lambda x: double(double(x)), [])
    x = ops.ones((2, LARGE))
    for _ in range(2):
        assert to_numpy(twice(x)).min() == 4
    assert len(traced) == 1
    twice(ops.ones((3, LARGE)))
    assert len(traced) == 2


def test_attention_in_half_precision_sums_in_float32():
    """Against float32, of 2,048 equal scores: a sum of their exponentials in bfloat16 would stop at 256."""
    q, k, v = (np.zeros((1, 4, 8)), np.zeros((1, 2048, 8)), numbers(1, 2048, 8, seed=2) + 1)
    q, k, v = (ops.cast(ops.convert_to_tensor(a.astype("float32")), "bfloat16") for a in (q, k, v))
    out = Compiled(lambda *a: ops.cast(attend(*a, 1), "float32"), [])(q, k, v)
    expected = to_numpy(ops.cast(v, "float32")).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(to_numpy(out), np.broadcast_to(expected, out.shape), rtol=0.02)
