"""The recipes of `latentdiff train`: that a run goes on as it began, and that what is asked for is what is trained."""

import shutil
from dataclasses import replace

import keras
import numpy as np
import pytest
import tiny_models
from data_sets import write_folder
from tiny_models import to_numpy

from latentdiff.cli import main
from latentdiff.presets import save_pipeline
from latentdiff.training.recipe import make_optimizer, make_recipe
from latentdiff.training.run import Run
from latentdiff.training_config import read_config

pytestmark = [
    pytest.mark.usefixtures("eager"),
    pytest.mark.filterwarnings("ignore:Even though the `tf.config:UserWarning"),  # by that fixture
]

SHARED = {"size": 16, "batch_size": 4, "validation": 0.3}
PAIR = {
    "width": 8,
    "depth": 2,
    "heads": 4,
    "mlp_width": 12,
    "image_width": 24,
    "image_depth": 3,
    "image_heads": 6,
    "image_mlp_width": 20,
    "patch_size": 4,
    "projection_dim": 5,
}
KILLED = {
    "autoencoder": "--channels 4 8 --blocks-per-level 1 --groups 2 --zoom 1.5 --flip --discriminator-weight 0.5 "
    "--discriminator-start 1 --discriminator-width 4 --discriminator-depth 1",
    "diffusion": "--start start --flip --offset-noise 0.1",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures of a subject and of its class, and a pipeline to start from."""
    folder = tmp_path_factory.mktemp("recipes")
    write_folder(folder / "pictures", 16, ((16, 16),), caption="the subject")
    write_folder(folder / "class", 24, ((16, 16),), caption="a class")
    for path in sorted((folder / "class").glob("*"))[:32]:  # those that the subject has, too
        path.unlink()
    save_pipeline(tiny_models.parts(), folder / "start")
    return folder


def configured(kind, folder, **values):
    shared = {**SHARED, "data": [str(folder / "pictures")], "steps": 8, "tokenizer": str(folder / "start")}
    known = {name: value for name, value in shared.items() if name != "tokenizer" or kind != "autoencoder"}
    return read_config(kind, None, {**known, **values})


@pytest.mark.parametrize("kind", KILLED)
def test_run_that_was_killed_ends_as_if_it_never_was(kind, folder, monkeypatch):
    monkeypatch.chdir(folder)
    begun, resume = [], Run.resume
    monkeypatch.setattr(Run, "resume", lambda run, model: begun.append(resume(run, model)) or begun[-1])
    shared = "--data pictures --size 16 --batch-size 4 --validation 0.3 --steps 4 --checkpoint-every 2 --log-every 2 "
    shared += "--learning-rate 1e-2 --warmup 1 --ema-decay 0.5 --seed 3 --no-progress"
    command = ["train", kind, *shared.split(), *KILLED[kind].split(), "--output"]
    assert main([*command, kind]) == 0
    run, copy = folder / kind, folder / f"{kind}_copy"
    shutil.copytree(run, copy)
    (copy / "checkpoints" / "step_00000004.npz").unlink()
    shutil.rmtree(copy / "model")
    assert main([*command, copy.name]) == 0
    assert begun == [0, 2]
    assert (copy / "losses.csv").read_bytes() == (run / "losses.csv").read_bytes()
    first, second = ({path.relative_to(each): path.read_bytes() for path in files_of(each)} for each in (run, copy))
    assert first == second and any(path.suffix == ".safetensors" for path in first)


def files_of(run):
    return [path for path in (run / "model").rglob("*") if path.is_file()]


def test_half_a_batch_is_the_subject_and_the_other_its_class(folder):
    values = {"start": str(folder / "start"), "prior": [str(folder / "class")], "prior_weight": 0.25}
    config = configured("diffusion", folder, **values)
    batches = make_recipe(config, folder / "prior").batches(0, 3)
    tokenizer, factor = tiny_models.parts().tokenizer, tiny_models.parts().autoencoder.scaling_factor
    cached = [
        factor * np.concatenate([np.load(path) for path in sorted((folder / "prior.cache" / name).glob("latents*"))])
        for name in ("train", "prior")
    ]
    for step in range(3):
        batch = batches.batch_at(step)
        np.testing.assert_array_equal(batch["weight"], np.array([1, 1, 0.25, 0.25], "float32"))
        tokens = tokenizer(["the subject"] * 2 + ["a class"] * 2)
        np.testing.assert_array_equal(batch["tokens"], tokens)
        nearest = [[np.abs(latents - row).max(axis=(1, 2, 3)).min() for latents in cached] for row in batch["latent"]]
        assert (np.array(nearest) < 1e-5).tolist() == [[True, False]] * 2 + [[False, True]] * 2


@pytest.mark.parametrize(("prediction", "zero_terminal_snr"), [("x0", False), ("eps", False), ("v", True)])
def test_options_reach_diffusions_training(prediction, zero_terminal_snr, folder):
    config = configured(
        "diffusion",
        folder,
        autoencoder=str(folder / "start"),
        caption_dropout=0.3,
        loss_weight="min_snr",
        offset_noise=0.05,
        ema_decay=0.7,
        prediction=prediction,
        zero_terminal_snr=zero_terminal_snr,
        channels=[8, 16],
        attention=[False, True],
        unet_heads=2,
        unet_groups=4,
        blocks_per_level=2,
        width=8,
        depth=2,
        heads=4,
        mlp_width=12,
        cache=str(folder / "options.cache"),
    )
    recipe = make_recipe(config, folder / "options")
    model = recipe.model
    assert (model.caption_dropout, model.loss_weight, model.offset_noise) == (0.3, "min_snr", 0.05)
    assert (model.ema_decay, model.diffusion.prediction) == (0.7, prediction)
    last = model.diffusion.schedule.alpha_bar[-1]
    assert last < 1e-9 if zero_terminal_snr else last > 1e-3
    unet = {"channels": [8, 16], "attention": [False, True], "heads": 2, "groups": 4, "blocks_per_level": 2}
    assert as_lists(model.unet.config, unet) == {**unet, "heads": [2, 2]}
    text_encoder = {"width": 8, "depth": 2, "heads": 4, "mlp_width": 12}
    assert as_lists(model.text_encoder.config, text_encoder) == text_encoder


def test_loaded_pipelines_prediction_is_its_own_and_no_average_is_kept_where_none_is_wanted(folder):
    config = configured("diffusion", folder, start=str(folder / "start"), prediction="v", ema_decay=0)
    model = make_recipe(config, folder / "loaded").model
    assert model.diffusion.prediction == "eps" and model.diffusion.schedule.alpha_bar[-1] > 1e-3
    assert model.ema_decay is None


def as_lists(config, names):
    """What a network's configuration says under some names, as JSON would."""
    return {name: list(config[name]) if isinstance(config[name], tuple) else config[name] for name in names}


def test_options_reach_the_autoencoders_training_and_its_batches(folder):
    values = {"channels": [4, 8], "blocks_per_level": 1, "latent_channels": 3, "groups": 2, "ema_decay": 0.7}
    losses = {"l1_weight": 0.3, "l2_weight": 0.7, "kl_weight": 1e-3, "discriminator_weight": 0.2}
    losses["discriminator_start"] = 5
    pictures = {"crop": "centre", "zoom": 1.5, "flip": True}
    sizes = {"discriminator_width": 6, "discriminator_depth": 2}
    config = configured("autoencoder", folder, **values, **losses, **pictures, **sizes, seed=11)
    recipe = make_recipe(config, folder / "unused")
    model, batches, checked = recipe.model, recipe.batches(2, 5), recipe.validation()
    assert {name: getattr(model, name) for name in losses} == losses and model.ema_decay == 0.7
    of_network = {"channels": [4, 8], "blocks_per_level": 1, "latent_channels": 3, "groups": 2}
    assert as_lists(model.autoencoder.config, of_network) == of_network
    convolutions = [layer.filters for layer in model.discriminator.layers if isinstance(layer, keras.layers.Conv2D)]
    assert convolutions == [6, 12, 24, 1]
    assert {name: getattr(batches, name) for name in pictures} == pictures and batches.seed == 11
    assert (batches.first_step, batches.steps, batches.captions) == (2, 5, False)
    assert (checked.crop, checked.zoom, checked.flip) == ("centre", 1.0, False)
    plain = make_recipe(replace(config, discriminator_weight=0.0, crop="random", zoom=1.0, flip=False), folder / "no")
    assert plain.model.discriminator is None
    assert (plain.batches(0, 1).crop, plain.batches(0, 1).zoom, plain.batches(0, 1).flip) == ("random", 1.0, False)


def test_options_reach_the_clip_pairs_training(folder):
    config = configured("clip", folder, **PAIR, ema_decay=0.7, flip=True)
    recipe = make_recipe(config, folder / "unused")
    text_encoder, image_encoder = recipe.model.text_encoder.config, recipe.model.image_encoder.config
    names = ("width", "depth", "heads", "mlp_width")
    assert {name: text_encoder[name] for name in names} == {name: PAIR[name] for name in names}
    assert {f"image_{name}": image_encoder[name] for name in names} == {
        f"image_{name}": PAIR[f"image_{name}"] for name in names
    }
    assert (image_encoder["patch_size"], image_encoder["projection_dim"], image_encoder["image_size"]) == (4, 5, 16)
    assert recipe.model.ema_decay == 0.7 and recipe.model.end_id == tiny_models.parts().tokenizer.end_id
    batch = recipe.batches(0, 1).batch_at(0)
    assert recipe.batches(0, 1).flip and sorted(batch) == ["image", "tokens"]


def moves(optimizer, gradients):
    """How far down each batch's gradient takes a variable that begins at 0."""
    variable = keras.Variable(0.0)
    optimizer.build([variable])
    places = [0.0]
    for gradient in gradients:
        optimizer.apply([keras.ops.convert_to_tensor(gradient, "float32")])
        places.append(float(to_numpy(variable)))
    return -np.diff(places)


def optimizer_of(**values):
    plain = {"data": ["x"], "steps": 20, "learning_rate": 0.1, "warmup": 4, "decay": 0.5, "weight_decay": 0}
    return make_optimizer(read_config("autoencoder", None, {**plain, **values}))


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_rate_is_told_the_updates(name, accumulation):
    """Adam's step under a gradient that stays the same is the rate: up in 4 updates, and down in the last half."""
    found = moves(optimizer_of(optimizer=name, gradient_accumulation_steps=accumulation), [2.0] * 20)
    updates = 20 // accumulation
    n = np.arange(updates)
    expected = 0.1 * np.minimum(1, (n + 1) / 4) * np.clip((updates - n) / (0.5 * updates), 0, 1)
    assert np.ptp(expected) > 0.07
    np.testing.assert_allclose(found[accumulation - 1 :: accumulation], expected, rtol=1e-3)
    if accumulation > 1:
        np.testing.assert_array_equal(found[::2], 0)


@pytest.mark.parametrize(("name", "kind"), [("adamw", "AdamW"), ("muon", "KernelMuon")])
def test_optimizer_is_the_one_that_is_named_and_its_weights_decay(name, kind):
    optimizer = optimizer_of(optimizer=name, weight_decay=0.5, warmup=1)
    assert type(optimizer).__name__ == kind
    variables = [keras.Variable(1.0), keras.Variable(np.ones((16, 16), "float32"))]
    optimizer.build(variables)
    optimizer.apply([keras.ops.zeros_like(variable) for variable in variables])
    for variable in variables:
        np.testing.assert_allclose(to_numpy(variable), 1 - 0.1 * 0.5, rtol=1e-6)


def test_gradients_are_clipped_unless_that_is_zero():
    """Both gradients are cut to a half, which is a gradient that stays the same; uncut the second is 100 times it."""
    cut, whole = (moves(optimizer_of(clipnorm=norm, warmup=1), [1.0, 100.0]) for norm in (0.5, 0.0))
    np.testing.assert_allclose(cut, 0.1, rtol=1e-3)
    m, v = (0.9 * 0.1 + 0.1 * 100) / (1 - 0.9**2), (0.999 * 0.001 + 0.001 * 100**2) / (1 - 0.999**2)
    np.testing.assert_allclose(whole, [0.1, 0.1 * m / np.sqrt(v)], rtol=1e-3)
