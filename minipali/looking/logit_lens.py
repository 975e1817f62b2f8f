"""The logit lens: what the model would say if it stopped after each layer (nostalgebraist 2020).

The residual stream is read as if no layer came after it: the model's own last norm, then its output head. Without the
norm other tokens come out. Before the first layer the lens names the token that was read, for the table that embeds is
the table that scores (tied weights). On picture tokens it names nothing sensible: no token was ever looked up for them.
"""
from typing import NamedTuple

import numpy as np

from minipali.backend import to_device, to_host
from minipali.looking.gather import DECODER, residual_stream
from minipali.model.gemma import output_logits
from minipali.model.ops import log_softmax, rms_norm
from minipali.model.paligemma import output_head


class Lens(NamedTuple):
    """For each row of the stream (embedding, then attention and MLP of each layer) and each text token, (rows,T) each.

    `top` is the likeliest token there and `probability` its probability; `rank` (0 is the first) and `final` are the
    place and the probability that the token chosen in the end, `top[-1]`, has there.
    """
    top: np.ndarray
    probability: np.ndarray
    rank: np.ndarray
    final: np.ndarray


def read_out(model, x):
    """Log-probabilities of the next token, if the model ended with this."""  # (T,D) -> (T,V)
    cfg = model.cfg.text_config
    x = to_device(x, model.backend)
    x = rms_norm(x, **model.params["language_model"]["model"]["norm"], eps=cfg.rms_norm_eps)
    return log_softmax(to_host(output_logits(x, output_head(model.params, model.cfg), cfg)))


def logit_lens(seen):
    """The lens over all text tokens, row by row: at no time more than one row of scores is held."""
    rows, last = residual_stream(seen), None
    readings = []
    for x in rows[::-1]:  # from the end, whose choice the other rows are asked about
        scores = read_out(seen.model, x)
        top = scores.argmax(-1)
        last = top if last is None else last
        chosen = np.take_along_axis(scores, last[:, None], -1)
        readings.append((top, np.exp(scores.max(-1)), (scores > chosen).sum(-1), np.exp(chosen[:, 0])))
    return Lens(*(np.stack(column[::-1]) for column in zip(*readings)))


def picture_lens(seen, at_once=256):
    """What the lens says of picture tokens after the last layer: no text that fits, and that is the lesson."""
    # -> (images·P,)
    last = seen.model.cfg.text_config.num_hidden_layers - 1
    x = seen.activations[f"{DECODER}.layers.{last}"][0, :seen.patches]
    pieces = [read_out(seen.model, x[i:i + at_once]).argmax(-1) for i in range(0, len(x), at_once)]
    return np.concatenate(pieces) if pieces else np.zeros(0, np.int64)


def row_names(layers):
    """The rows of a lens, in words."""
    return ["embedding", *(f"layer {i} {part}" for i in range(layers) for part in ("attention", "MLP"))]
