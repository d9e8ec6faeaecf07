"""Makes a cache of latents and contexts once, and opens it as long as nothing that it depends on has changed.

    key = SHA-256(data, autoencoder, tokenizer, text encoder, preprocessing, version)

It is made in a hidden directory beside its place, shard by shard, each written aside, synced and renamed, and so is the
directory at last. After a kill the work goes on behind the last whole shard. The networks are handed in.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import keras
import numpy as np

from latentdiff.backend import Compiled, to_numpy
from latentdiff.checkpoints.files import read_json, write_json
from latentdiff.data.buckets import full_buckets
from latentdiff.data.cache import MANIFEST, SHARD_LENGTH, Cache, StaleCacheError
from latentdiff.data.cache_key import digest_of, make_parts
from latentdiff.data.captions import SIDE_WORDS, names_side
from latentdiff.data.decode import decode_crop, in_model_range
from latentdiff.data.examples import Example, Index
from latentdiff.data.sources import read_picture

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_KEY = "key.json"  # in a cache that is being made
_DTYPES = ("float32", "float16")


def make_cache(
    directory: str | os.PathLike,
    index: Index,
    autoencoder: Any,
    *,
    buckets: Sequence[tuple[int, int]],
    tokenizer: Any = None,
    text_encoder: keras.Model | None = None,
    moments: bool = False,
    flip: bool = False,
    side_words: Collection[str] = SIDE_WORDS,
    dtype: str = "float32",
    fill: int = 1,
    batch_size: int = 16,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Cache:
    """The cache of a data set: opened where it is there and right, made where it is not.

    Processes of one machine that ask for the same one at once wait for the first.

    Args:
        directory: of the cache; may not exist yet.
        index: the examples.
        autoencoder: whose encoder reads the pictures, each the centre of its bucket's size.
        buckets: (H, W) of the sizes; each picture has the one of the nearest aspect ratio.
        tokenizer: a `CLIPTokenizer`; None keeps no captions.
        text_encoder: keeps contexts rather than tokens; for one that is not trained.
        moments: whether the posterior's log variance is kept beside its mean, so that latents can be drawn from it.
        flip: whether mirrored pictures are kept beside, for captions that name no side; twice the work and the disk.
        side_words: words that forbid it, in lower case.
        dtype: of the latents and contexts on disk, "float32" or "float16".
        fill: buckets with fewer pictures are given up; the batch size to train with. See `full_buckets`.
        batch_size: pictures that the networks see at once.
        overwrite: whether a cache that is stale is made anew; otherwise it is an error.
        progress: told of (shards done, shards in all).

    Raises:
        StaleCacheError: there is a cache, of something else; the message says what has changed.
        FileExistsError: `directory` holds something that is no cache.
        ValueError: an argument is out of its range, or a shard of the cache is damaged.
    """
    if dtype not in _DTYPES:
        raise ValueError(f"`dtype` must be one of {_DTYPES}. Received: dtype={dtype!r}.")
    if text_encoder is not None and tokenizer is None:
        raise ValueError("`text_encoder` must come with a `tokenizer`. Received: tokenizer=None.")
    sizes = [[int(height), int(width)] for height, width in buckets]
    preprocessing = {"buckets": sizes, "fill": fill, "crop": "centre", "moments": moments, "dtype": dtype}
    if flip:
        preprocessing["flip"] = sorted(side_words)
    parts = make_parts(index, autoencoder, tokenizer, text_encoder, preprocessing)
    target = Path(directory).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    with _locked(target.with_name(f".{target.name}.lock")):
        if _is_current(target, parts, overwrite):
            return Cache(target)
        making = _Making(target, parts)
        chosen = full_buckets(index.heights, index.widths, buckets, fill)
        making.add("buckets", lambda: chosen)
        making.add("first_captions", lambda: np.cumsum([0] + [len(example.captions) for example in index]))
        encode = _encoder(autoencoder, moments, dtype)
        for bucket in np.unique(chosen):
            examples = [index[row] for row in np.flatnonzero(chosen == bucket)]
            size = (sizes[bucket][0], sizes[bucket][1])
            making.add_shards(f"latents-{bucket}", examples, partial(_latents, encode, size, False, batch_size))
            if flip:
                making.add_shards(f"mirrored-{bucket}", examples, partial(_latents, encode, size, True, batch_size))
        captions = [caption for example in index for caption in example.captions] + [""]
        if flip:
            making.add("sided", lambda: np.array([names_side(caption, side_words) for caption in captions]))
        text = None
        if tokenizer is not None:
            text = "tokens" if text_encoder is None else "context"
            making.add_shards(text, captions, partial(_texts, tokenizer, text_encoder, batch_size, dtype))
        making.run(progress)
        making.finish({"buckets": sizes, "moments": moments, "flip": flip, "text": text})
        return Cache(target)


def _is_current(target: Path, parts: dict[str, Any], overwrite: bool) -> bool:
    """Whether a cache is there and right; raises where it is not to be made either."""
    if not target.exists() or target.is_dir() and not any(target.iterdir()):
        return False
    if not (target / MANIFEST).is_file() or "parts" not in (manifest := read_json(target / MANIFEST)):
        raise FileExistsError(f"A cache has a directory of its own. `{target}` holds something else.")
    if manifest["parts"] == parts and manifest["key"] == digest_of(parts):
        return True
    if not overwrite:
        changed = [name for name in parts if manifest["parts"].get(name) != parts[name]]
        rule = "A cache must have been made of what is wanted now. Remove it, or call with overwrite=True"
        raise StaleCacheError(f"{rule}. Received: {str(target)!r}, where other is: {', '.join(changed) or 'key'}.")
    return False


class _Making:
    """The hidden directory in which a cache grows, and the shards that it is to have."""

    def __init__(self, target: Path, parts: dict[str, Any]):
        self.target, self.parts, self.key = target, parts, digest_of(parts)
        self.place = target.with_name(f".{target.name}.making")
        self.work: dict[str, Callable[[], np.ndarray]] = {}
        kept = self.place / _KEY
        if not kept.is_file() or read_json(kept) != {"key": self.key}:
            shutil.rmtree(self.place, ignore_errors=True)
            self.place.mkdir()
            write_json(kept, {"key": self.key})

    def add(self, name: str, compute: Callable[[], np.ndarray]) -> None:
        self.work[name] = compute

    def add_shards(self, kind: str, items: Sequence, compute: Callable[[Sequence], np.ndarray]) -> None:
        for number, first in enumerate(range(0, len(items), SHARD_LENGTH)):
            self.work[f"{kind}-{number:05}"] = partial(compute, items[first : first + SHARD_LENGTH])

    def run(self, progress: Callable[[int, int], None] | None) -> None:
        for done, (name, compute) in enumerate(self.work.items(), 1):
            path = self.place / f"{name}.npy"
            if not path.exists():
                part = path.with_suffix(".part")
                with part.open("wb") as file:
                    np.save(file, compute(), allow_pickle=False)
                    file.flush()
                    os.fsync(file.fileno())
                part.replace(path)
            if progress is not None:
                progress(done, len(self.work))

    def finish(self, fields: dict[str, Any]) -> None:
        """Writes the manifest and puts the cache in its place."""
        shapes = {name: list(np.load(self.place / f"{name}.npy", mmap_mode="r").shape) for name in self.work}
        manifest = {"key": self.key, "parts": self.parts, "shards": shapes, **fields}
        write_json(self.place / MANIFEST, manifest)
        former = self.target.with_name(f".{self.target.name}.former")
        shutil.rmtree(former, ignore_errors=True)
        if self.target.exists():
            self.target.rename(former)
        self.place.rename(self.target)
        (self.target / _KEY).unlink()
        shutil.rmtree(former, ignore_errors=True)


def _encoder(autoencoder: Any, moments: bool, dtype: str) -> Callable[[np.ndarray], np.ndarray]:
    """Images float32 (B, H, W, 3) in [-1, 1] -> means (B, h, w, c), or with the log variances (B, h, w, 2 c)."""

    def outputs(image):
        return autoencoder.encoder(image) if moments else autoencoder.moments(image)[0]

    compiled = Compiled(outputs, [autoencoder.encoder])
    return lambda image: to_numpy(compiled(image), "float32").astype(dtype)


def _latents(
    encode: Callable, size: tuple[int, int], flip: bool, batch_size: int, examples: Sequence[Example]
) -> np.ndarray:
    def picture(example: Example) -> np.ndarray:
        return decode_crop(read_picture(example), size, flip=flip)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pictures = (np.stack(list(pool.map(picture, some))) for some in _batches(examples, batch_size))
        return _whole(pictures, lambda image: encode(in_model_range(image)), batch_size)


def _texts(
    tokenizer: Any, text_encoder: keras.Model | None, batch_size: int, dtype: str, captions: Sequence[str]
) -> np.ndarray:
    tokens = np.asarray(tokenizer(list(captions)), "int32")
    if text_encoder is None:
        return tokens
    compiled = Compiled(text_encoder, [text_encoder])

    def contexts(some: np.ndarray) -> np.ndarray:
        return to_numpy(compiled(some), "float32").astype(dtype)

    return _whole(_batches(tokens, batch_size), contexts, batch_size)


def _batches(items: Any, batch_size: int) -> Iterator[Any]:
    return (items[first : first + batch_size] for first in range(0, len(items), batch_size))


def _whole(batches: Iterable[np.ndarray], function: Callable[[np.ndarray], np.ndarray], batch_size: int) -> np.ndarray:
    """A function of batches, the last one filled up by repeating, so that one shape is compiled."""
    outputs = []
    for batch in batches:
        filled = batch if len(batch) == batch_size else np.resize(batch, (batch_size, *batch.shape[1:]))
        outputs.append(function(filled)[: len(batch)])
    return np.concatenate(outputs)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Waits until no other process holds this file; a killed one holds it no longer."""
    with path.open("a") as file:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
