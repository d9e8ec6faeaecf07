"""The three networks: variables, configurations, files, sizes."""

import math
import random

import keras
import numpy as np
import pytest
from tiny_models import TEXT_ENCODER, UNET, make, numbers, relative_error, run, to_numpy
from toy_training import JIT

from latentdiff.backend import assign
from latentdiff.checkpoints.diffusers import key_map
from latentdiff.checkpoints.key_map import as_dtype
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.models.layers import blank_weights
from latentdiff.models.text_encoder import CLIPTextEncoder
from latentdiff.models.unet import UNet
from latentdiff.presets import named_variables

SD2_UNET = {
    "channels": (8, 8, 16),
    "blocks_per_level": 1,
    "attention": (True, False, True),
    "heads": (1, 2, 4),
    "transformer_depth": (1, 1, 2),
    "context_dim": 6,
    "dense_projection": True,
    "groups": 4,
}


@pytest.fixture(scope="module")
def sd2_unet():
    """Three levels, dense projections, another number of heads and of transformers a level."""
    return make(UNet, SD2_UNET)


def unet_inputs(unet, height, width, batch=1):
    context_dim = unet.config["context_dim"]
    return {
        "latent": numbers(batch, height, width, 4),
        "timestep": np.linspace(951, 3, batch).astype("float32"),
        "context": numbers(batch, 5, context_dim, seed=1),
    }


def assert_variables_are_those_of_the_key_map(kind, network):
    ours = {path: tuple(variable.shape) for path, variable in named_variables(network)}
    assert ours == {entry.path: entry.shape for entry in key_map(kind, network.config)}


@pytest.mark.parametrize("kind", ["unet", "autoencoder", "text_encoder"])
def test_variables_are_those_of_the_key_map(kind, tiny_pipe):
    assert_variables_are_those_of_the_key_map(kind, getattr(tiny_pipe, kind))


def test_variables_of_an_sd2_unet_are_those_of_the_key_map(sd2_unet):
    assert_variables_are_those_of_the_key_map("unet", sd2_unet)


def test_unet_sees_each_of_its_inputs_at_an_odd_size(sd2_unet):
    inputs = unet_inputs(sd2_unet, 5, 7)
    out = to_numpy(run(sd2_unet, inputs))
    assert out.shape == (1, 5, 7, 4)
    assert np.isfinite(out).all()
    for name, changed in (("timestep", inputs["timestep"] - 1), ("context", inputs["context"] * 2)):
        assert relative_error(run(sd2_unet, {**inputs, name: changed}), out) > 1e-4, name


def test_unet_starts_at_zero():
    """So that a training begins with the prediction's mean: zero."""
    unet = UNet(**{**UNET, "channels": (8,), "attention": (True,), "heads": 2}, mid_attention=False)
    assert not to_numpy(run(unet, unet_inputs(unet, 2, 2))).any()
    assert "mid_attention" not in {layer.name for layer in unet.layers}
    assert_variables_are_those_of_the_key_map("unet", unet)


@pytest.fixture(scope="module")
def half_unet():
    """The tiny pipeline's in bfloat16."""
    return make(UNet, UNET, seed=2, dtype="bfloat16")


def test_timestep_951_is_not_952_in_a_bfloat16_unet(half_unet):
    assert {variable.dtype for variable in half_unet.variables} == {"bfloat16"}
    embedding = keras.Model(half_unet.inputs, half_unet.get_layer("timestep_embedding").output)
    frequencies = 10000.0 ** (-np.arange(4) / 4)
    expected = np.concatenate([np.cos(951 * frequencies), np.sin(951 * frequencies)])
    np.testing.assert_allclose(to_numpy(run(embedding, unet_inputs(half_unet, 4, 6)))[0], expected, atol=5e-4)


def test_bfloat16_is_near_float32(half_unet, tiny_pipe):
    inputs = unet_inputs(half_unet, 4, 6)
    expected = run(tiny_pipe.unet, inputs)
    assert 1e-5 < relative_error(keras.ops.cast(run(half_unet, inputs), "float32"), expected) < 0.1


def test_text_encoder_is_causal(tiny_pipe):
    tokens = np.array([[3, 5, 7, 9], [3, 5, 8, 9]], "int32")
    first, second = to_numpy(run(tiny_pipe.text_encoder, tokens))
    np.testing.assert_allclose(first[:2], second[:2], atol=1e-6)
    assert np.abs(first[2:] - second[2:]).min(axis=-1).max() > 1e-3


def inputs_of(kind, network):
    if kind == "unet":
        return unet_inputs(network, 4, 6)
    return numbers(1, 8, 12, 3) if kind == "autoencoder" else np.array([[3, 5, 7]], "int32")


# Keras' own, when it writes a variable of TensorFlow under NumPy 2.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("kind", ["unet", "autoencoder", "text_encoder"])
def test_network_comes_back_from_its_file(kind, tiny_pipe, tmp_path):
    network = getattr(tiny_pipe, kind)
    network.save(tmp_path / "network.keras")
    again = keras.saving.load_model(tmp_path / "network.keras")
    assert type(again) is type(network)
    assert again.get_config() == network.get_config()
    inputs = inputs_of(kind, network)
    np.testing.assert_allclose(to_numpy(run(again, inputs)), to_numpy(run(network, inputs)), atol=1e-6)
    if kind == "autoencoder":
        ours, theirs = (to_numpy(run(model.encode, inputs, model=model)) for model in (again, network))
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


NARROW = {
    # A transformer in the middle alone.
    "unet": (UNet, {**UNET, "channels": (4,), "attention": (False,), "heads": 2, "groups": 2, "gelu": "tanh"}),
    "autoencoder": (Autoencoder, {"channels": (4,), "blocks_per_level": 1, "groups": 2, "norm_epsilon": 1e-5}),
    "text_encoder": (CLIPTextEncoder, {**TEXT_ENCODER, "activation": "gelu_tanh"}),
}


def assert_same(network, other):
    """Class, configuration and every variable, bit for bit."""
    assert type(other) is type(network)
    assert other.get_config() == network.get_config()
    theirs = dict(named_variables(other))
    for path, variable in named_variables(network):
        assert theirs[path].dtype == variable.dtype, path
        np.testing.assert_array_equal(to_numpy(theirs[path]), to_numpy(variable), err_msg=path)


# Keras' own, when it writes a variable of TensorFlow under NumPy 2.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "mixed_bfloat16"])
@pytest.mark.parametrize("kind", list(NARROW))
def test_keras_keeps_a_network_in_every_way_that_it_has(kind, dtype, tmp_path):
    network_class, config = NARROW[kind]
    network = make(network_class, config, dtype=dtype)

    again = network_class.from_config(network.get_config())
    assert again.get_config() == network.get_config()
    network.save_weights(tmp_path / "network.weights.h5")
    again.load_weights(tmp_path / "network.weights.h5")
    assert_same(network, again)

    clone = keras.models.clone_model(network)  # of a class's own configuration Keras makes a plain functional model
    clone.set_weights(network.get_weights())
    for mine, theirs in zip(network.weights, clone.weights, strict=True):
        assert theirs.dtype == mine.dtype
        np.testing.assert_array_equal(to_numpy(theirs), to_numpy(mine))

    network.save(tmp_path / "network.keras")
    assert_same(network, keras.models.load_model(tmp_path / "network.keras"))


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("kind", list(NARROW))
def test_keras_keeps_a_network_that_was_trained(kind, tmp_path):
    network_class, config = NARROW[kind]
    network = make(network_class, config)
    before = {path: to_numpy(variable) for path, variable in named_variables(network)}
    inputs = inputs_of(kind, network)
    target = np.zeros_like(to_numpy(run(network, inputs)))
    network.compile("adam", "mse", jit_compile=JIT, run_eagerly=not JIT)
    network.fit(inputs, target, verbose=0)
    assert any((to_numpy(variable) != before[path]).any() for path, variable in named_variables(network))

    network.save(tmp_path / "network.keras")
    again = keras.models.load_model(tmp_path / "network.keras")
    assert_same(network, again)
    assert int(again.optimizer.iterations) == 1
    clone = keras.models.clone_model(network)
    clone.set_weights(network.get_weights())
    np.testing.assert_allclose(to_numpy(run(clone, inputs)), to_numpy(run(network, inputs)), atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(7, 5), (3, 2, 4, 6), (40,), (0, 3)])
@pytest.mark.parametrize("offset", [0, 1])
def test_variable_holds_what_it_is_assigned_wherever_that_lies(shape, dtype, offset):
    variable = keras.Variable(initializer="ones", shape=shape, dtype=dtype)
    memory = numbers(math.prod(shape) + 1).astype(as_dtype(dtype))
    value = memory[offset : offset + math.prod(shape)].reshape(shape)
    assign(variable, value)
    assert variable.dtype == dtype
    np.testing.assert_array_equal(to_numpy(variable), value)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("half", ["encoder", "decoder"])
def test_keras_keeps_each_half_of_an_autoencoder(half, tmp_path):
    network_class, config = NARROW["autoencoder"]
    network = getattr(make(network_class, config), half)
    inputs = numbers(1, 4, 6, 3 if half == "encoder" else 4)
    expected = to_numpy(run(network, inputs))

    other = keras.Model.from_config(network.get_config())
    assert np.abs(to_numpy(run(other, inputs)) - expected).max() > 0.1
    network.save_weights(tmp_path / "half.weights.h5")
    other.load_weights(tmp_path / "half.weights.h5")
    network.save(tmp_path / "half.keras")
    for again in (other, keras.models.load_model(tmp_path / "half.keras")):
        np.testing.assert_allclose(to_numpy(run(again, inputs)), expected, atol=1e-6)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_keras_file_holds_what_low_ranks_have_added(tmp_path):
    network_class, config = NARROW["text_encoder"]
    network = make(network_class, config)
    tokens = inputs_of("text_encoder", network)
    before = to_numpy(run(network, tokens))
    dense = network.get_layer("layer_0").mlp_1
    dense.enable_lora(2)
    dense.lora_kernel_b.assign(numbers(*dense.lora_kernel_b.shape))
    expected = to_numpy(network(tokens))
    assert np.abs(expected - before).max() > 0.01
    network.save(tmp_path / "network.keras")
    again = keras.models.load_model(tmp_path / "network.keras")
    np.testing.assert_allclose(to_numpy(again(tokens)), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("network_class", "config"),
    [
        (UNet, {**UNET, "channels": (4,), "attention": (False,), "heads": (2,)}),
        (Autoencoder, {"channels": (4,), "blocks_per_level": 1, "groups": 2}),
        (CLIPTextEncoder, TEXT_ENCODER),
    ],
)
def test_blank_weights_draw_nothing(network_class, config):
    before = random.getstate()
    with blank_weights():
        network = network_class(**config)
    assert random.getstate() == before  # where Keras' initializers take their seeds from
    vectors = {path: to_numpy(each) for path, each in named_variables(network) if len(each.shape) == 1}
    assert all((array == (1 if path.endswith("gamma") else 0)).all() for path, array in vectors.items())
    network_class(**config)
    assert random.getstate() != before


@pytest.mark.parametrize(
    ("network_class", "config", "message"),
    [
        (UNet, {"channels": (8, 30)}, "`attention` must have one value for each of `channels`"),
        (UNet, {"channels": (30,), "attention": (False,)}, "Received: channels=30, groups=32."),
        (UNet, {**UNET, "heads": (2, 4, 8)}, "`heads` must have one value for each of `channels`"),
        (UNet, {**UNET, "transformer_depth": [1]}, "`transformer_depth` must have one value for each of `channels`"),
        (UNet, {**UNET, "gelu": "relu"}, "`gelu` must be one of exact, tanh. Received: gelu='relu'."),
        (UNet, {**UNET, "heads": 3}, "`width` must be divisible by `heads`. Received: width=8, heads=3."),
        (Autoencoder, {"channels": (8, 16)}, "Received: channels=8, groups=32."),
        (CLIPTextEncoder, {**TEXT_ENCODER, "heads": 3}, "Received: width=8, heads=3."),
        (CLIPTextEncoder, {**TEXT_ENCODER, "activation": "swish"}, "Received: activation='swish'."),
    ],
)
def test_bad_argument_is_told(network_class, config, message):
    with pytest.raises(ValueError) as error:
        network_class(**config)
    assert message in str(error.value)
