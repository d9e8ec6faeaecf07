"""Which captions name a side, so that their pictures must not be mirrored."""

import re
from collections.abc import Collection

SIDE_WORDS = frozenset(
    "left right leftward rightward leftwards rightwards lefthand righthand leftmost rightmost east west eastward "
    "westward clockwise counterclockwise anticlockwise text letter letters word words writing written number numbers "
    "digit digits alphabet logo sign flag map clock".split()
)
"""Words of sides, and of what looks wrong in a mirror: writing, dials, maps, flags."""

_WORD = re.compile(r"[^\W_]+")


def names_side(caption: str, side_words: Collection[str] = SIDE_WORDS) -> bool:
    """Whether a caption contains one of these words, whatever its case; `left-facing` contains `left`.

    Args:
        caption: any text.
        side_words: in lower case.
    """
    return any(word in side_words for word in _WORD.findall(caption.casefold()))
