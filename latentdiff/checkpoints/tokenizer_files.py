"""The files of a CLIP tokenizer's directory, read as untrusted data, checked, and written.

A directory holds `vocab.json` with `merges.txt` (Radford et al. 2021, arXiv:2103.00020, section 2.4), or
`tokenizer.json`, which carries both; `tokenizer_config.json`, `special_tokens_map.json` and `added_tokens.json` say
which tokens are special. Only the vocabulary, the merges, the special tokens and the context length are taken from
them: rules that a file brings for splitting or normalizing text are ignored, since CLIP's are fixed.
"""

import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SIZE_LIMIT = 64 * 2**20  # bytes of one file; CLIP's own largest has 3.6 MB
CONTEXT_LENGTH_LIMIT = 2**16
START_TOKEN = "<|startoftext|>"
END_TOKEN = "<|endoftext|>"

# The order in which transformers registers them: where two disagree about one token's flags, the later one holds.
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_SURROGATE = re.compile("[\ud800-\udfff]")
_UNLIMITED = 10**20  # transformers writes int(1e30) for "no model_max_length"


@dataclass(frozen=True)
class AddedToken:
    """How a token that is looked for in the prompt's text, before words and byte pairs are, is matched.

    Args:
        normalized: Match in the lower-case, normalized text, so that `<|EndOfText|>` matches too; else as typed.
        single_word: Match only where no letter, digit or underscore touches it.
        lstrip: Swallow the white space on its left.
        rstrip: Swallow the white space on its right.
        special: Whether foreign programs leave the token out when they decode.
    """

    normalized: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    special: bool = True


def read_tokenizer(path: str | os.PathLike) -> dict[str, Any]:
    """What a directory says of its tokenizer, as the keyword arguments of `CLIPTokenizer`.

    Args:
        path: The tokenizer's directory, or a pipeline's with `tokenizer/` in it. Where `tokenizer.json` and
            `vocab.json` are both there, `tokenizer.json` counts, as it does in transformers.

    Returns:
        `vocabulary`, `merges`, `context_length`, `start_token`, `end_token`, `unknown_token`, `pad_token`,
        `added_tokens`.

    Raises:
        FileNotFoundError: The directory, or the files of a vocabulary in it, are missing.
        ValueError: A file is malformed; the message names the file and the rule.
    """
    directory = _find_directory(Path(path))
    config = _read_object(directory / "tokenizer_config.json", missing={})
    special_map = _read_object(directory / "special_tokens_map.json", missing={})
    whole_file = directory / "tokenizer.json"
    if whole_file.is_file():
        whole = _read_object(whole_file)
        model = whole.get("model")
        if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
            raise ValueError(f"{whole_file}: `model` must be of type 'BPE'. Received: {_short(model)}")
        vocabulary = check_vocabulary(model.get("vocab"), f"{whole_file}: `model.vocab`")
        merges = [
            tuple(merge.split(" ")) if isinstance(merge, str) else merge
            for merge in _list(model.get("merges"), f"{whole_file}: `model.merges`")
        ]
        merges = check_merges(merges, vocabulary, f"{whole_file}: `model.merges`")
        whole_added = _list(whole.get("added_tokens", []), f"{whole_file}: `added_tokens`")
    else:
        vocabulary = check_vocabulary(_read_object(directory / "vocab.json"), f"{directory / 'vocab.json'}: the object")
        merges = _read_merges(directory / "merges.txt", vocabulary)
        whole_added = []

    stated = {}  # content -> (flags, id), in the order of the ids
    config_file = directory / "tokenizer_config.json"
    if "added_tokens_decoder" in config:  # written by transformers 4.34 to 4.57; it settles the special tokens alone
        decoder = config["added_tokens_decoder"]
        if not isinstance(decoder, dict):
            raise ValueError(f"{config_file}: `added_tokens_decoder` must be an object. Received: {_short(decoder)}")
        for token_id, value in decoder.items():
            content, flags = _added_token(value, config_file)
            stated[content] = (flags, int(token_id) if token_id.isdecimal() and len(token_id) < 10 else token_id)
        settings = config
    else:
        settings = {**config, **special_map}
        named = {_added_token(settings[key], directory)[0] for key in _NAMED_TOKENS if settings.get(key) is not None}
        for content, token_id in _read_object(directory / "added_tokens.json", missing={}).items():
            special = content in named
            stated[content] = (AddedToken(normalized=not special, special=special), token_id)
        for value in whole_added:
            content, flags = _added_token(value, whole_file)
            stated[content] = (flags, value.get("id") if isinstance(value, dict) else None)
    added = _number_added_tokens(stated, vocabulary, directory)

    special = {key: settings[key] for key in _NAMED_TOKENS if settings.get(key) is not None}
    names = {key: _added_token(value, directory)[0] for key, value in special.items()}
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    extra = extra if isinstance(extra, dict) else dict(enumerate(_list(extra, f"{directory}: extra special tokens")))
    for key, value in [*special.items(), *extra.items()]:
        content, flags = _added_token(value, directory)
        if content in stated:
            continue
        if content not in vocabulary:
            rule = "special tokens must be in the vocabulary, or be added tokens with an id"
            raise ValueError(f"{directory}: {rule}. Received: {key}={_short(content)}")
        added[content] = flags
    for side in ("padding_side", "truncation_side"):
        if config.get(side, "right") != "right":
            raise ValueError(f"{config_file}: `{side}` must be 'right', CLIP's. Received: {_short(config[side])}")
    return {
        "vocabulary": vocabulary,
        "merges": merges,
        "context_length": _context_length(config, config_file),
        "start_token": names.get("bos_token", START_TOKEN),
        "end_token": names.get("eos_token", END_TOKEN),
        "unknown_token": names.get("unk_token", END_TOKEN),
        "pad_token": names.get("pad_token", END_TOKEN),
        "added_tokens": added,
    }


def write_tokenizer(path: str | os.PathLike, arguments: dict[str, Any], token_ids: dict[str, int], whole: str) -> None:
    """Writes the five files that diffusers and transformers, of either age, open to the same tokens.

    Args:
        path: The directory, made if it is missing.
        arguments: The keyword arguments of `CLIPTokenizer`, as `read_tokenizer` returns them.
        token_ids: The id of every added token.
        whole: The engine's own serialization, which becomes `tokenizer.json`.
    """
    directory = Path(path)
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary = dict(sorted(arguments["vocabulary"].items(), key=lambda item: item[1]))
    merges = [f"{left} {right}" for left, right in arguments["merges"]]

    added = {content: {"content": content, **asdict(flags)} for content, flags in arguments["added_tokens"].items()}
    named = {
        "bos_token": arguments["start_token"],
        "eos_token": arguments["end_token"],
        "unk_token": arguments["unknown_token"],
        "pad_token": arguments["pad_token"],
    }
    unnamed = [content for content in added if content not in named.values() and added[content]["special"]]
    special_map: dict[str, Any] = {
        key: {k: v for k, v in added[content].items() if k != "special"} for key, content in named.items()
    }
    if unnamed:
        special_map["additional_special_tokens"] = unnamed
    config = {
        "add_prefix_space": False,
        "added_tokens_decoder": {
            str(token_ids[content]): added[content] for content in sorted(added, key=token_ids.__getitem__)
        },
        **named,
        "clean_up_tokenization_spaces": False,  # True makes transformers 5 warn when it decodes
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": arguments["context_length"],
        "tokenizer_class": "CLIPTokenizer",
    }
    if unnamed:
        config["additional_special_tokens"] = unnamed
    tokenizer = json.loads(whole)
    tokenizer["model"]["merges"] = merges  # as strings: `tokenizers` before 0.20 reads no pairs

    _write(directory / "vocab.json", json.dumps(vocabulary, ensure_ascii=False) + "\n")
    _write(directory / "merges.txt", "\n".join(["#version: 0.2", *merges]) + "\n")
    _write(directory / "tokenizer.json", json.dumps(tokenizer, ensure_ascii=False, indent=2) + "\n")
    _write(directory / "tokenizer_config.json", json.dumps(config, ensure_ascii=False, indent=2) + "\n")
    _write(directory / "special_tokens_map.json", json.dumps(special_map, ensure_ascii=False, indent=2) + "\n")
    new_tokens = {content: token_ids[content] for content in added if content not in vocabulary}
    if new_tokens:
        _write(directory / "added_tokens.json", json.dumps(new_tokens, ensure_ascii=False, indent=2) + "\n")
    else:
        (directory / "added_tokens.json").unlink(missing_ok=True)  # of a tokenizer that was saved here before


def check_vocabulary(vocabulary: Any, source: str) -> dict[str, int]:
    """The vocabulary itself, once it is known to map n tokens to the ids 0 .. n - 1, each used once.

    Args:
        vocabulary: What came.
        source: What to call it in an error.

    Raises:
        ValueError: It is something else.
    """
    if not isinstance(vocabulary, dict) or not vocabulary:
        raise ValueError(f"{source} must map tokens to ids and must not be empty. Received: {_short(vocabulary)}")
    if _is_vocabulary(vocabulary):
        return vocabulary
    token_of = {}
    for token, token_id in vocabulary.items():
        if not isinstance(token, str) or not is_text(token):
            raise ValueError(f"{source} must have tokens of one character or more. Received: {_short(token)}")
        if type(token_id) is not int:
            raise ValueError(f"{source} must map tokens to whole numbers. Received: {_short({token: token_id})}")
        if token_id in token_of:
            pair = f"{_short(token_of[token_id])} and {_short(token)} both have {token_id}"
            raise ValueError(f"{source} must give each token an id of its own. Received: {pair}")
        if not 0 <= token_id < len(vocabulary):
            rule = f"must use the ids 0 to {len(vocabulary) - 1}, as many as it has tokens"
            raise ValueError(f"{source} {rule}. Received: {_short({token: token_id})}")
        token_of[token_id] = token
    return vocabulary


def check_merges(merges: Any, vocabulary: dict[str, int], source: str) -> list[tuple[str, str]]:
    """The merges as pairs, once it is known that both parts and their union are in the vocabulary.

    Args:
        merges: What came.
        vocabulary: The tokens that may be named.
        source: What to call the merges in an error.

    Raises:
        ValueError: They are something else; the message gives the number of the merge, the first being 0.
    """
    if not isinstance(merges, list | tuple):
        raise ValueError(f"{source} must be a list of pairs of tokens. Received: {_short(merges)}")
    if _are_merges(merges, vocabulary):
        return [(left, right) for left, right in merges]
    pairs = []
    for index, merge in enumerate(merges):
        if not (isinstance(merge, list | tuple) and len(merge) == 2 and all(isinstance(part, str) for part in merge)):
            raise ValueError(f"{source} must be pairs of tokens. Received: merge {index} is {_short(merge)}")
        left, right = merge
        for token in (left, right, left + right):
            if token not in vocabulary:
                received = f"merge {index} is {_short((left, right))}, and {_short(token)} is missing"
                raise ValueError(f"{source} must name and make tokens of the vocabulary. Received: {received}")
        pairs.append((left, right))
    return pairs


def _is_vocabulary(vocabulary: dict) -> bool:
    """Whether a vocabulary is beyond doubt; told of all tokens at once, ten times faster than one by one."""
    return (
        set(map(type, vocabulary)) == {str}
        and set(map(type, vocabulary.values())) == {int}
        and set(vocabulary.values()) == set(range(len(vocabulary)))
        and "" not in vocabulary
        and not _SURROGATE.search("".join(vocabulary))
    )


def _are_merges(merges: list | tuple, vocabulary: dict[str, int]) -> bool:
    """Whether merges are beyond doubt, told of all at once."""
    if not (set(map(type, merges)) <= {list, tuple} and set(map(len, merges)) <= {2}):
        return False
    named = [part for merge in merges for part in merge]
    return set(map(type, named)) <= {str} and vocabulary.keys() >= {*named, *map("".join, merges)}


def is_text(token: str) -> bool:
    """Whether a string has a character, and each is one that UTF-8 can hold: a lone surrogate is not."""
    return bool(token) and not _SURROGATE.search(token)


def _find_directory(path: Path) -> Path:
    if not path.is_dir():
        raise FileNotFoundError(f"A tokenizer is read from a directory. Received: {str(path)!r}, which is none.")
    for directory in (path, path / "tokenizer"):
        if (directory / "tokenizer.json").is_file():
            return directory
        if (directory / "vocab.json").is_file():
            if (directory / "merges.txt").is_file():
                return directory
            raise FileNotFoundError(f"`vocab.json` needs `merges.txt` beside it. Received: {str(directory)!r}")
    rule = "A tokenizer's directory must hold `vocab.json` and `merges.txt`, or `tokenizer.json`"
    raise FileNotFoundError(f"{rule}, itself or in `tokenizer/`. Received: {str(path)!r}")


def _read_text(file: Path) -> str:
    with open(file, "rb") as stream:
        content = stream.read(SIZE_LIMIT + 1)
    if len(content) > SIZE_LIMIT:
        raise ValueError(f"{file}: must have at most {SIZE_LIMIT} bytes. Received: more.")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: must be UTF-8. Received: {error}") from None


def _read_object(file: Path, missing: dict | None = None) -> dict[str, Any]:
    if missing is not None and not file.is_file():
        return missing

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        collected = dict(pairs)
        if len(collected) < len(pairs):
            seen = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise ValueError(f"the key {_short(twice)} comes twice in one object")
        return collected

    text = _read_text(file)
    try:
        content = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: must be valid JSON with unique keys. Received: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: must hold one JSON object. Received: {_short(content)}")
    return content


def _read_merges(file: Path, vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    merges = []
    # not splitlines(), which would also cut at characters that a token may hold
    for number, line in enumerate(_read_text(file).split("\n"), start=1):
        line = line.removesuffix("\r")
        if not line or line.startswith("#version"):
            continue
        parts = line.split(" ")
        if len(parts) != 2 or not all(parts):
            rule = "a line must be two tokens with one space between them"
            raise ValueError(f"{file}: {rule}. Received: line {number} is {_short(line)}")
        merges.append((parts[0], parts[1]))
    return check_merges(merges, vocabulary, f"{file}: the merges")


def _added_token(value: Any, file: Path) -> tuple[str, AddedToken]:
    if isinstance(value, str) and is_text(value):
        return value, AddedToken()
    if isinstance(value, dict) and isinstance(value.get("content"), str) and is_text(value["content"]):
        flags = {flag: value[flag] for flag in _FLAGS if flag in value}
        if all(isinstance(flag, bool) for flag in flags.values()):
            return value["content"], AddedToken(**flags)
    rule = "a special token must be a string, or an object with `content` and true or false flags"
    raise ValueError(f"{file}: {rule}. Received: {_short(value)}")


def _number_added_tokens(stated: dict, vocabulary: dict[str, int], directory: Path) -> dict[str, AddedToken]:
    added = {}
    next_id = len(vocabulary)
    for content, (flags, token_id) in sorted(stated.items(), key=lambda item: _sort_key(item[1][1])):
        expected = vocabulary.get(content, next_id)
        if token_id != expected or type(token_id) is not int:
            rule = "added tokens must have the vocabulary's ids, or those that follow it without a gap"
            raise ValueError(f"{directory}: {rule}. Received: {_short({content: token_id})}, expected {expected}")
        next_id += content not in vocabulary
        added[content] = flags
    return added


def _sort_key(token_id: Any) -> int:
    return token_id if type(token_id) is int else -1


def _context_length(config: dict[str, Any], file: Path) -> int:
    length = config.get("model_max_length")
    if length is None or (isinstance(length, int | float) and length >= _UNLIMITED):
        return 77
    if type(length) is not int or not 2 <= length <= CONTEXT_LENGTH_LIMIT:
        rule = f"`model_max_length` must be a whole number from 2 to {CONTEXT_LENGTH_LIMIT}"
        raise ValueError(f"{file}: {rule}. Received: {_short(length)}")
    return length


def _list(value: Any, source: str) -> list:
    if not isinstance(value, list):
        raise ValueError(f"{source} must be a list. Received: {_short(value)}")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _write(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8", newline="\n")
