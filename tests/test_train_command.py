"""`latentdiff train`: each kind from pictures to a model directory, gone on with, rehearsed, and refused when wrong."""

import csv
import importlib.util
import json
import shutil
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image
from tiny_models import to_numpy

import latentdiff as ld
from latentdiff.cli import main
from latentdiff.models.attention import AttentionBlock, CLIPLayer, SpatialTransformer
from latentdiff.models.image_encoder import CLIPImageEncoder
from latentdiff.models.layers import ResnetBlock
from latentdiff.training import recipe_diffusion
from latentdiff.training.recipe import REMATERIALIZED, fills_a_batch, index_of
from latentdiff.training.recipe_diffusion import prior_of
from latentdiff.training_config import KINDS, DiffusionConfig, read_config

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import toy_pictures  # noqa: E402

pytestmark = [
    pytest.mark.usefixtures("eager"),
    pytest.mark.filterwarnings("default::UserWarning"),  # one picture is broken, as is said
]

# The smallest of each; the toys of scripts/ are these with a little more of everything.
SHARED = "--size 16 --batch-size 4 --validation 0.2 --warmup 1 --ema-decay 0.5 --log-every 2 --no-progress".split()
SIZES = {
    "autoencoder": "--channels 4 8 --blocks-per-level 1 --groups 2",
    "clip": "--tokenizer emoji --width 8 --depth 1 --heads 2 --mlp-width 8 --image-width 8 --image-depth 1 "
    "--image-heads 2 --image-mlp-width 8 --patch-size 8 --projection-dim 4",
    "diffusion": "--tokenizer emoji --width 8 --depth 1 --heads 2 --mlp-width 8 --channels 8 --attention true "
    "--unet-heads 2 --unet-groups 2 --num-steps 2",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Pictures, and the runs that the tests make of them."""
    folder = tmp_path_factory.mktemp("train")
    toy_pictures.main(folder / "toy", count=24, size=16)
    (folder / "toy" / "00024.png").write_bytes(b"no picture")
    (folder / "toy" / "00024.txt").write_text("a broken one")
    return folder


def train(kind, folder, output, *arguments, steps="4"):
    shared = ["--data", str(folder / "toy"), "--output", str(output), "--steps", steps, "--max-broken", "0.1"]
    return main(["train", kind, *shared, *SHARED, *SIZES[kind].split(), *arguments])


def arrays(network):
    return [to_numpy(variable) for variable in network.weights]


def losses(output):
    with (output / "losses.csv").open(newline="") as file:
        return [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def autoencoder(folder):
    assert train("autoencoder", folder, folder / "autoencoder") == 0
    return folder / "autoencoder"


def test_autoencoder_is_trained_and_written(autoencoder):
    assert [step for step, _ in losses(autoencoder)] == [1, 2, 3, 4]
    opened = ld.Autoencoder.from_preset(str(autoencoder / "model"))
    assert opened.config["channels"] == [4, 8]
    with Image.open(autoencoder / "samples" / "step_00000004.png") as picture:
        assert picture.size[1] == 32 and picture.size[0] % 16 == 0
    with (autoencoder / "metrics.csv").open(newline="") as file:
        *_, last = csv.DictReader(file)
    assert float(last["val_psnr"]) > 0


def test_run_is_made_longer_by_the_same_command(autoencoder, folder):
    before = losses(autoencoder)
    assert train("autoencoder", folder, autoencoder, steps="6") == 0
    assert losses(autoencoder)[:4] == before and [step for step, _ in losses(autoencoder)][4:] == [5, 6]


def test_run_goes_on_whose_configuration_lacks_a_newer_name(autoencoder, folder):
    kept = json.loads((autoencoder / "config.json").read_text())
    del kept["train_encoder"]
    (autoencoder / "config.json").write_text(json.dumps(kept))
    assert train("autoencoder", folder, autoencoder, steps="6") == 0
    assert json.loads((autoencoder / "config.json").read_text())["train_encoder"] is True


def test_run_does_not_go_on_with_other_pictures(autoencoder, folder, capsys):
    picture = sorted((folder / "toy").glob("*.png"))[0]
    before = picture.read_bytes()
    Image.new("RGB", (16, 16), "white").save(picture)
    with pytest.raises(SystemExit):
        train("autoencoder", folder, autoencoder, steps="7")
    picture.write_bytes(before)
    assert "A run must go on as it began, or in another directory. Received: data_digest=" in capsys.readouterr().err
    assert train("autoencoder", folder, autoencoder, steps="6") == 0


def test_another_run_in_its_place_is_refused(autoencoder, folder, capsys):
    with pytest.raises(SystemExit):
        train("autoencoder", folder, autoencoder, "--seed", "7")
    assert "A run must go on as it began, or in another directory. Received: seed=7" in capsys.readouterr().err


def test_decoder_is_trained_alone_for_latents_that_stay(autoencoder, folder):
    arguments = ["--start", str(autoencoder / "model"), "--no-train-encoder"]
    assert train("autoencoder", folder, folder / "decoder", *arguments, steps="2") == 0
    before, after = (ld.Autoencoder.from_preset(str(d / "model")) for d in (autoencoder, folder / "decoder"))
    same = {
        part: [
            (mine == theirs).all()
            for mine, theirs in zip(arrays(getattr(before, part)), arrays(getattr(after, part)), strict=True)
        ]
        for part in ("encoder", "decoder")
    }
    assert all(same["encoder"]) and not all(same["decoder"])


def test_pictures_of_several_sizes_keep_their_shape(folder):
    for i, path in enumerate(sorted((folder / "toy").glob("0000[0-7].png"))):
        with Image.open(path) as picture:
            wide = picture.resize((24, 16) if i % 2 else (16, 24))
        (folder / "wide").mkdir(exist_ok=True)
        wide.save(folder / "wide" / path.name)
        (folder / "wide" / path.name).with_suffix(".txt").write_text("a shape")
    output = folder / "several"
    arguments = ["--data", str(folder / "wide"), "--validation", "0", "--max-ratio", "1.5", "--batch-size", "2"]
    assert train("autoencoder", folder, output, *arguments) == 0
    assert [step for step, _ in losses(output)] == [1, 2, 3, 4]


def test_options_that_are_keras_own_reach_it(autoencoder, folder):
    """Half as many updates, of two batches each, in mixed precision, clipped."""
    options = "--dtype mixed_bfloat16 --gradient-accumulation-steps 2 --clipnorm 0.5".split()
    assert train("autoencoder", folder, folder / "options", *options) == 0
    found, before = losses(folder / "options"), losses(autoencoder)
    assert found[0][1] == pytest.approx(before[0][1], rel=2e-2)
    assert found[0] != before[0]  # computed in bfloat16
    state = sorted((folder / "options" / "checkpoints").glob("*.npz"))[-1]
    with np.load(state) as file:
        said = json.loads(file["said"].tobytes())
        numbers = {path: file[str(i)] for i, (path, _, _) in enumerate(said)}
    (updates,) = [array for path, array in numbers.items() if path.endswith("/updates")]
    assert updates == 2


def test_activations_are_computed_again_on_jax_alone(autoencoder, folder, capsys):
    if keras.backend.backend() == "jax":
        assert train("autoencoder", folder, folder / "again", "--rematerialize") == 0
        np.testing.assert_allclose(losses(folder / "again"), losses(autoencoder)[:4], rtol=1e-5)
    else:
        with pytest.raises(SystemExit):
            train("autoencoder", folder, folder / "again", "--rematerialize")
        assert "`rematerialize` needs the JAX backend. Received: rematerialize=True" in capsys.readouterr().err
        assert not (folder / "again").exists()


def test_every_block_is_one_that_is_computed_again():
    networks = [
        ld.UNet(channels=(4, 4), attention=(True, False), heads=1, groups=2, context_dim=4),
        ld.Autoencoder(channels=(4, 4), blocks_per_level=1, groups=2),
        ld.CLIPTextEncoder(vocabulary_size=9, width=4, depth=2, heads=1, mlp_width=4),
    ]
    layers = [layer for network in networks for layer in network._flatten_layers()]
    blocks = [
        layer for layer in layers if isinstance(layer, (ResnetBlock, SpatialTransformer, AttentionBlock, CLIPLayer))
    ]
    assert len(blocks) > 20 and {block.name for block in blocks} <= set(REMATERIALIZED)
    others = [layer for layer in layers if layer not in blocks]
    assert not {layer.name for layer in others} & set(REMATERIALIZED)


@pytest.fixture(scope="module")
def clip(folder):
    assert train("clip", folder, folder / "clip") == 0
    return folder / "clip"


def test_clip_pair_is_trained_and_written(clip):
    assert ld.CLIPTextEncoder.from_preset(str(clip / "model")).config["width"] == 8
    assert len(losses(clip)) == 4


def test_broken_pictures_are_named(folder, tmp_path, capsys):
    assert train("clip", folder, tmp_path / "clip", steps="1") == 0
    assert "00024.png" in capsys.readouterr().err


def test_clip_pair_that_is_loaded_is_trained_on(clip, folder):
    output = folder / "clip_tuned"
    assert train("clip", folder, output, "--start", str(clip / "model"), "--width", "16", steps="1") == 0
    for network_class in (ld.CLIPTextEncoder, CLIPImageEncoder):
        kept, tuned = (network_class.from_preset(str(run / "model"), dtype="float32") for run in (clip, output))
        pairs = list(zip(arrays(kept), arrays(tuned), strict=True))
        assert any((mine != theirs).any() for mine, theirs in pairs)
        # A step of Adam changes no weight by more than its rate and the decay.
        assert all(np.abs(mine - theirs).max() < 1e-3 for mine, theirs in pairs)


@pytest.fixture(scope="module")
def diffusion(autoencoder, folder):
    arguments = ["--autoencoder", str(autoencoder / "model"), "--prompts", "a red circle", "a blue square"]
    assert train("diffusion", folder, folder / "diffusion", *arguments) == 0
    return folder / "diffusion"


def test_diffusion_is_trained_and_the_model_draws(diffusion, folder):
    with Image.open(diffusion / "samples" / "step_00000004.png") as picture:
        assert picture.size == (32, 16)
    pipe = ld.TextToImage.from_preset(str(diffusion / "model"), dtype="float32")
    assert pipe.settings.prediction == "v" and pipe.settings.zero_terminal_snr
    latent = np.concatenate([np.load(path) for path in sorted(folder.glob("diffusion.cache/train/latents*.npy"))])
    assert pipe.autoencoder.scaling_factor == pytest.approx(1 / latent.std(), rel=1e-2)


def test_pictures_are_mirrored_where_that_is_asked_for(autoencoder, folder):
    output = folder / "mirrored"
    arguments = ["--autoencoder", str(autoencoder / "model"), "--flip"]
    assert train("diffusion", folder, output, *arguments, steps="1") == 0
    assert list(folder.glob("mirrored.cache/train/mirrored-0-*.npy"))
    assert not list(folder.glob("mirrored.cache/validation/mirrored-*.npy"))


def test_subject_is_learnt_beside_its_class_from_a_loaded_model(diffusion, folder):
    output = folder / "subject"
    arguments = [
        "--start",
        str(diffusion / "model"),
        "--no-train-text-encoder",
        "--prior",
        str(folder / "toy"),
    ]
    assert train("diffusion", folder, output, *arguments, steps="2") == 0
    kept, tuned = (
        ld.TextToImage.from_preset(str(folder / name / "model"), dtype="float32") for name in ("diffusion", "subject")
    )
    for name in ("text_encoder", "autoencoder"):
        pairs = zip(arrays(getattr(kept, name)), arrays(getattr(tuned, name)), strict=True)
        assert all((mine == theirs).all() for mine, theirs in pairs)
    pairs = zip(arrays(kept.unet), arrays(tuned.unet), strict=True)
    assert any((mine != theirs).any() for mine, theirs in pairs)


def test_copies_of_a_picture_are_trained_on_or_held_together(folder, tmp_path):
    for path in sorted((folder / "toy").glob("0001[0-9].png")):
        for name in ("first", "second"):
            (tmp_path / f"{name}_{path.name}").write_bytes(path.read_bytes())
    values = {"data": [str(tmp_path)], "steps": 1, "validation": 0.5}
    trained, held = index_of(read_config("autoencoder", None, values))
    assert len(trained) + len(held) == 20 and len(held) > 0
    assert not {e.digest for e in trained} & {e.digest for e in held}
    values["validation_data"] = [str(folder / "toy")]
    trained, held = index_of(read_config("autoencoder", None, {**values, "max_broken": 0.1}))
    assert (len(trained), len(held)) == (20, 24)


def test_rehearsal_leaves_nothing_behind(autoencoder, folder, capsys):
    before = sorted(folder.iterdir())
    assert train("autoencoder", folder, folder / "rehearsed", "--max-steps", "2", steps="1000") == 0
    assert "rehearsed 2 steps" in capsys.readouterr().out
    assert sorted(folder.iterdir()) == before


def test_rehearsal_leaves_the_caches_that_are_there(diffusion, autoencoder, folder, monkeypatch):
    """Its own is of a few pictures."""
    monkeypatch.setattr("latentdiff.export.export_saved_model", lambda pipe, path: None)
    arguments = ["--autoencoder", str(autoencoder / "model"), "--cache", str(folder / "diffusion.cache")]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("diffusion.cache/*/*")}
    assert len(before) > 4
    assert train("diffusion", folder, folder / "rehearsed", *arguments, "--max-steps", "1", steps="9") == 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("diffusion.cache/*/*")} == before


def test_run_that_is_refused_leaves_its_cache(diffusion, autoencoder, folder, capsys):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("diffusion.cache/*/*")}
    arguments = ["--prompts", "a red circle", "a blue square", "--autoencoder"]
    with pytest.raises(SystemExit):
        train("diffusion", folder, diffusion, *arguments, str(autoencoder / "model"), "--flip")
    assert "flip=True (was False)" in capsys.readouterr().err
    assert train("autoencoder", folder, folder / "other", "--seed", "9", steps="1") == 0
    (folder / "other" / "model").rename(folder / "kept")
    shutil.copytree(autoencoder / "model", folder / "other" / "model")
    assert train("diffusion", folder, folder / "watched", *arguments, str(folder / "other" / "model"), steps="1") == 0
    shutil.rmtree(folder / "other" / "model")
    (folder / "kept").rename(folder / "other" / "model")
    with pytest.raises(SystemExit):
        train("diffusion", folder, folder / "watched", *arguments, str(folder / "other" / "model"), steps="2")
    assert "autoencoder_digest" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("diffusion.cache/*/*")} == before


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="exports are TensorFlow's")
def test_rehearsal_exports_what_a_run_would_give(autoencoder, folder, capsys, monkeypatch):
    exported, encoded = [], []
    monkeypatch.setattr("latentdiff.export.export_saved_model", lambda *given: exported.append(given))
    makes = recipe_diffusion.make_cache
    monkeypatch.setattr(
        recipe_diffusion,
        "make_cache",
        lambda path, index, *rest, **more: encoded.append(len(index)) or makes(path, index, *rest, **more),
    )
    before = sorted(folder.iterdir())
    arguments = ["--autoencoder", str(autoencoder / "model"), "--max-steps", "2"]
    assert train("diffusion", folder, folder / "rehearsed", *arguments, steps="1000") == 0
    assert "rehearsed 2 steps" in capsys.readouterr().out
    assert encoded == [8, 8]  # those of two batches of 4, of 24 pictures in two parts
    ((pipe, path),) = exported
    assert isinstance(pipe, ld.TextToImage) and path.parts[-2:] == ("export", "1")
    assert sorted(folder.iterdir()) == before


def test_validations_pictures_are_not_trained_on_as_a_class(folder):
    values = {
        "start": "emoji",
        "data": [str(folder / "toy")],
        "prior": [str(folder / "toy")],
        "steps": 1,
        "validation": 0.3,
        "max_broken": 0.1,
    }
    config = read_config("diffusion", None, values)
    assert isinstance(config, DiffusionConfig)
    _, held = index_of(config)
    assert held and not {e.digest for e in held} & {e.digest for e in prior_of(config)}
    alone = replace(config, validation_data=[str(folder / "toy")])
    assert len(prior_of(alone)) == len(held) + len(prior_of(config))


def test_too_few_pictures_for_a_validation_are_told():
    config = read_config("autoencoder", None, {"data": ["x"], "steps": 1, "batch_size": 16})
    with pytest.warns(UserWarning, match="no validation: 7 pictures are held out for it, and batch_size=16"):
        assert not fills_a_batch(config, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not fills_a_batch(config, 0) and fills_a_batch(config, 16)


def test_subjects_configuration_is_right():
    """With what Keras has for little memory, as a recipe shows it."""
    config = read_config("diffusion", SCRIPTS / "subject.toml", {})
    assert isinstance(config, DiffusionConfig)
    assert config.start and config.prior and not config.train_text_encoder
    assert (config.dtype, config.gradient_accumulation_steps, config.clipnorm) == ("mixed_bfloat16", 2, 1.0)


def test_an_option_comes_before_the_file():
    config = read_config("diffusion", SCRIPTS / "subject.toml", {"steps": 7, "prior_weight": 0.5})
    assert (config.steps, config.prior_weight, config.batch_size) == (7, 0.5, 2)


@pytest.mark.parametrize("name", ["steps_per_execution", "log_every"])
def test_no_more_losses_than_are_remembered(name):
    with pytest.raises(ValueError, match=f"`{name}` must be at most 256. Received: {name}=257"):
        read_config("diffusion", None, {"data": ["x"], "steps": 1, name: 257})


@pytest.mark.parametrize("kind", KINDS)
def test_toy_configurations_are_right_and_short(kind):
    path = SCRIPTS / f"toy_{kind}.toml"
    config = read_config(kind, path, {})
    assert config.data == ["data/toy"] and config.steps <= 600
    assert len(path.read_text().splitlines()) <= 25


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "`steps` must be at least 1. Received: steps=0."),
        (["--no-train-encoder"], "`train_encoder` must be true where `start` is none."),
        (["--crop", "left"], "`crop` must be one of random, centre. Received: crop='left'."),
        (["--ema-decay", "1"], "`ema_decay` must be in [0, 1). Received: ema_decay=1.0."),
        (["--max-steps", "0"], "--max-steps must be at least 1. Received: 0."),
        (["--data"], "`data` must be one source or more."),
        (["--config", "nothing.toml"], "No such file"),
    ],
)
def test_bad_values_are_told_at_once(arguments, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["train", "autoencoder", "--data", "x", "--steps", "4", "--output", str(tmp_path / "run"), *arguments])
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = 'many'\ndata = ['x']", "`steps` must be of type int. Received: steps='many'."),
        ("data = ['x']\nsteps = 4\nstep = 5", "has the names"),
        ("steps = 4", "A configuration must have `data`."),
        ("steps = ", "must be a TOML file"),
    ],
)
def test_bad_configurations_are_told(text, message, tmp_path):
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(ValueError) as error:
        read_config("autoencoder", tmp_path / "config.toml", {})
    assert message in str(error.value)


def test_configuration_of_a_run_is_kept(autoencoder):
    kept = json.loads((autoencoder / "config.json").read_text())
    assert kept["channels"] == [4, 8] and kept["batch_size"] == 4


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [
        (["train", "diffusion", "--output", "run"], "grain", "data"),
        (["evaluate", "emoji", "--data", "toy", "--output", "report"], "grain", "data"),
        (["evaluate", "emoji", "--data", "toy", "--output", "report"], "matplotlib", "evaluate"),
    ],
)
def test_missing_extra_is_told_before_anything_is_read(command, package, extra, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(SystemExit) as ended:
        main(command)
    assert ended.value.code == 2
    assert f'This needs {package}: pip install "latentdiff[{extra}]".' in capsys.readouterr().err
