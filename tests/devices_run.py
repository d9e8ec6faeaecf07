"""Trainings on one and on several devices, told apart by names in one .npz file.

usage: python tests/devices_run.py jax | mirrored DIRECTORY
       python tests/devices_run.py hosts DIRECTORY PROCESS ADDRESS
"jax" has eight devices, "mirrored" two, "hosts" four in each of two processes. A run's second half is another model's,
which goes on from the checkpoint of the first.
"""

import sys
from pathlib import Path

import keras
import numpy as np
import tiny_models
from toy_training import EMPTY, ToyBatches, toy_training

from latentdiff.backend import Compiled, is_first_process, process, to_numpy
from latentdiff.diffusion.process import GaussianDiffusion
from latentdiff.diffusion.schedule import scaled_linear_schedule
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.models.text_encoder import CLIPTextEncoder
from latentdiff.models.unet import UNet
from latentdiff.training import (
    AutoencoderTraining,
    DiffusionTraining,
    PatchDiscriminator,
    Run,
    distributed,
    join_hosts,
    rows_here,
)

STEPS = 4
SMALL_UNET = {**tiny_models.UNET, "channels": (8,), "attention": (True,), "heads": 2}
SMALL_AUTOENCODER = {"channels": (4,), "blocks_per_level": 1, "groups": 2, "mid_attention": False}


class PartOfToyBatches(ToyBatches):
    """The rows of each batch that this process gives."""

    def __getitem__(self, index):
        (batch,) = super().__getitem__(index)
        return ({name: array[rows_here(8)] for name, array in batch.items()},)


class Fixed(keras.utils.PyDataset):
    """Some batches, in their order."""

    def __init__(self, *batches):
        super().__init__()
        self.batches = batches

    def __len__(self):
        return len(self.batches)

    def __getitem__(self, index):
        return (self.batches[index],)


def numbers_of(variables):
    """All numbers of some variables, one behind the other."""
    return np.concatenate([np.ravel(to_numpy(variable)) for variable in variables])


def said_of(model, losses):
    """What is compared; and into how many parts, on different devices, each weight and its average are split."""
    said = {"losses": losses, "weights": numbers_of(model.trainable_variables)}
    if model.averages:
        said["averages"] = numbers_of(model.averages)
        pairs = zip(model.trainable_variables, model.averages, strict=True)
        said["parts"] = np.array([[parts_of(variable) for variable in pair] for pair in pairs])
    return said


def parts_of(variable):
    if keras.backend.backend() != "jax":
        return 1
    return int(np.prod(variable.shape) // np.prod(variable.value.sharding.shard_shape(variable.value.shape)))


def toy(seed=0):
    return toy_training(seed, run_eagerly=False, optimizer=keras.optimizers.SGD(0.1), ema_decay=0.9, offset_noise=0.1)


def evaluated(model):
    """The loss on fixed noise."""
    return np.array(model.evaluate(ToyBatches(50, 51), verbose=0, return_dict=True)["loss"])


def whole_toy():
    """A toy's training in one go."""
    model = toy()
    model.fit(ToyBatches(0, STEPS), shuffle=False, verbose=0)
    return {**said_of(model, model.last_losses(STEPS)), "evaluated": evaluated(model)}


def resumed_toy(directory):
    """The same in two halves, with pictures and the averages written."""
    latent, timestep = tiny_models.numbers(2, 2, 2, 4), np.array([3, 4], "float32")
    for seed, steps in ((0, STEPS // 2), (7, STEPS)):
        model = toy(seed)
        draw = Compiled(picture_of(model.unet), [model.unet])

        def sample(draw=draw):
            return to_numpy(draw(latent, timestep, tiny_models.numbers(2, 3, 5)))

        def save(path, model=model):
            path.mkdir(parents=True, exist_ok=True)
            np.save(path / "weights.npy", numbers_of(model.trainable_variables))

        run = Run(directory, {"seed": 0}, steps, checkpoint_every=2, log_every=2, save=save, sample=sample)
        first = run.resume(model)
        model.fit(PartOfToyBatches(first, steps), callbacks=[run], shuffle=False, verbose=0)
    said = {**said_of(model, model.last_losses(STEPS)), "first": np.array(first)}
    return said if process()[1] > 1 else {**said, "evaluated": evaluated(model)}


def picture_of(unet):
    def picture(latent, timestep, context):
        x = unet({"latent": latent, "timestep": timestep, "context": context})
        return keras.ops.cast(keras.ops.clip(127.5 * (x[..., :3] + 1), 0, 255), "uint8")

    return picture


def small_networks():
    """A UNet and a text encoder of the package's own, two steps."""
    unet = tiny_models.make(UNet, SMALL_UNET, seed=2)
    text_encoder = tiny_models.make(CLIPTextEncoder, tiny_models.TEXT_ENCODER, seed=1)
    diffusion = GaussianDiffusion(scaled_linear_schedule())
    model = DiffusionTraining(unet, text_encoder, diffusion, np.tile(EMPTY, 2), ema_decay=0.9)
    model.compile(optimizer=keras.optimizers.SGD(0.1), jit_compile=True)
    tokens = np.random.default_rng(0).integers(0, 600, (2, 8, 6)).astype("int32")
    batches = [{"latent": tiny_models.numbers(8, 4, 4, 4, seed=k), "tokens": tokens[k]} for k in range(2)]
    model.fit(Fixed(*batches), shuffle=False, verbose=0)
    return said_of(model, model.last_losses(2))


def small_autoencoder():
    """An autoencoder with its discriminator, two steps."""
    autoencoder = tiny_models.make(Autoencoder, SMALL_AUTOENCODER, seed=3)
    discriminator = tiny_models.randomize(PatchDiscriminator(4, depth=1, groups=2), seed=4)
    model = AutoencoderTraining(autoencoder, discriminator=discriminator)
    model.compile(optimizer=keras.optimizers.SGD(0.01), jit_compile=keras.backend.backend() == "jax")
    model.fit(Fixed(*(tiny_models.numbers(4, 4, 4, 3, seed=k) for k in range(2))), shuffle=False, verbose=0)
    return said_of(model, model.last_losses(2))


def on_eight_devices(directory):
    cases = {"one": whole_toy(), "networks": small_networks(), "autoencoder": small_autoencoder()}
    with distributed("data"):
        cases["data"] = resumed_toy(directory / "data")
    with distributed("model", (4, 2)):
        cases["model"] = resumed_toy(directory / "model")
        cases["networks_model"] = small_networks()
        cases["autoencoder_model"] = small_autoencoder()
    return cases


def on_two_replicas(directory):
    import tensorflow as tf

    (cpu,) = tf.config.list_physical_devices("CPU")
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    cases = {"one": whole_toy(), "autoencoder": small_autoencoder()}
    draws = {"one": to_numpy(toy().normal((4, 3)))}
    with distributed("mirrored", devices=["CPU:0", "CPU:1"]):
        cases["mirrored"] = resumed_toy(directory / "mirrored")
        model = toy()
        each = tf.distribute.get_strategy().run(tf.function(lambda: model.normal((2, 3)))).values
        draws["replicas"] = np.stack([to_numpy(draw) for draw in each])
        cases["autoencoder_mirrored"] = small_autoencoder()
        cases["accumulation"] = {"error": np.array(error_of_accumulation())}
    return {**cases, "draws": draws}


def error_of_accumulation():
    model = toy_training(run_eagerly=False, optimizer=keras.optimizers.SGD(0.1, gradient_accumulation_steps=2))
    try:
        model.fit(ToyBatches(0, 2), shuffle=False, verbose=0)
    except ValueError as error:
        return str(error)
    return "none"


def on_two_hosts(directory, process, address):
    join_hosts(address, 2, int(process))
    cases = {}
    with distributed("data"):
        cases["data"] = resumed_toy(directory / "data")
    with distributed("model", (4, 2)):
        cases["model"] = resumed_toy(directory / "model")
    return cases


def main(mode, directory, *arguments):
    directory = Path(directory)
    modes = {"jax": on_eight_devices, "mirrored": on_two_replicas, "hosts": on_two_hosts}
    cases = modes[mode](directory, *arguments)
    if is_first_process():
        flat = {f"{case}/{name}": array for case, said in cases.items() for name, array in said.items()}
        np.savez(directory / "said.npz", **flat)


if __name__ == "__main__":
    main(*sys.argv[1:])
