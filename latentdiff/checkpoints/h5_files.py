"""Keras' older HDF5 weights files, as `Model.save_weights("x.h5")` of Keras 2 wrote them, read in place as data.

The root's attribute `layer_names` lists the groups of the layers in the model's order, and a group's `weight_names` its
arrays in the layer's order: a reader goes by position, since names are counted through a session. HDF5 is a large
format whose library has been broken by files; so it is asked for names, shapes and places alone, and only arrays are
taken that lie in the file itself, whole, as they are, each in bytes of its own. They are mapped, and never read
through HDF5: no filter is run, no other file opened, and nothing is larger than the file.

Reference:
    https://support.hdfgroup.org/documentation/hdf5/latest/_f_m_t3.html, "HDF5 File Format Specification".
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np

from latentdiff.checkpoints.files import CheckpointError
from latentdiff.checkpoints.h5_strings import variable_strings
from latentdiff.checkpoints.safetensors_files import FLOATS, StoredTensor

SIGNATURE = b"\x89HDF\r\n\x1a\n"
# What h5py raises where a file breaks the format, by what is broken.
_LIBRARY_ERRORS = (
    OSError,
    KeyError,
    ValueError,
    TypeError,
    RuntimeError,
    AttributeError,
    OverflowError,
    MemoryError,
    struct.error,
)
_CODES = {(dtype.kind, dtype.itemsize): code for code, dtype in FLOATS.items() if code != "BF16"}


@dataclass(frozen=True)
class StoredLayer:
    """A layer in a file.

    Attributes:
        name: Its name in the model that was saved.
        weights: Its arrays, in its order.
    """

    name: str
    weights: tuple[StoredTensor, ...]


def open_layers(path: str | os.PathLike) -> list[StoredLayer]:
    """The layers of a file that have weights, in the model's order; the file is mapped, not read.

    A file of a whole model has its weights in a group; the configuration beside it is not looked at.

    Raises:
        FileNotFoundError: If there is no such file.
        CheckpointError: If it is no HDF5 file, is damaged, or is not as Keras 2 writes weights.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no weights file `{path}`.")
    with path.open("rb") as file:
        if file.read(len(SIGNATURE)) != SIGNATURE:
            raise CheckpointError(f"`{path}` is no HDF5 file: it must begin with {SIGNATURE!r}.")
        content = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    try:
        with h5py.File(path, "r") as file:
            layers = _Reader(file, path, content).layers()
    except CheckpointError:
        raise
    except _LIBRARY_ERRORS as error:
        raise CheckpointError(f"`{path}` is damaged: HDF5 cannot read it. Received: {error}") from error
    _check_apart([weight for layer in layers for weight in layer.weights], path)
    return layers


class _Reader:
    """One open file."""

    def __init__(self, file: h5py.File, path: Path, content: np.ndarray):
        self.file, self.path, self.content = file, path, content

    def layers(self) -> list[StoredLayer]:
        root = self.file
        if root.userblock_size:
            raise self._error(f"must not begin with a user block. Received: {root.userblock_size} bytes")
        if "layer_names" not in root.attrs and "layer_names0" not in root.attrs:
            if "layers" in root or "_layer_checkpoint_dependencies" in root:
                raise self._error(
                    "must have `layer_names`, as Keras 2 writes them. This is a `.weights.h5` of Keras 3: load it in"
                    " KerasCV, and write it with keras.src.legacy.saving.legacy_h5_format.save_weights_to_hdf5_group"
                )
            root = self._child(root, "model_weights", h5py.Group)
        layers = []
        for name in self._names(root, "layer_names"):
            group = self._child(root, name, h5py.Group)
            weights = tuple(self._tensor(group, name, weight) for weight in self._names(group, "weight_names"))
            if weights:
                layers.append(StoredLayer(name, weights))
        return layers

    def _names(self, group: h5py.Group, attribute: str) -> list[str]:
        """The strings of an attribute, which Keras cuts into `name0`, `name1`, ... where it would pass 64 kB."""
        if attribute in group.attrs:
            return self._strings(group, attribute)
        names: list[str] = []
        for i in range(len(group.attrs)):
            if f"{attribute}{i}" not in group.attrs:
                break
            names += self._strings(group, f"{attribute}{i}")
        if not names:
            raise self._error(f"must have `{attribute}` in `{group.name}`")
        return names

    def _strings(self, group: h5py.Group, attribute: str) -> list[str]:
        stored = group.attrs.get_id(attribute)
        string = h5py.check_string_dtype(stored.dtype)
        if len(stored.shape) != 1 or not (string or stored.shape[0] == 0):
            raise self._error(f"`{attribute}` in `{group.name}` must be a list of strings. Received: {stored.dtype}")
        count = stored.shape[0]
        if count == 0:
            return []
        if stored.get_storage_size() > len(self.content):
            raise self._error(f"`{attribute}` in `{group.name}` must lie within it. Received: {count} strings")
        if string.length is None:
            address = h5py.h5o.get_info(group.id).addr
            names = variable_strings(self.content.data, address, attribute, count)
        else:
            names = [bytes(name).decode("utf-8") for name in group.attrs[attribute]]
        if len(set(names)) < len(names):
            raise self._error(f"`{attribute}` in `{group.name}` must name each once. Received: {names!r:.200}")
        return names

    def _child(self, group: h5py.Group, name: str, kind: type) -> h5py.Group | h5py.Dataset:
        """What a name stands for below a group, reached through links within the file alone."""
        parts = name.split("/")
        for i, part in enumerate(parts):
            if part in ("", ".", ".."):
                raise self._error(f"must have plain names. Received: {name!r:.200}")
            if not isinstance(group, h5py.Group) or part not in group:
                raise self._error(f"lacks `{name}`")
            link = group.get(part, getlink=True)
            if not isinstance(link, h5py.HardLink):
                raise self._error(f"must hold its weights itself. Received: {type(link).__name__} at `{name}`")
            child = group[part]
            if not isinstance(child, kind if i == len(parts) - 1 else h5py.Group):
                raise self._error(f"must have a {kind.__name__.lower()} at `{name}`. Received: {type(child).__name__}")
            group = child
        return group

    def _tensor(self, group: h5py.Group, layer: str, name: str) -> StoredTensor:
        dataset = self._child(group, name, h5py.Dataset)
        full = f"{layer}/{name}"
        dtype, shape = dataset.dtype, dataset.shape
        if dataset.is_virtual or dataset.external:
            raise self._error(f"must hold its weights itself. Received: an array of other files, `{full}`")
        code = None if dtype.byteorder == ">" else _CODES.get((dtype.kind, dtype.itemsize))
        if code is None or dtype.hasobject or dtype.subdtype:
            raise self._error(f"must be float16, float32 or float64, little-endian. Received: {dtype} at `{full}`")
        plist = dataset.id.get_create_plist()
        if plist.get_layout() != h5py.h5d.CONTIGUOUS or plist.get_nfilters():
            raise self._error(
                f"must hold its arrays contiguous and uncompressed. Received: `{full}`, chunked or packed"
            )
        size, begin = math.prod(shape) * dtype.itemsize, dataset.id.get_offset()
        if begin is None or dataset.id.get_storage_size() != size or begin + size > len(self.content):
            raise self._error(f"is truncated or damaged: `{full}` {shape} must lie within it, {size} bytes")
        return StoredTensor(full, code, shape, self.path, self.content, begin)

    def _error(self, rule: str) -> CheckpointError:
        return CheckpointError(f"`{self.path}` {rule}.")


def _check_apart(tensors: list[StoredTensor], path: Path) -> None:
    """Refuses arrays that share bytes, whose sum would pass the file's size."""
    end, before = 0, ""
    for tensor in sorted(tensors, key=lambda tensor: tensor.begin):
        if tensor.begin < end:
            raise CheckpointError(f"`{path}`: arrays must lie apart. Received: `{tensor.name}` and `{before}`.")
        end, before = tensor.end, tensor.name
