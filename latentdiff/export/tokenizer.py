"""CLIP's tokenizer as TensorFlow operations: prompt -> tokens in a graph that needs no Python.

    tokens = start, merge(bytes(words(lower(NFC(prompt))))), end, pad, pad, ...

It is `latentdiff.models.tokenizer` again, on whole batches: all prompts are one sequence of code points, in which a
mark that no text holds begins each of them and another stands for each added token.
"""

import tensorflow as tf

from latentdiff.export.tokenizer_normalize import Normalizer
from latentdiff.export.tokenizer_pairs import BytePairs
from latentdiff.export.tokenizer_tables import CodeTable, selected
from latentdiff.export.tokenizer_unicode import ADDED, CODES, MARKS, SPACE, normalized, unicode_tables
from latentdiff.export.tokenizer_words import replace_spellings, word_starts
from latentdiff.models.tokenizer import CLIPTokenizer

__all__ = ["GraphTokenizer"]

_ADDED_TOKENS_LIMIT = 64
_PROMPT = CODES + MARKS - 1  # the mark that begins a prompt; those of added tokens begin at CODES


class GraphTokenizer(tf.Module):
    """A tokenizer's map from prompts to tokens, for a graph; what it needs to know is in its variables.

    It gives the tokens of the `CLIPTokenizer` that it is made from, on any text. Bytes that are not UTF-8 become
    U+FFFD as in Python's `bytes.decode(errors="replace")`, NUL is a character like any other, and what does not fit
    into the context is cut off.

    Args:
        tokenizer: What to be equal to. Of `AddedToken`'s flags, `lstrip` and `rstrip` make no difference to CLIP's
            words, which have no white space.
        max_prompt_bytes: The longest prompt. A long word without a break takes time that grows with its square.
        name: The variables' name.

    Attributes:
        max_prompt_bytes: As above.
        variables: The raw `tf.Variable`s, for a SavedModel to track.

    Raises:
        ValueError: `max_prompt_bytes` is no whole number of 1 or more, or an added token is matched in a way that is
            not supported here; the message names it.
    """

    def __init__(self, tokenizer: CLIPTokenizer, max_prompt_bytes: int, *, name: str = "tokenizer"):
        super().__init__(name=name)
        if type(max_prompt_bytes) is not int or not 1 <= max_prompt_bytes < 2**24:
            rule = f"`max_prompt_bytes` must be a whole number from 1 to {2**24 - 1}"
            raise ValueError(f"{rule}. Received: max_prompt_bytes={max_prompt_bytes!r}")
        self.max_prompt_bytes = max_prompt_bytes
        self._context_length = tokenizer.context_length
        self._start_id, self._end_id, self._pad_id = tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id
        self._raw, self._normal, added_ids = _spellings(tokenizer)

        tables = unicode_tables()
        self._normalizer = Normalizer(tables)
        kind = tables.kind.astype("int32")
        self._kind = CodeTable(kind, ADDED, name="kind")
        unknown_id = tokenizer.vocabulary[tokenizer.unknown_token]
        self._byte_pairs = BytePairs(tokenizer.vocabulary, tokenizer.merges, unknown_id, added_ids)

    @tf.autograph.experimental.do_not_convert
    def __call__(self, prompts: tf.Tensor) -> tf.Tensor:
        """The tokens of prompts, each between start and end, then padded. "" is a prompt.

        Args:
            prompts: string (B,).

        Returns:
            int32 (B, S).

        Raises:
            tf.errors.InvalidArgumentError: Another rank, or a prompt of more than `max_prompt_bytes` bytes; when it
                runs, before any work.
        """
        # strings and a loop of small steps: a GPU would only be in the way
        with tf.device("/CPU:0"):
            prompts = self._checked(prompts)
            codes = _code_points(prompts)
            codes = replace_spellings(codes, list(self._raw), list(self._raw.values()))
            codes = self._normalizer(codes)
            codes = replace_spellings(codes, list(self._normal), list(self._normal.values()))
            codes, word, row = self._words(codes)
            tokens, word = self._byte_pairs(codes, word)
            return self._rows(tokens, tf.gather(row, word), tf.size(prompts))

    def _checked(self, prompts: tf.Tensor) -> tf.Tensor:
        prompts = tf.convert_to_tensor(prompts, tf.string)
        # a static rank is a promise that a server's request need not keep: it must not make the check a constant
        unknown = tf.compat.v1.placeholder_with_default(prompts, shape=None)
        rank = tf.rank(unknown)
        rank_check = tf.debugging.Assert(tf.equal(rank, 1), ["prompts must have the shape (B,); their rank is", rank])
        longest = tf.reduce_max(tf.concat([[0], tf.reshape(tf.strings.length(unknown), [-1])], axis=0))
        rule = f"a prompt must have at most {self.max_prompt_bytes} bytes; one has"
        length_check = tf.debugging.Assert(longest <= self.max_prompt_bytes, [rule, longest])
        with tf.control_dependencies([check for check in (rank_check, length_check) if check is not None]):
            prompts = tf.identity(unknown)
        prompts.set_shape([None])  # not `ensure_shape`, which would run beside the checks and fail first
        return prompts

    def _words(self, codes: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """The codes of words (N,), each one's word (N,), and each word's prompt (W,)."""
        kind = tf.where(codes == _PROMPT, SPACE, self._kind(codes))
        starts = tf.cast(word_starts(codes, kind), tf.int32)
        row = tf.cumsum(tf.cast(codes == _PROMPT, tf.int32)) - 1
        ordinal = tf.cumsum(starts)
        before = tf.gather(ordinal, tf.where(codes == _PROMPT)[:, 0])  # (B,)
        # each word has a token or more, so that later words than these are cut off
        room = self._context_length - 2
        kept = tf.where((kind != SPACE) & (ordinal - tf.gather(before, row) <= room))[:, 0]
        codes, starts, row = tf.gather(codes, kept), tf.gather(starts, kept), tf.gather(row, kept)
        return codes, tf.cumsum(starts) - 1, selected(row, starts > 0)

    def _rows(self, tokens: tf.Tensor, row: tf.Tensor, batch: tf.Tensor) -> tf.Tensor:
        counts = tf.math.unsorted_segment_sum(tf.ones_like(row), row, batch)[:, None]  # (B, 1)
        first = tf.cumsum(counts, exclusive=True)
        room = self._context_length - 2
        counts = tf.minimum(counts, room)
        column = tf.range(self._context_length)  # (S,)
        tokens = tf.concat([[self._start_id], tokens, tf.fill([room + 1], self._pad_id)], axis=0)
        rows = tf.gather(tokens, tf.where(column == 0, 0, first + column))  # (B, S)
        return tf.where(column <= counts, rows, tf.where(column == counts + 1, self._end_id, self._pad_id))


def _code_points(prompts: tf.Tensor) -> tf.Tensor:
    """The code points of all prompts, with a mark before each; U+FFFD where bytes are no UTF-8."""
    decoded = tf.raw_ops.UnicodeDecode(
        input=tf.strings.join(["\n", prompts]),
        input_encoding="UTF-8",
        errors="replace",
        replacement_char=0xFFFD,
        replace_control_characters=False,
        Tsplits=tf.int64,
    )
    firsts = decoded.row_splits[:-1]  # of the line feeds, which keep the marks' places
    return tf.tensor_scatter_nd_update(decoded.char_values, firsts[:, None], tf.fill(tf.shape(firsts), _PROMPT))


def _spellings(tokenizer: CLIPTokenizer) -> tuple[dict[str, int], dict[str, int], list[int]]:
    """Added tokens to their marks: spellings in the text as typed, those in the normalized text; and the marks' ids."""
    raw, normal, ids = {}, {}, []
    next_id = len(tokenizer.vocabulary)  # of those that the vocabulary lacks, in their order
    if len(tokenizer.added_tokens) > _ADDED_TOKENS_LIMIT:
        rule = f"A tokenizer must have at most {_ADDED_TOKENS_LIMIT} added tokens to be exported"
        raise ValueError(f"{rule}. Received: {len(tokenizer.added_tokens)}")
    for content, flags in tokenizer.added_tokens.items():
        spelling = normalized(content) if flags.normalized else content
        if flags.single_word:
            raise ValueError(f"An added token must not have `single_word` to be exported. Received: {content!r}")
        if any(unicode_tables().kind[ord(character)] == SPACE for character in spelling):
            raise ValueError(f"An added token must not hold white space to be exported. Received: {content!r}")
        spellings = normal if flags.normalized else raw
        for other in spellings:
            if _collide(spelling, other) or _collide(other, spelling):
                rule = "An added token must not hold another, nor end as another begins, to be exported"
                raise ValueError(f"{rule}. Received: {content!r} and {other!r}")
        if spelling in spellings or _collide(spelling, spelling):
            rule = "An added token must not end as it begins, nor be spelled as another, to be exported"
            raise ValueError(f"{rule}. Received: {content!r}")
        spellings[spelling] = CODES + len(ids)
        ids.append(tokenizer.vocabulary.get(content, next_id))
        next_id += content not in tokenizer.vocabulary
    return raw, normal, ids


def _collide(left: str, right: str) -> bool:
    """Whether `right` can stand in a text so that it begins inside of `left`."""
    return any(left[i:].startswith(right) or right.startswith(left[i:]) for i in range(1, len(left)))
