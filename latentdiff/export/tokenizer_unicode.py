"""What the tokenizer's engine makes of each code point, as tables.

    kind(c): white space, letter, number or other        lower(c): one or two code points
    NFC = compose(reorder(decompose(text)))              Unicode Standard Annex 15, sections 1.2 and 1.3

The engine is asked, code point by code point, rather than a standard: its parts know different versions of Unicode,
and Python's `unicodedata` knows another one.
"""

import functools
from dataclasses import dataclass

import numpy as np

__all__ = [
    "ADDED",
    "CODES",
    "LETTER",
    "MARKS",
    "NUMBER",
    "OTHER",
    "SPACE",
    "UnicodeTables",
    "byte_characters",
    "normalized",
    "unicode_tables",
]

CODES = 0x110000  # Unicode's code points; what lies above marks places in a sequence of them
MARKS = 256
SPACE, LETTER, NUMBER, OTHER, ADDED = range(5)

# Planes 4 to 13 are unassigned and 15 and 16 for private use, in every version: no letters, and nothing to normalize.
_PLANES = (0, 1, 2, 3, 14)
# The lowest and the highest class of a combining mark; classes never change once they are given.
_LOWEST_MARK, _HIGHEST_MARK = "\u0334", "\u0345"


@dataclass(frozen=True)
class UnicodeTables:
    """What the engine makes of each code point; the arrays are read-only.

    Args:
        kind: uint8 (CODES,), `SPACE`, `LETTER`, `NUMBER` or `OTHER`: how words are split.
        lower: int32 (CODES, 2), the lower case; the second is -1 but where there are two.
        decomposed: Code points to their canonical decomposition, of those that have one.
        combining: uint8 (CODES,), 0 for a starter; else larger where the canonical combining class is larger.
        composed: Two code points to the one that they compose to.
        unstable: bool (CODES,), whether NFC changes the code point when it stands alone.
    """

    kind: np.ndarray
    lower: np.ndarray
    decomposed: dict[int, tuple[int, ...]]
    combining: np.ndarray
    composed: dict[tuple[int, int], int]
    unstable: np.ndarray


@functools.cache
def unicode_tables() -> UnicodeTables:
    """The tables of the engine that is installed; takes seconds, once."""
    from tokenizers import normalizers

    codes = [c for plane in _PLANES for c in range(plane << 16, (plane + 1) << 16) if not 0xD800 <= c < 0xE000]
    everything = "".join(map(chr, codes))
    kind = np.full(CODES, OTHER, "uint8")
    for value, pattern in ((SPACE, r"\s"), (LETTER, r"\p{L}"), (NUMBER, r"\p{N}")):
        kind[_matching(pattern, everything)] = value

    characters = list(everything.replace("\n", ""))
    lower = np.stack([np.arange(CODES), np.full(CODES, -1)], axis=1).astype("int32")
    for character, text in _changes(normalizers.Lowercase(), characters):
        if len(text) > 2:
            raise NotImplementedError(
                f"A lower case must have one or two characters. Received: {character!r}, {text!r}"
            )
        lower[ord(character), : len(text)] = list(map(ord, text))

    nfd, nfc = normalizers.NFD(), normalizers.NFC()
    apart = dict(_changes(nfd, characters))
    decomposed = {ord(character): tuple(map(ord, text)) for character, text in apart.items()}
    unstable = np.zeros(CODES, bool)
    for character, _ in _changes(nfc, characters):
        unstable[ord(character)] = True
    composites = {character: text for character, text in apart.items() if not unstable[ord(character)]}
    # a composite is the pair of its decomposition's last character and what comes before it, composed
    firsts = _each(nfc, [text[:-1] for text in composites.values()])
    composed = {
        (ord(first), ord(text[-1])): ord(character)
        for (character, text), first in zip(composites.items(), firsts, strict=True)
    }
    for table in (kind, lower, unstable):
        table.flags.writeable = False
    return UnicodeTables(kind, lower, decomposed, _combining(everything), composed, unstable)


def normalized(text: str) -> str:
    """NFC and lower case of a text without white space."""
    from tokenizers import normalizers

    return normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()]).normalize_str(text)


def byte_characters() -> dict[int, str]:
    """The character that stands for each byte in tokens, of the bytes that UTF-8 has."""
    from tokenizers import pre_tokenizers

    every_lead = [*range(0x800), *range(0x800, 0xD800, 0x400), 0xE000, 0xF000, *range(1 << 16, CODES, 1 << 16)]
    text = "".join(map(chr, every_lead))
    written = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return dict(zip(text.encode(), "".join(piece for piece, _ in written), strict=True))


def _matching(pattern: str, text: str) -> list[int]:
    """The code points of a text's characters that a pattern of one character matches."""
    import tokenizers

    mark = "\U0010ffff"
    replaced = tokenizers.normalizers.Replace(tokenizers.Regex(pattern), mark).normalize_str(text)
    old, new = (np.frombuffer(each.encode("utf-32-le"), "<u4") for each in (text, replaced))
    return old[new == ord(mark)].tolist()


def _each(normalizer, texts: list[str]) -> list[str]:
    """The normal form of every text for itself: a line feed is a starter, and composes with nothing."""
    return normalizer.normalize_str("\n".join(texts)).split("\n")


def _changes(normalizer, texts: list[str]) -> list[tuple[str, str]]:
    return [pair for pair in zip(texts, _each(normalizer, texts), strict=True) if pair[0] != pair[1]]


def _combining(everything: str) -> np.ndarray:
    """Combining classes, numbered from 1 in their order, from what is moved past what."""
    from tokenizers import normalizers

    nfd = normalizers.NFD()
    marks = [chr(c) for c in _matching(r"\p{M}", everything)]
    marks = [mark for mark, apart in zip(marks, _each(nfd, marks), strict=True) if mark == apart]
    before = _each(nfd, [_HIGHEST_MARK + mark for mark in marks])
    behind = _each(nfd, [mark + _LOWEST_MARK for mark in marks])
    moved = [
        mark
        for mark, first, second in zip(marks, before, behind, strict=True)
        if first[0] != _HIGHEST_MARK or second[0] == _LOWEST_MARK != mark
    ]
    # sorting is stable, so two marks of one class, and they alone, change places with the order they come in
    order = nfd.normalize_str("".join(moved))
    place = {mark: i for i, mark in enumerate(nfd.normalize_str("".join(reversed(moved))))}
    combining = np.zeros(CODES, "uint8")
    number = 1
    for left, right in zip(order, [*order[1:], None], strict=True):
        combining[ord(left)] = number
        if right is not None and place[left] < place[right]:
            number += 1
    combining.flags.writeable = False
    return combining
