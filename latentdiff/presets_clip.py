"""CLIPModel directories -> pairs of encoders with their weights, and back."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from latentdiff.catalogue import resolve_preset
from latentdiff.checkpoints import clip_directory
from latentdiff.checkpoints.clip_directory import CLIPDirectory, is_clip
from latentdiff.checkpoints.diffusers import Component
from latentdiff.checkpoints.files import CheckpointError, replaced_directory
from latentdiff.models.image_encoder import CLIPImageEncoder
from latentdiff.models.text_encoder import CLIPTextEncoder
from latentdiff.models.tokenizer import CLIPTokenizer
from latentdiff.presets import HeldArrays, chosen_dtype, held_dtype, network_of, warn_of_rounding


@dataclass(frozen=True)
class CLIPParts:
    """A CLIP pair's parts.

    Attributes:
        text_encoder, image_encoder: the networks.
        text_projection: float32 (D, E), from the context at the end token to the embedding.
        logit_scale: log(1 / temperature).
        end_id: the token that ends a prompt.
        tokenizer: to be written beside them; None, and in what `load_clip` gives, where there is none.
    """

    text_encoder: CLIPTextEncoder
    image_encoder: CLIPImageEncoder
    text_projection: np.ndarray
    logit_scale: float
    end_id: int
    tokenizer: CLIPTokenizer | None = None


def load_clip(preset: str | os.PathLike, dtype: str | None = None, *, variant: str | None = None) -> CLIPParts:
    """The parts of a CLIPModel's directory.

    Args:
        preset: the directory, or `hf://owner/name`.
        dtype: what the networks hold and compute in, one of `presets.DTYPES`; None chooses by the device.
        variant: of the weights' files, for example "fp16".

    Raises:
        ValueError: the dtype is unknown, or the files are malformed or ask for what cannot be done here.
        FileNotFoundError: a file is missing.
    """
    dtype = chosen_dtype(dtype)
    source = _open(preset, variant)
    pair = source.pair(dtype=held_dtype(dtype), variant=variant)
    try:
        tokenizer = CLIPTokenizer(**source.tokenizer())
    except FileNotFoundError:
        tokenizer = None
    return CLIPParts(
        network_of(pair.text, dtype),  # pyright: ignore[reportArgumentType]
        network_of(pair.image, dtype),  # pyright: ignore[reportArgumentType]
        pair.weights["text_projection/kernel"],
        float(pair.weights["logit_scale"]),
        pair.end_id,
        tokenizer,
    )


def load_image_encoder(
    preset: str | os.PathLike, dtype: str | None = None, *, variant: str | None = None
) -> CLIPImageEncoder:
    """The image encoder of a CLIPModel's directory. Arguments and errors as `load_clip`'s."""
    dtype = chosen_dtype(dtype)
    component = _open(preset, variant).component("image_encoder", dtype=held_dtype(dtype), variant=variant)
    return network_of(component, dtype)  # pyright: ignore[reportReturnType]


def save_clip(
    parts: CLIPParts,
    directory: str | os.PathLike,
    dtype: str | None = "float32",
    overwrite: bool = False,
    *,
    max_shard_size: int | str | None = None,
) -> None:
    """Writes a CLIPModel's directory, which appears whole or not at all.

    Args:
        parts: what is written, the tokenizer where there is one.
        directory, dtype, overwrite, max_shard_size: as for `presets.save_pipeline`.

    Raises:
        FileExistsError: the directory has files and `overwrite` is false.
        ValueError: transformers cannot express the configuration, the tokenizer is not the text encoder's, there is no
            such dtype or size, or a weight is not finite in `dtype`.
    """
    networks = {"text_encoder": parts.text_encoder, "image_encoder": parts.image_encoder}
    text, image = (
        Component(kind, Path(directory), network.config, {}, HeldArrays(network), ())
        for kind, network in networks.items()
    )
    tokenizer = parts.tokenizer
    if tokenizer is not None:
        known = parts.text_encoder.config["vocabulary_size"]
        if tokenizer.end_id != parts.end_id or tokenizer.vocabulary_size > known:
            raise ValueError(
                f"The tokenizer must be the text encoder's: at most {known} tokens, {parts.end_id} ends a prompt."
                f" Received: {tokenizer.vocabulary_size}, {tokenizer.end_id}."
            )
        text.details.update(bos_token_id=tokenizer.start_id, pad_token_id=tokenizer.pad_id)
    weights = {"text_projection/kernel": parts.text_projection, "logit_scale": np.float32(parts.logit_scale)}
    pair = clip_directory.Pair(text, image, parts.end_id, weights)
    clip_directory.check_pair(pair, dtype, max_shard_size)
    warn_of_rounding(networks.values(), dtype, stacklevel=4)  # the caller of `save_to_preset`
    with replaced_directory(directory, overwrite) as fresh:
        clip_directory.write_pair(fresh, pair, dtype, max_shard_size)
        if tokenizer is not None:
            tokenizer.save(fresh)


def _open(preset: str | os.PathLike, variant: str | None) -> CLIPDirectory:
    path = resolve_preset(preset, ["clip"], variant)
    if not path.is_dir() or not is_clip(path):
        raise CheckpointError(f'`preset` must be a CLIPModel\'s directory, of `model_type` "clip". Received: `{path}`')
    return CLIPDirectory(path)
