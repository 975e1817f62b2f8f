"""Answers to several prompts at once are the answers to each alone, and every limit is kept."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
from golden.make_tokenizer_golden import awkward
from helpers import GOLDEN_FILES, assert_close, random_pixels
from PIL import Image
from small_models import BOS, EOS, IDS, IMAGE, NEWLINE, PATCHES, PROMPTS, write_model

from minipali.decoding import generate as generating
from minipali.decoding import loaded_model
from minipali.decoding.generate import generate
from minipali.decoding.loaded_model import (
    check_ids,
    encode_prompt,
    load_model,
    open_model,
)
from minipali.decoding.sampling import Decoding
from minipali.errors import InputError
from minipali.inputs.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model(folder):
    return load_model(folder)


def features(model, count, seed=0):
    """As many different pictures, encoded."""
    pixels = random_pixels(model.cfg, count, np.random.default_rng(seed))
    return model.features_of(pixels.astype(model.params["multi_modal_projector"]["linear"]["weight"].dtype))


def with_eos(model, *ids):
    """The same model, stopping at other tokens."""
    return replace(model, cfg=replace(model.cfg, eos_token_ids=ids))


def spy(monkeypatch, name, module=generating):
    """Collect what a function of the module returns."""
    results, original = [], getattr(module, name)

    def call(*args):
        results.append(original(*args))
        return results[-1]
    monkeypatch.setattr(module, name, call)
    return results


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_together_as_alone(folder, dtype, monkeypatch):
    """Prompts of different length about different pictures: the same tokens, and logits within the table."""
    model, decoding = load_model(folder, dtype), Decoding(max_new_tokens=6)
    pictures = features(model, len(PROMPTS))
    first, later = spy(monkeypatch, "prefill"), spy(monkeypatch, "decode")
    together = generate(model, pictures, PROMPTS, decoding)
    batch = np.stack([first.pop(), *(logits[:, 0] for logits in later)], axis=1)
    for row, prompt in enumerate(PROMPTS):
        later.clear()
        [alone] = generate(model, pictures[row:row + 1], [prompt], decoding)
        assert together[row].ids == alone.ids and together[row].stopped_by == alone.stopped_by
        logits = np.stack([first.pop(), *(logits[:, 0] for logits in later)], axis=1)
        assert logits.dtype == dtype
        assert_close(f"logits of row {row}", batch[row:row + 1], logits, "reordered")


def test_rows_that_end_early_disturb_nobody(model):
    """With one row's third token as the stop token that row ends; those who never say it go on as before."""
    pictures, decoding = features(model, len(PROMPTS)), Decoding(max_new_tokens=8)
    free = [answer.ids for answer in generate(model, pictures, PROMPTS, decoding)]
    assert len({tuple(ids) for ids in free}) > 1
    for stop in {ids[2] for ids in free}:
        answers = generate(with_eos(model, stop), pictures, PROMPTS, decoding)
        for answer, ids in zip(answers, free):
            cut = ids[:ids.index(stop)] if stop in ids else ids
            assert answer.ids == cut and answer.stopped_by == ("eos" if stop in ids else "length")


def test_sampling_together_as_alone(model):
    """What a row draws depends on the seed and its place, not on how long the other rows go on."""
    pictures, decoding = features(model, 2), Decoding(temperature=2.0, seed=5, max_new_tokens=8)
    two = [PROMPTS[1], PROMPTS[3]]
    free = generate(model, pictures, two, decoding)
    assert [answer.ids for answer in generate(model, pictures, two, decoding)] == [answer.ids for answer in free]
    stop = free[0].ids[0]
    stopped = generate(with_eos(model, stop), pictures, two, decoding)
    other = free[1].ids[:free[1].ids.index(stop)] if stop in free[1].ids else free[1].ids
    assert stopped[0].ids == [] and stopped[1].ids == other and len(other) > 1
    [alone] = generate(model, pictures[:1], two[:1], decoding)
    assert alone.ids == free[0].ids
    other = generate(model, pictures, two, Decoding(temperature=2.0, seed=6, max_new_tokens=8))
    assert other[0].ids != free[0].ids
    twins = generate(model, pictures[[0, 0]], [PROMPTS[1]] * 2, decoding)
    assert twins[0].ids != twins[1].ids, "two rows of one prompt are two draws"


def test_rows_that_have_ended_leave_the_batch(model, monkeypatch):
    """Only those that go on are computed, each with its own keys and values; on_token tells of answers, not of rows."""
    pictures, calls = features(model, len(PROMPTS)), []
    free = [answer.ids for answer in generate(model, pictures, PROMPTS, Decoding(max_new_tokens=8))]
    stops = [free[0][0], free[2][3]]
    expected = [next((ids[:i] for i, id in enumerate(ids) if id in stops), ids) for ids in free]
    assert len({len(ids) for ids in expected}) > 1
    steps = spy(monkeypatch, "decode")
    answers = generate(with_eos(model, *stops), pictures, PROMPTS, Decoding(max_new_tokens=8),
                       lambda row, id: calls.append((row, id)))
    assert [answer.ids for answer in answers] == expected
    assert [len(logits) for logits in steps] == [
        rows for step in range(1, 8) if (rows := sum(len(ids) >= step for ids in expected))]
    assert calls == [(row, ids[step]) for step in range(8) for row, ids in enumerate(expected) if step < len(ids)]


def test_log_probabilities_for_who_asks(model, monkeypatch):
    """The same tokens without them, and then none is computed."""
    pictures, decoding = features(model, 2), Decoding(max_new_tokens=5)
    asked = generate(model, pictures, PROMPTS[:2], decoding)
    assert all(len(answer.logprobs) == len(answer.ids) == 5 for answer in asked)
    stop = asked[0].ids[2]
    stopped = generate(with_eos(model, stop), pictures, PROMPTS[:2], decoding)
    assert stopped[0].stop_logprob == asked[0].logprobs[asked[0].ids.index(stop)]
    monkeypatch.setattr(generating, "log_prob", None)
    for eos in [(), (stop,)]:
        silent = generate(with_eos(model, *eos), pictures, PROMPTS[:2], decoding, logprobs=False)
        assert [answer.ids for answer in silent] == [answer.ids for answer in (stopped if eos else asked)]
        assert all(answer.logprobs == [] and answer.stop_logprob is None for answer in silent)


def test_on_token_in_order(model):
    """Each token as soon as it is known, row by row within a step, and the stop token never."""
    pictures, calls = features(model, 2), []
    answers = generate(model, pictures, PROMPTS[:2], Decoding(max_new_tokens=3), lambda *call: calls.append(call))
    assert calls == [(row, answers[row].ids[step]) for step in range(3) for row in range(2)]
    calls.clear()
    stop = answers[0].ids[1]
    answers = generate(with_eos(model, stop), pictures[:1], PROMPTS[:1], Decoding(max_new_tokens=3),
                       lambda *call: calls.append(call))
    assert calls == [(0, token) for token in answers[0].ids] and stop not in answers[0].ids


# --- limits -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("count", [1, 2, 7])
def test_max_new_tokens(model, count, monkeypatch):
    """So many tokens, and no decoding step whose result nobody reads."""
    steps = spy(monkeypatch, "decode")
    [answer] = generate(model, features(model, 1), PROMPTS[:1], Decoding(max_new_tokens=count))
    assert len(answer.ids) == count and answer.stopped_by == "length" and len(steps) == count - 1
    assert answer.prefill_seconds > 0 and answer.decode_seconds > 0


def test_positions_run_out(model):
    """The longest row may fill the model's positions, and no further."""
    room = model.cfg.text_config.max_position_embeddings - PATCHES - len(PROMPTS[1])
    for most in [room, room + 3]:
        answers = generate(model, features(model, 2), PROMPTS[:2], Decoding(max_new_tokens=most))
        assert [len(answer.ids) for answer in answers] == [room, room]
    prefix = generating.read_prefix(model, features(model, 2), PROMPTS[:2], 10**9)
    assert prefix.room == room, "or there would be memory for all of them"


def test_stops_at_any_stop_token(model):
    """PaliGemma 2 has two of them. At the first step nothing is left of the answer."""
    pictures = features(model, 1)
    [answer] = generate(model, pictures, PROMPTS[:1], Decoding(max_new_tokens=4))
    for ids in [(EOS, answer.ids[0]), (answer.ids[0], EOS)]:
        [empty] = generate(with_eos(model, *ids), pictures, PROMPTS[:1], Decoding(max_new_tokens=4))
        assert empty.ids == [] and empty.stopped_by == "eos"


def test_pictures_are_encoded_once(model, monkeypatch):
    """Features are made of each picture once; prompts and tokens after that never look at pixels again."""
    towers = spy(monkeypatch, "image_features", loaded_model)
    images = [Image.new("RGB", (20, 10), color) for color in ["red", "blue"]]
    found = model.features(images)
    assert len(towers) == 1 and found.shape == (2, PATCHES, 32)
    generate(model, found[[0, 1, 1]], PROMPTS[:3], Decoding(max_new_tokens=5))
    assert len(towers) == 1
    assert_close("one picture alone", model.features(images[1:]), found[1:], "reordered")


def test_damaged_weights(model):
    """Scores that are no numbers choose no token, greedily or not."""
    broken = replace(model, params=dict(model.params))
    tower = dict(broken.params["language_model"]["model"])
    tower["norm"] = {"weight": np.full(32, np.nan, np.float32)}
    broken.params["language_model"] = {"model": tower}
    for temperature in [0.0, 1.0]:
        with pytest.raises(InputError, match="not all finite"):
            generate(broken, features(model, 1), PROMPTS[:1], Decoding(temperature))


# --- models and prompts -----------------------------------------------------------------------------------------------

def test_open_model_reads_no_weights(folder, monkeypatch):
    """What can be wrong with a folder or a prompt is known before gigabytes are read."""
    monkeypatch.setattr(loaded_model, "load_any", None)
    model = open_model(folder)
    assert model.params is None and encode_prompt("ab", model) == [BOS, IDS["a"], IDS["b"], NEWLINE]


def test_encode_prompt(model):
    """BOS, the text, a newline; names of control tokens are text, places are tokens, and empty is allowed."""
    assert encode_prompt("", model) == [BOS, NEWLINE]
    for name in ["<eos>", "<pad>", "<unk>", "a<image>", "a<bos>", " <bos>", "<image", "<image>a<image>", "<bos>a<bos>"]:
        ids = encode_prompt(name, model)
        assert ids[0] == BOS and len(ids) > 3 and not {0, 1, 2, 3, IMAGE} & set(ids[1:])
        assert model.tokenizer.decode(ids) == re.sub("^(<image>|<bos>)", "", name) + "\n"
    assert encode_prompt("<loc0100>", model) == [BOS, IDS["<loc0100>"], NEWLINE]
    with pytest.raises(InputError, match="--prompt-ids"):
        encode_prompt("a", replace(model, tokenizer=None))


@pytest.mark.parametrize("case", json.loads((GOLDEN_FILES / "prompts.json").read_text())["cases"])
def test_a_prompt_may_begin_as_the_hubs_processor_wants_it(model, case):
    """With <image> for each picture, and BOS or not: the ids are the hub's, and it is said that they are left out."""
    awkward_model = replace(model, tokenizer=Tokenizer(awkward("bytes")))
    prompt, pictures, notes = case["prompt"], case["pictures"], []
    for leading in ["", "<bos>", "<image>" * pictures, "<image>" * pictures + "<bos>", "<bos>" + "<image>" * pictures]:
        notes.clear()
        assert encode_prompt(leading + prompt, awkward_model, pictures, notes.append) == case["ids"]
        assert len(notes) == bool(leading) and all(leading in note and "\n" not in note for note in notes)


@pytest.mark.parametrize("prompt, pictures",
                         [("<image>", 0), ("<image><image>a", 1), ("<image>a", 2), ("<bos><image>", 3)])
def test_another_number_of_image_tokens_is_refused(model, prompt, pictures):
    with pytest.raises(InputError, match=rf"<image>, expected one for each picture \({pictures}\), or none"):
        encode_prompt(prompt, model, pictures)


def test_check_ids(model):
    """Each limit with the first id beyond it, and the last within."""
    limit = model.cfg.text_config.max_position_embeddings - PATCHES
    check_ids([0, IMAGE - 1], model.cfg)
    check_ids([5] * (limit - 1), model.cfg)
    check_ids([5] * (limit - 1 - 2 * PATCHES), model.cfg, pictures=3)
    with pytest.raises(InputError, match="64 tokens .* 64 positions"):
        check_ids([5] * (limit - 2 * PATCHES), model.cfg, pictures=3)
    for ids, reason in [([], "at least one"), ([-1], "outside the vocabulary"), ([IMAGE + 1], "outside the vocabulary"),
                        ([IMAGE], "piece of the picture"), ([5] * limit, "64 positions")]:
        with pytest.raises(InputError, match=reason):
            check_ids(ids, model.cfg)
