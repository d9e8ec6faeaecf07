"""Weights written to one safetensors file, or to several with an index, as diffusers and transformers write them."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from latentdiff.checkpoints.files import write_json
from latentdiff.checkpoints.safetensors_files import ITEM_BYTES, write_file

_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}

Layout = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> (dtype, shape)


def parse_size(size: int | str) -> int:
    """The bytes of a size: a whole number, or one with a unit, "500MB", "2GB", "1GiB"; GB are 10^9, GiB are 2^30.

    Raises:
        ValueError: It is none, or not positive.
    """
    parts = re.fullmatch(r"([0-9]{1,15})([KMG]i?B)?", size.strip()) if isinstance(size, str) else None
    number = int(parts[1]) * _UNITS.get(parts[2], 1) if parts else size
    if type(number) is not int or number < 1:
        raise ValueError(f'`max_shard_size` must be bytes, or a size such as "2GB". Received: max_shard_size={size!r}.')
    return number


def write_weights(
    directory: Path, stem: str, layout: Layout, arrays: Iterable[np.ndarray], max_shard_size: int | str | None = None
) -> None:
    """Writes the weights of a component.

    Args:
        directory: The component's.
        stem: "diffusion_pytorch_model" or "model".
        layout: Name -> (dtype, shape), in the order of the files.
        arrays: The arrays, in the same order, so laid out; taken one at a time.
        max_shard_size: Bytes of the tensors in one file, or "2GB" and the like. A larger tensor has a file of its own.
            None writes one file.
    """
    shards = [list(layout)] if max_shard_size is None else plan_shards(layout, parse_size(max_shard_size))
    remaining = iter(arrays)
    if len(shards) == 1:
        write_file(directory / f"{stem}.safetensors", layout, remaining)
        return
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        write_file(directory / file, {name: layout[name] for name in names}, itertools.islice(remaining, len(names)))
        weight_map |= dict.fromkeys(names, file)
    total = sum(_size(*layout[name]) for name in layout)
    write_json(
        directory / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


def plan_shards(layout: Layout, max_size: int) -> list[list[str]]:
    """The names of each file, in order: as many as fit into `max_size` bytes, at least one."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, (code, shape) in layout.items():
        size = _size(code, shape)
        if shards[-1] and filled + size > max_size:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _size(code: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * ITEM_BYTES[code]
