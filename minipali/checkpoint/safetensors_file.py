"""Checkpoint files: the header checked before a byte of a tensor is touched, then the tensors, mapped or upcast.

A safetensors file is eight bytes (the header's length, little-endian), a JSON header that gives each tensor's dtype,
shape and place, and then the tensors end to end. float32 is used where it lies in the file, so that a checkpoint opens
at once; bfloat16 and float16, which NumPy cannot compute in with any speed, become float32 tensor by tensor.
"""
import json
import math
import os
import reprlib
import struct
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minipali.errors import InputError, short_name

# The dtypes of the format and their bytes per number. Weights come in the four that are in FLOATS as well.
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4,
              "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # NumPy has no bfloat16: its bits, as integers
NUMBERS = FLOATS | {"I8": "<i1"}  # int8 is a weight where a tensor of scales stands beside it
SAVED_AS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}

LONGEST_HEADER = 100_000_000    # bytes; the limit that the format itself sets
CHUNK = 1 << 18                 # numbers that are converted at a time, so that what is in between stays in the cache


def from_bfloat16(bits):
    """bfloat16 is the upper half of a float32, so the value is exact: uint16 bits -> float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(x):
    """float32 -> uint16 bits of the nearest bfloat16, ties to the even one.

    Cutting the lower half off instead would round every weight toward zero. A NaN whose payload lies in the lower half
    alone would round to infinity: it is made quiet, which keeps it a NaN.
    """
    bits = np.asarray(x, np.float32).view(np.uint32)
    upper = bits >> 16
    rounded = (bits + 0x7FFF + (upper & 1)) >> 16
    return np.where(np.isnan(x), upper | 0x40, rounded).astype(np.uint16)


class Stored(NamedTuple):
    """Where a tensor lies: `name` as its file spells it, `start` in bytes from the beginning of the file."""
    path: Path
    name: str
    dtype: str
    shape: tuple
    start: int
    scale: "Stored | None" = None  # of int8 weights: what each row is multiplied with


def _unique(pairs):
    """JSON lets a key come twice, and readers differ in which of the two counts."""
    (name, count), = Counter(name for name, _ in pairs).most_common(1) or [("", 0)]
    if count > 1:
        raise InputError(f"{short_name(name)} comes {count} times in the header")
    return dict(pairs)


def _is_size(value):
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _check_entry(entry):
    """One tensor's entry of the header -> dtype, shape, begin, end; InputError says what is wrong with it."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise InputError("expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise InputError(f"dtype {reprlib.repr(dtype)} is unknown")
    if not isinstance(shape, list) or len(shape) > 8 or not all(map(_is_size, shape)):
        raise InputError(f"shape {reprlib.repr(shape)} is no list of up to 8 sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)) or offsets[0] > offsets[1]:
        raise InputError(f"data_offsets {reprlib.repr(offsets)} are no begin and end")
    size = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != size:
        raise InputError(f"shape {reprlib.repr(shape)} in {dtype} takes {size} bytes, data_offsets give it "
                       f"{offsets[1] - offsets[0]}")
    return dtype, tuple(shape), *offsets


def _check_layout(spans, data_size):
    """Tensors lie end to end: spans of (begin, end, name) without overlap, hole or rest."""
    reached, last = 0, "the header"
    for begin, end, name in sorted(spans):
        if begin != reached:
            problem = "overlaps" if begin < reached else "leaves a hole after"
            raise InputError(f"{short_name(name)} {problem} {short_name(last)}")
        reached, last = end, name
    if reached != data_size:
        raise InputError(f"the header describes {reached} bytes of tensors and the file has {data_size}"
                       + (": it is cut short" if reached > data_size else ""))


def _parse_header(file, size):
    """An open safetensors file of `size` bytes -> {name: (dtype, shape, start)}."""
    if size < 8:
        raise InputError(f"{size} bytes are too few for a safetensors file")
    length, = struct.unpack("<Q", file.read(8))
    if length > min(size - 8, LONGEST_HEADER):
        kind = "not a safetensors file, or cut short"
        if struct.pack("<Q", length) == b"version ":
            kind = "a pointer of Git LFS, not the file itself (`git lfs pull` brings it)"
        raise InputError(f"its header claims {length} bytes of a file of {size}: {kind}")
    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_unique)
    except InputError:
        raise
    except (ValueError, RecursionError) as error:
        raise InputError(f"its header is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise InputError("its header is no JSON object")
    header.pop("__metadata__", None)
    tensors, spans = {}, []
    for name, entry in header.items():
        try:
            dtype, shape, begin, end = _check_entry(entry)
        except InputError as problem:
            raise InputError(f"{short_name(name)}: {problem}") from None
        tensors[name] = dtype, shape, 8 + length + begin
        spans.append((begin, end, name))
    _check_layout(spans, size - 8 - length)
    return tensors


def read_header(path):
    """What a safetensors file says that it holds, every claim checked against the file: {name: Stored}.

    No tensor is touched. Raises InputError with the file, the tensor and what is wrong. Format: the safetensors README.
    """
    try:
        with open(path, "rb") as file:
            tensors = _parse_header(file, os.fstat(file.fileno()).st_size)
    except InputError as problem:
        raise InputError(f"{path}: {problem}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    return {name: Stored(path, name, *tensor) for name, tensor in tensors.items()}


def is_used_in_place(stored: Stored, dtype) -> bool:
    """Whether the file's own bytes are the array of `dtype`, so that it is mapped and never copied."""
    return stored.dtype not in ("BF16", "I8") and np.dtype(FLOATS[stored.dtype]) == dtype


def map_file(path):
    """A file's bytes as a read-only array, read from the disk when first used."""
    try:
        return np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: cannot be mapped into memory ({reason})") from None


def in_place(stored: Stored, mapped):
    """A tensor as a read-only view of `mapped`, its file's bytes, in the file's dtype; bfloat16 as its bits."""
    file_dtype = np.dtype(NUMBERS[stored.dtype])
    end = stored.start + math.prod(stored.shape) * file_dtype.itemsize
    view = np.asarray(mapped[stored.start:end]).view(file_dtype).reshape(stored.shape)
    # An odd header length would leave it between two words; pairs of bfloat16 are read as one word of four bytes.
    return view if view.ctypes.data % max(file_dtype.itemsize, 4) == 0 else view.copy()


def _pieces(stored, first=0, last=None):
    """The numbers `first` to `last` of a tensor as they are stored, a piece at a time: what is in between stays small.

    They are read, and not mapped: mapped pages would stay in memory beside the result.
    """
    last, file_dtype = math.prod(stored.shape) if last is None else last, np.dtype(NUMBERS[stored.dtype])
    try:
        with open(stored.path, "rb") as file:
            file.seek(stored.start + first * file_dtype.itemsize)
            for at in range(first, last, CHUNK):
                count = min(CHUNK, last - at)
                piece = np.fromfile(file, file_dtype, count)
                if len(piece) < count:  # it was whole when its header was read
                    raise InputError(f"{stored.path}: {short_name(stored.name)}: the file ends too early")
                yield piece
    except OSError as error:
        raise InputError(f"{stored.path}: cannot be read ({error.strerror or error})") from None


def read_tensor(stored: Stored, mapped, dtype):
    """One tensor as an array of `dtype`: a read-only view of `mapped`, its file's bytes, where that is possible."""
    if is_used_in_place(stored, dtype):
        return in_place(stored, mapped)
    out = read_rows(stored, 0, math.prod(stored.shape), dtype).reshape(stored.shape)
    if stored.scale is not None:
        out *= read_tensor(stored.scale, None, np.float64)
    return out


def read_rows(stored: Stored, first, last, dtype):
    """The numbers `first` to `last` of a tensor as a new array of `dtype`; int8 without its scales."""
    out, at = np.empty(last - first, dtype), 0
    with np.errstate(invalid="ignore", over="ignore"):
        for piece in _pieces(stored, first, last):
            out[at:at + len(piece)] = from_bfloat16(piece) if stored.dtype == "BF16" else piece
            at += len(piece)
    return out


def same_numbers(first: Stored, second: Stored) -> bool:
    """Whether two tensors of one shape hold the same numbers; both are read up to the first difference."""
    for pair in zip(_pieces(first), _pieces(second), strict=True):
        if first.dtype == second.dtype:  # bit by bit: faster, and a NaN equals itself
            a, b = (piece.view(np.uint8) for piece in pair)
        else:
            a, b = (from_bfloat16(piece) if stored.dtype == "BF16" else piece
                    for piece, stored in zip(pair, (first, second)))
        if not np.array_equal(a, b):
            return False
    return True


def _as_stored(piece, dtype, name):
    """Numbers in a file's dtype; InputError if one that is finite would become infinite."""
    with np.errstate(over="ignore"):
        stored = to_bfloat16(piece) if dtype == "BF16" else np.asarray(piece, FLOATS[dtype])
    if stored is piece:
        return piece
    values = from_bfloat16(stored) if dtype == "BF16" else stored
    lost = np.isinf(values) & np.isfinite(piece)
    if lost.any():
        spelled = next(spelled for spelled, code in SAVED_AS.items() if code == dtype)
        raise InputError(f"{short_name(name)}: {piece[lost][0]:g} is too large for {spelled}, expected a dtype of a "
                         f"wider range such as {'float64' if dtype == 'F32' else 'float32'}")
    return stored


def write_safetensors(file, arrays: dict[str, np.ndarray], dtype: str, metadata: dict[str, str] | None = None):
    """The format's header and, one by one, the tensors; `dtype` as the format spells it.

    The safetensors package writes no bfloat16 from NumPy. Raises InputError for a number too large for the dtype.
    """
    header, end = {"__metadata__": metadata or {"format": "pt"}}, 0
    for name, x in arrays.items():
        begin, end = end, end + x.size * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(x.shape), "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # so that the tensors begin on a whole word
    file.write(struct.pack("<Q", len(head)) + head)
    for name, x in arrays.items():
        numbers = np.asarray(x).reshape(-1)  # of what is no array yet, no two are made at once
        for at in range(0, numbers.size, CHUNK):
            file.write(_as_stored(numbers[at:at + CHUNK], dtype, name).data)
        del numbers
