"""The table of a data set: where each picture lies, its captions and its size; and what was left out, and why."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np

from latentdiff.data.decode import BrokenPicture, check_picture

NAMED = 10
"""How many broken pictures an error or a warning names."""


class BrokenPicturesError(ValueError):
    """Too many of a data set's pictures cannot be used."""


class BrokenPicturesWarning(UserWarning):
    """Some of a data set's pictures cannot be used and were left out."""


@dataclass(frozen=True, slots=True)
class Found:
    """A picture that a source names, before it is checked.

    Attributes:
        name: for people: a path, or `archive.tar/member`.
        file: path of the file that holds its bytes.
        offset: of its bytes in a file; its number among the records of an ArrayRecord file.
        length: how many bytes; None is the whole file or record.
        captions: none, one or several.
        wrong: why it cannot be used, where that is known already.
    """

    name: str
    file: str
    offset: int = 0
    length: int | None = None
    captions: tuple[str, ...] = ()
    wrong: str | None = None


@dataclass(frozen=True, slots=True)
class Example:
    """A picture that can be decoded, and its captions.

    Attributes:
        name, file, offset, length: as `Found`'s.
        captions: one or several; one of them is "" where captions are not required and none was found.
        height, width: in pixels, upright.
        digest: SHA-256 of the picture's bytes, in hex.
    """

    name: str
    file: str
    offset: int
    length: int | None
    captions: tuple[str, ...]
    height: int
    width: int
    digest: str


@dataclass(frozen=True, slots=True)
class Broken:
    """A picture that was left out.

    Attributes:
        name: as `Found`'s.
        reason: a few words.
    """

    name: str
    reason: str


class Index(Sequence[Example]):
    """The examples of a data set, in the order of their source, and the pictures that were left out.

    Args:
        examples: those that can be used.
        broken: those that cannot.

    Attributes:
        heights, widths: int64 (N,), in pixels.
        digest: SHA-256 over every example's content digest, size and captions, in hex; where the files lie and what
            they are called changes nothing.
    """

    def __init__(self, examples: Iterable[Example], broken: Iterable[Broken] = ()):
        self._examples, self.broken = tuple(examples), tuple(broken)
        self.heights = np.array([example.height for example in self._examples], "int64")
        self.widths = np.array([example.width for example in self._examples], "int64")
        digest = hashlib.sha256()
        for e in self._examples:
            digest.update(json.dumps([e.digest, e.height, e.width, e.captions]).encode() + b"\n")
        self.digest = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, row):
        return self._examples[row]

    def __iter__(self) -> Iterator[Example]:
        return iter(self._examples)

    def select(self, rows: Iterable[int]) -> Index:
        """The index of some rows, in this order: a part of a split."""
        return Index(self._examples[row] for row in rows)


def check_all(
    found: Iterable[Found],
    read: Callable[[Found], bytes],
    known: Callable[[Found], tuple[int, int, str] | None] = lambda found: None,
    *,
    require_captions: bool = True,
    max_broken: float = 0.01,
    threads: int | None = None,
) -> Index:
    """Decodes every picture that a source names and keeps those that can be used.

    A few broken pictures are warned of by name. The work stops, with one error that names the first of them, when there
    are more than `max_broken` of all, or none that can be used. One is always forgiven, so that a small set is not
    refused for it, unless `max_broken` is 0.

    Args:
        found: what the source names.
        read: gives a picture's bytes.
        known: height, width and digest of a picture that need not be decoded again; None of any other.
        require_captions: whether a picture without a caption is broken; otherwise its caption is "".
        max_broken: share in [0, 1].
        threads: that decode; None is one for each processor.

    Raises:
        BrokenPicturesError: too many are broken, or nothing is left.
        ValueError: `max_broken` is not in [0, 1].
    """
    if not 0 <= max_broken <= 1:
        raise ValueError(f"`max_broken` must be in [0, 1]. Received: max_broken={max_broken}.")

    def check(one: Found) -> Example | Broken:
        captions = one.captions if require_captions else one.captions or ("",)
        if one.wrong or not captions:
            return Broken(one.name, one.wrong or "has no caption")
        try:
            measured = known(one) or _measure(read(one))
        except (BrokenPicture, OSError) as error:
            return Broken(one.name, str(error))
        return Example(one.name, one.file, one.offset, one.length, captions, *measured)

    examples, broken = [], []
    waiting = iter(found)
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        while some := list(islice(waiting, 1024)):  # in parts, for `map` would queue a million at once
            for result in pool.map(check, some):
                (examples if isinstance(result, Example) else broken).append(result)
    total = len(examples) + len(broken)
    allowed = max(1, int(max_broken * total)) if max_broken else 0
    if len(broken) > allowed or not examples:
        rule = f"At most {max_broken:.2%} of a data set's pictures may be broken, and one must be whole"
        raise BrokenPicturesError(f"{rule}. Received: {_report(broken, total)}")
    if broken:
        warnings.warn(f"Left out {_report(broken, total)}", BrokenPicturesWarning, stacklevel=3)
    return Index(examples, broken)


def _measure(content: bytes) -> tuple[int, int, str]:
    height, width = check_picture(content)
    return height, width, hashlib.sha256(content).hexdigest()


def _report(broken: list[Broken], total: int) -> str:
    named = "".join(f"\n  {each.name}: {each.reason}" for each in broken[:NAMED])
    more = f"\n  and {len(broken) - NAMED} more" if len(broken) > NAMED else ""
    return f"{len(broken)} broken of {total}{':' if broken else ''}{named}{more}"
