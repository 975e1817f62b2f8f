"""Backward of model/ops.py."""
import math

import numpy as np

from minipali.model import ops


def softmax(x):
    """dy/dx = diag(y) - y yᵀ, so dx = y (dy - Σ dy y): a row's gradients always sum to 0."""  # (..., S) -> (..., S)
    y = ops.softmax(x)

    def pull(dy):
        return y * (dy - (dy * y).sum(-1, keepdims=True))
    return y, pull


def log_softmax(x):
    """y = x - log Σ exp x, whose second term has the gradient softmax(x) = exp(y)."""  # (..., S) -> (..., S)
    y = ops.log_softmax(x)

    def pull(dy):
        return dy - np.exp(y) * dy.sum(-1, keepdims=True)
    return y, pull


def log_sum_exp(x):
    """The gradient of log Σ exp x is softmax(x)."""  # (..., S) -> (...)
    y = ops.log_sum_exp(x)

    def pull(dy):
        return dy[..., None] * np.exp(x - y[..., None])
    return y, pull


def log_sigmoid(x):
    """d/dx log σ(x) = 1 - σ(x) = σ(-x)."""
    y = ops.log_sigmoid(x)

    def pull(dy):
        return dy * ops.sigmoid(-x)
    return y, pull


def sigmoid(x):
    """dσ/dx = σ (1 - σ), and 1 - σ(x) = σ(-x)."""
    y = ops.sigmoid(x)

    def pull(dy):
        return dy * y * ops.sigmoid(-x)
    return y, pull


def linear(x, weight, bias=None):
    """y = x Wᵀ + b. dx = dy W; dW = Σ over tokens of dy xᵀ, one matrix product; db = Σ over tokens of dy.

    A weight that is no array (learning/lora.py) has no dW, or other gradients in its place, and says so.
    """
    # (..., in), (out, in), (out,) -> (..., out)
    y = ops.linear(x, weight, bias)

    def pull(dy):
        dy = dy.reshape(-1, dy.shape[-1])
        tokens = x.reshape(-1, x.shape[-1])
        own = getattr(weight, "product_gradients", None)
        grads = own(dy, tokens) if own else {"weight": dy.T @ tokens}
        if bias is not None:
            grads["bias"] = dy.sum(0)
        return (dy @ weight).reshape(x.shape), grads
    return y, pull


def gelu(x):
    """y = x/2 (1 + t) with t = tanh(u) and u = c (x + a x³), so dy/dx = (1 + t + (1 - t²) x du/dx) / 2.

    The slope is built in place, a fifth of the time: this is the widest array of the model, and tanh its slowest step.
    """
    t = ops.gelu_gate(x)

    def pull(dy):
        c = math.sqrt(2 / math.pi)
        slope = x * x
        slope *= 3 * 0.044715 * c
        slope += c
        slope *= x  # x du/dx
        slope *= 1 - t * t
        slope += t
        slope += 1
        slope *= 0.5
        slope *= dy
        return slope
    return 0.5 * x * (1 + t), pull


def layer_norm(x, weight, bias, eps):
    """With n = (x - mean) / s and dn = dy · weight: dx = (dn - mean(dn) - n mean(dn n)) / s.

    The two subtractions take out what the normalization makes impossible: moving all features, and scaling them.
    """  # (..., D), (D,), (D,) -> (..., D)
    y = ops.layer_norm(x, weight, bias, eps)

    def pull(dy):
        centered = x - x.mean(-1, keepdims=True)
        s = np.sqrt((centered * centered).mean(-1, keepdims=True) + eps)
        n, dn = centered / s, dy * weight
        dx = (dn - dn.mean(-1, keepdims=True) - n * (dn * n).mean(-1, keepdims=True)) / s
        tokens = tuple(range(x.ndim - 1))
        return dx, {"weight": (dy * n).sum(tokens), "bias": dy.sum(tokens)}
    return y, pull


def rms_norm(x, weight, eps):
    """As layer_norm without the mean: n = x / s, dn = dy (1 + weight), dx = (dn - n mean(dn n)) / s."""
    # (..., D), (D,) -> (..., D)
    y = ops.rms_norm(x, weight, eps)

    def pull(dy):
        s = np.sqrt((x * x).mean(-1, keepdims=True) + eps)
        n, dn = x / s, dy * (1 + weight)
        dx = (dn - n * (dn * n).mean(-1, keepdims=True)) / s
        return dx, {"weight": (dy * n).sum(tuple(range(x.ndim - 1)))}
    return y, pull


def embed(ids, weight):
    """A row that was read several times gets the sum: `dweight[ids] += dy` would keep only the last of them."""
    # (B,T), (V,D) -> (B,T,D)
    y = ops.embed(ids, weight)

    def pull(dy):
        if hasattr(weight, "row_gradients"):
            return weight.row_gradients(dy, ids)
        dweight = np.zeros_like(weight)
        np.add.at(dweight, np.asarray(ids, like=weight), dy)
        return {"weight": dweight}
    return y, pull


def rope(x, positions, theta):
    """A rotation's transpose is the rotation back."""  # (B,T,N,H), (B,T) -> (B,T,N,H)
    def pull(dy):
        return ops.rope(dy, -np.asarray(positions, like=dy), theta)
    return ops.rope(x, positions, theta), pull


def attention_weights(q, k, mask, scale, softcap=None):
    """softmax(where(mask, scale · q·k, low)): softmax backwards, no gradient where the mask said no, then a product's.

    A key/value head that G query heads share gets the sum of their gradients, which the product over (G·T) rows
    takes by itself.
    """  # (B,T,N,H), (B,S,K,H), (B,T,S) -> (B,N,T,S)
    y = ops.attention_weights(q, k, mask, scale, softcap)

    def pull(dy):
        B, T, N, H = q.shape
        S, K = k.shape[1:3]
        grouped = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, N // K * T, H)
        dscores = y * (dy - (dy * y).sum(-1, keepdims=True))
        if mask is not None:
            dscores = np.where(mask[:, None], dscores, 0)
        if softcap is not None:  # d/ds c·tanh(s/c) = 1 - tanh²(s/c)
            t = np.tanh((grouped @ k.transpose(0, 2, 3, 1)).reshape(B, N, T, S) * (scale / softcap))
            dscores = dscores * (1 - t * t)
        dscores = (dscores * scale).reshape(B, K, N // K * T, S)
        dq = (dscores @ k.transpose(0, 2, 1, 3)).reshape(B, N, T, H).transpose(0, 2, 1, 3)
        dk = (dscores.transpose(0, 1, 3, 2) @ grouped).transpose(0, 2, 1, 3)
        return dq, dk
    return y, pull


def weighted_values(weights, v):
    """A matrix product for each head: dweights = dy vᵀ, dv = weightsᵀ dy, summed over the heads that share v."""
    # (B,N,T,S), (B,S,K,H) -> (B,T,N,H)
    y = ops.weighted_values(weights, v)

    def pull(dy):
        B, N, T, S = weights.shape
        K, H = v.shape[2:]
        dy = dy.transpose(0, 2, 1, 3).reshape(B, K, N // K * T, H)
        dweights = (dy @ v.transpose(0, 2, 3, 1)).reshape(B, N, T, S)
        dv = weights.reshape(B, K, N // K * T, S).transpose(0, 1, 3, 2) @ dy
        return dweights, dv.transpose(0, 2, 1, 3)
    return y, pull


def attention(q, k, v, mask, scale, softcap=None):
    """The two halves in reverse."""  # (B,T,N,H), (B,S,K,H), (B,S,K,H), (B,T,S) -> (B,T,N,H)
    weights, pull_weights = attention_weights(q, k, mask, scale, softcap)
    y, pull_values = weighted_values(weights, v)

    def pull(dy):
        dweights, dv = pull_values(dy)
        return *pull_weights(dweights), dv
    return y, pull


# --- memory for time --------------------------------------------------------------------------------------------------

def recomputed(function):
    """The same function, but what its pull needs is computed again when it is called: until then only the arguments are
    kept ("gradient checkpointing", Chen et al. 2016). The same bits, for a third more time.
    """
    def again(*args):
        y, _ = function(*args)
        return y, lambda dy: function(*args)[1](dy)
    return again
