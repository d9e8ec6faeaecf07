"""ArrayRecord shards of pictures with captions: written here, and read at any place through Grain.

    record = length of the header (4 bytes, little-endian), header (JSON: {"text": [caption, ...]}), the picture's file

ArrayRecord and Grain come with `pip install "latentdiff[data]"`.
"""

import json
import os
import secrets
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from latentdiff.data.examples import Found
from latentdiff.data.folders import captions_of

SUFFIXES = (".array_record", ".arrayrecord")
_MAX_HEADER = 2**20


def write_array_record(path: str | os.PathLike, examples: Iterable[tuple[bytes, str | list[str]]]) -> int:
    """Writes one shard, whole or not at all.

    Args:
        path: of the file, ending in `.array_record`.
        examples: a picture's bytes, as of a PNG, JPEG or WebP file, and its caption or captions.

    Returns:
        How many examples it holds.

    Raises:
        ValueError: `path` ends otherwise.
        TypeError: a caption is no text.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"`path` must end in .array_record. Received: path={str(path)!r}.")
    module = _array_record()
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    count = 0
    try:
        writer = module.ArrayRecordWriter(str(part), "group_size:1")  # each record can be read alone
        try:
            for picture, text in examples:
                captions = [text] if isinstance(text, str) else list(text)
                if not all(isinstance(caption, str) for caption in captions):
                    raise TypeError(f"captions must be text. Received: {captions!r:.200}.")
                header = json.dumps({"text": captions}).encode()
                writer.write(len(header).to_bytes(4, "little") + header + picture)
                count += 1
        finally:
            writer.close()
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return count


def find_in_records(path: Path) -> Iterator[Found]:
    """What a shard holds, in its order; the offset of each is its number.

    Args:
        path: of an ArrayRecord file.
    """
    try:
        count = len(_open(str(path)))
    except Exception as error:  # the reader is C++ and raises what its status says
        yield Found(path.name, str(path), wrong=f"cannot be read as an ArrayRecord: {error}")
        return
    for number in range(count):
        name = f"{path.name}/{number}"
        try:
            header, _ = _split(_open(str(path))[number])
            yield Found(name, str(path), number, captions=captions_of(header.get("text")))
        except Exception as error:
            yield Found(name, str(path), number, wrong=f"cannot be read: {error}")


def read_record(path: str, number: int) -> bytes:
    """A picture's bytes.

    Args:
        path: of an ArrayRecord file.
        number: of the record.
    """
    return _split(_open(path)[number])[1]


def _split(record: bytes) -> tuple[dict[str, Any], bytes]:
    """A record's header and the picture behind it."""
    length = int.from_bytes(record[:4], "little")
    if len(record) < 4 + length or length > _MAX_HEADER:
        raise ValueError("the record's header is longer than it")
    header = json.loads(record[4 : 4 + length])
    if not isinstance(header, dict):
        raise ValueError("the record's header is no JSON object")
    return header, record[4 + length :]


@lru_cache(256)
def _open(path: str):
    from grain.sources import ArrayRecordDataSource

    return ArrayRecordDataSource([path])


def _array_record():
    from array_record.python import array_record_module

    return array_record_module
