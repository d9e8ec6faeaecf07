"""Where models are found: the names that ship in `weights/`, directories and files; imports no Keras."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection
from pathlib import Path

from latentdiff.checkpoints.files import PICKLE_SUFFIXES, pickle_message


def weights_directory() -> Path:
    """The directory of the shipped models: inside an installed package, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    installed = package / "weights"
    return installed if installed.is_dir() else package.parent / "weights"


def preset_names() -> tuple[str, ...]:
    """The names of the shipped models, in alphabetical order."""
    directory = weights_directory()
    return tuple(sorted(path.name for path in directory.iterdir() if path.is_dir())) if directory.is_dir() else ()


def resolve_preset(
    preset: str | os.PathLike[str], parts: Collection[str] | None = None, variant: str | None = None
) -> Path:
    """The directory or the file that a preset stands for.

    A shipped name comes first; a directory of the same name is meant by `./name` or by a `Path`.

    Args:
        preset: a name in `weights/`, the path of a model directory or of one file, or `hf://owner/name` for a model of
            a hub, which is fetched into its cache; see `latentdiff.checkpoints.hub`.
        parts, variant: what of a hub's model is needed; None is all parts, and the plain weights.

    Returns:
        An existing directory or file; what it holds has not been looked at.

    Raises:
        TypeError: if `preset` is neither a string nor a path.
        ValueError: if there is nothing of that name, with the names that are near; if it is a file of another kind.
        ImportError, FileNotFoundError: of a hub's model; see `hub.fetch`.
    """
    if not isinstance(preset, str | os.PathLike):
        raise TypeError(f"`preset` must be a name or a path. Received: {preset!r}.")
    if isinstance(preset, str) and preset.startswith("hf://"):
        from latentdiff.checkpoints import hub

        return hub.fetch(preset, parts, variant)
    names = preset_names()
    if isinstance(preset, str) and preset in names:
        return weights_directory() / preset
    path = Path(preset)
    if str(preset) and path.is_dir():
        return path
    if str(preset) and path.is_file():
        if path.suffix.lower() in PICKLE_SUFFIXES:
            raise ValueError(pickle_message(f"`{path}`"))
        if path.suffix.lower() in (".safetensors", ".h5"):
            return path
        raise ValueError(
            f"`preset` must be a name, a model directory, or a `.safetensors` or `.h5` file. Received: {str(path)!r}."
        )
    near = difflib.get_close_matches(str(preset), names, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else f"Names: {', '.join(names) or 'none'}."
    raise ValueError(f"`preset` must be a name in weights/ or a model's path. Received: {str(preset)!r}. {hint}")
