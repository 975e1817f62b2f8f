"""Several ways to go on from one prefix: beam search, the best of n samples, and the score of a given answer.

All three ask how probable a whole answer is. A token's probability is conditional on those before it, so the answer's
is their product, and its logarithm the sum of theirs (`Answer.logprob`), the stop token's included: without that,
"yes" could never be less probable than "yes and". Answers that stop and answers cut off at the limit exclude one
another, and the probabilities of all of them add up to 1.

Picture and prompt go through the model once; from then on each row of the KV cache is one way to go on.
"""
import dataclasses
import time

import numpy as np

from minipali.decoding.generate import (
    Answer,
    next_logits,
    permitted,
    read_prefix,
    write,
)
from minipali.decoding.loaded_model import check_vocabulary
from minipali.decoding.sampling import log_probs
from minipali.errors import InputError


def take_rows(cache, rows):
    """Row i goes on as what row `rows[i]` was: a row may be taken several times, or not at all."""
    rows = np.asarray(rows, like=cache.positions)
    for arrays in [cache.keys, cache.values]:
        for layer, array in enumerate(arrays):  # one at a time, so that never more than one layer exists twice
            arrays[layer] = array[rows]
    cache.positions, cache.prefix_len = cache.positions[rows], cache.prefix_len[rows]


def best(scores, count):
    """[(row, token)] of the `count` largest scores, best first; of equals the earlier row, then the lower id.

    -inf, which is what a grammar gives to what may not follow, is never among them.
    """  # (R,V) -> at most `count`
    flat = scores.ravel()
    kept = np.arange(flat.size)
    if count < flat.size:  # as in `sampling.candidates`: parting in two is faster than sorting
        kept = np.flatnonzero(flat >= np.partition(flat, -count)[-count])
    kept = kept[flat[kept] > -np.inf]
    kept = kept[np.argsort(-flat[kept], kind="stable")][:count]
    return [divmod(int(i), scores.shape[1]) for i in kept]


def likeliest_first(answers):
    return sorted(answers, key=lambda answer: -answer.logprob)  # stable: of equals the earlier


def beam_search(model, features, prompt, beams, max_new_tokens, grammar=None, on_step=None):
    """The `beams` likeliest answers that the search finds, likeliest first; greedy decoding looks at one path only.

    At each step every beam is continued by every token, and the best continuations go on. `on_step(live, ended)` is
    called after each. Raises InputError as `generate` does. (Graves 2012, arXiv 1211.3711; Sutskever et al. 2014)
    """
    # Sums are compared as they are, so a long answer pays for each of its tokens. The hub divides by length **
    # length_penalty, by default 1, which is the mean: dull certain tokens then raise an answer. There is no such
    # option here: the sum is what --score prints, and only sums can never rise, which is why the search may stop early.
    prefix, started = read_prefix(model, features, [prompt], max_new_tokens), time.perf_counter()
    cache, logits, stops = prefix.cache, prefix.logits, model.cfg.eos_token_ids
    live, ended = [Answer(prefill_seconds=prefix.seconds)], []
    for step in range(prefix.room):
        logprobs = log_probs(logits)  # (R,V)
        sums = np.array([beam.logprob for beam in live])[:, None] + logprobs
        sums = np.stack([permitted(row, grammar, beam.ids, prefix.room - step) for row, beam in zip(sums, live)])
        rows, longer = [], []
        # Each beam can stop in one way for each stop token, so among so many there are enough that go on.
        for rank, (row, token) in enumerate(best(sums, beams * (1 + len(stops)))):
            beam, logprob = live[row], float(logprobs[row, token])
            if token not in stops:
                rows.append(row)
                longer.append(dataclasses.replace(beam, ids=[*beam.ids, token], logprobs=[*beam.logprobs, logprob]))
            # A stop that is not among the best does not count, or a beam of 1 would not be greedy: it would collect
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
    found = likeliest_first(ended + live)[:beams]
    for answer in found:
        answer.decode_seconds = time.perf_counter() - started
    return found


def best_of(model, features, prompt, count, decoding, grammar=None):
    """`count` sampled answers, the likeliest first; their mean log-probability would favour those that ramble on.

    Likeliest is meant as in beam search, by the sum, whatever the temperature they were drawn with.
    """
    prefix = read_prefix(model, features, [prompt], decoding.max_new_tokens)
    take_rows(prefix.cache, [0] * count)
    prefix.logits = np.repeat(prefix.logits, count, axis=0)
    return likeliest_first(write(model, prefix, decoding, grammar=grammar))


def encode_answer(text, prefix_len, model):
    """A given answer as the model would have to write it: its tokens, then the stop token.

    Raises InputError if that is not to be had, or too long after `prefix_len` tokens of picture and prompt.
    """
    if model.tokenizer is None:
        raise InputError("--score: the model's folder has no tokenizer.json or tokenizer.model")
    ids = [*model.tokenizer.encode(text), model.cfg.eos_token_ids[0]]
    check_vocabulary("--score", ids, model.cfg)
    length, limit = prefix_len + len(ids), model.cfg.text_config.max_position_embeddings
    if length > limit:
        raise InputError(f"--score: {length} tokens with the prefix, expected at most the model's {limit} positions")
    return ids


def score(model, features, prompt, answers):
    """How probable the model finds given answers, each a list of ids that ends in a stop token; returns Answers.

    No token is chosen, so all of them go through at once, as in training.
    """
    longest = max(map(len, answers))
    prefix, started = read_prefix(model, features, [prompt], longest), time.perf_counter()
    take_rows(prefix.cache, [0] * len(answers))
    logits = np.repeat(prefix.logits[:, None], len(answers), axis=0)  # (B,1,V): the first token is the prefix's guess
    if longest > 1:
        # Padding behind an answer is seen by nothing that counts: the suffix is causal.
        ids = np.full((len(answers), longest - 1), model.cfg.pad_token_id)
        for row, answer in zip(ids, answers):
            row[:len(answer) - 1] = answer[:-1]
        logits = np.concatenate([logits, next_logits(model, prefix.cache, ids)], axis=1)
    scored = []
    for row, answer in zip(logits, answers):
        *logprobs, stop = (float(log_probs(row[t])[token]) for t, token in enumerate(answer))
        scored.append(Answer(answer[:-1], "eos", logprobs, stop, prefix.seconds, time.perf_counter() - started))
    return scored
