"""Two recordings of the same run, array by array in the order of execution, up to the first that differs.

The arrays come from `run.py --dump`, or from any implementation that calls its modules by the checkpoint's names (the
hub's prefixes are taken off). The first array that differs is the one to look at: what comes after it has bad inputs.
"""
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minipali.checkpoint.safetensors_file import FLOATS, read_header, read_tensor
from minipali.errors import InputError
from minipali.looking.taps import place, standard_name

INTEGERS = {"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1",
            "BOOL": "?"}
# Largest difference allowed as a fraction of the array's largest value, by the fewest bytes of a number in both.
TOLERANCES = {8: 1e-9, 4: 2e-5, 2: 3e-2}


class Row(NamedTuple):
    """One array of both recordings: `difference` is the largest one, `used` its share of the tolerance (1 is all)."""
    name: str
    shape: tuple
    difference: float
    used: float
    note: str = ""


class Recording:
    """A safetensors file of named activations; arrays are read one at a time, under the recorder's names."""

    def __init__(self, path):
        """Raise InputError for what is no safetensors file, and for two arrays that are the same module's."""
        self.path, self.stored = Path(path), {}
        for name, stored in read_header(self.path).items():
            standard = standard_name(name)
            if standard in self.stored:
                raise InputError(f"{path}: {name} and {self.stored[standard].name} are both {standard}, expected one")
            if stored.dtype not in FLOATS and stored.dtype not in INTEGERS:
                raise InputError(f"{path}: {name} is {stored.dtype}, expected numbers of 16 to 64 bits")
            self.stored[standard] = stored

    def __getitem__(self, name):
        """An array as float64, or as integers."""
        stored = self.stored[name]
        if stored.dtype in FLOATS:
            return read_tensor(stored, np.memmap(self.path, np.uint8, "r"), np.float64) if math.prod(
                stored.shape) else np.zeros(stored.shape)
        with open(self.path, "rb") as file:
            file.seek(stored.start)
            return np.fromfile(file, INTEGERS[stored.dtype], math.prod(stored.shape)).reshape(stored.shape)

    def bytes_per_number(self, name):
        """How exact an array is: 8, 4 or 2; integers count as exact."""
        dtype = self.stored[name].dtype
        return np.dtype(FLOATS[dtype]).itemsize if dtype in FLOATS else 8


def aligned(name, a, b):
    """The same module's output in both implementations, laid out alike -> a, b and what had to be done.

    A batch of one may be left out. `logits` may hold every position or only the last, `embed_tokens` the picture's
    places as well. Gemma 3's norms of heads stand before the exchange of tokens and heads or behind it.
    """
    while a.ndim < b.ndim and b.shape[0] == 1:
        b = b[0]
    while b.ndim < a.ndim and a.shape[0] == 1:
        a = a[0]
    if a.shape == b.shape:
        return a, b, ""
    if name == "logits" and a.shape[-1:] == b.shape[-1:]:
        a, b = (x[..., -1, :] if x.ndim > min(a.ndim, b.ndim) or a.ndim == b.ndim else x for x in (a, b))
        if a.size == b.size:
            return a.reshape(b.shape), b, "the last position"
    if name.endswith("embed_tokens") and a.ndim == b.ndim >= 2 and a.shape[-1] == b.shape[-1]:
        text = min(a.shape[-2], b.shape[-2])
        a, b = a[..., -text:, :], b[..., -text:, :]
        return a, b, "the last places, those of the text"
    if name.endswith(("q_norm", "k_norm")) and a.ndim >= 3 and a.shape == np.swapaxes(b, -2, -3).shape:
        return a, np.swapaxes(b, -2, -3), "tokens and heads exchanged"
    return a, b, ""


def row_of(name, a, b, tolerance):
    """How far two arrays are apart, measured by the larger of their largest values."""
    a, b, note = aligned(name, np.asarray(a), np.asarray(b))
    if a.shape != b.shape:
        return Row(name, a.shape, math.inf, math.inf, f"shape {list(a.shape)} in A, {list(b.shape)} in B")
    if not a.size:
        return Row(name, a.shape, 0.0, 0.0, "empty")
    finite = [np.isfinite(x) for x in (a, b)]
    if not all(f.all() for f in finite):
        where = " and ".join(which for which, f in zip("AB", finite) if not f.all())
        return Row(name, a.shape, math.inf, math.inf, f"not all finite in {where}")
    if a.dtype.kind != "f" and b.dtype.kind != "f":
        different = int(np.count_nonzero(a != b))
        return Row(name, a.shape, float(different > 0), math.inf if different else 0.0,
                   f"{different} of {a.size} differ" if different else note)
    difference = float(np.abs(a.astype(np.float64) - b).max())
    largest = float(max(np.abs(a).max(), np.abs(b).max()))
    return Row(name, a.shape, difference, difference / (tolerance * largest) if difference else 0.0, note)


def compare(a, b, tolerance=None):
    """The rows of two recordings, dicts of arrays or `Recording`s, in the order of execution.

    `tolerance`: the difference allowed as a fraction of an array's largest value; None goes by the dtype of both.
    -> rows of the names that both have, names only in a, names only in b.
    """
    names = {which: set(x.stored if isinstance(x, Recording) else x) for which, x in (("a", a), ("b", b))}
    known = [name for name in names["a"] & names["b"] if place(name)]
    rows = []
    for name in sorted(known, key=place):
        allowed = tolerance
        if allowed is None:
            allowed = TOLERANCES[min(precision(x, name) for x in (a, b))]
        rows.append(row_of(name, a[name], b[name], allowed))
    return rows, sorted(names["a"] - set(known)), sorted(names["b"] - set(known))


def precision(recording, name):
    """Bytes of a number of an array: 8, 4 or 2."""
    if isinstance(recording, Recording):
        return recording.bytes_per_number(name)
    dtype = np.asarray(recording[name]).dtype
    return min(max(dtype.itemsize, 2), 8) if dtype.kind == "f" else 8


def first_divergence(rows):
    """The first row beyond its tolerance, or None."""
    return next((row for row in rows if row.used > 1), None)
