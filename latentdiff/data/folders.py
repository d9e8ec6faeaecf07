"""Image folders -> the pictures and captions that they name.

Either a `metadata.jsonl` or `metadata.csv` has `file_name` and `text` for each picture, as in Hugging Face's
imagefolder, where `text` may be a list of captions in JSON; or each picture `name.png` has its caption in `name.txt`,
or, where this package drew it, its prompt within.
"""

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from latentdiff.data.decode import SUFFIXES
from latentdiff.data.examples import Found
from latentdiff.pictures import read_settings


def find_in_folder(folder: Path) -> Iterator[Found]:
    """What a folder names, in the order of its metadata, or of the paths below it.

    Args:
        folder: with metadata, or with pictures in it and in folders below.

    Raises:
        ValueError: both kinds of metadata are there, or a table without the two columns.
    """
    tables = [folder / name for name in ("metadata.jsonl", "metadata.csv") if (folder / name).is_file()]
    if len(tables) > 1:
        raise ValueError(
            f"a folder must have one `metadata.jsonl` or `metadata.csv`. Received: both in {str(folder)!r}."
        )
    if tables:
        yield from (_named(folder, place, row) for place, row in _rows(tables[0]))
    else:
        for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()):
            yield _beside(folder, path)


def captions_of(value: object) -> tuple[str, ...]:
    """The captions in a field: a string or a list of them; what is empty or no text counts as none."""
    values = value if isinstance(value, list) else [value]
    return tuple(each.strip() for each in values if isinstance(each, str) and each.strip())


def _rows(table: Path) -> Iterator[tuple[str, object]]:
    """Each row of the metadata, as (where it stands, its fields or what is wrong with it)."""
    with table.open(encoding="utf-8-sig", newline="", errors="replace") as file:
        if table.suffix == ".csv":
            rows = csv.DictReader(file)
            if not {"file_name", "text"} <= set(rows.fieldnames or ()):
                rule = "`metadata.csv` must have the columns `file_name` and `text`"
                raise ValueError(f"{rule}. Received: {rows.fieldnames} in {str(table)!r}.")
            yield from ((f"{table.name}:{rows.line_num}", row) for row in rows)
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError) as error:
                    row = f"is not JSON: {error}"
                yield f"{table.name}:{number}", row


def _named(folder: Path, place: str, row: object) -> Found:
    if not isinstance(row, dict):
        return Found(place, "", wrong=row if isinstance(row, str) else "is no JSON object")
    name = row.get("file_name")
    if not isinstance(name, str) or not name:
        return Found(place, "", wrong="has no `file_name`")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return Found(place, "", wrong=f"names a file outside of the folder: {name!r}")
    return Found(name, str(folder / name), captions=captions_of(row.get("text")))


def _beside(folder: Path, path: Path) -> Found:
    text = path.with_suffix(".txt")
    captions = captions_of(text.read_text("utf-8", errors="replace") if text.is_file() else _prompt_of(path))
    return Found(str(path.relative_to(folder)), str(path), captions=captions)


def _prompt_of(path: Path) -> str | None:
    """What a picture that this package drew was drawn from."""
    try:
        return read_settings(path).prompt
    except (OSError, ValueError):
        return None
