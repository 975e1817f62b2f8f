"""The file of the mask codec: `vae-oid.npz`, or one like it."""
import struct
import tokenize
import zipfile
import zlib

import numpy as np

from minipali.errors import InputError
from minipali.model.vq_vae import DOWN, UP


def _residual_names(block):
    return [f"{block}.net.{i}" for i in (0, 2, 4)]


ENCODER = [f"encoder.{i}" for i in DOWN] + _residual_names("encoder.8") + _residual_names("encoder.9") + ["encoder.10"]
UPSAMPLING = [f"decoder.{i}" for i in UP]
DECODER = ["decoder.0"] + _residual_names("decoder.2") + _residual_names("decoder.3") + UPSAMPLING + ["decoder.12"]
BOOK = "_vq_vae._embedding"
NAMES = [BOOK] + [f"{layer}.{leaf}" for layer in ENCODER + DECODER for leaf in ("weight", "bias")]


# The running averages that the code book came from: a full dump of the original module has them, decoding needs none.
TRAINING_STATE = {"_vq_vae._ema_cluster_size", "_vq_vae._ema_w"}
MOST_BYTES = 2**28  # the two million numbers of the published file stay far below; more is a mistake or a decompression bomb


# What zipfile, zlib and NumPy's header parser raise on a damaged or a hostile file.
CORRUPT = (
    OSError, ValueError, EOFError, RuntimeError, KeyError, SyntaxError, MemoryError,
    zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError,
)  # fmt: skip


def _arrays(path):
    """The arrays of an .npz file by name."""
    try:
        with zipfile.ZipFile(path) as members:
            size = sum(member.file_size for member in members.infolist())
        if size > MOST_BYTES:
            raise InputError(f"{path}: holds {size} bytes, where a mask VQ-VAE has {MOST_BYTES} at the most")
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except CORRUPT as error:
        raise InputError(f"{path}: not a readable .npz file ({type(error).__name__})") from None


def _check(path, arrays):
    """Compare names, then follow the channels from layer to layer: each takes what the one before it gives."""
    lacking, unexpected = set(NAMES) - set(arrays), set(arrays) - {*NAMES, *TRAINING_STATE}
    for problem, names in (("lacks", lacking), ("has unexpected", unexpected)):
        if names:
            some = ", ".join(name[:100] for name in sorted(names)[:3])  # a hostile name can be long
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise InputError(f"{path}: {problem} {some}{more}")
    for name in NAMES:
        if arrays[name].dtype.kind != "f":
            raise InputError(f"{path}: {name} has dtype {arrays[name].dtype}, expected a floating-point one")
    if arrays[BOOK].ndim != 2 or arrays[BOOK].size == 0:
        raise InputError(f"{path}: {BOOK} has shape {arrays[BOOK].shape}, expected (codes, code size)")
    channels = 1
    for layer in ENCODER + DECODER:
        shape = arrays[f"{layer}.weight"].shape
        if len(shape) != 4 or 0 in shape:
            raise InputError(f"{path}: {layer}.weight has shape {shape}, expected four axes, none empty")
        given = channels if ".net." in layer else shape[1] if layer in UPSAMPLING else shape[0]
        given = {"encoder.10": arrays[BOOK].shape[1], "decoder.12": 1}.get(layer, given)
        weight = (channels, given, 4, 4) if layer in UPSAMPLING else (given, channels, *shape[2:])
        for name, want in ((f"{layer}.weight", weight), (f"{layer}.bias", (given,))):
            if arrays[name].shape != want:
                raise InputError(f"{path}: {name} has shape {arrays[name].shape}, expected {want}")
        channels = given


def read(path):
    """Read a VQ-VAE file (`vae-oid.npz` or one like it) into a nested dict of float32 arrays, names split on ".".

    Raises InputError, in one line, for a file that is no .npz, lacks or adds a tensor, or whose shapes do not chain up.
    """
    arrays = _arrays(path)
    _check(path, arrays)
    params = {}
    for name in NAMES:
        *parents, leaf = name.split(".")
        node = params
        for key in parents:  # "encoder.8.net.0" stays a dict of strings: the numbers have gaps, so they make no list
            node = node.setdefault(key, {})
        node[leaf] = arrays[name].astype(np.float32)
    return params
