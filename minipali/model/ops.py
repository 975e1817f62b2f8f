"""The building blocks. Each is a few lines of NumPy and uses only those above it.

`by_heads(a, b)` is a @ b, and `tap(name, x)` is x; ignore what else these two and `@by_rows` do on first reading.
"""
import math

import numpy as np

from minipali.parallel import by_heads, by_rows
from minipali.trace import ATTENTION, tap

# --- softmax and its relatives, without overflow ----------------------------------------------------------------------

def softmax_naive(x):
    """exp(x) / sum exp(x), as the textbook has it. Float32's exp overflows at 89: inf / inf = nan. Never used."""
    e = np.exp(x)
    return e / e.sum(-1, keepdims=True)


@by_rows
def softmax(x):
    """Softmax over the last axis: any scores become shares that are positive and sum to 1. For every number m,
        exp(x-m) / Σ exp(x-m)  =  exp(x) exp(-m) / (exp(-m) Σ exp(x))  =  exp(x) / Σ exp(x)
    With m = the row's maximum nothing overflows, and the sum is at least 1, so nothing is divided by 0. What is far
    below the maximum may round to 0, which is harmless. [1, 2, 100] gives [1e-43, 3e-43, 1]; naively, [0, 0, nan].
    """  # (..., S) -> (..., S)
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def log_sum_exp(x):
    """log Σ exp(x) = log(exp(m) Σ exp(x-m)) = m + log Σ exp(x-m), over the last axis."""  # (..., S) -> (...)
    m = x.max(-1, keepdims=True)
    return (m + np.log(np.exp(x - m).sum(-1, keepdims=True)))[..., 0]


def log_softmax(x):
    """log(softmax(x)). Of [0, -2000] it is [0, -2000]; softmax, then log, gives [0, -inf]."""  # (..., S) -> (..., S)
    return x - log_sum_exp(x)[..., None]


def log_sigmoid_naive(x):
    """log(1 / (1 + exp(-x))): at x = -100 in float32 this is log(1 / inf) = -inf, the truth is -100. Never used."""
    return np.log(1 / (1 + np.exp(-x)))


def log_sigmoid(x):
    """log(1 / (1 + exp(-x))) = min(x, 0) - log(1 + exp(-|x|)): no exponent is positive. For x >= 0 that is the
    definition; for x < 0 the fraction was extended by exp(x), to exp(x) / (exp(x) + 1)."""
    return np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x)))


def sigmoid(x):
    """1 / (1 + exp(-x)), through its logarithm so that neither tail overflows."""
    return np.exp(log_sigmoid(x))


# --- what every layer is made of --------------------------------------------------------------------------------------
def linear(x, weight, bias=None):
    """x · weightᵀ + bias. The file keeps (out, in), and `.T` is a view. All tokens of all examples go through as one
    matrix product: a large one is faster than many small ones."""  # (..., in), (out, in), (out,) -> (..., out)
    y = (x.reshape(-1, x.shape[-1]) @ weight.T).reshape(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def gelu_gate(x):
    """The tanh factor of GELU, from -1 (let nothing through) to 1 (let all through)."""
    return np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x)))


@by_rows
def gelu(x):
    """The activation function (non-linearity) of every MLP: close to x for large x, close to 0 for very negative x.
    Without one between them, two linear maps in a row are one linear map, and depth would bring nothing. This is
    GELU's tanh form (Hendrycks & Gimpel 2016, section 2), with which both towers were trained. The exact form, x · Φ(x)
    with the error function, differs by up to 5e-4: seen in activations, hardly ever in text.
    """
    return 0.5 * x * (1 + gelu_gate(x))


@by_rows
def layer_norm(x, weight, bias, eps):
    """Each token to mean 0 and variance 1, then scaled and shifted (Ba et al. 2016). eps is inside the square root.
    Layers add to their input, so sizes grow with depth; a norm gives every block inputs of one size. It looks at one
    token alone. BatchNorm takes mean and variance over the batch, so an answer would depend on its neighbors there.
    """  # (..., D), (D,), (D,) -> (..., D)
    centered = x - x.mean(-1, keepdims=True)
    variance = (centered * centered).mean(-1, keepdims=True)
    return centered / np.sqrt(variance + eps) * weight + bias


@by_rows
def rms_norm(x, weight, eps):
    """Each token divided by its root mean square: LayerNorm without mean and bias (Zhang & Sennrich 2019: no loss).
    Gemma's files hold the scale minus 1, so the factor is (1 + weight). Llama's hold the scale itself; read as
    Llama's, a Gemma multiplies nearly everything by 0 and says nothing sensible, without an error.
    """  # (..., D), (D,) -> (..., D)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * (1 + weight)


def embed(ids, weight):
    """Row `ids[...]` of the table for each token."""  # (B,T), (V,D) -> (B,T,D)
    return weight[np.asarray(ids, like=weight)]


# --- positions --------------------------------------------------------------------------------------------------------
def rope(x, positions, theta):
    """Rotary positions (Su et al. 2021): turn each pair of features by an angle that grows with the position.

    With R(a) the rotation by a, R(a)ᵀ = R(-a), the rotation back, so R(a)ᵀ R(b) = R(b-a). A query at m and a key at n,
    turning by w each step, then meet in
    (R(mw) q) · (R(nw) k)  =  q · R(mw)ᵀ R(nw) k  =  q · R((n-m)w) k: attention sees the distance and not the place.
    Pair i has w = theta^(-2i/H), its "inverse frequency"; theta is the base, 10,000 in the paper, whose theta_i is our
    w. Fast pairs tell neighbors apart, slow ones near from far. Ports go wrong in which features make a pair. H = 8:

        Gemma:  (0,4) (1,5) (2,6) (3,7)      feature i with feature i + H/2: "half-split"
        not:    (0,1) (2,3) (4,5) (6,7)      the paper's drawing, "interleaved": same sizes, nonsense after a few tokens

    Angles are made in float64: in float32 they are off by up to 3.4e-4 radian at position 8000 (H = 256).
    """  # (B,T,N,H), (B,T) -> (B,T,N,H)
    half = x.shape[-1] // 2
    inv_freq = theta ** (-np.arange(half, like=x) / half)
    angle = np.asarray(positions, like=x)[:, :, None, None] * inv_freq
    cos, sin = np.cos(angle).astype(x.dtype), np.sin(angle).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


# --- attention --------------------------------------------------------------------------------------------------------
def attention_weights(q, k, mask, scale, softcap=None):
    """How much each query takes from each key: softmax(scale · q·k), each row summing to 1 (Vaswani et al. 2017).

    `scale` is 1/√H: q·k is a sum of H products, so for random q and k its spread is √H, 16 at H = 256. Unscaled, one of
    64 keys would get 0.9 of the weight on average before anything is learned; scaled, 0.1.
    With fewer key heads than query heads (K < N), G = N/K neighbors share one. For N = 4, K = 2 the query heads meet

        K1 K1 K2 K2     the order in which the checkpoint was trained
        not K1 K2 K1 K2 which has the same shape, so nothing would complain

    `softcap` (Gemma 2) keeps scores smoothly within ±softcap, and comes before the mask, or it would lift masked ones.
    """  # (B,T,N,H), (B,S,K,H), (B,T,S) -> (B,N,T,S)
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    # np.einsum("BTKGH,BSKH->BKGTS", q, k) as one matrix product for each key head, over the G·T rows that share it.
    q = q.reshape(B, T, K, N // K, H)  # (B,T,K,G,H)
    q = q.transpose(0, 2, 3, 1, 4)  # (B,K,G,T,H)
    q = q.reshape(B, K, N // K * T, H)  # (B,K,G*T,H)
    scores = by_heads(q, k.transpose(0, 2, 3, 1))  # (B,K,G*T,S)
    scores = scores.reshape(B, N, T, S) * scale  # (B,N,T,S)
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    if mask is not None:
        # Where a query may not look, exp of the score becomes exactly 0. The score is finite and not -inf, so that a
        # padding row that may look nowhere gives even weights and not nan.
        scores = np.where(mask[:, None], scores, 0.5 * float(np.finfo(scores.dtype).min))
    return softmax(scores)


def weighted_values(weights, v):
    """Each query's mixture of the values, heads shared as above."""  # (B,N,T,S), (B,S,K,H) -> (B,T,N,H)
    B, N, T, S = weights.shape
    K, H = v.shape[2:]
    # np.einsum("BKGTS,BSKH->BTKGH", weights, v), again over the G·T rows that share a value head.
    weights = weights.reshape(B, K, N // K * T, S)  # (B,K,G*T,S)
    attended = by_heads(weights, v.transpose(0, 2, 1, 3))  # (B,K,G*T,H)
    return attended.reshape(B, N, T, H).transpose(0, 2, 1, 3)


def attention(q, k, v, mask, scale, softcap=None):
    """Multi-head (K = N), grouped-query (1 < K < N) and multi-query (K = 1) attention in one.
    One head gives one set of weights; N heads let a token look for N things at once. Fewer key/value heads make the
    cache smaller, for a little quality: PaliGemma 3B keeps 36,864 bytes a token in float32 with K = 1, 294,912 with 8.
    `mask` says True where a query may look.
    """  # (B,T,N,H), (B,S,K,H), (B,S,K,H), (B,T,S) -> (B,T,N,H)
    return weighted_values(tap(ATTENTION, attention_weights(q, k, mask, scale, softcap)), v)
