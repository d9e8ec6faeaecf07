"""Image folders, tars and ArrayRecord shards -> an index; and from a row of the index back to the picture's bytes."""

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from latentdiff.data import records
from latentdiff.data.examples import Example, Found, Index, check_all
from latentdiff.data.folders import find_in_folder
from latentdiff.data.kept import KeptSizes
from latentdiff.data.records import find_in_records, read_record
from latentdiff.data.tars import find_in_tar

Source = str | os.PathLike


def index_source(
    source: Source | Sequence[Source],
    *,
    require_captions: bool = True,
    max_broken: float = 0.01,
    keep: Source | None = None,
    threads: int | None = None,
) -> Index:
    """The table of a data set, every picture of which has been decoded once.

    Args:
        source: a folder of pictures, a folder of `.tar` or `.array_record` shards, one such file, a pattern of names
            with `*`, or several of these, one after the other.
        require_captions: whether a picture without a caption is broken; otherwise its caption is "".
        max_broken: share of broken pictures above which this stops; see `check_all`.
        keep: a file that keeps what was found out, so that the next call decodes only pictures whose files have another
            size or time of change.
        threads: that decode; None is one for each processor.

    Raises:
        FileNotFoundError: there is no such source.
        BrokenPicturesError: too many pictures are broken, or none is left.
    """
    sources = [source] if isinstance(source, str | os.PathLike) else list(source)
    files = [file for each in sources for file in _files_of(each)]
    found = (one for file in files for one in _find(file))
    limits = {"require_captions": require_captions, "max_broken": max_broken, "threads": threads}
    if keep is None:
        return check_all(found, read_picture, **limits)
    kept = KeptSizes(keep)
    index = check_all(found, read_picture, kept.get, **limits)
    kept.write(index)
    return index


def read_picture(example: Example | Found) -> bytes:
    """The bytes of a picture, read from where it lies.

    Raises:
        OSError: they cannot be read, or the file ends before they do.
    """
    if example.file.endswith(records.SUFFIXES):
        return read_record(example.file, example.offset)
    with open(example.file, "rb") as file:
        file.seek(example.offset)
        content = file.read(-1 if example.length is None else example.length)
    if example.length is not None and len(content) < example.length:
        raise OSError(f"{example.name} is cut off: {len(content)} bytes of {example.length}")
    return content


def _files_of(source: Source) -> list[Path]:
    """The folder of pictures, or the shards in order."""
    path = Path(source)
    if path.is_dir():
        return sorted(file for file in path.iterdir() if _is_shard(file)) or [path]
    if path.is_file():
        return [path]
    matches = sorted(Path(name) for name in glob.glob(str(source)))
    if not matches:
        raise FileNotFoundError(f"`source` must be a folder, a file or a pattern of names. Received: {str(source)!r}.")
    return matches


def _is_shard(path: Path) -> bool:
    return path.name.endswith((".tar", *records.SUFFIXES))


def _find(path: Path) -> Iterator[Found]:
    if path.name.endswith(records.SUFFIXES):
        return find_in_records(path)
    if path.name.endswith(".tar"):
        return find_in_tar(path)
    if path.is_dir():
        return find_in_folder(path)
    raise ValueError(f"a source must be a folder, .tar or .array_record. Received: {str(path)!r}.")
