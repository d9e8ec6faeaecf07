"""What `fit` trains: the autoencoder, and latent diffusion with its text encoder.

Each is a Keras model over the networks it trains, whose `compile` and `fit` are the ordinary ones; the weights stay in
the networks, to be saved from there.
References: Rombach et al. 2022, sec. 3 and appendix G, arXiv:2112.10752; Ho et al. 2020, algorithm 1, arXiv:2006.11239;
Ho and Salimans 2022, algorithm 1, arXiv:2207.12598.
"""

import os
import pathlib
import tempfile
from typing import Any

import keras
import numpy as np
from keras import ops

from latentdiff.backend import keep_freed_memory, to_numpy
from latentdiff.diffusion.process import GaussianDiffusion
from latentdiff.models.autoencoder import Autoencoder


class AutoencoderTraining(keras.Model):
    """Trains an autoencoder to give images back: L1 + L2 + kl_weight KL.

    Args:
        autoencoder: what is trained.
        kl_weight: weight of the posterior's KL divergence from a standard normal, summed over the latent, against the
            reconstruction's error summed over the image.
        seed: of the draws from the posterior.

    Batches:
        images float (B, H, W, 3) in [-1, 1].

    Reference: Rombach et al. 2022, appendix G; Kingma and Welling 2014, eq. 10, arXiv:1312.6114.
    """

    def __init__(self, autoencoder: Autoencoder, kl_weight: float = 1e-6, seed: int = 0, name="autoencoder_training"):
        super().__init__(name=name)
        self.autoencoder = autoencoder
        self.kl_weight = kl_weight
        self.seeds = keras.random.SeedGenerator(seed)
        self.psnr = keras.metrics.Mean(name="psnr")

    def build(self, image_shape):
        """Nothing is left to build: the networks are functional models."""
        self.built = True

    def call(self, image, training=False):
        """image: (B, H, W, 3) -> reconstruction (B, H, W, 3) and the posterior's mean, log variance (B, h, w, c)."""
        mean, log_variance = self.autoencoder.moments(image)
        log_variance = ops.clip(log_variance, -30.0, 20.0)
        latent = mean
        if training:
            latent = mean + ops.exp(0.5 * log_variance) * keras.random.normal(ops.shape(mean), seed=self.seeds)
        return self.autoencoder.decoder(latent), mean, log_variance

    def compute_loss(self, x: Any = None, y=None, y_pred: Any = None, sample_weight=None, training=True):
        """The mean loss of a batch; also keeps the metric `psnr`, in decibels, of images in [-1, 1]."""
        reconstruction, mean, log_variance = (ops.cast(a, "float32") for a in y_pred)
        error = reconstruction - ops.cast(x, "float32")
        squares = ops.mean(ops.square(error), axis=(1, 2, 3))  # (B,)
        kl = 0.5 * ops.sum(ops.square(mean) + ops.exp(log_variance) - 1 - log_variance, axis=(1, 2, 3))  # (B,)
        pixels = ops.cast(ops.prod(ops.convert_to_tensor(ops.shape(error)[1:])), "float32")  # a fit may change the size
        self.psnr.update_state(10 * ops.log10(4 / ops.maximum(squares, 1e-10)))
        return ops.mean(ops.abs(error)) + ops.mean(squares) + self.kl_weight * ops.mean(kl) / pixels


class DiffusionTraining(keras.Model):
    """Trains a UNet, and with it the text encoder, to denoise latents under captions that are sometimes left out.

    Args:
        unet: what is trained.
        text_encoder: trained along with it, unless its `trainable` is False.
        diffusion: schedule and prediction.
        empty_tokens: int (S,), the tokens of the empty prompt.
        caption_dropout: share of the captions replaced by the empty prompt, for guidance.
        loss_weight: "uniform" or "min_snr".
        seed: of timesteps, noise and dropout.

    Batches:
        {"latent": scaled float (B, h, w, c), "tokens": int (B, S)}.

    Raises:
        ValueError: `caption_dropout` outside [0, 1].

    Reference: Ho et al. 2020, algorithm 1; Ho and Salimans 2022, algorithm 1.
    """

    def __init__(
        self,
        unet: keras.Model,
        text_encoder: keras.Model,
        diffusion: GaussianDiffusion,
        empty_tokens,
        caption_dropout: float = 0.1,
        loss_weight: str = "uniform",
        seed: int = 0,
        name="diffusion_training",
    ):
        super().__init__(name=name)
        if not 0 <= caption_dropout <= 1:
            raise ValueError(f"`caption_dropout` must be in [0, 1]. Received: caption_dropout={caption_dropout}.")
        self.unet, self.text_encoder = unet, text_encoder
        self.diffusion = diffusion
        self.empty_tokens = np.asarray(empty_tokens, "int32")
        self.caption_dropout = caption_dropout
        self.loss_weight = loss_weight
        self.seeds = keras.random.SeedGenerator(seed)

    def build(self, batch_shape):
        """Nothing is left to build: the networks are functional models."""
        self.built = True

    def call(self, batch, training=False):
        """batch as in the class -> the loss of each item, (B,)."""
        x0, tokens = ops.cast(batch["latent"], "float32"), batch["tokens"]
        count = ops.shape(x0)[0]
        t = keras.random.randint((count,), 1, self.diffusion.schedule.T + 1, seed=self.seeds)
        eps = keras.random.normal(ops.shape(x0), seed=self.seeds)
        if training:
            left_out = keras.random.uniform((count, 1), seed=self.seeds) < self.caption_dropout
            tokens = ops.where(left_out, self.empty_tokens[None, :], tokens)
        context = self.text_encoder(tokens, training=training)  # (B, S, D)
        x_t = self.diffusion.q_sample(x0, t, eps)
        told = ops.cast(t - 1, "float32")  # SD's networks count from 0
        output = self.unet({"latent": x_t, "timestep": told, "context": context}, training=training)
        weight = self.diffusion.loss_weight(t, self.loss_weight)
        return self.diffusion.loss(ops.cast(output, "float32"), x0, eps, t, weight)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """The mean over the batch of what `call` gives."""
        return ops.mean(y_pred)


class Checkpoint(keras.callbacks.Callback):
    """Keeps a run's last state in one file, written aside and renamed, so that a killed run goes on from there.

    Args:
        path: an `.npz` file; holds weights, optimizer, seeds and the step, never code.
        every: steps between two writings; the end of training is written too.
    """

    def __init__(self, path: str | pathlib.Path, every: int):
        super().__init__()
        self.path, self.every = pathlib.Path(path), every
        self.last = -1

    def on_train_batch_end(self, batch, logs=None):
        step = int(self.model.optimizer.iterations)
        if step // self.every != self.last:
            if self.last >= 0:
                self.save()
            self.last = step // self.every

    def on_train_end(self, logs=None):
        self.save()

    def save(self) -> None:
        """Writes the state as it is now."""
        arrays: dict[str, Any] = {f"{i}": to_numpy(v) for i, v in enumerate(self._variables())}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.path.parent, suffix=".tmp", delete=False) as file:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, self.path)

    def restore(self, model: keras.Model) -> int:
        """Puts the kept state into a compiled model and says at which step it was; 0 where nothing was kept.

        Raises:
            ValueError: the file's arrays are not this model's.
        """
        if not self.path.exists():
            return 0
        self.set_model(model)
        model.optimizer.build(model.trainable_variables)
        variables = self._variables()
        with np.load(self.path, allow_pickle=False) as arrays:
            shapes = [arrays[f"{i}"].shape for i in range(len(arrays.files))]
            if shapes != [tuple(v.shape) for v in variables]:
                raise ValueError(f"A checkpoint must hold the variables of this run. Received: {self.path}.")
            for i, variable in enumerate(variables):
                variable.assign(arrays[f"{i}"])
        return int(model.optimizer.iterations)

    def _variables(self) -> list:
        return [*self.model.variables, *self.model.optimizer.variables]


class KeepFreedMemory(keras.callbacks.Callback):
    """Spares a CPU the fetching of memory that a training step gives back and wants again; see `keep_freed_memory`."""

    def on_train_batch_begin(self, batch, logs=None):
        if batch == 0:
            keep_freed_memory()
