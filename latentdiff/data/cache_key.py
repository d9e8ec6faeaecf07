"""What a cache depends on, each part as a digest or as plain values, so that an error can say which one has changed."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import keras
import numpy as np

from latentdiff import __version__
from latentdiff.backend import to_numpy
from latentdiff.data.examples import Index

# What the encoder has said is kept unscaled, so these change nothing that is kept.
_NOT_KEPT = ("name", "scaling_factor", "shift_factor")


def make_parts(
    index: Index, autoencoder: Any, tokenizer: Any, text_encoder: keras.Model | None, preprocessing: dict[str, Any]
) -> dict[str, Any]:
    """The parts of a key.

    Args:
        index: its digest is over the content of every picture, the sizes and the captions.
        autoencoder: its encoder's weights, and its configuration with the dtype, but for the scaling.
        tokenizer: its vocabulary, merges, length and special tokens; None where no captions are kept.
        text_encoder: weights and configuration; None where tokens are kept.
        preprocessing: sizes, crop, dtype and the like, as JSON has them.

    Returns:
        data, autoencoder, tokenizer, text_encoder, preprocessing, version.
    """
    return {
        "data": index.digest,
        "autoencoder": network_digest(autoencoder.encoder, autoencoder.get_config()),
        "tokenizer": None if tokenizer is None else _tokenizer(tokenizer),
        "text_encoder": None if text_encoder is None else network_digest(text_encoder, text_encoder.get_config()),
        "preprocessing": preprocessing,
        "version": __version__,
    }


def digest_of(fields: Any) -> str:
    """SHA-256, in hex, of what JSON can say."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def network_digest(network: keras.Model, config: dict[str, Any]) -> str:
    """SHA-256, in hex, of a network's weights and of its configuration, but for the latents' scaling."""
    config = {name: value for name, value in config.items() if name not in _NOT_KEPT}
    digest = hashlib.sha256(digest_of(config).encode())
    for variable in network.weights:
        array = np.ascontiguousarray(to_numpy(variable))
        digest.update(f"{array.dtype} {array.shape} ".encode())
        digest.update(array.view(np.uint8).data if array.ndim else array.tobytes())
    return digest.hexdigest()


def _tokenizer(tokenizer: Any) -> str:
    added = {token: dataclasses.asdict(how) for token, how in tokenizer.added_tokens.items()}
    names = ("context_length", "start_id", "end_id", "pad_id", "unknown_token")
    return digest_of([tokenizer.vocabulary, tokenizer.merges, added, [getattr(tokenizer, name) for name in names]])
