"""What it takes to export and to serve a model of Stable Diffusion 1.x's size, with random weights.

usage: python -m benchmarks.serving_size --output benchmarks/results/serving_size.json

Writes a SavedModel of 1.07 billion parameters into a temporary directory, loads it in another process, and asks for one
picture. Needs 4.5 GB of disk in float32.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import machine


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving_size",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--dtype", default="float32")
    add("--pixels", type=int, default=256, help="height and width")
    add("--num-steps", type=int, default=1)
    add("--output", type=Path, help="JSON; default: none")
    add("--folder", type=Path, help="where the model is written; default: a temporary directory")
    add("--phase", choices=("export", "serve"), help=argparse.SUPPRESS)  # each in a process of its own
    options = parser.parse_args()
    if options.phase is not None:
        phase = write if options.phase == "export" else serve
        print(json.dumps(phase(options)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        command = [sys.executable, "-m", "benchmarks.serving_size", "--folder", folder, "--dtype", options.dtype]
        command += ["--pixels", str(options.pixels), "--num-steps", str(options.num_steps)]
        result: dict[str, Any] = {"machine": machine.describe(), "dtype": options.dtype, "pixels": options.pixels}
        for phase in ("export", "serve"):
            done = subprocess.run([*command, "--phase", phase], stdout=subprocess.PIPE, text=True, check=True)
            result[phase] = json.loads(done.stdout.splitlines()[-1])
            print(phase, json.dumps(result[phase]), flush=True)
    if options.output is not None:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def write(options: argparse.Namespace) -> dict[str, Any]:
    """Builds the pipeline and exports it."""
    import keras

    from latentdiff.checkpoints.clip_vocabulary import clip_tokenizer
    from latentdiff.checkpoints.diffusers_scheduler import SamplerSettings
    from latentdiff.export import export_saved_model
    from latentdiff.models.autoencoder import Autoencoder
    from latentdiff.models.text_encoder import CLIPTextEncoder
    from latentdiff.models.tokenizer import CLIPTokenizer
    from latentdiff.models.unet import UNet
    from latentdiff.pipeline import TextToImage
    from latentdiff.presets import Parts

    keras.utils.set_random_seed(0)

    def build() -> TextToImage:
        parts = Parts(
            tokenizer=CLIPTokenizer(**clip_tokenizer()),
            text_encoder=CLIPTextEncoder(dtype=options.dtype),
            unet=UNet(dtype=options.dtype),
            autoencoder=Autoencoder(dtype=options.dtype),
            settings=SamplerSettings(sampler="ddim"),
            sample_size=(64, 64),
        )
        return TextToImage(parts)

    pipe, built = machine.timed(build)
    directory = options.folder / "1"
    size = [(options.pixels, options.pixels)]
    _, exported = machine.timed(lambda: export_saved_model(pipe, directory, sizes=size))
    networks = (pipe.text_encoder, pipe.unet, pipe.autoencoder)
    weights = sum(variable.value.dtype.size * network_size(variable) for n in networks for variable in n.variables)
    disk = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    return {
        "parameters": sum(network.count_params() for network in networks),
        "build": built,
        "export": exported,
        "peak_memory_gib": machine.peak_memory_gib(),
        "weights_bytes": weights,
        "disk_bytes": disk,
        "disk_over_weights": disk / weights,
    }


def network_size(variable: Any) -> int:
    """How many numbers a variable holds."""
    return int(variable.value.shape.num_elements())


def serve(options: argparse.Namespace) -> dict[str, Any]:
    """Loads the SavedModel and asks for one picture, in a process that knows TensorFlow alone."""
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # as `import latentdiff` says it
    import tensorflow as tf

    loaded, load = machine.timed(lambda: tf.saved_model.load(str(options.folder / "1")))
    signature = loaded.signatures["generate"]
    one = {
        "prompt": tf.constant(["a red heart"]),
        "negative_prompt": tf.constant([""]),
        "seed": tf.constant([0], tf.int64),
        "num_steps": tf.constant([options.num_steps]),
        "guidance_scale": tf.constant([7.5]),
        "sampler": tf.constant(["ddim"]),
    }
    (file,), picture = machine.timed(lambda: signature(**one)["image_bytes"].numpy())
    shape = tf.io.decode_png(file).shape.as_list()
    return {"load": load, "picture": picture, "shape": shape, "peak_memory_gib": machine.peak_memory_gib()}


if __name__ == "__main__":
    main()
