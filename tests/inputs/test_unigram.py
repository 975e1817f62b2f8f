"""Unigram tokenizers: the recorded answers of two packages, the definition, and what the published layouts hold."""
import base64
import itertools
import pickle
import random
from pathlib import Path

import pytest
from golden.make_sentencepiece_golden import (
    BYTE,
    BYTES,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    model,
    random_model,
)
from golden.make_tokenizer_golden import random_spec, read_packed
from golden.make_unigram_golden import random_unigram_spec
from helpers import seeds
from hypothesis import given

from minipali.errors import InputError
from minipali.inputs.sentencepiece import SentencePieceTokenizer
from minipali.inputs.tokenizer import Tokenizer
from minipali.inputs.unigram import segment

GOLDEN = read_packed("unigram")
MODELS = {name: base64.b64decode(case["model"]) for name, case in GOLDEN["models"].items()}
NOWHERE = Path("no folder") / "added_tokens.json"
T5 = [("<pad>", 0.0, CONTROL), ("</s>", 0.0, CONTROL), ("<unk>", 0.0, UNKNOWN)]


def tokenizer_of(data):
    return SentencePieceTokenizer(data, NOWHERE)


@pytest.mark.parametrize("name", MODELS)
def test_ids_are_those_of_the_sentencepiece_package(name):
    tokenizer = tokenizer_of(MODELS[name])
    for text, ids in GOLDEN["models"][name]["encoded"]:
        assert (text, tokenizer.encode(text)) == (text, ids)


@pytest.mark.parametrize("name", GOLDEN["specs"])
def test_ids_and_texts_are_those_of_the_tokenizers_package(name):
    tokenizer = Tokenizer(GOLDEN["specs"][name])
    for text, ids, decoded in GOLDEN["encoded"][name]:
        assert (text, tokenizer.encode(text, control=True)) == (text, ids)
        assert (text, tokenizer.decode(ids)) == (text, decoded)


@pytest.mark.parametrize("name", [*GOLDEN["specs"], *MODELS])
def test_a_tokenizer_can_be_sent_to_another_process(name):
    """Training draws its batches in several."""
    tokenizer = Tokenizer(GOLDEN["specs"][name]) if name in GOLDEN["specs"] else tokenizer_of(MODELS[name])
    text = "A (red)  circle, ﬁne"
    assert pickle.loads(pickle.dumps(tokenizer)).encode(text) == tokenizer.encode(text)


@pytest.mark.parametrize("name, make", [("random", random_spec), ("random unigram", random_unigram_spec)])
def test_random_files_read_as_the_tokenizers_package_reads_them(name, make):
    """The recorded answers of the comparison that runs where the package is installed."""
    for seed, answers in GOLDEN[name].items():
        tokenizer = Tokenizer(make(random.Random(int(seed)))[0])
        for text, ids, decoded in answers:
            assert (seed, text, tokenizer.encode(text, control=True)) == (seed, text, ids)
            assert (seed, text, tokenizer.decode(ids)) == (seed, text, decoded)


def test_random_models_read_as_the_sentencepiece_package_reads_them():
    for seed, answers in GOLDEN["random models"].items():
        tokenizer = tokenizer_of(random_model(random.Random(int(seed)))[0])
        for text, ids in answers:
            assert (seed, text, tokenizer.encode(text)) == (seed, text, ids)


@given(seeds)
def test_no_other_segmentation_is_likelier(seed):
    """The definition: all ways to cut a text, the sum of the scores of each."""
    rng = random.Random(seed)
    parts = {"".join(rng.choice("ab") for _ in range(rng.randint(1, 4))) for _ in range(rng.randint(1, 8))}
    scores = {part: -rng.random() * 9 for part in sorted(parts)}
    text, unknown = "".join(rng.choice("abx") for _ in range(rng.randint(1, 9))), -20.0
    found = segment(text, scores, sorted(set(map(len, scores))), unknown)
    assert "".join(piece for piece, _ in found) == text
    assert all(known == (piece in scores) and (known or len(piece) == 1) for piece, known in found)

    def total(pieces):
        if any(len(piece) > 1 and piece not in scores for piece in pieces):
            return -1e9
        return sum(scores.get(piece, unknown) for piece in pieces)
    ways = []
    for cuts in itertools.product([False, True], repeat=len(text) - 1):
        bounds = [0, *(i for i, cut in enumerate(cuts, 1) if cut), len(text)]
        ways.append([text[i:j] for i, j in itertools.pairwise(bounds)])
    assert total([piece for piece, _ in found]) == pytest.approx(max(map(total, ways)), abs=1e-9)


def test_of_equally_likely_ways_the_last_piece_is_the_longest():
    """As both packages choose: the first way that is found from the left stays."""
    scores = {"a": -2.0, "ab": -3.0, "b": -2.0, "bc": -3.0, "c": -2.0}
    assert [piece for piece, _ in segment("abc", scores, [1, 2], -20.0)] == ["a", "bc"]


def test_the_whole_counts_and_not_the_longest_piece_first():
    pieces = [*T5, ("▁", -4.0, NORMAL), ("▁hat", -7.1, NORMAL), ("▁ha", -6.4, NORMAL), ("ts", -1.0, NORMAL),
              ("s", -3.2, NORMAL), *[(letter, -9.0, NORMAL) for letter in "hat"]]
    tokenizer = tokenizer_of(model(pieces, [(3, 1)], []))
    assert [tokenizer.token_of(id) for id in tokenizer.encode("hats")] == ["▁ha", "ts"]


def test_an_unknown_character_costs_more_than_the_worst_piece():
    """Ten more, so that a piece that holds the character is taken even if it is the worst of all."""
    spec = broken(vocab=[["<unk>", 0.0], ["a", 0.5], ["ab", -12.0]], unk_id=0) | {
        "added_tokens": [], "normalizer": None, "pre_tokenizer": None}
    assert Tokenizer(spec).encode("ab") == [2]
    assert Tokenizer(spec).encode("abb") == [2, 0]


def test_blanks_are_tidied_up_as_the_model_asks():
    """One in front, none twice, none at the end; without remove_extra_whitespaces they all stay."""
    pieces = [*T5, *[(letter, -2.0, NORMAL) for letter in "▁ab"]]

    def tokens(text, normalizer):
        tokenizer = tokenizer_of(model(pieces, [(3, 1)], normalizer))
        return "".join(tokenizer.token_of(id) for id in tokenizer.encode(text))
    assert tokens("  a   b ", []) == "▁a▁b"
    assert tokens("  a   b ", [(3, 0)]) == "a▁b"
    assert tokens("  a   b ", [(4, 0)]) == "▁▁▁a▁▁▁b▁"
    assert tokens("  a   b ", [(3, 0), (4, 0)]) == "▁▁a▁▁▁b▁"
    assert tokens("   ", []) == tokens("", [(4, 0)]) == ""


def test_unknown_characters_become_one_token_or_their_bytes():
    letters = [(letter, -2.0, NORMAL) for letter in "▁ab"]
    plain = tokenizer_of(model([*T5, *letters], [(3, 1)], [(3, 0)]))
    assert plain.encode("a日本b日") == [4, 2, 5, 2]
    bytes_ = tokenizer_of(model([*T5, *[(name, 0.0, BYTE) for name in BYTES], *letters], [(3, 1), (35, 1)], [(3, 0)]))
    assert [bytes_.token_of(id) for id in bytes_.encode("aé")] == ["a", "<0xC3>", "<0xA9>"]
    assert bytes_.decode(bytes_.encode("a日本b")) == "a日本b"


@pytest.mark.parametrize("text", ["</s>", "a</s>b<unk><pad>", "<bos>"])
def test_control_tokens_are_plain_text(text):
    tokenizer = tokenizer_of(MODELS["siglip 1"])
    spec = Tokenizer(GOLDEN["specs"]["t5"])
    assert not {0, 1} & {*tokenizer.encode(text), *spec.encode(text)}
    assert spec.encode("a</s>", control=True)[-1] == 1


def test_the_dummy_blank_is_not_decoded():
    tokenizer = tokenizer_of(MODELS["siglip 1"])
    for text in ("a red circle", "circle", ""):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        stream = tokenizer.decode_stream()
        assert "".join([stream.push(id) for id in ids]) + stream.finish() == text


def test_a_long_text_takes_a_linear_number_of_steps():
    """Whatever the longest piece: only lengths that occur are tried."""
    class Counting(dict):
        asked = 0

        def get(self, key):
            self.asked += 1
            return super().get(key)
    scores = Counting({"a": -1.0, "aa": -1.5, "a" * 5000: -3.0})
    assert len(segment("a" * 4000, scores, [1, 2, 5000], -20.0)) == 2000
    assert scores.asked <= 2 * 4000


def test_a_user_defined_piece_is_whole_and_unchanged():
    """Where the rules would change its characters, and where other pieces are likelier."""
    pieces = [*T5, ("ﬁ<x>", 0.0, USER_DEFINED), *[(letter, -1.0, NORMAL) for letter in "▁fi<x>"]]
    charsmap = [field for field in [(2, charsmap_of(MODELS["siglip 1"])), (3, 0)]]
    tokenizer = tokenizer_of(model(pieces, [(3, 1)], charsmap))
    assert [tokenizer.token_of(id) for id in tokenizer.encode("ﬁﬁ<x>")] == ["f", "i", "ﬁ<x>"]


def charsmap_of(data):
    from minipali.inputs.protobuf import BYTES as LENGTH_DELIMITED
    from minipali.inputs.protobuf import read_message

    (spec,) = read_message(data, {3 * 8 + LENGTH_DELIMITED: "spec"})["spec"]
    return read_message(spec, {2 * 8 + LENGTH_DELIMITED: "map"})["map"][0]


def broken(**changes):
    spec = GOLDEN["specs"]["t5"]
    return spec | {"model": spec["model"] | changes}


@pytest.mark.parametrize("spec", [
    broken(vocab=None), broken(vocab=[]), broken(vocab={"a": 1}), broken(vocab=[["a"]]), broken(vocab=[["a", "b"]]),
    broken(vocab=[[1, 2.0]]), broken(vocab=[["a", float("inf")]]), broken(vocab=[["<pad>", 0], ["<pad>", 1]]),
    broken(vocab=["ab"]), broken(unk_id=None), broken(unk_id=9999), broken(unk_id=True), broken(unk_id="2"),
    broken(vocab=[["\ud800", 0.0]]), broken(type="WordPiece")])
def test_a_broken_unigram_file_is_refused(spec):
    with pytest.raises(InputError) as refusal:
        Tokenizer(spec)
    assert "\n" not in str(refusal.value)
