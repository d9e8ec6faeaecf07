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
