"""A configuration -> a run of `fit`: data, networks, optimizer, samples and the directory that keeps it all.

Each kind of training is a `Recipe`: what is trained, on which batches, and what is written and shown of it.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import keras
import numpy as np

from latentdiff.data import CaptionedImages, Index, index_source, make_buckets
from latentdiff.data.cache_key import digest_of
from latentdiff.data.draws import uniform
from latentdiff.training.devices import distributed, join_hosts, rows_here
from latentdiff.training.muon import KernelMuon
from latentdiff.training.run import Run
from latentdiff.training.schedules import PerUpdate, WarmupStableDecay
from latentdiff.training.step import TrainingModel
from latentdiff.training_config import (
    AutoencoderConfig,
    CLIPConfig,
    Config,
    DiffusionConfig,
    PicturesConfig,
    as_json,
    defaults,
)

LEVELS = [f"{way}_{level}" for way in ("down", "up") for level in range(9)]
# The blocks of the networks, by the names that they have there. Keras' mode "full" wraps the training itself, too,
# whose `training` is then no longer a truth value, and each network whole, which is computed again for nothing.
REMATERIALIZED = [
    *(f"{way}_{block}_{j}" for way in LEVELS for block in ("resnet", "attention") for j in range(9)),
    *("mid_resnet_0", "mid_attention", "mid_resnet_1"),
    *(f"layer_{i}" for i in range(99)),
]


@dataclass
class Recipe:
    """What a kind of training brings.

    Attributes:
        model: what `fit` trains, not yet compiled.
        batches: (first step, last step) -> the batches of these steps, a function of each step alone.
        validation: the batches of a validation, the same each time; None where there are too few pictures.
        save: writes what is trained to a path, whole or not at all.
        sample: pictures that show what is learnt, uint8 (n, H, W, 3); None where there are none.
        given: what the run depends on beside its configuration: see `given_by`.
    """

    model: TrainingModel
    batches: Callable[[int, int], keras.utils.PyDataset]
    validation: Callable[[], keras.utils.PyDataset] | None
    save: Callable[[Path], None]
    sample: Callable[[], np.ndarray] | None
    given: dict[str, str]


def train(config: Config, directory: str | Path, progress: bool = True, most_latents: int | None = None) -> Run:
    """Trains what the configuration asks for; goes on where the directory holds a run of it.

    Args:
        config: of a kind; see `read_config`.
        directory: of the run; `model/` in it is what was trained.
        progress: whether Keras' progress bar is shown.
        most_latents: pictures of each size that are encoded for latent diffusion, for a rehearsal; None is all.

    Returns:
        The run, which is done unless it was interrupted.

    Raises:
        ValueError: the data, a model or the directory is not what it must be, the run was of other data, or the loss
            became infinite.
        OSError: a file cannot be read or written.
    """
    directory = Path(directory)
    with _devices(config):
        keras.utils.set_random_seed(config.seed)
        recipe = make_recipe(config, directory, most_latents)
        recipe.model.compile(optimizer=make_optimizer(config), steps_per_execution=config.steps_per_execution)
        validation = recipe.validation

        def validate():
            assert validation is not None
            said = recipe.model.evaluate(validation(), verbose=0, return_dict=True)
            return {f"val_{name}": value for name, value in said.items()}

        run = Run(
            directory,
            {**as_json(config), **recipe.given},
            config.steps,
            defaults={**defaults(type(config)), **recipe.given},
            checkpoint_every=config.checkpoint_every,
            log_every=config.log_every,
            keep=config.keep,
            save=recipe.save,
            sample=recipe.sample,
            validate=validate if validation else None,
        )
        first = run.resume(recipe.model)
        if first < config.steps:
            batches = recipe.batches(first, config.steps)
            recipe.model.fit(batches, callbacks=[run], shuffle=False, verbose=1 if progress else 0)
    return run


def make_recipe(config: Config, directory: Path, most_latents: int | None = None) -> Recipe:
    """The recipe of a configuration's kind."""
    # Each kind's networks are imported when it is asked for.
    if isinstance(config, AutoencoderConfig):
        from latentdiff.training.recipe_autoencoder import autoencoder_recipe

        return autoencoder_recipe(config)
    if isinstance(config, CLIPConfig):
        from latentdiff.training.recipe_clip import clip_recipe

        return clip_recipe(config)
    assert isinstance(config, DiffusionConfig)
    from latentdiff.training.recipe_diffusion import diffusion_recipe

    return diffusion_recipe(config, directory, most_latents)


def given_by(indexes: Sequence[Index], **networks: str) -> dict[str, str]:
    """What a run depends on beside its configuration, which has paths alone.

    Args:
        indexes: all pictures and captions, in whatever order and part of the split.
        networks: the digests of those that are not trained.
    """
    pictures = digest_of(sorted([e.digest, e.captions] for index in indexes for e in index))
    return {"data_digest": pictures, **{f"{name}_digest": digest for name, digest in networks.items()}}


def make_optimizer(config: Config) -> keras.optimizers.Optimizer:
    """The optimizer of a configuration; its schedule counts updates."""
    accumulation = config.gradient_accumulation_steps
    updates = max(1, config.steps // accumulation)
    rate: Any = WarmupStableDecay(config.learning_rate, updates, config.warmup, config.decay)
    arguments: dict[str, Any] = {"weight_decay": config.weight_decay, "clipnorm": config.clipnorm or None}
    if accumulation > 1:
        rate = PerUpdate(rate, accumulation)
        arguments["gradient_accumulation_steps"] = accumulation
    if config.optimizer == "muon":
        return KernelMuon(rate, **arguments, adam_weight_decay=config.weight_decay, adam_beta_2=0.99)
    return keras.optimizers.AdamW(rate, **arguments)


def pictures_of(config: Config, sources: Sequence[str]) -> Index:
    """The pictures of sources, with captions where a configuration's kind needs them."""
    captions = not isinstance(config, AutoencoderConfig)
    return index_source(list(sources), require_captions=captions, max_broken=config.max_broken)


def index_of(config: Config) -> tuple[Index, Index]:
    """The pictures that are trained on and those of the validation: its own, or drawn by the seed, copies together."""
    index = pictures_of(config, config.data)
    return (index, pictures_of(config, config.validation_data)) if config.validation_data else split(config, index)


def split(config: Config, index: Index) -> tuple[Index, Index]:
    """An index without the validation's share, and that share; a picture is in the same part of every index."""
    held = uniform(config.seed, np.array([int(e.digest[:13], 16) for e in index], "int64")) < config.validation
    return index.select(np.flatnonzero(~held)), index.select(np.flatnonzero(held))


def buckets_of(config: Config, factor: int) -> list[tuple[int, int]]:
    """The sizes of pictures that a configuration trains on."""
    if config.size % factor:
        raise ValueError(f"`size` must be a multiple of {factor}. Received: size={config.size}.")
    square = [(config.size, config.size)]
    return make_buckets(config.size, factor, config.max_ratio) if config.max_ratio > 1 else square


def image_batches(
    config: PicturesConfig, index: Index, buckets, tokenizer=None
) -> Callable[[int, int], CaptionedImages]:
    """The batches of an index's pictures, cropped and flipped as is configured; each process takes its part."""
    shard, shards = part_here(config)

    def batches(first: int, last: int) -> CaptionedImages:
        return CaptionedImages(
            index,
            config.batch_size,
            buckets=buckets,
            tokenizer=tokenizer,
            captions=tokenizer is not None,
            seed=config.seed,
            crop=config.crop,
            zoom=config.zoom,
            flip=config.flip,
            first_step=first,
            steps=last,
            shard_index=shard,
            num_shards=shards,
        )

    return batches


def validation_batches(
    config: PicturesConfig, index: Index, buckets, tokenizer=None
) -> Callable[[], CaptionedImages] | None:
    """The pictures of the validation once, from their middle; None where they fill no batch."""
    if not fills_a_batch(config, len(index)):
        return None
    plain = replace(config, crop="centre", zoom=1.0, flip=False)
    make = image_batches(plain, index, buckets, tokenizer)
    steps = make(0, 1).steps_per_epoch
    return lambda: make(0, steps)


def fills_a_batch(config: Config, held: int) -> bool:
    """Whether pictures that are held out for validation are enough for one; warns where some are, and not enough."""
    if 0 < held < config.batch_size:
        warnings.warn(
            f"There will be no validation: {held} pictures are held out for it, and batch_size={config.batch_size}.",
            stacklevel=2,
        )
    return held >= config.batch_size


def part_here(config: Config) -> tuple[int, int]:
    """(index, how many) of the parts of each batch that this process reads."""
    rows = rows_here(config.batch_size)
    length = rows.stop - rows.start
    return rows.start // length, config.batch_size // length


@contextlib.contextmanager
def _devices(config: Config):
    if config.rematerialize and keras.backend.backend() != "jax":
        raise ValueError("`rematerialize` needs the JAX backend. Received: rematerialize=True, tensorflow.")
    with contextlib.ExitStack() as stack:
        if config.hosts:
            join_hosts()
        if config.distribution != "none":
            stack.enter_context(distributed(config.distribution, config.mesh or None))
        if config.rematerialize:
            stack.enter_context(keras.RematScope(mode="list_of_layers", layer_names=REMATERIALIZED))
        yield
