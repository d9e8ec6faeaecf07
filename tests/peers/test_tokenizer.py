"""The tokenizer against transformers 5's CLIPTokenizer, live: on any text, and each on the other's directories."""

import contextlib
import importlib.util
import json
import logging
import shutil
import sys
import unicodedata
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

transformers = pytest.importorskip("transformers")

from latentdiff.models.tokenizer import CLIPTokenizer, TruncationWarning  # noqa: E402

FIXTURES = Path(__file__).parents[1] / "fixtures" / "tokenizer"
PROMPTS = [entry["prompt"] for entry in json.loads((FIXTURES / "golden.json").read_text())]
STYLES = ["bare", "sd1", "sd2", "decoder", "added", "large"]

pytestmark = pytest.mark.filterwarnings("ignore::latentdiff.models.tokenizer.TruncationWarning")


def make_vocabulary(num_merges):
    spec = importlib.util.spec_from_file_location("make_vocabulary", FIXTURES / "make_vocabulary.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.make_vocabulary(num_merges)


def make_directory(path, style):
    """A directory of one of STYLES; "large" has a vocabulary of CLIP's size, "added" two tokens beyond it."""
    path.mkdir(parents=True)
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(FIXTURES / name, path)
    if style != "bare":
        shutil.copytree(FIXTURES / ("sd2" if style == "sd2" else "sd1"), path, dirs_exist_ok=True)
    if style == "decoder":  # as transformers 4.34 to 4.57 wrote it
        config = json.loads((path / "tokenizer_config.json").read_text())
        flags = {"lstrip": False, "rstrip": False, "single_word": False, "special": True}
        config["added_tokens_decoder"] = {
            "0": {"content": "!", "normalized": False, **flags, "rstrip": True},
            "1512": {"content": "<|startoftext|>", "normalized": True, **flags},
            "1513": {"content": "<|endoftext|>", "normalized": True, **flags, "single_word": True},
        }
        (path / "tokenizer_config.json").write_text(json.dumps(config))
    if style == "added":
        (path / "added_tokens.json").write_text(json.dumps({"<Cat-Toy>": 1514, "heart": 1515}))
    if style == "large":
        vocabulary, merges = make_vocabulary(40000)
        tokens = list(vocabulary)[:-2]
        for left in tokens[64:90]:  # pairs that text seldom has, up to CLIP's number
            for right in tokens[512:]:
                if len(tokens) < 49406 and left + right not in vocabulary:
                    vocabulary[left + right] = 0
                    tokens.append(left + right)
                    merges.append((left, right))
        tokens += ["<|startoftext|>", "<|endoftext|>"]
        (path / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
        (path / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@contextlib.contextmanager
def silence_is_required():
    """Fails on a Python warning, and on a warning that transformers logs."""
    records = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    finally:
        logger.removeHandler(handler)
    assert [record.getMessage() for record in records] == []


def peer_tokens(peer, prompts, length=77):
    tokens = peer(prompts, padding="max_length", truncation=True, max_length=length)["input_ids"]
    return np.asarray(tokens, "int32").reshape(-1, length)


@pytest.fixture(scope="module", params=STYLES)
def pair(request, tmp_path_factory):
    """(our tokenizer, transformers' of the same directory, the directory)."""
    directory = make_directory(tmp_path_factory.mktemp("tokenizers") / request.param, request.param)
    return CLIPTokenizer.from_directory(directory), transformers.CLIPTokenizer.from_pretrained(directory), directory


FRAGMENTS = st.one_of(
    st.sampled_from(PROMPTS),
    st.sampled_from(["<|endoftext|>", "<|startoftext|>", "<|EndOfText|>", "</w>", "<Cat-Toy>", "heart", "!", "\x00"]),
    st.sampled_from(["'s", "'LL", "'d", " ", "\t\n", "\u00a0", "\u3000", "\u200b", "\u200d", "\ufe0f", "\u0301"]),
    st.text(alphabet="abcxyz ABC'!<|>/w_019\u0301\u0323\u00e9\u0130\u1e9e\u212b\u1112\u1161\u11ab", max_size=20),
    st.text(alphabet=st.characters(categories=["Mn", "Mc", "Me", "Cf", "Zs", "Zl", "Cc", "Sk"]), max_size=8),
    st.text(max_size=20),
)
TEXTS = st.one_of(
    st.text(max_size=60), st.lists(FRAGMENTS, max_size=12).map("".join), st.lists(FRAGMENTS, max_size=6).map(" ".join)
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True)
@given(prompts=st.lists(TEXTS, min_size=8, max_size=16))
def test_any_text_gives_the_same_tokens(pair, prompts):
    ours, peer, _ = pair
    np.testing.assert_array_equal(ours(prompts), peer_tokens(peer, prompts))


def test_every_awkward_prompt_gives_the_same_tokens(pair):
    ours, peer, _ = pair
    np.testing.assert_array_equal(ours(PROMPTS), peer_tokens(peer, PROMPTS))
    assert ours(PROMPTS).max() < ours.vocabulary_size == len(peer)


def test_long_prompts_give_the_same_tokens(pair):
    ours, peer, _ = pair
    prompts = ["a" * 5000, "word " * 5000, "\u00e9" * 5000, " " * 5000, "e\u0301" * 3000, "<|endoftext|" * 500]
    np.testing.assert_array_equal(ours(prompts), peer_tokens(peer, prompts))


def test_every_character_gives_the_same_tokens(tmp_path):
    directory = make_directory(tmp_path / "sd1", "sd1")
    ours = CLIPTokenizer.from_directory(directory, context_length=2048)
    peer = transformers.CLIPTokenizer.from_pretrained(directory)
    codes = [code for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code)) not in ("Cs", "Cn", "Co")]
    codes = [code for code in codes if not 0x4E00 <= code < 0x9FFF and not 0x17000 <= code < 0x18D00]
    codes = [code for code in codes if not 0xAC00 <= code < 0xD7A0 and code < 0x20000]
    assert len(codes) > 30000
    for start in range(0, len(codes), 4096):
        some = codes[start : start + 4096]
        prompts = ["".join(f"a{chr(c)}B {chr(c)} " for c in some[i : i + 128]) for i in range(0, len(some), 128)]
        with warnings.catch_warnings():
            warnings.simplefilter("error", TruncationWarning)
            np.testing.assert_array_equal(ours(prompts), peer_tokens(peer, prompts, 2048))


def test_context_length_cuts_off_where_transformers_does(tmp_path):
    directory = make_directory(tmp_path / "sd2", "sd2")
    peer = transformers.CLIPTokenizer.from_pretrained(directory)
    for length in (2, 3, 4, 9, 76, 78):
        ours = CLIPTokenizer.from_directory(directory, context_length=length)
        np.testing.assert_array_equal(ours(PROMPTS), peer_tokens(peer, PROMPTS, length))


@pytest.mark.parametrize("files", ["all", "tokenizer.json", "vocab.json"])
@pytest.mark.parametrize("opener", ["CLIPTokenizer", "CLIPTokenizerFast", "AutoTokenizer"])
def test_transformers_opens_what_is_saved_without_a_warning(pair, tmp_path, opener, files):
    ours, _, _ = pair
    ours.save(tmp_path)
    if files == "tokenizer.json":
        (tmp_path / "vocab.json").unlink()
        (tmp_path / "merges.txt").unlink()
    elif files == "vocab.json":
        (tmp_path / "tokenizer.json").unlink()
    with silence_is_required():
        peer = getattr(transformers, opener).from_pretrained(tmp_path)
        tokens = peer_tokens(peer, PROMPTS, 77)
        peer.decode(tokens[0])
    assert type(peer).__name__ == "CLIPTokenizer"
    np.testing.assert_array_equal(tokens, ours(PROMPTS))
    assert peer.model_max_length == 77
    assert (peer.bos_token_id, peer.eos_token_id, peer.pad_token_id) == (ours.start_id, ours.end_id, ours.pad_id)
    assert len(peer) == ours.vocabulary_size


def test_what_transformers_saves_gives_the_same_tokens_here(pair, tmp_path):
    _, peer, _ = pair
    peer.save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists()
    ours = CLIPTokenizer.from_directory(tmp_path)
    again = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    np.testing.assert_array_equal(ours(PROMPTS), peer_tokens(again, PROMPTS))


def test_a_tokenizer_made_from_arguments_is_transformers_own(tmp_path):
    vocabulary = json.loads((FIXTURES / "vocab.json").read_text(encoding="utf-8"))
    lines = (FIXTURES / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    merges = [tuple(line.split(" ")) for line in lines]
    for pad_token in ("<|endoftext|>", "!"):
        ours = CLIPTokenizer(vocabulary, merges, pad_token=pad_token)
        peer = transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, pad_token=pad_token)
        np.testing.assert_array_equal(ours(PROMPTS), peer_tokens(peer, PROMPTS))


def test_decoding_says_what_transformers_says(pair):
    ours, peer, _ = pair
    prompts = ["a red house, noto style", "it's 3.14", "\u00e9t\u00e9 \U0001f600 \u4e2d\u6587", ""]
    assert ours.decode(ours(prompts)) == peer.batch_decode(ours(prompts).tolist(), skip_special_tokens=True)
