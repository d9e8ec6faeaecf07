"""The tokenizer in a graph gives the tokens of the one in Python, on every text, and says what it cannot hold."""

import json
import random
import unicodedata
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latentdiff.catalogue import resolve_preset
from latentdiff.checkpoints.clip_vocabulary import clip_tokenizer
from latentdiff.checkpoints.tokenizer_files import read_tokenizer
from latentdiff.models.tokenizer import AddedToken, CLIPTokenizer, TruncationWarning

if keras.backend.backend() != "tensorflow":
    pytest.skip("a graph is TensorFlow's", allow_module_level=True)

import tensorflow as tf

from latentdiff.export.tokenizer import GraphTokenizer
from latentdiff.export.tokenizer_unicode import unicode_tables

FIXTURES = Path(__file__).parent / "fixtures" / "tokenizer"
START, END = "<|startoftext|>", "<|endoftext|>"
LIMIT = 8192
pytestmark = pytest.mark.filterwarnings("ignore::latentdiff.models.tokenizer.TruncationWarning")

ASSIGNED = [c for c in range(0x110000) if unicodedata.category(chr(c)) not in ("Cn", "Cs")]
TEXT = [c for c in ASSIGNED if unicodedata.category(chr(c)) != "Co"]
# one ideograph or syllable is split as another is
VARIED = [
    chr(c) for c in TEXT if not unicodedata.name(chr(c), "").startswith(("CJK UNIFIED", "HANGUL SYLL", "TANGUT I"))
]


class Pair:
    """A tokenizer and its graph, traced once."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.module = GraphTokenizer(tokenizer, LIMIT)
        self.graph = tf.function(self.module, input_signature=[tf.TensorSpec([None], tf.string)])

    def differences(self, prompts):
        """What the graph tokenizes in another way: (prompt, tokens, expected tokens)."""
        prompts = list(prompts)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TruncationWarning)
            expected = self.tokenizer(prompts)
        tokens = self.graph(tf.constant([prompt.encode() for prompt in prompts], tf.string)).numpy()
        assert tokens.shape == expected.shape and tokens.dtype == expected.dtype
        differ = (tokens != expected).any(axis=1)
        return [(prompts[i], tokens[i].tolist(), expected[i].tolist()) for i in np.flatnonzero(differ)[:3]]


def clip(context_length=77, pad_token=END):
    """CLIP's own vocabulary."""
    arguments = clip_tokenizer(pad_token) | {"context_length": context_length}
    # as Stable Diffusion's directories have them: the pad token as it is typed, the others in any case
    flags = {START: AddedToken(normalized=True), END: AddedToken(normalized=pad_token != END)}
    return CLIPTokenizer(**arguments | {"added_tokens": flags})


def small(style, context_length=77):
    pad_token = "!" if style == "sd2" else END
    flags = {START: AddedToken(normalized=True), END: AddedToken(normalized=pad_token != END)}
    arguments = read_tokenizer(FIXTURES) | {"pad_token": pad_token, "added_tokens": flags}
    return CLIPTokenizer(**arguments | {"context_length": context_length})


MAKERS = {
    "emoji": lambda: CLIPTokenizer.from_directory(resolve_preset("emoji")),
    "clip": clip,
    "sd2": lambda: clip(pad_token="!"),
    "long": lambda: clip(context_length=4096),
}


@pytest.fixture(scope="module")
def pairs():
    made = {}

    def get(name):
        if name not in made:
            made[name] = Pair(MAKERS[name]())
        return made[name]

    return get


def packed(texts, count=256):
    """Many texts in one prompt, with spaces between."""
    texts = list(texts)
    return [" ".join(texts[i : i + count]) for i in range(0, len(texts), count)]


HARD = [
    "",
    " ",
    "a red heart, noto style",
    "A   Red\t\nHEART  ",
    "it's I'm you're we've they'll he'd don't 's 't 're 've 'm 'll 'd",
    "IT'S I'M YOU'RE 'S'Sabc 'lla 'vex 'v 'l 'r 'e",
    "''s !'s 's's ''''ll '' ' 'ss 'tt a's's 1's 's1 's's's",
    "12345 1a2b ½ ² ⅷ ٣ 〇 1,000.50",
    "\x00",
    "a\x00b\x00\x00 c\x00",
    "\x1c\x1d\x1e\x1fa\x85b\xa0c\u1680\u180e\u2000\u200b\u2028\u2029\u202f\u205f\u3000\ufeffd",
    "\ufeffa",
    "Σ ΣΑΣ ΟΔΥΣΣΕΥΣ σς ΣΣ' ΑΣ.",
    "İstanbul I\u0307 ı i\u0307 İİ İ\u0323",
    "ﬁ ﬂ ﬀ ﬃ ﬅ ǅ ǆ Ǆ ß ẞ ſ 'ſ K Å Ω",
    "é e\u0301 \u1e69 s\u0323\u0307 s\u0307\u0323 \u01d7 U\u0308\u0301 U\u0301\u0308",
    "\u0301a \u0301 a\u0301\u0301\u0301 a\u0345\u0301\u0334 \u0334\u0345",
    "\u0344 \u0340 \u0341 \u0343 \u0374 \u037e \u0387 \u1f71 \u2126 \u212b \uf900 \ufb1d \u0958 \u2adc",
    "한글 \u1112\u1161\u11ab\u1100\u1173\u11af \u1100\u1161\u11a8\u11a8 \u1161\u11a8",
    "\uac00\u11a8 \uac01\u11a8 \u1100\u1100\u1161",
    "\u0dd9\u0dcf\u0dca \u0dd9\u0dca\u0dcf \u0cc6\u0cc2\u0cd5 \u0b47\u0b3e",
    "\u09c7\u09d7 \u1025\u102e \u0dd9\u0301\u0dcf",
    "\U00011935\U00011930 \U00011131\U00011127 \U0001d15e \U0001d1bc",
    "<\u0338 >\u0338 =\u0338 <|endoftext|>\u0338 <\u0338|endoftext|> <|endoftext|\u0338>",
    "👩‍👩‍👧‍👦 ❤️ 🏳️‍🌈 👋🏽 🇩🇪🇫🇷 #️⃣ 🏴\U000e0067\U000e007f",
    "日本語のテキスト 中文字符 ไทย हिन्दी العربية עברית ქართული ᲥᲐ",
    "\ufffd \uffff \ufdd0 \U0010ffff \ue000 \U0001ffff",
    "!!!???...---___ !a! _a_ a_b",
    "a" * 200,
    "ab " * 200,
    "!" * 100,
    "1" * 100,
    "wordswithoutanyspaceinbetweenthem" * 20,
    "'" * 50 + "s" * 50,
    "a" + "\u0301" * 300,
    "\u0301\u0323\u0334" * 100,
    "\u1161" * 100,
    "é" * 300,
    "🙂" * 300,
]
SPECIAL = [
    f"{before}{token}{behind}"
    for token in (START, END, START.upper(), "<|EndOfText|>", "!", "<|endoftext|", "|endoftext|>", "<|end oftext|>")
    for before, behind in [
        ("", ""),
        ("a", "b"),
        (" a ", " b "),
        ("!", "!"),
        ("!!<|", "|>!!"),
        ("'s", "'s"),
        ("'", "'"),
        ("1", "1"),
        ("\u0301", "\u0301"),
        ("a", "\u0338\u0338a"),
        (END, END),
        ("<|ENDOFTEXT|>", "!"),
        ("!<|ENDOFTEXT|>", "!a"),
        ("<|ENDOFTEXT|>" * 3, "<|STARTOFTEXT|>!!"),
        ("a<", ">>"),
    ]
]


@pytest.mark.parametrize("name", ["emoji", "clip", "sd2", "long"])
def test_hard_prompts_have_the_same_tokens(pairs, name):
    assert pairs(name).differences(HARD + SPECIAL) == []
    assert pairs(name).differences([*HARD[::-1], *SPECIAL[::-1]]) == []


def test_golden_tokens_of_transformers():
    golden = json.loads((FIXTURES / "golden.json").read_text())
    for style in ("sd1", "sd2"):
        tokenizer = small(style)
        entries = [entry for entry in golden if entry["style"] == style]
        tokens = GraphTokenizer(tokenizer, LIMIT)(tf.constant([entry["prompt"] for entry in entries])).numpy()
        for row, entry in zip(tokens, entries, strict=True):
            assert row[: len(entry["ids"])].tolist() == entry["ids"], entry["prompt"]
            assert (row[len(entry["ids"]) :] == tokenizer.pad_id).all()


# every code point


@pytest.mark.parametrize("form", ["{}", "a{}a"])
def test_every_code_point_has_the_same_tokens(pairs, form):
    assert pairs("long").differences(packed(form.format(chr(c)) for c in TEXT)) == []


def test_every_code_point_for_private_use_has_the_same_tokens(pairs):
    assert (
        pairs("long").differences(packed((chr(c) for c in ASSIGNED if unicodedata.category(chr(c)) == "Co"), 1024))
        == []
    )


def test_a_prompt_of_one_code_point_has_the_same_tokens(pairs):
    assert pairs("emoji").differences(VARIED) == []
    assert pairs("emoji").differences(f"1{c}' {c}" for c in VARIED) == []


@pytest.mark.parametrize("form", ["NFD", "NFKD", "NFC", "NFKC"])
def test_every_decomposition_has_the_same_tokens(pairs, form):
    others = [unicodedata.normalize(form, chr(c)) for c in ASSIGNED if not unicodedata.is_normalized(form, chr(c))]
    assert len(others) > 1000
    assert pairs("long").differences(packed(others, 128)) == []
    assert pairs("long").differences(packed((f"a{other}\u0301\u0323\u0334a" for other in others), 64)) == []


def test_any_two_marks_stand_in_the_same_order(pairs):
    """One of each combining class, and all that are not starters with each of two."""
    marks = [chr(c) for c in ASSIGNED if unicodedata.category(chr(c)).startswith("M")]
    classes = {unicodedata.combining(mark): mark for mark in marks}
    texts = [f"o{first}{second}" for first in classes.values() for second in classes.values()]
    texts += [f"o{mark}\u0323 o\u0323{mark} o{mark}\u0345 o\u0345{mark} o\u0334{mark}" for mark in marks]
    assert pairs("long").differences(packed(texts, 64)) == []


def test_tables_know_what_is_in_no_doubt():
    tables = unicode_tables()
    assert [int(tables.kind[ord(c)]) for c in " a1!\x85_é"] == [0, 1, 2, 3, 0, 3, 1]
    assert tables.lower[0x130].tolist() == [0x69, 0x307]
    assert tables.lower[ord("Σ")].tolist() == [ord("σ"), -1]
    assert tables.decomposed[0x1E69] == (0x73, 0x323, 0x307)
    assert tables.composed[0x1E63, 0x307] == 0x1E69
    assert tables.composed[0xAC00, 0x11A8] == 0xAC01
    assert tables.combining[0x334] == 1 and tables.combining.max() == tables.combining[0x345] > 50
    assert tables.combining[0x300] == tables.combining[0x301] > tables.combining[0x323] > 0
    assert tables.unstable[0x212B] and not tables.unstable[0xC5]


# random text

ALPHABETS = {
    "any": [chr(c) for c in TEXT],
    "varied": VARIED,
    "letters": [c for c in VARIED if unicodedata.category(c).startswith("L")],
    "marks": [c for c in VARIED if unicodedata.combining(c)] + list("aoeAOE\u1100\u1161\u11a8") * 50,
    "composing": [c for c in VARIED if unicodedata.normalize("NFD", c) != c or unicodedata.combining(c)],
    "emoji": [c for c in VARIED if unicodedata.category(c) in ("So", "Sk")] + list("\u200d\ufe0f\u20e3") * 200,
    "spaces": [c for c in VARIED if unicodedata.category(c)[0] in "ZC"] + list("a1!'") * 10,
    "ascii": [chr(c) for c in range(128)],
    "english": "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ    '''.,!?0123456789",
    "contractions": list("''''srvedtmlSRaéİ 1!") + ["'s", "'ll", "'re"],
    "special": (
        [START, END, START.upper(), END.upper(), "<|EndOfText|>", "<|", "|>", "endoftext", "startoftext", "<", "|", ">"]
        + list("! a's1\u0338\u0301İ\n")
    ),
}


def drawn(alphabet, rng, count, longest=60):
    return ["".join(rng.choices(ALPHABETS[alphabet], k=rng.randrange(longest))) for _ in range(count)]


@pytest.mark.parametrize("name", ["emoji", "clip", "sd2"])
@pytest.mark.parametrize("alphabet", list(ALPHABETS))
def test_random_prompts_have_the_same_tokens(pairs, name, alphabet):
    rng = random.Random(f"{name} {alphabet}")
    assert pairs(name).differences(drawn(alphabet, rng, 300)) == []


@pytest.mark.parametrize("name", ["emoji", "clip"])
def test_random_words_of_the_vocabulary_have_the_same_tokens(pairs, name):
    rng = random.Random(name)
    pair = pairs(name)
    words = [word.removesuffix("</w>") for word in pair.tokenizer.vocabulary if word.isascii()]
    prompts = [rng.choice(["", " "]).join(rng.choices(words, k=rng.randrange(20))) for _ in range(500)]
    assert pair.differences(prompts) == []
    assert pair.differences([prompt.upper() for prompt in prompts]) == []


def texts(alphabet):
    return st.lists(st.sampled_from(alphabet), max_size=30).map("".join)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.one_of(list(map(texts, ALPHABETS.values()))), min_size=1, max_size=8))
def test_any_batch_has_the_same_tokens(pairs, prompts):
    for name in ("emoji", "sd2"):
        assert pairs(name).differences(prompts) == []


def test_tokens_do_not_depend_on_the_batch(pairs):
    pair, rng = pairs("clip"), random.Random(0)
    prompts = [*HARD, *SPECIAL, *(prompt for alphabet in ALPHABETS for prompt in drawn(alphabet, rng, 5))]
    together = pair.graph(prompts).numpy()
    rng.shuffle(order := list(range(len(prompts))))
    np.testing.assert_array_equal(pair.graph([prompts[i] for i in order]).numpy(), together[order])
    for i in order[:40]:
        np.testing.assert_array_equal(pair.graph([prompts[i]]).numpy()[0], together[i])
    assert pair.graph(tf.constant([], tf.string)).shape == (0, 77)
    assert pair.graph.experimental_get_tracing_count() == 1


# bytes that are no text


def test_bytes_that_are_not_utf8_become_replacement_characters(pairs):
    rng = random.Random(1)
    pair = pairs("emoji")
    hard = [
        b"\xff",
        b"\xc0\x80",
        b"\xed\xa0\x80",
        b"\xf4\x90\x80\x80",
        b"\xf0\x9f\x98",
        b"\xe2\x82",
        b"a\xe2b",
        b"\x80" * 5,
    ]
    hard += [b"\xf0\x9f\x98 \x80", b"\xef\xbb\xbf", b"\xc3", b"\xc3\xc3\xa9", b"\xf8\x88\x80\x80\x80", b"\xe0\x9f\xbf"]
    leads = b"\x00a \x7f\x80\x8f\x90\x9f\xa0\xbf\xc0\xc1\xc2\xdf\xe0\xe1\xec\xed\xee\xef\xf0\xf1\xf3\xf4\xf5\xff"
    hard += [bytes(rng.choices(leads, k=rng.randrange(12))) for _ in range(3000)]
    hard += [rng.randbytes(rng.randrange(12)) for _ in range(1000)]
    tokens = pair.graph(tf.constant(hard)).numpy()
    np.testing.assert_array_equal(tokens, pair.tokenizer([each.decode(errors="replace") for each in hard]))


# other vocabularies


def test_random_merges_in_any_order_have_the_same_tokens():
    """Also merges that come twice, that make what another made, or that use what a later one makes."""
    rng = random.Random(2)
    for _ in range(6):
        vocabulary = {token: i for i, token in enumerate(["a", "b", "c", "a</w>", "b</w>", "c</w>", START, END])}
        merges = []
        while len(merges) < 25:
            left, right = (
                rng.choice([t for t in vocabulary if len(t) < 6 and "<" not in t]),
                rng.choice(list(vocabulary)),
            )
            if "|" not in right and len(right) < 9:
                vocabulary.setdefault(left + right, len(vocabulary))
                merges.append((left, right))
        rng.shuffle(merges)
        tokenizer = CLIPTokenizer(vocabulary, merges + rng.choices(merges, k=5), context_length=40)
        prompts = [" ".join("".join(rng.choices("abc", k=rng.randrange(12))) for _ in range(4)) for _ in range(200)]
        tokens = GraphTokenizer(tokenizer, 100)(tf.constant(prompts))
        np.testing.assert_array_equal(tokens, tokenizer(prompts))


def test_bytes_that_the_vocabulary_lacks_become_the_unknown_token():
    tokenizer = CLIPTokenizer({"a</w>": 0, "<unk>": 1, START: 2, END: 3}, [], context_length=6, unknown_token="<unk>")
    assert GraphTokenizer(tokenizer, 100)(tf.constant(["a b a"])).numpy().tolist() == [[2, 0, 1, 0, 3, 3]]


def test_a_context_of_two_holds_start_and_end_alone():
    tokenizer = CLIPTokenizer({"a</w>": 0, START: 1, END: 2}, [], context_length=2)
    assert GraphTokenizer(tokenizer, 100)(tf.constant(["", "a", "a a a"])).numpy().tolist() == [[1, 2]] * 3


def test_added_tokens_have_the_same_tokens():
    """Of textual inversions: one begins as another does, in any case, composed or not, with white space or without."""
    added = {
        "<cat-toy>": AddedToken(normalized=True, special=False),
        "<cat-toy>_1": AddedToken(normalized=True, special=False),
        "<Ünit>": AddedToken(normalized=True, lstrip=True, rstrip=True),
        "[PAD]": AddedToken(),
        "[PADDED]": AddedToken(lstrip=True, rstrip=True),
    }
    arguments = {"context_length": 77, "pad_token": "[PAD]", "added_tokens": added}
    tokenizer = CLIPTokenizer(small("sd1").vocabulary, small("sd1").merges, **arguments)
    pieces = ["<cat-toy>", "<cat-toy>_1", "_1", "<CAT-toy>", "<U\u0308nit>", "<üNIT>", "[PAD]", "[pad]", "[PADDED]"]
    pieces += ["[", "]", "<", ">", " ", "a", "\u0301", "\u0338", "!", "cat-toy>", "İ", "\u0323", "'s", END]
    rng = random.Random(3)
    prompts = ["".join(rng.choices(pieces, k=rng.randrange(12))) for _ in range(2000)]
    tokens = tf.function(GraphTokenizer(tokenizer, 1000))(tf.constant(prompts)).numpy()
    np.testing.assert_array_equal(tokens, tokenizer(prompts))
    assert {tokenizer(token)[0, 1] for token in added} == set(range(1514, 1519))


# what is refused


@pytest.mark.parametrize(
    ("added", "rule"),
    [
        ({"<one>": AddedToken(single_word=True)}, "must not have `single_word` to be exported. Received: '<one>'"),
        ({"two words": AddedToken()}, "must not hold white space to be exported. Received: 'two words'"),
        (
            {"abc": AddedToken(), "cd": AddedToken()},
            "nor end as another begins, to be exported. Received: 'cd' and 'abc'",
        ),
        ({"bcd": AddedToken(), "abcde": AddedToken()}, "must not hold another.* Received: 'abcde' and 'bcd'"),
        ({"aba": AddedToken()}, "must not end as it begins.* Received: 'aba'"),
        ({"A1": AddedToken(normalized=True), "a1": AddedToken(normalized=True)}, "nor be spelled as another.*'a1'"),
        ({f"<{i}>": AddedToken() for i in range(64)}, "at most 64 added tokens.* Received: 66"),
    ],
)
def test_added_tokens_that_cannot_be_held_are_refused(added, rule):
    tokenizer = CLIPTokenizer({"a</w>": 0, START: 1, END: 2}, [], added_tokens=added)
    with pytest.raises(ValueError, match=rule):
        GraphTokenizer(tokenizer, 100)


@pytest.mark.parametrize("limit", [0, -1, 2.0, True, None, 2**24])
def test_a_limit_that_is_none_is_refused(limit):
    with pytest.raises(
        ValueError, match="`max_prompt_bytes` must be a whole number from 1 to 16777215. Received: max_"
    ):
        GraphTokenizer(small("sd1"), limit)


def test_a_prompt_that_is_too_long_is_refused(pairs):
    graph = pairs("emoji").graph
    graph(["a " * (LIMIT // 2)])
    graph(["é " * (LIMIT // 3)] * 2)
    for too_long in ("a" * (LIMIT + 1), "é" * (LIMIT // 2) + "\0", " " * 10**6):
        with pytest.raises(tf.errors.InvalidArgumentError, match=f"a prompt must have at most {LIMIT} bytes"):
            graph(["fine", too_long, ""])


def test_other_ranks_are_refused(pairs):
    graph = tf.function(pairs("emoji").module, input_signature=[tf.TensorSpec(None, tf.string)])
    assert graph(tf.constant(["a"])).shape == (1, 32)
    for wrong in (tf.constant("a"), tf.constant([["a"]]), tf.constant([[]], tf.string)):
        with pytest.raises(tf.errors.InvalidArgumentError, match="prompts must have the shape"):
            graph(wrong)


# what it is made of


def operations(function):
    graph = function.get_concrete_function().graph.as_graph_def()
    return {node.op for node in graph.node} | {node.op for each in graph.library.function for node in each.node_def}


def test_the_graph_holds_no_python_no_regular_expressions_and_no_tables_of_text(pairs):
    names = operations(pairs("clip").graph)
    assert {"UnicodeDecode", "While", "If", "Assert"} <= {name.removeprefix("Stateless") for name in names}
    assert not {
        name for name in names if "PyFunc" in name or "Regex" in name or "Table" in name or "Lower" == name[-5:]
    }


def test_what_it_knows_is_stored_once_in_raw_variables(pairs):
    module = pairs("clip").module
    assert all(isinstance(variable, tf.Variable) and not variable.trainable for variable in module.variables)
    assert sum(variable.numpy().nbytes for variable in module.variables) < 2.5e6
    graph = pairs("clip").graph.get_concrete_function().graph.as_graph_def()
    nodes = [*graph.node, *(node for each in graph.library.function for node in each.node_def)]
    assert max(node.ByteSize() for node in nodes if node.op == "Const") < 2000
