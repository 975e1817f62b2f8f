"""A question, a picture and its answer once more through the model, with everything kept that is shown afterwards.

The answer is known by then, so one `forward` over prompt and answer gives what prefill and every step of decoding saw:
the mask hides from each token what came after it.
"""
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from minipali.backend import to_host
from minipali.decoding.generate import Answer
from minipali.decoding.loaded_model import Model
from minipali.errors import InputError
from minipali.model.gemma import output_logits
from minipali.model.paligemma import forward, output_head
from minipali.trace import ATTENTION, record

VISION, DECODER = "vision_tower.vision_model", "language_model.model"
_WANTED = re.compile(rf"{VISION}\.(embeddings|post_layernorm|encoder\.layers\.\d+(\.self_attn\.{ATTENTION})?)$"
                     r"|multi_modal_projector$"
                     rf"|{DECODER}\.(embed_tokens|norm|layers\.\d+(\.(input_layernorm|self_attn|mlp|post_attention_layernorm"
                     rf"|post_feedforward_layernorm|self_attn\.(q_proj|k_proj|v_proj|q_norm|k_norm|{ATTENTION})))?)$")


@dataclass(frozen=True)
class Seen:
    """One answer and what was recorded while it was scored: images of P patches each, T text tokens, steps.

    `steps` are the tokens that were predicted, the stop token included if there was one; `logits` (steps,V) the scores
    from which each was taken. Text token `first + a` is the one that predicts step a. All arrays are on the host.
    """
    model: Model
    pixels: np.ndarray | None   # (images,3,size,size)
    features: np.ndarray        # (1,images·P,D)
    prompt: list
    answer: list
    steps: list
    activations: dict
    logits: np.ndarray

    @property
    def patches(self):
        """images·P, how many places of the sequence the pictures take."""
        return self.features.shape[1]

    @property
    def text(self):
        """The ids of the T text tokens: the prompt and the answer."""
        return [*self.prompt, *self.answer]

    @property
    def prefix_length(self):
        """How many tokens see one another: pictures and prompt; none in a plain Gemma."""
        return (self.patches + len(self.prompt)) * self.model.cfg.text_config.prefix_lm

    @property
    def first(self):
        """The text token that predicts step 0: the last of the prompt."""
        return len(self.prompt) - 1

    def layer(self, number, name=""):
        """An activation of a layer of the decoder, without the batch."""
        return self.activations[f"{DECODER}.layers.{number}" + (f".{name}" if name else "")][0]

    def scored(self):
        """Places in the sequence of the tokens that predict the steps."""  # -> (steps,)
        return self.patches + self.first + np.arange(len(self.steps))


def no_numbers(array):
    """Raise InputError for scores that are no numbers: damaged weights."""
    if not np.isfinite(array).all():
        raise InputError("the scores of the next token are not all finite: the weights are damaged")
    return array


def observe(model: Model, pixels: np.ndarray | None, prompt: list[int], answer: Answer, most: int = 64) -> Seen:
    """Prompt and answer through the model in one pass, recorded -> Seen.

    `pixels` (images,3,size,size) or None, `prompt` a list of ids, `answer` an Answer of `generate`; of an answer longer
    than `most` tokens the beginning is kept.
    """
    ids, cfg = answer.ids[:most], model.cfg
    with np.errstate(all="ignore"), record(attention=True, only=_WANTED.fullmatch) as activations:
        if pixels is None:
            features = model.no_picture(1)
        else:
            features = model.features_of(pixels)
            features = features.reshape(1, -1, features.shape[-1])
        text, P = np.array([[*prompt, *ids]]), features.shape[1]
        x = forward(features, text, np.array([text.size]), np.array([P + len(prompt)]), model.params, cfg)
        ended = answer.stopped_by == "eos" and len(ids) == len(answer.ids)
        count = len(ids) + ended
        logits = output_logits(x[0, len(prompt) - 1:len(prompt) - 1 + count], output_head(model.params, cfg),
                               cfg.text_config)
    logits = no_numbers(to_host(logits))
    steps = [*ids, max(cfg.eos_token_ids, key=lambda i: logits[-1, i])] if ended else list(ids)
    return Seen(model, pixels, to_host(features), list(prompt), list(ids), steps, to_host(dict(activations)), logits)


def decoder_attention(seen):
    """How much each token that predicts a step takes from every place of the sequence."""  # -> (L,N,steps,S)
    layers = range(seen.model.cfg.text_config.num_hidden_layers)
    return np.stack([seen.layer(i, f"self_attn.{ATTENTION}")[:, seen.scored()] for i in layers])


def vision_attention(seen):
    """How much each patch of the first picture takes from the others."""  # -> (L,N,P,P)
    layers = range(seen.model.cfg.vision_config.num_hidden_layers)
    return np.stack([seen.activations[f"{VISION}.encoder.layers.{i}.self_attn.{ATTENTION}"][0] for i in layers])


def residual_stream(seen):
    """The text tokens as they come in, after each layer's attention, and after its MLP."""  # -> (1+2L,T,D)
    cfg, P = seen.model.cfg.text_config, seen.patches
    rows = [seen.activations[f"{DECODER}.embed_tokens"][0]]
    for i in range(cfg.num_hidden_layers):
        added = seen.layer(i, "post_attention_layernorm" if cfg.post_norms else "self_attn")
        rows += [rows[-1] + added[P:], seen.layer(i)[P:]]
    return np.stack(rows)


def token_texts(model: Model, ids: Iterable[int]) -> list[str]:
    """Each token as text: its characters, its name in the vocabulary where these are none, or else its number."""
    return [_token_text(model.tokenizer, int(i)) for i in ids]


def _token_text(tokenizer, i):
    name = tokenizer and tokenizer.token_of(i)
    if name is None:  # no tokenizer, or a row of the table that no token uses
        return f"#{i}"
    text = tokenizer.decode([i], skip_special=False)
    return name if not text or "\ufffd" in text else text  # a byte is but a part of a character
