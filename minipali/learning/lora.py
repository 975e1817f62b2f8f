"""LoRA (Hu et al. 2021): a matrix stays frozen, and two low-rank factors learn what is added to it.

    W + s B A        W (out,in) frozen, A (rank,in), B (out,rank), s = alpha / rank

Rank 8 beside a matrix of 2048 x 2048 is 1/128 of its numbers, and so are the optimizer's averages and the saved state.
While it learns, the sum is never made: x (W + s B A)ᵀ = x Wᵀ + s (x Aᵀ) Bᵀ, and no gradient has W's size. In the end
B A is added to W, so the file is an ordinary checkpoint. The factors have the names that the hub's `peft` gives them:
those of "q_proj.weight" are "q_proj.lora_A.weight" and "q_proj.lora_B.weight".
"""
import math

import numpy as np


def names_of(name):
    """A matrix's name -> those of its A and its B."""
    module = name.removesuffix(".weight")
    return f"{module}.lora_A.weight", f"{module}.lora_B.weight"


def start(shapes, rank, rng, dtype=np.float32):
    """{name: (out, in)} -> {name: array} of the factors: A random, B zero, so that nothing changes at first.

    (Both zero would stay zero forever: each one's gradient is a product with the other.)
    """
    factors = {}
    for name, (outputs, inputs) in shapes.items():
        a, b = names_of(name)
        factors[a] = (rng.standard_normal((rank, inputs)) / math.sqrt(inputs)).astype(dtype)
        factors[b] = np.zeros((outputs, rank), dtype)
    return factors


class Frozen:
    """A matrix that does not learn: used as the array is, in both directions, but without a gradient of its own.

    It stands in the tree of parameters where `linear` multiplies with `weight.T` or `embed` looks up rows; their
    gradients (backward/ops.py) ask it for what takes the place of {"weight": dW}. (`stop_gradient` elsewhere.)
    """
    __array_ufunc__ = None  # x @ matrix is then left to __rmatmul__

    def __init__(self, array):
        self.array = array

    @property
    def shape(self):
        return self.array.shape

    @property
    def dtype(self):
        return self.array.dtype

    @property
    def T(self):
        return self.array.T

    def __getitem__(self, rows):
        return self.array[rows]

    def __rmatmul__(self, x):
        return x @ self.array

    def __array_function__(self, function, types, args, kwargs):
        """np.asarray(ids, like=matrix)."""
        return function(*args, **kwargs, like=self.array)

    def product_gradients(self, dy, x):
        """Of y = x Wᵀ."""  # (rows,out), (rows,in) -> {name: gradient}
        return {}

    def row_gradients(self, dy, rows):
        """Of y = W[rows]."""  # (...,in), (...) -> {name: gradient}
        return {}


class Adapted(Frozen):
    """W + s B A, of which A and B learn; the sum is computed only by np.asarray.

    A change of A and B changes the matrix by s (δB A + B δA), and the loss by Σ dW · that, entry by entry. With
    dW = dyᵀ x: Σ dW · s δB A = Σ (s dyᵀ (x Aᵀ)) · δB and Σ dW · s B δA = Σ (s (dy B)ᵀ x) · δA. The brackets are the
    gradients.
    """
    def __init__(self, array, a, b, scale):
        super().__init__(array)
        self.a, self.b, self.scale = a, b, scale

    @property
    def size(self):
        return self.array.size

    @property
    def T(self):
        return Adapted(self.array.T, self.b.T, self.a.T, self.scale)  # (W + s B A)ᵀ = Wᵀ + s Aᵀ Bᵀ

    def __getitem__(self, rows):
        return self.array[rows] + self.scale * (self.b[rows] @ self.a)

    def __rmatmul__(self, x):
        return x @ self.array + self.scale * (x @ self.b @ self.a)

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.array + self.scale * (self.b @ self.a), dtype)

    def product_gradients(self, dy, x):
        """Of y = x (W + s B A)ᵀ."""  # (rows,out), (rows,in) -> {name: gradient}
        return {"lora_A.weight": self.scale * ((dy @ self.b).T @ x),
                "lora_B.weight": self.scale * (dy.T @ (x @ self.a.T))}

    def row_gradients(self, dy, rows):
        """Of y = (W + s B A)[rows]; a row that was read twice gets the sum."""  # (...,in), (...) -> {name: gradient}
        rows = np.asarray(rows, like=self.b)
        db, b = np.zeros_like(self.b), self.b[rows].reshape(-1, self.b.shape[1])
        np.add.at(db, rows, self.scale * (dy @ self.a.T))
        return {"lora_A.weight": self.scale * (b.T @ dy.reshape(-1, dy.shape[-1])), "lora_B.weight": db}


def merged(weights, factors, adapted, scale):
    """The weights, all by name, with s B A added to the `adapted` ones; the arrays given stay as they are.

    What is adapted is an Adapted, of which np.asarray makes the sum: one after the other they need no second model.
    """
    changed = {name: Adapted(weights[name], *(factors[other] for other in names_of(name)), scale) for name in adapted}
    return {**weights, **changed}


def pull(grads, factors, adapted, scale):
    """From the gradients of merged arrays those of the factors, all by name: s Bᵀ dW of A, and s dW Aᵀ of B."""
    factor_grads = {}
    for name in adapted:
        a, b = names_of(name)
        factor_grads[a] = scale * (factors[b].T @ grads[name])
        factor_grads[b] = scale * (grads[name] @ factors[a].T)
    return factor_grads
