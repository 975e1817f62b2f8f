"""Beam search against trying everything, and every log-probability against a pass without a cache."""
import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
from helpers import (
    DeviceArray,
    assert_close,
    paligemma_configs,
    random_params,
    random_pixels,
    seeds,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from small_models import BOS, CONFIG, IDS, NEWLINE, PATCHES, write_model

from minipali.backend import mapped
from minipali.checkpoint.config import parse_config
from minipali.decoding import generate as generating
from minipali.decoding.generate import generate
from minipali.decoding.loaded_model import Model, load_model
from minipali.decoding.sampling import Decoding
from minipali.decoding.search import beam_search, best, best_of, encode_answer, score
from minipali.errors import InputError
from minipali.model.gemma import output_logits
from minipali.model.ops import log_softmax
from minipali.model.paligemma import forward, output_head


@st.composite
def tiny(draw, words):
    """A random model in float64 with so few words that every answer can be tried -> model, features, prompt."""
    cfg, vocab, rng = draw(paligemma_configs()), draw(words), np.random.default_rng(draw(seeds))
    text = dataclasses.replace(cfg.text_config, vocab_size=vocab)
    stops = draw(st.sampled_from([(1,), (0,), (vocab - 1, 1)]))
    cfg = dataclasses.replace(cfg, text_config=text, image_token_index=vocab, eos_token_ids=stops)
    model = Model(Path("tiny"), cfg, None, None, "numpy", random_params(cfg, rng))
    features = model.features_of(random_pixels(cfg, 1, rng))
    return model, features, rng.integers(0, vocab, draw(st.integers(1, 4))).tolist()


END = -1  # whichever stop token


def truth(model, features, prompt, answers):
    """For each list of ids the log-probability of each, from whole sequences without a cache; END is any stop token."""
    stops = list(model.cfg.eos_token_ids)
    lengths = np.array([len(prompt) + len(answer) for answer in answers])
    ids = np.zeros((len(answers), lengths.max()), int)
    for row, answer in zip(ids, answers):
        row[:len(prompt) + len(answer)] = [*prompt, *(stops[0] if token == END else token for token in answer)]
    prefix_len = np.full(len(answers), features.shape[1] + len(prompt))
    repeated = np.repeat(features, len(answers), axis=0)
    x = forward(repeated, ids, lengths, prefix_len, model.params, model.cfg)[:, len(prompt) - 1:]
    logprobs = log_softmax(output_logits(x, output_head(model.params, model.cfg), model.cfg.text_config))
    return [np.array([np.log(np.exp(logprobs[row, t, stops]).sum()) if token == END else logprobs[row, t, token]
                      for t, token in enumerate(answer)]) for row, answer in enumerate(answers)]


def everything(model, room):
    """Every answer of up to `room` tokens: those that end, each once, and those that are cut off."""
    stops = model.cfg.eos_token_ids
    words = [word for word in range(model.cfg.text_config.vocab_size) if word not in stops]
    ended = [(*text, END) for n in range(room) for text in itertools.product(words, repeat=n)]
    return ended + list(itertools.product(words, repeat=room))


def without_end(ids):
    return [id for id in ids if id != END]


def values(answer):
    """All log-probabilities of an Answer, the stop token's last if there is one."""
    return answer.logprobs + ([] if answer.stop_logprob is None else [answer.stop_logprob])


def check_against_truth(model, features, prompt, answers):
    """Every value is that of a pass without a cache; the last that of ending, by any of several stop tokens."""
    for answer in answers:
        assert (answer.stopped_by == "eos") == (answer.stop_logprob is not None)
        end = [END] if answer.stopped_by == "eos" else []
        [expected] = truth(model, features, prompt, [[*answer.ids, *end]])
        assert_close("log-probabilities", np.array(values(answer)), expected, "reordered")
        assert answer.logprob == pytest.approx(expected.sum(), rel=1e-12)


# --- beam search ------------------------------------------------------------------------------------------------------

@given(tiny(st.integers(3, 6)), st.integers(1, 4))
def test_a_wide_beam_is_brute_force(drawn, room):
    """Wide enough to hold every beginning, it finds every answer, in order, with its sum; together they are certain."""
    model, features, prompt = drawn
    answers = everything(model, room)
    sums = np.array([logprobs.sum() for logprobs in truth(model, features, prompt, answers)])
    np.testing.assert_allclose(np.exp(sums).sum(), 1, rtol=1e-12)
    order = np.argsort(-sums)
    assume(sums[order[0]] - sums[order[1]] > 1e-9 if len(sums) > 1 else True)  # of equals, rounding decides
    found = beam_search(model, features, prompt, len(answers), room)
    assert_close("sums", np.array([beam.logprob for beam in found]), sums[order], "reordered")
    likeliest = answers[order[0]]
    assert found[0].ids == without_end(likeliest)
    assert found[0].stopped_by == ("eos" if likeliest[-1] == END else "length")
    assert sorted(beam.ids for beam in found) == sorted(map(without_end, answers))
    assert len({tuple(beam.ids) for beam in found}) == len(found), "no text twice"
    check_against_truth(model, features, prompt, found[:20])


def textbook(model, features, prompt, beams, room):
    """Beam search with whole sequences and no cache, to the last step: [(ids, sum)], the likeliest first."""
    stops = model.cfg.eos_token_ids
    steps = [*(token for token in range(model.cfg.text_config.vocab_size) if token not in stops), END]
    live, ended = [()], []
    for _ in range(room):
        longer = [(*ids, token) for ids in live for token in steps]
        sums = {ids: found.sum() for ids, found in zip(longer, truth(model, features, prompt, longer))}
        longer.sort(key=lambda ids: -sums[ids])
        best = [sums[ids] for ids in longer[:2 * beams + 1]]
        assume(all(a - b > 1e-9 for a, b in itertools.pairwise(best)))  # of equals, rounding decides
        ended += [(ids, sums[ids]) for ids in longer[:beams] if ids[-1] == END]
        live = [ids for ids in longer if ids[-1] != END][:beams]
    return sorted(ended + [(ids, sums[ids]) for ids in live], key=lambda pair: -pair[1])[:beams]


@given(tiny(st.integers(3, 9)), st.integers(1, 5), st.integers(1, 6))
def test_a_narrow_beam_is_the_textbook_loop(drawn, beams, room):
    """At any width; that ours stops as soon as nothing can change any more changes nothing."""
    model, features, prompt = drawn
    found, expected = beam_search(model, features, prompt, beams, room), textbook(model, features, prompt, beams, room)
    assert [beam.ids for beam in found] == [without_end(ids) for ids, _ in expected]
    sums = np.array([total for _, total in expected])
    assert_close("sums", np.array([beam.logprob for beam in found]), sums, "reordered")
    check_against_truth(model, features, prompt, found)


@given(tiny(st.integers(3, 9)), st.integers(1, 8))
def test_a_beam_of_one_is_greedy(drawn, room):
    """The same tokens with the same values, and not one step more. (Of several stop tokens the greedy choice takes the
    likeliest token, as everybody's does, and a beam the likeliest way to go on: to end is one.)"""
    model, features, prompt = drawn
    assume(len(model.cfg.eos_token_ids) == 1)
    with pytest.MonkeyPatch.context() as patch:
        calls = count_calls(patch)
        [greedy] = generate(model, features, [prompt], Decoding(max_new_tokens=room))
        greedy_calls = dict(calls)
        calls.update(prefill=[], decode=0)
        [beam] = beam_search(model, features, prompt, 1, room)
        assert calls == greedy_calls
    assert (beam.ids, beam.stopped_by, values(beam)) == (greedy.ids, greedy.stopped_by, values(greedy))


def count_calls(patch):
    """{"prefill": [rows of each call], "decode": calls} from now on."""
    calls = {"prefill": [], "decode": 0}
    prefill, decode = generating.prefill, generating.decode

    def counted_prefill(features, *args):
        calls["prefill"].append(len(features))
        return prefill(features, *args)

    def counted_decode(*args):
        calls["decode"] += 1
        return decode(*args)
    patch.setattr(generating, "prefill", counted_prefill)
    patch.setattr(generating, "decode", counted_decode)
    return calls


def small(vocab, **fields):
    """One model that is the same in every run -> model, features, prompt."""
    cfg, rng = parse_config(CONFIG), np.random.default_rng(0)
    cfg = dataclasses.replace(cfg, text_config=dataclasses.replace(cfg.text_config, vocab_size=vocab), **fields)
    model = Model(Path("small"), cfg, None, None, "numpy", random_params(cfg, rng))
    return model, model.features_of(random_pixels(cfg, 1, rng)), [2, 4]


def test_equal_sums():
    """All words equally likely: the earlier beam first, then the lower id; and then nothing can overtake any more."""
    model, features, prompt = small(5)
    model, steps = dataclasses.replace(model, params=mapped(model.params, np.zeros_like)), []
    found = beam_search(model, features, prompt, 2, 9, on_step=lambda *lists: steps.append(
        [[beam.ids for beam in beams] for beams in lists]))
    assert steps == [[[[0], [2]], [[]]], [[[0, 0], [0, 2]], [[], [0]]]]
    assert [(beam.ids, beam.stopped_by) for beam in found] == [([], "eos"), ([0], "eos")]
    assert [beam.logprob for beam in found] == pytest.approx([-np.log(5), -2 * np.log(5)])


def chain(table):
    """A model whose next word depends on the last one alone: row i of the table says how probable each word is then."""
    model, features, _ = small(len(table), tie_word_embeddings=False)
    params, D = mapped(model.params, np.zeros_like), model.cfg.text_config.hidden_size
    params["language_model"]["model"]["embed_tokens"]["weight"][:, :len(table)] = np.eye(len(table))
    head = np.zeros((len(table), D))
    head[:, :len(table)] = np.log(np.array(table)).T / np.sqrt(D)
    params["language_model"]["lm_head"] = {"weight": head}
    return dataclasses.replace(model, params=params), features, [0]


def test_a_beam_overtakes_those_that_have_ended():
    """Two have ended early, and the search goes on, since "a c" is still likelier than the second of them."""
    start, stop, a, b, c = range(5)
    table = np.full((5, 5), 1e-6)
    table[start, [a, stop, b]] = 0.59, 0.4, 0.01
    table[a, [c, stop]] = 0.9, 0.1
    table[b, b] = table[c, stop] = 1
    model, features, prompt = chain(table / table.sum(1, keepdims=True))
    steps = []
    found = beam_search(model, features, prompt, 2, 9, on_step=lambda live, ended: steps.append([e.ids for e in ended]))
    assert steps == [[[]], [[], [a]], [[a, c], []]]
    assert [(beam.ids, beam.stopped_by) for beam in found] == [([a, c], "eos"), ([], "eos")]
    assert [beam.logprob for beam in found] == pytest.approx(np.log([0.59 * 0.9, 0.4]), abs=1e-4)


def test_ends_of_one_text_are_one_answer():
    """Two stop tokens of 0.3 each and "a" of 0.4: to end at once is the likeliest answer, and no text comes twice."""
    start, stop, a, other_stop = range(4)
    table = np.full((4, 4), 1e-9)
    table[start, [stop, a, other_stop]] = 0.3, 0.4, 0.3
    table[a, [stop, other_stop, a]] = 0.5, 0.25, 0.25
    model, features, prompt = chain(table / table.sum(1, keepdims=True))
    for stops in [(stop, other_stop), (other_stop, stop), (stop, other_stop, stop)]:
        model = dataclasses.replace(model, cfg=dataclasses.replace(model.cfg, eos_token_ids=stops))
        found = beam_search(model, features, prompt, 3, 3)
        assert [beam.ids for beam in found] == [[], [a], [a, a]]
        assert [beam.logprob for beam in found] == pytest.approx(np.log([0.6, 0.4 * 0.75, 0.4 * 0.25 * 0.75]), abs=1e-6)
        assert [s.logprob for s in score(model, features, prompt, [[stop], [other_stop], [a, other_stop]])] == (
            pytest.approx(np.log([0.6, 0.6, 0.3]), abs=1e-6))
        [greedy] = generate(model, features, [prompt], Decoding(max_new_tokens=3))
        assert (greedy.ids, greedy.stop_logprob) == ([a], pytest.approx(np.log(0.75), abs=1e-6))


@given(st.integers(1, 4), st.integers(1, 7), st.integers(1, 30), seeds)
def test_best(rows, width, count, seed):
    """As sorting everything would have it; many are equal, and some are forbidden."""
    scores = np.random.default_rng(seed).integers(-2, 2, (rows, width)).astype(float)
    scores[scores == -2] = -np.inf
    places = [place for place in np.ndindex(rows, width) if scores[place] > -np.inf]
    assert best(scores, count) == sorted(places, key=lambda place: (-scores[place], place))[:count]


# --- the best of n ----------------------------------------------------------------------------------------------------

@given(tiny(st.integers(3, 9)), st.integers(1, 6), seeds, st.sampled_from([(None, 1.0), (2, 1.0), (None, 0.7)]))
def test_best_of_is_that_many_rows(drawn, count, seed, cuts):
    """The samples are those of as many prompts that were read one by one; they come sorted by the model's own sum."""
    model, features, prompt = drawn
    decoding = Decoding(1.7, *cuts, seed=seed, max_new_tokens=5)
    found = best_of(model, features, prompt, count, decoding)
    rows = generate(model, np.repeat(features, count, axis=0), [prompt] * count, decoding)
    assert sorted(beam.ids for beam in found) == sorted(row.ids for row in rows)
    sums = [beam.logprob for beam in found]
    assert sums == sorted(sums, reverse=True)
    assert sums == pytest.approx(sorted((row.logprob for row in rows), reverse=True), rel=1e-12)
    check_against_truth(model, features, prompt, found)


# --- the score of a given answer --------------------------------------------------------------------------------------

@given(tiny(st.integers(3, 9)), st.lists(st.lists(st.integers(0, 2), max_size=5), min_size=1, max_size=4))
def test_score(drawn, texts):
    """Answers of any length together, the empty one too, against each alone without a cache."""
    model, features, prompt = drawn
    answers = [[*text, model.cfg.eos_token_ids[-1]] for text in texts]
    scored = score(model, features, prompt, answers)
    assert [found.ids for found in scored] == texts
    for found, answer in zip(scored, answers):
        [expected] = truth(model, features, prompt, [[*answer[:-1], END]])
        assert_close("log-probabilities", np.array([*found.logprobs, found.stop_logprob]), expected, "reordered")
        assert found.logprob == pytest.approx(expected.sum(), rel=1e-12)


@given(tiny(st.integers(3, 9)), seeds)
def test_score_of_what_was_written(drawn, seed):
    """However an answer was found, its sum is its score; temperature and top-k have no part in it."""
    model, features, prompt = drawn
    for decoding in [Decoding(max_new_tokens=6), Decoding(3.0, 2, seed=seed, max_new_tokens=6)]:
        answers = generate(model, features, [prompt], decoding) + beam_search(model, features, prompt, 3, 6)
        check_against_truth(model, features, prompt, answers)
        for answer in answers:
            if answer.stopped_by == "eos":
                [scored] = score(model, features, prompt, [[*answer.ids, model.cfg.eos_token_ids[-1]]])
                assert_close("log-probabilities", np.array(values(scored)), np.array(values(answer)), "reordered")


# --- all of them ------------------------------------------------------------------------------------------------------

HOT = Decoding(temperature=2.0, seed=1, max_new_tokens=4)
WAYS = {
    "beam search": lambda model, features, prompt: beam_search(model, features, prompt, 3, 4),
    "best of n": lambda model, features, prompt: best_of(model, features, prompt, 3, HOT),
    "score": lambda model, features, prompt: score(model, features, prompt, [[5, 6, 1], [4, 1], [1]]),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_prompt_is_read_once(way, monkeypatch):
    """One row through the prefill, whatever number of rows goes on from it; and the seconds are told."""
    calls = count_calls(monkeypatch)
    found = WAYS[way](*small(9))
    assert calls["prefill"] == [1] and 1 <= calls["decode"] <= 3 and len(found) == 3
    assert all(answer.prefill_seconds > 0 and answer.decode_seconds > 0 for answer in found)


@pytest.mark.parametrize("way", WAYS)
def test_on_a_device(way):
    """The rows of a cache that is elsewhere are chosen there, and the same answers come back to the host."""
    model, features, prompt = small(9)
    moved = dataclasses.replace(model, params=mapped(model.params, DeviceArray))
    here, there = WAYS[way](model, features, prompt), WAYS[way](moved, DeviceArray(features), prompt)
    assert [(a.ids, values(a)) for a in here] == [(a.ids, values(a)) for a in there]


@pytest.mark.parametrize("way", WAYS)
def test_damaged_weights(way):
    """Scores that are no numbers choose and score nothing."""
    model, features, prompt = small(9)
    model.params["language_model"]["model"]["norm"]["weight"][:] = np.nan
    with pytest.raises(InputError, match="not all finite"):
        WAYS[way](model, features, prompt)


def test_positions_run_out():
    """As far as the model's positions go and no further, which is one token here."""
    model, features, _ = small(9)
    prompt = [4] * (model.cfg.text_config.max_position_embeddings - PATCHES - 1)
    assert {len(values(beam)) for beam in beam_search(model, features, prompt, 3, 4)} == {1}
    assert {len(values(sample)) for sample in best_of(model, features, prompt, 3, HOT)} == {1}


def test_encode_answer(tmp_path):
    """Tokens, then the stop token, up to the last position; what cannot be scored is refused in one line."""
    model = load_model(write_model(tmp_path))
    prompt = [BOS, NEWLINE]
    prefix_len = PATCHES + len(prompt)
    assert encode_answer("", prefix_len, model) == [1]
    assert encode_answer("a<loc0007> <eos>", prefix_len, model)[:3] == [IDS["a"], IDS["<loc0007>"], IDS["▁"]]
    assert encode_answer("<eos>", prefix_len, model).count(1) == 1, "a control token's name is text"
    room = model.cfg.text_config.max_position_embeddings - prefix_len
    longest = encode_answer("a" * (room - 1), prefix_len, model)
    image = model.features_of(random_pixels(model.cfg, 1, np.random.default_rng(0), np.float32))
    assert len(values(score(model, image, prompt, [longest])[0])) == room
    with pytest.raises(InputError, match="--score: 65 tokens.*64 positions"):
        encode_answer("a" * room, prefix_len, model)
    with pytest.raises(InputError, match="--score: .*no tokenizer"):
        encode_answer("a", prefix_len, dataclasses.replace(model, tokenizer=None))
    cfg = dataclasses.replace(model.cfg, text_config=dataclasses.replace(model.cfg.text_config, vocab_size=300))
    with pytest.raises(InputError, match="--score: id .* outside the vocabulary"):
        encode_answer("<loc0100>", prefix_len, dataclasses.replace(model, cfg=cfg))
