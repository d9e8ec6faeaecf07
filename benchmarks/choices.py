"""The choices that layers make by the sizes of their arrays on a CPU, each beside what it was chosen over.

    python -m benchmarks.choices --dtype bfloat16

A 3 x 3 convolution as a product of matrices or by oneDNN; a dense layer as a product or as a 1 x 1 convolution; how
many heads and queries attend at once; a group norm, with swish, in passes that XLA compiles or in TensorFlow's
operations. Sizes are those of Stable Diffusion 1.5's UNet, and around.
`results/choices-DTYPE.json` holds what came out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.cases import DTYPES

RESULTS = Path(__file__).parent / "results"
REPETITIONS, SECONDS = 5, 0.2
CONVOLUTIONS = ((8, 1280), (16, 640), (16, 1280), (32, 640), (64, 320))  # height and width, channels
DENSE = ((64, 1280, 1280), (256, 5120, 1280), (1024, 640, 640), (1024, 2560, 640), (4096, 320, 320), (4096, 1280, 320))
QUERIES = ((4096, 320), (1024, 640))  # how many, width; of 8 heads
PIECES = ((8, 128), (8, 512), (4, 256), (4, 1024), (2, 256), (2, 1024), (1, 512), (1, 1024))  # heads, queries
NORMS = ((8, 1280), (16, 1280), (32, 640), (64, 320))
BATCH, HEADS, GROUPS = 2, 8, 32


def measure(dtype: str) -> list[dict[str, Any]]:
    """What each way takes in milliseconds at each size, and which of them is taken."""
    return [*convolutions(dtype), *dense_layers(dtype), *attention(dtype), *norms(dtype)]


def convolutions(dtype: str) -> Iterator[dict[str, Any]]:
    """A convolution by oneDNN, and as a product."""
    import keras

    from latentdiff.models.layers import conv

    for size, channels in CONVOLUTIONS:
        layer = conv(channels, 3, "conv", dtype)
        layer.build((BATCH, size, size, channels))
        arrays = [_random(dtype, BATCH, size, size, channels)]
        ways = {"oneDNN": lambda x, layer=layer: keras.layers.Conv2D.call(layer, x), "product": layer.as_product}
        taken = "product" if layer.is_product(arrays[0]) else "oneDNN"
        yield {"what": "convolution", "size": [size, size, channels], "taken": taken, **_milliseconds(ways, arrays)}


def dense_layers(dtype: str) -> Iterator[dict[str, Any]]:
    """A dense layer with a bias: (B, positions, D) -> (B, positions, units)."""
    from latentdiff.models import layers

    chosen = layers.MANY_POSITIONS
    for count, width, units in DENSE:
        layer = layers.dense(units, "dense", dtype)
        layer.build((BATCH, count, width))
        arrays = [_random(dtype, BATCH, count, width)]
        taken = "convolution" if chosen <= BATCH * count else "product"
        found = {}
        for way, least in (("product", 2**62), ("convolution", 1)):
            layers.MANY_POSITIONS = least
            found.update(_milliseconds({way: lambda x, layer=layer: layer(x)}, arrays))
        layers.MANY_POSITIONS = chosen
        yield {"what": "dense layer", "size": [count, width, units], "taken": taken, **found}


def attention(dtype: str) -> Iterator[dict[str, Any]]:
    """Self-attention with so many heads and queries at once."""
    from latentdiff.models import attention

    chosen = attention.at_once
    for count, width in QUERIES:
        arrays = [_random(dtype, BATCH, count, width) for _ in range(3)]
        taken = chosen(BATCH, HEADS, count, count, 2 if dtype == "bfloat16" else 4)
        found = {}
        for piece in sorted({*PIECES, taken}, reverse=True):
            if piece[1] <= count:
                attention.at_once = lambda *_, piece=piece: piece
                ways = {_said(piece): lambda q, k, v: attention.attend(q, k, v, HEADS)}
                found.update(_milliseconds(ways, arrays))
        attention.at_once = chosen
        yield {"what": "heads and queries", "size": [count, width], "taken": _said(taken), **found}


def _said(piece: tuple[int, int]) -> str:
    return f"{piece[0]} x {piece[1]}"


def norms(dtype: str) -> Iterator[dict[str, Any]]:
    """A group norm and swish, fused and plain."""
    from latentdiff import fused
    from latentdiff.models.norms import group_norm

    chosen = fused.LARGE
    for size, channels in NORMS:
        layer = group_norm(GROUPS, 1e-5, "norm", dtype, swish=True)
        layer.build((BATCH, size, size, channels))
        arrays = [_random(dtype, BATCH, size, size, channels)]
        taken = "fused" if fused.LARGE <= math.prod(arrays[0].shape) else "plain"
        found = {}
        for way, least in (("fused", 0), ("plain", 2**62)):
            fused.LARGE = least
            found.update(_milliseconds({way: lambda x, layer=layer: layer(x)}, arrays))
        fused.LARGE = chosen
        yield {"what": "group norm and swish", "size": [size, size, channels], "taken": taken, **found}


def _random(dtype: str, *shape: int):
    import tensorflow as tf

    return tf.cast(tf.random.normal(shape), dtype)


def _milliseconds(ways: dict[str, Callable[..., Any]], arrays: list[Any]) -> dict[str, float]:
    """The least of several repetitions, each of as many calls as make `SECONDS`, of each way in turn."""
    from latentdiff.backend import Compiled, to_numpy

    compiled = {name: Compiled(way, []) for name, way in ways.items()}

    def seconds(name: str, calls: int) -> float:
        _, took = machine.timed(lambda: [to_numpy(compiled[name](*arrays)) for _ in range(calls)])
        return took["wall_s"] / calls

    for name in ways:
        seconds(name, 1)  # is traced
    calls = {name: max(1, round(SECONDS / seconds(name, 1))) for name in ways}
    found = [{name: seconds(name, calls[name]) for name in ways} for _ in range(REPETITIONS)]
    return {name: round(1000 * min(each[name] for each in found), 3) for name in ways}


def line(found: dict[str, Any]) -> str:
    """To be read; the way that is taken between stars."""
    ways = {name: value for name, value in found.items() if name not in ("what", "size", "taken")}
    said = (
        f"*{name} {value:.2f}*" if name == found["taken"] else f"{name} {value:.2f}" for name, value in ways.items()
    )
    return f"{found['what']:22s}{' x '.join(map(str, found['size'])):18s}{', '.join(said)} ms"


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.choices", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0])
    parser.add_argument("--output", type=Path, help="JSON; default: choices-DTYPE.json in benchmarks/results/")
    options = parser.parse_args(arguments)
    if os.environ.setdefault("KERAS_BACKEND", "tensorflow") != "tensorflow":
        parser.error("KERAS_BACKEND must be tensorflow, whose ways are compared.")
    found = measure(options.dtype)
    print("\n".join(map(line, found)))
    output = options.output or RESULTS / f"choices-{options.dtype}.json"
    output.write_text(json.dumps({"machine": machine.describe(), "ways": found}, indent=1) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
