"""JSON that is checked as it is read, and directories that appear whole or not at all."""

from __future__ import annotations

import ctypes
import json
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

JSON_LIMIT = 16 * 2**20  # bytes; the largest index of a sharded model is a hundredth of this
# Formats that hold Python pickles: reading one can run whatever program its author put there.
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")
WEIGHT_SUFFIXES = (".safetensors", *PICKLE_SUFFIXES, ".msgpack", ".h5", ".onnx")
MODEL_FILES = ("model_index.json", "config.json", "scheduler_config.json")
COMPONENT_FOLDERS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


class CheckpointError(ValueError):
    """A model directory whose content cannot be used; the message names the file and what is wrong."""


def pickle_message(received: str) -> str:
    """What is said of pickled weights, wherever they turn up."""
    return (
        f"Weights must be safetensors; a pickle can run any program and is never opened. Received: {received}. "
        "`latentdiff convert` makes a model directory of it, with `pip install latentdiff[convert]`."
    )


def parse_json(text: bytes, source: str) -> dict[str, Any]:
    """The JSON object in `text`.

    Args:
        text: UTF-8 bytes.
        source: The file's name, for errors.

    Raises:
        CheckpointError: If it is not one JSON object, or names a key twice, or nests too deep.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise ValueError(f"the key {twice!r:.200} is given twice")
        return fields

    try:
        fields = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"`{source}` must be JSON. Received: {error}") from error
    if not isinstance(fields, dict):
        raise CheckpointError(f"`{source}` must hold a JSON object. Received: {type(fields).__name__}")
    return fields


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in the file `path`, of at most 16 MiB.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If its content is not one JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"A model directory must have `{path.name}`. There is no file `{path}`.")
    if path.stat().st_size > JSON_LIMIT:
        raise CheckpointError(f"`{path}` must be at most {JSON_LIMIT} bytes. Received: {path.stat().st_size}")
    return parse_json(path.read_bytes(), str(path))


def write_json(path: Path, fields: dict[str, Any]) -> None:
    """Writes `fields` as diffusers does: two spaces, sorted, one newline at the end."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps(fields, indent=2, sort_keys=True) + "\n")
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def replaced_directory(target: str | os.PathLike, overwrite: bool = False) -> Iterator[Path]:
    """A new directory beside `target` to write into, which takes its place when the block ends well.

    When the block raises, the new directory is removed and `target` is as it was. Of an overwritten model directory
    only that goes which the new one has too: entries of the same names, folders whole, and weights of the same stems,
    for example older shards. Everything else, a README, pictures, a `.git`, moves into the new one.

    Args:
        target: The directory that is to exist afterwards.
        overwrite: Whether an existing model directory may be replaced.

    Raises:
        FileExistsError: As `check_replaceable`.
    """
    target = Path(target).resolve()
    check_replaceable(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    mark = f"{os.getpid()}-{secrets.token_hex(4)}"
    fresh = target.with_name(f".{target.name}.{mark}.new")
    fresh.mkdir()
    try:
        yield fresh
        for folder, _, _ in os.walk(fresh):
            _sync_directory(Path(folder))
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    if not target.exists():
        fresh.rename(target)
        _sync_directory(target.parent)
        return
    written = set(os.listdir(fresh))
    stems = [_weights_of_stem(name.removesuffix(".safetensors")) for name in written if name.endswith(".safetensors")]
    former = _swap(fresh, target, target.with_name(f".{target.name}.{mark}.old"))
    for entry in former.iterdir():
        if entry.name not in written and not any(pattern.fullmatch(entry.name) for pattern in stems):
            entry.rename(target / entry.name)
    _sync_directory(target.parent)
    shutil.rmtree(former)


def check_replaceable(target: str | os.PathLike, overwrite: bool = False) -> None:
    """Checks that a model may be written to `target`, as a long computation wants to know before it begins.

    Args:
        target: The directory that is to exist afterwards.
        overwrite: Whether an existing model may be replaced, and other files may stand beside the new one.

    Raises:
        FileExistsError: If `target` is a file; if it holds files and `overwrite` is false; or if it holds weights or a
            component's folder that belong to no model.
    """
    target = Path(target)
    if not target.exists():
        return
    if not target.is_dir():
        raise FileExistsError(f"A model is saved as a directory. `{target}` is a file.")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"`{target}` exists and is not empty. Remove it, or save with overwrite=True.")
    weights = sorted(path.name for path in target.iterdir() if path.name.endswith(WEIGHT_SUFFIXES))
    if weights and not any((target / name).is_file() for name in MODEL_FILES):
        raise FileExistsError(
            f"Only a model directory is overwritten. `{target}` holds {', '.join(weights):.200}, but no configuration."
        )
    # Without a model's index these may be anybody's: a project's own folder `unet` of source code, for one.
    folders = [name for name in COMPONENT_FOLDERS if (target / name).exists()]
    if folders and not (target / "model_index.json").is_file():
        raise FileExistsError(
            f"Only a model directory is overwritten. `{target}` has {', '.join(folders)}, but no `model_index.json`."
        )


def _weights_of_stem(stem: str) -> re.Pattern[str]:
    """Names of a stem's weights of any variant, shard and format, and of their indices."""
    suffixes = "|".join(re.escape(suffix) for suffix in WEIGHT_SUFFIXES)
    return re.compile(rf"{re.escape(stem)}([.-][A-Za-z0-9_-]+)?({suffixes})(\.index(\.\w+)?\.json)?")


def _swap(fresh: Path, target: Path, aside: Path) -> Path:
    """Puts `fresh` in the place of `target`, which is then where the result says: at `fresh`, or `aside`.

    Linux swaps the two in one step, so that a crash finds one or the other there; elsewhere it takes two renames.
    """
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):  # macOS, Windows, an old C library
        renameat2 = None
    if renameat2 and renameat2(here, os.fsencode(fresh), here, os.fsencode(target), exchange) == 0:
        return fresh
    target.rename(aside)
    try:
        fresh.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    return aside


def _sync_directory(path: Path) -> None:
    if os.name != "posix":
        return  # elsewhere a directory cannot be opened to be synced
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
