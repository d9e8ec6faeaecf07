"""A diffusers model directory, component by component: configuration and weights read, and written.

A pipeline's directory has a folder for each component; a component's own directory has its `config.json` and its
weights. Nothing in them is run: JSON and safetensors are parsed, and what they say is checked.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from latentdiff.checkpoints import diffusers_autoencoder, diffusers_text_encoder, diffusers_unet
from latentdiff.checkpoints.files import CheckpointError, read_json, replaced_directory, write_json
from latentdiff.checkpoints.key_map import Entry, Weights, as_dtype, cast, dtype_of, match, shape_of
from latentdiff.checkpoints.safetensors_files import FLOATS, WeightsOpener, open_weights
from latentdiff.checkpoints.shards import write_weights

VERSION = "0.42.1"  # the diffusers whose files ours are like


@dataclass(frozen=True)
class Kind:
    """Where diffusers keeps a kind of component, and who knows its configuration and keys."""

    folder: str
    library: str
    class_names: tuple[str, ...]
    stem: str
    module: ModuleType
    ignored_keys: tuple[str, ...] = ()


KINDS = {
    "unet": Kind("unet", "diffusers", ("UNet2DConditionModel",), "diffusion_pytorch_model", diffusers_unet),
    "autoencoder": Kind("vae", "diffusers", ("AutoencoderKL",), "diffusion_pytorch_model", diffusers_autoencoder),
    "text_encoder": Kind(
        "text_encoder",
        "transformers",
        ("CLIPTextModel", "CLIPTextModelWithProjection"),
        "model",
        diffusers_text_encoder,
        diffusers_text_encoder.IGNORED_KEYS,
    ),
}
_CODES = {dtype: code for code, dtype in FLOATS.items()}
FILE_DTYPES = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Component:
    """A component as it was found.

    Attributes:
        kind: "unet", "autoencoder" or "text_encoder".
        directory: Its own directory, or the file that it came from.
        config: Its constructor's keyword arguments.
        details: Fields that change no number and are worth writing back: `sample_size`, token ids.
        weights: Variable path -> array, read when asked for.
        ignored: The file's keys that are left out on purpose.
    """

    kind: str
    directory: Path
    config: dict[str, Any]
    details: dict[str, Any]
    weights: Mapping[str, np.ndarray]
    ignored: tuple[str, ...]


def find_component(directory: str | os.PathLike, kind: str) -> Path:
    """The directory of a component: the one in a pipeline's directory, or `directory` itself.

    Raises:
        FileNotFoundError: If there is no configuration in either place.
    """
    _check_kind(kind)
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"There is no model directory `{directory}`.")
    inside = directory / KINDS[kind].folder
    if (inside / "config.json").is_file():
        return inside
    if (directory / "config.json").is_file() and not (directory / "model_index.json").is_file():
        return directory
    raise FileNotFoundError(
        f"A model directory must have `{KINDS[kind].folder}/config.json`, or be a component's own with `config.json`."
        f" Received: `{directory}`"
    )


def has_component(directory: str | os.PathLike, kind: str) -> bool:
    """Whether a pipeline's directory has the component, or `directory` is the component's own."""
    try:
        path = find_component(directory, kind)
    except FileNotFoundError:
        return False
    if path != Path(directory):
        return True
    names = _class_names(read_json(path / "config.json"))
    return not names or names[0] in KINDS[kind].class_names


def read_config(directory: str | os.PathLike, kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A component's constructor arguments and details, without its weights.

    Raises:
        FileNotFoundError: If there is no configuration.
        CheckpointError: If it is another class's, or asks for what cannot be done here.
    """
    path = find_component(directory, kind) / "config.json"
    values = read_json(path)
    classes = KINDS[kind].class_names
    for name in _class_names(values):
        if name not in classes:
            raise CheckpointError(f"`{path}` must be a configuration of {' or '.join(classes)}. Received: {name!r:.80}")
    return KINDS[kind].module.read_config(values, str(path))


def read_component(
    directory: str | os.PathLike,
    kind: str,
    *,
    dtype: str | np.dtype | None = None,
    variant: str | None = None,
    open_weights: WeightsOpener = open_weights,
) -> Component:
    """A component's configuration and weights.

    All keys and shapes have been checked when this returns; the numbers are read, and checked to be finite, when
    `weights` is asked for them, one at a time.

    Args:
        directory: A pipeline's directory, or the component's own.
        kind: "unet", "autoencoder" or "text_encoder".
        dtype: What the arrays are converted to; None leaves them as they are stored.
        variant: For example "fp16"; None takes the plain file, or the only variant that there is.
        open_weights: What opens the tensors of a directory, a stem and a variant.

    Raises:
        FileNotFoundError: If files are missing.
        CheckpointError: If the configuration cannot be expressed here, a file is damaged or a pickle, or keys are
            missing, left over or misshapen.
    """
    target = as_dtype(dtype)
    config, details = read_config(directory, kind)
    directory = find_component(directory, kind)
    tensors = open_weights(directory, KINDS[kind].stem, variant)
    ignored = {name for name in KINDS[kind].ignored_keys if name in tensors}
    sources = match(key_map(kind, config), tensors, ignored, str(directory))
    return Component(kind, directory, config, details, Weights(sources, target), tuple(sorted(ignored)))


def key_map(kind: str, config: Mapping[str, Any]) -> list[Entry]:
    """Every variable of the component that `config` describes, with its foreign names and shape."""
    _check_kind(kind)
    return KINDS[kind].module.key_map(config)


def config_fields(
    kind: str, config: Mapping[str, Any], dtype: str | None = "float32", details: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What `config.json` says of a component; the arguments are those of `write_component`.

    Raises:
        ValueError: If diffusers cannot express `config`, or its files have no such dtype.
    """
    _check_kind(kind)
    if dtype not in (None, *FILE_DTYPES):
        raise ValueError(f"`dtype` must be one of {', '.join(FILE_DTYPES)}. Received: dtype={dtype!r}")
    fields = KINDS[kind].module.write_config(config, details or {})
    if KINDS[kind].library == "diffusers":
        fields["_diffusers_version"] = VERSION
    return fields


def write_component(
    directory: str | os.PathLike,
    kind: str,
    config: Mapping[str, Any],
    arrays: Mapping[str, Any],
    *,
    dtype: str | None = "float32",
    details: Mapping[str, Any] | None = None,
    max_shard_size: int | str | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a component's directory, which appears whole or not at all.

    Args:
        directory: The component's own directory.
        kind: "unet", "autoencoder" or "text_encoder".
        config: Its constructor's arguments, all of them (`get_config()` will do).
        arrays: Variable path -> array, exactly those of `key_map`.
        dtype: "float16", "bfloat16" or "float32", of the file; None leaves each array in its own.
        details: Fields that change no number: `sample_size`, token ids.
        max_shard_size: Bytes of a weights file, or "2GB" and the like; None writes one file.
        overwrite: Whether an existing component's directory may be replaced.

    Raises:
        FileExistsError: If the directory has files and `overwrite` is false, or is a whole pipeline's.
        ValueError: If diffusers cannot express `config`, or `arrays` are not the component's.
        CheckpointError: If an array holds NaN, infinity, or a number too large for `dtype`.
    """
    fields = config_fields(kind, config, dtype, details)
    entries = sorted(key_map(kind, config), key=lambda entry: entry.keys[0])
    check_arrays(entries, arrays)
    if (Path(directory) / "model_index.json").is_file():
        raise FileExistsError(
            f"A component has a directory of its own. `{directory}` is a whole pipeline's, with `{KINDS[kind].folder}`."
        )
    with replaced_directory(directory, overwrite) as fresh:
        write_json(fresh / "config.json", fields)
        write_arrays(fresh, KINDS[kind].stem, entries, arrays, dtype, max_shard_size)


def write_arrays(
    directory: Path,
    stem: str,
    entries: list[Entry],
    arrays: Mapping[str, Any],
    dtype: str | None,
    max_shard_size: int | str | None,
) -> None:
    """Writes the weights' files of a key map, in its order; `arrays` have passed `check_arrays`."""
    dtypes = {entry.path: as_dtype(dtype) or dtype_of(arrays, entry.path) for entry in entries}
    write_weights(
        directory,
        stem,
        {entry.keys[0]: (_CODES[dtypes[entry.path]], entry.foreign_shape) for entry in entries},
        (_foreign(entry, arrays, dtypes[entry.path]) for entry in entries),
        max_shard_size,
    )


def _class_names(values: Mapping[str, Any]) -> list[Any]:
    """The classes that a configuration says it is of; older ones may say none."""
    names = values.get("_class_name", values.get("architectures"))
    return [name for name in (names if isinstance(names, list) else [names]) if name is not None]


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {', '.join(KINDS)}. Received: kind={kind!r}")


def _foreign(entry: Entry, arrays: Mapping[str, Any], dtype: np.dtype) -> np.ndarray:
    """One of `arrays` as the file holds it."""
    if not isinstance(arrays, Weights):
        return entry.to_foreign(cast(np.asarray(arrays[entry.path]), dtype, f"`{entry.path}`"))
    array = arrays.foreign(entry.path)
    array = array if array.dtype == dtype else cast(array, dtype, f"`{entry.path}`")
    return array.reshape(entry.foreign_shape)


def check_arrays(entries: list[Entry], arrays: Mapping[str, Any]) -> None:
    """Checks that `arrays` are exactly those of a key map.

    Raises:
        ValueError: If they are not; all that differ are named.
    """
    wanted = {entry.path: entry.shape for entry in entries}
    problems = [f"missing: {path} {shape}" for path, shape in wanted.items() if path not in arrays]
    problems += [f"left over: {path}" for path in arrays if path not in wanted]
    for path, shape in wanted.items():
        if path in arrays and shape_of(arrays, path) != shape:
            problems.append(f"shape: {path} must be {shape}, is {shape_of(arrays, path)}")
    if problems:
        raise ValueError("`arrays` must be those of the configuration. Received:\n  " + "\n  ".join(problems))
