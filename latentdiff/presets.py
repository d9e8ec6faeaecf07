"""Names and directories -> networks with their weights, and back; the files are `latentdiff.checkpoints`' business."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np

from latentdiff.backend import default_dtype
from latentdiff.catalogue import resolve_preset
from latentdiff.checkpoints import diffusers, diffusers_scheduler
from latentdiff.checkpoints.diffusers_scheduler import SamplerSettings
from latentdiff.checkpoints.files import replaced_directory
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.models.layers import blank_weights
from latentdiff.models.text_encoder import CLIPTextEncoder
from latentdiff.models.tokenizer import CLIPTokenizer
from latentdiff.models.unet import UNet

SAMPLE_SIZE = 64  # latents of models whose directory does not say: Stable Diffusion's

_NETWORKS: dict[str, Callable[..., keras.Model]] = {
    "unet": UNet,
    "autoencoder": Autoencoder,
    "text_encoder": CLIPTextEncoder,
}


@dataclass(frozen=True)
class Parts:
    """A pipeline's parts.

    Attributes:
        tokenizer, text_encoder, unet, autoencoder: the arrow, in its order.
        settings: schedule, prediction and sampler.
        sample_size: (h, w) of the latents that the UNet was trained on.
    """

    tokenizer: CLIPTokenizer
    text_encoder: CLIPTextEncoder
    unet: UNet
    autoencoder: Autoencoder
    settings: SamplerSettings
    sample_size: tuple[int, int]


def load_pipeline(preset: str | os.PathLike, dtype: str | None = None) -> Parts:
    """The parts of a model directory.

    Args:
        preset: a name in `weights/`, or a pipeline's directory.
        dtype: what the networks hold and compute in, a Keras dtype policy; None chooses by the device.

    Raises:
        ValueError: the name is unknown, or the directory's files are malformed or ask for what cannot be done here.
        FileNotFoundError: the directory lacks a file.
    """
    directory = resolve_preset(preset)
    diffusers.read_pipeline_index(directory)
    settings = diffusers_scheduler.read_scheduler(directory)
    tokenizer = CLIPTokenizer.from_directory(directory)
    # All files are opened and checked before the first network is built.
    components = {kind: diffusers.read_component(directory, kind) for kind in _NETWORKS}
    unet, autoencoder, text_encoder = (components[kind].config for kind in ("unet", "autoencoder", "text_encoder"))
    _check_fit("The UNet's context", unet["context_dim"], "the text encoder's width", text_encoder["width"])
    _check_fit("The UNet's latent", unet["in_channels"], "the autoencoder's", autoencoder["latent_channels"])
    if tokenizer.vocabulary_size > text_encoder["vocabulary_size"]:
        raise ValueError(
            "The text encoder must know every token. Received: "
            f"{tokenizer.vocabulary_size} tokens, {text_encoder['vocabulary_size']} embeddings."
        )
    if tokenizer.context_length > text_encoder["context_length"]:
        tokenizer = CLIPTokenizer.from_directory(directory, context_length=text_encoder["context_length"])
    size = components["unet"].details.get("sample_size") or SAMPLE_SIZE
    height, width = (size, size) if isinstance(size, int) else size
    dtype = dtype or default_dtype()
    networks = {kind: _network(component, dtype) for kind, component in components.items()}
    return Parts(tokenizer, settings=settings, sample_size=(height, width), **networks)  # pyright: ignore[reportArgumentType]


def load_unet(preset: str | os.PathLike, dtype: str | None = None) -> UNet:
    """The UNet of a pipeline's directory, or of its own. Raises as `load_pipeline`."""
    return _load("unet", preset, dtype)  # pyright: ignore[reportReturnType]


def load_autoencoder(
    preset: str | os.PathLike, norm_epsilon: float | None = None, dtype: str | None = None
) -> Autoencoder:
    """The autoencoder of a pipeline's directory, or of its own. Raises as `load_pipeline`.

    Args:
        preset: a name in `weights/`, or a directory.
        norm_epsilon: another epsilon of its norms than the 1e-6 of diffusers' files; the documents' code has 1e-5.
        dtype: as for `load_pipeline`.
    """
    changes = {} if norm_epsilon is None else {"norm_epsilon": norm_epsilon}
    return _load("autoencoder", preset, dtype, **changes)  # pyright: ignore[reportReturnType]


def load_text_encoder(preset: str | os.PathLike, dtype: str | None = None) -> CLIPTextEncoder:
    """The text encoder of a pipeline's directory, or of its own. Raises as `load_pipeline`."""
    return _load("text_encoder", preset, dtype)  # pyright: ignore[reportReturnType]


def load_tokenizer(preset: str | os.PathLike) -> CLIPTokenizer:
    """The tokenizer of a pipeline's directory, or of its own. Raises as `load_pipeline`."""
    return CLIPTokenizer.from_directory(resolve_preset(preset))


def save_pipeline(parts: Parts, directory: str | os.PathLike, dtype: str = "float32", overwrite: bool = False) -> None:
    """Writes a diffusers directory, which appears whole or not at all.

    Args:
        parts: what is written.
        directory: the pipeline's directory.
        dtype: of the files: "float32", "float16" or "bfloat16".
        overwrite: whether an existing model directory may be replaced.

    Raises:
        FileExistsError: the directory has files and `overwrite` is false.
        ValueError: diffusers cannot express the configuration, or a weight is not finite in `dtype`.
    """
    details = {
        "unet": {"sample_size": _size(*parts.sample_size)},
        "autoencoder": {"sample_size": max(parts.sample_size) * parts.autoencoder.factor},
        "text_encoder": {
            "bos_token_id": parts.tokenizer.start_id,
            "eos_token_id": parts.tokenizer.end_id,
            "pad_token_id": parts.tokenizer.pad_id,
        },
    }
    with replaced_directory(directory, overwrite) as fresh:
        for kind in _NETWORKS:
            network = getattr(parts, kind)
            arrays = {path: np.asarray(variable) for path, variable in named_variables(network)}
            folder = fresh / diffusers.KINDS[kind].folder
            diffusers.write_component(folder, kind, network.config, arrays, dtype=dtype, details=details[kind])
        parts.tokenizer.save(fresh / "tokenizer")
        diffusers_scheduler.write_scheduler(fresh / "scheduler", parts.settings, diffusers.VERSION)
        diffusers.write_pipeline_index(fresh, diffusers_scheduler.SAMPLER_CLASSES[parts.settings.sampler])


def named_variables(network: keras.Model) -> Iterator[tuple[str, Any]]:
    """(path, variable) of a network; the autoencoder's paths begin with "encoder/" or "decoder/"."""
    if isinstance(network, Autoencoder):
        for half in (network.encoder, network.decoder):
            yield from ((f"{half.name}/{variable.path}", variable) for variable in half.variables)
    else:
        yield from ((variable.path, variable) for variable in network.variables)


def _load(kind: str, preset: str | os.PathLike, dtype: str | None, **changes: Any) -> keras.Model:
    component = diffusers.read_component(Path(resolve_preset(preset)), kind)
    return _network(component, dtype or default_dtype(), **changes)


def _network(component: diffusers.Component, dtype: str, **changes: Any) -> keras.Model:
    with blank_weights():
        network = _NETWORKS[component.kind](**{**component.config, **changes}, dtype=dtype)
    variables = dict(named_variables(network))
    if variables.keys() != component.weights.keys():
        differing = sorted(variables.keys() ^ component.weights.keys())
        raise ValueError(f"Every variable must have one array in the file. These do not: {', '.join(differing)}.")
    for path, variable in variables.items():
        variable.assign(component.weights[path])
    return network


def _check_fit(name: str, value: int, other: str, expected: int) -> None:
    if value != expected:
        raise ValueError(f"{name} must have as many channels as {other}. Received: {value}, {expected}.")


def _size(height: int, width: int) -> int | list[int]:
    return height if height == width else [height, width]
