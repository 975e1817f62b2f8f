"""A checkpoint whose matrices are written in 8 bits: half the size of bfloat16, and it opens at once.

The folder has config.json and the files beside it as they were, and one model.safetensors. In it each matrix `NAME`,
(out, in), is I8, and `NAME_scale`, (out, 1), is the F32 that its rows are times; the table of tokens and the output
head are BF16 (read_matrices.py says why); all other tensors are F32. The names are the file's own. A number of a matrix
in I8 is off by half its row's scale at most, which is the row's largest number over 254.
"""
import json
import math
import struct
from pathlib import Path

import numpy as np

from minipali.checkpoint.choice import WEIGHTS
from minipali.checkpoint.hub import open_checkpoint
from minipali.checkpoint.matrices import BFloat16
from minipali.checkpoint.read_matrices import form_of, read_matrix, stays_matrix
from minipali.checkpoint.safetensors_file import ITEM_BYTES, map_file, read_tensor, to_bfloat16
from minipali.errors import InputError
from minipali.files import make_folder, replacing
from minipali.inputs.folder import COMPANIONS


def _dtype(name, stored):
    """The dtype in which a tensor is written."""
    return WEIGHTS[form_of(name, "int8", stored.dtype)] if stays_matrix(name, stored.shape) else "F32"


def _header(tensors):
    """The format's header for what `save_int8` writes of `tensors`, in their order."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, stored in tensors.items():
        dtype = _dtype(name, stored)
        parts = [(stored.name, dtype, stored.shape)]
        if dtype == "I8":
            parts.append((stored.name + "_scale", "F32", (stored.shape[0], 1)))
        for spelled, written, shape in parts:
            begin, end = end, end + math.prod(shape) * ITEM_BYTES[written]
            header[spelled] = {"dtype": written, "shape": list(shape), "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    return head + b" " * (-len(head) % 8)  # so that the tensors begin on a whole word


def save_int8(source: str | Path, folder: str | Path) -> None:
    """Write the checkpoint in the folder `source` into another folder, its matrices in int8, one after the other.

    Raises InputError if the source cannot be read or is the same folder, or if the new one cannot be written.
    """
    source, folder = Path(source), Path(folder)
    _, tensors = open_checkpoint(source)
    make_folder(folder)
    if folder.samefile(source):
        raise InputError(f"{folder}: the folder that is read, expected another")
    mapped = {path: map_file(path) for path in {stored.path for stored in tensors.values()}}
    for name in ["config.json", "vae-oid.npz", *COMPANIONS]:
        if (source / name).exists():
            with replacing(folder / name) as file:
                file.write((source / name).read_bytes())
    with replacing(folder / "model.safetensors") as file:
        head = _header(tensors)
        file.write(struct.pack("<Q", len(head)) + head)
        for name, stored in tensors.items():
            dtype = _dtype(name, stored)
            if dtype == "F32":
                file.write(read_tensor(stored, mapped[stored.path], np.float32).astype("<f4", order="C").data)
                continue
            matrix = read_matrix(stored, mapped[stored.path], "int8")
            if dtype == "I8":
                file.write(np.ascontiguousarray(matrix.stored).data)
                file.write(matrix.scale.astype("<f4").data)
            else:
                bits = matrix.stored if isinstance(matrix, BFloat16) else to_bfloat16(matrix.stored)  # of odd width
                file.write(np.ascontiguousarray(bits).data)
