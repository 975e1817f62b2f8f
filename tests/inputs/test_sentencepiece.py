"""Reading `tokenizer.model`: the `sentencepiece` package's recorded answers, other implementations, bad files."""
import base64
import json
import random
from itertools import pairwise
from pathlib import Path

import pytest
from golden.make_sentencepiece_golden import (
    BYTE,
    BYTES,
    CONTROL,
    CONTROLS,
    NORMAL,
    NORMALIZER,
    TRAINER,
    TYPED_CONTROLS,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    message,
    model,
    random_model,
    random_text,
    varint,
)
from golden.make_tokenizer_golden import read_packed
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st

from minipali.errors import InputError
from minipali.inputs.read_tokenizer import read_tokenizer
from minipali.inputs.sentencepiece import SentencePieceTokenizer
from minipali.inputs.tokenizer import Tokenizer

GOLDEN = read_packed("sentencepiece")
MODELS = {name: base64.b64decode(case["model"]) for name, case in GOLDEN["cases"].items()}
LETTERS = [*CONTROLS, *[(name, 0.0, BYTE) for name in BYTES], *[(letter, -9.0, NORMAL) for letter in "abc▁"]]
NOWHERE = Path("no folder") / "added_tokens.json"


def tokenizer_of(data):
    return SentencePieceTokenizer(data, NOWHERE)


def tokens(tokenizer, text):
    return [tokenizer.token_of(id) for id in tokenizer.encode(text)]


def write(folder, data, added=None):
    (folder / "tokenizer.model").write_bytes(data)
    if added is not None:
        (folder / "added_tokens.json").write_text(added if isinstance(added, str) else json.dumps(added))
    return folder / "tokenizer.model"


@pytest.mark.parametrize("name", MODELS)
def test_ids_are_those_of_the_sentencepiece_package(name):
    tokenizer = tokenizer_of(MODELS[name])
    for text, ids in GOLDEN["cases"][name]["encoded"]:
        assert (text, tokenizer.encode(text)) == (text, ids)


@pytest.mark.parametrize("name", ["gemma", "across blanks", "by hand"])
def test_text_survives_the_round_trip(name):
    tokenizer = tokenizer_of(MODELS[name])
    for text, _ in GOLDEN["cases"][name]["encoded"]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text.replace("▁", " ")
        stream = tokenizer.decode_stream()
        assert "".join([stream.push(id) for id in ids]) + stream.finish() == tokenizer.decode(ids)


@given(st.integers(0, 2**32))
def test_any_model_reads_as_the_sentencepiece_package_reads_it(seed):
    """Random models and texts against the package itself, where it is installed."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="compares with the sentencepiece package")
    rng = random.Random(seed)
    data, letters, symbols = random_model(rng)
    theirs, ours = sentencepiece.SentencePieceProcessor(model_proto=data), tokenizer_of(data)
    for _ in range(20):
        text = random_text(rng, letters, symbols)
        assert (text, ours.encode(text)) == (text, theirs.encode(text))


def naive_encode(text, scores, symbols):
    """The definition: cut out the longest symbols; then join the best pair, leftmost among equals, and look again."""
    pieces, i = [], 0
    while i < len(text):
        symbol = max((s for s in symbols if text.startswith(s, i)), key=len, default=None)
        pieces.append((symbol or text[i], symbol is not None))
        i += len(pieces[-1][0])
    while True:
        pairs = [(-scores[a + b], i) for i, ((a, frozen), (b, frozen_too)) in enumerate(pairwise(pieces))
                 if not (frozen or frozen_too) and a + b in scores]  # fmt: skip
        if not pairs:
            return [piece for piece, _ in pieces]
        _, i = min(pairs)
        pieces[i:i + 2] = [(pieces[i][0] + pieces[i + 1][0], False)]


@given(st.integers(0, 2**32))
def test_encoding_is_what_its_definition_says(seed):
    rng = random.Random(seed)
    parts = list("abc▁")
    for _ in range(rng.randrange(60)):
        parts.append(rng.choice(parts) + rng.choice(parts))
    scores = {part: float(-rng.randrange(5)) for part in parts if 1 < len(part) < 30}
    symbols = [symbol for symbol in ("aa", "▁▁", "▁▁▁", "bca", "c▁") if rng.random() < 0.4]
    pieces = [(part, score, NORMAL) for part, score in scores.items() if part not in symbols]
    tokenizer = tokenizer_of(model([*LETTERS, *[(symbol, 0.0, USER_DEFINED) for symbol in symbols], *pieces]))
    for _ in range(10):
        text = "".join(rng.choice("aabc  ") for _ in range(rng.randrange(40)))
        assert tokens(tokenizer, text) == naive_encode(text.replace(" ", "▁"), scores, symbols)


def test_of_equal_scores_the_leftmost_joins_first():
    """And not the way of writing one piece that a list of merges happens to name first."""
    tokenizer = tokenizer_of(model([*LETTERS, ("ca", 3.0, NORMAL), ("bca", 1.0, NORMAL), ("cab", 1.0, NORMAL)]))
    assert tokens(tokenizer, "bcab") == ["bca", "b"]


def test_a_long_run_of_blanks_is_cut_into_the_longest_symbols():
    symbols = [("▁" * i, 0.0, USER_DEFINED) for i in range(2, 32)]
    tokenizer = tokenizer_of(model([*LETTERS, *symbols, ("▁a", -1.0, NORMAL)]))
    assert tokens(tokenizer, " " * 64 + "a") == ["▁" * 31, "▁" * 31, "▁" * 2, "a"]
    assert tokens(tokenizer, " " * 63 + "a") == ["▁" * 31, "▁" * 31, "▁a"]


def test_a_piece_may_join_characters_that_are_no_pieces():
    tokenizer = tokenizer_of(model([*LETTERS, ("\t\t", -1.0, NORMAL)]))
    assert tokens(tokenizer, "\t\t\t") == ["\t\t", "<0x09>"]


@pytest.mark.parametrize("kind", [CONTROL, UNKNOWN, BYTE])
def test_no_text_becomes_a_piece_that_is_not_for_text(kind):
    name = {CONTROL: "<eos>", UNKNOWN: "<unk>", BYTE: "<0x41>"}[kind]
    parts = [(name[:i], 1.0, NORMAL) for i in range(1, len(name))] + [(name[-1], 1.0, NORMAL)]
    tokenizer = tokenizer_of(model([*LETTERS, *parts]))
    assert tokens(tokenizer, name) == [name[:-1], name[-1]]


@pytest.mark.parametrize("kind", [CONTROL, USER_DEFINED, NORMAL])
def test_location_tokens_are_tokens_whatever_their_type(kind):
    tokenizer = tokenizer_of(model([*LETTERS, ("<loc0007>", 0.0, kind), ("<seg000>", 0.0, kind)]))
    ids = tokenizer.encode("a<loc0007><seg000> a")
    assert [tokenizer.token_of(id) for id in ids] == ["a", "<loc0007>", "<seg000>", "▁", "a"]
    assert tokenizer.decode(ids) == "a<loc0007><seg000> a"


@pytest.mark.parametrize("kind", [CONTROL, USER_DEFINED, NORMAL])
def test_control_tokens_are_plain_text_in_a_prompt(kind):
    """Whatever a file says of `<image>` and `<start_of_turn>`; a caller who means the token can say so."""
    names = ["<image>", "<start_of_turn>"]
    parts = [(part, 0.0, NORMAL) for part in {name[:i] for name in names for i in range(1, len(name))}]
    tokenizer = tokenizer_of(model([*LETTERS, *[(name, 0.0, kind) for name in names], *parts]))
    ids = {tokenizer.id_of(name) for name in [*names, "<bos>"]}
    for text in [*names, "<bos>", *TYPED_CONTROLS]:
        assert not ids & set(tokenizer.encode(text))
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert kind == NORMAL or tokenizer.decode(ids) == ""
    assert tokenizer.encode("a<bos>a", control=True) == [260, 2, 260]


def test_control_tokens_are_left_out_of_the_text_unless_asked_for():
    tokenizer = tokenizer_of(model(LETTERS))
    ids = [2, *tokenizer.encode("a b"), 1, 0]
    assert (tokenizer.decode(ids), tokenizer.decode(ids, skip_special=False)) == ("a b", "<bos>a b<eos><pad>")


def test_the_model_says_what_its_control_tokens_are_called():
    """Where they are not called what Gemma calls them."""
    names = [("<mask>", 0.0, CONTROL), ("</s>", 0.0, CONTROL), ("<begin>", 0.0, CONTROL), ("<unk>", 0.0, UNKNOWN)]
    tokenizer = tokenizer_of(model([*names, *LETTERS[4:]], [*TRAINER, (46, b"<begin>"), (48, b"<none>")]))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.vocab_size) == (2, 1, None, 264)


def test_added_tokens_follow_the_pieces(tmp_path):
    added = {"<loc0000>": 265, "<image>": 264, "<mask>": 266, "<eos>": 1}
    tokenizer = read_tokenizer(write(tmp_path, model(LETTERS), added).parent)
    assert (tokenizer.image_id, tokenizer.vocab_size, tokenizer.eos_id) == (264, 267, 1)
    assert tokenizer.encode("<loc0000>a<mask>") == [265, 260, 266]
    assert 264 not in tokenizer.encode("<image>") and 1 not in tokenizer.encode("<eos>")
    assert tokenizer.decode([264, 260, 265, 266]) == "a<loc0000><mask>"


def test_a_folder_may_hold_either_file_or_none(tmp_path):
    assert read_tokenizer(tmp_path) is None
    write(tmp_path, model(LETTERS))
    assert type(read_tokenizer(tmp_path)) is SentencePieceTokenizer
    (tmp_path / "tokenizer.json").write_bytes((ROOT / "weights" / "tokenizer.json").read_bytes())
    assert type(read_tokenizer(tmp_path)) is Tokenizer


def test_what_the_format_allows_is_read():
    """Unknown fields, values given twice, a message in two halves, numbers written longer than they need be."""
    pieces = [message([(1, b"?"), (9, b"new"), (1, text.encode()), (3, kind), (200, 7), (12, 1.5)])
              for text, _, kind in LETTERS]  # fmt: skip
    halves = [(2, message([(3, 2)])), (2, message([(35, 1)])), (3, message([(3, 1), (4, 0)])), (3, message([(3, 0)]))]
    data = message([*halves, (7, b"unknown"), *[(1, piece) for piece in pieces], (4, b"self test")])
    data += varint(6 << 3 | 1) + bytes(8) + varint(9 << 3) + b"\x85\x80\x80\x00"
    assert tokenizer_of(data).encode("ab cé") == tokenizer_of(model(LETTERS)).encode("ab cé")


def piece(*fields):
    return model(LETTERS) + message([(1, message(fields))])


SOUND = model(LETTERS)
BROKEN = {
    "empty": (b"", "0 are of type UNKNOWN"),
    "text": (b"not a model", "expected"),
    "a tokenizer.json": (b'{"model": {"type": "BPE"}}', "expected"),
    "zeros": (bytes(100), "field 0"),
    "cut off in a piece": (SOUND[:50], "ends in the middle"),
    "cut off at the end": (SOUND[:-1], "ends in the middle"),
    "cut off in a number": (SOUND + b"\x0a\xff", "ends in the middle"),
    "an absurd length": (SOUND + b"\x0a" + varint(2**62), "ends in the middle"),
    "an endless number": (SOUND + b"\x38" + b"\xff" * 1000, "more than 64 bits"),
    "a group": (SOUND + b"\x3b" * 1000, "wire type 3"),
    "wire type 7": (SOUND + b"\x3f", "wire type 7"),
    "pieces as a number": (SOUND + b"\x08\x01", "field 1 has wire type 0"),
    "score as a number": (piece((1, b"x"), (2, 1)), r"pieces\[264\]: field 2 has wire type 0"),
    "type as text": (piece((1, b"x"), (3, b"1")), r"pieces\[264\]: field 3 has wire type 2"),
    "model type as text": (model(LETTERS, [(3, b"2")]), "trainer_spec: field 3 has wire type 2"),
    "no pieces": (model([]), "0 are of type UNKNOWN"),
    "a piece without text": (piece((2, 1.0)), r"pieces\[264\]: ''"),
    "a piece with U+0000": (piece((1, b"a\0")), r"pieces\[264\]"),
    "a piece that is not UTF-8": (piece((1, b"\xff")), r"pieces\[264\]: .* is not UTF-8"),
    "half a surrogate": (piece((1, b"\xed\xa0\x80")), "is not UTF-8"),
    "a piece twice": (piece((1, b"a")), "'a' occurs twice"),
    "a control piece twice": (piece((1, b"<bos>"), (3, NORMAL)), "'<bos>' occurs twice"),
    "no number as score": (piece((1, b"x"), (2, float("nan"))), "the score is not a number"),
    "an unused piece": (piece((1, b"x"), (3, UNUSED)), "type 5 is not supported"),
    "an unknown type": (piece((1, b"x"), (3, 99)), "type 99 is not supported"),
    "no unknown piece": (model([entry for entry in LETTERS if entry[2] != UNKNOWN]), "0 are of type UNKNOWN"),
    "two unknown pieces": (piece((1, b"x"), (3, UNKNOWN)), "2 are of type UNKNOWN"),
    "a byte missing": (model([entry for entry in LETTERS if entry[0] != "<0x7F>"]), "255 are of type BYTE"),
    "a byte too many": (piece((1, b"<0x100>"), (3, BYTE)), "257 are of type BYTE"),
    "bytes without fallback": (model(LETTERS, [(3, 2)]), "256 are of type BYTE, expected none"),
    "whole words": (model(LETTERS, [(3, 3), (35, 1)]), "trainer_spec.model_type: expected 1, unigram, or 2"),
    "blanks behind": (model(LETTERS, [*TRAINER, (24, 1)]), "treat_whitespace_as_suffix: expected false"),
    "no trainer": (message([(1, message([(1, b"a")]))]), "0 are of type UNKNOWN"),
    "rules for characters": (model(LETTERS, TRAINER, [*NORMALIZER, (2, b"rules")]), "normalizer_spec: precompiled"),
    "rules for decoding": (SOUND + message([(5, message([(2, b"rules")]))]), "denormalizer_spec: rules"),
    "blanks left": (model(LETTERS, TRAINER, [*NORMALIZER, (5, 0)]), "escape_whitespaces: expected true"),
    "a name that is not UTF-8": (model(LETTERS, [*TRAINER, (46, b"\xff")]), "is not UTF-8"),
}


@pytest.mark.parametrize("data, complaint", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused_in_one_line_that_names_it(tmp_path, data, complaint):
    path = write(tmp_path, data)
    with pytest.raises(InputError, match=complaint) as refusal:
        read_tokenizer(tmp_path)
    assert str(refusal.value).startswith(f"{path}: ") and "\n" not in str(refusal.value)


@pytest.mark.parametrize("added", ["", "[]", '{"<image>"', {"<image>": "264"}, {"<image>": True}, {"<image>": 265},
                                   {"<bos>": 264}, {"<image>": 260}, {"<image>": -1}, '{"\\ud800": 264}'])  # fmt: skip
def test_a_broken_list_of_added_tokens_is_refused(tmp_path, added):
    write(tmp_path, SOUND, added)
    with pytest.raises(InputError) as refusal:
        read_tokenizer(tmp_path)
    assert str(refusal.value).startswith(str(tmp_path)) and "\n" not in str(refusal.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    (tmp_path / "tokenizer.model").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        read_tokenizer(tmp_path)


@given(st.integers(0, 2**32))
def test_a_damaged_file_is_refused_or_read(seed):
    """Nothing else happens, whichever bytes are changed, taken out or put in."""
    rng = random.Random(seed)
    for _ in range(10):
        data = bytearray(MODELS["by hand"])
        for _ in range(rng.randint(1, 3)):
            i = rng.choice([rng.randrange(len(data)), rng.randrange(len(data) - 40, len(data))])
            size = rng.randrange(3)
            data[i:i + rng.randrange(3)] = rng.randbytes(size)
        try:
            tokenizer = tokenizer_of(bytes(data))
        except InputError as refusal:
            assert "\n" not in str(refusal)
        else:
            assert tokenizer.decode(tokenizer.encode("abé d")) == "abé d"
