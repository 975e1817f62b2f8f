"""LoRA (Hu et al. 2021): a matrix stays as it is, and two thin ones beside it learn what to add to it.

    W + s B A        W (out,in) frozen, A (rank,in), B (out,rank), s = alpha / rank

Rank 8 beside a matrix of 2048 x 2048 is 1/128 of its numbers, and so are the optimizer's averages and the saved state.
In the end B A is added to W and nothing in the file tells. The thin matrices bear the names that the hub's `peft` gives
them: those of "q_proj.weight" are "q_proj.lora_A.weight" and "q_proj.lora_B.weight".
"""
import math

import numpy as np


def names_of(name):
    """A matrix's name -> those of its A and its B."""
    module = name.removesuffix(".weight")
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def start(shapes, rank, rng, dtype=np.float32):
    """{name: (out, in)} -> {name: array} of the thin matrices: A random, B zero, so that nothing changes at first.

    (Both zero would stay zero for ever: each one's gradient is a product with the other.)
    """
    thin = {}
    for name, (outputs, inputs) in shapes.items():
        a, b = names_of(name)
        thin[a] = (rng.standard_normal((rank, inputs)) / math.sqrt(inputs)).astype(dtype)
        thin[b] = np.zeros((outputs, rank), dtype)
    return thin


def merged(weights, thin, adapted, scale):
    """The weights, all by name, with s B A added to the `adapted` ones; the arrays given stay as they are."""
    changed = {}
    for name in adapted:
        a, b = names_of(name)
        changed[name] = weights[name] + scale * (thin[b] @ thin[a])
    return {**weights, **changed}


def pull(grads, thin, adapted, scale):
    """From the gradients of the merged matrices those of the thin ones, all by name.

    A change of A and B changes the matrix by s (δB A + B δA). The loss changes by that times dW, entry by entry:
    Σ dW · s δB A = Σ (s dW Aᵀ) · δB and Σ dW · s B δA = Σ (s Bᵀ dW) · δA. The brackets are the gradients.
    """
    thin_grads = {}
    for name in adapted:
        a, b = names_of(name)
        thin_grads[a] = scale * (thin[b].T @ grads[name])
        thin_grads[b] = scale * (grads[name] @ thin[a].T)
    return thin_grads
