"""From logits to the next token: the best one, or one drawn from the best.

Everything here happens on the host, for one sequence: `logits` is (V,), float32 or float64.
"""
import dataclasses
import math

import numpy as np

from minipali.errors import InputError
from minipali.model import ops


@dataclasses.dataclass(frozen=True)
class Decoding:
    """How to choose tokens and how many. Temperature 0 is greedy; top_k None and top_p 1 cut nothing off.

    Raises InputError, naming the option of the command line, for a number out of range.
    """
    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int | None = None  # None: another draw every time
    max_new_tokens: int = 64

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:  # also false for nan
            raise InputError(f"--temperature: {self.temperature} is out of range, expected a number of at least 0")
        if not 0 < self.top_p <= 1:
            raise InputError(f"--top-p: {self.top_p} is out of range, expected a number above 0 and up to 1")
        for option, value, least in [("--top-k", self.top_k, 1), ("--seed", self.seed, 0),
                                     ("--max-new-tokens", self.max_new_tokens, 1)]:
            if value is not None and not (isinstance(value, int) and value >= least):
                raise InputError(f"{option}: {value} is out of range, expected an integer of at least {least}")

    def stream(self, number: int) -> np.random.Generator:
        """The random numbers of answer `number` of a run: one source for the whole answer, not one for every token.

        They follow from (seed, number) alone, so no two answers and no two seeds share them, and what an answer draws
        does not depend on which others were computed beside it.
        """
        return np.random.default_rng(np.random.SeedSequence(self.seed, spawn_key=(number,)))


def log_probs(logits):
    """The model's own log-probabilities of the next token, in float64: temperature, top-k and top-p come later.

    Those only say what is drawn. After them, the one token that top-k 1 leaves would always look certain.
    """  # (..., V) -> (..., V)
    return ops.log_softmax(logits.astype(np.float64))


def log_prob(logits, token):
    """The log-probability of one token; of a list of tokens, that of any of them."""  # (V,) -> ()
    logits = logits.astype(np.float64)
    return float(ops.log_sum_exp(logits[np.atleast_1d(token)]) - ops.log_sum_exp(logits))


def greedy(logits):
    """The token with the largest logit; of several, the one with the lowest id."""
    return int(np.argmax(logits))


def candidates(logits, temperature, top_k, top_p):
    """The tokens that may be drawn, likeliest first (of equals, the lowest id first), and their probabilities.

    The order of the steps matters: temperature, then top-k, then the nucleus of what is left (Holtzman et al.,
    arXiv 1904.09751): every token up to AND INCLUDING the first with which the sum of probabilities reaches p.
    """
    logits = logits.astype(np.float64)
    order = np.arange(len(logits))
    if top_k is not None and top_k < len(logits):  # 257152 logits take a while to sort, and not to part in two
        order = np.flatnonzero(logits >= np.partition(logits, -top_k)[-top_k])
    order = order[np.argsort(-logits[order], kind="stable")][:top_k]
    with np.errstate(over="ignore"):  # a tiny temperature sends all but the best to -inf, as it should
        probs = ops.softmax((logits[order] - logits[order[0]]) / temperature)
    if top_p < 1:
        # Leaving the token that crosses p out (cumsum <= p) keeps nothing at all where the best has more than p.
        kept = 1 + np.count_nonzero(np.cumsum(probs) < top_p)
        order, probs = order[:kept], probs[:kept]
    return order, probs / probs.sum()


def sample(logits, temperature, top_k, top_p, rng):
    """One token drawn from the candidates; `rng` is a np.random.Generator. Temperature 0 is the greedy choice."""
    if temperature == 0:
        return greedy(logits)
    tokens, probs = candidates(logits, temperature, top_k, top_p)
    return int(rng.choice(tokens, p=probs))
