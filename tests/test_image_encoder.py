"""CLIP's image encoder: numbers against NumPy, variables, files, arguments."""

import keras
import numpy as np
import pytest
from numpy_layers import layer_normalized, multi_head
from tiny_models import make, numbers, relative_error, run, to_numpy

import latentdiff as ld
from latentdiff.models.image_encoder import IMAGE_MEAN, IMAGE_STD, CLIPImageEncoder
from latentdiff.presets import named_variables

CONFIG = {
    "image_size": 12,
    "patch_size": 4,
    "width": 8,
    "depth": 2,
    "heads": 2,
    "mlp_width": 16,
    "projection_dim": 6,
}


@pytest.fixture(scope="module")
def encoder():
    return make(CLIPImageEncoder, CONFIG)


def patches(image, size):
    """(B, H, W, 3) -> (B, N, size * size * 3), row by row."""
    batch, height, width, channels = image.shape
    cut = image.reshape(batch, height // size, size, width // size, size, channels).transpose(0, 1, 3, 2, 4, 5)
    return cut.reshape(batch, -1, size * size * channels)


def expected_embedding(image, w):
    pixels = (image.astype("float64") / 2 + 0.5 - np.array(IMAGE_MEAN)) / np.array(IMAGE_STD)
    x = patches(pixels, 4) @ w["patch_embedding/kernel"].reshape(-1, 8)
    x = np.concatenate([np.broadcast_to(w["class_token/embedding"], (len(x), 1, 8)), x], axis=1)
    x = layer_normalized(x + w["position_embedding/embeddings"], w, "pre_norm")
    for i in range(2):
        part = {path.removeprefix(f"layer_{i}/"): value for path, value in w.items()}
        x = x + multi_head(*[layer_normalized(x, part, "norm_1")] * 2, part, "attention", 2)
        wide = layer_normalized(x, part, "norm_2") @ part["mlp_1/kernel"] + part["mlp_1/bias"]
        x = x + (wide / (1 + np.exp(-1.702 * wide))) @ part["mlp_2/kernel"] + part["mlp_2/bias"]
    return layer_normalized(x[:, 0], w, "post_norm") @ w["projection/kernel"]


def test_embedding_is_that_of_the_paper(encoder):
    image = np.tanh(numbers(2, 12, 12, 3))
    w = {path: to_numpy(variable).astype("float64") for path, variable in named_variables(encoder)}
    np.testing.assert_allclose(to_numpy(run(encoder, image)), expected_embedding(image, w), atol=1e-4)


def test_every_patch_counts(encoder):
    image = np.tanh(numbers(1, 12, 12, 3))
    before = to_numpy(run(encoder, image))
    for row in range(3):
        for column in range(3):
            changed = image.copy()
            changed[:, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 0.5
            assert relative_error(run(encoder, changed), before) > 1e-3, (row, column)


def test_normalization_is_the_configurations(encoder):
    other = CLIPImageEncoder(**CONFIG, image_mean=(0.5, 0.5, 0.5), image_std=(0.5, 0.5, 0.5))
    other.set_weights([to_numpy(variable) for variable in encoder.weights])
    image = np.tanh(numbers(1, 12, 12, 3))
    told = image * 0.5 + 0.5  # from black 0 to white 1
    clips = (told - np.array(IMAGE_MEAN)) / np.array(IMAGE_STD)
    # With these the image comes through as it is, so it can be handed in as CLIP's would be.
    np.testing.assert_allclose(
        to_numpy(run(other, clips.astype("float32"))), to_numpy(run(encoder, image)), rtol=1e-3, atol=1e-4
    )


def test_bfloat16_is_near_float32(encoder):
    half = make(CLIPImageEncoder, CONFIG, dtype="bfloat16")
    assert {variable.dtype for variable in half.variables} == {"bfloat16"}
    image = np.tanh(numbers(2, 12, 12, 3))
    error = relative_error(keras.ops.cast(run(half, image), "float32"), run(encoder, image))
    assert 1e-5 < error < 0.1


# Keras' own, when it writes a variable of TensorFlow under NumPy 2.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
def test_keras_keeps_it_in_every_way_that_it_has(dtype, tmp_path):
    config = {**CONFIG, "depth": 1, "activation": "gelu", "image_mean": [0.5, 0.4, 0.3]}
    network = make(CLIPImageEncoder, config, dtype=dtype)
    again = CLIPImageEncoder.from_config(network.get_config())
    network.save_weights(tmp_path / "network.weights.h5")
    again.load_weights(tmp_path / "network.weights.h5")
    network.save(tmp_path / "network.keras")
    loaded = keras.saving.load_model(tmp_path / "network.keras")
    for other in (again, loaded):
        assert type(other) is CLIPImageEncoder
        assert other.get_config() == network.get_config()
        for mine, theirs in zip(network.variables, other.variables, strict=True):
            assert (theirs.path, theirs.dtype) == (mine.path, mine.dtype)
            np.testing.assert_array_equal(to_numpy(theirs), to_numpy(mine))
    clone = keras.models.clone_model(network)  # of a class's own configuration Keras makes a plain functional model
    clone.set_weights(network.get_weights())
    image = np.tanh(numbers(1, 12, 12, 3))
    ours, theirs = (to_numpy(keras.ops.cast(run(model, image), "float32")) for model in (network, clone))
    np.testing.assert_allclose(theirs, ours, atol=1e-6)


def test_it_is_a_public_name():
    assert ld.CLIPImageEncoder is CLIPImageEncoder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch_size": 5}, "`image_size` must be divisible by `patch_size`. Received: image_size=12, patch_size=5."),
        ({"patch_size": 0}, "Received: image_size=12, patch_size=0."),
        ({"heads": 3}, "`width` must be divisible by `heads`. Received: width=8, heads=3."),
        ({"activation": "swish"}, "Received: activation='swish'."),
        ({"image_mean": (0.5,)}, "`image_mean` must be three numbers. Received: image_mean=(0.5,)."),
        ({"image_std": (0.5, 0.5, 0)}, "`image_std` must be three positive numbers. Received: image_std=(0.5, 0.5, 0)"),
    ],
)
def test_bad_argument_is_told(changes, message):
    with pytest.raises(ValueError) as error:
        CLIPImageEncoder(**{**CONFIG, **changes})
    assert message in str(error.value)
