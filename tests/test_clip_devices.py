"""The CLIP pair on two devices is the pair on one: each picture is told from the captions of both."""

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

BACKEND = keras.backend.backend()


def two_devices():
    """What a model is to be built in, so that each batch is halved over two devices."""
    if BACKEND == "jax":
        import jax

        assert len(jax.devices()) == 2
        return keras.distribution.DataParallel().scope()
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope()


def train(scope=None):
    """Two steps of SGD, whose scale shows: the metrics, and every weight."""
    from contextlib import nullcontext

    from test_clip_training import pair, paths, pictures_and_captions
    from tiny_models import to_numpy

    with scope or nullcontext():
        training = pair()
        training.compile(optimizer=keras.optimizers.SGD(0.1), jit_compile=BACKEND == "jax")
        history = training.fit(pictures_and_captions(8), batch_size=4, shuffle=False, verbose=0).history
        logs = {f"log {name}": np.array(values) for name, values in history.items()}
        return logs | {path: to_numpy(variable) for path, variable in paths(training)}


@pytest.mark.slow
def test_two_devices_are_one(tmp_path):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=2"
    environment = {**os.environ, "XLA_FLAGS": flags, "TF_CPP_MIN_LOG_LEVEL": "2"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    subprocess.run([sys.executable, Path(__file__), tmp_path / "two.npz"], env=environment, check=True)
    with np.load(tmp_path / "two.npz") as file:
        two = dict(file)
    for name, array in train().items():
        np.testing.assert_allclose(two[name], array, atol=1e-5, err_msg=name)


if __name__ == "__main__":
    np.savez(sys.argv[1], **train(two_devices()))
