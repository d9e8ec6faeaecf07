"""`latentdiff train diffusion` with `--distribution` and `--hosts`: one run, whose losses are those of one device."""

import csv
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
import tiny_models
from data_sets import write_folder

import latentdiff as ld
from latentdiff.models.unet import UNet
from latentdiff.presets import save_pipeline

HERE = Path(__file__).parent
BACKEND = keras.backend.backend()
STEPS = 3
# The command, which also tells in a file what it was divided into: the replicas of each step that was traced,
# and the rows of each batch that was read.
TRAIN = """
import json, sys
if sys.argv[1] == "2" and sys.argv[2] == "tensorflow":
    import tensorflow as tf
    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from latentdiff.cli import main
from latentdiff.data import CachedLatents
from latentdiff.training import step

seen = {"replicas": set(), "rows": set()}

def watched(owner, name, look):
    function = getattr(owner, name)

    def call(self, *arguments):
        result = function(self, *arguments)
        look(self, result)
        return result

    setattr(owner, name, call)

watched(step.TrainingModel, "train_step", lambda model, _: seen["replicas"].add(step.replica()[1]))
watched(CachedLatents, "batch_at", lambda _, batch: seen["rows"].add(len(batch["latent"])))
status = main(sys.argv[4:])
with open(sys.argv[3], "w") as file:
    json.dump({name: sorted(numbers) for name, numbers in seen.items()}, file)
sys.exit(status)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices")
    write_folder(folder / "pictures", 16, ((16, 16),))
    unet = tiny_models.make(UNet, {**tiny_models.UNET, "channels": (8,), "attention": (True,), "heads": 2}, seed=2)
    save_pipeline(replace(tiny_models.parts(), unet=unet), folder / "start")
    return folder


def start(folder, output, *arguments, devices=1, process=0, **environment):
    """The command, in a process that has so many devices."""
    path = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    values = {"start": "start", "data": "pictures", "size": 16, "batch_size": 4, "steps": STEPS, "validation": 0.3}
    values |= {"learning_rate": 1e-4, "warmup": 1, "log_every": 1, "ema_decay": 0.5, "output": output}
    options = [text for name, value in values.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    program = [sys.executable, "-c", TRAIN, str(devices), BACKEND, f"{output}.{process}.json"]
    with (folder / f"{output}.{process}.log").open("w") as log:
        return subprocess.Popen(
            [*program, "train", "diffusion", *options, "--no-progress", *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": path, "KERAS_BACKEND": BACKEND, "XLA_FLAGS": flags, **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def finish(folder, output, *processes):
    """Waits for a run's processes, and for none of them once one has failed: what their devices did, of each."""
    end = time.monotonic() + 600
    try:
        while any(process.poll() is None for process in processes):
            assert time.monotonic() < end and not any(process.returncode for process in processes), said(folder, output)
            time.sleep(0.1)
        assert not any(process.returncode for process in processes), said(folder, output)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.wait()
    return [json.loads((folder / f"{output}.{i}.json").read_text()) for i in range(len(processes))]


def said(folder, output):
    """The end of what each process of a run has said."""
    return "\n".join(path.read_text()[-4000:] for path in sorted(folder.glob(f"{output}.*.log")))


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
    by_t = [
        [float(row[f"loss_t{i}"]) for row in rows(each, "metrics.csv") for i in range(4)] for each in (run, expected)
    ]
    assert len(by_t[0]) == 4 * STEPS
    np.testing.assert_allclose(by_t[0], by_t[1], rtol=1e-4)
    assert len(checked[1]) == 1
    np.testing.assert_allclose(checked[0], checked[1], rtol=1e-4)
    # Adam makes a whole step of a gradient's rounding, so that single weights may differ.
    first, mine, theirs = (unet_of(path) for path in (folder / "start", run / "model", expected / "model"))
    assert np.abs(mine - theirs).mean() < 0.02 * np.abs(theirs - first).mean()


@pytest.fixture(scope="module")
def one(folder):
    assert finish(folder, "one", start(folder, "one")) == [{"replicas": [1], "rows": [4]}]
    return folder / "one"


@pytest.mark.slow
@pytest.mark.skipif(BACKEND != "tensorflow", reason="`MirroredStrategy` is TensorFlow's")
def test_two_replicas_train_as_one_device(folder, one):
    seen = finish(folder, "two", start(folder, "two", "--distribution", "mirrored", devices=2))
    assert seen == [{"replicas": [2], "rows": [4]}]
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
    processes = [
        start(folder, "hosts", *both, process=i, KERAS_DISTRIBUTION_PROCESS_ID=str(i), **hosts) for i in range(2)
    ]
    assert finish(folder, "hosts", *processes) == [{"replicas": [1], "rows": [2]}] * 2
    assert_same_run(folder, folder / "hosts", one)
    assert [path.name for path in (folder / "hosts" / "samples").iterdir()] == [f"step_{STEPS:08}.png"]
