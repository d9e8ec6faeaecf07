"""Training of latent diffusion: a UNet learns to denoise latents under captions that are sometimes left out.

References: Ho et al. 2020, algorithm 1, arXiv:2006.11239; Ho and Salimans 2022, algorithm 1, arXiv:2207.12598;
Rombach et al. 2022, sec. 3.3, arXiv:2112.10752.
"""

import keras
import numpy as np
from keras import ops

from latentdiff.diffusion.process import GaussianDiffusion


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
