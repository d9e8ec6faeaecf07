"""Training on several devices and several machines, with the engines that Keras has: which array lies where.

    y = f(x A) B,   A = [A_1 ... A_n] by columns,  B = [B_1; ...; B_n] by rows:   y = sum over devices i of f(x A_i) B_i

so that between two such kernels nothing is exchanged. JAX: `keras.distribution`, on one machine or many. TensorFlow:
`MirroredStrategy`, on one; `fit` fails in Keras under `MultiWorkerMirroredStrategy`, so that many machines mean JAX.
Reference: Shoeybi et al. 2019, sec. 3, arXiv:1909.08053.
"""

import contextlib
from collections.abc import Iterator, Sequence

import keras

from latentdiff.backend import mirrored

# Kernels by the names of their layers in the UNet, the text encoder, the autoencoder and the discriminator.
COLUMNS = r"(.+/)?(query|key|value|geglu|mlp_1|time_mlp_1|time|proj_in|conv_in|conv_1|conv|skip)/kernel|conv_\d/kernel"
ROWS = r"(.+/)?(out|mlp_out|mlp_2|time_mlp_2|proj_out|conv_out)/kernel|.+/conv_2/kernel"
HOW = ("data", "model", "mirrored")


def network_layout(mesh: keras.distribution.DeviceMesh) -> keras.distribution.LayoutMap:
    """How `ModelParallel` splits the kernels over the mesh's axis "model"; all else is whole on every device.

    A layout is that of a kernel's last two axes, what comes in and what goes out; a convolution's first axes are whole.
    """
    layout = keras.distribution.LayoutMap(mesh)
    layout[COLUMNS] = (None, "model")
    layout[ROWS] = ("model", None)
    layout[r"(.+/)?token_embedding/embeddings"] = (None, "model")
    return layout


class ModelParallel(keras.distribution.ModelParallel):
    """Keras' own with `network_layout`; an axis that the devices do not divide stays whole.

    Args:
        mesh: with axes "batch" and "model".
    """

    def __init__(self, mesh: keras.distribution.DeviceMesh):
        super().__init__(layout_map=network_layout(mesh), batch_dim_name="batch", auto_shard_dataset=False)

    def get_variable_layout(self, variable):
        """The layout of a variable of any rank."""
        axes = super().get_variable_layout(variable).axes
        axes = (None,) * (len(variable.shape) - len(axes)) + axes
        sizes = dict(zip(self.device_mesh.axis_names, self.device_mesh.shape, strict=True))
        axes = [
            name if length % sizes.get(name, 1) == 0 else None
            for name, length in zip(axes, variable.shape, strict=True)
        ]
        return keras.distribution.TensorLayout(axes, self.device_mesh)


@contextlib.contextmanager
def distributed(
    how: str, mesh_shape: Sequence[int] | None = None, devices: Sequence[str] | None = None
) -> Iterator[None]:
    """A scope in which to make the networks, or load them, and the training, and to call `fit`.

    Args:
        how: "data": each device has all weights and a part of each batch (JAX); "model": the weights are spread as
            well (JAX); "mirrored": as "data", with TensorFlow on one machine.
        mesh_shape: for "model", (parts of a batch, parts of a weight), whose product is the number of devices.
        devices: names such as "gpu:0"; None is all there are, of all machines.

    Raises:
        ValueError: no such `how`, another backend's, or a mesh of other than two axes.
    """
    if how not in HOW:
        raise ValueError(f"`how` must be one of {', '.join(HOW)}. Received: how={how!r}.")
    backend = "tensorflow" if how == "mirrored" else "jax"
    if keras.backend.backend() != backend:
        raise ValueError(
            f"`how={how!r}` must run with KERAS_BACKEND={backend}. Received: backend={keras.backend.backend()}."
        )
    if len(mesh_shape or ()) != (2 if how == "model" else 0):
        raise ValueError(f'`mesh_shape` must be two numbers for "model" alone. Received: {mesh_shape}, how={how!r}.')
    if how == "mirrored":
        scope = mirrored(devices)
    elif mesh_shape is None:
        scope = keras.distribution.DataParallel(devices=devices, auto_shard_dataset=False).scope()
    else:
        scope = ModelParallel(keras.distribution.DeviceMesh(tuple(mesh_shape), ("batch", "model"), devices)).scope()
    with scope:
        yield


def join_hosts(addresses: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Joins this process to those of the other hosts, before anything is computed: `keras.distribution.initialize`.

    Args:
        addresses: "host:port" of process 0; None is what KERAS_DISTRIBUTION_JOB_ADDRESSES says, or a TPU knows.
        processes: how many there are; None likewise, KERAS_DISTRIBUTION_NUM_PROCESSES.
        process: which one this is, from 0; None likewise, KERAS_DISTRIBUTION_PROCESS_ID.

    Raises:
        ValueError: the backend is not JAX.
    """
    if keras.backend.backend() != "jax":
        raise ValueError(f"Several hosts must run with KERAS_BACKEND=jax. Received: backend={keras.backend.backend()}.")
    keras.distribution.initialize(addresses, processes, process)


def rows_here(count: int) -> slice:
    """Which rows of a global batch of `count` this process must give to `fit`; all of them where it is alone.

    Raises:
        ValueError: the batch cannot be divided over the processes.
    """
    distribution = keras.distribution.distribution()
    if distribution is None:
        return slice(0, count)
    parts = min(distribution.num_processes, distribution.num_model_replicas)
    if count % parts:
        raise ValueError(f"A batch must be divisible by the processes' parts. Received: count={count}, parts={parts}.")
    first = distribution.data_shard_id * (count // parts)
    return slice(first, first + count // parts)
