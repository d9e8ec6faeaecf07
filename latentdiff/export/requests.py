"""What a request may ask for: limits that stand in the graph, checked before any work.

Each check ends a call with INVALID_ARGUMENT and a text that names the rule. One entry serves the whole batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import tensorflow as tf

from latentdiff.export.sampler_book import SamplerBook

FRESH_SEED = -1


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The most that one request may ask for.

    Attributes:
        max_batch: pictures.
        max_steps: of a sampler.
        max_prompt_bytes: of one prompt, in UTF-8.
        max_guidance_scale: the least is 0.

    Raises:
        ValueError: a number is not positive.
    """

    max_batch: int = 16
    max_steps: int = 50
    max_prompt_bytes: int = 2048
    max_guidance_scale: float = 100.0

    def __post_init__(self):
        for name, value in asdict(self).items():
            kinds = (int, float) if name == "max_guidance_scale" else int
            if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < 2**31:
                raise ValueError(f"`{name}` must be a positive number. Received: {name}={value!r}.")


def check(condition: Any, text: str, *values: Any) -> tf.Operation:
    """An operation that fails with INVALID_ARGUMENT and `text` unless the scalar condition holds."""
    return tf.debugging.Assert(condition, [text, *values], summarize=4)


def checked(tensors: Mapping[str, Any], checks: list[Any]) -> dict[str, Any]:
    """The tensors, to be had only when all checks have held."""
    with tf.control_dependencies(checks):
        return {name: tf.identity(tensor) for name, tensor in tensors.items()}


def shaped(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a request, once their shapes are those that the signature promises: no runtime checks that.

    Args:
        tensors: the inputs by name, with their static shapes: (None, ...).

    Returns:
        The same names; what is made of them waits for the check.
    """
    checks, unknown = [], {}
    for name, tensor in tensors.items():
        # Otherwise the promise makes the check a constant.
        unknown[name] = tf.raw_ops.PlaceholderWithDefault(input=tensor, shape=tf.TensorShape(None))  # pyright: ignore[reportArgumentType]
        wanted, found = tensor.shape.as_list(), tf.shape(unknown[name])
        words = ", ".join(["B", *map(str, wanted[1:])]) + ("," if len(wanted) == 1 else "")
        same_rank = tf.equal(tf.size(found), len(wanted))
        same = tf.cond(same_rank, lambda f=found, w=wanted: tf.reduce_all(tf.equal(f[1:], w[1:])), lambda: False)
        checks.append(check(same, f"`{name}` must have the shape ({words}). Received:", found))
    done = checked(unknown, checks)
    for name, tensor in tensors.items():
        done[name].set_shape(tensor.shape)
    return done


def batch_of(tensors: Mapping[str, Any], limits: Limits) -> tuple[Any, list[Any]]:
    """The size of a batch whose tensors have its length or 1, and the checks of it.

    Args:
        tensors: the request's inputs by name; the first axis counts.
        limits: of the graph.

    Returns:
        B, int32 scalar, and operations.
    """
    lengths = {name: tf.shape(tensor)[0] for name, tensor in tensors.items()}
    size = tf.reduce_max(tf.stack(list(lengths.values())))
    most = limits.max_batch
    checks = [
        check((size >= 1) & (size <= most), f"a request must ask for 1 to {most} pictures (max_batch). Received:", size)
    ]
    for name, length in lengths.items():
        fits = ((length == 1) | (length == size)) & (length >= 1)
        checks.append(check(fits, f"`{name}` must have one entry, or one for each picture. Received:", length))
    return size, checks


def settings_of(tensors: Mapping[str, Any], book: SamplerBook, limits: Limits) -> tuple[dict[str, Any], list[Any]]:
    """What a request sets beside its prompts, and the checks of it.

    Args:
        tensors: `seed` int64, `num_steps` int32, `guidance_scale` float32, `sampler` string; each (1,) or (B,).
        book: the samplers that may be asked for.
        limits: of the graph.

    Returns:
        The same names, each (1,) or (B,), `sampler` as its place in the book; and operations.
    """
    seed, steps = tensors["seed"], tensors["num_steps"]
    scale, sampler = tensors["guidance_scale"], tensors["sampler"]
    named = tf.equal(sampler[:, None], tf.constant(book.samplers)[None])  # (B, K)
    place = tf.argmax(named, axis=1, output_type=tf.int32)  # (B,)
    known = tf.reduce_all(tf.reduce_any(named, axis=1))
    in_range = tf.reduce_all((steps >= 1) & (steps <= limits.max_steps))
    # Looked up within the book's bounds, also where another check is about to fail.
    places = _broadcast(place, tf.clip_by_value(steps, 0, limits.max_steps))
    has_table = tf.reduce_all((tf.gather_nd(book.num_rows, tf.stack(places, axis=1)) > 0) | ~in_range | ~known)
    most = limits.max_guidance_scale
    sound = tf.reduce_all(tf.math.is_finite(scale) & (scale >= 0) & (scale <= most))
    seeds = tf.reduce_all(seed >= FRESH_SEED)
    checks = [
        check(known, f"`sampler` must be one of {', '.join(book.samplers)}. Received:", sampler),
        check(in_range, f"`num_steps` must lie in 1 .. {limits.max_steps} (max_steps). Received:", steps),
        check(has_table, "`num_steps` is more than its sampler takes. Received:", steps),
        check(sound, f"`guidance_scale` must lie in 0 .. {most:g} (max_guidance_scale). Received:", scale),
        check(seeds, "`seed` must lie in 0 .. 2**63 - 1, or be -1 for a fresh one. Received:", seed),
    ]
    return {"seed": seed, "num_steps": steps, "guidance_scale": scale, "sampler": place}, checks


def spread(tensor: Any, size: Any) -> Any:
    """(1, ...) or (B, ...) -> (B, ...)."""
    return tf.broadcast_to(tensor, tf.concat([[size], tf.shape(tensor)[1:]], axis=0))


def fresh_seeds(seed: Any) -> Any:
    """Seeds (B,) as they are used: -1 becomes a random number below 2**32, another one for each picture."""
    random = tf.random.uniform(tf.shape(seed), maxval=2**32, dtype=tf.int64)
    return tf.where(tf.equal(seed, FRESH_SEED), random, seed)


def _broadcast(first: Any, second: Any) -> tuple[Any, Any]:
    size = tf.maximum(tf.shape(first)[0], tf.shape(second)[0])
    # Lengths that do not fit are told by their own check.
    fits = (tf.shape(first)[0] == 1) | (tf.shape(second)[0] == 1) | (tf.shape(first)[0] == tf.shape(second)[0])
    first, second = (tf.cond(fits, lambda v=v: v, lambda v=v: v[:1]) for v in (first, second))
    size = tf.where(fits, size, 1)
    return spread(first, size), spread(second, size)
