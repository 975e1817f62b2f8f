"""A checkpoint on disk to answers about pictures: load, encode the prompt, prefill, decode token by token.

A Gemma by itself continues a text in the same way, with a picture of no tokens in front of it.
"""
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from minipali.backend import to_host
from minipali.decoding.loaded_model import Model
from minipali.decoding.sampling import Decoding, log_prob, sample
from minipali.errors import InputError
from minipali.model.gemma import KVCache
from minipali.model.paligemma import decode, prefill


@dataclass
class Answer:
    """The tokens (the stop token left out), why decoding stopped ("eos" or "length"), and the seconds it took.

    `logprobs`: the logarithm of each token's probability, `stop_logprob` that of ending after them (None at "length"),
    as the model gave them, before temperature, top-k, top-p or a grammar (see `grammar`) left anything out. The
    probabilities of several stop tokens add up, since they end the same text. Both are empty where they were not asked
    for.
    """
    ids: list = field(default_factory=list)
    stopped_by: str = "length"
    logprobs: list = field(default_factory=list)
    stop_logprob: float | None = None
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def logprob(self) -> float:
        """The log-probability of the whole answer: probabilities multiply, so their logarithms add up."""
        return sum(self.logprobs) + (self.stop_logprob or 0.0)


@dataclass
class Prefix:
    """A prefix after prefill: the logits (B,V) of the next token, on the host, and `room` for that many tokens."""
    logits: np.ndarray
    cache: KVCache
    room: int
    seconds: float


def require_finite(model: Model, logits: np.ndarray) -> np.ndarray:
    """The logits as they are; raises InputError if any is not finite."""
    if not np.isfinite(logits).all():
        raise InputError(f"{model.path}: the scores of the next token are not all finite: its weights are damaged")
    return logits


def read_prefix(model: Model, features: np.ndarray, prompts: list[list[int]], most: int) -> Prefix:
    """Pictures and prompts through the model, once, with room for answers of up to `most` tokens."""
    cfg, started = model.cfg, time.perf_counter()
    lengths = np.array([len(prompt) for prompt in prompts])
    ids = np.full((len(prompts), lengths.max()), cfg.pad_token_id)
    for row, prompt in zip(ids, prompts):
        row[:len(prompt)] = prompt
    longest = features.shape[1] + ids.shape[1]
    room = min(most, cfg.text_config.max_position_embeddings - longest)
    cache = KVCache(features, len(prompts), longest + room, cfg.text_config)
    logits = require_finite(model, to_host(prefill(features, ids, lengths, model.params, cfg, cache)))
    return Prefix(logits, cache, room, time.perf_counter() - started)


def next_logits(model: Model, cache: KVCache, new: np.ndarray) -> np.ndarray:
    """The scores, on the host, of what follows each of the new tokens."""  # (B,T) -> (B,T,V)
    return require_finite(model, to_host(decode(new, model.params, model.cfg, cache)))


def take_rows(cache: KVCache, rows: list[int]) -> None:
    """Row i becomes what row `rows[i]` was: a row may be taken several times, or not at all."""
    rows = np.asarray(rows, like=cache.positions)
    for arrays in [cache.keys, cache.values]:
        for layer, array in enumerate(arrays):  # one at a time, so that never more than one layer exists twice
            arrays[layer] = array[rows]
    cache.positions, cache.prefix_len = cache.positions[rows], cache.prefix_len[rows]


def masked_logits(logits: np.ndarray, grammar, ids: list[int], left: int) -> np.ndarray:
    """The logits (V,) with -inf for what a grammar does not let follow `ids`; see `grammar`."""
    if grammar is None:
        return logits
    masked, allowed = np.full_like(logits, -np.inf), grammar.allowed(ids, left)
    masked[allowed] = logits[allowed]
    return masked


def generate(model: Model, features: np.ndarray, prompts: list[list[int]], decoding: Decoding,
             on_token: Callable[[int, int], None] | None = None, grammar=None, logprobs: bool = True,
             numbers: Sequence[int] | None = None) -> list[Answer]:
    """Answer B prompts, each a list of ids, about B encoded pictures, together; returns B Answers.

    Prompts may differ in length, and a row that has ended leaves the batch. `on_token(row, id)` is called for each
    token as soon as it is known. `numbers`: the answers' numbers in the run, which select their random streams
    (default: 0, 1, …). Raises InputError if the logits are not finite, as with damaged weights. search.py continues one
    prefix in several ways.
    """
    prefix = read_prefix(model, features, prompts, decoding.max_new_tokens)
    return decode_answers(model, prefix, decoding, on_token, grammar, logprobs, numbers)


def decode_answers(model: Model, prefix: Prefix, decoding: Decoding,
                   on_token: Callable[[int, int], None] | None = None, grammar=None, logprobs: bool = True,
                   numbers: Sequence[int] | None = None) -> list[Answer]:
    """The answers that follow a prefix, token by token; the second half of `generate`."""
    logits, stops, started = prefix.logits, sorted(set(model.cfg.eos_token_ids)), time.perf_counter()
    answers = [Answer(prefill_seconds=prefix.seconds) for _ in logits]
    streams = [decoding.stream(number) for number in numbers or range(len(answers))]
    live = list(range(len(answers)))  # the number of the answer that each row of the batch belongs to
    for step in range(prefix.room):
        continuing, new = [], []
        for row, number in enumerate(live):
            answer = answers[number]
            scores = masked_logits(logits[row], grammar, answer.ids, prefix.room - step)
            token = sample(scores, decoding.temperature, decoding.top_k, decoding.top_p, streams[number])
            if token in stops:
                answer.stopped_by = "eos"
                answer.stop_logprob = log_prob(logits[row], stops) if logprobs else None
                continue
            answer.ids.append(token)
            if logprobs:
                answer.logprobs.append(log_prob(logits[row], token))
            continuing.append(row)
            new.append([token])
            if on_token:
                on_token(number, token)
        if step == prefix.room - 1 or not continuing:
            break
        if len(continuing) < len(live):
            take_rows(prefix.cache, continuing)
            live = [live[row] for row in continuing]
        logits = next_logits(model, prefix.cache, np.array(new))[:, -1]
    for answer in answers:
        answer.decode_seconds = time.perf_counter() - started
    return answers
