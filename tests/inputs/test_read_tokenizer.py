"""Which file holds a folder's tokenizer, and which tokens its files declare."""
import base64
import json

import pytest
from golden.make_captions_golden import KINDS, write_tokenizer
from golden.make_sentencepiece_golden import BYTE as BYTE_TYPE
from golden.make_sentencepiece_golden import BYTES, CONTROL, NORMAL, UNKNOWN, model
from golden.make_tokenizer_golden import awkward, read_packed

from minipali.errors import InputError
from minipali.inputs.read_tokenizer import read_tokenizer
from minipali.inputs.sentencepiece import SentencePieceTokenizer
from minipali.inputs.tokenizer import Tokenizer

SPIECE = base64.b64decode(read_packed("unigram")["models"]["siglip 1"]["model"])
T5 = read_packed("unigram")["specs"]["t5"]


def write(folder, name, content):
    if isinstance(content, bytes):
        (folder / name).write_bytes(content)
    else:
        (folder / name).write_text(json.dumps(content), encoding="utf-8")


def parts(tokenizer):
    return tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id, tokenizer.kind


@pytest.mark.parametrize("kind, expected", list(zip(KINDS, [
    (None, 1, 1, "SiglipTokenizer"), (2, 1, 0, "GemmaTokenizer"), (2, 1, 0, "TokenizersBackend")])))
def test_both_generations_are_told_apart(kind, expected, tmp_path):
    write_tokenizer(tmp_path, kind)
    assert parts(read_tokenizer(tmp_path)) == expected


def test_a_bare_file_says_which_generation_it_is(tmp_path):
    """Without any other file: a unigram model is SigLIP 1's, which pads with the stop token, not with <pad>."""
    for name in ("spiece.model", "sentencepiece.model", "tokenizer.model"):
        folder = tmp_path / name
        folder.mkdir()
        write(folder, name, SPIECE)
        assert parts(read_tokenizer(folder)) == (None, 1, 1, "SiglipTokenizer")
    write(tmp_path, "tokenizer.json", awkward("bytes"))
    assert parts(read_tokenizer(tmp_path)) == (2, 1, 0, "GemmaTokenizer")


def test_the_declared_tokens_count_and_not_their_usual_names(tmp_path):
    """tokenizer_config.json before special_tokens_map.json before the usual names; by name, or as an object."""
    write(tmp_path, "tokenizer.json", awkward("bytes"))
    write(tmp_path, "special_tokens_map.json", {"eos_token": "x", "pad_token": {"content": "y"}, "bos_token": None})
    ids = read_tokenizer(tmp_path).ids
    assert parts(read_tokenizer(tmp_path))[:3] == (ids["<bos>"], ids["x"], ids["y"])
    write(tmp_path, "tokenizer_config.json", {"eos_token": {"content": "a"}, "bos_token": "b", "pad_token": None,
                                              "tokenizer_class": "GemmaTokenizerFast"})
    assert parts(read_tokenizer(tmp_path)) == (ids["b"], ids["a"], ids["y"], "GemmaTokenizer")
    write(tmp_path, "tokenizer_config.json", {"eos_token": "<nope>", "pad_token": ["a"], "do_lower_case": False})
    assert parts(read_tokenizer(tmp_path))[:3] == (ids["<bos>"], ids["<eos>"], ids["<pad>"])
    assert read_tokenizer(tmp_path).keeps_case


def test_a_model_declares_its_tokens_itself(tmp_path):
    """By the trainer's own words; "</s>" may also be an ordinary piece, as in Gemma's."""
    pieces = [("<none>", 0.0, CONTROL), ("<stop>", 0.0, CONTROL), ("<go>", 0.0, CONTROL), ("<unk>", 0.0, UNKNOWN)]
    pieces += [*[(name, 0.0, BYTE_TYPE) for name in BYTES], ("</s>", -1.0, NORMAL), ("a", -2.0, NORMAL)]
    names = [(46, b"<go>"), (47, b"<stop>"), (48, b"<none>")]
    write(tmp_path, "tokenizer.model", model(pieces, [(3, 2), (35, 1), *names]))
    assert parts(read_tokenizer(tmp_path)) == (2, 1, 0, "GemmaTokenizer")
    write(tmp_path, "tokenizer_config.json", {"pad_token": "<stop>"})
    assert parts(read_tokenizer(tmp_path))[:3] == (2, 1, 1)
    write(tmp_path, "tokenizer.model", model([("<eos>", 0.0, CONTROL), *pieces], [(3, 2), (35, 1)]))
    assert read_tokenizer(tmp_path).eos_id == 0


def test_siglip_1_is_read_from_its_model_and_not_from_what_was_made_of_it(tmp_path):
    """As transformers does; for any other class tokenizer.json comes first."""
    write(tmp_path, "spiece.model", SPIECE)
    write(tmp_path, "tokenizer.json", T5)
    assert type(read_tokenizer(tmp_path)) is Tokenizer
    write(tmp_path, "tokenizer_config.json", {"tokenizer_class": "SiglipTokenizer"})
    assert type(read_tokenizer(tmp_path)) is SentencePieceTokenizer
    (tmp_path / "spiece.model").unlink()
    assert type(read_tokenizer(tmp_path)) is Tokenizer
    assert parts(read_tokenizer(tmp_path))[1:] == (1, 1, "SiglipTokenizer")


@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b'"text"'])
def test_broken_declarations_are_named(name, content, tmp_path):
    write(tmp_path, "tokenizer.json", awkward("bytes"))
    write(tmp_path, name, content)
    with pytest.raises(InputError) as refusal:
        read_tokenizer(tmp_path)
    assert str(refusal.value).startswith(str(tmp_path / name)) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("fields", [{"tokenizer_class": 5}, {"eos_token": 5}, {"eos_token": {"content": 5}},
                                    {"pad_token": {}}, {"tokenizer_class": None}])
def test_declarations_of_the_wrong_kind_say_nothing(fields, tmp_path):
    write(tmp_path, "tokenizer.json", awkward("bytes"))
    write(tmp_path, "tokenizer_config.json", fields)
    assert parts(read_tokenizer(tmp_path)) == (2, 1, 0, "GemmaTokenizer")
