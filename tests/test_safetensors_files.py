"""Weights files: what is read, what is refused, and that what is written is what others read."""

import ctypes
import json
import math
import pickle
import re
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from latentdiff.checkpoints import safetensors_files
from latentdiff.checkpoints.files import CheckpointError, check_replaceable, parse_json, replaced_directory
from latentdiff.checkpoints.safetensors_files import find_weights, open_file, open_index, write_file


def save_raw(path, header, content=b"", length=None):
    """A file with any header, sound or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + content)
    return path


def entry(shape, begin, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_every_float_dtype_reads_as_it_was_saved(tmp_path):
    values = np.linspace(-2, 2, 12).reshape(3, 4)
    dtypes = {"half": np.float16, "brain": ml_dtypes.bfloat16, "single": np.float32, "double": np.float64}
    arrays = {name: values.astype(dtype) for name, dtype in dtypes.items()}
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors")
    tensors = open_file(tmp_path / "x.safetensors")
    assert set(tensors) == set(arrays)
    for name, array in arrays.items():
        assert tensors[name].view().dtype == array.dtype
        assert np.array_equal(tensors[name].view(), array)


def test_opening_maps_the_file_and_reads_no_numbers(tmp_path):
    safetensors.numpy.save_file({"x": np.ones(3, np.float32)}, tmp_path / "x.safetensors")
    view = open_file(tmp_path / "x.safetensors")["x"].view()
    assert not view.flags.writeable
    assert not view.flags.owndata


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system does not say what is mapped")
def test_a_file_that_was_read_through_takes_no_memory(tmp_path):
    arrays = {name: np.ones((1000, 1500), "float32") for name in "abc"}  # 6 MB each
    safetensors.numpy.save_file(arrays, tmp_path / "x.safetensors")
    tensors = open_file(tmp_path / "x.safetensors")
    resident = []
    for tensor in tensors.values():
        assert tensor.view().sum() == 1_500_000
        tensor.release()
        resident.append(resident_bytes(tmp_path / "x.safetensors"))
    assert max(resident) < 2_000_000
    assert tensors["a"].view().sum() == 1_500_000


def resident_bytes(path):
    """Of a mapped file, what is in this process's memory."""
    maps = Path("/proc/self/smaps").read_text().split(str(path))[1:]
    return sum(1024 * int(re.search(r"Rss:\s+(\d+) kB", text)[1]) for text in maps)


@pytest.mark.parametrize(("code", "dtype"), [("F16", np.float16), ("BF16", ml_dtypes.bfloat16), ("F32", np.float32)])
def test_written_files_open_in_safetensors(tmp_path, code, dtype):
    arrays = {"a": np.arange(6).reshape(2, 3).astype(dtype), "b.weight": np.arange(3).astype(dtype)}
    write_file(tmp_path / "x.safetensors", {name: (code, a.shape) for name, a in arrays.items()}, arrays.values())
    loaded = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert set(loaded) == set(arrays)
    assert all(loaded[name].dtype == dtype and np.array_equal(loaded[name], arrays[name]) for name in arrays)
    with safetensors.safe_open(tmp_path / "x.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("size", [0, 4, 8, 40, -1])
def test_truncated_file_is_refused(tmp_path, size):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"x": np.ones(30, np.float32)}, path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CheckpointError, match="truncated"):
        open_file(path)


@pytest.mark.parametrize(
    ("header", "content", "message"),
    [
        ({"a": entry([1], 0, 4), "b": entry([1], 2, 6)}, 6, "`b` overlaps"),
        ({"a": entry([1], 0, 4), "b": entry([1], 5, 9)}, 9, "`b` leaves a hole"),
        ({"a": entry([1], 4, 8)}, 8, "`a` leaves a hole"),
        ({"a": entry([1], 0, 4)}, 8, "must take all of its 8 bytes"),
        ({"a": entry([2], 0, 4)}, 4, "`a` must take 8 bytes"),
        ({"a": entry([-1, -1], 0, 4)}, 4, "whole numbers"),
        ({"a": entry([True], 0, 4)}, 4, "whole numbers"),
        ({"a": entry([1.0], 0, 4)}, 4, "whole numbers"),
        ({"a": entry([10**30], 0, 4)}, 4, "whole numbers"),
        ({"a": entry([2**40, 2**40], 0, 4)}, 4, "must take"),
        ({"a": entry([1], 4, 0)}, 4, "offsets"),
        ({"a": entry([1], -4, 0)}, 4, "offsets"),
        ({"a": {**entry([1], 0, 4), "more": 1}}, 4, "dtype, shape and data_offsets"),
        ({"a": [1, 2]}, 4, "dtype, shape and data_offsets"),
        ({"a": entry([1], 0, 4, "F33")}, 4, "dtype that is not known"),
        ({"a": entry([1], 0, 4, [])}, 4, "dtype that is not known"),
        ({"__metadata__": {"format": 1}}, 0, "__metadata__"),
        (b'{"a": {}, "a": {}}', 0, "given twice"),
        (b'{"a": ' + b"[" * 100_000, 0, "must be JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", 0, "must be JSON"),
        (b"[1, 2]", 0, "JSON object"),
        (b'{"\xff": 1}', 0, "must be JSON"),
    ],
)
def test_unsound_header_is_refused(tmp_path, header, content, message):
    with pytest.raises(CheckpointError, match=message):
        open_file(save_raw(tmp_path / "x.safetensors", header, bytes(content)))


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001, 3])
def test_header_length_beyond_the_file_is_refused(tmp_path, length):
    with pytest.raises(CheckpointError):
        open_file(save_raw(tmp_path / "x.safetensors", {"a": entry([1], 0, 4)}, bytes(4), length))


def test_git_lfs_pointer_is_named(tmp_path):
    (tmp_path / "x.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        open_file(tmp_path / "x.safetensors")


def test_zip_under_a_safetensors_name_is_refused_as_a_pickle(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"PK\x03\x04\x00\x00\x08\x08" + bytes(200))
    with pytest.raises(CheckpointError, match="pickle"):
        open_file(tmp_path / "x.safetensors")


class Bomb:
    def __reduce__(self):
        return (pytest.fail, ("a pickle was opened",))


@pytest.mark.parametrize("name", ["m.bin", "model.ckpt", "m.pt", "m.pth", "m.pickle"])
def test_pickle_is_never_opened_and_what_to_do_is_said(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match=f"{name}.*latentdiff convert"):
        find_weights(tmp_path, "m")
    with pytest.raises(CheckpointError, match=f"{name}.*latentdiff convert"):
        open_file(tmp_path / name)


def test_pickle_beside_safetensors_is_left_alone(tmp_path):
    (tmp_path / "m.bin").write_bytes(pickle.dumps(Bomb()))
    safetensors.numpy.save_file({"x": np.ones(3, np.float32)}, tmp_path / "m.safetensors")
    assert find_weights(tmp_path, "m").name == "m.safetensors"


def test_plain_file_comes_before_its_variant(tmp_path):
    for name in ("m.safetensors", "m.fp16.safetensors", "m.non_ema.safetensors"):
        (tmp_path / name).touch()
    assert find_weights(tmp_path, "m").name == "m.safetensors"
    assert find_weights(tmp_path, "m", "fp16").name == "m.fp16.safetensors"


def test_variant_that_stands_alone_is_taken(tmp_path):
    (tmp_path / "m.fp16.safetensors").touch()
    assert find_weights(tmp_path, "m").name == "m.fp16.safetensors"


def test_variants_without_a_choice_are_an_error(tmp_path):
    for name in ("m.fp16.safetensors", "m.non_ema.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match="fp16, non_ema"):
        find_weights(tmp_path, "m")


def test_variant_that_is_not_there_is_an_error(tmp_path):
    (tmp_path / "m.safetensors").touch()
    with pytest.raises(FileNotFoundError, match="m.fp16.safetensors"):
        find_weights(tmp_path, "m", "fp16")
    with pytest.raises(ValueError, match="variant"):
        find_weights(tmp_path, "m", "../x")


def test_directory_without_weights_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights"):
        find_weights(tmp_path, "m")


def save_shards(directory, weight_map, middle=""):
    """Two shards, a in the first and b in the second, under the index that is given."""
    for number, key in ((1, "a"), (2, "b")):
        name = f"m-0000{number}-of-00002.safetensors"
        safetensors.numpy.save_file({key: np.full(2, number, np.float32)}, directory / name)
    index = directory / f"m.safetensors.index{middle}.json"
    index.write_text(json.dumps({"metadata": {"total_size": 16}, "weight_map": weight_map}))
    return index


SHARDS = {"a": "m-00001-of-00002.safetensors", "b": "m-00002-of-00002.safetensors"}


@pytest.mark.parametrize("middle", ["", ".fp16"])
def test_shards_read_as_one(tmp_path, middle):
    save_shards(tmp_path, SHARDS, middle)
    tensors = safetensors_files.open_weights(tmp_path, "m")
    assert {name: tensor.view().tolist() for name, tensor in tensors.items()} == {"a": [1, 1], "b": [2, 2]}


def test_shards_of_a_variant_are_found_by_their_index(tmp_path):
    save_shards(tmp_path, {}, ".fp16")
    for number in (1, 2):
        (tmp_path / f"m-0000{number}-of-00002.safetensors").rename(
            tmp_path / f"m.fp16-0000{number}-of-00002.safetensors"
        )
    assert find_weights(tmp_path, "m").name == "m.safetensors.index.fp16.json"


def test_missing_shards_are_all_named(tmp_path):
    index = save_shards(tmp_path, {**SHARDS, "c": "gone-1.safetensors", "d": "gone-2.safetensors"})
    with pytest.raises(FileNotFoundError, match="gone-1.safetensors, gone-2.safetensors"):
        open_index(index)


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/x.safetensors", "a/b.safetensors", "..\\x.safetensors", "x.bin", "", ".safetensors"],
)
def test_index_that_leaves_its_directory_is_refused(tmp_path, name):
    with pytest.raises(CheckpointError, match="plain"):
        open_index(save_shards(tmp_path, {**SHARDS, "c": name}))


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": SHARDS["a"], "b": SHARDS["a"]}, "b: not in"),
        ({**SHARDS, "c": SHARDS["a"]}, "c: not in"),
        ({"b": SHARDS["b"], "c": SHARDS["a"]}, "a: in .* nothing"),
        ([], "weight_map"),
        ({"a": 3}, "weight_map"),
    ],
)
def test_index_that_disagrees_with_its_shards_is_refused(tmp_path, weight_map, message):
    with pytest.raises(CheckpointError, match=message):
        open_index(save_shards(tmp_path, weight_map))


def test_json_numbers_that_diffusers_writes_are_read():
    assert parse_json(b'{"lambda_min_clipped": -Infinity}', "x") == {"lambda_min_clipped": -math.inf}


def test_new_directory_appears_only_when_it_is_whole(tmp_path):
    with pytest.raises(KeyboardInterrupt), replaced_directory(tmp_path / "model") as fresh:
        (fresh / "config.json").write_text("{}")
        assert not (tmp_path / "model").exists()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def files_of(directory):
    """Path -> text of every file below."""
    return {path.relative_to(directory).as_posix(): path.read_text() for path in directory.rglob("*") if path.is_file()}


def write_files(directory, *names, text="old"):
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)


def test_overwriting_keeps_what_stands_beside_the_model(tmp_path):
    model = tmp_path / "model"
    beside = (".git/config", ".gitattributes", "README.md", "metadata.json", "samples/a.png", "v1-5.ckpt")
    write_files(model, "model_index.json", "unet/config.json", "unet/old.bin", *beside)
    with replaced_directory(model, overwrite=True) as fresh:
        write_files(fresh, "model_index.json", "unet/config.json", text="new")
    assert files_of(model) == {"model_index.json": "new", "unet/config.json": "new", **dict.fromkeys(beside, "old")}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "renameat2"), reason="the system swaps no directories")
def test_a_model_is_there_at_every_moment_of_being_overwritten(tmp_path, monkeypatch):
    model = tmp_path / "model"
    write_files(model, "model_index.json", "README.md")
    seen = []

    def call(method):
        def watched(*arguments, **choices):
            result = method(*arguments, **choices)
            seen.append((model / "model_index.json").read_text())
            return result

        return watched

    for place, name in ((Path, "rename"), (Path, "mkdir"), (shutil, "rmtree")):
        monkeypatch.setattr(place, name, call(getattr(place, name)))
    with replaced_directory(model, overwrite=True) as fresh:
        write_files(fresh, "model_index.json", text="new")
    assert seen[0] == "old" and seen[-1] == "new"
    assert files_of(model) == {"model_index.json": "new", "README.md": "old"}


def test_a_model_is_overwritten_where_directories_cannot_be_swapped(tmp_path, monkeypatch):
    def no_library(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    write_files(tmp_path / "model", "model_index.json", "unet/old.bin", "README.md")
    with replaced_directory(tmp_path / "model", overwrite=True) as fresh:
        write_files(fresh, "model_index.json", "unet/config.json", text="new")
    found = {"model_index.json": "new", "unet/config.json": "new", "README.md": "old"}
    assert files_of(tmp_path / "model") == found
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_overwriting_a_component_takes_its_older_weights_away(tmp_path):
    older = (
        "m.bin",
        "m.fp16.safetensors",
        "m.safetensors.index.json",
        "m.safetensors.index.fp16.json",
        "m-00001-of-00002.safetensors",
        "m.fp16-00001-of-00002.safetensors",
    )
    beside = ("my.safetensors", "mm.bin", "m.json", "m.txt")
    write_files(tmp_path, "config.json", "m.safetensors", *older, *beside)
    with replaced_directory(tmp_path, overwrite=True) as fresh:
        write_files(fresh, "config.json", "m.safetensors", text="new")
    assert files_of(tmp_path) == {"config.json": "new", "m.safetensors": "new", **dict.fromkeys(beside, "old")}


def test_folder_of_a_components_name_is_kept_where_there_is_no_model_index(tmp_path):
    write_files(tmp_path, "config.json", "unet/model.py")
    with pytest.raises(FileExistsError, match="unet, but no `model_index.json`"):
        with replaced_directory(tmp_path, overwrite=True):
            pass
    assert set(files_of(tmp_path)) == {"config.json", "unet/model.py"}


def test_failed_overwriting_leaves_the_old_model(tmp_path):
    (tmp_path / "config.json").write_text("old")
    with pytest.raises(ZeroDivisionError), replaced_directory(tmp_path, overwrite=True):
        _ = 1 / 0
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_directory_with_files_takes_a_model_only_when_that_is_asked_for(tmp_path):
    write_files(tmp_path, "LICENSES.md")
    with pytest.raises(FileExistsError, match="not empty"), replaced_directory(tmp_path):
        pass
    with pytest.raises(FileExistsError, match="is a file"), replaced_directory(tmp_path / "LICENSES.md"):
        pass
    with replaced_directory(tmp_path, overwrite=True) as fresh:
        write_files(fresh, "model_index.json", text="new")
    assert files_of(tmp_path) == {"LICENSES.md": "old", "model_index.json": "new"}


def test_weights_without_a_configuration_are_not_replaced(tmp_path):
    write_files(tmp_path, "thesis.ckpt")
    with pytest.raises(FileExistsError, match="thesis.ckpt, but no configuration"):
        check_replaceable(tmp_path, overwrite=True)
    assert set(files_of(tmp_path)) == {"thesis.ckpt"}
