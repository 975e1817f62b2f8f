"""A checkpoint on disk to answers about pictures: load, encode the prompt, prefill, decode token by token.

A Gemma by itself continues a text in the same way, with a picture of no tokens in front of it.
"""
import time
from dataclasses import dataclass, field

import numpy as np

from minipali.backend import to_host
from minipali.decoding.sampling import log_probs, sample
from minipali.errors import InputError
from minipali.model.gemma import KVCache
from minipali.model.paligemma import decode, prefill


@dataclass
class Answer:
    """The tokens written (the stop token left out), why it stopped ("eos" or "length"), and the seconds it took.

    `logprobs`: the logarithm of each token's probability, `stop_logprob` that of the stop token (None at "length"),
    as the model gave them, before temperature, top-k, top-p or a grammar (see `grammar`) left anything out.
    """
    ids: list = field(default_factory=list)
    stopped_by: str = "length"
    logprobs: list = field(default_factory=list)
    stop_logprob: float | None = None
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def logprob(self):
        """That of the whole answer: probabilities multiply, so their logarithms add up."""
        return sum(self.logprobs) + (self.stop_logprob or 0.0)


@dataclass
class Prefix:
    """A prefix that has gone through: the scores (B,V) of what follows, on the host, and room for that many tokens."""
    logits: np.ndarray
    cache: KVCache
    room: int
    seconds: float


def finite(model, logits):
    """The logits as they are; raises InputError if any is no number."""
    if not np.isfinite(logits).all():
        raise InputError(f"{model.path}: the scores of the next token are not all finite: its weights are damaged")
    return logits


def read_prefix(model, features, prompts, most):
    """Pictures and prompts through the model, once, with room for answers of up to `most` tokens."""
    cfg, started = model.cfg, time.perf_counter()
    lengths = np.array([len(prompt) for prompt in prompts])
    ids = np.full((len(prompts), lengths.max()), cfg.pad_token_id)
    for row, prompt in zip(ids, prompts):
        row[:len(prompt)] = prompt
    longest = features.shape[1] + ids.shape[1]
    room = min(most, cfg.text_config.max_position_embeddings - longest)
    cache = KVCache(features, len(prompts), longest + room, cfg.text_config)
    logits = finite(model, to_host(prefill(features, ids, lengths, model.params, cfg, cache)))
    return Prefix(logits, cache, room, time.perf_counter() - started)


def next_logits(model, cache, new):
    """The scores, on the host, of what follows each of the new tokens."""  # (B,T) -> (B,T,V)
    return finite(model, to_host(decode(new, model.params, model.cfg, cache)))


def permitted(logits, grammar, ids, left):
    """The logits (V,) with -inf for what a grammar does not let follow `ids`; see `grammar`."""
    if grammar is None:
        return logits
    masked, allowed = np.full_like(logits, -np.inf), grammar.allowed(ids, left)
    masked[allowed] = logits[allowed]
    return masked


def generate(model, features, prompts, decoding, on_token=None, grammar=None):
    """Answer B prompts, each a list of ids, about B encoded pictures, together; returns B Answers.

    Prompts may differ in length. A row that has ended is fed padding until all have: it costs time and changes
    nothing. `on_token(row, id)` is called for each token as soon as it is known. Raises InputError if the scores are not
    finite, which is what damaged weights give. `search` has what goes on from one prefix in several ways.
    """
    return write(model, read_prefix(model, features, prompts, decoding.max_new_tokens), decoding, on_token, grammar)


def write(model, prefix, decoding, on_token=None, grammar=None):
    """The answers that follow a prefix, token by token; the second half of `generate`."""
    cfg, logits, started = model.cfg, prefix.logits, time.perf_counter()
    answers = [Answer(prefill_seconds=prefix.seconds) for _ in logits]
    # Each row draws from a stream of its own: what it draws does not depend on how long the others go on.
    rngs = decoding.generator().spawn(len(answers))
    for step in range(prefix.room):
        new = np.full((len(answers), 1), cfg.pad_token_id)
        for row, answer in enumerate(answers):
            if answer.stopped_by == "eos":
                continue
            scores = permitted(logits[row], grammar, answer.ids, prefix.room - step)
            token = sample(scores, decoding.temperature, decoding.top_k, decoding.top_p, rngs[row])
            logprob = float(log_probs(logits[row])[token])
            if token in cfg.eos_token_ids:
                answer.stopped_by, answer.stop_logprob = "eos", logprob
                continue
            answer.ids.append(token)
            answer.logprobs.append(logprob)
            new[row] = token
            if on_token:
                on_token(row, token)
        if step == prefix.room - 1 or all(answer.stopped_by == "eos" for answer in answers):
            break
        logits = next_logits(model, prefix.cache, new)[:, -1]
    for answer in answers:
        answer.decode_seconds = time.perf_counter() - started
    return answers
