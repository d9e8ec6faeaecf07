"""Training of the autoencoder: a reconstruction's error and the posterior's divergence from a standard normal.

Reference: Rombach et al. 2022, sec. 3.1 and appendix G, arXiv:2112.10752.
"""

from typing import Any

import keras
from keras import ops

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
