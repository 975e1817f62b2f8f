"""Which weights of a model stay compact matrices, and how these are read from a file or made from arrays."""
from collections.abc import Callable

import numpy as np

from minipali.checkpoint.matrices import TILE, BFloat16, Float32, Int8, Matrix, cut
from minipali.checkpoint.safetensors_file import in_place, read_rows, read_tensor, to_bfloat16
from minipali.errors import InputError, short_name
from minipali.parallel import each

TABLES = "embed_tokens.weight", "lm_head.weight"


def round_to_int8(rows):
    """float32 (n, in) -> int8 (n, in), scale (n, 1): the largest number of each row becomes ±127."""
    scale = np.abs(rows).max(axis=1, keepdims=True) / np.float32(127)
    # A row of zeros has no largest number to divide by, and a damaged one none that is finite: that stays to be seen.
    rounded = np.rint(rows / np.where(scale == 0, np.float32(1), scale))
    return np.nan_to_num(rounded, nan=0, posinf=127, neginf=-127).astype(np.int8), scale


def stays_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a parameter is only ever multiplied with or looked up in: then it need not be an array."""
    return len(shape) == 2 and name.endswith(".weight") and "position_embedding" not in name


def form_of(name: str, weights: str, dtype: str = "") -> str:
    """The form of one matrix in a model that is held as `weights` says; `dtype`: how its file has it, if in a file.

    With int8, the table of tokens and the output head stay in bfloat16. Every logit is a product with one of their
    rows, and what rounding does there no later layer evens out: in Gemma 3 270M it moved the logits nearly as much as
    the rounding of all other matrices together.
    """
    return "bfloat16" if weights == "int8" and dtype != "I8" and name.endswith(TABLES) else weights


def matrix_of(shape: tuple[int, int], rows_of: Callable[[int, int], np.ndarray], weights: str) -> Matrix:
    """A new matrix in memory, made on all threads. `rows_of(start, stop)` gives its rows in float32; `weights` says
    what they become: float32, bfloat16 (rounded to the nearest) or int8."""
    if weights == "bfloat16" and shape[1] % 2:
        weights = "float32"  # it takes its columns in pairs
    kept = np.empty(shape, {"float32": np.float32, "bfloat16": np.uint16, "int8": np.int8}[weights])
    scale = np.empty((shape[0], 1), np.float32)
    starts, rows = cut(shape[0], max(1, TILE // shape[1]))

    def piece(start):
        own = slice(start, min(start + rows, shape[0]))
        with np.errstate(invalid="ignore", over="ignore"):
            part = rows_of(own.start, own.stop)
            if weights == "int8":
                kept[own], scale[own] = round_to_int8(part)
            else:
                kept[own] = to_bfloat16(part) if weights == "bfloat16" else part

    each(piece, starts, products=False)
    if weights == "int8":
        return Int8(kept, scale)
    return {"float32": Float32, "bfloat16": BFloat16}[weights](kept)


def read_matrix(stored, mapped, weights):
    """A tensor of a file held as `weights` says: where it lies in the mapped file, if it lies there so."""
    height, width = stored.shape
    weights = form_of(stored.name, weights, stored.dtype)
    if weights == "float32" and stored.dtype == "F32":
        return Float32(in_place(stored, mapped))
    if weights == "bfloat16" and stored.dtype == "BF16" and width % 2 == 0:
        return BFloat16(in_place(stored, mapped))
    if weights == "int8" and stored.dtype == "I8":
        return Int8(in_place(stored, mapped), read_tensor(stored.scale, mapped, np.float32))

    def rows_of(start, stop):
        rows = read_rows(stored, start * width, stop * width, np.float32).reshape(-1, width)
        return rows if scale is None else rows * scale[start:stop]

    scale = None if stored.scale is None else read_tensor(stored.scale, mapped, np.float32)
    return matrix_of(stored.shape, rows_of, weights)


def held_as(arrays, weights):
    """{name: array} with every matrix held as `weights` says; each array is let go once it has been converted."""
    for name, array in arrays.items():
        if stays_matrix(name, array.shape):
            arrays[name] = matrix_of(array.shape, lambda start, stop, array=array: array[start:stop],
                                     form_of(name, weights))
    return arrays


def with_scales(tensors):
    """{name: Stored} of a file in which a matrix (out, in) may be I8 with, beside it, `NAME_scale` (out, 1) of F32 ->
    the same without these tensors: each stands as `scale` in its matrix's entry. Raises InputError if one does not fit.

    This is what `inspect --save-int8` writes, and what compressed-tensors calls weight_scale, one for each channel.
    """
    for name, stored in list(tensors.items()):
        scale = tensors.get(name + "_scale")
        if stored.dtype == "I8" and scale is not None:
            expected = (*stored.shape[:1], 1)
            if len(stored.shape) != 2 or scale.dtype != "F32" or scale.shape != expected:
                raise InputError(f"{stored.path}: {short_name(scale.name)} is {scale.dtype} {list(scale.shape)}, "
                                 f"expected F32 {list(expected)} beside a matrix in int8")
            tensors[name] = stored._replace(scale=tensors.pop(name + "_scale"))
    return tensors
