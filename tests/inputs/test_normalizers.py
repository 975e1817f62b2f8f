"""What is done to a text before it is cut into tokens: rules of a model, patterns, blanks, small letters."""
import base64
import random
import struct

import pytest
from golden.make_tokenizer_golden import read_packed
from golden.make_unigram_golden import ACCENTS, PUNCTUATION
from helpers import seeds
from hypothesis import given

from minipali.errors import InputError
from minipali.inputs.charsmap import CharsMap, graphemes
from minipali.inputs.normalizers import (
    SentencePieceNormalizer,
    compile_pattern,
    lower_case,
    read_normalizer,
)
from minipali.inputs.pre_tokenizers import read_pre_tokenizer
from minipali.inputs.special_tokens import WHITE_SPACE

STEP = next(step for step in read_packed("unigram")["specs"]["t5"]["normalizer"]["normalizers"]
            if step["type"] == "Precompiled")
DATA = base64.b64decode(STEP["precompiled_charsmap"])
RULES = read_packed("unigram")["rules"]


def charsmap_of(table, large=False):
    """The bytes of a `precompiled_charsmap`, by hand: each node of the trie has 256 units of its own.

    large: with offsets written in multiples of 256, as a trie of more than 2 million units needs them.
    """
    nodes, replacements = {b""}, b"\0"
    for text in table:
        data = text.encode("utf-8")
        nodes |= {data[:i] for i in range(1, len(data) + 1)}
    blocks = {node: (i + 1) * 256 for i, node in enumerate(sorted(nodes))}
    units = [0] * (256 * (len(nodes) + 1))

    def unit(place, block, label, ends):
        offset = place ^ block
        assert not large or offset % 256 == 0
        return (offset // 256 << 10 | 0x200 if large else offset << 10) | label | ends << 8
    units[0] = unit(0, blocks[b""], 0, False)
    for node in sorted(nodes - {b""}):
        place = blocks[node[:-1]] ^ node[-1]
        block = blocks[node] ^ (place & 255 if large else 0)  # a block may begin anywhere, if its reader agrees
        blocks[node] = block
        ends = node.decode("utf-8", "ignore") in table and node.decode("utf-8", "ignore").encode("utf-8") == node
        units[place] = unit(place, block, node[-1], ends)
        if ends:
            units[block] |= 1 << 31 | len(replacements)
            replacements += table[node.decode("utf-8")].encode("utf-8") + b"\0"
    return struct.pack(f"<I{len(units)}I", 4 * len(units), *units) + replacements


@pytest.mark.parametrize("large", [False, True])
def test_a_table_made_by_hand(large):
    """Rules of one, two and three characters that begin alike; the longest that fits applies, at each place anew."""
    charsmap = CharsMap(charsmap_of({"a": "1", "ab": "2", "abcé": "3", "é": "", "日": "xy"}, large))
    normalize = SentencePieceNormalizer(charsmap, False, False, [])
    assert normalize("aababcabcéé日日c") == "1" "2" "2c" "3" "" "xyxy" "c"
    assert charsmap.by_grapheme("ab日é") == "1bxy"
    assert list(charsmap.matches("abcé".encode(), 0)) == [(1, b"1"), (2, b"2"), (5, b"3")]


def test_each_rule_of_the_table_applies():
    """What the trainer was told, read back from the tables that it made of it."""
    charsmap, normalize = CharsMap(DATA), SentencePieceNormalizer(CharsMap(DATA), False, False, [])
    for text, replacement in RULES.items():
        data = text.encode("utf-8")
        assert charsmap.longest_match(data, 0) == (replacement.encode("utf-8"), len(data)), text
        assert normalize(f"x{text}y") == f"x{replacement}y".replace(" ", "▁")


def test_a_character_without_a_rule_stays():
    charsmap = CharsMap(DATA)
    for point in [*range(33, 127), 0xE9, 0x65E5, 0x1F642]:
        assert charsmap.longest_match(chr(point).encode("utf-8"), 0) is None


def test_the_longest_rule_wins_in_one_program_and_the_shortest_in_the_other():
    """"e" with an accent is one character in both; "①" loses its accent where graphemes are replaced."""
    charsmap = CharsMap(DATA)
    normalize = SentencePieceNormalizer(charsmap, False, False, [])
    assert [normalize("e\u0301"), charsmap.by_grapheme("e\u0301")] == ["é", "é"]
    text = next(c for c in RULES if len(c.encode("utf-8")) == 3 and RULES[c].isalnum() and len(RULES[c]) == 1)
    assert normalize(text + "\u0302") == RULES[text] + "\u0302"
    assert charsmap.by_grapheme(text + "\u0302") == RULES[text]
    assert charsmap.by_grapheme(text + "\u0302\u0302") == RULES[text] + "\u0302\u0302"


@pytest.mark.parametrize("text, expected", [
    ("ab", ["a", "b"]), ("e\u0301\u0302x", ["e\u0301\u0302", "x"]), ("\r\n\n", ["\r\n", "\n"]),
    ("\n\u0301", ["\n", "\u0301"]), ("a\u200d\u0301", ["a\u200d\u0301"]), ("\u0e01\u0e33", ["\u0e01\u0e33"]),
    ("\u0301a", ["\u0301", "a"]), ("", [])])
def test_graphemes(text, expected):
    assert list(graphemes(text)) == expected
    assert all("".join(graphemes(text)) == text for text in ACCENTS)


@pytest.mark.parametrize("data", [
    b"", b"\0\0\0", bytes(8), struct.pack("<I", 3) + bytes(9), struct.pack("<I", 400) + bytes(9), b"rules"])
def test_damaged_rules_are_refused(data):
    with pytest.raises(InputError, match="precompiled_charsmap"):
        CharsMap(data)


@given(seeds)
def test_damaged_tables_never_raise_anything_else(seed):
    """The way through a trie from a hostile file leads nowhere, and the text comes out in some form."""
    rng = random.Random(seed)
    data = bytearray(DATA)
    for _ in range(rng.randint(1, 200)):
        data[rng.randrange(4, len(data))] = rng.randrange(256)
    charsmap = CharsMap(bytes(data))
    for text in [*ACCENTS, "plain text"]:
        assert isinstance(charsmap.by_grapheme(text), str)
        assert isinstance(SentencePieceNormalizer(charsmap, True, True, [])(text), str)


def test_lower_case_goes_character_by_character():
    assert lower_case("ΑΣ İ") == "ασ i\u0307"  # str.lower() would end the word in another sigma


@pytest.mark.parametrize("pattern, text, expected", [
    (PUNCTUATION, "a-b, c! <d> e/f_", "a|b| c| <d> e/f|"), (r"\s+", "a \t\n b\u3000\x1cc", "a|b|\x1cc"),
    (" {2,}", "a b  c    d", "a b|c|d"), (r"\A +| +\z", "  a b ", "|a b|"), (r"\A▁", "▁a▁", "|a▁"), ("x", "axb", "a|b"),
    (r"\.", "a.b", "a|b"), ("[ab]+", "xaby", "x|y")])
def test_patterns(pattern, text, expected):
    step = read_normalizer({"type": "Replace", "pattern": {"Regex": pattern}, "content": "|"})
    assert step(text) == expected


@pytest.mark.parametrize("pattern", [
    "(a)", "a*", "a?", ".", "^a", "a$", r"\w", r"\p{L}", "[^a]", "[a-z]", "[[:alpha:]]", "[a&&b]", r"\d", "a{2", "[",
    "]", r"\A{99999999999999999999,}", "+", r"\b"])
def test_a_pattern_that_could_mean_something_else_is_refused(pattern):
    with pytest.raises(InputError, match="pattern"):
        compile_pattern(pattern)


def test_strip_takes_unicodes_white_space():
    both = read_normalizer({"type": "Strip"})
    right = read_normalizer({"type": "Strip", "strip_left": False, "strip_right": True})
    blanks = "".join(sorted(WHITE_SPACE))
    assert both(f"{blanks}a b\x1c{blanks}") == "a b\x1c"
    assert right(f" a {blanks}") == " a"


@pytest.mark.parametrize("step", [
    {"type": "NFKC"}, {}, None, "Lowercase", {"type": "Precompiled", "precompiled_charsmap": "%"},
    {"type": "Precompiled"}, {"type": "Precompiled", "precompiled_charsmap": 5}, {"type": "Prepend"},
    {"type": "Replace", "pattern": {"Regex": ""}, "content": ""}, {"type": "Replace", "pattern": "x", "content": ""},
    {"type": "Replace", "pattern": {"String": "x"}, "content": None}])
def test_a_step_that_is_not_done_here_is_refused(step):
    with pytest.raises(InputError, match="normalizer: ") as refusal:
        read_normalizer(step)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("step, word, begins, expected", [
    ({"prepend_scheme": "always"}, "a b", False, ["▁a", "▁b"]),
    ({"prepend_scheme": "first"}, "a b", False, ["a", "▁b"]),
    ({"prepend_scheme": "first"}, "a b", True, ["▁a", "▁b"]), ({"prepend_scheme": "never"}, " a b", True, ["▁a", "▁b"]),
    ({"add_prefix_space": False}, "a b", True, ["a", "▁b"]), ({"split": False}, "a b", True, ["▁a▁b"]),
    ({}, "▁a  b", True, ["▁a", "▁", "▁b"])])
def test_metaspace(step, word, begins, expected):
    assert read_pre_tokenizer({"type": "Metaspace", "replacement": "▁"} | step)(word, begins) == expected


@pytest.mark.parametrize("step", [{"type": "ByteLevel"}, None, {"type": "Metaspace", "replacement": "ab"},
                                  {"type": "Metaspace", "prepend_scheme": "twice"}, {"type": "Split"}])
def test_a_pre_tokenizer_that_is_not_done_here_is_refused(step):
    with pytest.raises(InputError, match="pre_tokenizer: "):
        read_pre_tokenizer(step)
