"""The emoji recipe: what is fetched, drawn, split, said and encoded."""

import collections
import dataclasses
import hashlib
import io
import json
import pathlib
import shutil
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts" / "emoji"))

import captions  # noqa: E402
import fetch  # noqa: E402
import hands  # noqa: E402
import judge_emoji  # noqa: E402
import records  # noqa: E402
import render  # noqa: E402
import vocabulary  # noqa: E402

from latentdiff.data import index_source  # noqa: E402
from latentdiff.data.records import read_record  # noqa: E402
from latentdiff.models.tokenizer import CLIPTokenizer  # noqa: E402
from latentdiff.training_config import read_config  # noqa: E402

FIXTURE = ROOT / "tests" / "fixtures" / "emoji"
STYLES = ("fluent", "noto", "twemoji")


@pytest.fixture
def data(tmp_path):
    shutil.copytree(FIXTURE / "packages", tmp_path / "packages")
    return tmp_path


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    output = tmp_path_factory.mktemp("emoji")
    shutil.copytree(FIXTURE / "packages", output / "packages")
    return output, render.build(output)


def record(name="red heart", style="noto", keywords=("emotion", "heart", "love", "red"), aliases=(), codepoints="2764"):
    return records.Record(
        style=style,
        codepoints=codepoints,
        group=codepoints,
        name=name,
        keywords=keywords,
        aliases=aliases,
        held_out=False,
        validation=False,
    )


def many_captions(one, count=3000):
    return collections.Counter(captions.training_caption(one, seed) for seed in range(count))


def of_the_subject(drawn, style="noto"):
    """Captions but for those that name the hand alone."""
    alone = {frame.replace("S", style) for frame in captions.HAND_FRAMES}
    return [caption for caption in drawn if caption not in alone]


def edit_icon(data, style, icon, body):
    path = fetch.package_directory(fetch.STYLES[style], data) / "icons.json"
    icons = json.loads(path.read_text(encoding="utf-8"))
    icons["icons"][icon]["body"] = body
    path.write_text(json.dumps(icons), encoding="utf-8")


# Fetching


def pack(directory, members):
    package = fetch.Package("@scope/name", "1.0.0", "", tuple(members))
    with tarfile.open(directory / package.tarball, "w:gz") as archive:
        for member, content in {**members, "unwanted.js": b"x"}.items():
            info = tarfile.TarInfo(f"package/{member}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    digest = hashlib.sha256((directory / package.tarball).read_bytes()).hexdigest()
    return fetch.Package(package.name, package.version, digest, package.members)


def test_a_tarball_with_the_pinned_digest_gives_the_named_members_alone(tmp_path):
    (tmp_path / "packages").mkdir()
    package = pack(tmp_path / "packages", {"chars.json": b"{}", "deep/er.json": b"[]"})
    fetch.fetch(tmp_path, (package,))
    directory = tmp_path / "packages" / "scope-name-1.0.0"
    found = {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    assert found == {"chars.json": b"{}", "deep/er.json": b"[]"}


def test_a_tarball_with_another_digest_is_refused_by_name_before_anything_is_unpacked(tmp_path):
    (tmp_path / "packages").mkdir()
    package = pack(tmp_path / "packages", {"chars.json": b"{}"})
    tarball = tmp_path / "packages" / package.tarball
    tarball.write_bytes(tarball.read_bytes() + b"\0")
    with pytest.raises(fetch.DigestMismatch, match=r"scope-name-1\.0\.0\.tgz"):
        fetch.fetch(tmp_path, (package,))
    assert not (tmp_path / "packages" / "scope-name-1.0.0").exists()


def test_every_package_is_pinned_to_a_version_and_a_digest():
    assert {style: package.version for style, package in fetch.STYLES.items()} == {
        "noto": "1.2.9",
        "twemoji": "1.2.5",
        "fluent": "1.2.6",
    }
    assert {fetch.ANNOTATIONS.version, fetch.DERIVED_ANNOTATIONS.version} == {"48.2.0"}
    assert all(len(bytes.fromhex(package.sha256)) == 32 for package in fetch.PACKAGES)


# Drawing


def test_the_fixture_gives_its_pictures_and_leaves_zero_padded_code_points_out(built):
    output, summary = built
    assert summary["by_style"] == {"fluent": 6, "noto": 6, "twemoji": 7}
    assert summary["emoji"] == 7 and summary["emoji_in_every_style"] == 6
    assert summary["groups"] == 6
    assert summary["left_out"] == {}
    assert json.loads((output / "summary.json").read_text()) == summary
    assert sorted(p.stem for p in (output / "gallery" / "fluent").iterdir()) == [
        "1f349",
        "1f448",
        "1f44b",
        "1f44b-1f3fd",
        "1f534",
        "2764",
    ]


def test_index_is_in_the_order_of_hand_and_code_points(built):
    rows = records.read_index(built[0] / "index.jsonl")
    assert [(r.style, r.codepoints) for r in rows] == sorted((r.style, r.codepoints) for r in rows) and len(rows) == 19


def test_shards_hold_what_is_trained_on_with_its_captions_and_the_rare_twice(built, monkeypatch):
    output, _ = built
    rows = records.read_index(output / "index.jsonl")
    rows = [dataclasses.replace(row, held_out=False, validation=False) for row in rows]
    rows[0] = dataclasses.replace(rows[0], held_out=True)
    rows[1] = dataclasses.replace(rows[1], validation=True)
    monkeypatch.setattr(render, "MANY", 6)  # the hand that waves, in two skin tones and three hands, reaches it
    render.write_shards(output, rows)
    shown = collections.Counter()
    for i, example in enumerate(index_source(output / "train.array_record")):
        picture = read_record(str(output / "train.array_record"), i)
        (row,) = [r for r in rows[2:] if picture == (output / "gallery" / r.style / f"{r.codepoints}.png").read_bytes()]
        showing = shown[row]
        assert list(example.captions) == [captions.training_caption(row, f"{showing}/{k}") for k in range(16)]
        shown[row] += 1
    assert shown == {r: 1 if r.group == "1f44b" else 2 for r in rows[2:]}
    (judged,) = index_source(output / "held_out.array_record")
    assert judged.captions[0] == captions.training_caption(rows[0], "0/0")
    (kept,) = index_source(output / "validation.array_record")
    assert kept.captions[0] == captions.training_caption(rows[1], "0/0")


@pytest.mark.parametrize("kind", ["autoencoder", "diffusion"])
def test_configurations_are_right(kind):
    config = read_config(kind, ROOT / "scripts" / f"emoji_{kind}.toml", {})
    assert config.data == ["data/emoji/train.array_record"]


def test_a_heart_is_red_on_white_in_every_hand(built):
    output, _ = built
    for style in STYLES:
        with Image.open(output / "gallery" / style / "2764.png") as picture:
            red, green, blue = picture.getpixel((64, 64))
            assert red > 200 and green < 80 and blue < 90
            assert picture.getpixel((1, 126)) == (255, 255, 255)


def test_a_flag_hangs_the_right_way_round(built):
    output, _ = built
    with Image.open(output / "gallery" / "twemoji" / "1f1eb-1f1f7.png") as picture:
        assert picture.getpixel((20, 64)) == (0x00, 0x24, 0x95)
        assert picture.getpixel((64, 64)) == (0xEE, 0xEE, 0xEE)
        assert picture.getpixel((108, 64)) == (0xED, 0x29, 0x39)


def test_an_icon_that_is_not_square_is_centred(built):
    output, _ = built
    with Image.open(output / "gallery" / "twemoji" / "1f349.png") as picture:
        inked = (np.asarray(picture) < 250).any((1, 2))
    assert not inked[:18].any() and not inked[-18:].any() and inked[22:-22].all()


def test_an_alias_is_its_parent_in_the_mirror():
    icons = json.loads((fetch.package_directory(fetch.STYLES["fluent"], FIXTURE) / "icons.json").read_text())
    left = render.render(render.svg_document(icons, "backhand-index-pointing-left")).astype(int)
    right = render.render(render.svg_document(icons, "backhand-index-pointing-right")).astype(int)
    assert np.abs(left[:, ::-1] - right).mean() < 0.1
    assert np.abs(left - right).mean() > 10


@pytest.mark.parametrize("body", ["<g><path</g>", "", '<path fill="#fff" d="M0 0h128v128H0z"/>'])
def test_a_picture_that_does_not_draw_is_named_counted_and_left_out(data, body):
    edit_icon(data, "noto", "red-heart", body)
    summary = render.build(data)
    assert list(summary["left_out"]) == ["noto/2764"]
    assert summary["pictures"] == 18 and summary["by_style"]["noto"] == 5
    assert len(records.read_index(data / "index.jsonl")) == 18
    assert not (data / "gallery" / "noto" / "2764.png").exists()


def test_an_icon_that_the_set_lacks_is_named(data):
    path = fetch.package_directory(fetch.STYLES["noto"], data) / "chars.json"
    path.write_text(json.dumps({"2764": "no-such-icon"}))
    assert "no-such-icon" in render.build(data)["left_out"]["noto/2764"]


def test_another_version_of_the_emoji_table_is_refused(monkeypatch):
    monkeypatch.setattr(render.emoji, "__version__", "1.0")
    with pytest.raises(RuntimeError, match=r"emoji==2\.16\.0.*emoji==1\.0"):
        render.fully_qualified()


# Names


def test_records_carry_the_short_names_and_keywords_of_cldr(built):
    rows = {(r.style, r.codepoints): r for r in records.read_index(built[0] / "index.jsonl")}
    assert rows["noto", "2764"].name == "red heart"
    assert rows["noto", "2764"].keywords == ("emotion", "heart", "love", "red")
    assert rows["fluent", "1f44b-1f3fd"].name == "waving hand: medium skin tone"
    assert "hello" in rows["fluent", "1f44b-1f3fd"].keywords
    assert rows["twemoji", "1f1eb-1f1f7"].name == "flag: France"
    assert rows["noto", "1f534"].aliases == ()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("leftwards thumb sign medium-dark skin tone", "leftwards thumb sign: medium-dark skin tone"),
        ("leftwards thumb sign medium skin tone", "leftwards thumb sign: medium skin tone"),
        ("pickle", "pickle"),
    ],
)
def test_a_name_that_cldr_lacks_is_spelled_as_cldr_would(name, expected):
    assert render.spelled_as_cldr(name) == expected


@pytest.mark.parametrize(
    ("codepoints", "group"),
    [
        ("2764", "2764"),
        ("1f44b-1f3fd", "1f44b"),
        ("1f3c3-1f3fb-200d-2640-200d-27a1", "1f3c3"),
        ("1f3c3-200d-2642-fe0f", "1f3c3"),
        ("1f468-1f3ff-200d-1f680", "1f9d1-200d-1f680"),
        ("1f469-200d-1f9af-200d-27a1", "1f9d1-200d-1f9af"),
        ("1f468", "1f468"),
        ("1f469-1f3fb-200d-2764-200d-1f468-1f3ff", "1f469-200d-2764-200d-1f468"),
        ("1f468-200d-1f466", "1f9d1-200d-1f466"),
        ("1f1eb-1f1f7", "1f1eb-1f1f7"),
        ("27a1", "27a1"),
        ("2640", "2640"),
    ],
)
def test_variants_of_an_emoji_share_its_group(codepoints, group):
    assert records.base_group(codepoints) == group


# The split


def test_the_split_of_known_pairs_never_moves():
    everywhere = collections.defaultdict(lambda: list(STYLES))
    held = [("1f44b", "fluent"), ("1f345", "fluent"), ("1f3e0", "fluent")]
    validation = [("1f437", "fluent"), ("26f0", "fluent"), ("1f3a8", "noto")]
    assert all(judge_emoji.held_out(c, s, everywhere) for c, s in held)
    assert all(records.is_validation(c, s, everywhere) for c, s in validation)
    assert not any(judge_emoji.held_out(c, s, everywhere) for c, s in validation)
    assert not any(
        f(c, s, everywhere) for f in (judge_emoji.held_out, records.is_validation) for c, s in [("2764", "noto")]
    )


def test_held_out_and_validation_pairs_are_apart_and_training_shows_their_emoji():
    rng = np.random.default_rng(0)
    styles_of = {f"{i:x}": [s for s in STYLES if rng.random() < 0.8] for i in range(6000)}
    held, validation, total = 0, 0, 0
    for codepoints, styles in styles_of.items():
        part = {
            s: (judge_emoji.held_out(codepoints, s, styles_of), records.is_validation(codepoints, s, styles_of))
            for s in styles
        }
        assert (True, True) not in part.values()
        if any(any(p) for p in part.values()):
            assert (False, False) in part.values()
        held += sum(h for h, _ in part.values())
        validation += sum(v for _, v in part.values())
        total += len(styles)
    assert 0.040 < held / total < 0.055
    assert 0.007 < validation / total < 0.012


def test_an_emoji_that_one_hand_alone_drew_is_trained_on():
    alone = collections.defaultdict(lambda: ["fluent"])
    assert not judge_emoji.held_out("1f44b", "fluent", alone)
    assert not records.is_validation("1f437", "fluent", alone)


def test_the_judge_finds_the_gallery_in_itself(built, capsys):
    output, _ = built
    judge_emoji.main(output / "gallery", output / "gallery")
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "held out     1 pictures: nearest 1.000, in five 1.000, style 1.000, median rank 0",
        "seen        18 pictures: nearest 1.000, in five 1.000, style 1.000, median rank 0",
    ]


def test_a_hand_is_told_by_its_other_drawings_where_the_same_emoji_by_others_may_not_be_found(tmp_path, capsys):
    """Hands that differ in colour alone: the same emoji by another hand has all of its gradients."""
    rng = np.random.default_rng(0)
    shades = {"noto": (255, 90, 90), "twemoji": (90, 255, 90), "fluent": (90, 90, 255)}
    for one in ("1f44b", "1f345", "1f3e0", "2764"):
        shape = np.kron(rng.integers(0, 2, (16, 16, 1)), np.ones((8, 8, 1)))
        for hand, shade in shades.items():
            for folder, colour in (("gallery", shade), ("drawn", shades["noto"])):
                (tmp_path / folder / hand).mkdir(parents=True, exist_ok=True)
                picture = Image.fromarray((255 - shape * (255 - np.array(colour))).astype("uint8"))
                picture.save(tmp_path / folder / hand / f"{one}.png")
    assert hands.main(tmp_path / "gallery", tmp_path / "drawn") == {
        "true, all but its own picture": 0.0,
        "true, other emoji": 1.0,
        "drawn, all but its own picture": 0.0,
        "drawn, other emoji": 0.0,
    }
    assert len(capsys.readouterr().out.splitlines()) == 4


# Captions


def test_the_canonical_caption_is_name_and_hand():
    assert captions.canonical_caption(record()) == "red heart, noto style"
    tone = record(name="waving hand: medium skin tone", style="fluent")
    assert captions.canonical_caption(tone) == "waving hand: medium skin tone, fluent style"


def test_a_caption_depends_on_record_and_seed_alone():
    one = record()
    assert [captions.training_caption(one, s) for s in range(50)] == [
        captions.training_caption(one, s) for s in range(50)
    ]
    assert captions.training_caption(one, "3/7") == captions.training_caption(one, "3/7")
    assert len(many_captions(one)) > 60


def test_training_words_a_heart_in_every_promised_way():
    drawn = many_captions(record(style="twemoji"))
    assert {
        "red heart, twemoji style",
        "a red heart, twemoji style",
        "a red heart in twemoji style",
        "twemoji of a red heart",
        "a twemoji emoji of a red heart",
        "twemoji red heart",
        "red heart emoji, twemoji style",
        "a red heart",
        "red heart",
        "red heart, love, twemoji style",
        "love, twemoji style",
        "love",
        "twemoji style",
        "an emoji, twemoji style",
    } <= set(drawn)
    assert not any(other in caption for caption in drawn for other in ("noto", "fluent"))
    share = sum(count for caption, count in drawn.items() if "twemoji" in caption) / 3000
    assert 0.87 < share < 0.94
    assert 0.37 < drawn["red heart, twemoji style"] / 3000 < 0.55


@pytest.mark.parametrize("keywords", [("emotion", "love", "red"), ()])
def test_one_caption_of_ten_names_the_hand_alone(keywords):
    one = record(style="twemoji", keywords=keywords)
    drawn = many_captions(one)
    told = (one.name, *one.keywords)
    alone = {caption: count for caption, count in drawn.items() if not any(word in caption for word in told)}
    assert 0.08 < sum(alone.values()) / 3000 < 0.12
    assert set(alone) == set(drawn) - set(of_the_subject(drawn, "twemoji"))


def test_keywords_alone_never_hide_a_skin_tone_or_a_gender():
    runner = record(
        name="woman running: dark skin tone, facing right",
        keywords=("dark skin tone", "fast", "race", "woman"),
        codepoints="1f3c3-1f3ff-200d-2640-200d-27a1",
    )
    for caption in of_the_subject(many_captions(runner, 1000)):
        assert "dark skin tone" in caption and "woman" in caption and "facing right" in caption


def test_a_record_without_keywords_or_aliases_has_captions():
    drawn = of_the_subject(many_captions(record(name="pickle", keywords=()), 500))
    assert all("pickle" in caption for caption in drawn)


def test_a_country_is_known_by_its_flag_and_takes_no_article():
    drawn = many_captions(record(name="flag: France", style="noto", keywords=("flag",), aliases=("France",)))
    assert {"flag of France, noto style", "the flag of France, noto style", "a France flag, noto style"} <= set(drawn)
    assert {"France", "France, noto style"} <= set(drawn)
    assert not any(caption.startswith("a France,") or "a flag:" in caption for caption in drawn)
    assert all("France" in caption for caption in of_the_subject(drawn))


def test_quotation_marks_come_as_printed_and_as_typed():
    drawn = many_captions(record(name="five o’clock"), 200)
    assert {"five o’clock, noto style", "five o'clock, noto style"} <= set(drawn)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("red heart", "a red heart"),
        ("ear", "an ear"),
        ("unicorn", "a unicorn"),
        ("eye", "an eye"),
        ("hourglass done", "an hourglass done"),
        ("SOS button", "an SOS button"),
        ("glasses", "glasses"),
        ("bus", "a bus"),
        ("wine glass", "a wine glass"),
        ("people holding hands", "people holding hands"),
        ("person bouncing balls", "a person bouncing balls"),
        ("face with rolling eyes", "a face with rolling eyes"),
        ("Santa Claus: dark skin tone", "Santa Claus: dark skin tone"),
        ("flag of France", "the flag of France"),
        ("man: bald", "a man: bald"),
    ],
)
def test_articles_are_english(name, expected):
    assert captions.with_article(name) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("red heart", {"red heart"}),
        ("flag: France", {"flag of France", "France flag", "France"}),
        ("man: bald", {"man, bald", "man bald", "man with bald head", "bald head man"}),
        (
            "woman running: dark skin tone, facing right",
            {
                "woman running, dark skin tone, facing right",
                "woman running dark skin tone facing right",
                "woman running facing right with dark skin tone",
                "dark skin tone woman running facing right",
            },
        ),
        ("kiss: woman, man", {"kiss, woman, man", "kiss woman man"}),
    ],
)
def test_short_names_are_worded_as_people_type(name, expected):
    assert set(captions.reworded(name)) == expected


# Vocabulary

WORDS = {
    "red heart": 40,
    "grinning face": 30,
    "noto style": 50,
    "twemoji fluent emoji": 20,
    "the reading of letters": 5,
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    tokens, merges = vocabulary.train(WORDS, 540)
    CLIPTokenizer(tokens, merges, context_length=vocabulary.CONTEXT_LENGTH).save(directory)
    return directory, tokens, merges


def test_the_vocabulary_has_the_layout_of_clip(trained):
    _, tokens, merges = trained
    by_id = sorted(tokens, key=tokens.get)
    assert list(tokens.values()) == list(range(540)) and len(merges) == 26
    assert by_id[:3] == ["!", '"', "#"] and by_id[256:258] == ["!</w>", '"</w>']
    assert by_id[512:538] == ["".join(pair) for pair in merges]
    assert by_id[538:] == ["<|startoftext|>", "<|endoftext|>"]


def test_training_the_vocabulary_again_gives_the_same_one(trained):
    _, tokens, merges = trained
    assert vocabulary.train(dict(reversed(WORDS.items())), 540) == (tokens, merges)


def test_the_tokenizer_opens_the_vocabulary_and_nothing_is_unknown(trained):
    directory, tokens, _ = trained
    tokenizer = CLIPTokenizer.from_directory(directory)
    names = {token_id: token for token, token_id in tokens.items()}
    assert tokenizer.vocabulary_size == 540 and tokenizer.context_length == 32
    for prompt in ("A Red heart, noto style", "it's 42 €", "crème brûlée", "\N{MAMMOTH}", "漢字", "\x07\U000e0067"):
        ids = [int(i) for i in tokenizer(prompt)[0] if i not in (538, 539)]
        assert ids
        spelled = bytes(
            {c: b for b, c in zip(byte_values(), vocabulary.byte_characters(), strict=True)}[c]
            for i in ids
            for c in names[i].removesuffix("</w>")
        )
        assert spelled.decode() == "".join(prompt.lower().split())
    assert list(tokenizer("red heart")[0, :4]) == [538, *(tokens[t] for t in ("red</w>", "heart</w>")), 539]


def byte_values():
    printable = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    return printable + [b for b in range(256) if b not in printable]


def test_a_vocabulary_too_small_for_a_merge_is_refused():
    with pytest.raises(ValueError, match="514.*size=514"):
        vocabulary.train(WORDS, 514)


def test_texts_too_few_for_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match="must yield 3582 merges"):
        vocabulary.train({"red heart": 1}, 4096)


def test_a_name_weighs_once_whatever_its_hands_and_skin_tones():
    hands = [record(style=s) for s in STYLES]
    tones = [record(name=f"waving hand: {tone} skin tone", keywords=("hello",)) for tone in ("light", "dark")]
    counts = vocabulary.word_counts([*hands, *tones], {10: ["house"], 50: ["colour"]})
    assert counts["red heart"] == counts["waving hand"] > counts["love"] == counts["hello"]
    assert counts["hello"] > counts["house"] > counts["colour"] > 0
