"""Gemma (2024), the decoder: RMSNorm, rotary positions, shared key/value heads, a gated MLP, and the KV cache.
A language model scores each token of its vocabulary for the next place (the scores are its logits); one token is
chosen and appended, and the model is asked again ("autoregressive").

Gemma 2 (PaliGemma 2) differs where the config has a value that is None or False for Gemma 1: soft caps, sliding
windows, and the norms after each block. Gemma 3 drops the caps, has norms inside attention, and turns queries and
keys more slowly in those layers that see everything.
"""
import math

import numpy as np

from minipali.model.ops import attention, embed, gelu, linear, rms_norm, rope
from minipali.model.siglip import heads
from minipali.trace import scope, tap


def prefix_lm_mask(q_positions, k_positions, prefix_len, window=None):
    """Who may look at whom. The prefix (picture, BOS or "begin of sequence", prompt, newline) is there from the
    start, so all of it sees all of it; the suffix, the answer, sees the prefix and what was written before. 3 of 5:

        keys  0 1 2 3 4
        q 0   1 1 1 0 0        not the causal mask of a plain language model, where the picture could not
        q 1   1 1 1 0 0        look at the question:            1 0 0 0 0
        q 2   1 1 1 0 0                                         1 1 0 0 0
        q 3   1 1 1 1 0                                         1 1 1 0 0  ...
        q 4   1 1 1 1 1

    Position -1 marks padding, which is never a key. The mask comes from positions and not from shapes, so it is
    the same rule for a whole sequence, a padded batch and one new token against a cache.
    `window` (Gemma 2's even layers): a suffix token forgets keys that are `window` or more behind it.
    """  # (B,T), (B,S), (B,) -> (B,T,S) of bool
    q, k, prefix_len = q_positions[:, :, None], k_positions[:, None, :], prefix_len[:, None, None]
    causal = k <= q
    if window is not None:
        causal = causal & (q - k < window)
    both_in_prefix = (q < prefix_len) & (k < prefix_len)
    return (k >= 0) & (causal | both_in_prefix)


class KVCache:
    """Keys and values of the tokens so far, so that a new token costs one row of attention and not a whole pass.

    Earlier tokens never look at later ones, so their keys and values cannot change. The prefix does look ahead, inside
    itself: all of it must be there before its keys are stored. Queries need no cache: each is used once, by its own
    token. The arrays have their full size from the start, and are changed in place.
    """

    def __init__(self, like, batch, capacity, cfg):
        """Room for `capacity` tokens of `batch` sequences, in the dtype and on the device of `like`."""
        shape = (batch, capacity, cfg.num_key_value_heads, cfg.head_dim)
        self.keys = [np.empty_like(like, shape=shape) for _ in range(cfg.num_hidden_layers)]    # L of (B,S,K,H)
        self.values = [np.empty_like(like, shape=shape) for _ in range(cfg.num_hidden_layers)]
        self.positions = np.empty_like(like, shape=(batch, capacity), dtype=np.int64)
        self.capacity, self.length = capacity, 0
        self.prefix_len, self.written = None, 0  # set by prefill: (B,), and how many suffix tokens have come since

    def reserve(self, positions):
        """Take the next slots for tokens at `positions`; returns the positions of all keys so far."""  # (B,T) -> (B,S)
        start, self.length = self.length, self.length + positions.shape[1]
        if self.length > self.capacity:
            raise ValueError(f"the KV cache holds {self.capacity} tokens and {self.length} were asked for")
        self.positions[:, start:self.length] = positions
        return self.positions[:, :self.length]

    def store(self, layer, k, v):
        """Write the reserved slots of one layer; returns the keys and values of all tokens so far."""
        slots = slice(self.length - k.shape[1], self.length)
        self.keys[layer][:, slots], self.values[layer][:, slots] = k, v
        return self.keys[layer][:, :self.length], self.values[layer][:, :self.length]


def self_attention(x, p, cfg, positions, mask, layer, cache=None):
    """Queries and keys are turned by their positions before they meet. Values are not: what a token gives does not
    depend on where it stands. Keys are cached turned, since a token's position never changes.

    Gemma 3 first brings each head's queries and keys to one length, so that no score outgrows the others; its larger
    models divide the positions of global layers, to keep long texts within the angles known from training.
    """  # (B,T,D) -> (B,T,D)
    q = heads(tap("q_proj", linear(x, **p["q_proj"])), cfg.num_attention_heads)
    k = heads(tap("k_proj", linear(x, **p["k_proj"])), cfg.num_key_value_heads)
    v = heads(tap("v_proj", linear(x, **p["v_proj"])), cfg.num_key_value_heads)
    if cfg.qk_norms:
        q = tap("q_norm", rms_norm(q, **p["q_norm"], eps=cfg.rms_norm_eps))
        k = tap("k_norm", rms_norm(k, **p["k_norm"], eps=cfg.rms_norm_eps))
    rope_positions, theta = positions / cfg.rope_factors[layer], cfg.rope_thetas[layer]
    q, k = rope(q, rope_positions, theta), rope(k, rope_positions, theta)
    if cache is not None:
        k, v = cache.store(layer, k, v)
    scale = 1 / math.sqrt(cfg.query_pre_attn_scalar)  # 1/√H in most sizes
    attended = attention(q, k, v, mask, scale, cfg.attn_logit_softcapping)  # (B,T,N,H)
    return tap("o_proj", linear(attended.reshape(*x.shape[:2], -1), **p["o_proj"]))


def mlp(x, p):
    """gelu(gate) decides how much of `up` passes ("GeGLU", Shazeer 2020): a third matrix, where SigLIP has two."""
    # (B,T,D) -> (B,T,D)
    gate, up = tap("gate_proj", linear(x, **p["gate_proj"])), tap("up_proj", linear(x, **p["up_proj"]))
    return tap("down_proj", linear(gelu(gate) * up, **p["down_proj"]))


def decoder_layer(x, p, cfg, positions, mask, layer, cache=None):
    """Attention, then MLP, each added to the residual stream.
    `post_attention_layernorm` names two different things: in Gemma 1 the norm before the MLP, in Gemma 2 a norm of
    what attention gives, before it is added (and the norm before the MLP is `pre_feedforward_layernorm`).
    """  # (B,T,D) -> (B,T,D)
    def norm(name, x):
        return tap(name, rms_norm(x, **p[name], eps=cfg.rms_norm_eps))

    normed = norm("input_layernorm", x)
    with scope("self_attn"):
        attention_output = self_attention(normed, p["self_attn"], cfg, positions, mask, layer, cache)
    attention_output = tap("self_attn", attention_output)
    if cfg.post_norms:
        attention_output = norm("post_attention_layernorm", attention_output)
    x = x + attention_output
    normed = norm("pre_feedforward_layernorm" if cfg.post_norms else "post_attention_layernorm", x)
    with scope("mlp"):
        mlp_output = mlp(normed, p["mlp"])
    mlp_output = tap("mlp", mlp_output)
    if cfg.post_norms:
        mlp_output = norm("post_feedforward_layernorm", mlp_output)
    return x + mlp_output


def embed_tokens(ids, p, cfg):
    """Text tokens, times √D. The table is the output head too, where large rows would give huge scores, so its entries
    are about 1/√D; scaled, they are about 1. Picture tokens are of that size already and are not scaled.
    (Some implementations divide picture tokens by √D and then scale everything: the same.)
    """  # (B,T) -> (B,T,D)
    return embed(ids, **p["embed_tokens"]) * math.sqrt(cfg.hidden_size)


def decoder(x, p, cfg, positions, prefix_len, cache=None):
    """L layers and a last norm over tokens that are already embedded; keys come from the cache too, if there is one.
    `positions` are the tokens' places in the whole sequence, -1 for padding; the prefix must come in one call, since
    its tokens look ahead. In a plain Gemma no token does: there the prefix that sees all of itself has length 0.
    """  # (B,T,D), (B,T), (B,) -> (B,T,D)
    positions = np.asarray(positions, like=x)
    prefix_len = np.asarray(prefix_len, like=x) if cfg.prefix_lm else np.zeros_like(positions[:, 0])
    k_positions = positions if cache is None else cache.reserve(positions)
    masks = {window: prefix_lm_mask(positions, k_positions, prefix_len, window) for window in set(cfg.sliding_windows)}
    for i, layer in enumerate(p["layers"]):
        with scope("layers", i):
            x = decoder_layer(x, layer, cfg, positions, masks[cfg.sliding_windows[i]], i, cache)
        x = tap(f"layers.{i}", x)
    return tap("norm", rms_norm(x, **p["norm"], eps=cfg.rms_norm_eps))


def output_logits(x, weight, cfg):
    """The logits: for each token of the vocabulary a score, the dot product of x with that token's row of the head. In
    Gemma the head is the (unscaled) embedding table itself: "tied weights"."""  # (..., D), (V,D) -> (..., V)
    logits = linear(x, weight)
    if cfg.final_logit_softcapping is not None:
        logits = cfg.final_logit_softcapping * np.tanh(logits / cfg.final_logit_softcapping)
    return logits
