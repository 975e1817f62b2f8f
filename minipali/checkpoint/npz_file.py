"""The .npz format: a zip of arrays, each behind a NumPy header. Headers are checked before a number is read."""
import math
import os
import tokenize
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from minipali.checkpoint.safetensors_file import CHUNK, FLOATS, from_bfloat16
from minipali.errors import InputError

# What zipfile, zlib and NumPy's reader of headers raise on a damaged or a hostile file; RuntimeError: an encrypted one.
DAMAGE = (OSError, ValueError, EOFError, RuntimeError, KeyError, TypeError, SyntaxError, OverflowError, MemoryError,
          tokenize.TokenError, zipfile.BadZipFile, zlib.error)
# Trained weights hardly compress: a file that claims to grow this much is made to fill the memory.
MOST_GROWTH, SMALL = 100, 2**24
HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
# NumPy has no bfloat16: big_vision's arrays of it come out as two bytes without a type.
DTYPES = {np.dtype(code): name for name, code in FLOATS.items() if name != "BF16"} | {np.dtype("V2"): "BF16"}


class Member(NamedTuple):
    """An array of the file: `entry` and `name` as the zip spells them, `start` where its numbers begin."""
    path: str
    entry: zipfile.ZipInfo
    name: str
    dtype: str
    shape: tuple
    column_major: bool
    start: int


def _read_member(path, archive, entry):
    """The header of one array, checked against the size that the zip gives it."""
    with archive.open(entry) as file:
        version = np.lib.format.read_magic(file)
        if version not in HEADERS:
            raise InputError(f"version {version} of the .npy format, expected (1, 0) or (2, 0)")
        shape, column_major, dtype = HEADERS[version](file)
        start = file.tell()
    if dtype.hasobject:
        raise InputError("it holds pickled Python objects, which could run any code: they are never read")
    size = math.prod(shape) * dtype.itemsize
    if any(length < 0 for length in shape) or start + size != entry.file_size:
        raise InputError(f"the shape {list(shape)} of {dtype} takes {size} bytes, the file has "
                         f"{entry.file_size - start}")
    return Member(path, entry, entry.filename.removesuffix(".npy"), DTYPES.get(dtype, str(dtype)), shape, column_major,
                  start)


def _check_members(path, archive):
    """Every array by its name without the prefix params/, headers only."""
    entries, members = archive.infolist(), {}
    total, size = sum(entry.file_size for entry in entries), os.path.getsize(path)
    if total > MOST_GROWTH * size + SMALL:
        raise InputError(f"{total} bytes of arrays are packed into {size}: no weights shrink that far")
    for entry in entries:
        name = entry.filename.removeprefix("params/").removesuffix(".npy")
        try:
            if not entry.filename.endswith(".npy"):
                raise InputError("it is no array (.npy)")
            if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise InputError("it is packed in a way that NumPy does not use")
            if name in members:
                raise InputError("there are two arrays of this name")
            members[name] = _read_member(path, archive, entry)
        except DAMAGE as problem:
            raise InputError(f"{entry.filename[:150]}: {str(problem)[:300]}") from None
    return members


def read_members(path) -> dict[str, Member]:
    """The headers of all arrays of an .npz file, each claim checked; a prefix params/ is left out of the names.

    Raises InputError, in one line that names the file and the array.
    """
    try:
        with warnings.catch_warnings(), zipfile.ZipFile(path) as archive:
            warnings.simplefilter("ignore")  # NumPy warns about headers from Python 2
            return _check_members(path, archive)
    except InputError as problem:
        raise InputError(f"{path}: {problem}") from None
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    except DAMAGE as error:
        raise InputError(f"{path}: not a readable .npz file, or cut short ({str(error)[:300]})") from None


def _read_numbers(file, dtype, out):
    """Fill `out`, whose numbers lie in a row, from the file, a piece at a time."""
    out, file_dtype = out.reshape(-1), np.dtype(FLOATS[dtype])
    for at in range(0, out.size, CHUNK):
        count = min(CHUNK, out.size - at)
        content = file.read(count * file_dtype.itemsize)
        if len(content) < count * file_dtype.itemsize:
            raise EOFError("it ends too early")
        piece = np.frombuffer(content, file_dtype)
        out[at:at + count] = from_bfloat16(piece) if dtype == "BF16" else piece


def _read_array(archive, member, targets):
    """One array into its parameters: {index: view of the parameter, with the axes of the array}.

    A stack of layers is read layer by layer, so that it is never in memory beside the parameters. Only an array that
    was saved column by column has its layers interleaved, and is read at once.
    """
    first = next(iter(targets.values()))
    try:
        with archive.open(member.entry) as file, np.errstate(invalid="ignore", over="ignore"):
            file.read(member.start)
            if member.column_major:
                transposed = np.empty(member.shape[::-1], first.dtype)
                _read_numbers(file, member.dtype, transposed)
                for index, target in targets.items():
                    target[...] = transposed.T[index]
                return
            for index in sorted(targets):
                if targets[index].flags.c_contiguous:
                    _read_numbers(file, member.dtype, targets[index])
                else:
                    layer = np.empty(first.shape, first.dtype)
                    _read_numbers(file, member.dtype, layer)
                    targets[index][...] = layer
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(f"{member.path}: {member.name[:150]}: cannot be read, damaged or cut short "
                       f"({str(error)[:300]})") from None


def read_arrays(path, members: dict[str, Member], targets: dict[str, dict]):
    """Read the arrays that `targets` names, side by side, each into its parameters.

    Raises InputError, in one line that names the file and the array.
    """
    try:
        with zipfile.ZipFile(path) as archive, ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda name: _read_array(archive, members[name], targets[name]), targets))
    except InputError:
        raise
    except DAMAGE as error:  # it was complete when its headers were read
        raise InputError(f"{path}: cannot be read ({str(error)[:300]})") from None
