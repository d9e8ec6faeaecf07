"""The tokenizer against golden tokens of transformers 5, its files, and what it refuses."""

import copy
import json
import pickle
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from latentdiff.checkpoints import tokenizer_files
from latentdiff.models.tokenizer import AddedToken, CLIPTokenizer, TruncationWarning

FIXTURES = Path(__file__).parent / "fixtures" / "tokenizer"
GOLDEN = json.loads((FIXTURES / "golden.json").read_text())
START, END = "<|startoftext|>", "<|endoftext|>"


def make_directory(path, style):
    """A tokenizer's directory as Stable Diffusion 1.5 ("sd1") or 2.1 ("sd2") has it."""
    path.mkdir(parents=True, exist_ok=True)
    for name in ("vocab.json", "merges.txt", f"{style}/tokenizer_config.json", f"{style}/special_tokens_map.json"):
        shutil.copy(FIXTURES / name, path)
    return path


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def write(path, content):
    path.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {style: make_directory(root / style, style) for style in ("sd1", "sd2")}


@pytest.fixture(scope="module")
def tokenizers(directories):
    return {style: CLIPTokenizer.from_directory(path) for style, path in directories.items()}


@pytest.fixture
def directory(tmp_path):
    return make_directory(tmp_path / "tokenizer", "sd1")


@pytest.fixture
def whole(tmp_path, tokenizers):
    """A directory with `tokenizer.json` alone, as transformers 5 saves it."""
    tokenizers["sd1"].save(tmp_path)
    for name in ("vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"):
        (tmp_path / name).unlink()
    return tmp_path


# tokens


@pytest.mark.filterwarnings("ignore::latentdiff.models.tokenizer.TruncationWarning")
@pytest.mark.parametrize("entry", GOLDEN, ids=[f"{e['style']}-{e['prompt'][:12]!a}" for e in GOLDEN])
def test_tokens_are_those_of_transformers(tokenizers, entry):
    tokenizer = tokenizers[entry["style"]]
    row = tokenizer(entry["prompt"])[0]
    length = len(entry["ids"])
    assert row[:length].tolist() == entry["ids"]
    assert (row[length:] == tokenizer.pad_id).all()


def test_pairs_merge_in_the_order_of_the_merges():
    tokens = [*"lower", *(c + "</w>" for c in "lower"), "er</w>", "lo", "low", START, END]
    merges = [("e", "r</w>"), ("l", "o"), ("lo", "w")]
    tokenizer = CLIPTokenizer({token: i for i, token in enumerate(tokens)}, merges, context_length=8)
    # low + er</w>; l + o + w</w> with lo merged, but no "low</w>"
    assert tokenizer("Lower low").tolist() == [[13, 12, 10, 11, 7, 14, 14, 14]]


def test_bytes_that_the_vocabulary_lacks_become_the_unknown_token():
    tokenizer = CLIPTokenizer({"a</w>": 0, "<unk>": 1, START: 2, END: 3}, [], context_length=6, unknown_token="<unk>")
    assert tokenizer("a b a").tolist() == [[2, 0, 1, 0, 3, 3]]


def test_special_tokens_are_where_clip_has_them(tokenizers):
    sd1, sd2 = tokenizers["sd1"], tokenizers["sd2"]
    assert (sd1.start_id, sd1.end_id, sd1.pad_id) == (1512, 1513, 1513)
    assert (sd2.start_id, sd2.end_id, sd2.pad_id) == (1512, 1513, 0)
    assert sd1.vocabulary_size == 1514
    assert sd1.vocabulary["!</w>"] == 256
    assert len(sd1.merges) == 1000


def test_a_batch_is_int32_rows_of_the_context_length(tokenizers):
    tokens = tokenizers["sd1"](["a heart", "", "two hearts"])
    assert tokens.shape == (3, 77)
    assert tokens.dtype == np.int32
    np.testing.assert_array_equal(tokens[0], tokenizers["sd1"]("a heart")[0])
    assert tokens[1].tolist() == [1512] + [1513] * 76
    assert tokenizers["sd1"]([]).shape == (0, 77)
    assert tokenizers["sd1"](("a", "b")).shape == (2, 77)


def test_tokens_do_not_change_through_pickle_or_copy(tokenizers):
    tokenizer = tokenizers["sd2"]
    prompt = "Hi! <|endoftext|> there"
    for other in (pickle.loads(pickle.dumps(tokenizer)), copy.deepcopy(tokenizer)):
        np.testing.assert_array_equal(other(prompt), tokenizer(prompt))


def test_import_does_not_wait_for_the_engine():
    code = "import sys, latentdiff.models.tokenizer; sys.exit('tokenizers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


# cutting off


def test_a_prompt_that_just_fits_is_not_cut_off(tokenizers):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        row = tokenizers["sd1"]("a " * 75)[0]
    assert row[-2] == tokenizers["sd1"].vocabulary["a</w>"]
    assert row[-1] == 1513


def test_a_prompt_that_is_cut_off_keeps_its_end_token_and_names_its_lost_text(tokenizers):
    with pytest.warns(TruncationWarning, match=r"prompts\[0\] lost 3 of 78 tokens: ' ?Q w E'") as record:
        row = tokenizers["sd1"]("a " * 75 + "Q w E")[0]
    assert row.shape == (77,)
    assert row[-1] == 1513
    assert record[0].filename == __file__


def test_one_call_warns_once_and_lists_each_prompt(tokenizers):
    prompts = ["a " * 75 + "first", "short", "a " * 75 + "third"]
    with pytest.warns(TruncationWarning) as record:
        tokenizers["sd1"](prompts)
    message = str(record[0].message)
    assert len(record) == 1
    assert "prompts[0]" in message and "'first'" in message
    assert "prompts[2]" in message and "'third'" in message
    assert "prompts[1]" not in message


def test_a_warning_stays_short_for_many_and_for_long_prompts(tokenizers):
    with pytest.warns(TruncationWarning, match="and 30 more") as record:
        tokenizers["sd1"](["b " * 1000] * 50)
    assert len(str(record[0].message)) < 10000


def test_context_length_holds_start_and_end_alone_if_it_is_two(tokenizers):
    tokenizer = CLIPTokenizer(tokenizers["sd1"].vocabulary, tokenizers["sd1"].merges, context_length=2)
    assert tokenizer("").tolist() == [[1512, 1513]]
    with pytest.warns(TruncationWarning):
        assert tokenizer("a").tolist() == [[1512, 1513]]


# what is no prompt


@pytest.mark.parametrize("prompts", [b"a heart", None, 3, {"a": 1}, iter(["a"]), np.zeros(2)])
def test_what_is_neither_text_nor_a_list_is_refused(tokenizers, prompts):
    with pytest.raises(TypeError, match="`prompts` must be text: a str or a list of str. Received: "):
        tokenizers["sd1"](prompts)


@pytest.mark.parametrize("wrong", [b"a", None, 3, ["a"], float("nan")])
def test_a_list_with_something_other_than_text_is_refused(tokenizers, wrong):
    with pytest.raises(TypeError, match=r"`prompts` must be text.*Received: prompts\[1\]="):
        tokenizers["sd1"](["a heart", wrong])


def test_lone_surrogates_are_refused(tokenizers):
    with pytest.raises(ValueError, match=r"without lone surrogates. Received: prompts\[1\]='\\ud800'"):
        tokenizers["sd1"](["fine", "\ud800"])


# decoding


def test_decoding_says_what_the_prompt_said(tokenizers):
    for tokenizer in tokenizers.values():
        prompts = ["a red heart", "", "\u00e9t\u00e9 \U0001f600 \u4e2d\u6587"]
        assert tokenizer.decode(tokenizer(prompts)) == prompts
        assert tokenizer.decode(tokenizer("Hello")[0]) == "hello"
        assert tokenizer.decode([]) == ""


def test_decoding_shows_special_tokens_inside_of_a_prompt(tokenizers):
    tokenizer = tokenizers["sd2"]
    assert tokenizer.decode(tokenizer("x<|endoftext|>y!")) == ["x <|endoftext|> y !"]


def test_decoding_half_a_character_gives_the_replacement_character(tokenizers):
    ids = [tokenizers["sd1"].vocabulary["\u00f0"]]  # the first byte of an emoji
    assert tokenizers["sd1"].decode(ids) == "\ufffd"


@pytest.mark.parametrize("ids", [[1514], [-1], [0.5], 3, [[[1]]], "a"])
def test_ids_that_are_no_tokens_are_refused(tokenizers, ids):
    with pytest.raises(ValueError, match="`ids` must be"):
        tokenizers["sd1"].decode(ids)


# directories


@pytest.mark.filterwarnings("ignore::latentdiff.models.tokenizer.TruncationWarning")
@pytest.mark.parametrize("style", ["sd1", "sd2"])
@pytest.mark.parametrize("kept", ["all", "tokenizer.json", "vocab.json"])
def test_a_saved_tokenizer_gives_the_same_tokens(tmp_path, tokenizers, style, kept):
    tokenizer = tokenizers[style]
    tokenizer.save(tmp_path / "new" / "directory")
    path = tmp_path / "new" / "directory"
    assert {file.name for file in path.iterdir()} == {
        "vocab.json",
        "merges.txt",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    }
    if kept == "tokenizer.json":
        (path / "vocab.json").unlink()
        (path / "merges.txt").unlink()
    elif kept == "vocab.json":
        (path / "tokenizer.json").unlink()
    again = CLIPTokenizer.from_directory(path)
    prompts = [entry["prompt"] for entry in GOLDEN]
    np.testing.assert_array_equal(again(prompts), tokenizer(prompts))
    assert again.added_tokens == tokenizer.added_tokens
    assert again.vocabulary == tokenizer.vocabulary
    assert again.merges == tokenizer.merges
    assert again.pad_token == tokenizer.pad_token
    assert again.context_length == 77


def test_saving_twice_writes_the_same_bytes(tmp_path, tokenizers):
    tokenizers["sd2"].save(tmp_path / "first")
    CLIPTokenizer.from_directory(tmp_path / "first").save(tmp_path / "second")
    for file in (tmp_path / "first").iterdir():
        assert file.read_bytes() == (tmp_path / "second" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("form", [list, " ".join])
def test_merges_are_read_as_pairs_and_as_strings(whole, tokenizers, form):
    content = read(whole / "tokenizer.json")
    content["model"]["merges"] = [form(merge) for merge in tokenizers["sd1"].merges]
    write(whole / "tokenizer.json", content)
    assert CLIPTokenizer.from_directory(whole).merges == tokenizers["sd1"].merges


def test_rules_that_a_file_brings_for_its_text_are_ignored(whole, tokenizers):
    content = read(whole / "tokenizer.json")
    content["normalizer"] = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "z"}
    content["pre_tokenizer"] = content["post_processor"] = {"type": "Unheard", "of": 1}
    content["truncation"] = {"direction": "Left", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    write(whole / "tokenizer.json", content)
    prompt = "A heart, aaaa"
    np.testing.assert_array_equal(CLIPTokenizer.from_directory(whole)(prompt), tokenizers["sd1"](prompt))


def test_a_pipelines_directory_leads_to_its_tokenizer(tmp_path, tokenizers):
    make_directory(tmp_path / "tokenizer", "sd2")
    assert CLIPTokenizer.from_directory(str(tmp_path)).pad_id == 0


def test_vocabulary_and_merges_alone_make_stable_diffusion_1s_tokenizer(directory):
    (directory / "tokenizer_config.json").unlink()
    (directory / "special_tokens_map.json").unlink()
    tokenizer = CLIPTokenizer.from_directory(directory)
    assert tokenizer.pad_id == tokenizer.end_id == 1513
    assert tokenizer.context_length == 77


def test_windows_line_ends_make_no_other_merges(directory, tokenizers):
    content = (directory / "merges.txt").read_bytes().replace(b"\n", b"\r\n")
    (directory / "merges.txt").write_bytes(content + b"\r\n")
    assert CLIPTokenizer.from_directory(directory).merges == tokenizers["sd1"].merges


@pytest.mark.parametrize(("stated", "expected"), [(16, 16), (None, 77), (int(1e30), 77), (1e30, 77)])
def test_context_length_is_the_directorys(directory, stated, expected):
    config = read(directory / "tokenizer_config.json") | {"model_max_length": stated}
    write(directory / "tokenizer_config.json", config)
    assert CLIPTokenizer.from_directory(directory).context_length == expected
    assert CLIPTokenizer.from_directory(directory, context_length=5).context_length == 5


def test_added_tokens_follow_the_vocabulary_and_survive_saving(tmp_path, directory):
    write(directory / "added_tokens.json", {"<cat-toy>": 1514, "<Dog>": 1515})
    tokenizer = CLIPTokenizer.from_directory(directory)
    assert tokenizer.vocabulary_size == 1516
    a = tokenizer.vocabulary["a</w>"]
    assert tokenizer("a <cat-toy>a <DOG>")[0, :6].tolist() == [1512, a, 1514, a, 1515, 1513]
    assert tokenizer.decode(tokenizer("a <cat-toy>")) == ["a <cat-toy>"]
    tokenizer.save(tmp_path / "again")
    for alone in ("tokenizer.json", "vocab.json", None):
        if alone:
            shutil.copytree(tmp_path / "again", tmp_path / alone)
            (tmp_path / alone / alone).unlink()
        again = CLIPTokenizer.from_directory(tmp_path / (alone or "again"))
        np.testing.assert_array_equal(again("a <cat-toy>a <DOG>"), tokenizer("a <cat-toy>a <DOG>"))


def test_saving_removes_the_added_tokens_of_an_earlier_tokenizer(directory, tokenizers):
    write(directory / "added_tokens.json", {"<cat-toy>": 1514})
    tokenizers["sd1"].save(directory)
    assert CLIPTokenizer.from_directory(directory).vocabulary_size == 1514


# what is malformed


def refuse(directory, file, rule, error=ValueError):
    with pytest.raises(error, match=rule) as raised:
        CLIPTokenizer.from_directory(directory)
    assert file in str(raised.value)


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ("", "must be valid JSON"),
        ('{"a": 0', "must be valid JSON"),
        ('{"a": 0, "a": 1}', "unique keys.*'a' comes twice"),
        ("[" * 100000, "must be valid JSON"),
        ('{"a": ' + "1" * 10000 + "}", "must be"),
        ("[]", "must hold one JSON object"),
        ("{}", "must not be empty"),
        ('{"a": 0, "b": 0}', "an id of its own.*'a' and 'b' both have 0"),
        ('{"a": 0, "b": 2}', "must use the ids 0 to 1"),
        ('{"a": 0, "b": -1}', "must use the ids 0 to 1"),
        ('{"a": 0, "b": true}', "whole numbers"),
        ('{"a": 0, "b": "1"}', "whole numbers"),
        ('{"a": 0, "b": 1.0}', "whole numbers"),
        ('{"": 0}', "one character or more"),
        ('{"\\ud800": 0}', "one character or more"),
        ("\xff", "must be UTF-8"),
    ],
)
def test_a_malformed_vocabulary_is_refused(directory, content, rule):
    (directory / "vocab.json").write_bytes(content.encode("latin-1"))
    refuse(directory, "vocab.json", rule)


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("a", "two tokens with one space.*line 1002 is 'a'"),
        ("a b c", "two tokens with one space.*line 1002"),
        ("a  b", "two tokens with one space.*line 1002"),
        ("a ", "two tokens with one space.*line 1002"),
        ("a nowhere", "tokens of the vocabulary. Received: merge 1000 is .*'nowhere' is missing"),
        ("! \u00b5", "tokens of the vocabulary. Received: merge 1000 is .*is missing"),
    ],
)
def test_a_malformed_merge_is_refused(directory, line, rule):
    with open(directory / "merges.txt", "a", encoding="utf-8") as file:
        file.write(line + "\n")
    refuse(directory, "merges.txt", rule)


@pytest.mark.parametrize(
    ("path", "value", "rule"),
    [
        (("model",), None, "`model` must be of type 'BPE'"),
        (("model", "type"), "Unigram", "`model` must be of type 'BPE'"),
        (("model", "vocab"), [["a", 0]], "must map tokens to ids"),
        (("model", "merges"), "a b", "must be a list"),
        (("model", "merges"), [["a"]], "pairs of tokens. Received: merge 0"),
        (("model", "merges"), ["a b c"], "pairs of tokens. Received: merge 0"),
        (("model", "merges"), [["a", 1]], "pairs of tokens. Received: merge 0"),
        (("model", "merges"), [3], "pairs of tokens. Received: merge 0"),
        (("added_tokens",), {}, "must be a list"),
        (("added_tokens",), [{"id": 3}], "a special token must be a string, or an object"),
        (("added_tokens",), [{"id": 0, "content": "!", "normalized": "yes"}], "true or false flags"),
        (("added_tokens",), [{"id": 1600, "content": "<far>"}], "without a gap"),
        (("added_tokens",), [{"id": 5, "content": END}], "without a gap"),
        (("added_tokens",), ["<no id>"], "without a gap"),
    ],
)
def test_a_malformed_tokenizer_json_is_refused(whole, path, value, rule):
    content = read(whole / "tokenizer.json")
    inner = content
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    write(whole / "tokenizer.json", content)
    refuse(whole, str(whole), rule)


@pytest.mark.parametrize(
    ("settings", "rule"),
    [
        ({"model_max_length": 1}, "`model_max_length` must be"),
        ({"model_max_length": "77"}, "`model_max_length` must be"),
        ({"model_max_length": 10**9}, "`model_max_length` must be"),
        ({"padding_side": "left"}, "`padding_side` must be 'right'"),
        ({"truncation_side": "left"}, "`truncation_side` must be 'right'"),
        ({"added_tokens_decoder": []}, "`added_tokens_decoder` must be an object"),
        ({"added_tokens_decoder": {"x": {"content": END}}}, "added tokens must have the vocabulary's ids"),
        ({"added_tokens_decoder": {"0": 3}}, "a special token must be"),
        ({"cls_token": 3}, "a special token must be"),
        ({"extra_special_tokens": "a"}, "must be a list"),
    ],
)
def test_malformed_settings_are_refused(directory, settings, rule):
    write(directory / "tokenizer_config.json", read(directory / "tokenizer_config.json") | settings)
    refuse(directory, str(directory), rule)


@pytest.mark.parametrize("key", ["bos_token", "eos_token", "pad_token", "unk_token", "cls_token"])
def test_a_special_token_that_the_vocabulary_lacks_is_refused(directory, key):
    special = read(directory / "special_tokens_map.json") | {key: "<missing>"}
    write(directory / "special_tokens_map.json", special)
    refuse(directory, str(directory), f"special tokens must be in the vocabulary.*Received: {key}='<missing>'")


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"])
def test_a_file_that_is_too_large_is_refused(directory, name, monkeypatch):
    monkeypatch.setattr(tokenizer_files, "SIZE_LIMIT", 50000)
    with open(directory / name, "a") as file:
        file.write("\n" * (50001 - file.tell()))
    refuse(directory, name, "must have at most 50000 bytes")
    (directory / name).write_text((directory / name).read_text().rstrip("\n"))
    CLIPTokenizer.from_directory(directory)


def test_a_directory_without_a_vocabulary_is_refused(tmp_path, directory):
    (tmp_path / "empty").mkdir()
    refuse(
        tmp_path / "empty", "empty", "must hold `vocab.json` and `merges.txt`, or `tokenizer.json`", FileNotFoundError
    )
    refuse(tmp_path / "nowhere", "nowhere", "read from a directory", FileNotFoundError)
    (directory / "merges.txt").unlink()
    refuse(directory, str(directory), "`vocab.json` needs `merges.txt`", FileNotFoundError)


def test_malformed_arguments_are_refused(tokenizers):
    vocabulary, merges = tokenizers["sd1"].vocabulary, tokenizers["sd1"].merges
    for length in (1, 0, 7.0, True, 2**20):
        with pytest.raises(ValueError, match="`context_length` must be"):
            CLIPTokenizer(vocabulary, merges, context_length=length)
    with pytest.raises(ValueError, match="`pad_token` must be in the vocabulary"):
        CLIPTokenizer(vocabulary, merges, pad_token="<pad>")
    with pytest.raises(ValueError, match="`start_token` must be in the vocabulary"):
        CLIPTokenizer({"a": 0, END: 1}, [])
    with pytest.raises(ValueError, match="`merges` must name and make tokens of the vocabulary"):
        CLIPTokenizer(vocabulary, [("!", "nowhere")])
    with pytest.raises(ValueError, match="`unknown_token` must be in the vocabulary itself"):
        CLIPTokenizer(vocabulary, merges, unknown_token="<unk>", added_tokens={"<unk>": AddedToken()})
    with pytest.raises(ValueError, match="`added_tokens` must be text"):
        CLIPTokenizer(vocabulary, merges, added_tokens={"": AddedToken()})
    padded = CLIPTokenizer(vocabulary, merges, pad_token="<pad>", added_tokens={"<pad>": AddedToken()})
    assert padded.pad_id == 1514
