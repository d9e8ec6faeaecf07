"""A hub's models: from a cache without a network, and from a hub on this machine; only the files that are needed."""

import json
import os
import re
import subprocess
import sys
import threading
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from huggingface_hub import constants

from latentdiff.catalogue import resolve_preset
from latentdiff.checkpoints import hub
from latentdiff.checkpoints.files import CheckpointError
from latentdiff.checkpoints.sources import open_source
from latentdiff.pipeline import TextToImage

ROOT = Path(__file__).resolve().parents[1]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, which is all there is: no network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def fill(cache, directory):
    """Lays a directory out as the hub's client does: blobs, a reference, a snapshot of links."""
    repository = cache / "models--some--model"
    (repository / "blobs").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    snapshot = repository / "snapshots" / COMMIT
    for number, file in enumerate(sorted(path for path in directory.rglob("*") if path.is_file())):
        blob = repository / "blobs" / f"{number:040x}"
        blob.write_bytes(file.read_bytes())
        link = snapshot / file.relative_to(directory)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    return snapshot


def test_a_model_in_the_cache_opens_without_a_network(cache, tiny_directory, tiny_pipe):
    snapshot = fill(cache, tiny_directory)
    for address in ("hf://some/model", "hf://some/model@main", f"hf://some/model@{COMMIT}"):
        assert resolve_preset(address).samefile(snapshot)
    pipe = TextToImage.from_preset("hf://some/model", dtype="float32")
    assert pipe.unet.get_config() == tiny_pipe.unet.get_config()
    file = resolve_preset("hf://some/model/vae/diffusion_pytorch_model.safetensors")
    assert file.read_bytes() == (tiny_directory / "vae" / "diffusion_pytorch_model.safetensors").read_bytes()


@pytest.mark.parametrize("address", ["hf://some/model", "hf://some/model@v2", "hf://some/model/x.safetensors"])
def test_what_is_not_in_the_cache_is_told_without_a_network(address, cache, tiny_directory):
    if "@" in address:
        fill(cache, tiny_directory)
    with pytest.raises(FileNotFoundError, match=f"`{address}` is not in the cache of huggingface_hub"):
        resolve_preset(address)


@pytest.mark.parametrize(
    "address",
    [
        "hf://",
        "hf://model",
        "hf://some/",
        "hf://../model",
        "hf://some/..",
        "hf://some/mo..del",
        "hf://some/mo--del",
        "hf://some/model@",
        "hf://some/model@../main",
        "hf://some/model@..",
        "hf://some//model",
        "hf:///etc/passwd",
        "hf://some/mo del",
    ],
)
def test_a_bad_name_is_refused(address):
    with pytest.raises(ValueError, match="A hub's model must be `hf://owner/name`"):
        resolve_preset(address)


@pytest.mark.parametrize(
    "file", ["../x.safetensors", "a/../../x.safetensors", "/etc/x.safetensors", "a//b.safetensors", "a\\b.safetensors"]
)
def test_a_file_must_lie_in_its_repository(file):
    with pytest.raises(ValueError, match="must be a plain path of a safetensors file"):
        resolve_preset(f"hf://some/model/{file}")


@pytest.mark.parametrize("file", ["model.ckpt", "unet/diffusion_pytorch_model.bin"])
def test_a_pickle_is_not_even_fetched(file):
    with pytest.raises(CheckpointError, match="a pickle can run any program"):
        resolve_preset(f"hf://some/model/{file}")


def test_a_file_of_another_kind_is_not_fetched():
    with pytest.raises(ValueError, match="must be a plain path of a safetensors file. Received: 'model.h5'"):
        resolve_preset("hf://some/model/model.h5")


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install latentdiff\[hub\]"):
        resolve_preset("hf://some/model")


class Hub(BaseHTTPRequestHandler):
    """Two questions and the files: what a client asks of a hub."""

    def do_GET(self):
        self.answer(with_body=True)

    def do_HEAD(self):
        self.answer(with_body=False)

    def log_message(self, *args):
        pass

    def answer(self, with_body):
        path = self.path.partition("?")[0]
        if path == "/api/models/some/model/revision/main":
            return self.send(json.dumps({"id": "some/model", "sha": COMMIT, "siblings": []}).encode(), with_body)
        if path == f"/api/models/some/model/tree/{COMMIT}":
            tree = [
                {"type": "file", "path": name, "size": len(content), "oid": f"{number:040x}"}
                for number, (name, content) in enumerate(self.server.files.items())
            ]
            return self.send(json.dumps(tree).encode(), with_body)
        found = re.fullmatch(rf"/some/model/resolve/(?:{COMMIT}|main)/(.+)", path)
        if found and found[1] in self.server.files:
            if with_body:
                self.server.sent.append(found[1])
            return self.send(self.server.files[found[1]], with_body)
        self.send(b"{}", with_body, 404, {"X-Error-Code": "RepoNotFound"})

    def send(self, content, with_body, status=200, headers=None):
        self.send_response(status)
        number = list(self.server.files.values()).index(content) if content in self.server.files.values() else 0
        for name, value in {
            "Content-Length": str(len(content)),
            "Content-Type": "application/json",
            "ETag": f'"{number:040x}"',
            "X-Repo-Commit": COMMIT,
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(content)


@pytest.fixture
def server(tiny_directory):
    """A hub on this machine: the tiny model, and beside it what nobody needs here."""
    files = {
        str(path.relative_to(tiny_directory)): path.read_bytes()
        for path in sorted(tiny_directory.rglob("*"))
        if path.is_file()
    }
    stem = "diffusion_pytorch_model"
    for name in (
        f"unet/{stem}.bin",
        f"unet/{stem}.fp16.safetensors",
        f"unet/{stem}.non_ema.safetensors",
        f"vae/{stem}.fp16.safetensors",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/pytorch_model.bin",
        "safety_checker/model.safetensors",
        "model-pruned.safetensors",
        "model.ckpt",
        "README.md",
        "picture.png",
    ):
        files[name] = name.encode()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.sent = files, []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


PLAIN = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}


@pytest.fixture
def fetch(server, tmp_path):
    """What a process of its own says, whose hub is the server: its client reads the environment when it is imported."""

    def fetch(preset, offline=False, **arguments):
        environment = {
            **os.environ,
            "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": str(int(offline)),
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        program = (
            "import json, sys\n"
            "from latentdiff.catalogue import resolve_preset\n"
            "print(resolve_preset(sys.argv[1], **json.loads(sys.argv[2])))"
        )
        command = [sys.executable, "-c", program, preset, json.dumps(arguments)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        return done.stdout.strip() or done.stderr

    return fetch


def test_only_what_a_pipeline_needs_is_fetched_and_it_stays(fetch, server):
    directory = fetch("hf://some/model")
    tokenizer = {name for name in server.files if name.startswith("tokenizer/")}
    assert set(server.sent) == PLAIN | tokenizer
    assert len(server.sent) == len(set(server.sent))
    assert open_source(directory).kinds == ("unet", "autoencoder", "text_encoder")
    server.sent.clear()
    assert fetch("hf://some/model", offline=True) == directory
    assert server.sent == []


def test_only_the_variant_that_is_asked_for_is_fetched(fetch, server):
    fetch("hf://some/model", variant="fp16")
    weights = {name for name in server.sent if name.endswith(".safetensors")}
    assert weights == {name for name in server.files if re.search(r"[el]\.fp16\.safetensors$", name)}
    assert len(weights) == 3


def test_only_the_part_that_is_asked_for_is_fetched(fetch, server):
    fetch("hf://some/model", parts=["autoencoder"])
    assert set(server.sent) == {"model_index.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors"}


def test_a_repository_that_does_not_exist_is_told(fetch):
    assert "ValueError: `hf://some/other` cannot be fetched." in fetch("hf://some/other")


def test_shards_are_among_the_wanted_files():
    patterns = hub.wanted_files(["unet"], "fp16")
    for name in (
        "unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
        "diffusion_pytorch_model.fp16.safetensors",
    ):
        assert any(fnmatch(name, pattern) for pattern in patterns), name
    assert not any(fnmatch("unet/diffusion_pytorch_model-00001-of-00002.safetensors", each) for each in patterns)
