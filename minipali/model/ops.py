"""The building blocks. Each is a few lines of NumPy, defined only from those above it."""
import math

import numpy as np

# --- softmax and its relatives, without overflow ------------------------------------------------------------------------

def softmax_naive(x):
    """exp(x) / sum exp(x), as the textbook has it. Float32's exp overflows at 89: inf / inf = nan. Never used."""
    e = np.exp(x)
    return e / e.sum(-1, keepdims=True)


def softmax(x):
    """Softmax over the last axis. Subtracting the row's maximum changes nothing, exp(x-m) / sum exp(x-m) being the
    same fraction reduced by exp(m), but now the largest exponent is 0 and the sum is at least 1."""  # (..., S) -> (..., S)
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def log_sum_exp(x):
    """log(sum(exp(x))) over the last axis, by the same shift: m + log(sum(exp(x - m)))."""  # (..., S) -> (...)
    m = x.max(-1, keepdims=True)
    return (m + np.log(np.exp(x - m).sum(-1, keepdims=True)))[..., 0]


def log_softmax(x):
    """log(softmax(x)) without the logarithm of a probability that has rounded to 0."""  # (..., S) -> (..., S)
    return x - log_sum_exp(x)[..., None]


def log_sigmoid_naive(x):
    """log(1 / (1 + exp(-x))): at x = -100 in float32 this is log(1 / inf) = -inf, where the truth is -100. Never used."""
    return np.log(1 / (1 + np.exp(-x)))


def log_sigmoid(x):
    """log(1 / (1 + exp(-x))) = min(x, 0) - log(1 + exp(-|x|)): the exponent is never positive."""
    return np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x)))


def sigmoid(x):
    """1 / (1 + exp(-x)), through its logarithm so that neither tail overflows."""
    return np.exp(log_sigmoid(x))


# --- what every layer is made of ----------------------------------------------------------------------------------------

def linear(x, weight, bias=None):
    """x · weightᵀ + bias. The file keeps (out, in); `.T` is a view. All tokens go through as one matrix product."""
    # (..., in), (out, in), (out,) -> (..., out)
    y = (x.reshape(-1, x.shape[-1]) @ weight.T).reshape(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def gelu_gate(x):
    """From -1 (let nothing through) to 1 (let all through): the bend inside GELU."""
    return np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x)))


def gelu(x):
    """The tanh form of GELU (Hendrycks & Gimpel 2016, section 2), which both towers were trained with.

    The exact form, x · Φ(x) with the error function, differs by up to 5e-4: seen in activations, hardly ever in text.
    """
    return 0.5 * x * (1 + gelu_gate(x))


def layer_norm(x, weight, bias, eps):
    """Each token to mean 0 and variance 1, then scaled and shifted (Ba et al. 2016). eps is inside the square root."""
    # (..., D), (D,), (D,) -> (..., D)
    centered = x - x.mean(-1, keepdims=True)
    variance = (centered * centered).mean(-1, keepdims=True)
    return centered / np.sqrt(variance + eps) * weight + bias


def rms_norm(x, weight, eps):
    """Each token divided by its root mean square (Zhang & Sennrich 2019): no mean is subtracted and nothing is added.

    Gemma's files hold the scale minus 1, so the factor is (1 + weight). Llama's hold the scale itself; read as
    Llama's, a Gemma multiplies nearly everything by 0 and says nothing sensible, without an error.
    """  # (..., D), (D,) -> (..., D)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * (1 + weight)


def embed(ids, weight):
    """Row `ids[...]` of the table for each token."""  # (B,T), (V,D) -> (B,T,D)
    return weight[np.asarray(ids, like=weight)]


# --- positions ----------------------------------------------------------------------------------------------------------

def rope(x, positions, theta):
    """Rotary positions (Su et al. 2021): turn each pair of features by an angle that grows with the position.

    A query at m and a key at n then meet at the angle m - n, so attention sees distance, not place. Pair i turns by
    theta^(-2i/H) per step: the first pairs fast, the last ones hardly at all. Which features make a pair is a matter
    of the checkpoint, and it is here that ports go wrong. With H = 8:

        Gemma:  (0,4) (1,5) (2,6) (3,7)      feature i with feature i + H/2: "half-split"
        not:    (0,1) (2,3) (4,5) (6,7)      the paper's drawing, "interleaved": same sizes, nonsense after a few words

    Angles are made in float64: in float32 the 8000th position would already be off by 5e-4 of a turn.
    """  # (B,T,N,H), (B,T) -> (B,T,N,H)
    half = x.shape[-1] // 2
    speed = theta ** (-np.arange(half, like=x) / half)
    angle = np.asarray(positions, like=x)[:, :, None, None] * speed
    cos, sin = np.cos(angle).astype(x.dtype), np.sin(angle).astype(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


# --- attention ----------------------------------------------------------------------------------------------------------

def attention_weights(q, k, mask, scale, softcap=None):
    """How much each query takes from each key: softmax(scale · q·k), each row summing to 1 (Vaswani et al. 2017).

    With fewer key/value heads than query heads (K < N) neighbours share one. For N = 4, K = 2 the query heads meet

        K1 K1 K2 K2     the order in which the checkpoint was trained
        not K1 K2 K1 K2 which has the same shape, so nothing would complain

    `mask` says True where a query may look; elsewhere the score becomes so low that its exp is exactly 0. It is
    finite, and not -inf, so that a padding row that may look nowhere gives even weights and not nan.
    `softcap` (Gemma 2) bends scores smoothly into ±softcap; it comes before the mask, or it would lift the masked ones.
    """  # (B,T,N,H), (B,S,K,H), (B,T,S) -> (B,N,T,S)
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    q = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, N // K * T, H)
    scores = (q @ k.transpose(0, 2, 3, 1)).reshape(B, N, T, S) * scale
    if softcap is not None:
        scores = softcap * np.tanh(scores / softcap)
    if mask is not None:
        scores = np.where(mask[:, None], scores, 0.5 * float(np.finfo(scores.dtype).min))
    return softmax(scores)


def weighted_values(weights, v):
    """Each query's mixture of the values, head by head, with the same sharing of heads as above."""
    # (B,N,T,S), (B,S,K,H) -> (B,T,N,H)
    B, N, T, S = weights.shape
    K, H = v.shape[2:]
    mixed = weights.reshape(B, K, N // K * T, S) @ v.transpose(0, 2, 1, 3)
    return mixed.reshape(B, N, T, H).transpose(0, 2, 1, 3)


def attention(q, k, v, mask, scale, softcap=None):
    """Multi-head (K = N), grouped-query (1 < K < N) and multi-query (K = 1) attention in one."""
    # (B,T,N,H), (B,S,K,H), (B,S,K,H), (B,T,S) -> (B,T,N,H)
    return weighted_values(attention_weights(q, k, mask, scale, softcap), v)
