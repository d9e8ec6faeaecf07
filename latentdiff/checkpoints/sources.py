"""What a pipeline, or a part of one, can be read from: one small interface, whatever form the files have."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from latentdiff.checkpoints.clip_directory import CLIPDirectory, is_clip
from latentdiff.checkpoints.diffusers import Component
from latentdiff.checkpoints.diffusers_directory import DiffusersDirectory
from latentdiff.checkpoints.diffusers_scheduler import PREDICTIONS, SamplerSettings
from latentdiff.checkpoints.kerascv import KerasCV, is_kerascv
from latentdiff.checkpoints.ldm import LDMFile


class Source(Protocol):
    """Files that hold a pipeline or some of its parts; opening one reads headers and configurations, no numbers.

    Attributes:
        path: The directory or the file.
        form: What it is, in words: "diffusers directory".
        kinds: Of "unet", "autoencoder" and "text_encoder" those that it has.
    """

    @property
    def path(self) -> Path: ...

    @property
    def form(self) -> str: ...

    @property
    def kinds(self) -> tuple[str, ...]: ...

    def component(self, kind: str, *, dtype: str | np.dtype | None = None, variant: str | None = None) -> Component:
        """A network's configuration and its weights, which are read from the files one at a time when asked for.

        Args:
            kind: "unet", "autoencoder" or "text_encoder".
            dtype: What the arrays are converted to; None leaves them as they are stored.
            variant: Of a directory's weights, for example "fp16".

        Raises:
            FileNotFoundError: The part, or a file of it, is not there.
            CheckpointError: Keys are missing, left over or misshapen, or it asks for what cannot be done here.
        """
        ...

    def settings(self) -> SamplerSettings:
        """Schedule, prediction and sampler of the whole pipeline.

        Raises:
            FileNotFoundError, CheckpointError: It is no whole pipeline, or asks for what cannot be done here.
        """
        ...

    def tokenizer(self) -> dict[str, Any]:
        """The keyword arguments of `CLIPTokenizer`.

        Raises:
            FileNotFoundError, ValueError: There is none, or it is malformed.
        """
        ...

    def sample_size(self) -> tuple[int, int] | None:
        """(h, w) of the latents that the UNet was trained on; None where the files do not say."""
        ...


def check_fit(configs: Mapping[str, Mapping[str, Any]], num_tokens: int) -> None:
    """Checks that the parts of a pipeline belong together.

    Args:
        configs: Kind -> its constructor's arguments, of all three kinds.
        num_tokens: The tokenizer's vocabulary size.

    Raises:
        ValueError: They do not.
    """
    unet, autoencoder, text_encoder = (configs[kind] for kind in ("unet", "autoencoder", "text_encoder"))
    for name, value, other, expected in (
        ("The UNet's context", unet["context_dim"], "the text encoder's width", text_encoder["width"]),
        ("The UNet's latent", unet["in_channels"], "the autoencoder's", autoencoder["latent_channels"]),
        ("The UNet's output", unet["out_channels"], "its latent", unet["in_channels"]),
        ("The autoencoder's image", autoencoder["image_channels"], "an RGB image", 3),
    ):
        if value != expected:
            raise ValueError(f"{name} must have as many channels as {other}. Received: {value}, {expected}.")
    if num_tokens > text_encoder["vocabulary_size"]:
        raise ValueError(
            "The text encoder must know every token. Received: "
            f"{num_tokens} tokens, {text_encoder['vocabulary_size']} embeddings."
        )


def open_source(path: str | os.PathLike, *, ema: bool = False, prediction: str | None = None) -> Source:
    """The source at `path`, whose form is recognised by its content.

    Args:
        path: A model directory or a file; see `latentdiff.catalogue.resolve_preset` for names.
        ema: Whether the averaged weights are read where a file holds both kinds.
        prediction: "eps", "v" or "x0", where the files do not say it or say it wrongly.

    Raises:
        FileNotFoundError: There is no such file or directory.
        CheckpointError: The content is recognised as something that cannot be used here, or is not recognised.
        ValueError: `prediction` is none of these, or there are no averaged weights.
    """
    if prediction not in (None, *PREDICTIONS.values()):
        choices = ", ".join(PREDICTIONS.values())
        raise ValueError(f"`prediction` must be one of {choices}. Received: prediction={prediction!r}.")
    path = Path(path)
    if is_kerascv(path):
        return KerasCV(path, ema=ema, prediction=prediction)
    if path.is_file():
        return LDMFile(path, ema=ema, prediction=prediction)
    if is_clip(path):
        return CLIPDirectory(path, ema=ema, prediction=prediction)
    return DiffusersDirectory(path, ema=ema, prediction=prediction)
