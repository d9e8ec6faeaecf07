"""Sources: folders, tars and ArrayRecord shards name the same pictures; broken ones are named, counted, left out."""

import json
import zlib

import numpy as np
import pytest
from data_sets import encoded, pixels, write_folder, write_metadata, write_tar
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from latentdiff.data import (
    BrokenPicture,
    BrokenPicturesError,
    BrokenPicturesWarning,
    index_source,
    read_picture,
    sources,
    write_array_record,
)
from latentdiff.data.decode import check_picture, decode_crop
from latentdiff.data.folders import find_in_folder
from latentdiff.pictures import Settings, write_png

PICTURES = [(f"{i:03}", encoded(pixels(i, 10 + i, 9)), f"picture {i}") for i in range(5)]


def folder_of_names(path):
    write_folder(path, 0)
    for name, content, text in PICTURES:
        (path / f"{name}.png").write_bytes(content)
        (path / f"{name}.txt").write_text(text)
    return path


def folder_of_jsonl(path):
    folder_of_names(path)
    write_metadata(path, [{"file_name": f"{name}.png", "text": text, "more": 1} for name, _, text in PICTURES])
    return path


def folder_of_csv(path):
    folder_of_names(path)
    rows = "".join(f'"{text}",{name}.png\n' for name, _, text in PICTURES)
    (path / "metadata.csv").write_text("text,file_name\n" + rows)
    return path


def tar_of_txt(path):
    members = [
        (f"{name}.{suffix}", value)
        for name, content, text in PICTURES
        for suffix, value in (("png", content), ("txt", text.encode()))
    ]
    return write_tar(path.with_suffix(".tar"), members)


def tar_of_json(path):
    members = [
        (f"./a/{name}.{suffix}", value)
        for name, content, text in PICTURES
        for suffix, value in (("json", json.dumps({"caption": text}).encode()), ("png", content))
    ]
    return write_tar(path.with_suffix(".tar"), members)


def shard(path):
    path = path.with_suffix(".array_record")
    assert write_array_record(path, [(content, text) for _, content, text in PICTURES]) == 5
    return path


@pytest.mark.parametrize("write", [folder_of_names, folder_of_jsonl, folder_of_csv, tar_of_txt, tar_of_json, shard])
def test_every_source_gives_the_same_examples(write, tmp_path):
    index = index_source(write(tmp_path / "set"))
    assert index.broken == ()
    assert [example.captions for example in index] == [(text,) for _, _, text in PICTURES]
    assert [(example.height, example.width) for example in index] == [(10 + i, 9) for i in range(5)]
    for i, example in enumerate(index):
        content = read_picture(example)
        assert content == PICTURES[i][1]
        np.testing.assert_array_equal(decode_crop(content, (10 + i, 9)), pixels(i, 10 + i, 9))
    assert index.digest == index_source(folder_of_names(tmp_path / "other")).digest


def test_several_sources_follow_one_another(tmp_path):
    first, second = tar_of_txt(tmp_path / "b"), tar_of_txt(tmp_path / "a")
    names = [example.name for example in index_source([first, second])]
    assert names == [f"b.tar/00{i}.png" for i in range(5)] + [f"a.tar/00{i}.png" for i in range(5)]
    assert [e.name for e in index_source(tmp_path)] == names[5:] + names[:5]  # a folder of shards, by name
    assert len(index_source(tmp_path / "*.tar")) == 10
    with pytest.raises(FileNotFoundError, match="`source` must be a folder, a file or a pattern"):
        index_source(tmp_path / "none")


def test_several_captions_of_a_picture(tmp_path):
    write_folder(tmp_path, 1)
    write_metadata(tmp_path, [{"file_name": "000.png", "text": ["one", " two ", ""]}])
    assert index_source(tmp_path)[0].captions == ("one", "two")


def test_captions_may_be_left_out(tmp_path):
    write_folder(tmp_path, 2)
    (tmp_path / "001.txt").unlink()
    assert [e.captions for e in index_source(tmp_path, require_captions=False)] == [("picture 0",), ("",)]


@pytest.mark.parametrize("change", ["caption", "pixels", "order", "fewer"])
def test_digest_is_of_what_the_examples_show(change, tmp_path):
    before = index_source(write_folder(tmp_path, 4))
    if change == "caption":
        (tmp_path / "002.txt").write_text("another")
    elif change == "pixels":
        (tmp_path / "002.png").write_bytes(encoded(pixels(99)))
    rows = {"order": [0, 2, 1, 3], "fewer": [0, 1, 2]}.get(change, [0, 1, 2, 3])
    assert index_source(tmp_path).select(rows).digest != before.digest
    assert index_source(write_folder(tmp_path, 4)).digest == before.digest


def break_some(folder):
    """Twelve ways to be no example, beside 100 that are; the names of the broken."""
    write_folder(folder, 112)
    png, jpeg = encoded(pixels(0)), encoded(pixels(0, 64, 64), "JPEG")
    wide = Image.new("I;16", (4, 4))
    wide.save(folder / "103.png")
    (folder / "100.png").write_bytes(png[:-30])
    (folder / "101.png").write_bytes(b"no picture")
    (folder / "102.png").write_bytes(b"")
    (folder / "104.png").write_bytes(jpeg[: len(jpeg) // 2])
    (folder / "105.png").write_bytes(b"GIF89a" + bytes(20))
    (folder / "106.png").write_bytes(bomb())
    (folder / "107.txt").unlink()
    (folder / "108.txt").write_text("  \n")
    (folder / "109.png").write_bytes(png[:20])
    (folder / "110.png").write_bytes(b"RIFF\x10\0\0\0WEBPVP8 ")
    (folder / "111.png").write_bytes(png[:60] + bytes(30) + png[90:])
    return [f"{i}.png" for i in range(100, 112)]


def bomb():
    """A PNG of a few hundred bytes that says it is 30,000 pixels square."""
    content = bytearray(encoded(pixels(0)))
    content[16:24] = (30_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


@pytest.fixture(scope="module")
def broken_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    return folder, break_some(folder)


def test_broken_pictures_are_named_counted_and_left_out(broken_folder):
    folder, names = broken_folder
    with pytest.warns(BrokenPicturesWarning, match=r"(?s)Left out 12 broken of 112:\n  100\.png: .*\n  and 2 more"):
        index = index_source(folder, max_broken=0.2)
    assert [each.name for each in index.broken] == names
    assert all(each.reason for each in index.broken)
    reasons = {each.name: each.reason for each in index.broken}
    assert reasons["106.png"] == "30000 x 30000 are more than 89478485 pixels"
    assert reasons["107.png"] == reasons["108.png"] == "has no caption"
    assert len(index) == 100 and index[99].name == "099.png"


def test_too_many_broken_pictures_stop_the_run(broken_folder):
    rule = r"(?s)At most 1\.00% of a data set's pictures may be broken.*Received: 12 broken of 112:\n  100\.png"
    with pytest.raises(BrokenPicturesError, match=rule) as caught:
        index_source(broken_folder[0])
    assert all(f"{name}: " in str(caught.value) for name in broken_folder[1][:10])


def test_one_broken_picture_is_forgiven_unless_none_may_be(tmp_path):
    write_folder(tmp_path, 3)
    (tmp_path / "001.png").write_bytes(b"")
    with pytest.warns(BrokenPicturesWarning):
        assert len(index_source(tmp_path)) == 2
    with pytest.raises(BrokenPicturesError, match="At most 0.00%"):
        index_source(tmp_path, max_broken=0)
    (tmp_path / "002.png").write_bytes(b"")
    with pytest.raises(BrokenPicturesError, match="2 broken of 3"):
        index_source(tmp_path)


def test_nothing_is_no_data_set(tmp_path):
    with pytest.raises(BrokenPicturesError, match="0 broken of 0"):
        index_source(tmp_path)


def test_broken_rows_of_metadata_are_named(tmp_path):
    write_folder(tmp_path / "set", 1)
    good = {"file_name": "000.png", "text": "x"}
    bad = [
        "{",
        "[1]",
        '{"text": "x"}',
        '{"file_name": "../up.png", "text": "x"}',
        '{"file_name": "/etc/x", "text": "x"}',
        '{"file_name": "none.png", "text": "x"}',
        '{"file_name": "000.png", "text": 3}',
    ]
    (tmp_path / "set" / "metadata.jsonl").write_text("\n".join([json.dumps(good), *bad]))
    with pytest.warns(BrokenPicturesWarning):
        index = index_source(tmp_path / "set", max_broken=1)
    assert len(index) == 1
    assert [each.name for each in index.broken] == [
        *(f"metadata.jsonl:{line}" for line in range(2, 7)),
        "none.png",
        "000.png",
    ]


def test_broken_tars_give_what_they_hold_and_name_themselves(tmp_path):
    path = tar_of_txt(tmp_path / "set")
    whole = path.read_bytes()
    path.write_bytes(whole[: 512 * 14 + 100])
    header = 512 * 8  # of the third picture
    (tmp_path / "damaged.tar").write_bytes(whole[:header] + b"x" * 512 + whole[header + 512 :])
    (tmp_path / "none.tar").write_bytes(b"no tar" * 200)
    write_tar(
        tmp_path / "tz.tar", [("a.png", PICTURES[0][1]), ("b.txt", b"x"), ("c.png", PICTURES[0][1]), ("c.txt", b"y")]
    )
    with pytest.warns(BrokenPicturesWarning):
        index = index_source(tmp_path, max_broken=1)
    whole = [f"{tar}.tar/00{i}.png" for tar, count in (("damaged", 2), ("set", 3)) for i in range(count)]
    assert [e.name for e in index] == [*whole, "tz.tar/c.png"]
    broken = ["damaged.tar", "none.tar", "set.tar/003.png", "set.tar", "tz.tar/a.png"]
    assert [each.name for each in index.broken] == broken


def test_broken_records_are_named(tmp_path):
    write_array_record(tmp_path / "a.array_record", [(PICTURES[0][1], "x"), (b"no picture", "y"), (PICTURES[1][1], [])])
    (tmp_path / "b.array_record").write_bytes(b"no records")
    with pytest.warns(BrokenPicturesWarning):
        index = index_source(tmp_path, max_broken=1)
    assert [e.name for e in index] == ["a.array_record/0"]
    assert [each.name for each in index.broken] == ["a.array_record/1", "a.array_record/2", "b.array_record"]


def test_shard_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a.array_record"
    write_array_record(path, [(b"1", "x")])
    before = path.read_bytes()

    def failing():
        yield b"2", "y"
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError):
        write_array_record(path, failing())
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.array_record"]
    with pytest.raises(ValueError, match="`path` must end in .array_record"):
        write_array_record(tmp_path / "a.tfrecord", [])


def test_kept_sizes_spare_the_decoding_of_what_has_not_changed(tmp_path, monkeypatch):
    folder, keep = write_folder(tmp_path / "set", 4), tmp_path / "index.jsonl"
    tar = tar_of_txt(tmp_path / "more")
    first = index_source([folder, tar], keep=keep)
    read = []
    monkeypatch.setattr(sources, "read_picture", lambda found: read.append(found.name) or read_picture(found))
    assert list(index_source([folder, tar], keep=keep)) == list(first) and read == []
    (folder / "001.png").write_bytes(encoded(pixels(50)))
    (folder / "002.txt").write_text("another caption")
    (folder / "003.png").unlink()
    again = index_source([folder, tar], keep=keep)
    assert read == ["001.png"] and again.digest == index_source([folder, tar]).digest != first.digest
    read.clear()
    for content in ("", "[]", '["latentdiff", 1]\n[1, 2', '["latentdiff", 1]\n3'):
        keep.write_text(content)
        assert index_source([folder, tar], keep=keep).digest == again.digest
    assert len(read) == 4 * len(again)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_bytes_are_a_picture_or_broken_and_nothing_else(data):
    form = data.draw(st.sampled_from(["PNG", "JPEG", "WEBP"]))
    content = bytearray(encoded(pixels(0, 24, 20), form))
    for _ in range(data.draw(st.integers(1, 6))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        size = check_picture(content)
    except BrokenPicture:
        return
    assert decode_crop(content, (8, 8)).shape == (8, 8, 3) and min(size) > 0


def test_pictures_that_were_drawn_here_are_captioned_by_their_prompts(tmp_path):
    """As `latentdiff generate "a dog" --num-images 2 --output dog.png` leaves them: the class of a subject."""
    for i in range(2):
        settings = Settings(prompt="a dog", preset="emoji", seed=i)
        write_png(tmp_path / f"dog-{i}.png", np.full((8, 8, 3), 40 * i, "uint8"), settings)
    (tmp_path / "dog-1.txt").write_text("my dog")
    assert [each.captions for each in find_in_folder(tmp_path)] == [("a dog",), ("my dog",)]
    Image.fromarray(np.zeros((8, 8, 3), "uint8")).save(tmp_path / "other.png")
    assert [each.captions for each in find_in_folder(tmp_path)][-1] == ()
