"""KerasCV 0.9, with plain graphs or with XLA; it has Stable Diffusion's own size alone.

Its files are written from the model's directory once, in the layout of those that KerasCV publishes.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["TF_ENABLE_ONEDNN_OPTS"] = "1"  # as `import latentdiff` has it

import h5py
import keras
import keras_cv
import numpy as np
from keras.src.legacy.saving.legacy_h5_format import load_weights_from_hdf5_group, save_weights_to_hdf5_group
from keras_cv.src.models import stable_diffusion as kcv

from benchmarks import weights
from benchmarks.cases import GUIDANCE_SCALE, PROMPT
from benchmarks.systems import Job

FILES = {"text_encoder": "kcv_encoder.h5", "unet": "kcv_diffusion_model.h5", "decoder": "kcv_decoder.h5"}


class Asker:
    """See `systems.System`.

    Args:
        job: what to do.
        xla: whether networks are compiled by XLA.
    """

    def __init__(self, job: Job, xla: bool):
        self.job, self.xla, self.files = job, xla, job.files
        keras.config.set_dtype_policy("mixed_bfloat16" if job.case.dtype == "bfloat16" else job.case.dtype)

    def prepare(self) -> None:
        """Writes KerasCV's files of the model, whole or not at all."""
        from latentdiff.checkpoints.diffusers import key_map
        from latentdiff.checkpoints.kerascv_networks import layers_of
        from latentdiff.checkpoints.sources import open_source

        fresh = self.files.with_name(f"{self.files.name}.part")
        fresh.mkdir(exist_ok=True)
        source = open_source(self.job.directory)
        for name, file in FILES.items():
            component = source.component("autoencoder" if name == "decoder" else name, dtype="float32")
            groups = layers_of(key_map(component.kind, component.config), name)
            network = self._built(name)
            layers = [layer for layer in network.layers if layer.weights]
            for entries, layer in zip(groups.values(), layers, strict=True):
                for entry, variable in zip(entries, layer.weights, strict=True):
                    variable.assign(np.reshape(component.weights[entry.path], variable.shape))
            with h5py.File(fresh / file, "w") as target:
                save_weights_to_hdf5_group(target, network)
        fresh.rename(self.files)

    def unet(self) -> Callable[[], np.ndarray]:
        """Gives the prediction (2, h, w, c)."""
        unet = self._loaded("unet")
        given = weights.inputs(self.job.directory, self.job.case.pixels)
        asked = {
            "latent": np.concatenate([given["latent"]] * 2),
            "timestep_embedding": _embedding(given["timestep"]),
            "context": given["context"],
        }
        return lambda: _float32(unet.predict_on_batch(asked))

    def text(self) -> Callable[[], np.ndarray]:
        """Gives the context (1, S, D)."""
        encoder = self._loaded("text_encoder")
        tokens = weights.inputs(self.job.directory)["tokens"]
        asked = {"tokens": tokens, "positions": np.arange(tokens.shape[1], dtype="int32")[None]}
        return lambda: _float32(encoder.predict_on_batch(asked))

    def decode(self) -> Callable[[], np.ndarray]:
        """Gives the image (1, H, W, 3)."""
        decoder = self._loaded("decoder")
        latent = weights.inputs(self.job.directory, self.job.case.pixels)["latent"]
        return lambda: _float32(decoder.predict_on_batch(latent))

    def generate(self, path: Path) -> np.ndarray:
        """Writes a picture, uint8 (H, W, 3), and gives it."""
        from PIL import Image

        pipe, pixels = self._pipeline(), self.job.case.pixels
        with contextlib.redirect_stdout(io.StringIO()):  # its progress bar
            (image,) = pipe.generate_image(
                pipe.encode_text(PROMPT),
                num_steps=self.job.num_steps,
                unconditional_guidance_scale=GUIDANCE_SCALE,
                diffusion_noise=weights.inputs(self.job.directory, pixels)["latent"],
            )
        Image.fromarray(image).save(path)
        return image

    def start(self) -> None:
        """Loads, encodes both texts, and makes one evaluation."""
        pipe = self._pipeline()
        given = weights.inputs(self.job.directory, self.job.case.pixels)
        context = [_float32(pipe.encode_text(text)) for text in ("", PROMPT)]
        asked = {"timestep_embedding": _embedding(given["timestep"]), "context": np.concatenate(context)}
        pipe.diffusion_model.predict_on_batch({"latent": np.concatenate([given["latent"]] * 2), **asked})

    def _pipeline(self) -> Any:
        pixels = self.job.case.pixels
        pipe = keras_cv.models.StableDiffusion(pixels, pixels, jit_compile=self.xla)
        pipe._text_encoder, pipe._diffusion_model = self._loaded("text_encoder"), self._loaded("unet")
        pipe._decoder = self._loaded("decoder")
        pipe._tokenizer = self._tokenizer()
        return pipe

    def _tokenizer(self) -> Any:
        """KerasCV's own, with the model's merges, which it would fetch from the network."""
        merges = self.files / "merges.txt.gz"
        merges.write_bytes(gzip.compress((self.job.directory / "tokenizer" / "merges.txt").read_bytes()))
        return kcv.SimpleTokenizer(str(merges))

    def _built(self, name: str) -> Any:
        pixels = self.job.case.pixels or 512
        length = weights.inputs(self.job.directory)["tokens"].shape[1]
        if name == "text_encoder":
            return kcv.TextEncoder(length, download_weights=False)
        if name == "unet":
            return kcv.DiffusionModel(pixels, pixels, length, download_weights=False)
        return kcv.Decoder(pixels, pixels, download_weights=False)

    def _loaded(self, name: str) -> Any:
        network = self._built(name)
        with h5py.File(self.files / FILES[name]) as file:
            load_weights_from_hdf5_group(file, network)
        # Said outright: Keras 3 compiles with XLA wherever nothing is said.
        network.compile(jit_compile=self.xla)
        return network


def _embedding(timestep: np.ndarray) -> np.ndarray:
    """The timestep's cosines and sines, which KerasCV makes outside of its network: (B, 320)."""
    angles = timestep[:, None] * np.exp(-np.log(10000) * np.arange(160) / 160)
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1).astype("float32")


def _float32(array: Any) -> np.ndarray:
    return np.asarray(array).astype("float32")
