"""The file of the mask codec: `vae-oid.npz`, or one like it."""
import numpy as np

from minipali.checkpoint.npz_file import read_arrays, read_members
from minipali.checkpoint.safetensors_file import FLOATS
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
MOST_BYTES = 2**28  # the published file's two million numbers stay far below; more is a mistake or a decompression bomb


def _check(path, arrays):
    """Compare names, then follow the channels from layer to layer: each takes what the one before it gives."""
    lacking, unexpected = set(NAMES) - set(arrays), set(arrays) - {*NAMES, *TRAINING_STATE}
    for problem, names in (("lacks", lacking), ("has unexpected", unexpected)):
        if names:
            some = ", ".join(name[:100] for name in sorted(names)[:3])  # a hostile name can be long
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise InputError(f"{path}: {problem} {some}{more}")
    for name in NAMES:
        if arrays[name].dtype not in FLOATS:
            raise InputError(f"{path}: {name} has dtype {arrays[name].dtype}, expected a floating-point one")
    if len(arrays[BOOK].shape) != 2 or 0 in arrays[BOOK].shape:
        raise InputError(f"{path}: {BOOK} has shape {arrays[BOOK].shape}, expected (codes, code size)")
    channels = 1
    for layer in ENCODER + DECODER:
        shape = arrays[f"{layer}.weight"].shape
        if len(shape) != 4 or 0 in shape:
            raise InputError(f"{path}: {layer}.weight has shape {shape}, expected four axes, none empty")
        outputs = channels if ".net." in layer else shape[1] if layer in UPSAMPLING else shape[0]
        outputs = {"encoder.10": arrays[BOOK].shape[1], "decoder.12": 1}.get(layer, outputs)
        weight = (channels, outputs, 4, 4) if layer in UPSAMPLING else (outputs, channels, *shape[2:])
        for name, expected in ((f"{layer}.weight", weight), (f"{layer}.bias", (outputs,))):
            if arrays[name].shape != expected:
                raise InputError(f"{path}: {name} has shape {arrays[name].shape}, expected {expected}")
        channels = outputs


def book_size(path) -> int:
    """How many codes the code book has, without reading the arrays; InputError as from `read`."""
    members = read_members(path)
    _check(path, members)
    return members[BOOK].shape[0]


def read(path) -> dict:
    """A VQ-VAE file (`vae-oid.npz` or one like it) as a nested dict of float32 arrays, names split on ".".

    Raises InputError, in one line, for a file that is not an .npz, has missing or extra tensors, or wrong shapes.
    """
    members = read_members(path)
    size = sum(member.entry.file_size for member in members.values())
    if size > MOST_BYTES:
        raise InputError(f"{path}: holds {size} bytes, where a mask VQ-VAE has {MOST_BYTES} at the most")
    _check(path, members)
    arrays = {name: np.empty(members[name].shape, np.float32) for name in NAMES}
    read_arrays(path, members, {name: {(): array} for name, array in arrays.items()})
    params = {}
    for name, array in arrays.items():
        *parents, leaf = name.split(".")
        node = params
        for key in parents:  # "encoder.8.net.0" stays a dict of strings: the numbers have gaps, so they make no list
            node = node.setdefault(key, {})
        node[leaf] = array
    return params
