"""Damaged checkpoints: an error, or the same tensors; never a crash, a hang, or numbers from the wrong place.

Each case is one damage to a sound file, drawn from a seed, so that a case that fails can be made again.
"""

import contextlib
import json
import random
import shutil
import tracemalloc

import ldm_files
import numpy as np
import pytest
from ldm_files import CONFIGS, component, prefixed, save

from latentdiff.checkpoints import diffusers
from latentdiff.checkpoints.describe import describe
from latentdiff.checkpoints.sources import open_source

CASES = 30  # of each damage of each form
SMALL = {"channels": (32,), "blocks_per_level": 1}
UNET = {**CONFIGS["sd2"]["unet"], **SMALL, "attention": (True,), "heads": (1,), "transformer_depth": (1,)}
AUTOENCODER = {**CONFIGS["sd1"]["autoencoder"], **SMALL}
TEXT = {**CONFIGS["sd2"]["text_encoder"], "vocabulary_size": 30, "depth": 1}


def ldm_file(root):
    """A single file with all three networks, SD 2.x."""
    tensors = {
        kind: component(root / "parts" / kind, kind, config)
        for kind, config in (("unet", UNET), ("autoencoder", AUTOENCODER), ("text_encoder", TEXT))
    }
    unet = ldm_files.unet(tensors["unet"], 1, 1, (True,))
    whole = prefixed("model.diffusion_model.", unet)
    whole |= prefixed("first_stage_model.", ldm_files.autoencoder(tensors["autoencoder"]))
    save(root / "model.safetensors", whole | ldm_files.open_clip(tensors["text_encoder"]), {"format": "pt"})
    shutil.rmtree(root / "parts")
    return root / "model.safetensors"


def directory(root):
    """A UNet's own directory."""
    component(root / "unet", "unet", UNET)
    return root / "unet"


def shards(root):
    """An autoencoder's own directory, in three files with an index."""
    component(root / "one", "autoencoder", AUTOENCODER)
    source = diffusers.read_component(root / "one", "autoencoder")
    diffusers.write_component(
        root / "vae", "autoencoder", source.config, source.weights, max_shard_size="240KB", details=source.details
    )
    assert len(list((root / "vae").glob("*.safetensors"))) == 3
    shutil.rmtree(root / "one")
    return root / "vae"


FORMS = {make.__name__: make for make in (ldm_file, directory, shards)}


def flip_header(draw, content, size):
    """One byte of the header becomes another."""
    return replaced(content, 8 + draw.randrange(size), draw.randbytes(1))


def flip_start(draw, content, size):
    """Some of the eight bytes of the header's length."""
    return replaced(content, draw.randrange(8), draw.randbytes(draw.randint(1, 8)))


def cut(draw, content, size):
    """The file ends early, often within the header."""
    return content[: draw.randrange(draw.choice((8, 8 + size, len(content))))]


def lengthen(draw, content, size):
    """More bytes, at the end or between."""
    place = draw.choice((0, 8, 8 + size, len(content)))
    return content[:place] + draw.randbytes(draw.randint(1, 64)) + content[place:]


def edit_entry(draw, content, size):
    """One tensor's dtype, shape, offsets or name."""
    header = json.loads(content[8 : 8 + size])
    name = draw.choice([name for name in header if name != "__metadata__"])
    entry = header[name]
    what = draw.choice(("dtype", "shape", "transposed", "begin", "end", "both", "name", "gone", "more"))
    if what == "dtype":
        entry["dtype"] = draw.choice(("F16", "BF16", "F64", "I32", "U32", "BOOL", "F8_E4M3", "X", None, 4))
    elif what == "shape":
        entry["shape"] = draw.choice(([], [0], [-1], [2**62, 4], entry["shape"] + [1], entry["shape"] + [2], "x", None))
    elif what == "transposed":
        entry["shape"] = entry["shape"][::-1]
    elif what in ("begin", "end", "both"):
        shift = draw.choice((-8, -4, -1, 1, 4, 2**40, -(2**70)))
        begin, end = entry["data_offsets"]
        entry["data_offsets"] = [begin + shift * (what != "end"), end + shift * (what != "begin")]
    elif what == "name":
        position = draw.randrange(len(name))
        header[name[:position] + draw.choice(".x0\u00e9") + name[position + 1 :]] = header.pop(name)
    elif what == "gone":
        del header[name]
    else:
        header[draw.choice(("x", name + ".x", "model_ema.x"))] = entry
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def replaced(content, place, piece):
    return content[:place] + piece + content[place + len(piece) :]


def edit_json(draw, content):
    """A field of a configuration or an index gone, or of another kind, or one byte another."""
    if draw.random() < 0.3:
        return replaced(content, draw.randrange(len(content)), draw.randbytes(1))
    fields = json.loads(content)
    target = draw.choice([fields, *(value for value in fields.values() if isinstance(value, dict) and value)])
    name = draw.choice(list(target))
    if draw.random() < 0.3:
        del target[name]
    else:
        target[name] = draw.choice(
            (None, True, 0, -1, 2**64, 1e308, "x", "../x.safetensors", [], [1], {}, [[]], 16, 64)
        )
    return json.dumps(fields).encode()


BINARY = (flip_header, flip_start, cut, lengthen, edit_entry)


@pytest.fixture(scope="module", params=FORMS)
def sound(request, tmp_path_factory):
    """(path, what is read from it)"""
    path = FORMS[request.param](tmp_path_factory.mktemp(request.param))
    return path, everything(path)


def everything(path):
    """kind/path -> array, of all that a source holds."""
    source = open_source(path)
    read = {}
    for kind in source.kinds:
        read |= {f"{kind}/{name}": array for name, array in source.component(kind).weights.items()}
    return read


def assert_told_or_same(path, expected, case):
    try:
        source = open_source(path)
        said = describe(source, None)
        found = everything(path)
    except (ValueError, FileNotFoundError) as error:
        assert str(error), case
        return "told"
    if found.keys() != expected.keys():
        # A file may lose a whole network, or a choice: it is then another, sound one, and says so.
        assert not said["whole"] and not found.keys() - expected.keys(), case
    for name, array in found.items():
        assert np.array_equal(array, expected[name]), (case, name)
    return "same"


@pytest.mark.parametrize("damage", BINARY, ids=lambda damage: damage.__name__)
def test_damaged_weights_are_told_or_change_nothing(damage, sound, tmp_path):
    path, expected = sound
    outcomes = set()
    for seed in range(CASES):
        draw = random.Random(f"{damage.__name__} {seed}")
        copy = tmp_path / f"copy-{seed}" / path.name
        copy.parent.mkdir()
        shutil.copytree(path, copy) if path.is_dir() else shutil.copy(path, copy)
        target = draw.choice(sorted(copy.glob("*.safetensors"))) if copy.is_dir() else copy
        content = target.read_bytes()
        target.write_bytes(damage(draw, content, int.from_bytes(content[:8], "little")))
        outcomes.add(assert_told_or_same(copy, expected, f"{damage.__name__} {seed} {path.name}"))
        shutil.rmtree(copy.parent)
    assert "told" in outcomes


@pytest.mark.parametrize("damage", [flip_header, edit_entry], ids=lambda damage: damage.__name__)
def test_damaged_weights_take_no_memory_beyond_their_size(damage, sound, tmp_path):
    path, _ = sound
    source = path if path.is_file() else min(path.glob("*.safetensors"))
    content = source.read_bytes()
    shutil.copytree(path, tmp_path / path.name) if path.is_dir() else shutil.copy(path, tmp_path)
    copy = tmp_path / path.name
    size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.iterdir()))
    for seed in range(CASES):
        draw = random.Random(f"{damage.__name__} {seed}")
        damaged = damage(draw, content, int.from_bytes(content[:8], "little"))
        (copy if copy.is_file() else copy / source.name).write_bytes(damaged)
        tracemalloc.start()
        with contextlib.suppress(ValueError, FileNotFoundError):
            everything(copy)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 2 * size + 2**21, f"{damage.__name__} {seed} {path.name}"


@pytest.mark.parametrize("sound", ["directory", "shards"], indirect=True)
def test_damaged_json_is_told_or_changes_nothing(sound, tmp_path):
    path, expected = sound
    outcomes = set()
    for seed in range(2 * CASES):
        draw = random.Random(f"json {seed}")
        copy = tmp_path / f"copy-{seed}"
        shutil.copytree(path, copy)
        target = draw.choice(sorted(copy.glob("*.json")))
        target.write_bytes(edit_json(draw, target.read_bytes()))
        outcomes.add(assert_told_or_same(copy, expected, f"json {seed} {target.name}"))
        shutil.rmtree(copy)
    assert outcomes == {"told", "same"}
