"""The autoencoder: the documents' code, the posterior, the latent's scale."""

import keras
import numpy as np
import pytest
from keras import ops
from tiny_models import AUTOENCODER, make, numbers, relative_error, run, to_numpy

from latentdiff.models.autoencoder import Autoencoder


class PaddedConv2D(keras.layers.Layer):
    """This class and the five after it are the documents' code.

    Keras' group normalisation stands in for that of TensorFlow Addons, `keras.ops` for `tf`, and the numbers of
    channels are arguments.
    """

    def __init__(self, channels, kernel_size, padding=0, stride=1):
        super().__init__()
        self.padding2d = keras.layers.ZeroPadding2D((padding, padding))
        self.conv2d = keras.layers.Conv2D(channels, kernel_size, strides=(stride, stride))

    def call(self, x):
        return self.conv2d(self.padding2d(x))


def norm():
    return keras.layers.GroupNormalization(groups=32, epsilon=1e-5)


class AttentionBlock(keras.layers.Layer):
    def __init__(self, channels):
        super().__init__()
        self.norm = norm()
        self.q = keras.layers.Conv2D(channels, 1, strides=(1, 1))
        self.k = keras.layers.Conv2D(channels, 1, strides=(1, 1))
        self.v = keras.layers.Conv2D(channels, 1, strides=(1, 1))
        self.proj_out = keras.layers.Conv2D(channels, 1, strides=(1, 1))

    def call(self, x):
        h_ = self.norm(x)
        q, k, v = self.q(h_), self.k(h_), self.v(h_)
        _, h, w, c = q.shape
        q = ops.reshape(q, (-1, h * w, c))
        k = ops.transpose(k, (0, 3, 1, 2))
        k = ops.reshape(k, (-1, c, h * w))
        w_ = q @ k
        w_ = w_ * (c ** (-0.5))
        w_ = keras.activations.softmax(w_)
        v = ops.transpose(v, (0, 3, 1, 2))
        v = ops.reshape(v, (-1, c, h * w))
        w_ = ops.transpose(w_, (0, 2, 1))
        h_ = v @ w_
        h_ = ops.transpose(h_, (0, 2, 1))
        h_ = ops.reshape(h_, (-1, h, w, c))
        return x + self.proj_out(h_)


class ResnetBlock(keras.layers.Layer):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.norm1 = norm()
        self.conv1 = PaddedConv2D(out_channels, 3, padding=1)
        self.norm2 = norm()
        self.conv2 = PaddedConv2D(out_channels, 3, padding=1)
        self.nin_shortcut = PaddedConv2D(out_channels, 1) if in_channels != out_channels else lambda x: x

    def call(self, x):
        h = self.conv1(keras.activations.swish(self.norm1(x)))
        h = self.conv2(keras.activations.swish(self.norm2(h)))
        return self.nin_shortcut(x) + h


class Decoder(keras.Sequential):
    def __init__(self, a, b, c, d):
        super().__init__(
            [
                keras.layers.Lambda(lambda x: 1 / 0.18215 * x),
                PaddedConv2D(4, 1),
                PaddedConv2D(d, 3, padding=1),
                ResnetBlock(d, d),
                AttentionBlock(d),
                ResnetBlock(d, d),
                ResnetBlock(d, d),
                ResnetBlock(d, d),
                ResnetBlock(d, d),
                keras.layers.UpSampling2D(size=(2, 2)),
                PaddedConv2D(d, 3, padding=1),
                ResnetBlock(d, c),
                ResnetBlock(c, c),
                ResnetBlock(c, c),
                keras.layers.UpSampling2D(size=(2, 2)),
                PaddedConv2D(c, 3, padding=1),
                ResnetBlock(c, b),
                ResnetBlock(b, b),
                ResnetBlock(b, b),
                keras.layers.UpSampling2D(size=(2, 2)),
                PaddedConv2D(b, 3, padding=1),
                ResnetBlock(b, a),
                ResnetBlock(a, a),
                ResnetBlock(a, a),
                norm(),
                keras.layers.Activation("swish"),
                PaddedConv2D(3, 3, padding=1),
            ]
        )


class Encoder(keras.Sequential):
    def __init__(self, a, b, c, d):
        super().__init__(
            [
                PaddedConv2D(a, 3, padding=1),
                ResnetBlock(a, a),
                ResnetBlock(a, a),
                PaddedConv2D(a, 3, padding=(0, 1), stride=2),
                ResnetBlock(a, b),
                ResnetBlock(b, b),
                PaddedConv2D(b, 3, padding=(0, 1), stride=2),
                ResnetBlock(b, c),
                ResnetBlock(c, c),
                PaddedConv2D(c, 3, padding=(0, 1), stride=2),
                ResnetBlock(c, d),
                ResnetBlock(d, d),
                ResnetBlock(d, d),
                AttentionBlock(d),
                ResnetBlock(d, d),
                norm(),
                keras.layers.Activation("swish"),
                PaddedConv2D(8, 3, padding=1),
                PaddedConv2D(8, 1),
                keras.layers.Lambda(lambda x: x[..., :4] * 0.18215),
            ]
        )


CHANNELS = (32, 64, 128, 128)
QUIET = 3e-3  # of the input: so quiet that the epsilon of the first norm counts


@pytest.fixture(scope="module")
def with_documents_epsilon():
    return make(Autoencoder, {"channels": CHANNELS}, norm_epsilon=1e-5)


def move_weights(ours, theirs):
    """From the one to the other in the order of their creation."""
    for mine, other in zip(ours.variables, theirs.weights, strict=True):
        assert mine.path.rpartition("/")[2] == other.path.rpartition("/")[2]
        other.assign(ops.reshape(mine, other.shape))


def quieten(network):
    kernel = network.get_layer("conv_in").kernel
    kernel.assign(kernel * QUIET)
    network.get_layer("conv_in").bias.assign(network.get_layer("conv_in").bias * 0)


def test_encoder_is_the_documents(with_documents_epsilon):
    ours, theirs = with_documents_epsilon, Encoder(*CHANNELS)
    image = numbers(1, 16, 24, 3, scale=0.5)
    theirs.build(image.shape)
    quieten(ours.encoder)
    move_weights(ours.encoder, theirs)
    assert relative_error(run(ours.encode, image, model=ours), run(theirs, image)) < 1e-4


def test_decoder_is_the_documents(with_documents_epsilon):
    ours, theirs = with_documents_epsilon, Decoder(*CHANNELS)
    latent = numbers(1, 2, 3, 4)
    theirs.build(latent.shape)
    quieten(ours.decoder)
    move_weights(ours.decoder, theirs)
    assert relative_error(run(ours.decode, latent, model=ours), run(theirs, latent)) < 1e-4


def test_epsilon_of_the_norms_counts():
    """What the two comparisons above rest on: 1e-6 in place of 1e-5 would not pass."""
    config = {"channels": (8,), "blocks_per_level": 1, "groups": 4, "mid_attention": False}
    networks = [make(Autoencoder, config, norm_epsilon=epsilon) for epsilon in (1e-5, 1e-6)]
    for network in networks:
        quieten(network.encoder)
    image = numbers(1, 4, 4, 3, scale=0.5)
    first, second = (run(network.encode, image, model=network) for network in networks)
    assert relative_error(first, second) > 1e-3


@pytest.fixture(scope="module")
def shifted():
    """An autoencoder with its own scale and shift, and so small that it keeps the size."""
    config = {"channels": (8,), "blocks_per_level": 1, "groups": 4, "mid_attention": False}
    return make(Autoencoder, config, scaling_factor=0.5, shift_factor=0.25)


def test_factor_is_two_for_each_level_but_one(tiny_pipe, shifted, with_documents_epsilon):
    assert (shifted.factor, tiny_pipe.autoencoder.factor, with_documents_epsilon.factor) == (1, 2, 8)


def test_latent_is_the_shifted_and_scaled_mean(shifted):
    image = numbers(2, 3, 5, 3)
    mean, log_variance = run(shifted.moments, image, model=shifted)
    both = to_numpy(run(shifted.encoder, image))
    np.testing.assert_allclose(to_numpy(mean), both[..., :4], atol=1e-6)
    np.testing.assert_allclose(to_numpy(log_variance), both[..., 4:], atol=1e-6)
    latent = to_numpy(run(shifted.encode, image, model=shifted))
    np.testing.assert_allclose(latent, (both[..., :4] - 0.25) * 0.5, atol=1e-6)


def test_decoder_is_told_the_unscaled_latent(shifted):
    latent = numbers(2, 3, 5, 4)
    image = to_numpy(run(shifted.decode, latent, model=shifted))
    np.testing.assert_allclose(image, to_numpy(run(shifted.decoder, latent * 2 + np.float32(0.25))), atol=1e-5)


def test_model_gives_back_what_the_mean_decodes_to(shifted):
    image = numbers(2, 3, 5, 3)
    latent = run(shifted.encode, image, model=shifted)
    again = run(shifted.decode, latent, model=shifted)
    np.testing.assert_allclose(to_numpy(run(shifted, image)), to_numpy(again), atol=1e-5)


def test_sample_is_the_mean_and_so_many_standard_deviations(shifted):
    image, eps = numbers(2, 3, 5, 3), numbers(2, 3, 5, 4, seed=1)
    mean, log_variance = (to_numpy(moment) for moment in run(shifted.moments, image, model=shifted))
    expected = (mean + np.exp(log_variance / 2) * eps - 0.25) * 0.5
    np.testing.assert_allclose(to_numpy(run(shifted.sample, image, eps, model=shifted)), expected, atol=1e-5)


def test_sample_stays_finite_where_the_log_variance_does_not_make_sense(shifted, monkeypatch):
    moments = [numbers(1, 2, 2, 4), np.full((1, 2, 2, 4), 1e4, "float32")]
    monkeypatch.setattr(shifted, "moments", lambda image: [ops.convert_to_tensor(m) for m in moments])
    out = to_numpy(shifted.sample(None, np.ones((1, 2, 2, 4), "float32")))
    np.testing.assert_allclose(out, (moments[0] + np.exp(10.0) - 0.25) * 0.5, rtol=1e-5)


def test_sizes_there_and_back(tiny_pipe):
    image = numbers(1, 8, 12, 3)
    network = tiny_pipe.autoencoder
    latent = run(network.encode, image, model=network)
    assert tuple(latent.shape) == (1, 4, 6, 4)
    assert tuple(run(network.decode, latent, model=network).shape) == (1, 8, 12, 3)


def test_configuration_is_the_constructors(shifted):
    config = shifted.get_config()
    assert config["scaling_factor"] == 0.5 and config["shift_factor"] == 0.25 and config["dtype"] == "float32"
    again = Autoencoder.from_config({**config, **AUTOENCODER})
    assert again.get_config() == {**config, **AUTOENCODER, "channels": [8, 16]}
