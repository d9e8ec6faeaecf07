"""Several devices are one: the same losses, weights and averages of the same global batches, with SGD and with noise.

Adam would hide a gradient of the wrong scale. What runs on several devices runs in processes of its own.
"""

import csv
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pytest

from latentdiff.training import distributed, join_hosts
from latentdiff.training.devices import ModelParallel

HERE = Path(__file__).parent
BACKEND = keras.backend.backend()
on_jax = pytest.mark.skipif(BACKEND != "jax", reason="`keras.distribution` is JAX's")
on_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="`MirroredStrategy` is TensorFlow's")
TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def start(*arguments, devices=1):
    """A process of `devices_run.py`."""
    path = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "PYTHONPATH": path, "KERAS_BACKEND": BACKEND, "XLA_FLAGS": flags}
    command = [sys.executable, str(HERE / "devices_run.py"), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(*processes):
    for process in processes:
        output, _ = process.communicate(timeout=1200)
        assert process.returncode == 0, output[-4000:]


def cases_of(directory):
    with np.load(directory / "said.npz") as file:
        cases = {}
        for name in file.files:
            case, what = name.split("/")
            cases.setdefault(case, {})[what] = file[name]
    return SimpleNamespace(directory=directory, **cases)


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """One process with eight devices."""
    directory = tmp_path_factory.mktemp("eight")
    finish(start("jax", directory, devices=8))
    return cases_of(directory)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory):
    """Two processes with four devices each."""
    directory = tmp_path_factory.mktemp("hosts")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    finish(*[start("hosts", directory, process, address, devices=4) for process in range(2)])
    return cases_of(directory)


@pytest.fixture(scope="module")
def replicas(tmp_path_factory):
    """One process with two replicas."""
    directory = tmp_path_factory.mktemp("replicas")
    finish(start("mirrored", directory))
    return cases_of(directory)


def assert_equal(case, expected):
    assert np.isfinite(expected["losses"]).all() and np.ptp(expected["losses"]) > 1e-3
    assert expected.keys() - {"parts", "evaluated"} <= case.keys()
    for name in {"losses", "weights", "averages", "evaluated"} & case.keys() & expected.keys():
        np.testing.assert_allclose(case[name], expected[name], **TOLERANCE, err_msg=name)


def assert_kept_once(directory, case):
    """The second half went on from the first, and one process wrote: every batch has one row."""
    assert case["first"] == 2
    with (directory / "losses.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4]
    np.testing.assert_allclose([float(row["loss"]) for row in rows], case["losses"], rtol=1e-6)
    files = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    assert {path for path in files if not path.startswith("tensorboard")} == {
        "config.json",
        "losses.csv",
        "metrics.csv",
        "checkpoints/step_00000002.npz",
        "checkpoints/step_00000004.npz",
        "samples/step_00000002.png",
        "samples/step_00000004.png",
        "model/weights.npy",
    }
    np.testing.assert_allclose(np.load(directory / "model" / "weights.npy"), case["averages"], rtol=1e-6)


@pytest.mark.slow
@on_jax
@pytest.mark.parametrize("how", ["data", "model"])
def test_eight_devices_are_one_through_a_checkpoint(eight, how):
    assert_equal(getattr(eight, how), eight.one)
    assert_kept_once(eight.directory / how, getattr(eight, how))


@pytest.mark.slow
@on_jax
def test_two_hosts_are_one_through_a_checkpoint(hosts, eight):
    for how in ("data", "model"):
        assert_equal(getattr(hosts, how), eight.one)
        assert_kept_once(hosts.directory / how, getattr(hosts, how))
    assert (hosts.model["parts"] == eight.model["parts"]).all()


@pytest.mark.slow
@on_jax
def test_networks_spread_over_devices_are_those_of_one(eight):
    assert_equal(eight.networks_model, eight.networks)
    assert (eight.networks["parts"] == 1).all() and (eight.data["parts"] == 1).all()
    weights, averages = eight.networks_model["parts"].T
    assert set(weights) == {1, 2} and (weights == 2).sum() > 30
    np.testing.assert_array_equal(averages, weights)


@pytest.mark.slow
@on_jax
def test_autoencoder_and_discriminator_spread_over_devices_are_those_of_one(eight):
    assert_equal(eight.autoencoder_model, eight.autoencoder)


@pytest.mark.slow
@on_tensorflow
def test_two_replicas_are_one_through_a_checkpoint(replicas):
    assert_equal(replicas.mirrored, replicas.one)
    assert_kept_once(replicas.directory / "mirrored", replicas.mirrored)


@pytest.mark.slow
@on_tensorflow
def test_replicas_draw_the_global_batchs_noise_each_its_own_rows(replicas):
    first, second = replicas.draws["replicas"]
    assert np.abs(first - second).max() > 0.1
    np.testing.assert_array_equal(np.concatenate([first, second]), replicas.draws["one"])


@pytest.mark.slow
@on_tensorflow
def test_discriminator_on_two_replicas_is_that_of_one(replicas):
    assert_equal(replicas.autoencoder_mirrored, replicas.autoencoder)


@pytest.mark.slow
@on_tensorflow
def test_accumulation_on_replicas_is_refused(replicas):
    assert "must be None on several replicas" in str(replicas.accumulation["error"])
    assert "Received: gradient_accumulation_steps=2, replicas=2." in str(replicas.accumulation["error"])


@on_tensorflow
def test_what_is_jaxs_is_refused_on_tensorflow():
    for how, mesh_shape in (("data", None), ("model", (4, 2))):
        with pytest.raises(ValueError, match=f"how='{how}'` must run with KERAS_BACKEND=jax. Received: backend=tensor"):
            with distributed(how, mesh_shape):
                pass
    with pytest.raises(ValueError, match="must run with KERAS_BACKEND=jax"):
        join_hosts("127.0.0.1:1", 2, 0)


@on_jax
def test_what_is_tensorflows_is_refused_on_jax():
    with pytest.raises(ValueError, match="how='mirrored'` must run with KERAS_BACKEND=tensorflow"):
        with distributed("mirrored"):
            pass


@on_jax
@pytest.mark.parametrize(("how", "mesh_shape"), [("model", None), ("model", (8,)), ("data", (4, 2))])
def test_bad_meshes_are_told(how, mesh_shape):
    with pytest.raises(ValueError, match='two numbers for "model" alone. Received: .*' + how):
        with distributed(how, mesh_shape):
            pass


def test_unknown_ways_are_told():
    with pytest.raises(ValueError, match="data, model, mirrored. Received: how='pipeline'"):
        with distributed("pipeline"):
            pass


@pytest.mark.parametrize(
    ("path", "shape", "axes"),
    [
        ("down_0_attention_0/block_0/self_attention/query/kernel", (320, 320), (None, "model")),
        ("down_0_attention_0/block_0/cross_attention/out/kernel", (320, 320), ("model", None)),
        ("down_0_attention_0/block_0/geglu/kernel", (320, 2560), (None, "model")),
        ("down_0_attention_0/block_0/mlp_out/kernel", (1280, 320), ("model", None)),
        ("down_0_attention_0/proj_in/kernel", (1, 1, 320, 320), (None, None, None, "model")),
        ("down_0_attention_0/proj_in/kernel", (320, 320), (None, "model")),
        ("mid_resnet_0/conv_1/kernel", (3, 3, 320, 640), (None, None, None, "model")),
        ("mid_resnet_0/conv_2/kernel", (3, 3, 640, 640), (None, None, "model", None)),
        ("conv_2/kernel", (4, 4, 64, 128), (None, None, None, "model")),
        ("layer_0/attention/value/kernel", (768, 768), (None, "model")),
        ("layer_0/mlp_2/kernel", (3072, 768), ("model", None)),
        ("token_embedding/embeddings", (49408, 768), (None, "model")),
        ("conv_in/kernel", (3, 3, 4, 321), (None, None, None, None)),
        ("conv_out/bias", (4,), (None,)),
        ("training/steps", (), ()),
    ],
)
def test_kernels_are_split_where_the_devices_divide_them(path, shape, axes):
    mesh = keras.distribution.DeviceMesh((1, 2), ("batch", "model"), ["cpu:0", "cpu:1"])
    layout = ModelParallel(mesh).get_variable_layout(SimpleNamespace(path=path, shape=shape))
    assert tuple(layout.axes) == axes
