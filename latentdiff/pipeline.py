"""The whole arrow: prompt -> tokens -> context -> latent -> image.

Rombach et al. 2022, sec. 3, arXiv:2112.10752.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import keras
import numpy as np
from keras import ops

from latentdiff import presets
from latentdiff.backend import Compiled, has_gpu, to_numpy
from latentdiff.diffusion.denoiser import Denoiser
from latentdiff.diffusion.guidance import Guided
from latentdiff.diffusion.noise import normal
from latentdiff.diffusion.samplers import step
from latentdiff.engine import OpenvinoNetwork, StepAfter, check_cache_interval, check_engine, check_free, check_tiled
from latentdiff.generate_arguments import (
    check_choices,
    read_noise,
    read_prompts,
    read_seeds,
    read_size,
    read_table,
)
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.models.text_encoder import CLIPTextEncoder
from latentdiff.models.unet import UNet
from latentdiff.sampling_run import ProgressBar, SamplingRun
from latentdiff.tiled_decoder import TiledDecoder
from latentdiff.weights_on_demand import WeightsOnDemand

WHOLE = 1024 * 1024  # pixels up to which a picture is decoded whole


class TextToImage:
    """Stable Diffusion: prompts go in, images come out.

    Args:
        parts: tokenizer, networks, sampler's settings; see `presets.Parts`.
        engine: what computes the networks in `generate`: "keras", or "openvino", on the processor, with the weights as
            they are at the first picture.

    Attributes:
        tokenizer, text_encoder, unet, autoencoder: the parts, each of which can be called alone.
        settings: schedule, prediction and the directory's own sampler.
        dtype: what the networks compute in, such as "float32".
        loops_inside: whether the sampler's loop is in one compiled function where nobody wants to see its steps; by
            default on a GPU, which then never waits for Python.

    Raises:
        ValueError, ImportError: the engine cannot be had; see `engine.check_engine`.
    """

    def __init__(self, parts: presets.Parts, engine: str = "keras"):
        check_engine(engine, keras.backend.backend())
        self.parts, self.engine = parts, engine
        self.loops_inside = has_gpu()
        check_free(engine, parts.files)
        self.tokenizer, self.settings = parts.tokenizer, parts.settings
        self._weights = WeightsOnDemand(parts)
        self.schedule = presets.make_schedule(parts.settings)
        if engine == "openvino":
            self._encode = OpenvinoNetwork(lambda: _in_float32(parts.text_encoder, lambda network: network), self.dtype)
            self._predict = OpenvinoNetwork(lambda: _in_float32(parts.unet, _after_embedding), self.dtype)
            self._decode = OpenvinoNetwork(lambda: _in_float32(parts.autoencoder, _to_grey_levels), self.dtype)
        else:
            self._encode = Compiled(parts.text_encoder, [parts.text_encoder])
            self._predict = None
            self._decode = Compiled(lambda latent: grey_levels(parts.autoencoder.decode(latent)), [parts.autoencoder])
        self._decode_tiled = TiledDecoder(parts.autoencoder)
        self._normal = Compiled(self._noise, [])
        self._features = Compiled(self._deep_features, [parts.unet])
        self._steps: dict[tuple[bool, float | None, bool], Compiled | StepAfter] = {}
        self._loops: dict[tuple[bool, float | None], Compiled] = {}

    @classmethod
    def from_preset(
        cls,
        preset: str | os.PathLike,
        dtype: str | None = None,
        *,
        variant: str | None = None,
        ema: bool = False,
        prediction: str | None = None,
        engine: str = "keras",
        free: Collection[str] = (),
    ) -> TextToImage:
        """The pipeline of a model directory, or of a single file.

        Args:
            preset: a name in `weights/`, such as "emoji", a diffusers directory of Stable Diffusion 1.x or 2.x, or one
                `.safetensors` file of theirs in LDM's layout.
            dtype: what the networks hold and compute in: "float32", "bfloat16", "float16"; None chooses by the device.
            variant: of the weights' files, for example "fp16"; None takes the plain ones, or the only variant there is.
            ema: whether the averaged weights of the UNet are read, where a single file holds both kinds.
            prediction: "eps", "v" or "x0", what the UNet predicts, where the files do not say it: a single file of
                Stable Diffusion 2.x does not.
            engine: what computes the networks in `generate`: "keras", or "openvino", on the processor, with the weights
                as they are at the first picture.
                Seeds give the same pictures, in float32 within one grey level.
            free: of "text_encoder", "unet" and "autoencoder" those whose weights `generate` reads from the files when
                it comes to them, and frees after that; none with OpenVINO. One that was taken of the pipeline, as
                `pipe.unet`, is read then and stays.

        Raises:
            ValueError: the name is unknown, or the files are malformed or ask for what cannot be done here; the engine
                is unknown, or not for this backend; `free` holds another name.
            FileNotFoundError: a file is missing.
            ImportError: the engine is not installed.
        """
        check_engine(engine, keras.backend.backend())
        check_free(engine, free)
        parts = presets.load_pipeline(preset, dtype, variant=variant, ema=ema, prediction=prediction, free=free)
        return cls(parts, engine)

    def save_to_preset(
        self,
        directory: str | os.PathLike,
        dtype: str | None = "float32",
        overwrite: bool = False,
        *,
        max_shard_size: int | str | None = None,
    ) -> None:
        """Writes a diffusers directory, whole or not at all; see `presets.save_pipeline`."""
        with contextlib.ExitStack() as stack:
            for kind in self._weights.kinds:
                stack.enter_context(self._weights.held(kind))
            presets.save_pipeline(self.parts, directory, dtype, overwrite, max_shard_size=max_shard_size)

    @property
    def text_encoder(self) -> CLIPTextEncoder:
        return self._weights.take("text_encoder")  # pyright: ignore[reportReturnType]

    @property
    def unet(self) -> UNet:
        return self._weights.take("unet")  # pyright: ignore[reportReturnType]

    @property
    def autoencoder(self) -> Autoencoder:
        return self._weights.take("autoencoder")  # pyright: ignore[reportReturnType]

    @property
    def dtype(self) -> str:
        """What the networks compute in."""
        return self.parts.unet.get_layer("conv_in").dtype_policy.name

    @property
    def traces(self) -> int:
        """How often a function of this pipeline was traced so far; a second call like the first adds none."""
        functions = (self._encode, self._predict, self._decode, self._decode_tiled, self._normal, self._features)
        functions = (*functions, *self._steps.values(), *self._loops.values())
        return sum(function.traces for function in functions if function is not None)

    def generate(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] = "",
        num_images: int = 1,
        num_steps: int = 25,
        guidance_scale: float = 5.0,
        seed: int | Sequence[int] | None = None,
        *,
        sampler: str | None = None,
        height: int | None = None,
        width: int | None = None,
        guidance_rescale: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        cache_interval: int = 1,
        eta: float = 0.0,
        noise: Any = None,
        batch_size: int | None = None,
        tiled: bool | None = None,
        progress: bool = True,
        callback: Callable[[int, np.ndarray], bool | None] | None = None,
        output: str = "image",
    ) -> np.ndarray:
        """Images of prompts.

        Args:
            prompt: one or several; each makes `num_images` images, B in all, in the order of the prompts.
            negative_prompt: what guidance leads away from; one for all, or one for each prompt.
            num_images: images of each prompt.
            num_steps: the sampler's steps, 1 .. T.
            guidance_scale: 1 is the conditional model alone, at half the cost.
            seed: an int, then image i has seed + i; or one for each image; None is random.
            sampler: a name of `SAMPLERS`; None is the directory's own. Another keeps its schedule and spacing.
            height, width: of the images, in pixels, multiples of the autoencoder's factor; None is the model's own.
            guidance_rescale: 0 .. 1, see `guidance.guide`.
            guidance_interval: (low, high) of noise_to_signal outside of which the conditional model acts alone,
                at half the cost.
            cache_interval: one in so many of the sampler's rows computes the whole UNet, and its deep features serve
                those that follow, which compute the rest. 1 is the full model, and all that OpenVINO has; more is
                faster, and another picture.
            eta: DDIM's share of DDPM's noise, 0 .. 1.
            noise: (B, h, w, c) the initial noise in place of the seeds'; or (1 + R, B, h, w, c), with the fresh noise
                of each of the sampler's R rows after it.
            batch_size: how many images are made at a time; None is all.
            tiled: whether images are decoded one after the other in strips of rows, which takes less memory and gives
                the same, in float32 within one grey level; None is those of more than `WHOLE` pixels. Not OpenVINO's.
            progress: whether a bar shows the steps; where the loop is inside, at its end.
            callback: is told the sampler's row, from 1 on, and the latent (b, h, w, c) float32 after it, of each part
                of `batch_size` in turn. False ends the run there: that part is returned as it stands, and no later one.
            output: "image" or "latent".

        Returns:
            uint8 (B, H, W, 3); for "latent" the scaled latents, float32 (B, h, w, c).

        Raises:
            TypeError: a prompt is not text, or a seed not an integer.
            ValueError: a number is out of range, a name unknown, or a shape does not fit; all before any work.
        """
        prompts, negatives = read_prompts(prompt, negative_prompt, num_images)
        total = len(prompts) * num_images
        shape = self.latent_shape(height, width)
        table = read_table(sampler, num_steps, eta, self.settings, self.schedule)
        seeds = read_seeds(seed, total)
        noise = read_noise(noise, total, shape, table)
        check_choices(guidance_scale, guidance_rescale, guidance_interval, cache_interval, batch_size, tiled, output)
        check_cache_interval(self.engine, cache_interval)
        check_tiled(self.engine, tiled)
        tokens = np.repeat(self.tokenizer(prompts), num_images, axis=0)
        negative_tokens = np.repeat(self.tokenizer(negatives), total // len(negatives), axis=0)

        clip = self.settings.with_sampler(table.sampler).clip
        size = min(batch_size or total, total)
        starts = range(0, total, size)
        if tiled is None:
            tiled = self.engine == "keras" and shape[0] * shape[1] * self.parts.autoencoder.factor**2 > WHOLE
        bar = ProgressBar(table.num_rows * len(starts)) if progress else None

        def encoded(start: int) -> SamplingRun:
            part = slice(start, start + size)
            run = SamplingRun(self, table, clip, seeds[part], None if noise is None else noise[:, part], shape)
            run.guide(guidance_scale, guidance_rescale, guidance_interval)
            run.encode(tokens[part], negative_tokens[part])
            return run

        made, going = [], True
        # Weights that come and go do so once, and not for each part.
        for group in [starts] if self._weights.kinds else [[start] for start in starts]:
            with self._weights.held("text_encoder"):
                runs = [encoded(start) for start in group]
            latents = []
            untiled = size if output == "image" and not tiled else 0
            with self._weights.held("unet"), self._decoder_traced_beside(untiled, shape) as under_way:
                for run in runs:
                    latent, going = run.loop(bar, callback, cache_interval, under_way)
                    latents.append(self._finished(latent))
                    if not going:
                        break
            if output == "latent":
                made += latents
            else:
                with self._weights.held("autoencoder"):
                    made += [self._decoded(latent, tiled) for latent in latents]
            if not going:
                break
        return np.concatenate(made)

    def image(self, latent: Any) -> Any:
        """Scaled latents (B, h, w, c) -> images uint8 (B, H, W, 3), as tensors: the arrow's last part, uncompiled."""
        return grey_levels(self.autoencoder.decode(latent))

    def step_function(self, guided: bool, clip: float | None, shallow: bool = False) -> Compiled | StepAfter:
        """The compiled step; it serves every sampler, number of steps, scale and seed.

        It takes state (4, B, h, w, c), context (B or 2 B, S, D), timestep, signal, noise (), the sampler's row (4, 7),
        fresh noise (B, h, w, c), guidance's scale () and rescale (), and gives the next state. If `shallow`, it takes
        the UNet's deep features last, (B or 2 B, h, w, C), and computes the rest.
        """
        if (guided, clip, shallow) not in self._steps:
            compiled = Compiled(self._step_of(guided, clip, shallow), [self.parts.unet])
            embed = self.parts.unet.get_layer("timestep_embedding")
            step_after = self._predict and StepAfter(self._predict, embed, compiled)
            self._steps[guided, clip, shallow] = step_after or compiled
        return self._steps[guided, clip, shallow]

    def loop_function(self, guided: bool, clip: float | None) -> Compiled:
        """The sampler's whole loop as one compiled function, for accelerators; it serves what `step_function` serves.

        It takes state (4, B, h, w, c), context (B or 2 B, S, D), the split seeds, the table's number of rows () and its
        timestep, signal, noise (bound,) and matrix (bound, 4, 7), guidance's scale () and rescale (), and gives the
        last state. Every row has fresh noise, which is little beside the UNet, whether its sampler takes it or not.
        """
        if (guided, clip) not in self._loops:
            next_state = self._step_of(guided, clip)

            def run(state, context, seeds, num_rows, timestep, signal, noise, matrix, scale, rescale):
                def body(i, state):
                    fresh = self._noise(seeds, i + 1, state[0, 0])
                    row = (timestep[i], signal[i], noise[i], matrix[i])
                    return i + 1, next_state(state, context, *row, fresh, scale, rescale)

                return ops.while_loop(lambda i, _: i < num_rows, body, (ops.zeros((), "int32"), state))[1]

            self._loops[guided, clip] = Compiled(run, [self.parts.unet])
        return self._loops[guided, clip]

    def _step_of(self, guided: bool, clip: float | None, shallow: bool = False) -> Callable[..., Any]:
        shallow_network = self._split[1] if shallow else None

        def run(state, context, timestep, signal, noise, row, fresh, scale, rescale, *features):
            def network(x_t, t):
                if self._predict:
                    return context  # the prediction already, of a `StepAfter`
                if shallow_network:
                    return shallow_network([x_t, t, context, *features], training=False)
                return self.parts.unet({"latent": x_t, "timestep": t, "context": context}, training=False)

            denoiser = Denoiser(network, self.settings.prediction, clip=clip)
            guide = Guided(denoiser, scale, rescale=rescale) if guided else denoiser
            x0_hat, eps_hat = guide(state[0], timestep, signal, noise)
            return step(row, state, x0_hat, eps_hat, fresh)

        return run

    @functools.cached_property
    def _split(self) -> tuple[keras.Model, keras.Model]:
        return self.parts.unet.split()

    def _deep_features(self, state, context, timestep):
        """(B or 2 B, h, w, C), as many as there are contexts."""
        count = context.shape[0]
        latent = ops.concatenate([state[0]] * (count // state.shape[1]), axis=0)
        return self._split[0]([latent, ops.broadcast_to(timestep, (count,)), context], training=False)

    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, int, int]:
        """(h, w, c) of the latent of a picture of so many pixels; None is the model's own size.

        Raises:
            ValueError: a number of pixels is no positive multiple of the autoencoder's factor.
        """
        channels = self.parts.autoencoder.config["channels"]
        return (*read_size(height, width, self.parts.sample_size, channels), self.parts.autoencoder.latent_channels)

    def _finished(self, latent) -> np.ndarray:
        latent = to_numpy(latent, "float32")
        if not np.isfinite(latent).all():
            raise ValueError(
                "A latent must be finite. Received: NaN or infinity, of networks that compute in "
                f'{self.dtype}. dtype="float32" has the widest range.'
            )
        return latent

    @contextlib.contextmanager
    def _decoder_traced_beside(self, size: int, shape: tuple[int, int, int]) -> Iterator[Callable[[], None]]:
        """What to call after the sampler's first step: the later ones leave Python free to trace the decoder.

        Args:
            size: how many latents there will be at a time; none where the whole decoder is not wanted.
            shape: (h, w, c) of a latent.
        """
        decode = self._decode
        if not size or not isinstance(decode, Compiled):
            yield lambda: None
            return
        with ThreadPoolExecutor(1) as thread:

            def begin() -> None:
                # What fails in the thread fails again in the call, and is told there.
                with contextlib.suppress(RuntimeError):  # no thread can begin: the call will trace
                    thread.submit(decode.trace, (size, *shape))

            yield begin

    def _decoded(self, latent: np.ndarray, tiled: bool) -> np.ndarray:
        return to_numpy(grey_levels(self._decode_tiled(latent)) if tiled else self._decode(latent), "uint8")

    def _noise(self, seeds, step, like):
        return normal(seeds, step, like.shape)


def _in_float32(part: Any, network: Callable[[Any], keras.Model]) -> tuple[keras.Model, list[keras.Variable]]:
    """A model around a part in float32, which has no weights, and the variables that hold them."""
    blank = presets.blank_copy(part, "float32")
    model = network(blank)
    held = {id(variable): other for variable, other in zip(blank.variables, part.variables, strict=True)}
    return model, [held[id(variable)] for variable in model.variables]


def _after_embedding(unet: keras.Model) -> keras.Model:
    embedding = unet.get_layer("timestep_embedding").output
    return keras.Model([unet.input["latent"], embedding, unet.input["context"]], unet.output)


def _to_grey_levels(autoencoder: Any) -> keras.Model:
    latent = keras.Input((None, None, autoencoder.latent_channels), name="latent")
    return keras.Model(latent, grey_levels(autoencoder.decode(latent)))


def grey_levels(image: Any) -> Any:
    """uint8 of an image in [-1, 1], of any shape; what lies outside is cut off."""
    image = ops.cast(image, "float32")
    return ops.cast(ops.round(ops.clip((image + 1) * 127.5, 0, 255)), "uint8")
