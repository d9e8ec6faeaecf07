"""What several files' tests share, built once."""

from pathlib import Path

import pytest

# Before any test imports Keras: latentdiff decides how TensorFlow computes, which is read when that is first imported.
import latentdiff  # noqa: F401

# What takes longest, so that no process is left with it at the end; files of one group share `tiny_saved_model`.
LONGEST = [
    "test_export",
    "test_serving",
    "test_devices",
    "test_cli_export",
    "test_toy_recipe",
    "test_train_on_devices",
    "test_fine_tuning",
    "test_parity",
    "test_kerascv",
    "test_openvino_engine",
    "test_formats",
    "test_pipeline",
    "test_train_command",
    "test_models",
    "test_goldens",
    "test_feature_reuse",
    "test_training_runs",
    "test_autoencoder_training",
    "test_training_step",
    "test_clip_training",
]
GROUPS = {"test_serving": "test_export"}


def pytest_collection_modifyitems(items):
    """Has the longest files begin."""
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keeps a file's tests in one process, as `--dist loadfile` does, and those of a group too."""
    from xdist.scheduler import LoadScopeScheduling

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            stem = Path(nodeid.split("::", 1)[0]).stem
            return GROUPS.get(stem, stem)

    return ByGroup(config, log)


@pytest.fixture(scope="module")
def eager():
    """A few steps of the smallest networks are done before TensorFlow has traced one."""
    import keras

    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        tf.config.run_functions_eagerly(True)
        yield
        tf.config.run_functions_eagerly(False)
    else:
        yield


@pytest.fixture(scope="session")
def tiny_pipe():
    """The smallest pipeline, in float32."""
    import tiny_models

    from latentdiff.pipeline import TextToImage

    pipe = TextToImage(tiny_models.parts())
    pipe.loops_inside = False  # on a GPU too
    return pipe


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
