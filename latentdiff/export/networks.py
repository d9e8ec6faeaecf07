"""The networks of a pipeline, each as one ONNX or OpenVINO file, for runtimes that know neither Keras nor TensorFlow.

    text_encoder   tokens int32 (B, S) -> context (B, S, D)
    unet           latent (B, h, w, c), timestep (B,), context (B, S, D) -> prediction (B, h, w, c)
    vae_encoder    image (B, H, W, 3) in [-1, 1] -> moments (B, h, w, 2 c), unscaled
    vae_decoder    latent (B, h, w, c), unscaled -> image (B, H, W, 3) in [-1, 1]

The tokenizer and the sampler's loop stay with whoever runs them.
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import keras
import numpy as np

from latentdiff.checkpoints.files import replaced_directory
from latentdiff.engine import signature_of, to_openvino
from latentdiff.extras import require
from latentdiff.pipeline import TextToImage

FORMATS = {"onnx": (".onnx", ("tf2onnx", "onnx")), "openvino": (".xml", ("openvino",))}
ONNX_BYTES = 2**31 - 1  # of one file, which is one message of protobuf


def export_networks(
    pipeline: TextToImage,
    directory: str | os.PathLike,
    format: str,
    *,
    height: int | None = None,
    width: int | None = None,
) -> None:
    """Writes the four networks, for pictures of one size and batches of any.

    Args:
        pipeline: in float32, which both formats can say.
        directory: new, for `text_encoder.onnx`, `unet.onnx` and so on; OpenVINO's have a `.bin` of weights beside them.
        format: "onnx" or "openvino".
        height: in pixels; None is the model's own.
        width: in pixels; None is the model's own.

    Raises:
        ValueError: another format, a wrong size, another dtype, a network too large for the format, or Keras' backend
            is not TensorFlow.
        ImportError: the format's package is missing.
        FileExistsError: the directory holds something.
    """
    suffix = check_format(format)
    if pipeline.dtype != "float32":
        raise ValueError(f'Networks are exported in dtype="float32". Received: {pipeline.dtype}.')
    shape = pipeline.latent_shape(height, width)
    factor, length = pipeline.autoencoder.factor, pipeline.tokenizer.context_length
    tokens = keras.Input((length,), dtype="int32", name="tokens")
    latent, timestep = keras.Input(shape, name="latent"), keras.Input((), name="timestep")
    context = keras.Input((length, pipeline.text_encoder.output_shape[-1]), name="context")
    image = keras.Input((shape[0] * factor, shape[1] * factor, 3), name="image")
    unet = pipeline.unet({"latent": latent, "timestep": timestep, "context": context})
    networks = {
        "text_encoder": keras.Model(tokens, pipeline.text_encoder(tokens)),
        "unet": keras.Model([latent, timestep, context], unet),
        "vae_encoder": keras.Model(image, pipeline.autoencoder.encoder(image)),
        "vae_decoder": keras.Model(latent, pipeline.autoencoder.decoder(latent)),
    }
    if format == "onnx":
        for name, network in networks.items():
            if 4 * network.count_params() > ONNX_BYTES:
                rule = f"An ONNX file holds at most {ONNX_BYTES:,} bytes"
                raise ValueError(f"{rule}. Received: {name} with {network.count_params():,} parameters.")
        _teach_erfc()
    write = _write_onnx if format == "onnx" else _write_openvino
    with replaced_directory(directory) as fresh, warnings.catch_warnings():
        # Keras asks NumPy for a name that it has no longer, before it gives it to tf2onnx.
        warnings.filterwarnings("ignore", "In the future `np.object`", FutureWarning)
        for name, network in networks.items():
            write(network, str(fresh / f"{name}{suffix}"))


def check_format(format: str) -> str:
    """The suffix of a format's files, once it is known that it can be written.

    Raises:
        ValueError: another format, or Keras' backend is not TensorFlow.
        ImportError: the format's package is missing.
    """
    if format not in FORMATS:
        raise ValueError(f"`format` must be one of {', '.join(FORMATS)}. Received: format={format!r}.")
    if keras.backend.backend() != "tensorflow":
        raise ValueError(f"An export needs KERAS_BACKEND=tensorflow. Received: {keras.backend.backend()}.")
    suffix, packages = FORMATS[format]
    require(f'format="{format}"', packages, format)
    return suffix


def _write_onnx(network: keras.Model, path: str) -> None:
    network.export(path, format="onnx", input_signature=signature_of(network), verbose=False)


def _write_openvino(network: keras.Model, path: str) -> None:
    import openvino  # pyright: ignore[reportMissingImports]

    openvino.serialize(to_openvino(network, network.variables), path)


def _teach_erfc() -> None:
    """Tells tf2onnx of erfc, which TensorFlow makes of the exact GELU and which ONNX does not have: 1 - erf."""
    from tf2onnx import utils  # pyright: ignore[reportMissingImports]
    from tf2onnx.handler import tf_op  # pyright: ignore[reportMissingImports]

    class Erfc:
        @classmethod
        def version_9(cls, ctx: Any, node: Any, **kwargs: Any) -> None:
            shapes, dtypes = node.output_shapes, node.output_dtypes
            one = ctx.make_const(utils.make_name("one"), np.ones((), utils.map_onnx_to_numpy_type(dtypes[0])))
            erf = ctx.make_node("Erf", node.input, shapes=shapes, dtypes=dtypes)
            ctx.remove_node(node.name)
            inputs = [one.output[0], erf.output[0]]
            ctx.make_node("Sub", inputs, name=node.name, outputs=node.output, shapes=shapes, dtypes=dtypes)

    tf_op("Erfc")(Erfc)
