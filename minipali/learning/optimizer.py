"""AdamW, Muon, gradient clipping and the learning rate's course, over one long vector that holds every weight.

All weights lie end to end in a single vector, and the tree that the model sees consists of views of it: a step of the
optimizer is then a few operations on one array, and a checkpoint is three arrays (weights, and two averages).
"""
import math

import numpy as np

from minipali.checkpoint.tensors import flatten, unflatten


def pack(params):
    """A tree of arrays -> (one vector with all of them, in the tree's order, and the same tree as views of the vector)."""
    flat = flatten(params)
    vector = np.concatenate([array.reshape(-1) for array in flat.values()])
    return vector, views(vector, {name: array.shape for name, array in flat.items()})


def views(vector, shapes):
    """The tree of views of a vector, given {name: shape} in the vector's order."""
    flat, at = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        flat[name] = vector[at:at + size].reshape(shape)
        at += size
    return unflatten(flat)


def gather(grads, shapes):
    """A tree of gradients as one vector, in the order of `shapes`."""
    flat = flatten(grads)
    return np.concatenate([flat[name].reshape(-1) for name in shapes])


def clip(gradient, limit):
    """The gradient, shortened to length `limit` if it is longer, and its length before: one bad batch cannot do harm."""
    length = np.sqrt((gradient * gradient).sum())
    return gradient * np.minimum(1, limit / (length + 1e-12)), length


def adamw(weights, gradient, state, step, rate, beta1, beta2, eps, decay):
    """One step of AdamW (Loshchilov & Hutter 2019, algorithm 2), in place; `step` counts from 1.

    `state` has the running means of the gradient ("first") and of its square ("second"). Both start at 0, so the
    first steps divide by how much of the average is there yet. `decay` (a vector: 0 for norms and biases) pulls weights
    towards 0 directly and not through the gradient, where Adam's division would undo it.
    """
    first, second = state["first"], state["second"]
    first *= beta1
    first += (1 - beta1) * gradient
    second *= beta2
    second += (1 - beta2) * (gradient * gradient)
    mean = first / (1 - beta1 ** step)
    spread = np.sqrt(second / (1 - beta2 ** step)) + eps
    weights -= rate * (mean / spread + decay * weights)


def hidden_matrices(shapes):
    """Where the matrices that map features to features lie in the vector, as {name: (slice, (rows, columns))}.

    They are Muon's. AdamW keeps what is not such a map: norms and biases, tables whose rows are looked up one by one, and
    the layer that ends in answers.
    """
    found, at = {}, 0
    for name, shape in shapes.items():
        size = math.prod(shape)
        if len(shape) > 1 and not any(word in name for word in ("embed_tokens", "position_embedding", "token_embedding",
                                                                 "probe", "patch_head")):
            found[name] = slice(at, at + size), (shape[0], size // shape[0])
        at += size
    return found


def orthogonal(matrix, steps=5):
    """Nearly the closest matrix with all singular values 1: they go to between 0.7 and 1.2, the directions stay.

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
    """One step of Muon (Jordan 2024; Liu et al. 2025) for one matrix, in place; `first` is AdamW's mean with this gradient.

    A gradient's few large directions drown the others: here what is gray and what is bright drown the corners that make
    a square of a circle. Muon gives every direction the same say, where AdamW only evens out the entries. The factor
    makes an entry move as far as AdamW's would.
    """
    step = orthogonal(beta1 * first + (1 - beta1) * gradient)  # Nesterov's look ahead
    weights -= rate * (0.2 * math.sqrt(max(step.shape)) * step + decay * weights)


def learning_rate(step, total, peak, warmup):
    """Up in a straight line over `warmup` steps, then down to 0 along half a cosine (Loshchilov & Hutter 2017)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
