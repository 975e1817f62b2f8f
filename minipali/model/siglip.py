"""SigLIP (Zhai et al. 2023): a vision transformer, and the text tower that it is trained against.

A vision transformer makes each square of the picture one token: 16 rows of 16 at 224 pixels, 256 tokens. A token for
each pixel would make 50,176, and attention compares every token with every other.

Both towers are the same stack of encoder layers. A layer adds to the tokens twice: attention lets them look at one
another, the MLP then works on each alone. Nothing is causal here: every token sees every other.
`tap(name, x)` returns x, and `scope` says where it is: ignore both on first reading.
"""
import math

import numpy as np

from minipali.model.ops import attention, embed, gelu, layer_norm, linear
from minipali.trace import scope, tap


def heads(x, count):
    """Cut q, k or v into heads; head 0 has the first H numbers (H = D/N in SigLIP)."""  # (B,T,N*H) -> (B,T,N,H)
    return x.reshape(*x.shape[:2], count, -1)


def self_attention(x, p, cfg):
    """Every token asks with its query, offers its key, and gives its value to those whose query fits its key.
    The heads cut q, k and v and not x, so each reads the whole token. Their results lie side by side; out_proj mixes
    them, or no head could use what another one has fetched.
    """  # (B,T,D) -> (B,T,D)
    N = cfg.num_attention_heads
    q = heads(tap("q_proj", linear(x, **p["q_proj"])), N)
    k = heads(tap("k_proj", linear(x, **p["k_proj"])), N)
    v = heads(tap("v_proj", linear(x, **p["v_proj"])), N)
    attended = attention(q, k, v, None, 1 / math.sqrt(q.shape[-1]))  # (B,T,N,D/N)
    return tap("out_proj", linear(attended.reshape(x.shape), **p["out_proj"]))


def mlp(x, p):
    """Out to F features, the activation function, and back: the same for each token, alone."""  # (B,T,D) -> (B,T,D)
    hidden = tap("fc1", linear(x, **p["fc1"]))
    return tap("fc2", linear(gelu(hidden), **p["fc2"]))


def encoder_layer(x, p, cfg):
    """Attention, then MLP, each added to x, the residual stream. Pre-norm: what a block reads is normalized, the sum
    never is, so a straight path runs from the patches to the last layer, and gradients come back along it. Post-norm
    (Vaswani et al. 2017), norm(x + block(x)), has no such path."""  # (B,T,D) -> (B,T,D)
    normed = tap("layer_norm1", layer_norm(x, **p["layer_norm1"], eps=cfg.layer_norm_eps))
    with scope("self_attn"):
        attention_output = self_attention(normed, p["self_attn"], cfg)
    x = x + tap("self_attn", attention_output)
    normed = tap("layer_norm2", layer_norm(x, **p["layer_norm2"], eps=cfg.layer_norm_eps))
    with scope("mlp"):
        mlp_output = mlp(normed, p["mlp"])
    return x + tap("mlp", mlp_output)


def encoder(x, p, cfg):
    """L layers, one after the other."""  # (B,T,D) -> (B,T,D)
    for i, layer in enumerate(p["layers"]):
        with scope("layers", i):
            x = encoder_layer(x, layer, cfg)
        x = tap(f"layers.{i}", x)
    return x


def patchify(pixels, size):
    """Cut each picture into squares of `size` pixels, row by row from the top left, and lay each square out flat.
    Inside a patch the order is channel, row, column: that of the convolution kernel in the file.
    """  # (B,3,rows*size,columns*size) -> (B,P,3*size*size)
    B, C, height, width = pixels.shape
    rows, columns = height // size, width // size
    squares = pixels[:, :, :rows * size, :columns * size].reshape(B, C, rows, size, columns, size)
    squares = squares.transpose(0, 2, 4, 1, 3, 5)  # (B,rows,columns,C,size,size)
    return squares.reshape(B, rows * columns, C * size * size)


def patch_embeddings(pixels, p, cfg):
    """Patches to tokens. A convolution whose stride is its size never sees a pixel twice: it is one linear map a patch.
    The learned position table is added, since attention by itself could not tell one order of patches from another.
    """  # (B,3,height,width) -> (B,P,D)
    kernel = p["patch_embedding"]["weight"]  # (D,3,size,size)
    x = linear(patchify(pixels, cfg.patch_size), kernel.reshape(kernel.shape[0], -1), p["patch_embedding"]["bias"])
    return x + p["position_embedding"]["weight"]


def vision_tower(pixels, p, cfg):
    """The picture as P tokens of width D, in [-1, 1] pixels. There is no CLS token and, for PaliGemma, no pooling."""
    # (B,3,height,width) -> (B,P,D)
    x = tap("embeddings", patch_embeddings(pixels, p["embeddings"], cfg))
    with scope("encoder"):
        x = encoder(x, p["encoder"], cfg)
    return tap("post_layernorm", layer_norm(x, **p["post_layernorm"], eps=cfg.layer_norm_eps))


def attention_pool(x, p, cfg):
    """One vector for the whole picture: a learned probe asks, all patches answer ("MAP head", Zhai et al. 2022).
    PyTorch stores this layer's three input maps as one (3D, D) matrix; rows 0..D are q, then k, then v.
    """  # (B,P,D) -> (B,D)
    B, _, D = x.shape
    N, a = cfg.num_attention_heads, p["attention"]
    (wq, wk, wv), (bq, bk, bv) = a["in_proj_weight"].reshape(3, D, D), a["in_proj_bias"].reshape(3, D)
    probe = np.broadcast_to(p["probe"], (B, 1, D))
    q, k, v = heads(linear(probe, wq, bq), N), heads(linear(x, wk, bk), N), heads(linear(x, wv, bv), N)
    attended = attention(q, k, v, None, 1 / math.sqrt(q.shape[-1]))
    x = tap("attention", linear(attended.reshape(B, 1, D), **a["out_proj"]))
    normed = tap("layernorm", layer_norm(x, **p["layernorm"], eps=cfg.layer_norm_eps))
    with scope("mlp"):
        mlp_output = mlp(normed, p["mlp"])
    return (x + tap("mlp", mlp_output))[:, 0]


def encode_image(pixels, p, cfg):
    """A picture as one vector in the space that it shares with captions."""  # (B,3,height,width) -> (B,D)
    with scope("vision_model"):
        x = vision_tower(pixels, p["vision_model"], cfg.vision_config)
        with scope("head"):
            x = attention_pool(x, p["vision_model"]["head"], cfg.vision_config)
        return tap("head", x)


def encode_text(ids, p, cfg):
    """A caption as one vector: that of the last position, through a linear head.
    There is no mask: the model was trained with every caption padded to the full length, and the vector is read off
    the last padding token. Unpadded text therefore gives another, worse answer, a mistake that is easy to make.
    """  # (B,T) -> (B,D)
    p, cfg = p["text_model"], cfg.text_config
    with scope("text_model"):
        x = embed(ids, **p["embeddings"]["token_embedding"]) + p["embeddings"]["position_embedding"]["weight"]
        x = tap("embeddings", x)
        with scope("encoder"):
            x = encoder(x, p["encoder"], cfg)
        x = tap("final_layer_norm", layer_norm(x, **p["final_layer_norm"], eps=cfg.layer_norm_eps))
        return tap("head", linear(x[:, -1], **p["head"]))
