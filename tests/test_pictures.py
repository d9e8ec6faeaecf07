"""PNG files that carry the settings they were made with."""

import json
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from latentdiff import pictures
from latentdiff.pictures import Settings, read_settings, write_png

IMAGE = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)
SETTINGS = Settings(prompt="a red heart", preset="emoji", seed=0)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=50)


def png(*chunks, height=1, width=1):
    """A PNG file of one black row with these chunks before its pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(height and 1 + 3 * min(width, 1)))
    parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in parts
    )


def text_chunk(text):
    return b"iTXt", b"latentdiff\0\0\0\0\0" + text.encode()


def test_pixels_and_size_come_back(tmp_path):
    write_png(tmp_path / "x.png", IMAGE, SETTINGS)
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.size == (4, 5)
        np.testing.assert_array_equal(np.asarray(picture), IMAGE)


INTERVALS = [None, [0.0, None], [0.25, 5.0], [0, 0]]


@given(
    prompt=TEXT,
    negative_prompt=TEXT,
    seed=st.integers(0, 2**63 - 1),
    scale=st.floats(-1e6, 1e6),
    interval=st.sampled_from(INTERVALS),
    cache_interval=st.integers(1, 1000),
)
def test_settings_come_back_whatever_the_text(
    tmp_path_factory, prompt, negative_prompt, seed, scale, interval, cache_interval
):
    settings = Settings(
        prompt=prompt,
        negative_prompt=negative_prompt,
        preset="emoji",
        seed=seed,
        guidance_scale=scale,
        guidance_interval=interval,
        cache_interval=cache_interval,
        num_steps=25,
    )
    path = tmp_path_factory.mktemp("pictures") / "x.png"
    write_png(path, IMAGE, settings)
    assert read_settings(path) == settings


def test_the_chunk_is_json_that_other_programs_read(tmp_path):
    settings = Settings(prompt="ein rotes Herz ❤️ 🦣", preset="emoji", seed=2**63 - 1, dtype="float32", backend="jax")
    write_png(tmp_path / "x.png", IMAGE, settings)
    with Image.open(tmp_path / "x.png") as picture:
        chunk = picture.text["latentdiff"]
    assert json.loads(chunk)["prompt"] == "ein rotes Herz ❤️ 🦣"
    assert json.loads(chunk)["seed"] == 9223372036854775807
    assert "❤️ 🦣".encode() in (tmp_path / "x.png").read_bytes()


def test_the_same_picture_makes_the_same_bytes(tmp_path):
    for name in ("x.png", "y.png"):
        write_png(tmp_path / name, IMAGE, SETTINGS)
    assert (tmp_path / "x.png").read_bytes() == (tmp_path / "y.png").read_bytes()


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    (tmp_path / "x.png").write_bytes(b"old")

    def fail(descriptor):
        raise OSError("disk full")

    monkeypatch.setattr(pictures.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_png(tmp_path / "x.png", IMAGE, SETTINGS)
    assert (tmp_path / "x.png").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


@pytest.mark.parametrize(
    "image", [IMAGE.astype(np.float32), IMAGE[..., :1], IMAGE[None], IMAGE[:0], np.zeros((3, 4), np.uint8)]
)
def test_only_uint8_rgb_is_written(tmp_path, image):
    with pytest.raises(ValueError, match=r"`image` must be uint8 \(H, W, 3\)"):
        write_png(tmp_path / "x.png", image)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt": None},
        {"prompt": "\ud800"},
        {"negative_prompt": ["x"]},
        {"preset": 3},
        {"seed": -1},
        {"seed": 2**63},
        {"seed": 1.0},
        {"seed": True},
        {"num_steps": 0},
        {"num_steps": "4"},
        {"guidance_scale": float("nan")},
        {"guidance_scale": 10**400},
        {"guidance_interval": (0, 1)},
        {"guidance_interval": [1, 0.5]},
        {"guidance_interval": [-1, 2]},
        {"guidance_interval": [None, 2]},
        {"guidance_interval": [0, float("inf")]},
        {"guidance_interval": [0]},
        {"cache_interval": 0},
        {"cache_interval": 2.0},
        {"cache_interval": True},
        {"sampler": 1},
        {"height": 0},
        {"width": 8.0},
        {"dtype": 16},
        {"ema": 1},
        {"ema": None},
        {"prediction": False},
        {"engine": None},
        {"backend": False},
        {"version": None},
    ],
)
def test_settings_of_another_type_or_range_are_refused_by_name(wrong):
    with pytest.raises(ValueError, match=f"Received: {next(iter(wrong))}="):
        Settings(**{"prompt": "heart", "preset": "emoji", "seed": 0, **wrong})


def test_every_wrong_setting_is_named_at_once():
    with pytest.raises(ValueError, match=r"seed=-1, num_steps=0, width=0\."):
        Settings(prompt="heart", preset="emoji", seed=-1, num_steps=0, width=0)


def test_settings_of_a_later_version_are_read(tmp_path):
    chunk = text_chunk('{"prompt": "heart", "preset": "emoji", "seed": 3, "new": [1]}')
    (tmp_path / "x.png").write_bytes(png(chunk))
    assert read_settings(tmp_path / "x.png") == Settings(prompt="heart", preset="emoji", seed=3)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "must be a PNG file"),
        (b"GIF89a", "must be a PNG file"),
        (png(), "which has none"),
        (png((b"iTXt", b"other\0\0\0\0\0{}")), "which has none"),
        (png(text_chunk("")), "must be JSON"),
        (png(text_chunk("{")), "must be JSON"),
        (png(text_chunk('{"seed": ' + "9" * 5000 + "}")), "must be JSON"),
        (png(text_chunk("[" * 60_000)), "must be JSON"),
        (png(text_chunk('{"seed": 1, "seed": 2}')), "given twice"),
        (png(text_chunk("[]")), "must hold a JSON object"),
        (png(text_chunk("3")), "must hold a JSON object"),
        (png(text_chunk('{"prompt": "heart"}')), r"Missing: \['preset', 'seed'\]"),
        (png(text_chunk('{"prompt": "heart", "preset": "emoji", "seed": NaN}')), "seed=nan"),
        (png(text_chunk('{"prompt": "\\ud800", "preset": "emoji", "seed": 0}')), "prompt="),
        (png(text_chunk(" " * 65_537)), "at most 65536 characters"),
        (
            png((b"zTXt", b"latentdiff\0\0" + zlib.compress(bytes(10_000_000)))),
            "intact PNG|which has none|must be JSON",
        ),
        (png(text_chunk("{}"), height=2**20, width=2**20), "reasonable size"),
        (png(text_chunk("{}"))[:60], "intact PNG|must be a PNG|which has none"),
        (png(text_chunk("{}")).replace(b"latentdiff", b"lAtentdiff"), "intact PNG|must be a PNG|which has none"),
    ],
)
def test_foreign_or_broken_files_are_refused(tmp_path, content, said):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        read_settings(tmp_path / "x.png")


def test_another_format_under_the_name_of_png_is_refused(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("latentdiff", "{}")
    Image.fromarray(IMAGE).save(tmp_path / "x.png", format="BMP")
    with pytest.raises(ValueError, match="must be a PNG file"):
        read_settings(tmp_path / "x.png")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.png"):
        read_settings(tmp_path / "missing.png")
