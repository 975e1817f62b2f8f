"""Backward of model/gemma.py. Training sees whole sequences, so there is no cache here."""
import math

import numpy as np

from minipali.learning.backward.ops import (
    attention,
    embed,
    gelu,
    linear,
    rms_norm,
    rope,
)
from minipali.model.gemma import prefix_lm_mask
from minipali.model.siglip import heads


def self_attention(x, p, cfg, positions, mask, layer):
    """As in SigLIP, with the rotations undone on the way back, and before those Gemma 3's norms."""
    N, K = cfg.num_attention_heads, cfg.num_key_value_heads
    q, pull_q = linear(x, **p["q_proj"])
    k, pull_k = linear(x, **p["k_proj"])
    v, pull_v = linear(x, **p["v_proj"])
    q, k, v = heads(q, N), heads(k, K), heads(v, K)
    if cfg.qk_norms:
        q, pull_q_norm = rms_norm(q, **p["q_norm"], eps=cfg.rms_norm_eps)
        k, pull_k_norm = rms_norm(k, **p["k_norm"], eps=cfg.rms_norm_eps)
    places, theta = positions / cfg.rope_factors[layer], cfg.rope_thetas[layer]
    q, pull_q_rope = rope(q, places, theta)
    k, pull_k_rope = rope(k, places, theta)
    mixed, pull_attention = attention(q, k, v, mask, 1 / math.sqrt(cfg.query_pre_attn_scalar),
                                      cfg.attn_logit_softcapping)
    flat = (*x.shape[:2], -1)
    y, pull_o = linear(mixed.reshape(flat), **p["o_proj"])

    def pull(dy):
        grads = {}
        dmixed, grads["o_proj"] = pull_o(dy)
        dq, dk, dv = pull_attention(dmixed.reshape(mixed.shape))
        dq, dk = pull_q_rope(dq), pull_k_rope(dk)
        if cfg.qk_norms:
            dq, grads["q_norm"] = pull_q_norm(dq)
            dk, grads["k_norm"] = pull_k_norm(dk)
        dx_q, grads["q_proj"] = pull_q(dq.reshape(flat))
        dx_k, grads["k_proj"] = pull_k(dk.reshape(flat))
        dx_v, grads["v_proj"] = pull_v(dv.reshape(flat))
        return dx_q + dx_k + dx_v, grads
    return y, pull


def mlp(x, p):
    """y = down(gelu(gate) · up): each factor's gradient is dy times the other factor."""
    gate, pull_gate = linear(x, **p["gate_proj"])
    up, pull_up = linear(x, **p["up_proj"])
    bent, pull_gelu = gelu(gate)
    y, pull_down = linear(bent * up, **p["down_proj"])

    def pull(dy):
        grads = {}
        dproduct, grads["down_proj"] = pull_down(dy)
        dx_gate, grads["gate_proj"] = pull_gate(pull_gelu(dproduct * up))
        dx_up, grads["up_proj"] = pull_up(dproduct * bent)
        return dx_gate + dx_up, grads
    return y, pull


def decoder_layer(x, p, cfg, positions, mask, layer):
    """Two residual blocks. Every norm is a link of the chain, Gemma 2's norms after the blocks too."""
    pulls = {}

    def norm(name, x):
        y, pulls[name] = rms_norm(x, **p[name], eps=cfg.rms_norm_eps)
        return y

    attended, pull_attention = self_attention(norm("input_layernorm", x), p["self_attn"], cfg, positions, mask, layer)
    if cfg.post_norms:
        attended = norm("post_attention_layernorm", attended)
    x = x + attended
    before_mlp = "pre_feedforward_layernorm" if cfg.post_norms else "post_attention_layernorm"
    thought, pull_mlp = mlp(norm(before_mlp, x), p["mlp"])
    if cfg.post_norms:
        thought = norm("post_feedforward_layernorm", thought)

    def pull(dy):
        grads, dthought = {}, dy
        if cfg.post_norms:
            dthought, grads["post_feedforward_layernorm"] = pulls["post_feedforward_layernorm"](dthought)
        dnormed, grads["mlp"] = pull_mlp(dthought)
        dx, grads[before_mlp] = pulls[before_mlp](dnormed)
        dy = dattended = dy + dx
        if cfg.post_norms:
            dattended, grads["post_attention_layernorm"] = pulls["post_attention_layernorm"](dattended)
        dnormed, grads["self_attn"] = pull_attention(dattended)
        dx, grads["input_layernorm"] = pulls["input_layernorm"](dnormed)
        return dy + dx, grads
    return x + thought, pull


def embed_tokens(ids, p, cfg):
    """The rows' gradients, times the √D by which they were scaled."""
    x, pull_embed = embed(ids, **p["embed_tokens"])
    scale = math.sqrt(cfg.hidden_size)

    def pull(dy):
        return {"embed_tokens": pull_embed(dy * scale)}
    return x * scale, pull


def decoder(x, p, cfg, positions, prefix_len):
    """The layers' pulls, last one first, after that of the norm."""
    positions, prefix_len = np.asarray(positions, like=x), np.asarray(prefix_len, like=x) * cfg.prefix_lm
    masks = {window: prefix_lm_mask(positions, positions, prefix_len, window) for window in set(cfg.sliding_windows)}
    pulls = []
    for i, layer in enumerate(p["layers"]):
        x, pull_layer = decoder_layer(x, layer, cfg, positions, masks[cfg.sliding_windows[i]], i)
        pulls.append(pull_layer)
    y, pull_norm = rms_norm(x, **p["norm"], eps=cfg.rms_norm_eps)

    def pull(dy):
        dx, dnorm = pull_norm(dy)
        grads = []
        for pull_layer in reversed(pulls):
            dx, layer_grads = pull_layer(dx)
            grads.append(layer_grads)
        return dx, {"layers": grads[::-1], "norm": dnorm}
    return y, pull


def output_logits(x, weight, cfg):
    """A linear map, and for Gemma 2 c·tanh(·/c), whose derivative is 1 - tanh²."""
    logits, pull_linear = linear(x, weight)
    cap = cfg.final_logit_softcapping
    if cap is not None:
        logits = cap * np.tanh(logits / cap)

    def pull(dy):
        if cap is not None:
            dy = dy * (1 - (logits / cap) ** 2)
        return pull_linear(dy)
    return logits, pull
