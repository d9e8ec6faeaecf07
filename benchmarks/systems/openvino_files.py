"""OpenVINO on diffusers' networks, converted once, with static shapes; tokenizer and scheduler are theirs.

So does optimum-intel, which would hold torch and its own pipeline around the same files.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino

from benchmarks import weights
from benchmarks.cases import GUIDANCE_SCALE, PROMPT
from benchmarks.systems import Job

HINTS = {"float32": "f32", "bfloat16": "bf16"}


class Asker:
    """See `systems.System`."""

    def __init__(self, job: Job):
        self.job, self.files = job, job.files
        self.core = openvino.Core()
        self.hints = {
            "INFERENCE_PRECISION_HINT": HINTS[job.case.dtype],
            "INFERENCE_NUM_THREADS": job.threads,
            "PERFORMANCE_HINT": "LATENCY",
        }

    def prepare(self) -> None:
        """Writes OpenVINO's files of the model, weights in float16, whole or not at all."""
        import diffusers
        import torch
        import transformers

        class First(torch.nn.Module):
            """A network's method that gives the first thing it says."""

            def __init__(self, network: torch.nn.Module, method: str = "forward"):
                super().__init__()
                self.network, self.method = network, method

            def forward(self, *arguments: torch.Tensor) -> torch.Tensor:
                return getattr(self.network, self.method)(*arguments, return_dict=False)[0]

        given = weights.inputs(self.job.directory, self.job.case.pixels)
        tokens, latent = torch.from_numpy(given["tokens"]).long(), torch.from_numpy(_first(given["latent"]))
        timestep, context = torch.from_numpy(given["timestep"]), torch.from_numpy(given["context"])
        fresh = self.files.with_name(f"{self.files.name}.part")
        fresh.mkdir(exist_ok=True)
        for name, network_class, method, examples in (
            ("text_encoder", transformers.CLIPTextModel, "forward", (tokens,)),
            ("unet", diffusers.UNet2DConditionModel, "forward", (torch.cat([latent] * 2), timestep, context)),
            ("vae", diffusers.AutoencoderKL, "decode", (latent,)),
        ):
            network = network_class.from_pretrained(self.job.directory, subfolder=name, dtype=torch.float32).eval()
            with torch.no_grad():
                model = openvino.convert_model(First(network, method), example_input=examples)
            openvino.save_model(model, fresh / f"{name}.xml", compress_to_fp16=True)
        fresh.rename(self.files)

    def unet(self) -> Callable[[], np.ndarray]:
        """Gives the prediction (2, h, w, c)."""
        given = weights.inputs(self.job.directory, self.job.case.pixels)
        latent = _first(np.concatenate([given["latent"]] * 2))
        unet = self._compiled("unet", latent, given["timestep"], given["context"])
        return lambda: np.moveaxis(unet(latent, given["timestep"], given["context"]), 1, -1)

    def text(self) -> Callable[[], np.ndarray]:
        """Gives the context (1, S, D)."""
        tokens = weights.inputs(self.job.directory)["tokens"].astype("int64")
        encoder = self._compiled("text_encoder", tokens)
        return lambda: encoder(tokens)

    def decode(self) -> Callable[[], np.ndarray]:
        """Gives the image (1, H, W, 3)."""
        import diffusers

        scale = diffusers.AutoencoderKL.load_config(self.job.directory, subfolder="vae")["scaling_factor"]
        latent = _first(weights.inputs(self.job.directory, self.job.case.pixels)["latent"] / np.float32(scale))
        decoder = self._compiled("vae", latent)
        return lambda: np.moveaxis(decoder(latent), 1, -1)

    def generate(self, path: Path) -> np.ndarray:
        """Writes a picture, uint8 (H, W, 3), and gives it."""
        from PIL import Image

        latent, scale = self._latent(self.job.num_steps)
        latent = latent / np.float32(scale)
        decoded = np.moveaxis(self._compiled("vae", latent)(latent)[0], 0, -1)
        image = (np.clip(decoded / 2 + 0.5, 0, 1) * 255).round().astype("uint8")
        Image.fromarray(image).save(path)
        return image

    def start(self) -> None:
        """Loads, the decoder too, and makes the first step."""
        latent, _ = self._latent(1)
        self._compiled("vae", latent)

    def _latent(self, num_steps: int) -> tuple[np.ndarray, float]:
        """The sampled latent (1, c, h, w), and what scales it."""
        import torch
        from diffusers import AutoencoderKL, DDIMScheduler
        from transformers import CLIPTokenizer

        tokenizer = CLIPTokenizer.from_pretrained(self.job.directory, subfolder="tokenizer")
        scheduler = DDIMScheduler.from_pretrained(self.job.directory, subfolder="scheduler")
        scale = AutoencoderKL.load_config(self.job.directory, subfolder="vae")["scaling_factor"]
        told = tokenizer(["", PROMPT], padding="max_length", max_length=tokenizer.model_max_length, truncation=True)
        tokens = np.array(told.input_ids, "int64")
        context = self._compiled("text_encoder", tokens)(tokens)
        latent = _first(weights.inputs(self.job.directory, self.job.case.pixels)["latent"])
        unet = self._compiled("unet", np.concatenate([latent] * 2), np.zeros(2, "float32"), context)
        scheduler.set_timesteps(num_steps)
        for t in scheduler.timesteps:
            both = unet(np.concatenate([latent] * 2), np.full(2, float(t), "float32"), context)
            unconditional, conditional = np.split(both, 2)
            guided = unconditional + np.float32(GUIDANCE_SCALE) * (conditional - unconditional)
            latent = scheduler.step(torch.from_numpy(guided), t, torch.from_numpy(latent)).prev_sample.numpy()
        return latent, scale

    def _compiled(self, name: str, *examples: np.ndarray) -> Callable[..., np.ndarray]:
        """A network for inputs shaped like the examples."""
        model: Any = self.core.read_model(self.files / f"{name}.xml")
        model.reshape({i: list(array.shape) for i, array in enumerate(examples)})
        request = self.core.compile_model(model, "CPU", self.hints).create_infer_request()

        def ask(*arrays: np.ndarray) -> np.ndarray:
            return request.infer(dict(enumerate(arrays)))[0].copy()

        return ask


def _first(array: np.ndarray) -> np.ndarray:
    """(B, h, w, C) -> (B, C, h, w)"""
    return np.ascontiguousarray(np.moveaxis(array, -1, 1))
