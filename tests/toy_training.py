"""Networks of a few dense layers that train in no time, and the runs of them."""

import keras
import numpy as np
from keras import ops

from latentdiff.diffusion.process import GaussianDiffusion
from latentdiff.diffusion.schedule import scaled_linear_schedule
from latentdiff.training import DiffusionTraining

EMPTY = np.array([9, 9, 9], "int32")
JIT = keras.backend.backend() == "jax"  # compiling takes longer than the toys' steps, but for JAX's operations


def toy_networks():
    """A UNet and a text encoder, with names that the layout over devices knows."""
    latent = keras.Input((2, 2, 4), name="latent")
    timestep = keras.Input((), name="timestep")
    context = keras.Input((3, 5), name="context")
    tokens = keras.Input((3,), dtype="int32", name="tokens")
    condition = ops.concatenate([ops.mean(context, axis=1), timestep[:, None] / 1000], axis=-1)
    condition = keras.layers.Dense(8, "relu", name="time")(condition)
    x = keras.layers.Dense(8, name="mlp_1")(latent) + condition[:, None, None, :]
    x = keras.layers.Dense(4, kernel_initializer="zeros", name="mlp_2")(ops.silu(x))
    unet = keras.Model({"latent": latent, "timestep": timestep, "context": context}, x, name="toy_unet")
    return unet, keras.Model(tokens, keras.layers.Embedding(10, 5)(tokens), name="toy_text_encoder")


def toy_training(seed=0, run_eagerly=True, optimizer=None, **arguments):
    """A compiled training of them."""
    keras.utils.set_random_seed(seed)
    diffusion = GaussianDiffusion(scaled_linear_schedule())
    model = DiffusionTraining(*toy_networks(), diffusion, EMPTY, seed=seed, **arguments)
    optimizer = optimizer or keras.optimizers.Adam(1e-2)
    model.compile(optimizer=optimizer, jit_compile=JIT and not run_eagerly, run_eagerly=run_eagerly)
    return model


class ToyBatches(keras.utils.PyDataset):
    """Batch k is a function of k; `disturb` is told k first."""

    def __init__(self, first, steps, disturb=lambda k: None):
        super().__init__()
        self.first, self.steps, self.disturb = first, steps, disturb

    def __len__(self):
        return self.steps - self.first

    def __getitem__(self, index):
        k = self.first + index
        rng = np.random.default_rng(k)
        latent = rng.standard_normal((8, 2, 2, 4), "float32")
        latent = self.disturb(k) if self.disturb(k) is not None else latent
        return ({"latent": latent, "tokens": rng.integers(0, 9, (8, 3)).astype("int32")},)
