"""Backward of model/losses.py. A loss is where gradients start: its pull takes dy = 1, or whatever weight it has."""
import numpy as np

from minipali.learning.backward.ops import log_sigmoid, log_softmax
from minipali.model import losses


def cross_entropy(logits, targets):
    """-log softmax at the target: the gradient is softmax minus one-hot, what was said minus what was right."""
    # (T,V), (T,) -> (T,)
    log_probabilities, pull_log_softmax = log_softmax(logits)
    rows = np.arange(logits.shape[0], like=logits)

    def pull(dy):
        dlog = np.zeros_like(logits)
        dlog[rows, targets] = -dy
        return pull_log_softmax(dlog)
    return -log_probabilities[rows, targets], pull


def l2_normalize(x):
    """y = x / |x|: only what is across y can change it, dx = (dy - y (y·dy)) / |x|."""  # (B,D) -> (B,D)
    y = losses.l2_normalize(x)

    def pull(dy):
        length = np.sqrt((x * x).sum(-1, keepdims=True))
        return (dy - y * (dy * y).sum(-1, keepdims=True)) / length
    return y, pull


def similarity(images, texts, log_scale):
    """A product of two matrices and a scalar; d(exp t)/dt = exp t, so the scale's gradient is Σ dy · table."""
    # (B,D), (texts,D), (1,) -> (B,texts)
    a, pull_a = l2_normalize(images)
    b, pull_b = l2_normalize(texts)
    scale = np.exp(log_scale)
    table = a @ b.T * scale

    def pull(dy):
        dcosine = dy * scale
        return pull_a(dcosine @ b), pull_b(dcosine.T @ a), (dy * table).sum().reshape(log_scale.shape)
    return table, pull


def clip_loss(images, texts, log_scale):
    """Each of the two cross-entropies puts -1/(2B) on the diagonal of its log-softmax."""  # (B,D), (B,D), (1,) -> ()
    table, pull_table = similarity(images, texts, log_scale)
    rows, pull_rows = log_softmax(table)
    columns, pull_columns = log_softmax(table.T)
    loss = 0.5 * (-np.diagonal(rows).mean() - np.diagonal(columns).mean())

    def pull(dy):
        ddiagonal = np.eye(table.shape[0], like=table, dtype=table.dtype) * (-0.5 * dy / table.shape[0])
        return pull_table(pull_rows(ddiagonal) + pull_columns(ddiagonal).T)
    return loss, pull


def siglip_loss(images, texts, log_scale, bias):
    """Every pair by itself: -± σ(∓ score) / B, and the bias gets the sum of all."""
    # (B,D), (texts,D), (1,), (1,) -> ()
    table, pull_table = similarity(images, texts, log_scale)
    signs = 2 * np.eye(*table.shape, like=table, dtype=table.dtype) - 1
    terms, pull_terms = log_sigmoid(signs * (table + bias))
    loss = -terms.sum(-1).mean()

    def pull(dy):
        dtable = signs * pull_terms(np.ones_like(terms) * (-dy / table.shape[0]))
        return *pull_table(dtable), dtable.sum().reshape(bias.shape)
    return loss, pull


def siglip_loss_chunked(images, texts, log_scale, bias, chunk):
    """The same gradients a piece at a time: each piece is made again on the way back, so none has to be kept."""
    # (B,D), (B,D), (1,), (1,) -> ()
    loss = losses.siglip_loss_chunked(images, texts, log_scale, bias, chunk)

    def pull(dy):
        dimages, dtexts = np.zeros_like(images), np.zeros_like(texts)
        dscale, dbias = np.zeros_like(log_scale), np.zeros_like(bias)
        for start in range(0, texts.shape[0], chunk):
            piece = slice(start, start + chunk)
            table, pull_table = similarity(images, texts[piece], log_scale)
            own = np.arange(images.shape[0], like=table)[:, None] == start + np.arange(table.shape[1], like=table)
            signs = 2 * own.astype(table.dtype) - 1
            terms, pull_terms = log_sigmoid(signs * (table + bias))
            dtable = signs * pull_terms(np.ones_like(terms) * (-dy / images.shape[0]))
            di, dtexts[piece], ds = pull_table(dtable)
            dimages, dscale, dbias = dimages + di, dscale + ds, dbias + dtable.sum().reshape(bias.shape)
        return dimages, dtexts, dscale, dbias
    return loss, pull
