"""`latentdiff train diffusion` with `--distribution` and `--hosts`: one run, whose losses are those of one device."""

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tiny_models
from data_sets import write_folder

import latentdiff as ld
from latentdiff.presets import save_pipeline

HERE = Path(__file__).parent
BACKEND = keras.backend.backend()
STEPS = 3
TRAIN = """
import sys
if sys.argv[1] == "2" and sys.argv[2] == "tensorflow":
    import tensorflow as tf
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from latentdiff.cli import main
sys.exit(main(sys.argv[3:]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices")
    write_folder(folder / "pictures", 16, ((16, 16),))
    save_pipeline(tiny_models.parts(), folder / "start")
    return folder


def start(folder, output, *arguments, devices=1, **environment):
    """The command, in a process that has so many devices."""
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    values = {"start": "start", "data": "pictures", "size": 16, "batch_size": 4, "steps": STEPS, "validation": 0.3}
    values |= {"learning_rate": 1e-4, "warmup": 1, "log_every": 1, "ema_decay": 0.5, "output": output}
    options = [text for name, value in values.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    return subprocess.Popen(
        [
            sys.executable,
            "-c",
            TRAIN,
            str(devices),
            BACKEND,
            "train",
            "diffusion",
            *options,
            "--no-progress",
            *arguments,
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, "KERAS_BACKEND": BACKEND, "XLA_FLAGS": flags, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes):
    for process in processes:
        said, _ = process.communicate(timeout=600)
        assert process.returncode == 0, said[-4000:]


def rows(run, name):
    with (run / name).open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def unet_of(path):
    pipe = ld.TextToImage.from_preset(str(path), dtype="float32")
    return np.concatenate([tiny_models.to_numpy(variable).ravel() for variable in pipe.unet.weights])


def assert_same_run(folder, run, expected):
    losses = [[float(row["loss"]) for row in rows(each, "losses.csv")] for each in (run, expected)]
    assert len(losses[0]) == STEPS and np.ptp(losses[1]) > 1e-3
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    checked = [
        [float(row["val_loss"]) for row in rows(each, "metrics.csv") if row["val_loss"]] for each in (run, expected)
    ]
    assert len(checked[1]) == 1
    np.testing.assert_allclose(checked[0], checked[1], rtol=1e-4)
    # Adam makes a whole step of a gradient's rounding, so that single weights may differ.
    first, mine, theirs = (unet_of(path) for path in (folder / "start", run / "model", expected / "model"))
    assert np.abs(mine - theirs).mean() < 0.02 * np.abs(theirs - first).mean()


@pytest.fixture(scope="module")
def one(folder):
    finish(start(folder, "one"))
    return folder / "one"


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="`MirroredStrategy` is TensorFlow's")
def test_two_replicas_train_as_one_device(folder, one):
    finish(start(folder, "two", "--distribution", "mirrored", devices=2))
    assert json.loads((folder / "two" / "config.json").read_text())["distribution"] == "mirrored"
    assert_same_run(folder, folder / "two", one)


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "jax", reason="several hosts mean JAX")
def test_two_hosts_train_as_one_device(folder, one):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    hosts = {"KERAS_DISTRIBUTION_JOB_ADDRESSES": address, "KERAS_DISTRIBUTION_NUM_PROCESSES": "2"}
    both = ("--distribution", "data", "--hosts", "--prompts", "a picture", "--num-steps", "2")
    finish(*[start(folder, "hosts", *both, KERAS_DISTRIBUTION_PROCESS_ID=str(i), **hosts) for i in range(2)])
    assert_same_run(folder, folder / "hosts", one)
    assert [path.name for path in (folder / "hosts" / "samples").iterdir()] == [f"step_{STEPS:08}.png"]
