"""Backward of model/gemma.py. Training sees whole sequences, so there is no cache here."""
import math

import numpy as np

from minipali.learning.backward.ops import (
    attention,
    embed,
    gelu,
    linear,
    recomputed,
    rms_norm,
    rope,
)
from minipali.model.gemma import prefix_lm_mask
from minipali.model.siglip import heads


def self_attention(x, p, cfg, positions, mask, layer):
    """As in SigLIP, with the rotations undone on the way back, and before those Gemma 3's norms."""
    # (B,T,D) -> (B,T,D)
    N, K = cfg.num_attention_heads, cfg.num_key_value_heads
    q, pull_q = linear(x, **p["q_proj"])
    k, pull_k = linear(x, **p["k_proj"])
    v, pull_v = linear(x, **p["v_proj"])
    q, k, v = heads(q, N), heads(k, K), heads(v, K)
    if cfg.qk_norms:
        q, pull_q_norm = rms_norm(q, **p["q_norm"], eps=cfg.rms_norm_eps)
        k, pull_k_norm = rms_norm(k, **p["k_norm"], eps=cfg.rms_norm_eps)
    rope_positions, theta = positions / cfg.rope_factors[layer], cfg.rope_thetas[layer]
    # Queries and keys turn by the same angles: in one call, these are computed once.
    turned, pull_rope = rope(np.concatenate([q, k], axis=2), rope_positions, theta)
    q, k = turned[:, :, :N], turned[:, :, N:]
    attended, pull_attention = attention(q, k, v, mask, 1 / math.sqrt(cfg.query_pre_attn_scalar),
                                         cfg.attn_logit_softcapping)
    flat = (*x.shape[:2], -1)
    y, pull_o = linear(attended.reshape(flat), **p["o_proj"])

    def pull(dy):
        grads = {}
        dattended, grads["o_proj"] = pull_o(dy)
        dq, dk, dv = pull_attention(dattended.reshape(attended.shape))
        dturned = pull_rope(np.concatenate([dq, dk], axis=2))
        dq, dk = dturned[:, :, :N], dturned[:, :, N:]
        if cfg.qk_norms:
            dq, grads["q_norm"] = pull_q_norm(dq)
            dk, grads["k_norm"] = pull_k_norm(dk)
        dx_q, grads["q_proj"] = pull_q(dq.reshape(flat))
        dx_k, grads["k_proj"] = pull_k(dk.reshape(flat))
        dx_v, grads["v_proj"] = pull_v(dv.reshape(flat))
        return dx_q + dx_k + dx_v, grads
    return y, pull


def mlp(x, p):
    """y = down(gelu(gate) · up): each factor's gradient is dy times the other factor."""  # (B,T,D) -> (B,T,D)
    gate, pull_gate = linear(x, **p["gate_proj"])
    up, pull_up = linear(x, **p["up_proj"])
    activated, pull_gelu = gelu(gate)
    y, pull_down = linear(activated * up, **p["down_proj"])

    def pull(dy):
        grads = {}
        dproduct, grads["down_proj"] = pull_down(dy)
        dx_gate, grads["gate_proj"] = pull_gate(pull_gelu(dproduct * up))
        dx_up, grads["up_proj"] = pull_up(dproduct * activated)
        return dx_gate + dx_up, grads
    return y, pull


def decoder_layer(x, p, cfg, positions, mask, layer):
    """Two residual blocks. Every norm is a link of the chain, Gemma 2's norms after the blocks too."""
    # (B,T,D) -> (B,T,D)
    pulls = {}

    def norm(name, x):
        y, pulls[name] = rms_norm(x, **p[name], eps=cfg.rms_norm_eps)
        return y

    normed = norm("input_layernorm", x)
    attention_output, pull_attention = self_attention(normed, p["self_attn"], cfg, positions, mask, layer)
    if cfg.post_norms:
        attention_output = norm("post_attention_layernorm", attention_output)
    x = x + attention_output
    before_mlp = "pre_feedforward_layernorm" if cfg.post_norms else "post_attention_layernorm"
    mlp_output, pull_mlp = mlp(norm(before_mlp, x), p["mlp"])
    if cfg.post_norms:
        mlp_output = norm("post_feedforward_layernorm", mlp_output)

    def pull(dy):
        grads, dmlp_output = {}, dy
        if cfg.post_norms:
            dmlp_output, grads["post_feedforward_layernorm"] = pulls["post_feedforward_layernorm"](dmlp_output)
        dnormed, grads["mlp"] = pull_mlp(dmlp_output)
        dx, grads[before_mlp] = pulls[before_mlp](dnormed)
        dy = dattention = dy + dx
        if cfg.post_norms:
            dattention, grads["post_attention_layernorm"] = pulls["post_attention_layernorm"](dattention)
        dnormed, grads["self_attn"] = pull_attention(dattention)
        dx, grads["input_layernorm"] = pulls["input_layernorm"](dnormed)
        return dy + dx, grads
    return x + mlp_output, pull


def embed_tokens(ids, p, cfg):
    """The rows' gradients, times the √D by which they were scaled."""  # (B,T) -> (B,T,D)
    x, pull_embed = embed(ids, **p["embed_tokens"])
    scale = math.sqrt(cfg.hidden_size)

    def pull(dy):
        return {"embed_tokens": pull_embed(dy * scale)}
    return x * scale, pull


def decoder(x, p, cfg, positions, prefix_len, recompute=False):
    """The layers' pulls, last one first, after that of the norm. `recompute`: see ops.recomputed."""
    # (B,T,D), (B,T), (B,) -> (B,T,D)
    positions = np.asarray(positions, like=x)
    prefix_len = np.asarray(prefix_len, like=x) if cfg.prefix_lm else np.zeros_like(positions[:, 0])
    masks = {window: prefix_lm_mask(positions, positions, prefix_len, window) for window in set(cfg.sliding_windows)}
    pulls, run_layer = [], recomputed(decoder_layer) if recompute else decoder_layer
    for i, layer in enumerate(p["layers"]):
        x, pull_layer = run_layer(x, layer, cfg, positions, masks[cfg.sliding_windows[i]], i)
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
    """A linear map, and for Gemma 2 c·tanh(·/c), whose derivative is 1 - tanh²."""  # (..., D), (V,D) -> (..., V)
    logits, pull_linear = linear(x, weight)
    cap = cfg.final_logit_softcapping
    if cap is not None:
        logits = cap * np.tanh(logits / cap)

    def pull(dy):
        if cap is not None:
            dy = dy * (1 - (logits / cap) ** 2)
        return pull_linear(dy)
    return logits, pull
