"""Layers whose passes over memory `fused` makes one: the same numbers, and only in graphs that run where they begin."""

import functools
import gc
import weakref

import keras
import numpy as np
import pytest
from keras import ops
from tiny_models import numbers, to_numpy

from latentdiff.backend import Compiled, running_here
from latentdiff.fused import LARGE, _compiling, fused
from latentdiff.models.attention import GEGLU, attend
from latentdiff.models.norms import GroupNorm, LayerNormalization

LARGE_MAP, LARGE_SEQUENCE = (2, 16, 64, 256), (2, 512, 512)  # of LARGE numbers each
ROUNDING = {"float32": 1e-5, "bfloat16": 2**-6}
LAYERS = {
    "norm": (GroupNorm, LARGE_MAP, {"groups": 8}),
    "norm and swish": (GroupNorm, LARGE_MAP, {"groups": 8, "swish": True}),
    "norm of sizes that have no small divisor": (GroupNorm, (3, 37, 37, 132), {"groups": 6, "swish": True}),
    "layer norm": (LayerNormalization, LARGE_SEQUENCE, {}),
    "layer norm of sizes that have no divisor": (LayerNormalization, (3, 347, 509), {}),
    "geglu": (GEGLU, LARGE_SEQUENCE, {"units": 1024}),
    "geglu of tanh": (GEGLU, LARGE_SEQUENCE, {"units": 1024, "gelu": "tanh"}),
}


def layer_and_input(name, dtype):
    kind, shape, arguments = LAYERS[name]
    keras.utils.set_random_seed(0)
    layer = kind(**arguments, dtype=dtype)
    x = ops.cast(ops.convert_to_tensor(numbers(*shape, seed=1) + 0.5), dtype)
    assert np.prod(x.shape) >= LARGE
    layer.build(x.shape)
    return layer, x


def xla_calls(function, *arrays):
    """How many calls and functions XLA compiles in the graph of a `tf.function`, and in those that it calls."""
    graph = function.get_concrete_function(*arrays).graph.as_graph_def()
    holders = [*graph.node, *graph.library.function, *(node for f in graph.library.function for node in f.node_def)]
    return sum(holder.attr["_XlaMustCompile"].b for holder in holders)  # false where there is none


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
    assert xla_calls(tf.function(layer), x) == 0  # what is exported
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


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="elsewhere all is XLA's")
def test_many_shapes_make_no_warning(caplog):
    import tensorflow as tf

    double = fused(lambda x: x * 2)
    with caplog.at_level("WARNING", "tensorflow"):
        for size in range(10):
            Compiled(double, [])(tf.zeros((LARGE + size,)))
        _compiling.submit(lambda: None).result()  # it compiles one after the other
    assert not caplog.records


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="elsewhere all is XLA's")
@pytest.mark.parametrize("kind", [GroupNorm, LayerNormalization])
def test_small_norms_of_a_shape_are_traced_once_and_compute_the_same(kind):
    """Three layers with weights of their own are three calls of one function, in graphs that run where they begin."""
    import tensorflow as tf

    layers = [kind(name=f"norm_{i}", **({"groups": 4} if kind is GroupNorm else {})) for i in range(3)]
    x = ops.convert_to_tensor(numbers(2, 5, 7, 24, seed=1))
    for i, layer in enumerate(layers):
        layer.build(x.shape)
        layer.gamma.assign(numbers(24, seed=i) + i)

    def chained(x):
        for layer in layers:
            x = layer(x)
        return x

    here = Compiled(chained, layers)
    graph = here._run.get_concrete_function(x).graph.as_graph_def()
    called = {call.attr["f"].func.name for call in graph.node if "PartitionedCall" in call.op}
    assert len(called) == 1
    assert not tf.function(chained).get_concrete_function(x).graph.as_graph_def().library.function  # what is exported
    assert np.abs(to_numpy(here(x)) - to_numpy(chained(x))).max() <= 1e-5


@pytest.mark.parametrize("size", ["large", "small"])
@pytest.mark.parametrize("kind", [GroupNorm, LayerNormalization])
def test_norms_in_half_precision_keep_their_statistics_in_float32(kind, size):
    """Of numbers whose mean is thirty times their deviation: half precision would have no bit left of a variance."""
    shape = LARGE_MAP if size == "large" else (2, 8, 8, 256)
    x = ops.cast(ops.convert_to_tensor(numbers(*shape, seed=1) - 30), "bfloat16")
    layer = kind(dtype="bfloat16", **({"groups": 8} if kind is GroupNorm else {}))
    layer.build(shape)
    found = to_numpy(ops.cast(Compiled(layer, [layer])(x), "float32"))
    exact = to_numpy(ops.cast(x, "float32")).astype("float64")
    if kind is GroupNorm:
        exact = exact.reshape(*shape[:-1], 8, -1)
    axes = (1, 2, 4) if kind is GroupNorm else (-1,)
    exact = (exact - exact.mean(axes, keepdims=True)) / exact.std(axes, keepdims=True)
    assert np.abs(found - exact.reshape(shape)).max() <= 2**-7 * np.abs(exact).max()


def test_attention_in_half_precision_sums_in_float32():
    """Against float32, of 2,048 equal scores: a sum of their exponentials in bfloat16 would stop at 256."""
    q, k, v = (np.zeros((1, 4, 8)), np.zeros((1, 2048, 8)), numbers(1, 2048, 8, seed=2) + 1)
    q, k, v = (ops.cast(ops.convert_to_tensor(a.astype("float32")), "bfloat16") for a in (q, k, v))
    out = Compiled(lambda *a: ops.cast(attend(*a, 1), "float32"), [])(q, k, v)
    expected = to_numpy(ops.cast(v, "float32")).mean(axis=1, keepdims=True)
    np.testing.assert_allclose(to_numpy(out), np.broadcast_to(expected, out.shape), rtol=0.02)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="elsewhere all is XLA's")
@pytest.mark.parametrize("known", ["all but the batch", "all but the batch and the rows"])
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_those_of_the_layer(name, dtype, known, monkeypatch):
    """Of the input and of every weight, for an upstream gradient that is nowhere the same; against float32."""
    import tensorflow as tf

    layer, x = layer_and_input(name, dtype)
    exact, _ = layer_and_input(name, "float32")
    for weight, variable in zip(layer.weights, exact.weights, strict=True):
        variable.assign(ops.cast(weight, "float32"))
    upstream = ops.cast(ops.convert_to_tensor(numbers(*layer(x).shape, seed=3)), dtype)

    def gradients(layer, x, upstream):
        variables = [variable.value for variable in layer.trainable_variables]
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
        return [tf.cast(g, "float32") for g in tape.gradient(y, [x, *variables], upstream)]

    unknown = 1 if known == "all but the batch" else 2
    given = [tf.TensorSpec((*[None] * unknown, *a.shape[unknown:]), a.dtype) for a in (x, upstream)]
    # An unknown size counts as 16, so that few rows of a sequence would not be enough.
    monkeypatch.setattr("latentdiff.fused.LARGE", 2**16)
    function = tf.function(functools.partial(gradients, layer), input_signature=given)
    with running_here(learning=True):
        found = function(x, upstream)
    assert xla_calls(function) >= 2
    expected = gradients(exact, tf.cast(x, "float32"), tf.cast(upstream, "float32"))
    for one, other in zip(expected, found, strict=True):
        assert np.abs(other - one).max() <= 4 * ROUNDING[dtype] * np.abs(one).max()


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="elsewhere all is XLA's")
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_attention_are_those_of_its_definition(causal, dtype):
    import tensorflow as tf

    # Keys that have a common mean show a rounding which all of a query's have in common.
    arrays = [ops.cast(ops.convert_to_tensor(numbers(2, 512, 16, seed=i) / 2 + i), dtype) for i in range(4)]

    def gradients(*arrays):
        *inputs, upstream = arrays
        with tf.GradientTape() as tape:
            tape.watch(inputs)
            out = attend(*inputs, 2, causal)
        return [tf.cast(g, "float32") for g in tape.gradient(out, inputs, upstream)]

    expected = gradients(*(tf.cast(array, "float32") for array in arrays))
    with running_here(learning=True):
        found = tf.function(gradients)(*arrays)
    for one, other in zip(expected, found, strict=True):
        assert np.abs(other - one).max() <= 8 * ROUNDING[dtype] * np.abs(one).max()


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="elsewhere all is XLA's")
@pytest.mark.parametrize("name", LAYERS)
def test_a_graph_that_nobody_needs_is_freed(name):
    layer, x = layer_and_input(name, "float32")
    compiled = Compiled(layer, [layer])
    graph = weakref.ref(compiled._run.get_concrete_function(x).graph)
    del compiled
    gc.collect()
    assert graph() is None
