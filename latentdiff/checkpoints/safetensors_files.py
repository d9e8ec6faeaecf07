"""Weights files: safetensors read in place, whole or in shards, and written tensor by tensor; pickles are refused.

A file is eight bytes (the header's length, little-endian), the header (JSON: name -> dtype, shape, offsets) and the
tensors' bytes, one after another without a hole. The header is checked here and not by the `safetensors` package,
whose NumPy reader copies and does not give bfloat16 on every version.

Reference:
    https://huggingface.co/docs/safetensors, section "Format".
"""

from __future__ import annotations

import json
import math
import mmap
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np

from latentdiff.checkpoints.files import PICKLE_SUFFIXES, CheckpointError, parse_json, pickle_message, read_json

HEADER_LIMIT = 100_000_000  # bytes, the format's own bound
_AROUND = 2**16  # bytes; Linux maps the pages around one that is asked for, up to so many
ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "I16": 2,
    "U16": 2,
    "F16": 2,
    "BF16": 2,
    "I32": 4,
    "U32": 4,
    "F32": 4,
    "I64": 8,
    "U64": 8,
    "F64": 8,
    "C64": 8,
}
FLOATS = {"F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16), "F32": np.dtype("<f4"), "F64": np.dtype("<f8")}


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, whose bytes are read when they are asked for.

    Attributes:
        name: Its key.
        code: Its dtype as the format says it: "F32", "BF16", ...
        shape: Its shape in the file.
        file: The file that holds it.
    """

    name: str
    code: str
    shape: tuple[int, ...]
    file: Path
    _content: np.ndarray
    _begin: int

    @property
    def is_float(self) -> bool:
        """Whether the tensor is float16, bfloat16, float32 or float64."""
        return self.code in FLOATS

    @property
    def begin(self) -> int:
        """Where in the file its bytes begin."""
        return self._begin

    @property
    def end(self) -> int:
        """Where in the file its bytes end."""
        return self._begin + math.prod(self.shape) * ITEM_BYTES[self.code]

    def view(self) -> np.ndarray:
        """The tensor as it lies in the file, mapped and read-only, in its own dtype.

        Raises:
            CheckpointError: If the dtype is none of float16, bfloat16, float32, float64.
        """
        if not self.is_float:
            raise CheckpointError(
                f"Weights must be float16, bfloat16, float32 or float64. Received: `{self.name}` is {self.code} in"
                f" `{self.file}`."
            )
        dtype = FLOATS[self.code]
        size = math.prod(self.shape) * dtype.itemsize
        return self._content[self._begin : self._begin + size].view(dtype).reshape(self.shape)

    def release(self) -> None:
        """Gives back the memory that the file's bytes were mapped into; a later look reads them from the file again.

        Without that, a process seems to hold all of a file that it has read through.
        """
        mapped = getattr(self._content.base, "obj", None)
        if isinstance(mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED") and self.end > self.begin:
            begin = max(self.begin - _AROUND, 0) // mmap.PAGESIZE * mmap.PAGESIZE
            mapped.madvise(mmap.MADV_DONTNEED, begin, self.end + _AROUND - begin)

    def integer(self) -> int | None:
        """The number of a tensor that is one I64 or I32; None of any other."""
        if self.code not in ("I64", "I32") or math.prod(self.shape) != 1:
            return None
        content = self._content[self._begin : self._begin + ITEM_BYTES[self.code]]
        return int.from_bytes(content.tobytes(), "little", signed=True)

    def thirds(self) -> tuple[StoredTensor, StoredTensor, StoredTensor]:
        """Its rows in three equal parts, one after the other; how fused projections hold query, key and value."""
        rows = self.shape[0] // 3
        size = rows * math.prod(self.shape[1:]) * ITEM_BYTES[self.code]
        shape = (rows, *self.shape[1:])
        first, second, third = (replace(self, shape=shape, _begin=self._begin + i * size) for i in range(3))
        return first, second, third


WeightsOpener = Callable[[Path, str, str | None], dict[str, StoredTensor]]  # directory, stem, variant -> tensors


def open_file(path: str | os.PathLike) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, by name; the file is mapped, not read.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If the header breaks the format, or does not account for every byte of the file.
    """
    return open_file_with_metadata(path)[0]


def open_file_with_metadata(path: str | os.PathLike) -> tuple[dict[str, StoredTensor], dict[str, str]]:
    """The tensors of `open_file`, and what the header's `__metadata__` says beside them."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no weights file `{path}`.")
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        _refuse_other_formats(path, start, size)
        header_size = int.from_bytes(start, "little")
        if header_size > min(HEADER_LIMIT, size - 8):
            raise CheckpointError(
                f"`{path}` is truncated or no safetensors file: its header must end within the file's {size} bytes."
                f" Received: a header of {header_size} bytes."
            )
        header = file.read(header_size)
        if not header.startswith(b"{"):
            raise CheckpointError(f"`{path}` is no safetensors file: its header must be a JSON object.")
        values = parse_json(header, f"{path} (header)")
        metadata = _check_metadata(values.pop("__metadata__", {}), path)
        layout = _check_header(values, size - 8 - header_size, path)
        content = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    tensors = {
        name: StoredTensor(name, code, shape, path, content, 8 + header_size + begin)
        for name, (code, shape, begin) in layout.items()
    }
    return tensors, metadata


def open_index(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a sharded model, whose index says which file holds which.

    Raises:
        FileNotFoundError: If shards are missing; all of them are named.
        CheckpointError: If the index names a file outside of its directory, or does not agree with the shards.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise CheckpointError(f"`{path}` must have a `weight_map` from tensor names to file names.")
    names = sorted(set(weight_map.values()))
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors", name):
            raise CheckpointError(
                f"A shard must be a plain `*.safetensors` name beside its index. Received: {name!r} in `{path}`."
            )
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(f"`{path}` names shards that are not there: {', '.join(missing)}")
    tensors: dict[str, StoredTensor] = {}
    problems: list[str] = []
    for name in names:
        for key, tensor in open_file(path.parent / name).items():
            if weight_map.get(key) == name:
                tensors[key] = tensor
            else:
                problems.append(f"{key}: in {name}, but the index says {weight_map.get(key, 'nothing')}")
    problems += [f"{key}: not in {name}" for key, name in weight_map.items() if key not in tensors]
    if problems:
        raise CheckpointError(f"`{path}` must agree with its shards. Received:\n  " + "\n  ".join(sorted(problems)))
    return tensors


def find_weights(directory: Path, stem: str, variant: str | None = None) -> Path:
    """The weights file, or the index of the sharded ones, of a component.

    Without a variant the plain file is meant, and where there is none, the only variant that there is.

    Args:
        directory: The component's directory.
        stem: "diffusion_pytorch_model" or "model".
        variant: For example "fp16", for `stem.fp16.safetensors`.

    Raises:
        FileNotFoundError: If there are none; pickled weights are an error that says what to do.
        CheckpointError: If there are several variants and none was asked for.
    """
    if variant is not None and not re.fullmatch(r"[A-Za-z0-9_-]+", variant):
        raise ValueError(f'`variant` must be a plain word such as "fp16". Received: variant={variant!r}')
    middle = f".{variant}" if variant else ""
    for name in (f"{stem}{middle}.safetensors", f"{stem}.safetensors.index{middle}.json"):
        if (directory / name).is_file():
            return directory / name
    pattern = re.compile(
        rf"{re.escape(stem)}(?:\.(?P<single>[A-Za-z0-9_-]+)\.safetensors|\.safetensors\.index\.(?P<sharded>\w+)\.json)"
    )
    matches = [match for name in sorted(os.listdir(directory)) if (match := pattern.fullmatch(name))]
    # The shards of a variant, `stem.fp16-00001-of-00002.safetensors`, are no variant of their own.
    found = {
        match["single"] or match["sharded"]: directory / match.string
        for match in matches
        if not re.search(r"-\d+-of-\d+$", match["single"] or "")
    }
    if variant is None and len(found) == 1:
        return next(iter(found.values()))
    if variant is None and found:
        raise CheckpointError(f"`{directory}` has several variants; ask for one with `variant`: {', '.join(found)}")
    wanted = f"{stem}{middle}.safetensors"
    if found or variant:
        present = ", ".join(found) or "none"
        raise FileNotFoundError(f"`{directory}` must have `{wanted}`. Its variants: {present}")
    pickles = [name for name in sorted(os.listdir(directory)) if name.endswith(PICKLE_SUFFIXES)]
    if pickles:
        raise CheckpointError(pickle_message(f"{', '.join(pickles)} in `{directory}`"))
    raise FileNotFoundError(f"`{directory}` must have `{wanted}`, or shards with an index. There are no weights in it.")


def open_weights(directory: Path, stem: str, variant: str | None = None) -> dict[str, StoredTensor]:
    """The tensors of a component's directory, from one file or from shards; `find_weights` chooses which."""
    path = find_weights(directory, stem, variant)
    return open_index(path) if path.suffix == ".json" else open_file(path)


def write_file(path: Path, layout: Mapping[str, tuple[str, tuple[int, ...]]], arrays: Iterable[np.ndarray]) -> None:
    """Writes one safetensors file, an array at a time, as torch's users expect it.

    Args:
        path: The file.
        layout: Name -> (dtype, shape), in the order of the file; the dtype is one of `FLOATS`.
        arrays: The arrays, in the same order, so laid out.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    begin = 0
    for name, (code, shape) in layout.items():
        end = begin + math.prod(shape) * ITEM_BYTES[code]
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for (name, (code, shape)), array in zip(layout.items(), arrays, strict=True):
            if array.shape != tuple(shape) or array.dtype != FLOATS[code]:
                raise ValueError(f"`{name}` must be {code} {shape}. Received: {array.dtype} {array.shape}")
            file.write(np.ascontiguousarray(array).view(np.uint8).data)
        file.flush()
        os.fsync(file.fileno())


def _refuse_other_formats(path: Path, start: bytes, size: int) -> None:
    if start == b"version ":
        raise CheckpointError(f"`{path}` is a Git LFS pointer and not the weights. Fetch them with `git lfs pull`.")
    is_zip = start[:4] == b"PK\x03\x04" and start[4:] != bytes(4)  # what torch.save writes; no header is that long
    if is_zip or path.name.endswith(PICKLE_SUFFIXES):
        raise CheckpointError(pickle_message(f"`{path}`"))
    if size < 8:
        raise CheckpointError(f"`{path}` is truncated: a safetensors file has at least 8 bytes. Received: {size}")


def _check_metadata(metadata: object, path: Path) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"`{path}`: `__metadata__` must map strings to strings.")
    return metadata


def _check_header(header: dict, content_size: int, path: Path) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """Name -> (dtype, shape, first byte), once they are sound and fill the content without hole or overlap."""
    layout = {name: _check_entry(name, entry, path) for name, entry in header.items()}
    position = 0
    for name, (_, _, begin, end) in sorted(layout.items(), key=lambda item: item[1][2:]):
        if begin != position:
            fault = "overlaps the one before" if begin < position else "leaves a hole before it"
            raise CheckpointError(f"`{path}`: tensors must follow one another. `{name}` {fault}, at byte {begin}.")
        position = end
    if position != content_size:
        raise CheckpointError(
            f"`{path}` is truncated or damaged: its tensors must take all of its {content_size} bytes."
            f" Received: a header for {position} bytes."
        )
    return {name: (code, shape, begin) for name, (code, shape, begin, _) in layout.items()}


def _check_entry(name: str, entry: object, path: Path) -> tuple[str, tuple[int, ...], int, int]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"`{path}`: `{name}` must have dtype, shape and data_offsets. Received: {entry!r:.200}")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in ITEM_BYTES:
        raise CheckpointError(f"`{path}`: `{name}` has a dtype that is not known: {code!r:.50}")
    if not _are_sizes(shape) or len(shape) > 32:
        raise CheckpointError(f"`{path}`: `{name}` must have a shape of whole numbers. Received: {shape!r:.200}")
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"`{path}`: `{name}` must have offsets [begin, end]. Received: {offsets!r:.200}")
    size = math.prod(shape) * ITEM_BYTES[code]
    if offsets[1] - offsets[0] != size:
        raise CheckpointError(
            f"`{path}`: `{name}` must take {size!r:.40} bytes for {code} {shape!r:.200}. Received: offsets {offsets}"
        )
    return code, tuple(shape), offsets[0], offsets[1]


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**48 for value in values)
