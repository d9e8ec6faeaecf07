"""Trains the vocabulary of the emoji model: CLIP's byte-level byte-pair encoding on CLDR's words and ordinary English.

usage: python scripts/emoji/vocabulary.py [--data data/emoji] [--output data/emoji/tokenizer] [--size 4096]

The pipeline is CLIP's: lower case, its regular expression, bytes as printable characters, "</w>" at a word's end. The
layout of vocab.json too: 256 bytes, 256 bytes that end a word, the merges in order, and the two special tokens last. So
every string has tokens, and transformers' CLIPTokenizer opens the directory (vocab.json + merges.txt).
Encoding: Sennrich et al. 2016, arXiv:1508.07909; on bytes: Radford et al. 2019 (GPT-2); in CLIP: Radford et al. 2021,
arXiv:2103.00020, section 2.4.
"""

import argparse
import collections
import itertools
import json
import pathlib
from collections.abc import Iterable, Mapping

import fetch
from records import Record, read_index
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from latentdiff.models.tokenizer import CLIPTokenizer

END_OF_WORD = "</w>"
CONTEXT_LENGTH = 32
START, END = "<|startoftext|>", "<|endoftext|>"
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

TIER_WEIGHTS = {10: 40, 20: 15, 35: 3, 40: 1, 50: 1}  # SCOWL tiers: 10 holds the most frequent words
NAME_WEIGHT, KEYWORD_WEIGHT, FRAME_WEIGHT = 400, 100, 10_000  # three of four words of names become one token
FRAME_WORDS = "a an the of in with and emoji style noto twemoji fluent"


def byte_characters() -> list[str]:
    """The 256 printable characters that stand for the bytes, in the order of CLIP's vocabulary.

    Printable Latin-1 stands for itself and comes first; the other bytes, in order, take the characters from 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def word_counts(records: Iterable[Record], tiers: Mapping[int, Iterable[str]]) -> collections.Counter:
    """How much each text weighs in training the vocabulary.

    Args:
        records: the pictures; each emoji's name and keywords count once, whatever its number of hands and skin tones.
        tiers: SCOWL tier -> its words.

    Returns:
        Text -> weight. Texts may hold several words.
    """
    counts = collections.Counter({FRAME_WORDS: FRAME_WEIGHT})
    names = {r.name for r in records} | {alias for r in records for alias in r.aliases}
    parts = {part for name in names for part in name.replace(", ", ": ").split(": ")}
    counts.update(dict.fromkeys(parts, NAME_WEIGHT))
    counts.update(dict.fromkeys({k for r in records for k in r.keywords}, KEYWORD_WEIGHT))
    for tier, words in tiers.items():
        counts.update(dict.fromkeys(words, TIER_WEIGHTS[tier]))
    return counts


def train(counts: Mapping[str, int], size: int = 4096) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Trains the encoding.

    Args:
        counts: text -> weight.
        size: number of tokens, the 512 of bytes and the two special ones included.

    Returns:
        The vocabulary, token -> id, and the merges in order. The same for the same arguments.

    Raises:
        ValueError: `size` leaves no room for merges, or the texts do not yield that many.
    """
    alphabet = byte_characters()
    wanted = size - 2 * len(alphabet) - 2
    if wanted < 1:
        raise ValueError(f"`size` must exceed 514, the bytes and the special tokens. Received: size={size}.")
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=alphabet,
        # The trainer numbers word ends as it meets them, in a hash map's order, and breaks ties by number; as special
        # tokens they are numbered beforehand, so that training is reproducible.
        special_tokens=[START, END, *(c + END_OF_WORD for c in alphabet)],
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    texts = (itertools.repeat(text, count) for text, count in sorted(counts.items()))
    tokenizer.train_from_iterator(itertools.chain.from_iterable(texts), trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
    if len(merges) != wanted:
        raise ValueError(f"The texts must yield {wanted} merges. Received: {len(merges)}.")
    tokens = [*alphabet, *(c + END_OF_WORD for c in alphabet), *("".join(pair) for pair in merges), START, END]
    return {token: i for i, token in enumerate(tokens)}, merges


def read_tiers(data: pathlib.Path) -> dict[int, set[str]]:
    """The word list's tiers, words common to all English and those of American and British spelling together.

    Args:
        data: the recipe's data directory, fetched.

    Returns:
        SCOWL tier -> its words.
    """
    directory = fetch.package_directory(fetch.WORDS, data)
    tiers: dict[int, set[str]] = collections.defaultdict(set)
    for member in fetch.WORDS.members:
        stem, _, tier = pathlib.PurePath(member).stem.rpartition("-")
        if stem.endswith("-words"):
            tiers[int(tier)].update(json.loads((directory / member).read_text(encoding="utf-8")))
    return tiers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, default=pathlib.Path("data/emoji"))
    parser.add_argument("--output", type=pathlib.Path)
    parser.add_argument("--size", type=int, default=4096)
    arguments = parser.parse_args()
    output = arguments.output or arguments.data / "tokenizer"
    counts = word_counts(read_index(arguments.data / "index.jsonl"), read_tiers(arguments.data))
    vocabulary, merges = train(counts, arguments.size)
    CLIPTokenizer(vocabulary, merges, context_length=CONTEXT_LENGTH).save(output)
    print(f"{output}: {len(vocabulary)} tokens, {len(merges)} merges from {len(counts)} texts")


if __name__ == "__main__":
    main()
