"""With the grammar on, every answer of a random model is a list of valid boxes with the labels that were asked for."""
import dataclasses
import re
import shutil

import numpy as np
import pytest
from helpers import ROOT, random_params, random_pixels, seeds
from hypothesis import given
from hypothesis import strategies as st
from small_models import CONFIG, tokenizer_spec, with_text

from minipali.checkpoint import vae_oid
from minipali.checkpoint.config import parse_config
from minipali.decoding.generate import generate
from minipali.decoding.grammar import Grammar
from minipali.decoding.loaded_model import Model, encode_prompt
from minipali.decoding.sampling import Decoding
from minipali.decoding.search import beam_search, best_of
from minipali.errors import InputError
from minipali.inputs.tokenizer import Tokenizer
from minipali.outputs.boxes import parse

LETTERS = "abcdehot;▁"
MERGES = [["▁", "c"], ["▁c", "a"], ["▁", ";"], ["c", "a"], ["d", "▁;"], ["▁;", "▁"]]


def spec_with_shapes():
    """The tests' tokenizer with <seg> tokens and a few merges, one of them of a label's end and what follows it."""
    spec = tokenizer_spec(LETTERS)
    for merge in MERGES:
        spec["model"]["vocab"]["".join(merge)] = 5000
    places, codes = [f"<loc{i:04}>" for i in range(1024)], [f"<seg{i:03}>" for i in range(128)]
    words = [*spec["model"]["vocab"], *places, *codes, "<image>"]
    ids = {word: i for i, word in enumerate(words)}
    spec["model"] |= {"vocab": {word: ids[word] for word in spec["model"]["vocab"]}, "merges": MERGES}
    [image] = [token for token in spec["added_tokens"] if token["content"] == "<image>"]
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != "<image>"]
    spec["added_tokens"] += [{**image, "content": code, "special": False} for code in codes] + [image]
    for token in spec["added_tokens"]:
        token["id"] = ids[token["content"]]
    return spec


TOKENIZER = Tokenizer(spec_with_shapes())
STOP, LOC, SEG = 1, TOKENIZER.id_of("<loc0000>"), TOKENIZER.id_of("<seg000>")


def model(seed=0, tokenizer=TOKENIZER, stops=(1,)):
    """A random model that may say anything for a long time."""
    config = with_text(CONFIG, vocab_size=TOKENIZER.vocab_size, max_position_embeddings=400)
    cfg = dataclasses.replace(parse_config(config), image_token_index=TOKENIZER.image_id, eos_token_ids=stops)
    return Model(None, cfg, tokenizer, None, "numpy", random_params(cfg, np.random.default_rng(seed)))


def grammar_of(prompt, of=None):
    of = of or model()
    return Grammar(encode_prompt(prompt, of), of)


def test_codes_are_those_of_the_book_beside_the_model(tmp_path):
    """The shipped one has fewer than the vocabulary; without a book all of those count; a damaged one is refused."""
    of = model()
    shutil.copy(ROOT / "weights" / "vae-oid.npz", tmp_path)
    size = len(vae_oid.read(tmp_path / "vae-oid.npz")["_vq_vae"]["_embedding"])
    assert size == vae_oid.book_size(tmp_path / "vae-oid.npz") < 128
    box = [LOC, LOC, LOC + 1, LOC + 1]
    for path in [tmp_path, tmp_path / "model.npz"]:
        grammar = grammar_of("segment cat", dataclasses.replace(of, path=path))
        assert grammar.allowed(box, 99) == [SEG + code for code in range(size)]
    (tmp_path / "vae-oid.npz").write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"vae-oid\.npz: "):
        grammar_of("segment cat", dataclasses.replace(of, path=tmp_path))
    grammar_of("detect cat", dataclasses.replace(of, path=tmp_path))
    (tmp_path / "vae-oid.npz").unlink()
    grammar = grammar_of("segment cat", dataclasses.replace(of, path=tmp_path))
    assert grammar.allowed(box, 99) == [SEG + code for code in range(128)]


def ids_of(text):
    return TOKENIZER.encode(text)


# --- the machine ------------------------------------------------------------------------------------------------------

def test_one_object_step_by_step():
    """Four places of which the last two lie beyond the first two, the label, and only then the end or another one."""
    grammar, plenty = grammar_of("detect cat"), 99
    assert grammar.allowed([], plenty) == [*range(LOC, LOC + 1023), STOP]
    box = [LOC + 100, LOC + 1022, LOC + 101, LOC + 1023]
    assert grammar.allowed(box[:1], plenty) == [*range(LOC, LOC + 1023)]
    assert grammar.allowed(box[:2], plenty) == [*range(LOC + 101, LOC + 1024)]
    assert grammar.allowed(box[:3], plenty) == [LOC + 1023]
    label = [TOKENIZER.id_of("▁ca"), TOKENIZER.id_of("t")]
    assert grammar.allowed(box, plenty) == label[:1] and grammar.allowed(box + label[:1], plenty) == label[1:]
    following = TOKENIZER.id_of("▁;▁")
    assert grammar.allowed(box + label, plenty) == sorted([STOP, following])
    assert grammar.allowed([*box, *label, following], plenty) == [*range(LOC, LOC + 1023)], "no end after a semicolon"
    assert grammar.allowed([*box, *label, following, LOC + 7, LOC + 8], plenty) == [*range(LOC + 8, LOC + 1024)]


def test_shapes():
    """Sixteen codes between the box and the label, no more and no fewer."""
    grammar, box = grammar_of("segment cat"), [LOC, LOC, LOC + 1, LOC + 1]
    for count in range(16):
        assert grammar.allowed(box + [SEG + 127] * count, 99) == [*range(SEG, SEG + 128)]
    assert grammar.allowed(box + [SEG] * 16, 99) == [TOKENIZER.id_of("▁ca")]


def test_labels_are_spelled_as_in_training():
    """"cad" ends in "d"; before " ;" that "d" is part of another token. A label may also begin another label."""
    grammar, box = grammar_of("detect ca ;cad; cat hat"), [LOC, LOC, LOC + 1, LOC + 1]
    start = [*box, TOKENIZER.id_of("▁ca")]
    expected = {STOP, *map(TOKENIZER.id_of, ["▁;▁", "d", "d▁;", "t"])}
    assert set(grammar.allowed(start, 99)) == expected
    assert grammar.allowed([*start, TOKENIZER.id_of("d")], 99) == [STOP]
    assert grammar.allowed([*start, TOKENIZER.id_of("d▁;")], 99) == [TOKENIZER.id_of("▁")]


def test_every_stop_token():
    """PaliGemma 2 has two of them, and each may end what the other may."""
    grammar = grammar_of("detect cat", model(stops=(1, 7)))
    assert {1, 7} <= set(grammar.allowed([], 99))
    assert {1, 7} <= set(grammar.allowed(ids_of("<loc0000><loc0000><loc0001><loc0001> cat"), 99))


edges = st.lists(st.integers(0, 1023), min_size=2, max_size=2, unique=True).map(sorted)
shape_codes = st.lists(st.integers(0, 127), min_size=16, max_size=16)
one_object = st.tuples(edges, edges, st.sampled_from(["cat", "a cod", "d"]), shape_codes)


@given(st.lists(one_object, max_size=3), st.booleans())
def test_what_training_would_show_is_allowed(objects, shapes):
    """Any list of objects as `to_text` writes it, tokenized as a whole, passes token by token, in just enough room."""
    prompt = "segment cat ; a cod;d" if shapes else "detect cat ; a cod;d"
    text = " ; ".join("".join(f"<loc{place:04}>" for place in (y0, x0, y1, x1))
                      + "".join(f"<seg{code:03}>" for code in codes if shapes) + f" {label}"
                      for (y0, y1), (x0, x1), label, codes in objects)
    grammar, ids = grammar_of(prompt), [*ids_of(text), STOP]
    for place, id in enumerate(ids):
        assert id in grammar.allowed(ids[:place], len(ids) - place), TOKENIZER.token_of(id)


# --- with a model -----------------------------------------------------------------------------------------------------

def check(text, labels, shapes):
    """Nothing but valid objects: as many as there are semicolons and one, all with labels that were asked for."""
    found = parse(text, 1023, 1023)
    place, code = r"<loc\d{4}>", r"<seg\d{3}>"
    one = f"(?:{place}){{4}}(?:{code}){{{16 if shapes else 0}}} (?:{'|'.join(labels)})"
    assert re.fullmatch(f"(?:{one}(?: ; {one})*)?", text), text
    assert len(found) == (text.count(";") + 1 if text else 0)
    assert {detection.label for detection in found} <= set(labels)
    return len(found)


ways = st.sampled_from(["greedy", "sampling", "beam search", "best of n"])


@given(seeds, ways, st.integers(1, 60), st.booleans(), st.sampled_from([["cat"], ["cat", "cad", "a hot dog"]]))
def test_every_answer_parses(seed, way, room, shapes, labels):
    """Whatever the weights, the way to decode and the room: what is written is whole."""
    random = model(seed)
    prompt = ("segment " if shapes else "detect ") + " ; ".join(labels)
    grammar, features, ids = grammar_of(prompt, random), random_features(random), encode_prompt(prompt, random)
    decoding = Decoding(5.0 if way in ("sampling", "best of n") else 0.0, seed=seed, max_new_tokens=room)
    answers = {"greedy": lambda: generate(random, features, [ids], decoding, grammar=grammar),
               "sampling": lambda: generate(random, features, [ids], decoding, grammar=grammar),
               "beam search": lambda: beam_search(random, features, ids, 3, room, grammar),
               "best of n": lambda: best_of(random, features, ids, 3, decoding, grammar)}[way]()
    for answer in answers:
        assert answer.stopped_by == "eos" and len(answer.ids) < room
        check(TOKENIZER.decode(answer.ids), labels, shapes)


def random_features(random):
    return random.features_of(random_pixels(random.cfg, 1, np.random.default_rng(1)))


def test_every_room():
    """An object takes 4 places, "▁ca", "t" and the end: none in a room of 6, one from 7 on, two from 7 + 7 on."""
    random, most = model(), []
    grammar, ids = grammar_of("detect cat", random), encode_prompt("detect cat", random)
    for room in range(1, 16):
        decoding = Decoding(5.0, seed=room, max_new_tokens=room)
        found = best_of(random, random_features(random), ids, 20, decoding, grammar)
        found += beam_search(random, random_features(random), ids, 3, room, grammar)
        assert {answer.stopped_by for answer in found} == {"eos"}
        most.append(max(check(TOKENIZER.decode(answer.ids), ["cat"], False) for answer in found))
    assert most == [0] * 6 + [1] * 7 + [2] * 2


def test_there_are_boxes():
    """The same with a hot sampler and much room: nearly all answers hold boxes, and many hold several."""
    random = model()
    grammar, ids = grammar_of("detect cat ; hot", random), encode_prompt("detect cat ; hot", random)
    found = best_of(random, random_features(random), ids, 40, Decoding(5.0, seed=1, max_new_tokens=60), grammar)
    counts = [check(TOKENIZER.decode(answer.ids), ["cat", "hot"], False) for answer in found]
    assert np.count_nonzero(counts) > 35 and max(counts) > 2
    labels = {detection.label for answer in found for detection in parse(TOKENIZER.decode(answer.ids), 9, 9)}
    assert labels == {"cat", "hot"}


def test_without_grammar_nothing_is_masked():
    """The random model's own answer is no box: the grammar made it one."""
    random = model()
    ids = encode_prompt("detect cat", random)
    [free] = generate(random, random_features(random), [ids], Decoding(max_new_tokens=20))
    assert parse(TOKENIZER.decode(free.ids), 9, 9) == []


def test_values_are_those_of_the_model():
    """The grammar says what may be written; how probable that is, the model still says."""
    random, prompt = model(), "detect cat"
    ids, features, grammar = encode_prompt(prompt, random), random_features(random), grammar_of(prompt, random)
    [held] = generate(random, features, [ids], Decoding(max_new_tokens=8), grammar=grammar)
    [free] = generate(random, features, [ids], Decoding(max_new_tokens=1))
    assert held.ids and held.logprobs[0] < free.logprobs[0]
    assert held.logprob < -5 * len(held.ids), "about 1400 words, none of which the model knows"
    [beam, *_] = beam_search(random, features, ids, 1, 8, grammar)
    assert (beam.ids, beam.logprobs, beam.stop_logprob) == (held.ids, held.logprobs, held.stop_logprob)


# --- what is refused --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("prompt", [
    "", "caption en", "detect", "detect ", "detect ; ;", "segmentation cat", "Detect cat"])
def test_other_prompts(prompt):
    with pytest.raises(InputError, match="--constrain: expected a prompt such as"):
        grammar_of(prompt)


def test_labels_that_are_places():
    for label in ["<loc0001>", "cat <loc0001>"]:
        with pytest.raises(InputError, match="--constrain: <loc> and <seg> cannot be labels"):
            grammar_of(f"detect {label}")


def test_blanks_in_a_prompt():
    """However many there are, the label is the one that `parse` reads."""
    grammar, plain = grammar_of("  detect   a  cat;; cat ; a cat \n"), grammar_of("detect a cat ; cat")
    assert (grammar.again, grammar.last) == (plain.again, plain.last)


def test_tokenizers_that_cannot():
    """None, one without <seg>, and one with tokens that the model has no embedding for."""
    with pytest.raises(InputError, match="--constrain: .*no tokenizer"):
        Grammar([2, 5], model(tokenizer=None))
    spec = tokenizer_spec()
    for token in spec["added_tokens"]:
        token["content"] = token["content"].replace("<seg", "<gap")
    bare = model(tokenizer=Tokenizer(spec))
    grammar_of("detect cat", bare)
    with pytest.raises(InputError, match="no <seg000>"):
        grammar_of("segment cat", bare)
    few = model()
    cfg = dataclasses.replace(few.cfg, text_config=dataclasses.replace(few.cfg.text_config, vocab_size=LOC + 1023))
    with pytest.raises(InputError, match="--constrain: id .* outside the vocabulary"):
        grammar_of("detect cat", dataclasses.replace(few, cfg=cfg))
