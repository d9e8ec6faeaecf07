"""What is known of one picture: emoji, hand, names, group and its part of the split; and the index file of all.

The split: `held_out` is judge_emoji.held_out's and trains nothing. `validation` is ours, about one in a hundred of the
rest, by another hash. Both are taken only where training shows the emoji in another hand.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping

from judge_emoji import held_out

JOINER, VARIATION = "200d", "fe0f"
SKIN_TONES = frozenset({"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"})
SIGNS = frozenset({"2640", "2642", "27a1"})  # female, male, rightwards arrow: after a joiner they only modify
MAN, WOMAN, PERSON = "1f468", "1f469", "1f9d1"


@dataclasses.dataclass(frozen=True)
class Record:
    """One picture: which emoji in whose hand, what it is called, and which part of the split it belongs to.

    Args:
        style: "noto", "twemoji" or "fluent".
        codepoints: hex code points joined by "-", without fe0f.
        group: code points of the base emoji (see `base_group`), to balance the sampling by.
        name: CLDR's English short name, such as "waving hand: medium skin tone".
        keywords: CLDR's English keywords.
        aliases: other English names, from the `emoji` package, where they differ from the short name.
        held_out: judged, never trained on.
        validation: ours to choose hyperparameters by, never trained on either.
    """

    style: str
    codepoints: str
    group: str
    name: str
    keywords: tuple[str, ...]
    aliases: tuple[str, ...]
    held_out: bool
    validation: bool


def codepoints_of(text: str) -> str:
    """A string's code points in hex, joined by "-", without variation selectors."""
    return "-".join(f"{ord(c):x}" for c in text if f"{ord(c):x}" != VARIATION)


def text_of(codepoints: str) -> str:
    """The string of hex code points joined by "-"."""
    return "".join(chr(int(c, 16)) for c in codepoints.split("-"))


def base_group(codepoints: str) -> str:
    """Code points of the emoji without skin tone, gender sign, direction arrow and fe0f.

    A man, a woman or a person joined to one thing (a rocket, red hair) is one group; couples and families stay apart.

    Args:
        codepoints: hex code points joined by "-".

    Returns:
        The same, reduced: "1f44b-1f3fd" becomes "1f44b", "1f468-200d-1f680" becomes "1f9d1-200d-1f680".
    """
    parts = [c for c in codepoints.split("-") if c not in SKIN_TONES and c != VARIATION]
    first, *others = "-".join(parts).split(f"-{JOINER}-")
    joined = [first, *(other for other in others if other not in SIGNS)]
    if len(joined) == 2 and joined[0] in (MAN, WOMAN) and joined[1] not in (MAN, WOMAN, PERSON):
        joined[0] = PERSON
    return f"-{JOINER}-".join(joined)


def is_validation(codepoints: str, style: str, styles_of: Mapping[str, Iterable[str]]) -> bool:
    """One pair in a hundred of those not held out, fixed by its name; only where training shows the emoji elsewhere.

    Args:
        codepoints: the emoji.
        style: the hand.
        styles_of: codepoints -> the hands that drew it.

    Returns:
        Whether the pair belongs to the validation set. No held-out pair does, and no held-out pair loses to it the
        last drawing of its emoji in training.
    """

    def marked(s: str) -> bool:
        return int.from_bytes(hashlib.sha256(f"validation/{codepoints}/{s}".encode()).digest()[:2]) < 682

    def trained(s: str) -> bool:
        return not held_out(codepoints, s, styles_of) and not marked(s)

    return (
        marked(style)
        and not held_out(codepoints, style, styles_of)
        and any(s != style and trained(s) for s in styles_of[codepoints])
    )


def write_index(path: pathlib.Path, records: Iterable[Record]) -> None:
    """Writes one JSON object a line."""
    lines = (json.dumps(dataclasses.asdict(record), ensure_ascii=False) for record in records)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def read_index(path: pathlib.Path) -> list[Record]:
    """Reads what `write_index` wrote."""
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return [Record(**{**row, "keywords": tuple(row["keywords"]), "aliases": tuple(row["aliases"])}) for row in rows]
