"""CLIP's own vocabulary, for checkpoints that come without a tokenizer.

49,408 tokens: the 256 bytes, the same ending a word, 48,894 merges, start and end. Radford et al. 2021, section 2.4,
arXiv:2103.00020. The merges are OpenAI's; `clip_merges.LICENSE` is theirs.
"""

from __future__ import annotations

import gzip
from functools import cache
from importlib import resources
from typing import Any

from latentdiff.checkpoints.tokenizer_files import END_TOKEN, START_TOKEN

CONTEXT_LENGTH = 77


def clip_tokenizer(pad_token: str = END_TOKEN) -> dict[str, Any]:
    """The keyword arguments of CLIP's `CLIPTokenizer`.

    Args:
        pad_token: The end token in Stable Diffusion 1.x, "!" in 2.x.
    """
    vocabulary, merges = clip_vocabulary()
    return {
        "vocabulary": dict(vocabulary),
        "merges": list(merges),
        "context_length": CONTEXT_LENGTH,
        "start_token": START_TOKEN,
        "end_token": END_TOKEN,
        "unknown_token": END_TOKEN,
        "pad_token": pad_token,
        "added_tokens": {},
    }


@cache
def clip_vocabulary() -> tuple[dict[str, int], tuple[tuple[str, str], ...]]:
    """Token -> id, 49,408 of them, and the merges, the first to be merged first."""
    packed = resources.files("latentdiff.checkpoints").joinpath("clip_merges.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").splitlines()
    merges = tuple((left, right) for left, right in (line.split(" ") for line in lines))
    letters = byte_letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(pair) for pair in merges)]
    return {word: index for index, word in enumerate([*words, START_TOKEN, END_TOKEN])}, merges


def byte_letters() -> list[str]:
    """The characters that stand for the 256 bytes, in the vocabulary's order: printable bytes first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]
