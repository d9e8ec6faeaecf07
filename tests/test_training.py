"""Training: the losses against NumPy, and a few steps on toys."""

import keras
import numpy as np
import pytest
from keras import ops
from tiny_models import make, numbers, to_numpy
from toy_training import EMPTY, JIT, toy_networks, toy_training

from latentdiff.diffusion.process import GaussianDiffusion
from latentdiff.diffusion.schedule import scaled_linear_schedule
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.training import AutoencoderTraining, DiffusionTraining


@pytest.fixture(scope="module")
def autoencoder():
    config = {"channels": (4,), "blocks_per_level": 1, "groups": 2, "mid_attention": False}
    return make(Autoencoder, config, latent_channels=2)


def test_autoencoders_loss_is_l1_and_l2_and_a_little_kl(autoencoder):
    training = AutoencoderTraining(autoencoder, kl_weight=0.01)
    x, reconstruction = numbers(2, 4, 6, 3), numbers(2, 4, 6, 3, seed=1)
    mean, log_variance = numbers(2, 4, 6, 2, seed=2), numbers(2, 4, 6, 2, seed=3)
    error = reconstruction.astype("float64") - x
    kl = 0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance).sum(axis=(1, 2, 3))
    expected = np.abs(error).mean() + (error**2).mean() + 0.01 * kl.mean() / (4 * 6 * 3)
    tensors = [ops.convert_to_tensor(array) for array in (reconstruction, mean, log_variance)]
    loss = training.compute_loss(ops.convert_to_tensor(x), None, tensors)
    np.testing.assert_allclose(float(loss), expected, rtol=1e-5)
    psnr = 10 * np.log10(4 / (error**2).mean(axis=(1, 2, 3))).mean()
    np.testing.assert_allclose(float(training.psnr.result()), psnr, rtol=1e-5)


def test_standard_normal_posterior_has_no_kl(autoencoder):
    training = AutoencoderTraining(autoencoder, kl_weight=1.0)
    zeros = ops.zeros((1, 2, 2, 3))
    assert float(training.compute_loss(zeros, None, [zeros, ops.zeros((1, 2, 2, 2)), ops.zeros((1, 2, 2, 2))])) == 0


def test_reconstruction_is_drawn_while_training_alone(autoencoder):
    training = AutoencoderTraining(autoencoder)
    image = ops.convert_to_tensor(numbers(1, 4, 4, 3))
    given, mean, _ = training(image)
    np.testing.assert_allclose(to_numpy(given), to_numpy(autoencoder(image)), atol=1e-5)
    first, second = (to_numpy(training(image, training=True)[0]) for _ in range(2))
    assert np.abs(first - second).max() > 1e-3
    assert tuple(mean.shape) == (1, 4, 4, 2)


class ToyAutoencoder(keras.Model):
    """Two dense layers in place of an encoder and a decoder, which train in no time."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = keras.layers.Dense(4), keras.layers.Dense(3)
        self.encoder.build((None, None, None, 3))
        self.decoder.build((None, None, None, 2))
        self.built = True

    def moments(self, image):
        return ops.split(self.encoder(image), 2, axis=-1)


def test_autoencoder_learns():
    keras.utils.set_random_seed(0)
    training = AutoencoderTraining(ToyAutoencoder())
    training.compile(optimizer=keras.optimizers.Adam(1e-2), jit_compile=JIT)
    history = training.fit(np.tanh(numbers(64, 4, 4, 3)), epochs=4, batch_size=4, verbose=0).history
    assert history["loss"][-1] < 0.9 * history["loss"][0]
    assert history["psnr"][-1] > history["psnr"][0]


class Told:
    """Stands in for UNet and text encoder, keeps what they are told and predicts zeros."""

    def unet(self, inputs, training=False):
        self.inputs = {name: to_numpy(array) for name, array in inputs.items()}
        return ops.zeros_like(inputs["latent"])

    def text_encoder(self, tokens, training=False):
        self.tokens = to_numpy(tokens)
        return ops.cast(tokens, "float32")[..., None]


def step_told(caption_dropout=0.0, training=True, prediction="eps", loss_weight="uniform", batch=64):
    """One call of `DiffusionTraining` with stand-ins: what they were told, its latents, its tokens and its losses."""
    told = Told()
    diffusion = GaussianDiffusion(scaled_linear_schedule(), prediction)
    model = DiffusionTraining(told.unet, told.text_encoder, diffusion, EMPTY, caption_dropout, loss_weight, seed=1)
    latent = numbers(batch, 2, 3, 4)
    tokens = np.tile(np.array([[1, 2, 3]], "int32"), (batch, 1))
    loss = model.call({"latent": latent, "tokens": ops.convert_to_tensor(tokens)}, training=training)["loss"]
    return told, latent, tokens, to_numpy(loss)


def test_unet_is_told_one_less_than_the_papers_time():
    """With nothing predicted the loss is the noise's mean square, and x_t tells the noise if the time is known."""
    told, x0, _, loss = step_told()
    timestep = told.inputs["timestep"]
    assert 0 <= timestep.min() < 100 and 900 < timestep.max() <= 999
    assert (timestep == timestep.round()).all()
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2  # index 0 is the paper's t = 1
    alpha_bar = np.cumprod(1 - betas)[timestep.astype(int)][:, None, None, None]
    eps = (told.inputs["latent"] - np.sqrt(alpha_bar) * x0) / np.sqrt(1 - alpha_bar)
    np.testing.assert_allclose(loss, (eps**2).mean(axis=(1, 2, 3)), rtol=1e-2)
    assert abs(eps.mean()) < 0.15 and abs(eps.std() - 1) < 0.1


def test_loss_weight_is_the_one_that_was_asked_for():
    uniform, weighted = (step_told(loss_weight=weight) for weight in ("uniform", "min_snr"))
    timestep = uniform[0].inputs["timestep"].astype(int)
    alpha_bar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)[timestep]
    snr = alpha_bar / (1 - alpha_bar)
    np.testing.assert_allclose(weighted[-1] / uniform[-1], np.minimum(snr, 5) / snr, rtol=1e-3)


def test_captions_are_left_out_as_often_as_asked():
    for share in (0.0, 1.0):
        told, _, tokens, _ = step_told(share)
        np.testing.assert_array_equal(told.tokens, np.broadcast_to(EMPTY, tokens.shape) if share else tokens)
    told, _, tokens, _ = step_told(0.3, batch=4096)
    left_out = (told.tokens == EMPTY).all(axis=1)
    assert 0.27 < left_out.mean() < 0.33  # the deviation is 0.007
    np.testing.assert_array_equal(told.tokens[~left_out], tokens[~left_out])
    np.testing.assert_array_equal(told.inputs["context"][..., 0], told.tokens)


def test_captions_are_kept_where_nothing_is_trained():
    told, _, tokens, _ = step_told(1.0, training=False)
    np.testing.assert_array_equal(told.tokens, tokens)


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_bad_caption_dropout_is_told(share):
    with pytest.raises(ValueError, match="Received: caption_dropout="):
        step_told(share)


def test_diffusion_learns_a_distribution_and_the_time():
    """Latents that are standard normal, whose best prediction is known: eps = sqrt(1 - alpha_bar_t) x_t.

    Its loss is the mean of alpha_bar; without the time the best is c x_t with c the mean of sqrt(1 - alpha_bar), and
    its loss 1 - c^2.
    """
    alpha_bar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    best, without_time = alpha_bar.mean(), 1 - np.sqrt(1 - alpha_bar).mean() ** 2

    def examples(count, seed):
        tokens = np.random.default_rng(seed).integers(0, 9, (count, 3)).astype("int32")
        return {"latent": numbers(count, 2, 2, 4, seed=seed), "tokens": tokens}

    rate = keras.optimizers.schedules.CosineDecay(2e-2, 600)
    model = toy_training(run_eagerly=False, optimizer=keras.optimizers.Adam(rate))
    losses = model.fit(examples(64 * 600, 1), batch_size=64, shuffle=False, verbose=0).history["loss"]
    loss = model.evaluate(examples(2048, 2), batch_size=256, verbose=0, return_dict=True)["loss"]
    assert best - 0.01 < loss < best + 0.6 * (without_time - best)
    assert loss < losses[0] < 1.2  # which is the mean of them all


def test_frozen_text_encoder_is_not_trained():
    unet, text_encoder = toy_networks()
    text_encoder.trainable = False
    diffusion = GaussianDiffusion(scaled_linear_schedule())
    model = DiffusionTraining(unet, text_encoder, diffusion, EMPTY)
    assert {id(v) for v in model.trainable_variables} == {id(v) for v in unet.trainable_variables}
