"""The signatures of an exported pipeline: what a server's clients may call, functions over one set of weights.

    serving_default   prompt -> image_bytes, seed
    generate          prompt, negative_prompt, seed, num_steps, guidance_scale, sampler -> image_bytes, seed
    encode_text       prompt -> tokens, context
    denoise           latent, timestep, context -> prediction
    decode            latent -> image_bytes
    encode_image      image_bytes -> latent

Further sizes have signatures of the same names with the size behind them: `generate_512x768`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from latentdiff.export.arrow import Arrow
from latentdiff.export.requests import (
    FRESH_SEED,
    Limits,
    batch_of,
    check,
    checked,
    fresh_seeds,
    settings_of,
    shaped,
    spread,
)
from latentdiff.export.tokenizer import GraphTokenizer

SERVING_DEFAULT = "serving_default"
_PNG_START = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
_BYTES_PER_PIXEL = 8  # of a PNG that is taken: RGBA of 16 bits, as if nothing could be compressed


class Signatures:
    """The functions of a SavedModel, and the module that holds what they refer to, each variable once.

    Args:
        arrow: the networks and the samplers.
        tokenizer: prompts as strings -> tokens.
        limits: of every request.
        sizes: (height, width) in pixels; the first is the default.
        num_steps: the default.
        guidance_scale: the default.

    Attributes:
        functions: by the signature's name.
        module: the tokenizer's tables and the networks' variables, to be saved.
        defaults: of `generate`, as eager tensors.
    """

    def __init__(
        self,
        arrow: Arrow,
        tokenizer: GraphTokenizer,
        limits: Limits,
        sizes: Sequence[tuple[int, int]],
        *,
        num_steps: int,
        guidance_scale: float,
    ):
        self.arrow, self.tokenize, self.limits = arrow, tokenizer, limits
        self.module: Any = tf.Module()
        self.module.tokenizer = tokenizer
        self.module.rows = list(arrow.rows.values())
        pipeline = arrow.pipeline
        networks = (pipeline.text_encoder, pipeline.unet, pipeline.autoencoder)
        # TensorFlow's own variables and not Keras': the C++ runtime restores no other (it finds the handle of a Keras
        # variable twice in the graph, and one of the two is never restored).
        self.module.raw = [variable.value for network in networks for variable in network.variables]
        own = pipeline.settings.sampler
        self.defaults = {
            "negative_prompt": tf.constant([""]),
            "seed": tf.constant([FRESH_SEED], tf.int64),
            "num_steps": tf.constant([num_steps], tf.int32),
            "guidance_scale": tf.constant([guidance_scale], tf.float32),
            "sampler": tf.constant([own if own in arrow.book.samplers else arrow.book.samplers[0]]),
        }
        self._context = _traced(self._encode, tf.TensorSpec([None], tf.string))
        self.functions: dict[str, Callable[..., Any]] = {}
        for place, (height, width) in enumerate(sizes):
            self._add(height, width, f"_{height}x{width}" if place else "")

    def _add(self, height: int, width: int, suffix: str) -> None:
        autoencoder = self.arrow.pipeline.autoencoder
        factor, channels = autoencoder.factor, autoencoder.latent_channels
        shape = (height // factor, width // factor, channels)
        width_of_context = self.arrow.pipeline.text_encoder.output_shape[-1]
        length = self.arrow.pipeline.tokenizer.context_length
        strings = tf.TensorSpec([None], tf.string)

        default = self.defaults
        numbers, whole, long = (tf.TensorSpec([None], dtype) for dtype in (tf.float32, tf.int32, tf.int64))

        # Default arguments that are tensors become the signature's defaults, for clients that leave inputs out.
        def generate(
            prompt,
            negative_prompt=default["negative_prompt"],
            seed=default["seed"],
            num_steps=default["num_steps"],
            guidance_scale=default["guidance_scale"],
            sampler=default["sampler"],
        ):
            settings = {"seed": seed, "num_steps": num_steps, "guidance_scale": guidance_scale, "sampler": sampler}
            return self._generate(shape, png, prompt, negative_prompt, settings)

        # What several signatures call is a function of its own, which the SavedModel holds once.
        latents = tf.TensorSpec([None, *shape])
        png = _traced(self._png, latents)
        contexts = tf.TensorSpec([None, length, width_of_context])
        traced = {
            "generate": _traced(generate, strings, strings, long, whole, numbers, strings),
            "decode": _traced(lambda latent: self._decode(png, latent), latents),
            "encode_image": _traced(lambda image_bytes: self._encode_image(image_bytes, height, width), strings),
            "denoise": _traced(
                lambda latent, timestep, context: self._denoise(latent, timestep, context), latents, numbers, contexts
            ),
        }
        self.functions |= {f"{name}{suffix}": function for name, function in traced.items()}
        if not suffix:
            self.functions[SERVING_DEFAULT] = _traced(
                lambda prompt: traced["generate"](prompt, *default.values()), strings
            )
            self.functions["encode_text"] = _traced(lambda prompt: self._encode_text(prompt), strings)

    def _generate(self, shape, png, prompt, negative_prompt, settings) -> dict[str, Any]:
        inputs = shaped({"prompt": prompt, "negative_prompt": negative_prompt, **settings})
        settings = {name: inputs[name] for name in settings}
        size, checks = batch_of(inputs, self.limits)
        found, more = settings_of(settings, self.arrow.book, self.limits)
        inputs = checked({**inputs, **found}, checks + more)
        context, negative = (self._context(inputs[name])[1] for name in ("prompt", "negative_prompt"))
        each = {name: spread(inputs[name], size) for name in found}
        seed = fresh_seeds(each["seed"])
        latent = self.arrow.sample(
            spread(context, size),
            spread(negative, size),
            seed,
            each["sampler"],
            each["num_steps"],
            each["guidance_scale"],
            shape,
        )
        return {"image_bytes": png(latent), "seed": seed}

    def _encode_text(self, prompt) -> dict[str, Any]:
        inputs = shaped({"prompt": prompt})
        _, checks = batch_of(inputs, self.limits)
        tokens, context = self._context(checked(inputs, checks)["prompt"])
        return {"tokens": tokens, "context": tf.cast(context, tf.float32)}

    def _denoise(self, latent, timestep, context) -> dict[str, Any]:
        inputs = shaped({"latent": latent, "timestep": timestep, "context": context})
        size, checks = batch_of(inputs, self.limits)
        checks += [_finite(name, value) for name, value in inputs.items()]
        latent, timestep, context = (spread(value, size) for value in checked(inputs, checks).values())
        context = tf.cast(context, self.arrow.pipeline.text_encoder.compute_dtype)
        return {"prediction": self.arrow.denoise(latent, timestep, context)}

    def _decode(self, png, latent) -> dict[str, Any]:
        inputs = shaped({"latent": latent})
        _, checks = batch_of(inputs, self.limits)
        latent = checked(inputs, checks)["latent"]
        return {"image_bytes": png(latent)}

    def _encode_image(self, image_bytes, height: int, width: int) -> dict[str, Any]:
        inputs = shaped({"image_bytes": image_bytes})
        _, checks = batch_of(inputs, self.limits)
        image_bytes = inputs["image_bytes"]
        # The size stands in the file's first bytes: nothing larger than the model's pictures is ever unpacked.
        start = _PNG_START + width.to_bytes(4, "big") + height.to_bytes(4, "big")
        is_png = tf.equal(tf.strings.substr(image_bytes, 0, len(start)), start)
        most = _BYTES_PER_PIXEL * height * width + 65536
        rule = f"`image_bytes` must be PNG files of {width} x {height} pixels, of at most {most} bytes. Their bytes:"
        sizes = tf.strings.length(image_bytes)
        checks.append(check(tf.reduce_all(is_png & (sizes <= most)), rule, sizes))
        files = checked(inputs, checks)["image_bytes"]
        images = tf.map_fn(
            lambda file: tf.ensure_shape(tf.io.decode_png(file, channels=3), (height, width, 3)),
            files,
            fn_output_signature=tf.TensorSpec((height, width, 3), tf.uint8),
        )
        pipeline = self.arrow.pipeline
        latent = pipeline.autoencoder.encode(tf.cast(images, tf.float32) / 127.5 - 1)
        return {"latent": tf.cast(latent, tf.float32)}

    def _encode(self, prompt) -> tuple[Any, Any]:
        tokens = self.tokenize(prompt)
        return tokens, self.arrow.encode(tokens)

    def _png(self, latent) -> Any:
        latent = checked({"latent": latent}, [_finite("latent", latent)])["latent"]
        return tf.io.encode_png(self.arrow.decode(latent))


def _traced(function: Callable[..., Any], *inputs: tf.TensorSpec) -> Any:
    return tf.function(function, input_signature=inputs, autograph=False)


def _finite(name: str, value: Any) -> tf.Operation:
    finite = tf.reduce_all(tf.math.is_finite(value))
    return check(finite, f"`{name}` must be finite, and holds NaN or infinity.")
