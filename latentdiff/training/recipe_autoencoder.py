"""The autoencoder's training from a configuration."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from latentdiff.backend import Compiled, to_numpy
from latentdiff.checkpoints.diffusers import write_component
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.pipeline import grey_levels
from latentdiff.presets import HeldArrays, in_policy
from latentdiff.training.autoencoder import AutoencoderTraining
from latentdiff.training.discriminator import PatchDiscriminator
from latentdiff.training.recipe import Recipe, buckets_of, given_by, image_batches, index_of, validation_batches
from latentdiff.training_config import AutoencoderConfig

SHOWN = 8  # pictures of a sample


def autoencoder_recipe(config: AutoencoderConfig) -> Recipe:
    """The autoencoder of `start`, or a new one; samples are pictures above what came back."""
    index, held = index_of(config)
    if config.start:
        autoencoder = in_policy(Autoencoder.from_preset(config.start, dtype="float32"), config.dtype)
    else:
        autoencoder = Autoencoder(
            config.channels,
            config.blocks_per_level,
            latent_channels=config.latent_channels,
            groups=config.groups,
            dtype=config.dtype,
        )
    autoencoder.encoder.trainable = config.train_encoder
    discriminator = None
    if config.discriminator_weight:
        discriminator = PatchDiscriminator(
            config.discriminator_width, config.discriminator_depth, groups=config.groups, dtype=config.dtype
        )
    model = AutoencoderTraining(
        autoencoder,
        config.kl_weight,
        l1_weight=config.l1_weight,
        l2_weight=config.l2_weight,
        discriminator=discriminator,
        discriminator_weight=config.discriminator_weight,
        discriminator_start=config.discriminator_start,
        ema_decay=config.ema_decay or None,
        seed=config.seed,
    )
    buckets = buckets_of(config, autoencoder.factor)
    batches, validation = image_batches(config, index, buckets), validation_batches(config, held, buckets)
    shown = validation() if validation else batches(0, 1)
    images = shown.batch_at(0)["image"][:SHOWN]
    again = Compiled(autoencoder, [autoencoder])

    def save(path: Path) -> None:
        write_component(path, "autoencoder", autoencoder.config, HeldArrays(autoencoder), overwrite=True)

    def sample() -> np.ndarray:
        pairs = np.concatenate([images, to_numpy(again(images), "float32")], axis=1)
        return to_numpy(grey_levels(pairs), "uint8")

    return Recipe(model, batches, validation, save, sample, given_by((index, held)))
