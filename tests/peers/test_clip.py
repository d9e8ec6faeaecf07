"""The CLIP pair beside transformers' CLIPModel, live: read, written, and the same numbers."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import tiny_clip  # noqa: E402
from PIL import Image  # noqa: E402
from silence import Silence  # noqa: E402

import latentdiff as ld  # noqa: E402
from latentdiff.backend import to_numpy  # noqa: E402
from latentdiff.training import CLIPTraining  # noqa: E402

TINY_TEXT = {"vocabulary_size": 32, "context_length": 9, "width": 8, "depth": 1, "heads": 2, "mlp_width": 16}
TINY_IMAGE = {"image_size": 12, "patch_size": 6, "width": 8, "depth": 1, "heads": 2, "mlp_width": 16}


def assert_same(training, said, given):
    image, text = training(given)
    ours = {"image_embedding": image, "text_embedding": text, "logits": training.logits(image, text)}
    for name, theirs in said.items():
        error = np.abs(to_numpy(ours[name]) - theirs).max() / np.abs(theirs).max()
        assert error < 1e-4, f"{name}: {error:.2e}"


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "gelu_pytorch_tanh"])
def test_their_pair_is_the_same_here(activation, tmp_path):
    model = tiny_clip.build(activation)
    model.save_pretrained(tmp_path)
    given = tiny_clip.inputs()
    assert_same(CLIPTraining.from_preset(tmp_path), tiny_clip.outputs(model, **given), given)


@pytest.mark.parametrize("end_id", [2, 7])
def test_caption_ends_where_theirs_does(end_id, tmp_path):
    """2 is what OpenAI's files say, and means the highest token; any other is the token itself."""
    model = tiny_clip.build(end_id=end_id)
    model.save_pretrained(tmp_path)
    given = tiny_clip.inputs(end_id=end_id if end_id != 2 else tiny_clip.END)
    assert_same(CLIPTraining.from_preset(tmp_path), tiny_clip.outputs(model, **given), given)


@pytest.fixture(scope="module")
def training():
    text = ld.CLIPTextEncoder(**TINY_TEXT, activation="gelu")
    image = ld.CLIPImageEncoder(**TINY_IMAGE, projection_dim=6, activation="gelu")
    return CLIPTraining(text, image, tiny_clip.END, temperature=0.2)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_our_pair_opens_there_in_silence_and_is_the_same(dtype, training, tmp_path):
    training.save_to_preset(tmp_path / "model", dtype=dtype)
    with Silence():
        model, info = transformers.CLIPModel.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info.values()), info
    assert model.dtype == torch.float32
    given = tiny_clip.inputs()
    expected = CLIPTraining.from_preset(tmp_path / "model") if dtype == "float16" else training
    assert_same(expected, tiny_clip.outputs(model.eval(), **given), given)


@pytest.mark.parametrize("name", ["CLIPVisionModelWithProjection", "CLIPTextModelWithProjection", "CLIPTextModel"])
def test_each_half_opens_there_alone(name, training, tmp_path):
    training.save_to_preset(tmp_path / "model")
    model, info = getattr(transformers, name).from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"]


def test_their_processor_gives_our_image_encoder_what_it_expects(directory, training, tmp_path):
    tokenizer = ld.CLIPTokenizer.from_directory(directory)
    text = ld.CLIPTextEncoder(**{**TINY_TEXT, "vocabulary_size": tokenizer.vocabulary_size, "context_length": 77})
    pair = CLIPTraining(text, training.image_encoder, tokenizer.end_id)
    pair.save_to_preset(tmp_path / "model", tokenizer)
    picture = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    prompts = ["a red heart, noto style", "a cat"]
    model = transformers.CLIPModel.from_pretrained(tmp_path / "model").eval()
    processor = transformers.CLIPProcessor.from_pretrained(tmp_path / "model")
    asked = processor(text=prompts, images=Image.fromarray(picture), return_tensors="pt", padding=True)
    with torch.no_grad():
        theirs = model(**asked).logits_per_image.numpy()
    image = pair.embed_image((picture[None] / 127.5 - 1).astype("float32"))
    ours = to_numpy(pair.logits(image, pair.embed_text(tokenizer(prompts))))
    np.testing.assert_allclose(ours, theirs, atol=1e-3)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == "clip"
