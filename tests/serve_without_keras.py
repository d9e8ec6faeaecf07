"""Answers every signature of a SavedModel with TensorFlow and nothing else, and compares a picture with Python's.

usage: python -P tests/serve_without_keras.py MODEL PICTURE PROMPT SEED STEPS

MODEL is the directory of one version in float32, PICTURE what `latentdiff generate` makes of the same prompt, seed and
steps in float32. `make serving` runs it in an environment that holds tensorflow-cpu alone, with Keras uninstalled.
"""

import importlib.util
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow.python.framework import op_def_registry


def check(condition, rule):
    """Ends the program, with status 1, unless the condition holds."""
    if not condition:
        sys.exit(f"serve_without_keras: {rule}")


def check_operations(directory):
    """Every operation of the graph is TensorFlow's own, and none runs Python."""
    saved = saved_model_pb2.SavedModel.FromString((directory / "saved_model.pb").read_bytes())
    graph = saved.meta_graphs[0].graph_def
    functions = {function.signature.name for function in graph.library.function}
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    kinds = {node.op for node in nodes} - functions
    unknown = sorted(kind for kind in kinds if op_def_registry.get(kind) is None or "PyFunc" in kind)
    check(kinds and not unknown, f"operations that are not TensorFlow's: {unknown}")
    print(f"{len(nodes):,} operations of {len(kinds)} kinds, all TensorFlow's own")


def main(directory, picture, prompt, seed, steps):
    """Loads, asks each signature, and compares."""
    for name in ("keras", "tf_keras", "latentdiff", "tokenizers"):
        check(importlib.util.find_spec(name) is None, f"{name} must not be installed")
    check_operations(directory)
    signatures = dict(tf.saved_model.load(str(directory)).signatures)
    names = sorted(signatures)

    generated = signatures.pop("generate")(
        prompt=tf.constant([prompt]),
        negative_prompt=tf.constant([""]),
        seed=tf.constant([seed], tf.int64),
        num_steps=tf.constant([steps]),
        guidance_scale=tf.constant([5.0]),
        sampler=tf.constant(["ddim"]),
    )
    image = tf.io.decode_png(generated["image_bytes"][0]).numpy().astype(int)
    expected = tf.io.decode_png(tf.io.read_file(str(picture))).numpy().astype(int)
    check(image.shape == expected.shape, f"a picture of {image.shape}, and Python's is {expected.shape}")
    difference = np.abs(image - expected).max()
    check(difference <= 1, f"a picture that differs from Python's by {difference} grey levels")
    check(expected.std() > 1, "Python's picture is blank, so that nothing was compared")

    served = signatures.pop("serving_default")(prompt=tf.constant([prompt] * 2))
    check(len(set(served["seed"].numpy().tolist())) == 2, "two pictures by default had the same seed")
    context = signatures.pop("encode_text")(prompt=tf.constant([prompt]))["context"]
    latent = signatures.pop("encode_image")(image_bytes=generated["image_bytes"])["latent"]
    prediction = signatures.pop("denoise")(latent=latent, timestep=tf.constant([500.0]), context=context)["prediction"]
    check(np.isfinite(prediction).all() and prediction.shape == latent.shape, "`denoise` gave no prediction")
    back = signatures.pop("decode")(latent=latent)["image_bytes"][0]
    check(tf.io.decode_png(back).shape == image.shape, "`decode` gave no picture of the model's size")
    check(not signatures, f"signatures that were not asked: {sorted(signatures)}")
    print(f"{', '.join(names)} answered; the picture of Python within {difference} grey levels")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
