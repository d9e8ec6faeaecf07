"""Latent diffusion's training from a configuration, on latents that are computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from latentdiff import presets
from latentdiff.backend import to_numpy
from latentdiff.checkpoints.diffusers_scheduler import SamplerSettings
from latentdiff.data import Cache, CachedLatents, Index, Steps, make_cache
from latentdiff.data.buckets import full_buckets
from latentdiff.data.cache_key import network_digest
from latentdiff.diffusion.process import GaussianDiffusion
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.models.text_encoder import CLIPTextEncoder
from latentdiff.models.unet import UNet
from latentdiff.pipeline import TextToImage
from latentdiff.training.diffusion import DiffusionTraining
from latentdiff.training.recipe import (
    Recipe,
    buckets_of,
    fills_a_batch,
    given_by,
    index_of,
    part_here,
    pictures_of,
    split,
)
from latentdiff.training.recipe_clip import new_text_encoder, tokenizer_of
from latentdiff.training.run import check_config
from latentdiff.training_config import DiffusionConfig, as_json, defaults


class WithPrior(Steps):
    """Batches of which one half shows the subject and the other its class, weighted.

    Args:
        subject, prior: data sets of as many steps, with half a batch each.
        prior_weight: of the class' losses.
    """

    def __init__(self, subject: CachedLatents, prior: CachedLatents, prior_weight: float):
        super().__init__(subject.order, first_step=subject.first_step, steps=subject.steps)
        self.subject, self.prior, self.prior_weight = subject, prior, prior_weight

    def batch_at(self, step):
        subject, prior = self.subject.batch_at(step), self.prior.batch_at(step)
        count = len(subject["latent"])
        batch = {name: np.concatenate([array, prior[name]]) for name, array in subject.items()}
        return {**batch, "weight": np.repeat(np.array([1.0, self.prior_weight], "float32"), count)}


def prior_of(config: DiffusionConfig) -> Index:
    """The pictures of the class, but those that are the validation's where it is drawn from the data."""
    index = pictures_of(config, config.prior)
    return index if config.validation_data else split(config, index)[0]


def diffusion_recipe(config: DiffusionConfig, directory: Path, most_latents: int | None = None) -> Recipe:
    """The pipeline of `start`, or a new UNet over the autoencoder and the text encoder that are named.

    Args:
        config: see `DiffusionConfig`.
        directory: of the run.
        most_latents: pictures of each size that are encoded; None is all.
    """
    parts = _parts(config)
    parts.text_encoder.trainable = config.train_text_encoder
    buckets = buckets_of(config, parts.autoencoder.factor)
    index, held = index_of(config)
    class_index = prior_of(config) if config.prior else None
    frozen = None if config.train_text_encoder else parts.text_encoder
    root = Path(config.cache) if config.cache else directory.with_name(directory.name + ".cache")

    given = given_by(
        (index, held, *([class_index] if class_index else ())),
        autoencoder=network_digest(parts.autoencoder.encoder, parts.autoencoder.get_config()),
        **({"text_encoder": network_digest(frozen, frozen.get_config())} if frozen else {}),
    )
    # Before a cache is made in another one's place.
    check_config(directory, {**as_json(config), **given}, {**defaults(type(config)), **given})

    def cache_of(name: str, pictures: Index, fill: int, flip: bool = config.flip) -> Cache:
        return make_cache(
            root / name,
            _at_most(pictures, buckets, fill, most_latents),
            parts.autoencoder,
            buckets=buckets,
            tokenizer=parts.tokenizer,
            text_encoder=frozen,
            flip=flip,
            fill=fill,
            overwrite=True,
        )

    half = config.batch_size // 2 if config.prior else config.batch_size
    cache = cache_of("train", index, half)
    prior = cache_of("prior", class_index, half) if class_index else None
    checked = cache_of("validation", held, config.batch_size, False) if fills_a_batch(config, len(held)) else None
    if not config.start:
        # The UNet is to see latents of variance one.
        deviation = cache.statistics()[1]
        scaled = Autoencoder(**{**parts.autoencoder.config, "scaling_factor": round(1 / deviation, 5)})
        scaled.set_weights([to_numpy(variable) for variable in parts.autoencoder.weights])
        parts = replace(parts, autoencoder=scaled)
    model = DiffusionTraining(
        parts.unet,
        None if frozen else parts.text_encoder,
        GaussianDiffusion(presets.make_schedule(parts.settings), parts.settings.prediction),
        cache.empty_text() if frozen else parts.tokenizer("")[0],
        config.caption_dropout,
        config.loss_weight,
        offset_noise=config.offset_noise,
        ema_decay=config.ema_decay or None,
        seed=config.seed,
    )
    shard, shards = part_here(config)

    def latents(kept: Cache, batch_size: int, seed: int, first: int, last: int | None) -> CachedLatents:
        return CachedLatents(
            kept,
            batch_size,
            scaling_factor=parts.autoencoder.scaling_factor,
            shift_factor=parts.autoencoder.shift_factor,
            seed=seed,
            first_step=first,
            steps=last,
            shard_index=shard,
            num_shards=shards,
        )

    def batches(first: int, last: int) -> Any:
        subject = latents(cache, half, config.seed, first, last)
        if prior is None:
            return subject
        return WithPrior(subject, latents(prior, half, config.seed + 1, first, last), config.prior_weight)

    pipeline = TextToImage(parts)

    def sample() -> np.ndarray:
        return pipeline.generate(
            list(config.prompts),
            seed=[config.seed] * len(config.prompts),
            num_steps=config.num_steps,
            guidance_scale=config.guidance_scale,
            progress=False,
        )

    return Recipe(
        model,
        batches,
        (lambda: latents(checked, config.batch_size, config.seed, 0, None)) if checked else None,
        lambda path: presets.save_pipeline(parts, path, overwrite=True),
        sample if config.prompts else None,
        given,
    )


def _at_most(index: Index, buckets: Sequence[tuple[int, int]], fill: int, count: int | None) -> Index:
    """An index, or the first pictures of each size in it."""
    if count is None:
        return index
    chosen = full_buckets(index.heights, index.widths, buckets, fill)
    return index.select(np.sort(np.concatenate([np.flatnonzero(chosen == each)[:count] for each in np.unique(chosen)])))


def _parts(config: DiffusionConfig) -> presets.Parts:
    if config.start:
        start = presets.load_pipeline(config.start, dtype="float32")
        return replace(
            start,
            text_encoder=presets.in_policy(start.text_encoder, config.dtype),
            unet=presets.in_policy(start.unet, config.dtype),
        )
    autoencoder = Autoencoder.from_preset(config.autoencoder, dtype="float32")
    tokenizer = tokenizer_of(config.tokenizer or config.text_encoder)
    if config.text_encoder:
        text_encoder = presets.in_policy(
            CLIPTextEncoder.from_preset(config.text_encoder, dtype="float32"), config.dtype
        )
    else:
        text_encoder = new_text_encoder(config, tokenizer)
    unet = UNet(
        autoencoder.latent_channels,
        autoencoder.latent_channels,
        channels=tuple(config.channels),
        blocks_per_level=config.blocks_per_level,
        attention=tuple(config.attention),
        heads=config.unet_heads,
        groups=config.unet_groups,
        context_dim=text_encoder.config["width"],
        dtype=config.dtype,
    )
    settings = SamplerSettings(
        sampler="ddim",
        prediction=config.prediction,
        zero_terminal_snr=config.zero_terminal_snr,
        spacing="trailing",
        set_alpha_to_one=True,
    )
    size = config.size // autoencoder.factor
    return presets.Parts(tokenizer, text_encoder, unet, autoencoder, settings, (size, size))
