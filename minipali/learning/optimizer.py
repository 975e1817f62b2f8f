"""AdamW, Muon, gradient clipping and the learning rate's schedule.

All weights lie end to end in a single vector, and the tree that the model sees consists of views of it; so do the
optimizer's two averages, and a saved state is three arrays. Gradients come as separate tensors. Whatever is computed
from them is computed tensor by tensor, or in smaller pieces: a step needs no further array of the weights' size.
"""
import itertools
import math
from bisect import bisect

import numpy as np

from minipali.checkpoint.tensors import flatten, unflatten

# Numbers that are worked on together: few enough to stay in the processor's cache, and not fewer than the 128 that
# NumPy adds up in one go (see gradient_norm).
PIECE = 1 << 16


def piece_size(array):
    """How many numbers of arrays such as this one to work on together; on a GPU all of them."""
    return PIECE if isinstance(array, (np.ndarray, np.generic)) else 1 << 40


def pack(params: dict) -> tuple[np.ndarray, dict]:
    """A tree of arrays -> one vector with all of them, in the tree's order, and the same tree as views of it."""
    flat = flatten(params)
    vector = np.concatenate([array.reshape(-1) for array in flat.values()])
    return vector, views(vector, {name: array.shape for name, array in flat.items()})


def spans(shapes):
    """{name: slice}: where each tensor lies in the vector."""
    ends = itertools.accumulate(math.prod(shape) for shape in shapes.values())
    return {name: slice(end - math.prod(shape), end) for (name, shape), end in zip(shapes.items(), ends)}


def views(vector: np.ndarray, shapes: dict[str, tuple]) -> dict:
    """The tree of views of a vector, given {name: shape} in the vector's order."""
    return unflatten({name: vector[span].reshape(shapes[name]) for name, span in spans(shapes).items()})


def _numbers(arrays, ends, start, stop):
    """Numbers `start` to `stop` of the arrays laid end to end; array i ends at ends[i]."""
    parts, i = [], bisect(ends, start)
    while start < stop:
        array, end = arrays[i].reshape(-1), min(ends[i], stop)
        before = ends[i] - array.shape[0]
        parts.append(array[start - before:end - before])
        start, i = end, i + 1
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _sum_of_squares(arrays, ends, start, stop):
    if stop - start <= piece_size(arrays[0]):
        part = _numbers(arrays, ends, start, stop)
        return (part * part).sum()
    half = (stop - start) // 2
    half -= half % 8  # NumPy's, which works on 8 numbers at a time
    middle = start + half
    return _sum_of_squares(arrays, ends, start, middle) + _sum_of_squares(arrays, ends, middle, stop)


def gradient_norm(gradients):
    """The length of all gradients (a list of arrays) as if they were one vector: √Σ g².

    NumPy adds up a vector pairwise: the sum of one half plus that of the other, and so on down to 128 numbers. The same
    halves are taken here, so the result is that of the long vector to the last bit, and no such vector is made.
    """
    ends = list(itertools.accumulate(array.size for array in gradients))
    return np.sqrt(_sum_of_squares(gradients, ends, 0, ends[-1]))


def clip_factor(norm, limit):
    """What to multiply gradients of this norm by so that it is at most `limit`: one bad batch cannot do much harm."""
    return np.minimum(1, limit / (norm + 1e-12))


def adamw(weights, gradient, averages, step, rate, beta1, beta2, eps, decay):
    """One step of AdamW (Loshchilov & Hutter 2019, algorithm 2), in place; `step` counts from 1.

    `averages` has the running means of the gradient ("first") and of its square ("second"). Both start at 0, so the
    first steps are corrected for that. `decay` (0 for norms and biases) pulls weights toward 0 directly and not through
    the gradient, where Adam's division would undo it.
    """
    first, second = averages["first"], averages["second"]
    first *= beta1
    first += (1 - beta1) * gradient
    second *= beta2
    second += (1 - beta2) * (gradient * gradient)
    mean = first / (1 - beta1 ** step)
    spread = np.sqrt(second / (1 - beta2 ** step)) + eps
    weights -= rate * (mean / spread + decay * weights)


def hidden_matrices(shapes):
    """The matrices that map features to features, as {name: (rows, columns)}.

    They are Muon's. AdamW keeps what is not such a map: norms and biases, tables whose rows are looked up one by one,
    and the layer that predicts what lies on a patch.
    """
    tables = "embed_tokens", "position_embedding", "token_embedding", "probe", "patch_head"
    return {name: (shape[0], math.prod(shape[1:])) for name, shape in shapes.items()
            if len(shape) > 1 and not any(table in name for table in tables)}


def orthogonal(matrix, steps=5):
    """Nearly the closest matrix with all singular values 1: they become 0.7 to 1.2, the directions stay.

    x -> a x + b x³ + c x⁵ on each singular value, which a matrix polynomial does without finding any of them
    (Newton-Schulz; the coefficients are Jordan's, 2024, chosen to lift the small ones fast).
    """  # (rows, columns) -> (rows, columns)
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / (np.sqrt((x * x).sum()) + 1e-7)  # the largest singular value is then at most 1
    for _ in range(steps):
        squares = x @ x.T
        x = 3.4445 * x + (-4.7750 * squares + 2.0315 * (squares @ squares)) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def muon(weights, gradient, first, rate, beta1, decay):
    """One step of Muon (Jordan 2024; Liu et al. 2025) for one matrix, in place; `first` is AdamW's mean of gradients.

    A few directions dominate a gradient: here overall brightness, so that the features that tell a square from a circle
    barely move. Muon gives every direction the same weight, where AdamW only evens out the entries. The last factor
    makes an entry move as far as AdamW's would.
    """
    step = orthogonal(beta1 * first + (1 - beta1) * gradient)  # Nesterov's look ahead
    weights -= rate * (0.2 * math.sqrt(max(step.shape)) * step + decay * weights)


def learning_rate(step, total, peak, warmup, fall=None):
    """Up in a straight line over `warmup` steps, then down to 0 along half a cosine (Loshchilov & Hutter 2017).

    With `fall` the rate stays at its peak until the last `fall` steps and is brought down in a straight line (Hu et al.
    2024, "warmup-stable-decay"): where to end can then be decided while the run goes on.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    if fall is not None:
        return peak * min(1.0, (total - step) / max(1, fall))
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
