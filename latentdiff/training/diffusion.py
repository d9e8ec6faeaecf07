"""Training of latent diffusion: a UNet learns to denoise latents under captions that are sometimes left out.

References: Ho et al. 2020, algorithm 1, arXiv:2006.11239; Ho and Salimans 2022, algorithm 1, arXiv:2207.12598;
Rombach et al. 2022, sec. 3.3, arXiv:2112.10752.
"""

from typing import Any

import keras
import numpy as np
from keras import ops

from latentdiff.backend import gather_replicas
from latentdiff.diffusion import noise
from latentdiff.diffusion.process import GaussianDiffusion
from latentdiff.training.step import TrainingModel

GOLDEN = 0.6180339887498949  # its multiples fill [0, 1) evenly, whatever their number


class DiffusionTraining(TrainingModel):
    """Trains a UNet, and with it the text encoder, to denoise latents under captions that are sometimes left out.

    Evaluated (`validation_data`, `evaluate`) on fixed noise and timesteps: those of an item depend on its "index", or
    on its row where a batch has none, and on nothing else, so that the loss compares from epoch to epoch.

    Args:
        unet: what is trained.
        text_encoder: trained along with it, unless its `trainable` is False; None where batches bring the context.
        diffusion: schedule and prediction.
        empty: int (S,), the tokens of the empty prompt; without a text encoder its context, float (S, D).
        caption_dropout: share of the captions replaced by the empty prompt, for guidance.
        loss_weight: "uniform" or "min_snr" (Hang et al. 2023, arXiv:2303.09556).
        offset_noise: strength of a noise that is constant over each channel, 0.1 and the like, so that a picture's mean
            brightness is learnt; the offset is part of eps.
        bins: the loss is also reported in that many bins of t, of equal width: `loss_t0` holds the smallest t.
        ema_decay: of the weights' average; None keeps none.
        seed: of timesteps, noise and dropout.

    Batches:
        {"latent": scaled float (B, h, w, c), "tokens": int (B, S) or "context": float (B, S, D)}; optionally
        "index": int (B,), and "weight": float (B,), what an item's loss is multiplied by (prior preservation).

    Raises:
        ValueError: `caption_dropout` outside [0, 1], `offset_noise` below 0, `bins` below 1, no such `loss_weight`.

    Reference: Ho et al. 2020, algorithm 1; Ho and Salimans 2022, algorithm 1.
    """

    def __init__(
        self,
        unet: keras.Model,
        text_encoder: keras.Model | None,
        diffusion: GaussianDiffusion,
        empty,
        caption_dropout: float = 0.1,
        loss_weight: str = "uniform",
        *,
        offset_noise: float = 0.0,
        bins: int = 4,
        ema_decay: float | None = None,
        seed: int = 0,
        name="diffusion_training",
    ):
        if not 0 <= caption_dropout <= 1:
            raise ValueError(f"`caption_dropout` must be in [0, 1]. Received: caption_dropout={caption_dropout}.")
        if offset_noise < 0:
            raise ValueError(f"`offset_noise` must not be negative. Received: offset_noise={offset_noise}.")
        if bins < 1:
            raise ValueError(f"`bins` must be at least 1. Received: bins={bins}.")
        diffusion.loss_weight(np.array([1]), loss_weight)  # an unknown one is told here
        super().__init__(unet, ema_decay, seed, name)
        self.unet, self.text_encoder = unet, text_encoder
        self.diffusion = diffusion
        self.empty = np.asarray(empty, "int32" if text_encoder is not None else "float32")
        self.caption_dropout = caption_dropout
        self.loss_weight = loss_weight
        self.offset_noise = offset_noise
        self.by_t = [keras.metrics.Mean(name=f"loss_t{i}") for i in range(bins)]

    def call(self, batch, training=False):
        """batch as in the class -> {"loss": of each item, float32 (B,), "t": int32 (B,)}."""
        x0 = ops.cast(batch["latent"], "float32")
        shape = (ops.shape(x0)[0], *x0.shape[1:])
        t, eps = self._drawn(shape) if training else self._fixed(shape, batch.get("index"))
        context = self._context(batch, shape[0], training)
        x_t = self.diffusion.q_sample(x0, t, eps)
        told = ops.cast(t - 1, "float32")  # SD's networks count from 0
        output = self.unet({"latent": x_t, "timestep": told, "context": context}, training=training)
        weight = self.diffusion.loss_weight(t, self.loss_weight)
        return {"loss": self.diffusion.loss(ops.cast(output, "float32"), x0, eps, t, weight), "t": t}

    def _drawn(self, shape) -> tuple[Any, Any]:
        t = self.integers(shape[:1], 1, self.diffusion.schedule.T + 1)
        eps = self.normal(shape)
        if self.offset_noise:
            eps = eps + self.offset_noise * self.normal((shape[0], *(1 for _ in shape[2:]), shape[-1]))
        return t, eps

    def _fixed(self, shape, index) -> tuple[Any, Any]:
        index = self.positions(shape[0]) if index is None else ops.cast(index, "int32")
        share = (ops.cast(index, "float32") * GOLDEN + 0.5) % 1.0
        t = 1 + ops.cast(share * self.diffusion.schedule.T, "int32")
        return ops.minimum(t, self.diffusion.schedule.T), noise.normal(index, 0, shape[1:])

    def _context(self, batch, count, training):
        """The context (B, S, D), the empty prompt's in the place of some."""
        known = "tokens" if self.text_encoder is not None else "context"
        value = batch[known]
        if training and self.caption_dropout:
            left_out = self.uniform((count, *(1 for _ in value.shape[1:]))) < self.caption_dropout
            value = ops.where(left_out, ops.cast(self.empty, value.dtype)[None], value)
        return value if self.text_encoder is None else self.text_encoder(value, training=training)

    def compute_loss(self, x: Any = None, y=None, y_pred: Any = None, sample_weight=None, training=True):
        """The mean of what `call` gives, each item's by its weight; also keeps the losses by t."""
        losses, t = y_pred["loss"], y_pred["t"]
        bins = len(self.by_t)
        # Of all replicas, since a mean of their means would count a bin that one of them has none of.
        everywhere, t_everywhere, _ = gather_replicas(losses, t)
        place = (t_everywhere - 1) * bins // self.diffusion.schedule.T
        for i, metric in enumerate(self.by_t):
            metric.update_state(everywhere, sample_weight=ops.cast(place == i, "float32"))
        return self.finish_loss(losses * ops.cast(x["weight"], "float32") if "weight" in x else losses)
