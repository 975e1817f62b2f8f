"""Backward of model/siglip.py."""
import math

import numpy as np

from minipali.learning.backward.ops import attention, embed, gelu, layer_norm, linear, recomputed
from minipali.model import siglip
from minipali.model.siglip import heads


def self_attention(x, p, cfg):
    """x is used three times, so dx is the sum of what comes back through q, k and v."""  # (B,T,D) -> (B,T,D)
    N = cfg.num_attention_heads
    q, pull_q = linear(x, **p["q_proj"])
    k, pull_k = linear(x, **p["k_proj"])
    v, pull_v = linear(x, **p["v_proj"])
    q, k, v = heads(q, N), heads(k, N), heads(v, N)
    attended, pull_attention = attention(q, k, v, None, 1 / math.sqrt(q.shape[-1]))
    y, pull_out = linear(attended.reshape(x.shape), **p["out_proj"])

    def pull(dy):
        grads = {}
        dattended, grads["out_proj"] = pull_out(dy)
        dq, dk, dv = pull_attention(dattended.reshape(attended.shape))
        dx_q, grads["q_proj"] = pull_q(dq.reshape(x.shape))
        dx_k, grads["k_proj"] = pull_k(dk.reshape(x.shape))
        dx_v, grads["v_proj"] = pull_v(dv.reshape(x.shape))
        return dx_q + dx_k + dx_v, grads
    return y, pull


def mlp(x, p):
    """Three functions in a chain, back through each."""  # (B,T,D) -> (B,T,D)
    hidden, pull_fc1 = linear(x, **p["fc1"])
    activated, pull_gelu = gelu(hidden)
    y, pull_fc2 = linear(activated, **p["fc2"])

    def pull(dy):
        dactivated, dfc2 = pull_fc2(dy)
        dx, dfc1 = pull_fc1(pull_gelu(dactivated))
        return dx, {"fc1": dfc1, "fc2": dfc2}
    return y, pull


def residual_mlp(x, norm, p_norm, p_mlp, cfg):
    """x + mlp(layer_norm(x)), the second half of an encoder layer and of the pooling head."""  # (B,T,D) -> (B,T,D)
    normed, pull_norm = layer_norm(x, **p_norm, eps=cfg.layer_norm_eps)
    mlp_output, pull_mlp = mlp(normed, p_mlp)

    def pull(dy):
        dnormed, dmlp = pull_mlp(dy)
        dx, dnorm = pull_norm(dnormed)
        return dy + dx, {norm: dnorm, "mlp": dmlp}
    return x + mlp_output, pull


def encoder_layer(x, p, cfg):
    """A residual sum hands dy on unchanged and adds what comes back through the block: gradients reach every layer."""
    # (B,T,D) -> (B,T,D)
    normed, pull_norm = layer_norm(x, **p["layer_norm1"], eps=cfg.layer_norm_eps)
    attention_output, pull_attention = self_attention(normed, p["self_attn"], cfg)
    y, pull_mlp = residual_mlp(x + attention_output, "layer_norm2", p["layer_norm2"], p["mlp"], cfg)

    def pull(dy):
        dy, grads = pull_mlp(dy)
        dnormed, grads["self_attn"] = pull_attention(dy)
        dx, grads["layer_norm1"] = pull_norm(dnormed)
        return dy + dx, grads
    return y, pull


def encoder(x, p, cfg, recompute=False):
    """The layers' pulls, last one first. `recompute`: see ops.recomputed."""  # (B,T,D) -> (B,T,D)
    pulls, run_layer = [], recomputed(encoder_layer) if recompute else encoder_layer
    for layer in p["layers"]:
        x, pull_layer = run_layer(x, layer, cfg)
        pulls.append(pull_layer)

    def pull(dy):
        grads = []
        for pull_layer in reversed(pulls):
            dy, layer_grads = pull_layer(dy)
            grads.append(layer_grads)
        return dy, {"layers": grads[::-1]}
    return x, pull


def patchify(pixels, size):
    """Only the order of the numbers changes; dpixels is the same shuffle undone, 0 where no patch reached."""
    # (B,3,rows*size,columns*size) -> (B,P,3*size*size)
    y = siglip.patchify(pixels, size)

    def pull(dy):
        B, C, height, width = pixels.shape
        rows, columns = height // size, width // size
        dy = dy.reshape(B, rows, columns, C, size, size).transpose(0, 3, 1, 4, 2, 5)
        dpixels = np.zeros_like(pixels)
        dpixels[:, :, :rows * size, :columns * size] = dy.reshape(B, C, rows * size, columns * size)
        return dpixels
    return y, pull


def patch_embeddings(pixels, p, cfg):
    """A linear map; the position table was added to every picture, so its gradient is the sum over the batch."""
    # (B,3,height,width) -> (B,P,D)
    kernel = p["patch_embedding"]["weight"]
    patches, pull_patches = patchify(pixels, cfg.patch_size)
    x, pull_linear = linear(patches, kernel.reshape(kernel.shape[0], -1), p["patch_embedding"]["bias"])

    def pull(dy):
        dpatches, grads = pull_linear(dy)
        grads["weight"] = grads["weight"].reshape(kernel.shape)
        return pull_patches(dpatches), {"patch_embedding": grads, "position_embedding": {"weight": dy.sum(0)}}
    return x + p["position_embedding"]["weight"], pull


def vision_tower(pixels, p, cfg, recompute=False):
    """Embeddings, encoder, norm, in reverse."""  # (B,3,height,width) -> (B,P,D)
    x, pull_embeddings = patch_embeddings(pixels, p["embeddings"], cfg)
    x, pull_encoder = encoder(x, p["encoder"], cfg, recompute)
    y, pull_norm = layer_norm(x, **p["post_layernorm"], eps=cfg.layer_norm_eps)

    def pull(dy):
        grads = {}
        dx, grads["post_layernorm"] = pull_norm(dy)
        dx, grads["encoder"] = pull_encoder(dx)
        dpixels, grads["embeddings"] = pull_embeddings(dx)
        return dpixels, grads
    return y, pull


def attention_pool(x, p, cfg):
    """The probe was shared by the whole batch; the three input maps are one matrix in the file, so their gradients
    are put back together."""  # (B,P,D) -> (B,D)
    B, P, D = x.shape
    N, a = cfg.num_attention_heads, p["attention"]
    (wq, wk, wv), (bq, bk, bv) = a["in_proj_weight"].reshape(3, D, D), a["in_proj_bias"].reshape(3, D)
    probe = np.broadcast_to(p["probe"], (B, 1, D))
    q, pull_q = linear(probe, wq, bq)
    k, pull_k = linear(x, wk, bk)
    v, pull_v = linear(x, wv, bv)
    q, k, v = heads(q, N), heads(k, N), heads(v, N)
    attended, pull_attention = attention(q, k, v, None, 1 / math.sqrt(q.shape[-1]))
    attention_output, pull_out = linear(attended.reshape(B, 1, D), **a["out_proj"])
    y, pull_mlp = residual_mlp(attention_output, "layernorm", p["layernorm"], p["mlp"], cfg)

    def pull(dy):
        dattention_output, grads = pull_mlp(dy[:, None])
        dattended, dout = pull_out(dattention_output)
        dq, dk, dv = pull_attention(dattended.reshape(attended.shape))
        dprobe, gq = pull_q(dq.reshape(B, 1, D))
        dx_k, gk = pull_k(dk.reshape(B, P, D))
        dx_v, gv = pull_v(dv.reshape(B, P, D))
        grads["probe"] = dprobe.sum(0, keepdims=True)
        grads["attention"] = {"in_proj_weight": np.concatenate([gq["weight"], gk["weight"], gv["weight"]]),
                              "in_proj_bias": np.concatenate([gq["bias"], gk["bias"], gv["bias"]]), "out_proj": dout}
        return dx_k + dx_v, grads
    return y[:, 0], pull


def encode_image(pixels, p, cfg):
    """The tower, then the pooling head; the gradients of both lie under vision_model, as in the file."""
    # (B,3,height,width) -> (B,D)
    x, pull_tower = vision_tower(pixels, p["vision_model"], cfg.vision_config)
    y, pull_pool = attention_pool(x, p["vision_model"]["head"], cfg.vision_config)

    def pull(dy):
        dx, dhead = pull_pool(dy)
        dpixels, grads = pull_tower(dx)
        return dpixels, {"vision_model": {**grads, "head": dhead}}
    return y, pull


def encode_text(ids, p, cfg):
    """Only the last position was read, so all others start with a gradient of 0 and get theirs through attention."""
    # (B,T) -> (B,D)
    p, cfg = p["text_model"], cfg.text_config
    x, pull_tokens = embed(ids, **p["embeddings"]["token_embedding"])
    x, pull_encoder = encoder(x + p["embeddings"]["position_embedding"]["weight"], p["encoder"], cfg)
    normed, pull_norm = layer_norm(x, **p["final_layer_norm"], eps=cfg.layer_norm_eps)
    y, pull_head = linear(normed[:, -1], **p["head"])

    def pull(dy):
        grads, dnormed = {}, np.zeros_like(normed)
        dnormed[:, -1], grads["head"] = pull_head(dy)
        dx, grads["final_layer_norm"] = pull_norm(dnormed)
        dx, grads["encoder"] = pull_encoder(dx)
        grads["embeddings"] = {"token_embedding": pull_tokens(dx), "position_embedding": {"weight": dx.sum(0)}}
        return {"text_model": grads}
    return y, pull
