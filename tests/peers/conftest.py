"""The comparison with the peers, live: needs the extra that brings torch, diffusers, transformers and others."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

if any(find_spec(name) is None for name in ("torch", "diffusers", "transformers")):
    collect_ignore_glob = ["test_*.py"]
else:
    needs = {
        "test_kerascv.py": ("keras_cv",),
        "test_formats.py": ("tf2onnx", "onnxruntime", "openvino"),
        "test_openvino_engine.py": ("openvino",),
    }
    collect_ignore = [test for test, names in needs.items() if any(find_spec(name) is None for name in names)]


@pytest.fixture(scope="session", params=["sd1", "sd2"])
def kind(request):
    """Of which age the tiny pipeline is."""
    return request.param


@pytest.fixture(scope="session")
def directory(kind, tmp_path_factory):
    """A model directory that diffusers wrote, with random weights."""
    import tiny_pipelines

    return tiny_pipelines.save(tiny_pipelines.build(kind), kind, tmp_path_factory.mktemp("tiny") / kind)


@pytest.fixture(scope="session")
def theirs(directory):
    """diffusers' pipeline of that directory."""
    import reference

    return reference.open_pipeline(directory)


@pytest.fixture(scope="session")
def ours(directory):
    """This package's pipeline of that directory."""
    import latentdiff

    return latentdiff.TextToImage.from_preset(str(directory), dtype="float32")
