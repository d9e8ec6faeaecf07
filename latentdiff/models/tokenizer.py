"""CLIP's tokenizer: prompt -> tokens, with byte pairs merged inside of words, the most frequent pair first.

    tokens = start, merge(bytes(words(lower(collapse(NFC(prompt)))))), end, pad, pad, ...

Radford et al. 2021, section 2.4, arXiv:2103.00020; Sennrich et al. 2016, algorithm 1, arXiv:1508.07909.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from latentdiff.checkpoints.tokenizer_files import (
    CONTEXT_LENGTH_LIMIT,
    END_TOKEN,
    START_TOKEN,
    AddedToken,
    check_merges,
    check_vocabulary,
    is_text,
    read_tokenizer,
    write_tokenizer,
)

__all__ = ["AddedToken", "CLIPTokenizer", "TruncationWarning"]

_END_OF_WORD = "</w>"
_SPACE = "\u0120"  # stands for the byte 0x20 in the byte-level alphabet
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


class TruncationWarning(UserWarning):
    """A prompt had more tokens than the context holds, and its end was cut off."""


class CLIPTokenizer:
    """The map from prompts to tokens that CLIP's text encoders, and so Stable Diffusion's, were trained with.

    It gives the same tokens as transformers 5's class of that name, on any text. A special token that is spelled
    out in a prompt becomes that token, as there; so with Stable Diffusion 2.x, whose pad token is "!" with the id 0, an
    exclamation mark has the id 0 too.

    Args:
        vocabulary: Tokens to ids, 0 .. n - 1. Tokens are written in the byte-level alphabet, where each of the 256
            bytes is one printable character, and "</w>" ends a word.
        merges: Pairs of tokens, the first to be merged first.
        context_length: S, the tokens of a prompt, start, end and padding included.
        start_token: Precedes each prompt.
        end_token: Ends each prompt, one that is cut off too.
        pad_token: Fills up to `context_length`: the end token in Stable Diffusion 1.x, "!" in 2.x.
        unknown_token: Stands for bytes that the vocabulary lacks; CLIP's own lacks none.
        added_tokens: Further tokens that are matched as they are spelled, and how. Those that the vocabulary lacks
            get the ids that follow it, in their order.

    Attributes:
        vocabulary, merges, context_length, added_tokens: As above; `added_tokens` has the special tokens too.
        vocabulary_size: Ids in use, those of added tokens included: the rows that an embedding needs.
        start_id, end_id, pad_id: The ids of the special tokens.

    Raises:
        ValueError: The ids are not 0 .. n - 1, a merge or a special token is not in the vocabulary, or
            `context_length` is out of range.

    Reference:
        Radford et al. 2021, arXiv:2103.00020, section 2.4.
    """

    def __init__(
        self,
        vocabulary: dict[str, int],
        merges: Sequence[tuple[str, str]],
        *,
        context_length: int = 77,
        start_token: str = START_TOKEN,
        end_token: str = END_TOKEN,
        pad_token: str = END_TOKEN,
        unknown_token: str = END_TOKEN,
        added_tokens: Mapping[str, AddedToken] | None = None,
    ):
        if type(context_length) is not int or not 2 <= context_length <= CONTEXT_LENGTH_LIMIT:
            rule = f"`context_length` must be a whole number from 2 to {CONTEXT_LENGTH_LIMIT}"
            raise ValueError(f"{rule}. Received: context_length={context_length!r}")
        self.vocabulary = dict(check_vocabulary(vocabulary, "`vocabulary`"))
        self.merges = check_merges(merges, self.vocabulary, "`merges`")
        self.context_length = context_length
        self.start_token = start_token
        self.end_token = end_token
        self.pad_token = pad_token
        self.unknown_token = unknown_token

        self.added_tokens = dict(added_tokens or {})
        named = {
            "start_token": start_token,
            "end_token": end_token,
            "unknown_token": unknown_token,
            "pad_token": pad_token,
        }
        for name, token in named.items():
            if token not in self.vocabulary and token not in self.added_tokens:
                raise ValueError(f"`{name}` must be in the vocabulary. Received: {name}={token!r}")
            self.added_tokens.setdefault(token, AddedToken())
        if unknown_token not in self.vocabulary:  # byte pairs know nothing of added tokens
            rule = "`unknown_token` must be in the vocabulary itself, not only an added token"
            raise ValueError(f"{rule}. Received: unknown_token={unknown_token!r}")
        for token in self.added_tokens:
            if not isinstance(token, str) or not is_text(token):
                rule = "`added_tokens` must be text of one character or more"
                raise ValueError(f"{rule}. Received: {token!r}")
        new_tokens = [token for token in self.added_tokens if token not in self.vocabulary]
        ids = self.vocabulary | {token: len(self.vocabulary) + i for i, token in enumerate(new_tokens)}
        self._added_ids = {token: ids[token] for token in self.added_tokens}
        self._token_of = {token_id: token for token, token_id in ids.items()}

        self.vocabulary_size = len(ids)
        self.start_id = self._added_ids[start_token]
        self.end_id = self._added_ids[end_token]
        self.pad_id = self._added_ids[pad_token]
        self._engine = self._make_engine()

    @classmethod
    def from_preset(cls, preset: str | os.PathLike) -> "CLIPTokenizer":
        """The tokenizer of a name in `weights/`, a pipeline's directory or file, or its own directory."""
        from latentdiff.catalogue import resolve_preset
        from latentdiff.checkpoints.sources import open_source

        return cls(**open_source(resolve_preset(preset, ["tokenizer"])).tokenizer())

    @classmethod
    def from_directory(cls, path: str | os.PathLike, *, context_length: int | None = None) -> "CLIPTokenizer":
        """The tokenizer of a directory: `vocab.json` with `merges.txt`, or `tokenizer.json`.

        Args:
            path: The tokenizer's own directory, or a pipeline's with `tokenizer/` in it.
            context_length: S; None takes the directory's `model_max_length`, and 77 where it has none.

        Returns:
            A tokenizer that gives the same tokens as transformers' of that directory.

        Raises:
            FileNotFoundError: The directory, or the files of a vocabulary in it, are missing.
            ValueError: A file is malformed; the message names the file and the rule.
        """
        arguments = read_tokenizer(path)
        if context_length is not None:
            arguments["context_length"] = context_length
        try:
            return cls(**arguments)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None

    def save(self, path: str | os.PathLike) -> None:
        """Writes a directory that diffusers and transformers open, to the same tokens.

        Args:
            path: The directory for `vocab.json`, `merges.txt`, `tokenizer.json`, `tokenizer_config.json` and
                `special_tokens_map.json`; made if it is missing.
        """
        arguments = {
            "vocabulary": self.vocabulary,
            "merges": self.merges,
            "context_length": self.context_length,
            "start_token": self.start_token,
            "end_token": self.end_token,
            "unknown_token": self.unknown_token,
            "pad_token": self.pad_token,
            "added_tokens": self.added_tokens,
        }
        write_tokenizer(path, arguments, self._added_ids, self._engine.to_str())

    def __call__(self, prompts: str | Sequence[str]) -> np.ndarray:
        """The tokens of prompts, each between start and end, then padded. Warns where a prompt is cut off.

        Args:
            prompts: One prompt, or a list of B of them. "" is a prompt.

        Returns:
            int32 (B, S), ids in [0, vocabulary_size).

        Raises:
            TypeError: Something is not text.
            ValueError: A text has a lone surrogate, so that UTF-8 has no bytes for it.
        """
        prompts = _check_prompts(prompts)
        room = self.context_length - 2
        tokens = np.full((len(prompts), self.context_length), self.pad_id, "int32")  # (B, S)
        cut_off = []
        for index, prompt in enumerate(prompts):
            # one by one: the engine's own batches start threads, which do not survive a fork of the data workers
            encoding = self._engine.encode(prompt, add_special_tokens=False)
            ids = encoding.ids
            if len(ids) > room:
                first_lost = encoding.offsets[room][0]
                cut_off.append((index, len(ids) - room, len(ids), prompt[first_lost:]))
                ids = ids[:room]
            tokens[index, : len(ids) + 2] = [self.start_id, *ids, self.end_id]
        if cut_off:
            warnings.warn(_truncation_message(cut_off, room), TruncationWarning, stacklevel=2)
        return tokens

    def decode(self, ids: Any) -> str | list[str]:
        """What tokens say, for people: lower case, one space after each word, without start, end and padding.

        Args:
            ids: (S,) or (B, S) whole numbers in [0, vocabulary_size).

        Returns:
            The text, or a list of B texts. Bytes that are not UTF-8 become U+FFFD.

        Raises:
            ValueError: Another shape, numbers that are not whole, or out of range.
        """
        ids = np.asarray(ids)
        if ids.size == 0:
            ids = ids.astype("int32")
        if ids.ndim not in (1, 2) or not np.issubdtype(ids.dtype, np.integer):
            received = f"shape={ids.shape}, dtype={ids.dtype}"
            raise ValueError(f"`ids` must be whole numbers of shape (S,) or (B, S). Received: {received}")
        if ids.size and not (0 <= ids.min() and ids.max() < self.vocabulary_size):
            received = f"{ids.min()} to {ids.max()}"
            raise ValueError(f"`ids` must be in [0, {self.vocabulary_size}). Received: {received}")
        if ids.ndim == 2:
            return [self._decode_one(row.tolist()) for row in ids]
        return self._decode_one(ids.tolist())

    def _decode_one(self, ids: list[int]) -> str:
        if ids and ids[0] == self.start_id:
            ids = ids[1:]
        while ids and ids[-1] == self.pad_id:
            ids = ids[:-1]
        if ids and ids[-1] == self.end_id:
            ids = ids[:-1]
        pieces = []
        for token in map(self._token_of.__getitem__, ids):
            if token in self.added_tokens or token.endswith(_END_OF_WORD):
                pieces.append(token.removesuffix(_END_OF_WORD) + _SPACE)
            else:
                pieces.append(token)
        return self._engine.decoder.decode(pieces).strip()

    def _make_engine(self):
        # imported here: `import latentdiff` must not wait for it
        import tokenizers
        from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

        engine = tokenizers.Tokenizer(
            models.BPE(
                vocab=self.vocabulary,
                merges=self.merges,
                continuing_subword_prefix="",
                end_of_word_suffix=_END_OF_WORD,
                unk_token=self.unknown_token,
                fuse_unk=False,
            )
        )
        engine.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(tokenizers.Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        engine.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior="removed", invert=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        engine.post_processor = processors.RobertaProcessing(
            (self.end_token, self.end_id), (self.start_token, self.start_id), trim_offsets=False, add_prefix_space=False
        )
        engine.decoder = decoders.ByteLevel()
        engine.add_tokens([tokenizers.AddedToken(token, **asdict(how)) for token, how in self.added_tokens.items()])
        return engine


def _check_prompts(prompts: Any) -> list[str]:
    rule = "`prompts` must be text: a str or a list of str"
    if isinstance(prompts, str):
        prompts = [prompts]
    elif not isinstance(prompts, list | tuple):
        raise TypeError(f"{rule}. Received: {_short(prompts)} of type {type(prompts).__name__}")
    for index, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise TypeError(f"{rule}. Received: prompts[{index}]={_short(prompt)} of type {type(prompt).__name__}")
        if prompt and not is_text(prompt):
            rule = "`prompts` must be text that UTF-8 can hold, without lone surrogates"
            raise ValueError(f"{rule}. Received: prompts[{index}]={_short(prompt)}")
    return list(prompts)


def _truncation_message(cut_off: list[tuple[int, int, int, str]], room: int) -> str:
    parts = [
        f"prompts[{index}] lost {lost} of {total} tokens: {_short(text, 200)}"
        for index, lost, total, text in cut_off[:20]
    ]
    if len(cut_off) > len(parts):
        parts.append(f"and {len(cut_off) - len(parts)} more")
    return f"A prompt must have at most {room} tokens; what follows them was cut off. Received: {'; '.join(parts)}"


def _short(value: Any, limit: int = 120) -> str:
    if isinstance(value, str | bytes) and len(value) > limit:
        return f"{value[:limit]!r}... ({len(value)} characters)"
    text = repr(value)
    return text if len(text) <= limit + 40 else text[:limit] + "..."
