"""Stable Diffusion 1.5 and 2.1 loaded here and by diffusers: peak memory, time, and whether both then say the same.

    python -m benchmarks.loading

Models of full size with random weights are made by diffusers and transformers in float16 and removed at the end. Every
load has a process of its own, one after the other, with its files in the page cache. `results/loading.json` holds
what came out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks import machine

RESULTS = Path(__file__).parent / "results" / "loading.json"
SIZES = ("sd15", "sd21")
DTYPES = ("float32", "float16", "bfloat16")
COUNTS = {  # parameters and tensors
    "sd15": {"unet": (859_520_964, 686), "autoencoder": (83_653_863, 248), "text_encoder": (123_060_480, 196)},
    "sd21": {"unet": (865_910_724, 686), "autoencoder": (83_653_863, 248), "text_encoder": (340_387_840, 372)},
}
TOLERANCE = 2e-4  # of the largest magnitude, in float32


def inputs(size: str) -> dict[str, np.ndarray]:
    """What the parts are asked: tokens (1, 77), latent (1, 32, 32, 4), context (1, 77, D), image (1, 256, 256, 3)."""
    rng = np.random.default_rng(0)
    tokens = np.full((1, 77), 49407, "int32")
    tokens[0, :20] = [49406, *rng.integers(49405, size=19)]
    return {
        "tokens": tokens,
        "latent": rng.standard_normal((1, 32, 32, 4)).astype("float32"),
        "context": rng.standard_normal((1, 77, 768 if size == "sd15" else 1024)).astype("float32"),
        "timestep": np.array([501], "float32"),
        "image": rng.uniform(-1, 1, (1, 256, 256, 3)).astype("float32"),
    }


class Ours:
    """Loads and asks with this package."""

    def __init__(self):
        import keras

        import latentdiff

        keras.ops.zeros(())  # finds the devices
        self._class = latentdiff.TextToImage

    def load(self, source: Path, directory: Path, dtype: str):
        prediction = "v" if source.is_file() and "sd21" in source.name else None  # its file does not say
        return self._class.from_preset(source, dtype=dtype, prediction=prediction)

    def counts(self, pipe) -> dict[str, list[int]]:
        from latentdiff.presets import named_variables

        networks = {kind: getattr(pipe, kind) for kind in COUNTS["sd15"]}
        return {kind: [net.count_params(), len(list(named_variables(net)))] for kind, net in networks.items()}

    def outputs(self, pipe, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        asked = {name: given[name] for name in ("latent", "timestep", "context")}
        said = {
            "context": pipe.text_encoder(given["tokens"]),
            "prediction": pipe.unet(asked),
            "encoded": pipe.autoencoder.encode(given["image"]),
            "decoded": pipe.autoencoder.decode(given["latent"]),
        }
        return {name: np.asarray(array) for name, array in said.items()}


class Theirs:
    """Loads and asks with diffusers."""

    def __init__(self):
        import diffusers
        import torch

        diffusers.utils.logging.disable_progress_bar()
        self._class, self._torch = diffusers.StableDiffusionPipeline, torch  # naming it imports it

    def load(self, source: Path, directory: Path, dtype: str):
        choices = {"torch_dtype": getattr(self._torch, dtype), "safety_checker": None}
        if source.is_dir():
            return self._class.from_pretrained(source, requires_safety_checker=False, **choices)
        return self._class.from_single_file(source, config=str(directory), local_files_only=True, **choices)

    def counts(self, pipe) -> dict[str, list[int]]:
        models = {"unet": pipe.unet, "autoencoder": pipe.vae, "text_encoder": pipe.text_encoder}
        states = {kind: list(model.state_dict().values()) for kind, model in models.items()}
        return {kind: [sum(tensor.numel() for tensor in state), len(state)] for kind, state in states.items()}

    def outputs(self, pipe, given: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import reference

        return {
            "context": reference.context(pipe, given["tokens"]),
            "prediction": reference.unet_output(pipe.unet, given["latent"], given["timestep"], given["context"]),
            "encoded": reference.encoded(pipe.vae, given["image"]),
            "decoded": reference.decoded(pipe.vae, given["latent"]),
        }


SYSTEMS = {"latentdiff": Ours, "diffusers": Theirs}


def load(system: str, size: str, form: str, dtype: str, root: Path) -> dict[str, object]:
    """One load, in this process: its figures; in float32 also what the parts say, in `root`, and their counts."""
    asker = SYSTEMS[system]()
    directory, file = paths(root, size)
    with machine.Meter() as meter:
        pipe = asker.load(directory if form == "directory" else file, directory, dtype)
    said = {"size": size, "form": form, "dtype": dtype, "system": system, **meter.figures}
    if dtype == "float32":
        said["counts"] = asker.counts(pipe)
        np.savez(root / f"{system}-{size}-{form}.npz", **asker.outputs(pipe, inputs(size)))
    return said


def paths(root: Path, size: str) -> tuple[Path, Path]:
    """The directory and the single file of a model."""
    return root / size, root / f"{size}.safetensors"


def differences(size: str, form: str, root: Path) -> dict[str, float]:
    """Output -> the largest difference between the systems over the largest magnitude.

    Raises:
        AssertionError: one is over the tolerance.
    """
    ours, theirs = (np.load(root / f"{system}-{size}-{form}.npz") for system in SYSTEMS)
    found = {name: float(np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max()) for name in theirs}
    assert max(found.values()) < TOLERANCE, found
    return found


def measure(sizes: list[str], dtypes: list[str], root: Path) -> dict[str, object]:
    """Makes each model, loads it in every way, and compares."""
    loads, errors = [], []
    for size in sizes:
        started("make", "--size", size, "--root", root)
        for form in ("directory", "file"):
            for dtype in dtypes:
                for system in SYSTEMS:
                    read_through(root)
                    arguments = ("--size", size, "--form", form, "--dtype", dtype, "--system", system, "--root", root)
                    loads.append(json.loads(started("load", *arguments)))
                    print(json.dumps(loads[-1]), flush=True)
                    counts = {kind: tuple(each) for kind, each in loads[-1].get("counts", {}).items()}
                    assert counts in ({}, COUNTS[size]), counts
            if "float32" in dtypes:
                errors.append({"size": size, "form": form, **differences(size, form, root)})
                print(json.dumps(errors[-1]), flush=True)
        shutil.rmtree(root / size)
        (root / f"{size}.safetensors").unlink()
    model = {size: sum(parameters for parameters, _ in COUNTS[size].values()) for size in sizes}
    return {"machine": machine.describe(), "parameters": model, "loads": loads, "errors": errors}


def started(step: str, *arguments: object) -> str:
    """The last line that a step of this program prints, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.loading", "--step", step, *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout.strip().rpartition("\n")[2]


def read_through(root: Path) -> None:
    """Brings every file into the page cache."""
    for path in root.rglob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.read(2**24):
                pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=tuple(COUNTS), help="default: both")
    parser.add_argument("--dtype", choices=DTYPES, help="default: all")
    parser.add_argument("--root", type=Path, help="where the models are for the while; 6 GB; default: a new directory")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"default: {RESULTS.name} in results/")
    for name, choices in (("step", ("make", "load")), ("system", tuple(SYSTEMS)), ("form", ("directory", "file"))):
        parser.add_argument(f"--{name}", choices=choices, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step == "make":
        from benchmarks import big_models

        big_models.write(options.size, *paths(options.root, options.size))
    elif options.step == "load":
        print(json.dumps(load(options.system, options.size, options.form, options.dtype, options.root)))
    else:
        sizes = [options.size] if options.size else list(COUNTS)
        dtypes = [options.dtype] if options.dtype else list(DTYPES)
        with tempfile.TemporaryDirectory(dir=options.root) as root:
            options.output.write_text(json.dumps(measure(sizes, dtypes, Path(root)), indent=2) + "\n")


if __name__ == "__main__":
    main()
