"""The command line, with a pipeline that draws one grey level and remembers what it was asked for."""

import inspect
import subprocess
import sys
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
from ldm_files import save
from PIL import Image

from latentdiff import __version__, catalogue, cli, pictures
from latentdiff.pictures import Settings, read_settings, write_png

ROOT = Path(__file__).resolve().parents[1]


class Pipeline:
    """Stands in for TextToImage: image i of a call is grey level i."""

    dtype = "bfloat16"
    settings = types.SimpleNamespace(sampler="ddim")

    def __init__(self):
        self.calls = []
        self.presets = []
        self.weights = []
        self.engines = []
        self.free = []
        self.error = None

    def from_preset(self, preset, dtype=None, *, ema=False, prediction=None, engine="keras", free=()):
        self.presets.append((preset, dtype))
        self.weights.append((ema, prediction))
        self.engines.append(engine)
        self.free.append(free)
        return self

    def generate(self, prompt, **arguments):
        self.calls.append((prompt, arguments))
        if self.error is not None:
            raise self.error
        count = len(prompt) * arguments["num_images"]
        height, width = arguments["height"] or 8, arguments["width"] or 16
        return np.broadcast_to(np.arange(count, dtype=np.uint8)[:, None, None, None], (count, height, width, 3))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "weights" / "emoji").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(catalogue, "weights_directory", lambda: tmp_path / "weights")
    return tmp_path / "here"


@pytest.fixture
def pipeline(monkeypatch):
    pipeline = Pipeline()
    monkeypatch.setitem(sys.modules, "latentdiff.pipeline", types.SimpleNamespace(TextToImage=pipeline))
    monkeypatch.setattr(cli, "start_keras", lambda: "tensorflow")
    monkeypatch.setattr(cli, "_check_run", lambda source, settings: None)  # `emoji` is an empty directory here
    return pipeline


def refusal(capsys, *arguments):
    """What a command that must be refused writes on standard error."""
    with pytest.raises(SystemExit) as exit:
        cli.main(arguments)
    assert exit.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("latentdiff: error: ")
    assert output.err.count("\n") == 1 and output.err.endswith("\n")
    return output.err


def test_a_prompt_alone_writes_out_png(pipeline, here):
    assert cli.main(["generate", "a red heart"]) == 0
    assert [path.name for path in here.iterdir()] == ["out.png"]
    assert np.asarray(Image.open("out.png")).shape == (8, 16, 3)
    assert pipeline.presets == [("emoji", None)]
    assert pipeline.weights == [(False, None)]
    assert pipeline.free == [("text_encoder", "unet", "autoencoder")]
    prompt, arguments = pipeline.calls[0]
    assert prompt == ["a red heart"]
    seed = arguments.pop("seed")
    assert 0 <= seed < 2**32
    assert arguments == {
        "negative_prompt": "",
        "num_images": 1,
        "num_steps": 25,
        "guidance_scale": 5.0,
        "guidance_interval": None,
        "cache_interval": 1,
        "sampler": None,
        "height": None,
        "width": None,
        "batch_size": None,
        "tiled": None,
        "progress": True,
    }


def test_networks_may_all_be_kept(pipeline):
    assert cli.main(["generate", "a red heart", "--free"]) == 0
    assert pipeline.free == [[]]


def test_every_argument_reaches_the_pipeline(pipeline):
    command = """--preset emoji --num-images 2 --num-steps 25 --guidance-scale 5 --seed 3 --sampler dpmpp_2m --height 24
        --width 32 --batch-size 1 --dtype float32 --negative-prompt blue --no-progress --output x.png
        --guidance-interval 0.5 inf --cache-interval 3 --no-tiled --free unet text_encoder"""
    assert cli.main(["generate", "a red heart", *command.split()]) == 0
    assert pipeline.presets == [("emoji", "float32")]
    assert pipeline.free == [["unet", "text_encoder"]]
    assert pipeline.calls == [
        (
            ["a red heart"],
            {
                "negative_prompt": "blue",
                "num_images": 2,
                "num_steps": 25,
                "guidance_scale": 5.0,
                "guidance_interval": (0.5, np.inf),
                "cache_interval": 3,
                "seed": 3,
                "sampler": "dpmpp_2m",
                "height": 24,
                "width": 32,
                "batch_size": 1,
                "tiled": False,
                "progress": False,
            },
        )
    ]


def test_a_picture_tells_what_it_was_made_with(pipeline):
    cli.main(["generate", "a red heart", "--seed", "7", "--num-steps", "4", "--negative-prompt", "blue"])
    assert read_settings("out.png") == Settings(
        prompt="a red heart",
        negative_prompt="blue",
        preset="emoji",
        seed=7,
        num_steps=4,
        guidance_scale=5.0,
        sampler="ddim",
        height=8,
        width=16,
        dtype="bfloat16",
        backend="tensorflow",
        version=__version__,
    )


def test_a_random_seed_is_printed_and_stored(pipeline, capsys):
    cli.main(["generate", "a red heart"])
    cli.main(["generate", "a red heart", "--output", "other.png"])
    seeds = [read_settings(name).seed for name in ("out.png", "other.png")]
    assert seeds[0] != seeds[1]
    assert capsys.readouterr().out == f"out.png  seed {seeds[0]}\nother.png  seed {seeds[1]}\n"
    assert [arguments["seed"] for _, arguments in pipeline.calls] == seeds


def test_several_pictures_are_numbered_and_know_their_own_prompt_and_seed(pipeline, here):
    cli.main(["generate", "a heart", "a star", "--num-images", "2", "--seed", "5", "--output", "sheet.png"])
    assert sorted(path.name for path in here.iterdir()) == [f"sheet-{index}.png" for index in range(4)]
    settings = [read_settings(f"sheet-{index}.png") for index in range(4)]
    assert [each.prompt for each in settings] == ["a heart", "a heart", "a star", "a star"]
    assert [each.seed for each in settings] == [5, 6, 7, 8]
    assert [int(np.asarray(Image.open(f"sheet-{index}.png")).max()) for index in range(4)] == [0, 1, 2, 3]


def test_numbers_of_eleven_pictures_sort_by_name(pipeline, here):
    cli.main(["generate", "a heart", "--num-images", "11", "--seed", "0"])
    assert [read_settings(path).seed for path in sorted(here.iterdir())] == list(range(11))


def test_a_picture_is_made_again_from_itself(pipeline):
    command = """--seed 9 --num-steps 3 --guidance-scale 2.5 --sampler heun --height 24 --width 32 --dtype bfloat16
        --guidance-interval 0 2.5 --cache-interval 2"""
    cli.main(["generate", "a red heart", "--negative-prompt", "blue", *command.split()])
    assert pipeline.calls[0][1]["guidance_interval"] == (0, 2.5)
    cli.main(["generate", "--from", "out.png", "--output", "again.png"])
    assert pipeline.calls[0] == pipeline.calls[1]
    assert pipeline.presets == [("emoji", "bfloat16")] * 2
    assert Path("again.png").read_bytes() == Path("out.png").read_bytes()


def test_one_of_several_pictures_is_made_again_with_its_own_seed(pipeline):
    cli.main(["generate", "a red heart", "--seed", "9", "--num-images", "3"])
    cli.main(["generate", "--from", "out-2.png", "--output", "again.png"])
    prompt, arguments = pipeline.calls[1]
    assert (prompt, arguments["seed"], arguments["num_images"]) == (["a red heart"], 11, 1)


@pytest.fixture
def averaged_file(here):
    """As little as is taken for a file of Stable Diffusion 2.x with averaged weights."""
    names = ("model.diffusion_model.x", "first_stage_model.x", "cond_stage_model.model.x", "model_ema.x")
    return str(save(here / "model.safetensors", {name: np.zeros(1, "float32") for name in names}))


def test_weights_and_prediction_are_chosen_and_remembered(pipeline, averaged_file):
    cli.main(["generate", "a red heart", "--preset", averaged_file, "--ema", "--prediction", "eps"])
    made = read_settings("out.png")
    assert (made.preset, made.ema, made.prediction) == (averaged_file, True, "eps")
    cli.main(["generate", "--from", "out.png", "--output", "again.png"])
    assert Path("again.png").read_bytes() == Path("out.png").read_bytes()
    cli.main(["generate", "--from", "out.png", "--no-ema", "--prediction", "v"])
    assert pipeline.weights == [(True, "eps"), (True, "eps"), (False, "v")]


def test_engine_is_chosen_and_remembered(pipeline, monkeypatch):
    monkeypatch.setattr(cli, "check_engine", lambda engine: None)
    cli.main(["generate", "a red heart", "--engine", "openvino"])
    assert read_settings("out.png").engine == "openvino"
    cli.main(["generate", "--from", "out.png", "--output", "again.png"])
    assert Path("again.png").read_bytes() == Path("out.png").read_bytes()
    cli.main(["generate", "--from", "out.png", "--engine", "keras"])
    assert pipeline.engines == ["openvino", "openvino", "keras"]
    assert [len(free) for free in pipeline.free] == [0, 0, 3]


def test_an_engine_that_is_not_installed_is_told_before_keras_starts(capsys, monkeypatch):
    monkeypatch.setattr(cli, "start_keras", lambda: pytest.fail("Keras was started"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = refusal(capsys, "generate", "heart", "--engine", "openvino")
    assert said == 'latentdiff: error: engine="openvino" needs openvino: pip install "latentdiff[openvino]".\n'


def test_averaged_weights_that_are_not_there_are_told_before_keras_starts(capsys, monkeypatch, averaged_file):
    monkeypatch.setattr(cli, "start_keras", lambda: pytest.fail("Keras was started"))
    plain = save("plain.safetensors", {"first_stage_model.x": np.zeros(1, "float32")})
    assert "`ema` needs averaged weights" in refusal(capsys, "generate", "heart", "--preset", plain, "--ema")
    assert "A diffusers directory has one kind" in refusal(capsys, "generate", "heart", "--ema")


def test_what_is_given_wins_over_what_the_picture_says(pipeline):
    cli.main(["generate", "a red heart", "--seed", "9", "--num-steps", "3", "--negative-prompt", "blue"])
    cli.main(["generate", "a star", "--from", "out.png", "--num-steps", "5", "--negative-prompt", "", "--seed", "0"])
    prompt, arguments = pipeline.calls[1]
    assert prompt == ["a star"]
    assert (arguments["num_steps"], arguments["negative_prompt"], arguments["seed"]) == (5, "", 0)


def test_another_backend_than_the_pictures_is_said(pipeline, capsys, monkeypatch):
    cli.main(["generate", "a red heart"])
    monkeypatch.setattr(cli, "start_keras", lambda: "jax")
    cli.main(["generate", "--from", "out.png"])
    assert capsys.readouterr().err == (
        "latentdiff: warning: out.png was made with tensorflow, and this is jax: grey levels may differ by one\n"
    )
    assert read_settings("out.png").backend == "jax"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("", "the following arguments are required: command"),
        ("generat heart", "invalid choice: 'generat'"),
        ("generate", "a prompt is needed"),
        ("generate heart --preset emojis", "Received: 'emojis'. Did you mean 'emoji'?"),
        ("generate heart --preset nothing/like-it", "Names: emoji."),
        ("generate heart --preset model.ckpt", "a pickle can run any program"),
        ("generate heart --preset model.safetensors", "is truncated"),
        ("generate heart --output no/where/out.png", "in a directory that exists"),
        ("generate heart --output out.jpg", "must end in .png"),
        ("generate heart --output folder.png", "must not be a directory"),
        ("generate heart --num-images 0", "argument --num-images: must be a whole number, at least 1. Received: '0'"),
        ("generate heart --num-steps 2.5", "argument --num-steps: must be a whole number, at least 1"),
        ("generate heart --seed -1", "argument --seed: must be a whole number, at least 0"),
        ("generate heart --seed 9223372036854775808", "settings must have their types and ranges"),
        ("generate heart --seed 9223372036854775807 --num-images 2", "every picture's seed"),
        ("generate heart --guidance-scale nan", "argument --guidance-scale: must be a finite number"),
        ("generate heart --guidance-scale high", "argument --guidance-scale: must be a finite number"),
        ("generate heart --guidance-interval 2", "argument --guidance-interval: expected 2 arguments"),
        ("generate heart --guidance-interval -1 2", "argument --guidance-interval: must be a number, at least 0"),
        ("generate heart --guidance-interval 0 nan", "must be a number, at least 0, or inf. Received: 'nan'"),
        ("generate heart --guidance-interval 3 2", "Received: guidance_interval=[3.0, 2.0]"),
        ("generate heart --guidance-interval inf inf", "Received: guidance_interval=[None, None]"),
        ("generate heart --cache-interval 0", "argument --cache-interval: must be a whole number, at least 1"),
        ("generate heart --height 0", "argument --height: must be a whole number"),
        ("generate heart --batch-size none", "argument --batch-size: must be a whole number"),
        ("generate heart --sampler dpmpp_3m", "'dpmpp_2m'"),
        ("generate heart --dtype int8", "invalid choice: 'int8'"),
        ("generate heart --prediction epsilon", "argument --prediction: invalid choice: 'epsilon'"),
        ("generate heart --engine tensorrt", "argument --engine: invalid choice: 'tensorrt'"),
        ("generate heart --num 2", "unrecognized arguments: --num"),
        ("generate --from missing.png", "No such file or directory: 'missing.png'"),
        ("generate --from model.ckpt", "must be a PNG file"),
        ("generate --from plain.png", "which has none"),
        ("generate --from strange.png", "a sampler unknown here: 'magic'"),
        ("generate --from driven.png", "`engine` must be one of keras, openvino. Received: engine='tensorrt'"),
        ("generate --from told.png", "`prediction` must be one of eps, v, x0. Received: prediction='noise'"),
    ],
)
def test_bad_arguments_are_refused_in_one_line_before_keras_starts(capsys, monkeypatch, here, arguments, said):
    monkeypatch.setattr(cli, "start_keras", lambda: pytest.fail("Keras was started"))
    (here / "model.ckpt").write_bytes(b"\x80\x04.")
    (here / "model.safetensors").write_bytes(b"")
    (here / "folder.png").mkdir()
    white = np.full((4, 4, 3), 255, np.uint8)
    write_png("plain.png", white)
    write_png("strange.png", white, Settings(prompt="heart", preset="emoji", seed=0, sampler="magic"))
    write_png("driven.png", white, Settings(prompt="heart", preset="emoji", seed=0, engine="tensorrt"))
    write_png("told.png", white, Settings(prompt="heart", preset="emoji", seed=0, prediction="noise"))
    before = sorted(here.iterdir())
    assert said in refusal(capsys, *arguments.split())
    assert sorted(here.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--height 9", "`height` must be a positive multiple of 2. Received: height=9."),
        ("--width 7", "`width` must be a positive multiple of 2. Received: width=7."),
        ("--num-steps 1001", "`num_steps` must be"),
        ("--sampler lcm --num-steps 60", "`num_steps` of lcm must be at most"),
    ],
)
def test_what_a_model_cannot_make_is_refused_before_it_is_loaded(
    tiny_directory, monkeypatch, capsys, here, arguments, said
):
    from latentdiff import presets

    monkeypatch.setattr(presets, "load_pipeline", lambda *_, **__: pytest.fail("the model was loaded"))
    assert said in refusal(capsys, "generate", "heart", "--preset", str(tiny_directory), *arguments.split())
    assert list(here.iterdir()) == []


def test_a_prompt_that_is_not_text_is_refused(capsys):
    assert "argument prompt: must be text" in refusal(
        capsys, "generate", b"\xff heart".decode(errors="surrogateescape")
    )


@pytest.mark.parametrize("error", [ValueError("`height` must\n be right."), FileNotFoundError("no `config.json`")])
def test_what_the_pipeline_refuses_is_one_line_and_writes_nothing(pipeline, capsys, here, error):
    pipeline.error = error
    assert refusal(capsys, "generate", "heart").split(": ", 2)[2] == " ".join(str(error).split()) + "\n"
    assert list(here.iterdir()) == []


def test_a_mistake_in_the_program_is_not_hidden(pipeline):
    pipeline.error = KeyError("x")
    with pytest.raises(KeyError):
        cli.main(["generate", "heart"])


def test_an_interrupt_ends_without_a_traceback(pipeline, capsys, here):
    pipeline.error = KeyboardInterrupt()
    assert cli.main(["generate", "heart"]) == 130
    assert capsys.readouterr().err == "latentdiff: stopped\n"
    assert list(here.iterdir()) == []


def test_warnings_are_one_line(pipeline, capsys, monkeypatch):
    def from_preset(preset, **choices):
        warnings.warn("the prompt was\ncut off", UserWarning, stacklevel=2)
        return pipeline

    monkeypatch.setattr(pipeline, "from_preset", from_preset)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        cli.main(["generate", "heart"])
    assert capsys.readouterr().err == "latentdiff: warning: the prompt was cut off\n"


def test_the_script_takes_the_arguments_of_the_command():
    script = [sys.executable, str(ROOT / "scripts" / "text2image.py")]
    done = subprocess.run([*script, "heart", "--num-steps", "0"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "latentdiff: error: argument --num-steps: must be a whole number, at least 1. Received: '0'\n"
    )


def test_a_wrong_preset_is_refused_without_importing_keras():
    program = """
import sys
from latentdiff.cli import main
try:
    main(["generate", "heart", "--preset", "no such model"])
finally:
    assert not {"keras", "tensorflow", "jax", "latentdiff.pipeline"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.startswith("latentdiff: error: `preset` must be"), done.stderr
    assert done.returncode == 2


@pytest.mark.slow
def test_starting_keras_writes_nothing(monkeypatch):
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
    program = "from latentdiff.cli import start_keras; print(start_keras())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr == ""
    assert done.stdout in ("tensorflow\n", "jax\n")
    assert done.returncode == 0


def test_a_failed_start_shows_what_was_held_back(monkeypatch, capfd):
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL", raising=False)
    with pytest.raises(ImportError), cli._without_start_log():
        cli.os.write(2, b"libcuda is too old\n")
        raise ImportError("no backend")
    monkeypatch.delenv("TF_CPP_MIN_LOG_LEVEL")
    assert capfd.readouterr().err == "libcuda is too old\n"


def test_the_command_knows_what_the_pipeline_knows():
    from latentdiff.diffusion.noise import MAX_SEED
    from latentdiff.diffusion.samplers import SAMPLERS
    from latentdiff.pipeline import TextToImage

    assert cli.SAMPLERS == SAMPLERS
    assert pictures.MAX_SEED == MAX_SEED
    defaults = inspect.signature(TextToImage.generate).parameters
    assert Settings.num_steps == defaults["num_steps"].default
    assert Settings.guidance_scale == defaults["guidance_scale"].default
    assert Settings.guidance_interval == defaults["guidance_interval"].default
    assert Settings.cache_interval == defaults["cache_interval"].default
