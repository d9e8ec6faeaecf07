"""A training's whole state in one file: every variable of the model (seeds, averages, metrics) and of its optimizer.

The file is written aside, synced and renamed, and each array in it has a checksum (the zip format's own): a state is
there whole, or it is not there. It holds arrays, never code.
"""

import json
import os
import pathlib
import tempfile
import zipfile
from typing import Any

import keras
import numpy as np

from latentdiff.backend import is_first_process, to_numpy


def write_state(path: pathlib.Path, model: keras.Model) -> None:
    """Writes the state of a compiled and built model.

    Raises:
        OSError: the file cannot be written, on a full disk say; what lay at `path` is still there.
    """
    variables = state_variables(model)
    arrays = [to_numpy(variable) for variable in variables]  # every process takes part, the first one writes
    if not is_first_process():
        return
    said = [
        [variable.path, array.dtype.name, list(array.shape)] for variable, array in zip(variables, arrays, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    file = tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False)
    try:
        with file:
            entries: dict[str, Any] = {str(i): _plain(array) for i, array in enumerate(arrays)}
            np.savez(file, said=np.frombuffer(json.dumps(said).encode(), np.uint8), **entries)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, path)
        _sync_directory(path.parent)
    except BaseException:
        pathlib.Path(file.name).unlink(missing_ok=True)
        raise


def build_all(model: keras.Model) -> None:
    """Makes the variables of a compiled model and of its optimizer, where they are not there yet."""
    if not model.built:
        model.build()
    if not model.optimizer.built:  # one that scales the loss would make its own again
        model.optimizer.build(model.trainable_variables)


def read_state(path: pathlib.Path, model: keras.Model) -> None:
    """Puts a state into a compiled model, which is built where it was not. Nothing is assigned before all was read.

    Raises:
        ValueError: the file is damaged, or holds another model's variables.
        FileNotFoundError: there is none.
    """
    build_all(model)
    variables = state_variables(model)
    try:
        with np.load(path, allow_pickle=False) as file:
            said = json.loads(file["said"].tobytes())
            arrays = [file[str(i)].view(_dtype(name)) for i, (_, name, _) in enumerate(said)]
    except FileNotFoundError:
        raise
    except (OSError, EOFError, KeyError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"A training state must be a whole file of `write_state`. Received: {path} ({error})."
        ) from error
    mine = [(tuple(v.shape), keras.backend.standardize_dtype(v.dtype)) for v in variables]
    theirs = [(array.shape, array.dtype.name) for array in arrays]
    if mine != theirs:
        i = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs)))
        here = f"{variables[i].path} {mine[i]}" if i < len(mine) else "nothing more"
        there = f"{said[i][0]} {theirs[i]}" if i < len(theirs) else "nothing more"
        raise ValueError(f"A training state must hold this model's variables: {here}. Received: {there}, in {path}.")
    for variable, array in zip(variables, arrays, strict=True):
        variable.assign(array)


def state_variables(model: keras.Model) -> list[Any]:
    """What a state holds, in its order."""
    return [*model.variables, *model.optimizer.variables]


def _plain(array: np.ndarray) -> np.ndarray:
    """The array in a dtype of NumPy's own: bfloat16 as the integers of its bits."""
    return array if array.dtype.kind in "biufc" else array.view(f"u{array.dtype.itemsize}")


def _dtype(name: str) -> np.dtype:
    import ml_dtypes  # registers bfloat16 with NumPy

    return np.dtype(getattr(ml_dtypes, name)) if hasattr(ml_dtypes, name) else np.dtype(name)


def _sync_directory(directory: pathlib.Path) -> None:
    if os.name == "posix":  # elsewhere a directory cannot be opened
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
