"""WebDataset tars -> the pictures and captions that they hold, by offset, nothing extracted.

Members of the same name up to the first dot of its last part are one example: a picture, and its caption in `.txt`, or
in `.json` as `caption` or `text`. Aizman, Maltby and Breuel 2019, "High Performance I/O For Large Scale Deep Learning",
arXiv:2001.01858.
"""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

from latentdiff.data.decode import SUFFIXES
from latentdiff.data.examples import Found
from latentdiff.data.folders import captions_of

MAX_CAPTION = 2**20
"""The most bytes of a caption's member that are read."""


def find_in_tar(path: Path) -> Iterator[Found]:
    """What an uncompressed tar holds, in its order; offsets are those of the members' bytes in the file.

    A tar that is cut off, or is none, gives what can be read of it and then names itself as broken.

    Args:
        path: of the tar.
    """
    examples: dict[str, dict[str, tarfile.TarInfo]] = {}
    captions: dict[str, tuple[str, ...]] = {}
    wrong = None
    try:
        with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                suffix = f".{suffix.lower()}"
                if not member.isreg() or member.issparse() or not stem:
                    continue
                key = f"{folder}/{stem}" if folder else stem
                if suffix in SUFFIXES:
                    examples.setdefault(key, {}).setdefault(suffix, member)
                elif suffix in (".txt", ".json") and member.size <= MAX_CAPTION:
                    content = archive.extractfile(member)
                    text = _captions(suffix, content.read() if content else b"")
                    captions[key] = text if suffix == ".txt" else captions.get(key) or text
            # `tarfile` takes a header that is damaged or cut off for the end.
            file.seek(archive.offset)
            if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                wrong = "is damaged or cut off behind its last whole member"
    except (tarfile.TarError, OSError, EOFError) as error:
        wrong = f"cannot be read as an uncompressed tar to its end: {error}"
    for key, pictures in examples.items():
        for member in list(pictures.values())[:1]:
            name = f"{path.name}/{member.name}"
            yield Found(name, str(path), member.offset_data, member.size, captions.get(key, ()))
    if wrong:
        yield Found(path.name, str(path), wrong=wrong)


def _captions(suffix: str, content: bytes) -> tuple[str, ...]:
    text = content.decode("utf-8", errors="replace")
    if suffix == ".txt":
        return captions_of(text)
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return ()
    return captions_of(fields.get("caption") or fields.get("text")) if isinstance(fields, dict) else ()
