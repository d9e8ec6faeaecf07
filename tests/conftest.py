"""What several files' tests share, built once."""

import pytest

# Before any test imports Keras: latentdiff decides how TensorFlow computes, which is read when that is first imported.
import latentdiff  # noqa: F401


@pytest.fixture(scope="session")
def tiny_pipe():
    """The smallest pipeline, in float32."""
    import tiny_models

    from latentdiff.pipeline import TextToImage

    return TextToImage(tiny_models.parts())


@pytest.fixture(scope="session")
def tiny_directory(tiny_pipe, tmp_path_factory):
    """The directory that it was saved to."""
    directory = tmp_path_factory.mktemp("tiny") / "model"
    tiny_pipe.save_to_preset(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_saved_model(tiny_pipe, tmp_path_factory):
    """Version 1 of it as a SavedModel, with a second size, by default 3 steps and guidance 2. On TensorFlow alone."""
    from latentdiff.export import export_saved_model

    directory = tmp_path_factory.mktemp("models") / "tiny" / "1"
    export_saved_model(
        tiny_pipe,
        directory,
        sizes=[(8, 12), (4, 8)],
        num_steps=3,
        guidance_scale=2.0,
        max_batch=8,
        max_steps=60,
        max_prompt_bytes=100,
        licences="Made of random numbers.",
    )
    return directory
