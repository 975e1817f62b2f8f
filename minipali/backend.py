"""Where the arrays live. The model's code is the same for NumPy and CuPy: moving the weights moves the work."""
import contextlib
import ctypes
import importlib
from collections.abc import Callable

import numpy as np

from minipali.errors import InputError

BACKENDS = ("numpy", "cupy")
Tree = dict | list | np.ndarray  # whose leaves are arrays, NumPy's or CuPy's


def mapped(tree: Tree, function: Callable) -> Tree:
    """The same tree of dicts and lists with `function` applied to every array."""
    if isinstance(tree, dict):
        return {key: mapped(value, function) for key, value in tree.items()}
    if isinstance(tree, list):
        return [mapped(value, function) for value in tree]
    return function(tree)


def to_device(tree: Tree, backend: str) -> Tree:
    """A tree of host arrays on the device of `backend`; raises InputError if CuPy or its GPU is not there."""
    if backend == "numpy":
        return tree
    if backend not in BACKENDS:
        raise InputError(f"--backend {backend}: expected {' or '.join(BACKENDS)}")
    try:
        cupy = importlib.import_module("cupy")
    except ImportError:
        raise InputError("--backend cupy: CuPy is not installed (pip install cupy-cuda13x, or the package for your "
                         "CUDA)") from None
    try:
        return mapped(tree, cupy.asarray)
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise InputError(f"--backend cupy: no GPU could be used ({str(error).splitlines()[0]})") from None


def to_host(tree: Tree) -> Tree:
    """The same tree as NumPy arrays."""
    return mapped(tree, lambda array: array.get() if hasattr(array, "get") else np.asarray(array))


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed, as the commands and the training do when they begin.

    By default it gives every large array back to the system at once and clears its pages anew for the next: a tenth of
    a 3B model's prefill, and a third of a training step. Other C libraries are left as they are.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
