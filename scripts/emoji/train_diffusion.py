"""Trains the emoji model's UNet and text encoder on the autoencoder's latents, with `fit`; writes the model directory.

usage: python scripts/emoji/train_diffusion.py [--data data/emoji] [--output runs/emoji] [--preset runs/emoji/model]
The run is kept in OUTPUT/diffusion_run and goes on from there; `--start weights/emoji` begins with the weights of a
model, its autoencoder included, and not with random ones. Otherwise the autoencoder is OUTPUT/autoencoder. Its latents
are made once and kept in OUTPUT/latents.npz, with the digest of the weights and pictures that they were made from.
"""

import argparse
import hashlib
import pathlib

import keras
import numpy as np
from captions import training_caption
from records import Record, read_index

from latentdiff import presets
from latentdiff.backend import Compiled, fit_compilation, to_numpy
from latentdiff.checkpoints.diffusers_scheduler import SamplerSettings
from latentdiff.checkpoints.files import check_replaceable
from latentdiff.diffusion.process import GaussianDiffusion
from latentdiff.models.autoencoder import Autoencoder
from latentdiff.models.text_encoder import CLIPTextEncoder
from latentdiff.models.tokenizer import CLIPTokenizer
from latentdiff.models.unet import UNet
from latentdiff.training import DiffusionTraining, KernelMuon, Run, WarmupStableDecay

CONTEXT_LENGTH = 32
TEXT_ENCODER = {"width": 192, "depth": 4, "heads": 4, "mlp_width": 768}
UNET = {"channels": (80, 192), "blocks_per_level": 1, "attention": (False, True), "heads": 4, "groups": 16}
# White grounds need a schedule that ends in pure noise: Lin et al. 2023, arXiv:2305.08891.
SETTINGS = SamplerSettings(
    sampler="ddim", prediction="v", zero_terminal_snr=True, spacing="trailing", set_alpha_to_one=True
)
CAPTIONS_A_PICTURE = 16
BALANCE = 0.25  # a picture is drawn in proportion to (pictures of its base emoji) ** -BALANCE


class CaptionedLatents(keras.utils.PyDataset):
    """Batches of latents and tokens, a function of (seed, step) alone.

    Args:
        latents: float (N, h, w, c), scaled.
        tokens: int (N, K, S), the tokens of K captions for each picture.
        rows: int (M,), the pictures that may be drawn.
        shares: float (M,), how often, adding up to 1.
        batch_size, first_step, steps, seed: as for the autoencoder's.
    """

    def __init__(self, latents, tokens, rows, shares, batch_size: int, first_step: int, steps: int, seed: int = 0):
        super().__init__()
        self.latents, self.tokens, self.rows, self.shares = latents, tokens, rows, shares
        self.batch_size, self.first_step, self.steps, self.seed = batch_size, first_step, steps, seed

    def __len__(self):
        return self.steps - self.first_step

    def __getitem__(self, index):
        rng = np.random.default_rng((self.seed, self.first_step + index))
        rows = rng.choice(self.rows, self.batch_size, p=self.shares)
        captions = rng.integers(0, self.tokens.shape[1], self.batch_size)
        return ({"latent": self.latents[rows], "tokens": self.tokens[rows, captions]},)


def make_latents(autoencoder: Autoencoder, images: np.ndarray) -> np.ndarray:
    """The unscaled means of pictures, uint8 (N, H, W, 3) -> float32 (N, h, w, c)."""
    encode = Compiled(lambda image: autoencoder.moments(image)[0], [autoencoder])
    parts = [images[i : i + 32].astype("float32") / 127.5 - 1 for i in range(0, len(images), 32)]
    return np.concatenate([to_numpy(encode(part), "float32") for part in parts])


def latents_of(output: pathlib.Path, data: pathlib.Path, source: pathlib.Path, train: np.ndarray):
    """(latents, scaling factor), kept from before or made now; the factor gives training latents variance one."""
    path, weights = output / "latents.npz", find_weights(source)
    digest = hashlib.sha256(weights.read_bytes() + (data / "index.jsonl").read_bytes()).hexdigest()
    if path.exists():
        with np.load(path, allow_pickle=False) as kept:
            if str(kept["digest"]) == digest:
                return kept["latents"] * kept["scaling_factor"], float(kept["scaling_factor"])
    autoencoder = Autoencoder.from_preset(source, dtype="float32")
    latents = make_latents(autoencoder, np.load(data / "images.npy", mmap_mode="r"))
    scaling_factor = 1 / latents[train].std()
    aside = path.with_suffix(".part.npz")
    output.mkdir(parents=True, exist_ok=True)
    np.savez(aside, latents=latents, scaling_factor=scaling_factor, digest=digest)
    aside.replace(path)
    return latents * scaling_factor, float(scaling_factor)


def shares_of(records: list[Record]) -> np.ndarray:
    """How often each picture is drawn, so that a base emoji with eighteen variants does not fill the batches."""
    groups, places = np.unique([r.group for r in records], return_inverse=True)
    shares = np.bincount(places, minlength=len(groups))[places] ** -BALANCE
    return shares / shares.sum()


def find_weights(source: pathlib.Path) -> pathlib.Path:
    """The file of an autoencoder's weights, in its own directory or in a pipeline's."""
    return next(source.glob("vae/*.safetensors"), None) or next(source.glob("*.safetensors"))


def main(
    data: pathlib.Path,
    output: pathlib.Path,
    preset: pathlib.Path,
    start: pathlib.Path | None,
    steps: int,
    batch_size: int,
    learning_rate: float,
    decay: float,
) -> None:
    check_replaceable(preset, overwrite=True)
    records = read_index(data / "index.jsonl")
    train = np.array([i for i, r in enumerate(records) if not (r.held_out or r.validation)])
    keras.utils.set_random_seed(1)
    source = start or output / "autoencoder"
    latents, scaling_factor = latents_of(output, data, source, train)
    trained = Autoencoder.from_preset(source, dtype="float32")
    autoencoder = Autoencoder(**{**trained.config, "scaling_factor": round(scaling_factor, 5)})
    autoencoder.set_weights(trained.get_weights())
    tokenizer = CLIPTokenizer.from_directory(data / "tokenizer", context_length=CONTEXT_LENGTH)
    captions = [training_caption(r, f"{k}/{i}") for i, r in enumerate(records) for k in range(CAPTIONS_A_PICTURE)]
    tokens = tokenizer(captions).reshape(len(records), CAPTIONS_A_PICTURE, CONTEXT_LENGTH)

    if start:
        text_encoder = CLIPTextEncoder.from_preset(start, dtype="float32")
        unet = UNet.from_preset(start, dtype="float32")
    else:
        text_encoder = CLIPTextEncoder(tokenizer.vocabulary_size, CONTEXT_LENGTH, **TEXT_ENCODER)
        unet = UNet(**UNET, context_dim=TEXT_ENCODER["width"])
    diffusion = GaussianDiffusion(presets.make_schedule(SETTINGS), SETTINGS.prediction)
    model = DiffusionTraining(unet, text_encoder, diffusion, tokenizer("")[0])
    rate = WarmupStableDecay(learning_rate, steps, decay=decay)
    decays = {"weight_decay": 1e-2, "adam_weight_decay": 1e-2}
    optimizer = KernelMuon(rate, **decays, adam_beta_2=0.99, adam_lr_ratio=0.8)
    model.compile(optimizer=optimizer, jit_compile=fit_compilation())
    size = latents.shape[1:3]
    parts = presets.Parts(tokenizer, text_encoder, unet, autoencoder, SETTINGS, (int(size[0]), int(size[1])))
    config = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "decay": decay}
    run = Run(output / "diffusion_run", config, steps, checkpoint_every=200, save=lambda path: save(parts, path))
    first_step = run.resume(model)
    shares = shares_of([records[i] for i in train])
    print(f"{unet.count_params():,} + {text_encoder.count_params():,} + {autoencoder.count_params():,} parameters")
    if first_step < steps:
        batches = CaptionedLatents(latents, tokens, train, shares, batch_size, first_step, steps)
        model.fit(batches, callbacks=[run], shuffle=False)
    save(parts, preset)


def save(parts: presets.Parts, path: pathlib.Path) -> None:
    """Writes the model directory as it ships."""
    presets.save_pipeline(parts, path, dtype="float16", overwrite=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, default="data/emoji")
    parser.add_argument("--output", type=pathlib.Path, default="runs/emoji")
    parser.add_argument("--preset", type=pathlib.Path, default="runs/emoji/model")
    parser.add_argument("--start", type=pathlib.Path, help="a model directory to begin with")
    parser.add_argument("--steps", type=int, default=20000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--decay", type=float, default=0.4, help="share of the steps in which the rate goes down")
    main(**vars(parser.parse_args()))
