"""Trains the emoji model's autoencoder on rendered pictures, with `fit`.

usage: python scripts/emoji/train_autoencoder.py [--data data/emoji] [--output runs/emoji] [--steps 3000]
Nine tenths of the steps see random crops of half the size, which cost a quarter each, the rest whole pictures.
The run is kept in OUTPUT/autoencoder_run and goes on from there; writes OUTPUT/autoencoder, a diffusers directory.
"""

import argparse
import json
import pathlib

import keras
import numpy as np

from latentdiff.backend import fit_compilation
from latentdiff.checkpoints.diffusers import write_component
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.presets import HeldArrays
from latentdiff.training import AutoencoderTraining, Run

CONFIG = {"channels": (16, 32, 96, 128), "blocks_per_level": 1, "groups": 8}


class Images(keras.utils.PyDataset):
    """Batches of rendered pictures, a function of (seed, step) alone: float32 (B, size, size, 3) in [-1, 1].

    Args:
        images: uint8 (N, 128, 128, 3).
        rows: int (M,), the pictures that may be drawn.
        batch_size: B.
        size: of the random crops.
        first_step, steps: which steps of the run these batches are.
        seed: of the order.
    """

    def __init__(self, images, rows, batch_size: int, size: int, first_step: int, steps: int, seed: int = 0):
        super().__init__()
        self.images, self.rows, self.batch_size, self.size = images, rows, batch_size, size
        self.first_step, self.steps, self.seed = first_step, steps, seed

    def __len__(self):
        return self.steps - self.first_step

    def __getitem__(self, index):
        places = (self.first_step + index) * self.batch_size + np.arange(self.batch_size)
        passes, within = np.divmod(places, len(self.rows))
        order = {p: np.random.default_rng((self.seed, int(p))).permutation(len(self.rows)) for p in set(passes)}
        chosen = self.rows[[order[p][i] for p, i in zip(passes, within, strict=True)]]
        margin = self.images.shape[1] - self.size
        corners = np.random.default_rng((self.seed, 1, int(places[0]))).integers(0, margin + 1, (len(chosen), 2))
        crops = [
            self.images[c, y : y + self.size, x : x + self.size] for c, (y, x) in zip(chosen, corners, strict=True)
        ]
        return (np.stack(crops).astype("float32") / 127.5 - 1,)


def main(data: pathlib.Path, output: pathlib.Path, steps: int, batch_size: int, learning_rate: float) -> None:
    images = np.load(data / "images.npy", mmap_mode="r")
    records = [json.loads(line) for line in (data / "index.jsonl").read_text().splitlines()]
    train = np.array([i for i, r in enumerate(records) if not (r["held_out"] or r["validation"])])
    validation = np.array([i for i, r in enumerate(records) if r["validation"]])
    keras.utils.set_random_seed(0)
    autoencoder = Autoencoder(**CONFIG)
    model = AutoencoderTraining(autoencoder)
    rate = keras.optimizers.schedules.CosineDecay(0.0, steps, 0.01, warmup_target=learning_rate, warmup_steps=200)
    optimizer = keras.optimizers.AdamW(rate, weight_decay=1e-4, beta_2=0.99, clipnorm=1.0)
    model.compile(optimizer=optimizer, jit_compile=fit_compilation())
    config = {"model": CONFIG, "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate}
    run = Run(output / "autoencoder_run", config, steps, checkpoint_every=100)
    first_step = run.resume(model)
    held = images[validation].astype("float32") / 127.5 - 1
    cropped = steps * 9 // 10
    for size, first, last in ((64, first_step, cropped), (128, max(first_step, cropped), steps)):
        if first < last:
            batches = Images(images, train, batch_size, size, first, last)
            model.fit(batches, callbacks=[run], shuffle=False)
    print("validation:", model.evaluate(held, batch_size=16, verbose=0, return_dict=True))
    write_component(output / "autoencoder", "autoencoder", autoencoder.config, HeldArrays(autoencoder), overwrite=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, default="data/emoji")
    parser.add_argument("--output", type=pathlib.Path, default="runs/emoji")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    main(**vars(parser.parse_args()))
