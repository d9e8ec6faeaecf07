"""Training of the autoencoder: a reconstruction's error, its posterior's divergence, and a discriminator's opinion.

    L = l1 |x - y| + l2 (x - y)^2 + perceptual LPIPS(x, y) + kl KL / pixels + factor lambda (-D(y)) + L_D
    lambda = |grad L_rec| / (|grad -D(y)| + 1e-4), gradients of the decoder's last kernel;  factor = 0 before a step

The discriminator learns in the same step and by the same optimizer: -D(y) is taken with its weights held fixed, and
L_D with the reconstruction held fixed, so that neither moves the other's weights.
References: Rombach et al. 2022, sec. 3.1 and appendix G, arXiv:2112.10752; Esser et al. 2021, eq. 7, arXiv:2012.09841.
"""

from typing import Any

import keras
from keras import ops

from latentdiff.backend import gradients, mean_of_replicas
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.training.discriminator import hinge_loss
from latentdiff.training.perceptual import perceptual_distance
from latentdiff.training.step import TrainingModel


class AutoencoderTraining(TrainingModel):
    """Trains an autoencoder to give images back.

    Args:
        autoencoder: what is trained.
        kl_weight: weight of the posterior's KL divergence from a standard normal, summed over the latent, against the
            reconstruction's error summed over the image.
        l1_weight, l2_weight: of the mean absolute and the mean square error.
        features: a model image (B, H, W, 3) in [-1, 1] -> list of feature maps (B, h, w, c), never trained here; None
            leaves the perceptual term out.
        feature_weights: of each map's channels, float (c,) each; None weighs all alike.
        perceptual_weight: of `perceptual.perceptual_distance`.
        discriminator: a model image -> logits (B, h, w, 1) such as `discriminator.PatchDiscriminator`; None trains
            without one.
        discriminator_weight: of the discriminator's opinion, beside the adaptive weight.
        discriminator_start: updates after which it counts and learns.
        ema_decay: of the weights' average; None keeps none.
        seed: of the draws from the posterior.

    Batches:
        images float (B, H, W, 3) in [-1, 1], or {"image": of those}.

    Raises:
        ValueError: a weight is negative.

    Reference: Rombach et al. 2022, appendix G; Kingma and Welling 2014, eq. 10, arXiv:1312.6114.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        kl_weight: float = 1e-6,
        *,
        l1_weight: float = 1.0,
        l2_weight: float = 1.0,
        features: keras.Model | None = None,
        feature_weights=None,
        perceptual_weight: float = 1.0,
        discriminator: keras.Model | None = None,
        discriminator_weight: float = 0.5,
        discriminator_start: int = 0,
        ema_decay: float | None = None,
        seed: int = 0,
        name="autoencoder_training",
    ):
        weights = {
            "kl_weight": kl_weight,
            "l1_weight": l1_weight,
            "l2_weight": l2_weight,
            "perceptual_weight": perceptual_weight,
            "discriminator_weight": discriminator_weight,
            "discriminator_start": discriminator_start,
        }
        for key, value in weights.items():
            if value < 0:
                raise ValueError(f"`{key}` must not be negative. Received: {key}={value}.")
        super().__init__(getattr(autoencoder, "encoder", autoencoder), ema_decay, seed, name)
        self.autoencoder, self.discriminator = autoencoder, discriminator
        self.kl_weight, self.l1_weight, self.l2_weight = kl_weight, l1_weight, l2_weight
        self.perceptual_weight = perceptual_weight
        self.discriminator_weight, self.discriminator_start = discriminator_weight, discriminator_start
        if features is not None:
            features.trainable = False
        self.features, self.feature_weights = features, feature_weights
        self.psnr = keras.metrics.Mean(name="psnr")
        if discriminator is not None:
            last = autoencoder.decoder.layers[-1]  # the convolution that makes the image
            self.before_last = keras.Model(autoencoder.decoder.input, last.input, name="decoder_before_last")
            self.real, self.fake = keras.metrics.Mean(name="logits_real"), keras.metrics.Mean(name="logits_fake")

    def averaged_variables(self):
        """The autoencoder's; the discriminator has no average."""
        return self.autoencoder.trainable_variables

    def call(self, batch, training=False):
        """batch as in the class -> reconstruction (B, H, W, 3) and the posterior's mean, log variance (B, h, w, c).

        With a discriminator the decoder's last features (B, H, W, c) come too.
        """
        mean, log_variance = (ops.cast(a, "float32") for a in self.autoencoder.moments(image_of(batch)))
        log_variance = ops.clip(log_variance, -30.0, 20.0)
        latent = mean
        if training:
            latent = mean + ops.exp(0.5 * log_variance) * self.normal((ops.shape(mean)[0], *mean.shape[1:]))
        if self.discriminator is None:
            return self.autoencoder.decoder(latent), mean, log_variance
        features = self.before_last(latent)
        return self.autoencoder.decoder.layers[-1](features), mean, log_variance, features

    def compute_loss(self, x: Any = None, y=None, y_pred: Any = None, sample_weight=None, training=True):
        """The mean loss of a batch; also keeps the metric `psnr`, in decibels, of images in [-1, 1]."""
        image = ops.cast(image_of(x), "float32")
        reconstruction, mean, log_variance = (ops.cast(a, "float32") for a in y_pred[:3])
        squares = ops.mean(ops.square(reconstruction - image), axis=(1, 2, 3))  # (B,)
        self.psnr.update_state(10 * ops.log10(4 / ops.maximum(squares, 1e-10)))
        kl = 0.5 * ops.sum(ops.square(mean) + ops.exp(log_variance) - 1 - log_variance, axis=(1, 2, 3))  # (B,)
        pixels = ops.cast(ops.prod(ops.convert_to_tensor(ops.shape(image)[1:])), "float32")  # a fit may change the size
        losses = self.reconstruction_loss(image, reconstruction) + self.kl_weight * kl / pixels
        if self.discriminator is not None:
            losses = losses + self._discriminator_losses(image, reconstruction, y_pred[3])
        return self.finish_loss(losses)

    def reconstruction_loss(self, image, reconstruction):
        """L1, L2 and the perceptual distance, weighted: (B,)."""
        error = reconstruction - image
        losses = self.l1_weight * ops.mean(ops.abs(error), axis=(1, 2, 3))
        losses = losses + self.l2_weight * ops.mean(ops.square(error), axis=(1, 2, 3))
        if self.features is not None:
            maps = self.features(image, training=False), self.features(reconstruction, training=False)
            losses = losses + self.perceptual_weight * perceptual_distance(*maps, self.feature_weights)
        return losses

    def _discriminator_losses(self, image, reconstruction, features):
        """The reconstruction's part of the hinge loss, at its adaptive weight, and the discriminator's: (B,)."""
        judge: Any = self.discriminator
        fixed = [ops.stop_gradient(ops.convert_to_tensor(v)) for v in judge.trainable_variables]
        others = [ops.convert_to_tensor(v) for v in judge.non_trainable_variables]

        def opinion(picture):
            logits, _ = judge.stateless_call(fixed, others, picture)
            return -ops.mean(ops.cast(logits, "float32"), axis=(1, 2, 3))

        started = (
            ops.cast(ops.convert_to_tensor(self.updates) >= self.discriminator_start, "float32")
            if self.updates is not None
            else 1.0
        )
        weight = started * self.discriminator_weight * self.adaptive_weight(image, features, opinion)
        real = judge(image)
        fake = judge(ops.stop_gradient(reconstruction))
        self.real.update_state(ops.mean(real))
        self.fake.update_state(ops.mean(fake))
        return weight * opinion(reconstruction) + started * hinge_loss(real, fake)

    def adaptive_weight(self, image, features, opinion):
        """lambda, a scalar in 0 .. 1e4: how large the opinion's gradient must be made to equal the reconstruction's."""
        last = self.autoencoder.decoder.layers[-1]
        features = ops.stop_gradient(ops.cast(features, "float32"))
        bias = ops.stop_gradient(ops.cast(last.bias, "float32"))

        def picture(kernel):
            return ops.conv(features, kernel, padding="same") + bias

        kernel = ops.stop_gradient(ops.cast(last.kernel, "float32"))
        of_reconstruction = gradients(lambda k: ops.mean(self.reconstruction_loss(image, picture(k))), kernel)
        of_opinion = gradients(lambda k: ops.mean(opinion(picture(k))), kernel)
        of_reconstruction, of_opinion = mean_of_replicas(of_reconstruction), mean_of_replicas(of_opinion)
        ratio = ops.norm(ops.ravel(of_reconstruction)) / (ops.norm(ops.ravel(of_opinion)) + 1e-4)
        return ops.stop_gradient(ops.clip(ratio, 0.0, 1e4))


def image_of(batch):
    """The images of a batch, which is they, or a dictionary that holds them."""
    return batch["image"] if isinstance(batch, dict) else batch
