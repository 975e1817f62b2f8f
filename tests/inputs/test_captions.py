"""Captions as each generation of SigLIP reads them: cleaned, ended, padded; the ids and logits of transformers."""
import json
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
from golden.make_captions_golden import CAPTIONS, KINDS, config, pictures, weights, write_tokenizer
from helpers import GOLDEN_FILES, ROOT, assert_close

from minipali.checkpoint.config import parse_config
from minipali.checkpoint.hub import save
from minipali.checkpoint.tensors import flatten, unflatten
from minipali.decoding.pair import Pair, load_pair
from minipali.errors import InputError
from minipali.inputs.captions import canonical_text, caption_ids, check_caption_ids, clean
from minipali.inputs.read_tokenizer import read_tokenizer
from minipali.inputs.tokenizer import Tokenizer

GOLDEN = json.loads((GOLDEN_FILES / "captions.json").read_text(encoding="utf-8"))


@cache
def tokenizer():
    return Tokenizer.from_file(ROOT / "weights" / "tokenizer.json")


@pytest.mark.parametrize("text, expected", [
    ("A Red,  circle!", "a red circle"), ("a red circle", "a red circle"), (" It's\n30% - off\t", "its 30 off"),
    ("...", ""), ("", ""), ("Über (straße)", "über straße"), ("snake_case__x", "snake case x"), ("_a_", "a")])
def test_canonical(text, expected):
    assert canonical_text(text) == expected
    assert canonical_text(expected) == expected


@pytest.mark.parametrize("kind, keeps_case, expected", [
    ("SiglipTokenizer", False, "a b c"), ("SiglipTokenizer", True, "A b C"), (None, False, "a b c"),
    ("GemmaTokenizer", False, " a_b, c!"), ("Siglip2Tokenizer", False, " a_b, c!"),
    ("GemmaTokenizer", True, " A_b, C!"), ("TokenizersBackend", False, " A_b, C!")])
def test_cleaning_follows_the_class(kind, keeps_case, expected):
    assert clean(" A_b, C!", SimpleNamespace(kind=kind, keeps_case=keeps_case)) == expected


def test_captions_are_padded_to_the_full_length():
    """Tokens, the stop token, padding; a long caption is cut so that the stop token is still its end."""
    t, cfg = tokenizer(), SimpleNamespace(max_position_embeddings=9, pad_token_id=7)
    ids = caption_ids(["A red circle.", "", "circle " * 50], t, cfg)
    assert ids.shape == (3, 9)
    words = t.encode("a red circle")
    assert ids[0].tolist() == [*words, t.eos_id, *[t.pad_id] * (8 - len(words))]
    assert ids[1].tolist() == [t.eos_id, *[t.pad_id] * 8]
    assert ids[2].tolist() == [*t.encode("circle " * 50)[:8], t.eos_id]
    assert t.bos_id not in ids


@pytest.mark.parametrize("eos, pad, expected", [
    (None, 5, [3, 4, 5, 5]), (None, None, [3, 4, 7, 7]), (6, 5, [3, 4, 6, 5]), (6, 6, [3, 4, 6, 6])])
def test_a_tokenizer_without_a_stop_or_padding_token(eos, pad, expected):
    """It ends nothing, as in the hub's processor; the config's padding steps in."""
    t = SimpleNamespace(encode=lambda text: [3, 4], kind=None, eos_id=eos, pad_id=pad)
    cfg = SimpleNamespace(max_position_embeddings=4, pad_token_id=7)
    assert caption_ids(["x"], t, cfg).tolist() == [expected]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_logits_are_those_of_transformers(kind, tmp_path):
    """SigLIP 1 and 2, each with its own tokenizer, and SigLIP 2 as transformers 5 writes it."""
    size = write_tokenizer(tmp_path, kind)
    save(tmp_path, config(size), weights(size), "float32")
    pair = load_pair(tmp_path)
    ids = caption_ids(CAPTIONS, pair.tokenizer, pair.cfg.text_config)
    for caption, ours, theirs in zip(CAPTIONS, ids.tolist(), GOLDEN["cases"][kind]["ids"], strict=True):
        assert (caption, ours) == (caption, theirs)
    params = unflatten({name: x.astype(np.float64) for name, x in flatten(pair.params).items()})
    double = Pair(pair.cfg, params, pair.tokenizer, lambda picture: pair.preprocessor(picture).astype(np.float64))
    assert_close(kind, double.logits(pictures(), CAPTIONS), GOLDEN["cases"][kind]["logits"], "golden")
    assert_close(kind, pair.logits(pictures(), CAPTIONS), GOLDEN["cases"][kind]["logits"], "golden")


def test_punctuation_counts_in_one_generation_and_not_in_the_other(tmp_path):
    for kind, same in zip(KINDS, [True, False, False]):
        folder = tmp_path / kind
        folder.mkdir()
        cfg = parse_config(config(write_tokenizer(folder, kind))).text_config
        ids = caption_ids(["a b", "A, b!"], read_tokenizer(folder), cfg)
        assert np.array_equal(ids[0], ids[1]) == same
        assert np.array_equal(*caption_ids(["a b", "A b"], read_tokenizer(folder), cfg))


def test_a_tokenizer_of_another_model_is_refused():
    check_caption_ids(np.array([[0, 5]]), 6)
    with pytest.raises(InputError, match="captions: id 5 is outside the model's vocabulary, 0 to 4"):
        check_caption_ids(np.array([[0, 5]]), 5)
