"""Which tokens may be drawn, and that they are drawn as often as they should be."""
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minipali.decoding.sampling import Decoding, candidates, greedy, log_prob, log_probs, sample
from minipali.errors import InputError

seeds = st.integers(0, 2**32 - 1)


def draw_logits(seed, n, ties):
    """Normal logits; with `ties` rounded so coarsely that many are equal."""
    logits = 2 * np.random.default_rng(seed).normal(size=n)
    return np.round(logits) if ties else logits


def oracle(logits, temperature, top_k, top_p):
    """The definition, one token at a time."""
    ranked = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[:top_k]
    weights = [np.exp((logits[token] - max(logits)) / temperature) for token in ranked]
    kept, total = [], 0.0
    for token, weight in zip(ranked, weights):
        kept.append(token)
        total += weight / sum(weights)
        if total >= top_p and top_p < 1:
            break
    return kept, np.array(weights[:len(kept)]) / sum(weights[:len(kept)])


@given(seeds, st.integers(1, 10), st.booleans(), st.sampled_from([0.3, 1.0, 2.5]))
def test_candidates_are_those_of_the_definition(seed, n, ties, temperature):
    logits = draw_logits(seed, n, ties)
    before = logits.copy()
    for top_k, top_p in itertools.product([None, *range(1, n + 3)], [1e-9, 0.1, 0.5, 0.9, 0.999, 1.0]):
        tokens, probs = candidates(logits, temperature, top_k, top_p)
        expected_tokens, expected_probs = oracle(logits, temperature, top_k, top_p)
        assert tokens.tolist() == expected_tokens
        np.testing.assert_allclose(probs, expected_probs, rtol=1e-12)
    np.testing.assert_array_equal(logits, before)


def test_equals_at_the_cut_of_top_k():
    """Four tokens share the third place; those with the lowest ids get it."""
    logits = np.array([0.0, 1.0, 3.0, 1.0, 1.0, 2.0, 1.0])
    assert [candidates(logits, 1.0, k, 1.0)[0].tolist() for k in [2, 3, 4]] == [[2, 5], [2, 5, 1], [2, 5, 1, 3]]


@pytest.mark.parametrize("top_p, kept", [(0.4, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.8, 3), (1.0, 4)])
def test_nucleus_keeps_the_token_that_reaches_p(top_p, kept):
    """Probabilities 1/2, 1/4, 1/8, 1/8, exact in binary, so that p on the boundary is p on the boundary."""
    logits = np.log(np.array([0.125, 0.5, 0.125, 0.25]))
    tokens, probs = candidates(logits, 1.0, None, top_p)
    assert tokens.tolist() == [1, 3, 0, 2][:kept]
    np.testing.assert_allclose(probs.sum(), 1, rtol=1e-15)


def test_nucleus_is_that_of_what_top_k_left():
    """0.4, 0.3, 0.2, 0.1: of the best two the first has 4/7, which reaches 0.5; of all four it would have 0.4."""
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1]))
    assert candidates(logits, 1.0, 2, 0.5)[0].tolist() == [0]
    assert candidates(logits, 1.0, None, 0.5)[0].tolist() == [0, 1]


def test_temperature_comes_before_the_nucleus():
    """Hotter is flatter, so more tokens are needed to reach p."""
    logits = np.log(np.array([0.7, 0.2, 0.1]))
    assert [len(candidates(logits, t, None, 0.69)[0]) for t in [1.0, 4.0]] == [1, 2]


@given(seeds, st.integers(1, 10), st.booleans(), st.sampled_from([np.float32, np.float64]))
def test_limits_are_greedy(seed, n, ties, dtype):
    """Temperature 0 and (without ties) near it, top-k 1, p near 0: always the best, the lowest id of equals."""
    logits = draw_logits(seed, n, ties).astype(dtype)
    rng, best = np.random.default_rng(seed), int(np.flatnonzero(logits == logits.max())[0])
    assert greedy(logits) == best
    assert sample(logits, 0.0, None, 1.0, rng) == best
    assert sample(logits, 3.0, 1, 1.0, rng) == best
    assert sample(logits, 3.0, None, 1e-12, rng) == best
    assert sample(logits, 1e-300, 1 if ties else None, 1.0, rng) == best
    assert isinstance(sample(logits, 3.0, None, 1.0, rng), int)


def test_forbidden_tokens_are_never_drawn():
    logits = np.array([-np.inf, 0.0, -np.inf, 1.0])
    rng = np.random.default_rng(0)
    assert {sample(logits, 5.0, None, 1.0, rng) for _ in range(200)} == {1, 3}


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1.0, None, 1.0), (0.6, None, 1.0), (2.0, 4, 1.0), (1.0, 5, 0.9)])
def test_tokens_are_drawn_as_often_as_they_should_be(temperature, top_k, top_p):
    """Pearson's chi-square over 3000 draws; 30 is beyond the 99.99th percentile for up to seven degrees of freedom."""
    logits, rng, draws = draw_logits(3, 8, False), np.random.default_rng(5), 3000
    counts = np.bincount([sample(logits, temperature, top_k, top_p, rng) for _ in range(draws)], minlength=8)
    tokens, probs = oracle(logits, temperature, top_k, top_p)
    expected = draws * np.array(probs)
    assert counts.sum() == counts[tokens].sum()
    assert ((counts[tokens] - expected) ** 2 / expected).sum() < 30


def test_a_seed_repeats_and_no_seed_does_not():
    logits = np.zeros(1000)

    def draws(seed):
        rng = Decoding(temperature=1.0, seed=seed).stream(0)
        return [sample(logits, 1.0, None, 1.0, rng) for _ in range(10)]

    assert draws(7) == draws(7)
    assert draws(7) != draws(8)
    assert draws(None) != draws(None)


@pytest.mark.parametrize("option, fields", [
    ("--temperature", {"temperature": -0.1}), ("--temperature", {"temperature": float("nan")}),
    ("--temperature", {"temperature": float("inf")}), ("--top-p", {"top_p": 0.0}), ("--top-p", {"top_p": 1.01}),
    ("--top-p", {"top_p": float("nan")}), ("--top-k", {"top_k": 0}), ("--top-k", {"top_k": 2.5}),
    ("--seed", {"seed": -1}), ("--max-new-tokens", {"max_new_tokens": 0}),
])
def test_settings_out_of_range_are_refused_by_name(option, fields):
    with pytest.raises(InputError, match=f"^{option}: .*expected") as caught:
        Decoding(**fields)
    assert "\n" not in str(caught.value)


def test_settings_at_the_edge_of_the_range():
    Decoding(temperature=0, top_k=1, top_p=1, seed=0, max_new_tokens=1)
    Decoding(temperature=1e-300, top_k=10**9, top_p=1e-300, seed=2**64)


def test_no_two_answers_and_no_two_seeds_share_their_draws():
    """Neither do neighbors; and the same seed and number give the same again."""
    drawn = {(seed, number): Decoding(seed=seed).stream(number).integers(2**63)
             for seed in range(9) for number in range(9)}
    assert len(set(drawn.values())) == 81
    assert all(Decoding(seed=seed).stream(number).integers(2**63) == x for (seed, number), x in drawn.items())
    assert Decoding().stream(0).integers(2**63) != Decoding().stream(0).integers(2**63)


def test_log_prob():
    """Of one token, and of any of several, each counted once; far from 0 as well."""
    logits = np.array([1000.0, 1001.0, 999.0, 0.0], np.float32)
    probs = np.exp([-1.0, 0.0, -2.0]) / np.exp([-1.0, 0.0, -2.0]).sum()
    assert log_prob(logits, 0) == pytest.approx(np.log(probs[0]))
    assert log_prob(logits, [2, 0]) == pytest.approx(np.log(probs[0] + probs[2]))
    assert log_prob(logits, 3) == pytest.approx(log_probs(logits)[3])
    assert log_prob(logits, 1) == log_probs(logits)[1], "to the last bit"
