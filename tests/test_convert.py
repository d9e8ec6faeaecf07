"""`latentdiff convert` and `latentdiff info`: from any form to a directory, nothing lost, and what is in them said."""

import json
import subprocess
import sys
from pathlib import Path

import ldm_files
import numpy as np
import pytest
import safetensors.numpy
from ldm_files import CONFIGS, DTYPES, STEMS, save

from latentdiff import cli
from latentdiff.checkpoints import diffusers
from latentdiff.checkpoints.files import CheckpointError
from latentdiff.checkpoints.shards import parse_size, plan_shards
from latentdiff.checkpoints.sources import open_source
from latentdiff.convert import convert

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"unet": "unet", "autoencoder": "vae", "text_encoder": "text_encoder"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("convert")


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def age(request):
    return request.param


@pytest.fixture(scope="module")
def theirs(age, root):
    """diffusers' tensors of each component."""
    return {kind: ldm_files.component(root / age / kind, kind, c) for kind, c in CONFIGS[age].items()}


@pytest.fixture(scope="module")
def file(age, root, theirs):
    """The single file; half of its tensors are float16."""
    tensors = ldm_files.whole_file(theirs, age) | ldm_files.schedule()
    tensors = {
        name: array.astype("float16") if i % 2 and array.dtype == np.float32 and name != "betas" else array
        for i, (name, array) in enumerate(tensors.items())
    }
    return save(root / f"{age}.safetensors", tensors)


@pytest.fixture(scope="module")
def directory(age, root, file):
    """What is made of the file."""
    convert(file, root / f"{age}-directory", prediction="eps" if age == "sd1" else "v")
    return root / f"{age}-directory"


@pytest.fixture(scope="module")
def alone(root):
    """An autoencoder's own file."""
    tensors = ldm_files.component(root / "vae", "autoencoder", CONFIGS["sd1"]["autoencoder"])
    return save(root / "vae.safetensors", ldm_files.autoencoder(tensors))


def tensors_of(folder):
    loaded = {}
    for path in sorted(folder.glob("*.safetensors")):
        loaded |= safetensors.numpy.load_file(path)
    return loaded


def run(capsys, *arguments):
    assert cli.main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def refusal(capsys, *arguments):
    with pytest.raises(SystemExit) as exit:
        cli.main([str(argument) for argument in arguments])
    output = capsys.readouterr()
    assert (exit.value.code, output.out, output.err.count("\n")) == (2, "", 1)
    return output.err


def test_the_directory_holds_the_tensors_of_the_file_in_their_own_dtypes(directory, theirs):
    dtypes = set()
    for kind, folder in FOLDERS.items():
        found = tensors_of(directory / folder)
        assert found.keys() == theirs[kind].keys()
        for name, array in theirs[kind].items():
            assert np.array_equal(found[name].astype("float32"), array), name
        dtypes |= {array.dtype for array in found.values()}
    assert dtypes == {np.dtype("float16"), np.dtype("float32")}


def test_the_directory_says_what_the_file_said(age, directory, file):
    source, made = open_source(file, prediction="eps" if age == "sd1" else "v"), open_source(directory)
    assert made.settings() == source.settings()
    assert made.sample_size() == source.sample_size()
    assert made.kinds == source.kinds
    theirs, ours = source.tokenizer(), made.tokenizer()
    for name in ("vocabulary", "merges", "context_length", "pad_token", "start_token", "end_token"):
        assert ours[name] == theirs[name], name
    for kind in FOLDERS:
        assert made.component(kind).config == source.component(kind).config
    text = json.loads((directory / "text_encoder" / "config.json").read_text())
    assert (text["bos_token_id"], text["eos_token_id"], text["pad_token_id"]) == (
        49406,
        49407,
        49407 if age == "sd1" else 0,
    )
    size = json.loads((directory / "vae" / "config.json").read_text())["sample_size"]
    assert size == (2 * 64 if age == "sd1" else 4 * 96)  # two levels and three


def test_a_directory_converts_to_itself(directory, tmp_path):
    convert(directory, tmp_path / "again")
    files = sorted(path.relative_to(directory) for path in directory.rglob("*") if path.is_file())
    assert files == sorted(
        path.relative_to(tmp_path / "again") for path in (tmp_path / "again").rglob("*") if path.is_file()
    )
    for name in files:
        assert (directory / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_autoencoders_file_becomes_a_components_directory(dtype, alone, root, tmp_path):
    convert(alone, tmp_path / "vae", dtype=dtype)
    assert sorted(path.name for path in (tmp_path / "vae").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    found, expected = tensors_of(tmp_path / "vae"), tensors_of(root / "vae")
    assert found.keys() == expected.keys()
    for name, array in found.items():
        assert array.dtype == DTYPES[dtype]
        assert np.array_equal(array.astype("float32"), expected[name])


@pytest.mark.parametrize("size", ["100KB", 50_000, "20KiB"])
def test_shards_hold_what_one_file_holds(size, alone, root, tmp_path):
    convert(alone, tmp_path / "vae", max_shard_size=size)
    names = sorted(path.name for path in (tmp_path / "vae").glob("*.safetensors"))
    count = len(names)
    assert count > 2
    assert names == [f"{STEMS['autoencoder']}-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    index = json.loads((tmp_path / "vae" / f"{STEMS['autoencoder']}.safetensors.index.json").read_text())
    expected = tensors_of(root / "vae")
    assert index["metadata"] == {"total_size": sum(array.nbytes for array in expected.values())}
    assert set(index["weight_map"].values()) == set(names)
    for name in names:
        shard = safetensors.numpy.load_file(tmp_path / "vae" / name)
        assert len(shard) == 1 or sum(array.nbytes for array in shard.values()) <= parse_size(size)
    found = diffusers.read_component(tmp_path / "vae", "autoencoder").weights
    whole = diffusers.read_component(root / "vae", "autoencoder").weights
    assert all(np.array_equal(found[path], array) for path, array in whole.items())


def test_shards_are_filled_in_order():
    layout = {"a": ("F32", (2,)), "b": ("F16", (4,)), "c": ("F32", (10,)), "d": ("BF16", ()), "e": ("F32", (0,))}
    assert plan_shards(layout, 16) == [["a", "b"], ["c"], ["d", "e"]]
    assert plan_shards(layout, 2) == [["a"], ["b"], ["c"], ["d", "e"]]
    assert plan_shards(layout, 58) == [list(layout)]
    assert plan_shards({}, 1) == [[]]


@pytest.mark.parametrize(
    ("size", "expected"), [(7, 7), ("7", 7), ("2GB", 2 * 10**9), ("1GiB", 2**30), ("500MB", 5 * 10**8), ("3 KB", None)]
    + [(size, None) for size in (0, -1, True, 2.5, "", "GB", "2TB", "2gb", "-2GB", "1e9", None, "９GB")]
)  # fmt: skip
def test_size_of_a_shard_is_bytes_or_has_a_unit(size, expected):
    if expected is None:
        with pytest.raises(ValueError, match="`max_shard_size` must be bytes"):
            parse_size(size)
    else:
        assert parse_size(size) == expected


def test_pipeline_is_saved_in_shards(tiny_pipe, tiny_directory, tmp_path):
    tiny_pipe.save_to_preset(tmp_path / "model", dtype="float16", max_shard_size="10KB")
    assert len(list((tmp_path / "model" / "unet").glob("*-of-*.safetensors"))) > 1
    for kind in FOLDERS:
        found = diffusers.read_component(tmp_path / "model", kind).weights
        expected = diffusers.read_component(tiny_directory, kind).weights
        assert all(np.array_equal(found[path], array.astype("float16")) for path, array in expected.items())
    tiny_pipe.save_to_preset(tmp_path / "model", dtype=None, overwrite=True)
    names = {path.name for path in (tmp_path / "model").rglob("*.safetensors*")}
    assert names == {"model.safetensors", "diffusion_pytorch_model.safetensors"}
    for size in ("2TB", 0):
        with pytest.raises(ValueError, match="`max_shard_size` must be"):
            tiny_pipe.save_to_preset(tmp_path / "other", max_shard_size=size)
    assert not (tmp_path / "other").exists()


def test_averaged_weights_are_written_where_they_are_asked_for(root, tmp_path):
    tensors = {kind: ldm_files.component(tmp_path / kind, kind, c) for kind, c in CONFIGS["sd1"].items()}
    whole = ldm_files.whole_file(tensors, "sd1")
    file = save(tmp_path / "model.safetensors", whole | ldm_files.averaged(whole))
    convert(file, tmp_path / "ema", ema=True)
    for name, array in tensors_of(tmp_path / "ema" / "unet").items():
        assert np.array_equal(array, tensors["unet"][name] + 1)
    with pytest.raises(CheckpointError, match="A diffusers directory has one kind"):
        convert(tmp_path / "ema", tmp_path / "again", ema=True)


def test_existing_directory_is_kept_unless_that_is_asked_for(alone, tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        convert(alone, tmp_path / "vae")
    assert (tmp_path / "vae" / "config.json").read_text() == "{}"
    convert(alone, tmp_path / "vae", overwrite=True)
    assert open_source(tmp_path / "vae").kinds == ("autoencoder",)


def test_nothing_is_left_of_a_conversion_that_failed(root, tmp_path):
    tensors = ldm_files.autoencoder(tensors_of(root / "vae"))
    tensors["decoder.conv_out.bias"] = np.full(3, np.inf, "float32")
    file = save(tmp_path / "broken.safetensors", tensors)
    with pytest.raises(CheckpointError, match="Weights must be finite. .*decoder.conv_out.bias"):
        convert(file, tmp_path / "made")
    assert [path.name for path in tmp_path.iterdir()] == ["broken.safetensors"]


def test_parts_that_are_no_pipeline_and_no_component_are_told(root, tmp_path):
    names = ("model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.decoder.conv_in.weight")
    file = save(tmp_path / "two.safetensors", {name: np.zeros((32, 4, 3, 3), "float32") for name in names})
    with pytest.raises(CheckpointError):
        convert(file, tmp_path / "made")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="a whole pipeline or one network. Received: none"):
        convert(tmp_path / "empty", tmp_path / "made")


def test_command_converts_and_says_where(capsys, alone, root, tmp_path):
    assert run(capsys, "convert", alone, tmp_path / "vae", "--dtype", "float16", "--max-shard-size", "100KB") == (
        f"{tmp_path / 'vae'}\n"
    )
    assert all(array.dtype == np.float16 for array in tensors_of(tmp_path / "vae").values())
    assert "overwrite=True" in refusal(capsys, "convert", alone, tmp_path / "vae")
    run(capsys, "convert", alone, tmp_path / "vae", "--overwrite")
    assert tensors_of(tmp_path / "vae").keys() == tensors_of(root / "vae").keys()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("convert", "FILE"), "required: directory"),
        (("convert", "FILE", "made", "--dtype", "float64"), "invalid choice: 'float64'"),
        (("convert", "FILE", "made", "--prediction", "epsilon"), "invalid choice: 'epsilon'"),
        (("convert", "FILE", "made", "--max-shard-size", "2TB"), "`max_shard_size` must be bytes"),
        (("convert", "FILE", "made", "--ema"), "`ema` needs averaged weights"),
        (("convert", "FILE", "made", "--variant", "fp16"), "has no variants"),
        (("convert", "nowhere", "made"), "There is no model directory or file `nowhere`"),
        (("info",), "required: path"),
        (("info", "nowhere"), "There is no model directory or file `nowhere`"),
        (("info", "lora.safetensors"), "a LoRA"),
        (("info", "model.ckpt"), "a pickle can run any program and is never opened"),
    ],
)
def test_bad_arguments_are_refused_in_one_line(arguments, said, capsys, alone, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("lora.safetensors", {"lora_unet_x.lora_up.weight": np.zeros(1, "float32")})
    Path("model.ckpt").write_bytes(b"\x80\x04.")
    assert said in refusal(capsys, *(alone if word == "FILE" else word for word in arguments))
    assert not Path("made").exists()


def test_command_says_what_is_in_a_file(age, capsys, file):
    said = run(capsys, "info", file).splitlines()
    unet, text = CONFIGS[age]["unet"], CONFIGS[age]["text_encoder"]
    parameters = sum(np.prod(e.shape) for e in diffusers.key_map("unet", unet))
    assert said[0] == f"{file}: single file in LDM's layout"
    counted, _, dtypes = said[1].partition(" tensors, ")
    assert counted.split() == ["UNet", f"{parameters:,}", "parameters,", str(len(diffusers.key_map("unet", unet)))]
    assert set(dtypes.split(", ")) == {"float16", "float32"}
    by_word = {line.split()[0]: line.split(None, 1)[1] for line in said}
    assert f" {len(diffusers.key_map('text_encoder', text))} tensors, " in by_word["text"]
    assert by_word["schedule"] == "scaled_linear, 1000 timesteps, beta 0.00085 .. 0.012"
    assert by_word["prediction"] == ("eps" if age == "sd1" else "v")
    assert by_word["sampler"] == ("pndm" if age == "sd1" else "ddim")
    assert by_word["tokenizer"] == "49,408 tokens"
    assert by_word["latent"] == ("64 x 64" if age == "sd1" else "96 x 96")
    assert ("note:" in by_word) == (age == "sd2")


def test_command_says_it_as_json(age, capsys, directory):
    said = json.loads(run(capsys, "info", directory, "--json"))
    assert (said["form"], said["whole"], said["missing"], said["problems"]) == ("diffusers directory", True, [], [])
    assert said["settings"]["prediction"] == ("eps" if age == "sd1" else "v")
    assert said["tokens"] == 49408
    for kind, config in CONFIGS[age].items():
        part = said["parts"][kind]
        assert part["parameters"] == sum(np.prod(e.shape) for e in diffusers.key_map(kind, config))
        assert set(part["dtypes"]) == {"float16", "float32"} and sum(part["dtypes"].values()) == part["tensors"]
        assert part["config"] == json.loads(json.dumps(config))


def test_command_says_what_is_missing_and_what_is_left_over(capsys, alone, root, tmp_path):
    said = run(capsys, "info", alone)
    assert said.splitlines()[0].endswith("not a whole pipeline")
    assert "UNet          missing" in said and "text encoder  missing" in said
    tensors = ldm_files.autoencoder(tensors_of(root / "vae"))
    del tensors["decoder.conv_out.bias"]
    file = save(tmp_path / "x.safetensors", tensors | {"mystery": np.zeros(2, "float32")})
    said = run(capsys, "info", file)
    assert "autoencoder   cannot be opened" in said and "mystery" in said
    del tensors["encoder.conv_out.bias"]
    said = json.loads(run(capsys, "info", save(file, tensors), "--json"))
    problem = said["parts"]["autoencoder"]["problem"]
    assert "missing: decoder.conv_out.bias" in problem and "missing: encoder.conv_out.bias" in problem
    assert said["whole"] is False


def test_a_pickle_without_torch_is_refused_with_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "model.ckpt").write_bytes(b"\x80\x04.")
    with pytest.raises(CheckpointError, match=r"torch, which is missing: `pip install latentdiff\[convert\]`"):
        convert(tmp_path / "model.ckpt", tmp_path / "made")


def test_an_old_torch_is_refused(monkeypatch, tmp_path):
    from types import SimpleNamespace

    for version in ("2.5.1+cpu", "1.13.0", "2.9.2"):
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(__version__=version))
        (tmp_path / "model.bin").write_bytes(b"\x80\x04.")
        with pytest.raises(CheckpointError, match=f"torch must be at least 2.10.* Received: torch {version[:3]}"):
            convert(tmp_path / "model.bin", tmp_path / "made")


def test_converting_and_telling_import_neither_keras_nor_torch(alone, tmp_path):
    program = f"""
import sys
from latentdiff.cli import main
main(["info", {str(alone)!r}])
main(["convert", {str(alone)!r}, {str(tmp_path / "made")!r}])
assert not {{"keras", "tensorflow", "jax", "torch"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "made" / "config.json").is_file()
