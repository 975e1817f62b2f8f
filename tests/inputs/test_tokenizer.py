"""The tokenizer against the `tokenizers` package's recorded answers, its own definition, and bad files."""
import json
import random
from itertools import pairwise

import pytest
from golden.make_tokenizer_golden import (
    SHIPPED,
    added,
    awkward,
    random_spec,
    random_text,
    read_packed,
)
from hypothesis import given
from hypothesis import strategies as st

from minipali.errors import InputError
from minipali.inputs.bpe import merge_pairs
from minipali.inputs.special_tokens import BYTE_NAMES
from minipali.inputs.tokenizer import Tokenizer
from minipali.small_world import vocabulary
from minipali.small_world.vocabulary import ROWS

GOLDEN = read_packed("tokenizer")
CONTROLS = ["<pad>", "<eos>", "<bos>", "<unk>", "<image>"]
SPEC = json.loads(SHIPPED.read_text(encoding="utf-8"))
SHIPPED_TOKENIZER = Tokenizer(SPEC)
BYTE_IDS = [SHIPPED_TOKENIZER.id_of(name) for name in BYTE_NAMES]


def tokenizer_of(name):
    spec = GOLDEN["specs"][name]
    return SHIPPED_TOKENIZER if spec is None else Tokenizer(spec)


def write(folder, content):
    path = folder / "tokenizer.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def changed(where, value):
    """A small valid tokenizer.json with one thing set; `where` is a dotted path."""
    spec = json.loads(json.dumps(awkward("bytes")))
    *path, last = where.split(".")
    node = spec
    for key in path:
        node = node[key]
    node[last] = value
    return spec


@pytest.mark.parametrize("name", GOLDEN["cases"])
def test_ids_are_those_of_the_tokenizers_package(name):
    tokenizer = tokenizer_of(name)
    for text, ids in GOLDEN["cases"][name]["encoded"]:
        assert (text, tokenizer.encode(text, control=True)) == (text, ids)


@pytest.mark.parametrize("name", GOLDEN["cases"])
def test_texts_are_those_of_the_tokenizers_package(name):
    tokenizer = tokenizer_of(name)
    for ids, without_special, with_special in GOLDEN["cases"][name]["decoded"]:
        assert (ids, tokenizer.decode(ids)) == (ids, without_special)
        assert (ids, tokenizer.decode(ids, skip_special=False)) == (ids, with_special)


@given(st.integers(0, 2**32))
def test_any_file_reads_as_the_tokenizers_package_reads_it(seed):
    """Random files and texts against the package itself, where it is installed."""
    tokenizers = pytest.importorskip("tokenizers", reason="compares with the tokenizers package")
    rng = random.Random(seed)
    spec, letters, contents = random_spec(rng)
    theirs, ours = tokenizers.Tokenizer.from_str(json.dumps(spec)), Tokenizer(spec)
    for _ in range(20):
        text = random_text(rng, letters, contents)
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert (text, ours.encode(text, control=True)) == (text, ids)
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="▁")))
def test_text_survives_the_round_trip(text):
    """Any Unicode text comes back unchanged ("▁" alone cannot: it is how a blank is written)."""
    assert SHIPPED_TOKENIZER.decode(SHIPPED_TOKENIZER.encode(text)) == text


def test_decoding_strips_nothing():
    """The letters of "<s>" are letters."""
    for text in ("she is", "<s>as is</s>", "  two blanks  ", "\nlines\n\n", "<0x41>"):
        assert SHIPPED_TOKENIZER.decode(SHIPPED_TOKENIZER.encode(text)) == text


def test_a_blank_in_front_makes_another_token_and_none_is_added():
    tokens = [[SHIPPED_TOKENIZER.token_of(id) for id in SHIPPED_TOKENIZER.encode(text)] for text in ("red", " red")]
    assert tokens == [["red"], ["▁red"]]


@given(st.lists(st.sampled_from([*CONTROLS, "<start_of_turn>", "<bo", "s>", "<", " ", "\n", "circle", "<<bos>"])))
def test_control_tokens_are_plain_text_in_a_prompt(pieces):
    text = "".join(pieces)
    ids = SHIPPED_TOKENIZER.encode(text)
    assert not {SHIPPED_TOKENIZER.id_of(name) for name in CONTROLS} & set(ids)
    assert SHIPPED_TOKENIZER.decode(ids) == text


@pytest.mark.parametrize("where", ["merges", "ignore_merges", "one character"])
def test_no_way_leads_from_plain_text_to_a_control_token(where):
    spec = changed("model.ignore_merges", where == "ignore_merges")
    name = "x" if where == "one character" else "<x"
    spec["model"]["vocab"]["<x"] = len(spec["model"]["vocab"]) + len(spec["added_tokens"])
    spec["model"]["merges"].insert(0, "< x")
    spec["added_tokens"] = [added(spec["model"]["vocab"][name], name, "special")]
    spec["model"]["vocab"] = {token: i for i, token in enumerate(spec["model"]["vocab"])}
    spec["added_tokens"][0]["id"] = spec["model"]["vocab"][name]
    tokenizer = Tokenizer(spec)
    assert tokenizer.encode(name, control=True) == [tokenizer.id_of(name)]
    assert tokenizer.id_of(name) not in tokenizer.encode(name)


@pytest.mark.parametrize("listed", ["special", "plain", "not at all"])
def test_location_tokens_are_tokens_however_a_file_lists_them(listed):
    spec = json.loads(json.dumps(SPEC))
    for token in spec["added_tokens"]:
        if token["content"].startswith(("<loc", "<seg")):
            token["special"] = listed == "special"
    if listed == "not at all":
        spec["added_tokens"] = [t for t in spec["added_tokens"] if not t["content"].startswith(("<loc", "<seg"))]
    tokenizer = Tokenizer(spec)
    ids = [tokenizer.id_of(token) for token in ("<loc0000>", "<loc1023>", "<seg127>", "▁star")]
    assert tokenizer.encode("<loc0000><loc1023><seg127> star") == ids
    assert tokenizer.decode(ids) == "<loc0000><loc1023><seg127> star"


def naive_merge(pieces, ranks):
    """The definition: find the best pair, merge it, look again."""
    pieces = list(pieces)
    while candidates := [(ranks[pair], i) for i, pair in enumerate(pairwise(pieces)) if pair in ranks]:
        _, i = min(candidates)
        pieces[i:i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces


@given(st.integers(0, 2**32))
def test_merging_is_what_its_definition_says(seed):
    rng = random.Random(seed)
    parts, ranks = list("abc"), {}
    for rank in range(rng.randrange(40)):
        pair = rng.choice(parts[:20]), rng.choice(parts[:20])
        ranks[pair] = rank
        parts.append("".join(pair))
    text = "".join(rng.choice("aabc") for _ in range(rng.randrange(60)))
    assert merge_pairs(list(text), ranks) == naive_merge(text, ranks)


class Counting(dict):
    """A dict that counts how often it is asked."""

    asked = 0

    def get(self, key):
        self.asked += 1
        return super().get(key)


@pytest.mark.parametrize("text", ["a" * 8192, "ab" * 4096, "aab" * 2730])
def test_merging_a_long_text_takes_a_linear_number_of_steps(text):
    ranks = Counting({("a" * 2**k, "a" * 2**k): k for k in range(13)} | {("a", "b"): 13, ("ab", "ab"): 14})
    assert "".join(merge_pairs(list(text), ranks)) == text
    assert ranks.asked <= 6 * len(text)


@given(st.lists(st.sampled_from([*BYTE_IDS, *BYTE_IDS[0xE2:0xF4], 2, 300, 2047, 5000])), st.booleans())
def test_a_stream_gives_the_decoded_text_whole_characters_at_a_time(ids, skip_special):
    stream = SHIPPED_TOKENIZER.decode_stream(skip_special)
    parts = [stream.push(id) for id in ids]
    assert "".join(parts) + stream.finish() == SHIPPED_TOKENIZER.decode(ids, skip_special)
    for id, part in zip(ids, parts, strict=True):
        assert id not in BYTE_IDS or part == ""


def awkward_tokens(text):
    tokenizer = Tokenizer(awkward("bytes"))
    return [tokenizer.token_of(id) for id in tokenizer.encode(text)]


@pytest.mark.parametrize("text, expected", [
    ("a  <t>  b", ["a", "<t>", "b"]),         # <t> swallows the white space on both sides
    ("a\t \u2003<t>\u3000b", ["a", "<t>", "b"]),  # any of Unicode's
    ("<t>  <t>", ["<t>", "<t>"]),
    ("a  <u <", ["a", " <u", "▁", "<"]),       # " <u" swallows it on its left only
    ("a \t <ub", ["a", " <u", "b"]),
    ("a<u", ["a", "<", "<0x75>"]),             # without its blank it is not there
    ("a <w> b", ["a", "▁", "<w>", "▁", "b"]),
    ("a<w>b", ["a", "<", "<0x77>", "<0x3E>", "b"]),  # <w> is a word by itself
    ("<w>_", ["<", "<0x77>", "<0x3E>", "<0x5F>"]),
    ("<w>.", ["<w>", "<0x2E>"]),
])
def test_added_tokens_take_the_white_space_that_they_claim(text, expected):
    """lstrip, rstrip and single_word, each by an added token that has it."""
    assert awkward_tokens(text) == expected


@pytest.mark.parametrize("text, expected", [
    ("<r> a", ["<r>", "a"]), ("<r>\u2003 a", ["<r>", "a"]), ("<r> \u2003<l>", ["<r>", "<l>"]),
    ("a  a", ["a", " ", " ", "a"]), (" \u2003 a", [" ", "\u2003", " ", "a"]), ("a <l>", ["a", " ", "<l>"])])
def test_white_space_that_one_token_has_swallowed_is_not_another(text, expected):
    """A token that is white space and swallows more on its left. (The package panics where two want the same.)"""
    spec = awkward("bytes")
    first = len(spec["model"]["vocab"])
    tokens = [("<r>", "rstrip"), (" ", "lstrip"), ("<l>", "lstrip"), ("\u2003", "lstrip")]
    tokenizer = Tokenizer(spec | {"added_tokens": [added(first + i, *token) for i, token in enumerate(tokens)]})
    assert [tokenizer.token_of(id) for id in tokenizer.encode(text)] == expected


def test_bytes_become_characters_when_all_are_there():
    ids = [SHIPPED_TOKENIZER.id_of(token) for token in ("<0xF0>", "<0x9F>", "<0x99>", "<0x82>", "▁red")]
    stream = SHIPPED_TOKENIZER.decode_stream()
    assert [stream.push(id) for id in ids] == ["", "", "", "", "🙂 red"]


@pytest.mark.parametrize("run", [b"\xff", b"\xe2\x82", b"\xc0\x80", b"\xed\xa0\x80", b"A\xff", b"\xf4\x90\x80\x80"])
def test_a_run_of_bytes_that_is_not_utf8_becomes_replacement_characters(run):
    assert SHIPPED_TOKENIZER.decode([BYTE_IDS[byte] for byte in run]) == "\ufffd" * len(run)


def test_ids_without_a_token_have_no_text():
    """Checkpoints pad their embedding table beyond the vocabulary."""
    ids = SHIPPED_TOKENIZER.encode("red")
    assert SHIPPED_TOKENIZER.decode([*ids, ROWS, 10**9, *ids]) == "redred"


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", "\ud83d\ude42"])
def test_half_a_surrogate_pair_is_refused(text):
    with pytest.raises(InputError, match=r"^text: U\+D[89A-F][0-9A-F]{2} at character [01] is half a surrogate pair"):
        SHIPPED_TOKENIZER.encode(text)


def test_both_ways_to_write_merges_mean_the_same():
    spec = awkward("bytes")
    pairs = spec | {"model": spec["model"] | {"merges": [merge.split(" ") for merge in spec["model"]["merges"]]}}
    text = "abc xyxy  aaaaab cab"
    assert Tokenizer(pairs).encode(text) == Tokenizer(spec).encode(text)


def test_a_missing_control_token_is_none():
    tokenizer = Tokenizer(awkward("bytes") | {"added_tokens": []})
    assert (tokenizer.image_id, tokenizer.id_of("<nope>"), tokenizer.token_of(10**6)) == (None, None, None)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id) == (0, 1, 2)


BROKEN = {
    "empty": "",
    "cut off": '{"model": {"type": "BPE", "vocab": {"a": 0,',
    "deep": "[" * 100_000,
    "a list": [],
    "no model": {},
    "another model": changed("model.type", "WordPiece"),
    "no vocab": changed("model.vocab", None),
    "text as an id": changed("model.vocab", {"<unk>": 0, "a": "1"}),
    "true as an id": changed("model.vocab", {"<unk>": 0, "a": True}),
    "negative id": changed("model.vocab", {"<unk>": 0, "a": -1}),
    "an id twice": changed("model.vocab", {"<unk>": 0, "a": 1, "b": 1}),
    "half a surrogate": changed("model.vocab.\ud800", 9999),
    "no unknown token": changed("model.unk_token", "<nope>"),
    "a list as unknown token": changed("model.unk_token", ["<unk>"]),
    "half a surrogate for a blank": changed("normalizer.content", "\ud800"),
    "no merges": changed("model.merges", None),
    "merges of three": changed("model.merges", ["a b c"]),
    "merges of one": changed("model.merges", [["ab"]]),
    "merges of numbers": changed("model.merges", [[1, 2]]),
    "merges of both kinds": changed("model.merges", ["a b", ["a", "b"]]),
    "merge to no token": changed("model.merges", ["x x"]),
    "dropout": changed("model.dropout", 0.1),
    "prefix": changed("model.continuing_subword_prefix", "##"),
    "added tokens as text": changed("added_tokens", "<image>"),
    "added token without fields": changed("added_tokens", [{"id": 0, "content": "<pad>"}]),
    "added token with another id": changed("added_tokens", [added(7, "<pad>")]),
    "added token after a gap": changed("added_tokens", [added(9999, "<image>")]),
    "decomposing": changed("normalizer", {"type": "NFD"}),
    "replacing a pattern": changed("normalizer", {"type": "Replace", "pattern": {"Regex": r"\w"}, "content": "▁"}),
    "decoding by a pattern": changed("decoder", {"type": "Replace", "pattern": {"Regex": "▁"}, "content": " "}),
    "byte-level words": changed("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": False}),
    "removing blanks": changed("pre_tokenizer", {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed"}),
    "no decoder": changed("decoder", None),
    "another decoder": changed("decoder", {"type": "WordPiece", "prefix": "##"}),
}


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused_in_one_line_that_names_it(tmp_path, content):
    path = write(tmp_path, content)
    with pytest.raises(InputError) as refusal:
        Tokenizer.from_file(path)
    assert str(refusal.value).startswith(f"{path}: ") and "\n" not in str(refusal.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        Tokenizer.from_file(tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match="cannot be read"):
        Tokenizer.from_file(tmp_path)


def test_the_file_that_the_broken_ones_were_made_from_is_sound(tmp_path):
    assert Tokenizer.from_file(write(tmp_path, changed("version", "1.0"))).encode("abc")


def test_the_shipped_vocabulary_is_what_its_trainer_writes(tmp_path, capsys):
    vocabulary.main([str(tmp_path)])
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (SHIPPED.parent / name).read_bytes()
    assert "caption" in capsys.readouterr().out


def test_the_shipped_vocabulary_is_laid_out_like_paligemmas():
    tokens = [SHIPPED_TOKENIZER.token_of(i) for i in range(ROWS)]
    assert SHIPPED_TOKENIZER.vocab_size == ROWS == len(set(tokens))
    assert tokens[:5] == ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    assert tokens[-1153:-129] == [f"<loc{i:04}>" for i in range(1024)]
    assert tokens[-129:] == [f"<seg{i:03}>" for i in range(128)] + ["<image>"]
    ids = (SHIPPED_TOKENIZER.pad_id, SHIPPED_TOKENIZER.eos_id, SHIPPED_TOKENIZER.bos_id, SHIPPED_TOKENIZER.image_id)
    assert ids == (0, 1, 2, ROWS - 1)


def test_letters_to_be_read_are_single_tokens():
    """Reading letters off a picture is learned letter by letter: no merge holds a capital or a digit."""
    text = "".join(map(chr, range(33, 127)))
    for character in text:
        assert SHIPPED_TOKENIZER.token_of(SHIPPED_TOKENIZER.encode(character)[0]) == character
    assert len(SHIPPED_TOKENIZER.encode("ABC123THE")) == 9
    merged = {"".join(pair) for pair in SHIPPED_TOKENIZER.model.ranks}
    assert not [text for text in merged if any(c.isupper() or c.isdigit() for c in text)]


@pytest.mark.parametrize("text", vocabulary.EXAMPLES[:6])
def test_a_word_of_the_tasks_is_one_token(text):
    words = text.replace(",", " ,").replace("?", " ?").split()
    assert len(SHIPPED_TOKENIZER.encode(text)) == len(words) + text.count("\n")
