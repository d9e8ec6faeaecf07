"""What is fine-tuned here from diffusers' files opens in diffusers, changed where it was trained and nowhere else."""

import keras
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

import reference  # noqa: E402
import tiny_pipelines  # noqa: E402
from reference import PROMPTS  # noqa: E402

import latentdiff as ld  # noqa: E402
from latentdiff.diffusion.process import GaussianDiffusion  # noqa: E402
from latentdiff.training import DiffusionTraining  # noqa: E402

# diffusers' and torch's own business.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module", params=[False, True], ids=["unet", "unet_and_text_encoder"])
def joint(request):
    """Whether the text encoder is trained along."""
    return request.param


@pytest.fixture(scope="module")
def fine_tuned(directory, joint, tmp_path_factory):
    """diffusers' pipeline of a directory that was fine-tuned for two steps, and the package's own."""
    pipe = ld.TextToImage.from_preset(str(directory), dtype="float32")
    pipe.text_encoder.trainable = joint
    training = DiffusionTraining(
        pipe.unet, pipe.text_encoder, GaussianDiffusion(pipe.schedule, pipe.settings.prediction), pipe.tokenizer("")[0]
    )
    training.compile(keras.optimizers.SGD(1e-2), run_eagerly=True)  # two steps end sooner than one graph is made
    rng = np.random.default_rng(0)
    latent = rng.standard_normal((4, *tiny_pipelines.LATENT_SIZE, 4)).astype("float32")
    training.fit({"latent": latent, "tokens": pipe.tokenizer(PROMPTS * 2)}, batch_size=2, epochs=1, verbose=0)
    saved = tmp_path_factory.mktemp("fine_tuned") / "model"
    pipe.save_to_preset(saved)
    return reference.open_pipeline(saved), pipe


def test_trained_parts_alone_are_changed(fine_tuned, theirs, joint):
    after, _ = fine_tuned
    for part, is_trained in {"unet": True, "text_encoder": joint, "vae": False}.items():
        before = getattr(theirs, part).state_dict()
        changed = {key: not torch.equal(value, before[key]) for key, value in getattr(after, part).state_dict().items()}
        assert changed.keys() == before.keys()
        # Where a gradient vanishes (a key's bias: the softmax does not see it) nothing moves.
        assert np.mean(list(changed.values())) > 0.9 if is_trained else not any(changed.values()), part


def test_diffusers_says_what_the_trained_network_says(fine_tuned, theirs):
    after, pipe = fine_tuned
    rng = np.random.default_rng(1)
    latent = rng.standard_normal((2, *tiny_pipelines.LATENT_SIZE, 4)).astype("float32")
    tokens, timestep = pipe.tokenizer(PROMPTS), np.array([701.0, 20.0], "float32")
    context = reference.context(after, tokens)
    expected = reference.unet_output(after.unet, latent, timestep, context)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(pipe.text_encoder(tokens)), context, atol=1e-4)
    said = pipe.unet({"latent": latent, "timestep": timestep, "context": context})
    scale = np.abs(expected).max()
    assert np.abs(keras.ops.convert_to_numpy(said) - expected).max() < 1e-4 * scale
    untrained = reference.unet_output(theirs.unet, latent, timestep, reference.context(theirs, tokens))
    assert np.abs(expected - untrained).max() > 1e-3 * scale
