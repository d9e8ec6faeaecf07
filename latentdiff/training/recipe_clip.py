"""The CLIP pair's training from a configuration."""

from __future__ import annotations

from pathlib import Path

from latentdiff.models.image_encoder import CLIPImageEncoder
from latentdiff.models.text_encoder import CLIPTextEncoder
from latentdiff.models.tokenizer import CLIPTokenizer
from latentdiff.training.clip import CLIPTraining
from latentdiff.training.recipe import Recipe, buckets_of, given_by, image_batches, index_of, validation_batches
from latentdiff.training_config import CLIPConfig, DiffusionConfig


def clip_recipe(config: CLIPConfig) -> Recipe:
    """The pair of `start`, or a new one."""
    index, held = index_of(config)
    tokenizer = tokenizer_of(config.tokenizer or config.start)
    ema_decay = config.ema_decay or None
    if config.start:
        model = CLIPTraining.from_preset(config.start, dtype=config.dtype, ema_decay=ema_decay, seed=config.seed)
    else:
        text_encoder = new_text_encoder(config, tokenizer)
        image_encoder = CLIPImageEncoder(
            config.size,
            config.patch_size,
            width=config.image_width,
            depth=config.image_depth,
            heads=config.image_heads,
            mlp_width=config.image_mlp_width,
            projection_dim=config.projection_dim,
            dtype=config.dtype,
        )
        model = CLIPTraining(text_encoder, image_encoder, tokenizer.end_id, ema_decay=ema_decay, seed=config.seed)
    buckets = buckets_of(config, model.image_encoder.config["patch_size"])

    def save(path: Path) -> None:
        model.save_to_preset(path, tokenizer, overwrite=True)

    return Recipe(
        model,
        image_batches(config, index, buckets, tokenizer),
        validation_batches(config, held, buckets, tokenizer),
        save,
        None,
        given_by((index, held)),
    )


def tokenizer_of(preset: str) -> CLIPTokenizer:
    """A model directory's tokenizer; that of "" is CLIP's own."""
    if preset:
        return CLIPTokenizer.from_preset(preset)
    from latentdiff.checkpoints.clip_vocabulary import clip_tokenizer

    return CLIPTokenizer(**clip_tokenizer())


def new_text_encoder(config: CLIPConfig | DiffusionConfig, tokenizer: CLIPTokenizer) -> CLIPTextEncoder:
    """A text encoder of the configuration's sizes, with random weights."""
    return CLIPTextEncoder(
        tokenizer.vocabulary_size,
        tokenizer.context_length,
        width=config.width,
        depth=config.depth,
        heads=config.heads,
        mlp_width=config.mlp_width,
        dtype=config.dtype,
    )
