"""What a text is split into before byte pairs are merged, in a graph: added tokens as they are spelled, and words.

    'm 's 't 'd 're 've 'll  |  letters  |  one number  |  what is neither letter, number nor white space

CLIP's own splitting, Radford et al. 2021, section 2.4, arXiv:2103.00020.
"""

from collections.abc import Sequence

import numpy as np
import tensorflow as tf

from latentdiff.export.tokenizer_tables import selected, shifted
from latentdiff.export.tokenizer_unicode import ADDED, LETTER, NUMBER, OTHER, SPACE

__all__ = ["find_spellings", "replace_spellings", "word_starts"]

# These end a word even where the vocabulary has no such token.
_LITERALS = ("<|startoftext|>", "<|endoftext|>")
_CONTRACTIONS = ("s", "t", "m", "d", "re", "ve", "ll")


def find_spellings(codes: tf.Tensor, spellings: Sequence[str]) -> tuple[tf.Tensor, tf.Tensor]:
    """Where one of some spellings stands, the longest where one begins another.

    Args:
        codes: int32 (N,).
        spellings: None of them inside of another, or ends as another begins.

    Returns:
        int32 (M,) the places in `codes`, ascending, and int32 (M,) which of the spellings stands there.
    """
    order = sorted(range(len(spellings)), key=lambda i: -len(spellings[i]))
    longest = len(spellings[order[0]])
    patterns = np.array([[*map(ord, spellings[i]), *[-1] * (longest - len(spellings[i]))] for i in order], "int32")
    is_first = tf.reduce_any(codes[:, None] == np.unique(patterns[:, 0]), axis=1)
    at = tf.cast(tf.where(is_first)[:, 0], tf.int32)
    padded = tf.concat([codes, tf.fill([longest], -1)], axis=0)
    windows = tf.gather(padded, at[:, None] + tf.range(longest))  # (M, L)
    fits = tf.reduce_all((windows[:, None, :] == patterns) | (patterns < 0), axis=2)  # (M, K)
    found = tf.reduce_any(fits, axis=1)
    which = tf.gather(np.array(order, "int32"), tf.argmax(tf.cast(fits, tf.int32), axis=1))
    return selected(at, found), selected(which, found)


def replace_spellings(codes: tf.Tensor, spellings: Sequence[str], marks: Sequence[int]) -> tf.Tensor:
    """The codes with a mark in the place of each spelling that stands in them.

    Args:
        codes: int32 (N,).
        spellings: As in `find_spellings`; there may be none.
        marks: One for each spelling.

    Returns:
        int32 (M,).
    """
    if not spellings:
        return codes
    at, which = find_spellings(codes, spellings)
    size = tf.shape(codes) + 1
    behind = at + tf.gather(np.array([len(spelling) for spelling in spellings], "int32"), which)
    opened = tf.scatter_nd(at[:, None] + 1, tf.ones_like(at), size) - tf.scatter_nd(
        behind[:, None], tf.ones_like(at), size
    )
    codes = tf.tensor_scatter_nd_update(codes, at[:, None], tf.gather(np.array(marks, "int32"), which))
    return selected(codes, tf.cumsum(opened)[:-1] == 0)


def word_starts(codes: tf.Tensor, kind: tf.Tensor) -> tf.Tensor:
    """Where words begin.

    Args:
        codes: int32 (N,), lower-case.
        kind: int32 (N,), what each of them is.

    Returns:
        bool (N,).
    """
    is_new = _literal_ends(codes, kind) | (shifted(kind, -1, SPACE) != kind)
    starts = (kind != SPACE) & (is_new | (kind == NUMBER) | (kind == ADDED))

    # an apostrophe that begins a word takes some letters along; whatever follows them is another word
    next_code = shifted(codes, 1, -1)
    quotes = starts & (codes == ord("'"))
    one = quotes & tf.reduce_any(next_code[:, None] == [ord(each) for each in _CONTRACTIONS if len(each) == 1], axis=1)
    pairs = tf.stack([next_code, shifted(codes, 2, -1)], axis=1)  # (N, 2)
    fits = pairs[:, None, :] == [list(map(ord, each)) for each in _CONTRACTIONS if len(each) == 2]
    two = quotes & tf.reduce_any(tf.reduce_all(fits, axis=2), axis=1)
    taken = shifted(one | two, -1, False) | shifted(two, -2, False)
    follows = shifted(one, -2, False) | shifted(two, -3, False)
    return (starts & tf.logical_not(taken)) | (follows & (kind == LETTER))


def _literal_ends(codes: tf.Tensor, kind: tf.Tensor) -> tf.Tensor:
    """Behind one of the literals that is a word by itself, since it neither follows nor ends in a run of others."""
    at, which = find_spellings(codes, _LITERALS)
    behind = at + tf.gather(np.array([len(each) for each in _LITERALS], "int32"), which)
    # in a chain of literals without anything between, the first one decides
    follows = tf.concat([[-1], behind], axis=0)[:-1] == at
    chain = tf.cumsum(tf.cast(tf.logical_not(follows), tf.int32))
    free = tf.gather(shifted(kind, -1, SPACE), at) != OTHER
    chain_free = tf.math.unsorted_segment_max(tf.cast(free, tf.int32), chain, tf.size(at) + 1)
    behind = selected(behind, tf.gather(chain_free, chain) > 0)
    size = tf.shape(codes) + 1
    return tf.scatter_nd(behind[:, None], tf.ones_like(behind), size)[:-1] > 0
