"""From any form of checkpoint to a diffusers directory, from file to file: no network is built."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from latentdiff.checkpoints import diffusers, diffusers_pipeline, pickles
from latentdiff.checkpoints.diffusers_directory import DiffusersDirectory
from latentdiff.checkpoints.files import CheckpointError, check_replaceable, replaced_directory
from latentdiff.checkpoints.kerascv import KerasCV, as_trained
from latentdiff.checkpoints.ldm import LDMFile
from latentdiff.checkpoints.sources import Source, check_fit, open_source
from latentdiff.models.tokenizer import CLIPTokenizer

SAMPLE_SIZE = (64, 64)


def convert(
    source: str | os.PathLike,
    directory: str | os.PathLike,
    *,
    dtype: str | None = None,
    max_shard_size: int | str | None = None,
    variant: str | None = None,
    ema: bool = False,
    prediction: str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint as a diffusers directory, which appears whole or not at all.

    A whole pipeline becomes a pipeline's directory, a network alone the directory of a component.

    Args:
        source: a model directory or a file of any form that opens here; also a pickle, `.ckpt` or `.bin`, through
            torch's weights-only unpickler.
        directory: what is written.
        dtype: of the files: "float32", "float16" or "bfloat16"; None leaves each tensor in its own.
        max_shard_size: bytes of a weights file, or "2GB" and the like; None writes one file for each network.
        variant, ema, prediction: which weights, and what they predict; see `TextToImage.from_preset`.
        overwrite: whether an existing model directory may be replaced.

    Raises:
        FileExistsError: the directory has files and `overwrite` is false.
        FileNotFoundError: a file is missing.
        ValueError: the source cannot be used, or diffusers cannot express it; or it is a pickle, and there is no torch
            of these days.
    """
    check_replaceable(directory, overwrite)
    opened = open_any(Path(source), ema=ema, prediction=prediction)
    components = {kind: opened.component(kind, variant=variant) for kind in opened.kinds}
    if isinstance(opened, KerasCV):
        components = {kind: as_trained(component) for kind, component in components.items()}
    if len(components) == 1:
        ((kind, component),) = components.items()
        _write_component(component, directory, dtype, max_shard_size, overwrite)
    elif components.keys() == diffusers.KINDS.keys():
        _write_pipeline(opened, components, directory, dtype, max_shard_size, overwrite)
    else:
        raise CheckpointError(
            f"A source must be a whole pipeline or one network. Received: {', '.join(components) or 'none'} in"
            f" `{source}`."
        )


def open_any(path: Path, *, ema: bool = False, prediction: str | None = None) -> Source:
    """As `open_source`, and of pickles too."""
    if path.is_file() and pickles.is_pickle(path):
        return LDMFile(path, ema=ema, prediction=prediction, contents=(pickles.open_pickle(path), {}))
    source = open_source(path, ema=ema, prediction=prediction)
    if isinstance(source, DiffusersDirectory):
        return DiffusersDirectory(path, prediction=prediction, open_weights=pickles.open_weights_or_pickle)
    return source


def _write_component(component, directory, dtype, max_shard_size, overwrite) -> None:
    diffusers.write_component(
        directory,
        component.kind,
        component.config,
        component.weights,
        dtype=dtype,
        details=component.details,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    )


def _write_pipeline(opened: Source, components, directory, dtype, max_shard_size, overwrite) -> None:
    settings = opened.settings()
    tokenizer = CLIPTokenizer(**opened.tokenizer())
    check_fit({kind: component.config for kind, component in components.items()}, tokenizer.vocabulary_size)
    factor = 2 ** (len(components["autoencoder"].config["channels"]) - 1)
    details = diffusers_pipeline.component_details(
        opened.sample_size() or SAMPLE_SIZE, factor, tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id
    )
    # What a component's own file says comes before what follows from the others.
    whole = {
        kind: replace(component, details={**details[kind], **component.details})
        for kind, component in components.items()
    }
    diffusers_pipeline.check_pipeline(whole, dtype, max_shard_size)
    with replaced_directory(directory, overwrite) as fresh:
        diffusers_pipeline.write_pipeline(fresh, whole, settings, dtype, max_shard_size)
        tokenizer.save(fresh / "tokenizer")
