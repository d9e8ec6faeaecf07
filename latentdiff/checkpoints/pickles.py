"""Pickled weights, for `latentdiff convert` alone: torch's weights-only unpickler, and no other way.

It builds tensors and plain containers, and names what else a file asks for; nothing of that runs. It was bypassed
before torch 2.6 (CVE-2025-32434) and before 2.10 (CVE-2026-24747), so an older torch is refused. This is the one module
that may import torch, and only when a pickle is opened.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from latentdiff.checkpoints.files import PICKLE_SUFFIXES, CheckpointError
from latentdiff.checkpoints.safetensors_files import StoredTensor, open_weights

TORCH = (2, 10)
_CODES = {
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}
# Training's own record of its best files, whose class is a key in Stable Diffusion 1.x's .ckpt files.
_LIGHTNING = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"


class _NamedOnly:
    """Stands for a class that a file names and whose content nobody reads."""


def open_pickle(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a `.ckpt`, `.bin`, `.pt` or `.pth` file; those of its `state_dict`, where there is one.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If torch is missing or too old; if the file is damaged, holds no tensors, or asks for anything
            but tensors.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no weights file `{path}`.")
    state = _load(path)
    for name in ("state_dict", "module", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            steps = state.get("global_step")
            state = {**state[name], **({"global_step": steps} if type(steps) is int else {})}
    if not isinstance(state, Mapping):
        raise CheckpointError(f"`{path}` must hold named tensors. Received: {type(state).__name__}")
    tensors = {}
    for name, value in state.items():
        if isinstance(name, str) and (stored := _stored(name, value, path)) is not None:
            tensors[name] = stored
    if not tensors:
        raise CheckpointError(f"`{path}` must hold named tensors. Received: none.")
    return tensors


def open_weights_or_pickle(directory: Path, stem: str, variant: str | None) -> dict[str, StoredTensor]:
    """As `open_weights`, and from a component's `.bin` file where it has no safetensors.

    Raises:
        FileNotFoundError, CheckpointError: As `open_weights` and `open_pickle`.
    """
    middle = f".{variant}" if variant else ""
    stem_of_pickles = "pytorch_model" if stem == "model" else stem  # transformers'
    path = directory / f"{stem_of_pickles}{middle}.bin"
    if path.is_file() and not any(directory.glob("*.safetensors*")):
        return open_pickle(path)
    return open_weights(directory, stem, variant)


def is_pickle(path: Path) -> bool:
    """Whether a file is what `open_pickle` is for, by its name or by its first bytes."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        return True
    with path.open("rb") as file:
        start = file.read(8)
    return start[:4] == b"PK\x03\x04" and start[4:] != bytes(4)


def _load(path: Path) -> Any:
    try:
        import torch  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise CheckpointError(
            f"A pickle is read through torch, which is missing: `pip install latentdiff[convert]`. Received: `{path}`."
        ) from error
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < TORCH:
        raise CheckpointError(
            f"torch must be at least {'.'.join(map(str, TORCH))}, for pickles that older ones do not keep from running."
            f" Received: torch {torch.__version__}."
        )
    try:
        with torch.serialization.safe_globals([(_NamedOnly, _LIGHTNING)]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # whatever a damaged file leads to: its readers raise a dozen kinds
        first = " ".join(str(error).split())
        raise CheckpointError(f"`{path}` must hold tensors and nothing else. Received: {first:.300}") from error


def _stored(name: str, value: Any, path: Path) -> StoredTensor | None:
    """A tensor as those of safetensors files are, a whole number too; None of anything else that training leaves."""
    import torch  # pyright: ignore[reportMissingImports]

    if type(value) is int and -(2**63) <= value < 2**63:
        return StoredTensor(name, "I64", (), path, np.array([value]).view(np.uint8), 0)
    if not isinstance(value, torch.Tensor):
        return None
    tensor: Any = value
    code = _CODES.get(str(tensor.dtype).removeprefix("torch."))
    if code is None or tensor.layout != torch.strided:
        raise CheckpointError(
            f"`{name}` must be a plain tensor. Received: {tensor.dtype}, {tensor.layout} in `{path}`."
        )
    tensor = tensor.detach().contiguous()
    array = tensor.view(torch.int16).numpy() if code == "BF16" else tensor.numpy()
    return StoredTensor(name, code, tuple(tensor.shape), path, array.reshape(-1).view(np.uint8), 0)
