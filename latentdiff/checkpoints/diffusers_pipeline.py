"""A whole pipeline's directory in diffusers' layout: its `model_index.json` read, and all of it written."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentdiff.checkpoints import diffusers
from latentdiff.checkpoints.diffusers_scheduler import SAMPLER_CLASSES, SamplerSettings, write_scheduler
from latentdiff.checkpoints.files import CheckpointError, read_json, write_json
from latentdiff.checkpoints.shards import parse_size

PIPELINES = ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline")
# Parts that some directories have and nobody runs here.
IGNORED_PARTS = ("safety_checker", "feature_extractor", "image_encoder")


@dataclass(frozen=True)
class PipelineIndex:
    """What `model_index.json` says.

    Attributes:
        class_name: The pipeline's class in diffusers.
        ignored: Components that are there and are not run here: the safety checker and its kind.
    """

    class_name: str
    ignored: tuple[str, ...]


def read_pipeline_index(directory: str | os.PathLike) -> PipelineIndex:
    """A pipeline's `model_index.json`, with the presence of its parts.

    Raises:
        FileNotFoundError: If parts are missing; all are named.
        CheckpointError: If it is another pipeline's, or has parts that would change the picture.
    """
    directory = Path(directory)
    path = directory / "model_index.json"
    values = read_json(path)
    name = values.get("_class_name")
    if name not in PIPELINES:
        raise CheckpointError(f"`{path}` must be of {' or '.join(PIPELINES)}. Received: {name!r:.80}")
    parts = {part: value for part, value in values.items() if isinstance(value, list) and value != [None, None]}
    for part, value in parts.items():
        if len(value) != 2 or not all(isinstance(word, str) for word in value):
            raise CheckpointError(f"`{path}`: `{part}` must be [library, class]. Received: {value!r:.200}")
    expected = {kind.folder: kind.class_names for kind in diffusers.KINDS.values()}
    for part, classes in expected.items():
        if part in parts and parts[part][-1] not in classes:
            raise CheckpointError(f"`{path}`: `{part}` must be {' or '.join(classes)}. Received: {parts[part]!r:.200}")
    unknown = sorted(set(parts) - set(expected) - {"tokenizer", "scheduler", *IGNORED_PARTS})
    if unknown:
        raise CheckpointError(f"`{path}` has parts that are not supported: {', '.join(unknown)}")
    needed = [f"{folder}/config.json" for folder in expected] + ["scheduler/scheduler_config.json"]
    absent = [part for part in (*expected, "tokenizer", "scheduler") if part not in parts]
    if absent:
        raise CheckpointError(f"`{path}` must have all parts of a pipeline. It lacks: {', '.join(absent)}")
    missing = [file for file in needed if not (directory / file).is_file()]
    missing += ["tokenizer/"] if not (directory / "tokenizer").is_dir() else []
    if missing:
        raise FileNotFoundError(f"`{directory}` is no whole model directory. It lacks: {', '.join(missing)}")
    return PipelineIndex(name, tuple(part for part in IGNORED_PARTS if part in parts))


def component_details(
    sample_size: tuple[int, int], factor: int, start_id: int, end_id: int, pad_id: int
) -> dict[str, dict[str, Any]]:
    """What each component's file says beside its numbers.

    Args:
        sample_size: (h, w) of the latents that the UNet was trained on.
        factor: What an image is larger by.
        start_id, end_id, pad_id: The tokenizer's.
    """
    height, width = sample_size
    return {
        "unet": {"sample_size": height if height == width else [height, width]},
        "autoencoder": {"sample_size": max(sample_size) * factor},
        "text_encoder": {"bos_token_id": start_id, "eos_token_id": end_id, "pad_token_id": pad_id},
    }


def check_pipeline(
    components: Mapping[str, diffusers.Component], dtype: str | None, max_shard_size: int | str | None
) -> None:
    """Checks what `write_pipeline` will be asked, before the first gigabyte is written.

    Raises:
        ValueError: If diffusers cannot express a configuration, or there is no such dtype or size.
    """
    if max_shard_size is not None:
        parse_size(max_shard_size)
    for kind, part in components.items():
        diffusers.config_fields(kind, part.config, dtype, part.details)


def write_pipeline(
    directory: Path,
    components: Mapping[str, diffusers.Component],
    settings: SamplerSettings,
    dtype: str | None = "float32",
    max_shard_size: int | str | None = None,
) -> None:
    """Writes the networks, the scheduler and the index of a pipeline; the tokenizer is the caller's.

    Args:
        directory: An empty one, such as `replaced_directory` gives.
        components: Kind -> configuration, details and arrays, of all three kinds.
        settings: Schedule, prediction and sampler.
        dtype, max_shard_size: As for `write_component`.

    Raises:
        ValueError: As `check_pipeline`.
        CheckpointError: If an array holds NaN, infinity, or a number too large for `dtype`.
    """
    for kind, part in components.items():
        diffusers.write_component(
            directory / diffusers.KINDS[kind].folder,
            kind,
            part.config,
            part.weights,
            dtype=dtype,
            details=part.details,
            max_shard_size=max_shard_size,
        )
    write_scheduler(directory / "scheduler", settings, diffusers.VERSION)
    write_pipeline_index(directory, SAMPLER_CLASSES[settings.sampler])


def write_pipeline_index(directory: str | os.PathLike, sampler_class: str) -> None:
    """Writes `model_index.json` of a StableDiffusionPipeline without a safety checker.

    Args:
        directory: The pipeline's directory.
        sampler_class: The scheduler's class in diffusers, for example "PNDMScheduler".
    """
    parts = {kind.folder: [kind.library, kind.class_names[0]] for kind in diffusers.KINDS.values()}
    write_json(
        Path(directory) / "model_index.json",
        {
            "_class_name": PIPELINES[0],
            "_diffusers_version": diffusers.VERSION,
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", sampler_class],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            **parts,
        },
    )
