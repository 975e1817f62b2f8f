"""Several ways to go on from one prefix: beam search, the best of n samples, and the score of a given answer.

All three ask how probable a whole answer is. A token's probability is conditional on those before it, so the answer's
is their product, and its logarithm the sum of theirs (`Answer.logprob`), that of its end included: without it, "yes"
could never be less probable than "yes and". A model may have several stop tokens; the same text ended by one or by
another is one answer, so their probabilities add up. Answers that stop and answers cut off at the limit exclude one
another, and the probabilities of all of them add up to 1.

Picture and prompt go through the model once; from then on each row of the KV cache is one way to go on.
"""
import dataclasses
import time
from collections.abc import Callable

import numpy as np

from minipali.decoding.generate import Answer, decode_answers, masked_logits, next_logits, read_prefix, take_rows
from minipali.decoding.loaded_model import Model, check_vocabulary
from minipali.decoding.sampling import Decoding, log_prob, log_probs
from minipali.errors import InputError
from minipali.model.ops import log_sum_exp


def best(scores, count):
    """[(row, token)] of the `count` largest scores, best first; of equals the earlier row, then the lower id.

    -inf, which is what a grammar gives to what may not follow, is never among them.
    """  # (rows,V) -> at most `count`
    flat = scores.ravel()
    kept = np.arange(flat.size)
    if count < flat.size:  # as in `sampling.candidates`: parting in two is faster than sorting
        kept = np.flatnonzero(flat >= np.partition(flat, -count)[-count])
    kept = kept[flat[kept] > -np.inf]
    kept = kept[np.argsort(-flat[kept], kind="stable")][:count]
    return [divmod(int(i), scores.shape[1]) for i in kept]


def with_one_end(logprobs, stops):
    """Log-probabilities with all ends in the first stop token's place, and -inf in those of the others."""
    merged = logprobs.copy()  # (rows,V) -> (rows,V)
    merged[:, stops] = -np.inf
    merged[:, stops[0]] = log_sum_exp(logprobs[:, stops])
    return merged


def likeliest_first(answers):
    return sorted(answers, key=lambda answer: -answer.logprob)  # stable: of equals the earlier


def beam_search(model: Model, features: np.ndarray, prompt: list[int], beams: int, max_new_tokens: int, grammar=None,
                on_step: Callable[[list[Answer], list[Answer]], None] | None = None) -> list[Answer]:
    """The `beams` likeliest answers that the search finds, likeliest first; greedy decoding looks at one path only.

    At each step every beam is continued by every token, and the best continuations go on; to end, by whichever stop
    token, is one of them. `on_step(live, ended)` is called after each step. Raises InputError as `generate` does.
    (Graves 2012, arXiv 1211.3711; Sutskever et al. 2014)
    """
    # Sums are compared as they are, so every further token lowers an answer's sum. The hub divides by length **
    # length_penalty, by default 1, which is the mean: predictable further tokens then raise it. There is no such
    # option here: the sum is what --score prints, and only sums can never rise, which is why the search may stop early.
    prefix, started = read_prefix(model, features, [prompt], max_new_tokens), time.perf_counter()
    cache, logits, stops = prefix.cache, prefix.logits, sorted(set(model.cfg.eos_token_ids))
    live, ended = [Answer(prefill_seconds=prefix.seconds)], []
    for step in range(prefix.room):
        logprobs = with_one_end(log_probs(logits), stops)  # (rows,V)
        sums = np.array([beam.logprob for beam in live])[:, None] + logprobs
        sums = np.stack([masked_logits(row, grammar, beam.ids, prefix.room - step) for row, beam in zip(sums, live)])
        rows, longer = [], []
        # Each beam can stop in one way, so among twice as many there are enough that go on.
        for rank, (row, token) in enumerate(best(sums, 2 * beams)):
            beam, logprob = live[row], float(logprobs[row, token])
            if token != stops[0]:
                rows.append(row)
                longer.append(dataclasses.replace(beam, ids=[*beam.ids, token], logprobs=[*beam.logprobs, logprob]))
            # An end that is not among the best does not count, or a beam of 1 would not be greedy: it would collect
            # every unlikely end on its way, "a" in front of "a red circle".
            elif rank < beams:
                ended.append(dataclasses.replace(beam, stopped_by="eos", stop_logprob=logprob))
        rows, live, ended = rows[:beams], longer[:beams], likeliest_first(ended)[:beams]
        if on_step:
            on_step(live, ended)
        settled = len(ended) == beams and live and live[0].logprob <= ended[-1].logprob
        if step == prefix.room - 1 or not live or settled:
            break
        take_rows(cache, rows)
        logits = next_logits(model, cache, np.array([beam.ids[-1:] for beam in live]))[:, -1]
    answers = likeliest_first(ended + live)[:beams]
    for answer in answers:
        answer.decode_seconds = time.perf_counter() - started
    return answers


def best_of(model: Model, features: np.ndarray, prompt: list[int], count: int, decoding: Decoding,
            grammar=None) -> list[Answer]:
    """`count` sampled answers, the likeliest first; the mean log-probability of a token would favor long ones.

    Likeliest is meant as in beam search, by the sum, whatever the temperature they were drawn with.
    """
    prefix = read_prefix(model, features, [prompt], decoding.max_new_tokens)
    take_rows(prefix.cache, [0] * count)
    prefix.logits = np.repeat(prefix.logits, count, axis=0)
    return likeliest_first(decode_answers(model, prefix, decoding, grammar=grammar))


def encode_answer(text: str, prefix_len: int, model: Model) -> list[int]:
    """A given answer as the model would have to write it: its tokens, then the stop token.

    Raises InputError if that is unavailable, or too long after `prefix_len` tokens of picture and prompt.
    """
    if model.tokenizer is None:
        raise InputError("--score: the model's folder has no tokenizer.json or tokenizer.model")
    ids = [*model.tokenizer.encode(text), model.cfg.eos_token_ids[0]]
    check_vocabulary("--score", ids, model.cfg)
    length, limit = prefix_len + len(ids), model.cfg.text_config.max_position_embeddings
    if length > limit:
        raise InputError(f"--score: {length} tokens with the prefix, expected at most the model's {limit} positions")
    return ids


def score(model: Model, features: np.ndarray, prompt: list[int], answers: list[list[int]]) -> list[Answer]:
    """How probable the model finds given answers, each a list of ids that ends in a stop token; returns Answers.

    No token is chosen, so all of them go through at once, as in training. Which stop token ends a list does not matter:
    the last probability is that of ending there.
    """
    longest = max(map(len, answers))
    prefix, started = read_prefix(model, features, [prompt], longest), time.perf_counter()
    take_rows(prefix.cache, [0] * len(answers))
    logits = np.repeat(prefix.logits[:, None], len(answers), axis=0)  # (B,1,V): the prefix predicts the first token
    if longest > 1:
        # Padding behind an answer is seen by nothing that counts: the suffix is causal.
        ids = np.full((len(answers), longest - 1), model.cfg.pad_token_id)
        for row, answer in zip(ids, answers):
            row[:len(answer) - 1] = answer[:-1]
        logits = np.concatenate([logits, next_logits(model, prefix.cache, ids)], axis=1)
    scored = []
    for row, answer in zip(logits, answers):
        logprobs = [log_prob(row[t], token) for t, token in enumerate(answer[:-1])]
        stop = log_prob(row[len(answer) - 1], sorted(set(model.cfg.eos_token_ids)))
        scored.append(Answer(answer[:-1], "eos", logprobs, stop, prefix.seconds, time.perf_counter() - started))
    return scored
