"""Decoding of large pictures, whole and in strips, by Stable Diffusion's decoder: peak memory, time, difference.

    python -m benchmarks.tiled_decoding

Weights are random. Every decoding has a process of its own; its figures include the tracing.
`results/tiled_decoding.json` holds what came out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import machine
from benchmarks.cases import DTYPES

RESULTS = Path(__file__).parent / "results" / "tiled_decoding.json"
WAYS = ("whole", "tiled")


def decode(pixels: int, dtype: str, way: str, root: Path) -> dict[str, object]:
    """One picture, in this process: its figures, and itself in `root`."""
    from latentdiff.backend import Compiled, to_numpy
    from latentdiff.models.autoencoder import Autoencoder
    from latentdiff.models.layers import blank_weights
    from latentdiff.tiled_decoder import TiledDecoder

    with blank_weights():
        autoencoder = Autoencoder(dtype=dtype)
    random = np.random.default_rng(0)
    for variable in autoencoder.decoder.variables:
        values = random.standard_normal(variable.shape, "float32")
        if variable.path.endswith("gamma"):
            values = 1 + 0.2 * values
        elif len(variable.shape) == 1:
            values = 0.2 * values
        else:
            values = values / np.sqrt(np.prod(variable.shape[:-1]))
        variable.assign(values)
    latent = random.standard_normal((1, pixels // 8, pixels // 8, 4), "float32")
    whole = Compiled(autoencoder.decode, [autoencoder])
    tiled = TiledDecoder(autoencoder)
    function = {"whole": lambda: to_numpy(whole(latent), "float32"), "tiled": lambda: tiled(latent)}
    with machine.Meter() as meter:
        image = function[way]()
    np.save(root / f"{way}.npy", image)
    return {"pixels": pixels, "dtype": dtype, "way": way, **meter.figures}


def measure(sizes: list[int], dtypes: list[str], root: Path) -> dict[str, object]:
    """Decodes each size in each dtype in either way, and compares."""
    runs, differences = [], []
    for pixels, dtype in itertools.product(sizes, dtypes):
        for way in WAYS:
            asked = {"--root": root, "--way": way, "--pixels": pixels, "--dtypes": dtype}
            command = [sys.executable, "-m", "benchmarks.tiled_decoding", *map(str, itertools.chain(*asked.items()))]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            runs.append(json.loads(done.stdout.strip().rpartition("\n")[2]))
            print(json.dumps(runs[-1]), flush=True)
        images = [np.load(root / f"{way}.npy") for way in WAYS]
        levels = [np.clip(np.round((image + 1) * 127.5), 0, 255) for image in images]
        found = {
            "pixels": pixels,
            "dtype": dtype,
            "standard_deviation": float(images[0].std()),
            "largest_difference": float(np.abs(images[0] - images[1]).max()),
            "largest_difference_in_grey_levels": int(np.abs(levels[0] - levels[1]).max()),
        }
        differences.append(found)
        print(json.dumps(found), flush=True)
    return {"machine": machine.describe(), "runs": runs, "differences": differences}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pixels", type=int, nargs="+", default=[1024], help="of a side; default: 1024")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, help="default: both")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"default: {RESULTS.name} in results/")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way:
        print(json.dumps(decode(options.pixels[0], options.dtypes[0], options.way, options.root)))
    else:
        with tempfile.TemporaryDirectory() as root:
            options.output.write_text(json.dumps(measure(options.pixels, options.dtypes, Path(root)), indent=2) + "\n")


if __name__ == "__main__":
    main()
