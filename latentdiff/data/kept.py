"""What pictures were found to be when they were last indexed, so that a restart decodes only new and changed ones.

One JSON line a picture: file, offset, length, the file's size and time of change, height, width, SHA-256 of the bytes.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

from latentdiff.data.examples import Example, Found

_HEAD = ["latentdiff", 1]


class KeptSizes:
    """The sizes and digests in a file; none where there is no such file, or another one.

    A picture is taken for the same as long as its file has the same size and time of change, in nanoseconds.

    Args:
        path: of the file.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self._known: dict[tuple, tuple[int, int, str]] = {}
        self._stamp = lru_cache(1024)(_stamp)
        try:
            with self.path.open(encoding="utf-8") as lines:
                if json.loads(next(lines, "0")) == _HEAD:
                    for line in lines:
                        *key, height, width, digest = json.loads(line)
                        self._known[tuple(key)] = (int(height), int(width), str(digest))
        except (OSError, ValueError, TypeError):
            self._known = {}

    def get(self, found: Found) -> tuple[int, int, str] | None:
        """(height, width, digest) of a picture that is as it was; None of any other.

        Raises:
            OSError: its file is not there.
        """
        return self._known.get(self._key(found))

    def write(self, examples: Iterable[Example]) -> None:
        """Keeps these, whole or not at all."""
        part = self.path.with_name(f".{self.path.name}.{secrets.token_hex(4)}.part")
        try:
            with part.open("x", encoding="utf-8") as file:
                file.write(json.dumps(_HEAD) + "\n")
                for example in examples:
                    row = [*self._key(example), example.height, example.width, example.digest]
                    file.write(json.dumps(row) + "\n")
                file.flush()
                os.fsync(file.fileno())
            part.replace(self.path)
        finally:
            part.unlink(missing_ok=True)

    def _key(self, found: Found | Example) -> tuple:
        return (found.file, found.offset, found.length, *self._stamp(found.file))


def _stamp(file: str) -> tuple[int, int]:
    status = os.stat(file)
    return status.st_size, status.st_mtime_ns
