"""Single files and pickles against diffusers: its own `from_single_file` of the same file finds the same tensors."""

import os
import pickle
import sys
import types

import diffusers
import ldm_files
import numpy as np
import pytest
import reference
import tiny_pipelines
import torch
import transformers

import latentdiff as ld
from latentdiff.checkpoints.clip_vocabulary import clip_vocabulary
from latentdiff.checkpoints.files import CheckpointError
from latentdiff.checkpoints.sources import open_source
from latentdiff.convert import convert

KINDS = {"unet": "unet", "autoencoder": "vae", "text_encoder": "text_encoder"}
LEVELS = {"sd1": 2, "sd2": 3}
ATTENTION = {"sd1": (True, False), "sd2": (True, True, False)}
BLOCKS = {"sd1": 2, "sd2": 1}
PREDICTION = {"sd1": "eps", "sd2": "v"}


def build(kind):
    """A pipeline of Stable Diffusion's structure, with the numbers that a file's shapes do not say: 32 groups; 8 heads
    in SD 1.x, and heads of 64 channels (at least one) elsewhere."""
    generator = torch.Generator().manual_seed(3)
    down = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in ATTENTION[kind]]
    vocabulary, merges = clip_vocabulary()
    ids = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407 if kind == "sd1" else 0}
    text_encoder = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=49408,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=1,
            max_position_embeddings=77,
            hidden_act="quick_gelu" if kind == "sd1" else "gelu",
            projection_dim=32,
            **ids,
        )
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=64 if kind == "sd1" else 96,
        block_out_channels=(32, 64, 64)[: LEVELS[kind]],
        down_block_types=down,
        up_block_types=[name.replace("Down", "Up") for name in reversed(down)],
        layers_per_block=BLOCKS[kind],
        cross_attention_dim=32,
        attention_head_dim=8 if kind == "sd1" else (1, 1, 1),
        use_linear_projection=kind == "sd2",
    )
    autoencoder = diffusers.AutoencoderKL(
        block_out_channels=(32, 64),
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        layers_per_block=BLOCKS[kind],
        sample_size=128 if kind == "sd1" else 192,
    )
    for model in (text_encoder, unet, autoencoder):
        tiny_pipelines.randomise(model.eval(), generator)
    scheduler = diffusers.PNDMScheduler if kind == "sd1" else diffusers.DDIMScheduler
    return diffusers.StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=transformers.CLIPTokenizer(
            vocab=vocabulary,
            merges=list(merges),
            pad_token="<|endoftext|>" if kind == "sd1" else "!",
            model_max_length=77,
        ),
        unet=unet,
        scheduler=scheduler.from_config(tiny_pipelines.SCHEDULERS[kind]),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def ldm_tensors(pipe, kind):
    """The pipeline's tensors under LDM's names, by the tests' own map."""
    state = {k: {n: t.numpy() for n, t in getattr(pipe, f).state_dict().items()} for k, f in KINDS.items()}
    unet = ldm_files.unet(state["unet"], LEVELS[kind], BLOCKS[kind], ATTENTION[kind])
    text = ldm_files.clip if kind == "sd1" else ldm_files.open_clip
    return {
        **ldm_files.prefixed("model.diffusion_model.", unet),
        **ldm_files.prefixed("first_stage_model.", ldm_files.autoencoder(state["autoencoder"])),
        **text(state["text_encoder"]),
    }


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(kind):
    return build(kind)


@pytest.fixture(scope="module")
def directory(pipe, kind, tmp_path_factory):
    """What diffusers saves."""
    directory = tmp_path_factory.mktemp("single") / kind
    pipe.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def file(pipe, kind, directory):
    """The single file."""
    return ldm_files.save(directory.with_suffix(".safetensors"), ldm_tensors(pipe, kind) | ldm_files.schedule())


@pytest.fixture(scope="module")
def ours(file, kind):
    return ld.TextToImage.from_preset(file, dtype="float32", prediction=PREDICTION[kind])


def assert_same(source, other):
    for kind in KINDS:
        found, expected = source.component(kind), other.component(kind)
        assert found.config == expected.config
        assert found.weights.keys() == expected.weights.keys()
        for path, array in expected.weights.items():
            np.testing.assert_array_equal(found.weights[path], array, err_msg=path)


def test_file_is_the_directory_tensor_for_tensor(file, directory, kind):
    source, theirs = open_source(file, prediction=PREDICTION[kind]), open_source(directory)
    assert_same(source, theirs)
    assert source.sample_size() == theirs.sample_size()
    ours, settings = source.settings(), theirs.settings()
    for name in ("sampler", "schedule", "num_timesteps", "beta_start", "beta_end", "prediction", "steps_offset"):
        assert getattr(ours, name) == getattr(settings, name), name
    assert (ours.set_alpha_to_one, ours.clip) == (settings.set_alpha_to_one, settings.clip)
    ours, tokenizer = source.tokenizer(), theirs.tokenizer()
    for name in ("vocabulary", "merges", "pad_token", "end_token", "context_length"):
        assert ours[name] == tokenizer[name], name


def test_diffusers_finds_the_same_in_the_file(file, directory, tmp_path):
    theirs = diffusers.StableDiffusionPipeline.from_single_file(
        file, config=str(directory), local_files_only=True, safety_checker=None
    )
    theirs.save_pretrained(tmp_path / "theirs")
    assert_same(open_source(file), open_source(tmp_path / "theirs"))


def test_networks_of_the_file_say_what_the_peers_say(ours, pipe):
    prompts = ["a photo of a cat!", "naïve café 42"]
    tokens = reference.tokens(pipe, prompts)
    np.testing.assert_array_equal(ours.tokenizer(prompts), tokens)
    context = reference.context(pipe, tokens)
    np.testing.assert_allclose(np.asarray(ours.text_encoder(tokens)), context, atol=2e-4)
    rng = np.random.default_rng(0)
    latent = rng.standard_normal((2, 8, 12, 4)).astype("float32")
    timestep = np.array([1, 951], "float32")
    found = ours.unet({"latent": latent, "timestep": timestep, "context": context})
    np.testing.assert_allclose(
        np.asarray(found), reference.unet_output(pipe.unet, latent, timestep, context), atol=2e-4
    )
    np.testing.assert_allclose(
        np.asarray(ours.autoencoder.decode(latent)), reference.decoded(pipe.vae, latent), atol=2e-4
    )


def test_what_is_converted_is_what_diffusers_saved(file, pipe, kind, tmp_path):
    convert(file, tmp_path / "made", prediction=PREDICTION[kind], max_shard_size="200KB")
    assert len(list((tmp_path / "made" / "unet").glob("*-of-*.safetensors"))) > 1
    opened = reference.open_pipeline(tmp_path / "made")
    for folder in KINDS.values():
        expected = getattr(pipe, folder).state_dict()
        found = getattr(opened, folder).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert opened.scheduler.config.prediction_type == pipe.scheduler.config.prediction_type
    texts = reference.TEXTS
    np.testing.assert_array_equal(reference.tokens(opened, texts), reference.tokens(pipe, texts))


def test_our_shards_are_those_of_diffusers(pipe, tmp_path):
    import json

    pipe.unet.save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    convert(tmp_path / "theirs", tmp_path / "ours", max_shard_size="100KB")
    name = "diffusion_pytorch_model.safetensors.index.json"
    theirs, ours = (json.loads((tmp_path / who / name).read_text()) for who in ("theirs", "ours"))
    assert ours["weight_map"].keys() == theirs["weight_map"].keys()
    assert ours["metadata"]["total_size"] == theirs["metadata"]["total_size"]
    opened = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(opened.state_dict()[key], value) for key, value in pipe.unet.state_dict().items())


def as_torch(tensors):
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in tensors.items()}


def test_pickle_is_converted_to_the_same_directory(pipe, kind, directory, tmp_path):
    content = {"state_dict": as_torch(ldm_tensors(pipe, kind)), "global_step": 470000, "epoch": 12}
    torch.save(content, tmp_path / "model.ckpt")
    convert(tmp_path / "model.ckpt", tmp_path / "made", prediction=PREDICTION[kind])
    assert_same(open_source(tmp_path / "made"), open_source(directory))


@pytest.mark.parametrize("form", ["legacy", "bare", "bfloat16"])
def test_pickle_of_any_form_is_converted(form, pipe, directory, tmp_path):
    state = as_torch(ldm_files.autoencoder({name: t.numpy() for name, t in pipe.vae.state_dict().items()}))
    if form == "bfloat16":
        state = {name: tensor.bfloat16() for name, tensor in state.items()}
    content = state if form == "bare" else {"state_dict": state, "global_step": 470000}
    torch.save(content, tmp_path / "vae.ckpt", _use_new_zipfile_serialization=form != "legacy")
    convert(tmp_path / "vae.ckpt", tmp_path / "made")
    weights = open_source(tmp_path / "made").component("autoencoder").weights
    for path, array in open_source(directory).component("autoencoder").weights.items():
        want = torch.from_numpy(array.copy()).bfloat16().float().numpy() if form == "bfloat16" else array
        np.testing.assert_array_equal(weights[path].astype("float32"), want, err_msg=path)


def test_pickled_components_of_a_directory_are_converted(pipe, directory, tmp_path):
    pipe.save_pretrained(tmp_path / "old", safe_serialization=False)
    for path in [*(tmp_path / "old").rglob("*.safetensors")]:  # transformers 5 writes nothing else
        torch.save(pipe.text_encoder.state_dict(), path.with_name("pytorch_model.bin"))
        path.unlink()
    assert len(list((tmp_path / "old").rglob("*.bin"))) == 3
    with pytest.raises(CheckpointError, match="a pickle can run any program"):
        ld.TextToImage.from_preset(tmp_path / "old")
    convert(tmp_path / "old", tmp_path / "made")
    assert_same(open_source(tmp_path / "made"), open_source(directory))


def test_record_of_a_trainer_beside_the_weights_is_passed_over(pipe, tmp_path, monkeypatch):
    """As in Stable Diffusion 1.x's own .ckpt files; the class itself is not needed."""
    module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    names = ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__)
    for name in names:
        monkeypatch.setitem(sys.modules, name, module if name == module.__name__ else types.ModuleType(name))
    vae = {n: t.numpy() for n, t in pipe.vae.state_dict().items()}
    state = as_torch(ldm_files.autoencoder(vae))
    torch.save({"state_dict": state, "callbacks": {module.ModelCheckpoint: {"best": 0.1}}}, tmp_path / "vae.ckpt")
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    convert(tmp_path / "vae.ckpt", tmp_path / "made")
    assert open_source(tmp_path / "made").kinds == ("autoencoder",)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_program_in_a_pickle_is_not_run(form, tmp_path):
    content = {"state_dict": {"x": torch.zeros(1)}, "more": Bomb(str(tmp_path / "ran"))}
    path = tmp_path / "model.ckpt"
    if form == "pickle":
        path.write_bytes(pickle.dumps(content["more"]))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError, match="must hold tensors and nothing else"):
        convert(path, tmp_path / "made")
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.ckpt"]


@pytest.mark.parametrize("content", [[1, 2], {}, {"a": "text"}, torch.zeros(3), {"state_dict": {}}])
def test_pickle_of_anything_else_is_told(content, tmp_path):
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="must hold named tensors"):
        convert(tmp_path / "model.pt", tmp_path / "made")


@pytest.mark.parametrize("size", [0, 1, 10, 500, 5000])
def test_damaged_pickle_is_told(size, tmp_path):
    torch.save({"x": torch.zeros(3000)}, tmp_path / "model.ckpt")
    (tmp_path / "model.ckpt").write_bytes((tmp_path / "model.ckpt").read_bytes()[:size])
    with pytest.raises(CheckpointError, match="must hold tensors and nothing else"):
        convert(tmp_path / "model.ckpt", tmp_path / "made")
