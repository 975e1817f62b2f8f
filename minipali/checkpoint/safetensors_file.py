"""Checkpoint files: the header checked before a byte of a tensor is touched, then the tensors, mapped or upcast.

A safetensors file is eight bytes (the header's length, little-endian), a JSON header that gives each tensor's dtype,
shape and place, and then the tensors end to end. float32 is used where it lies in the file, so that a checkpoint opens
at once; bfloat16 and float16, which NumPy cannot compute in with any speed, become float32 tensor by tensor.

    python -m minipali.checkpoint.safetensors_file PATH          what a checkpoint holds, without loading it
"""
import argparse
import contextlib
import json
import math
import os
import re
import reprlib
import struct
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minipali.checkpoint.config import (
    PaliGemmaConfig,
    SiglipConfig,
    Unusable,
    param_shapes,
    read_config,
    read_json,
)

# The dtypes of the format and their bytes per number. Weights come in the four that are in FLOATS as well.
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4,
              "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}  # NumPy has no bfloat16: its bits, as integers
SAVED_AS = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}

LONGEST_HEADER = 100_000_000    # bytes; the limit that the format itself sets
CHUNK = 1 << 18                 # numbers that are converted at a time, so that what is in between stays in the cache


def unflatten(flat):
    """Dotted names to the tree that the model reads: {"layers.0.weight": x} -> {"layers": [{"weight": x}]}."""
    tree = {}
    for name, leaf in flat.items():
        *path, last = name.split(".")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = leaf
    return _with_lists(tree)


def _with_lists(node):
    """Dicts whose keys are 0, 1, 2, … become lists; a part of a model may lack some of them, and keeps its dict."""
    if not isinstance(node, dict):
        return node
    children = {key: _with_lists(child) for key, child in node.items()}
    if children and set(children) == {str(i) for i in range(len(children))}:
        return [children[str(i)] for i in range(len(children))]
    return children


def flatten(tree):
    """The way back: {"layers": [{"weight": x}]} -> {"layers.0.weight": x}."""
    flat = {}
    for key, child in enumerate(tree) if isinstance(tree, list) else tree.items():
        if isinstance(child, (dict, list)):
            flat.update({f"{key}.{name}": leaf for name, leaf in flatten(child).items()})
        else:
            flat[str(key)] = child
    return flat


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


def _shown(name):
    """A name from a header can be as long as the header."""
    return name if len(name) <= 150 else name[:150] + "…"


def _unique(pairs):
    """JSON lets a key come twice, and readers differ in which of the two counts."""
    (name, count), = Counter(name for name, _ in pairs).most_common(1) or [("", 0)]
    if count > 1:
        raise Unusable(f"{_shown(name)} comes {count} times in the header")
    return dict(pairs)


def _whole(value):
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _check_entry(entry):
    """One tensor's entry of the header -> dtype, shape, begin, end; Unusable says what is wrong with it."""
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= set(entry):
        raise Unusable("expected dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise Unusable(f"dtype {reprlib.repr(dtype)} is unknown")
    if not isinstance(shape, list) or len(shape) > 8 or not all(map(_whole, shape)):
        raise Unusable(f"shape {reprlib.repr(shape)} is no list of up to 8 sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_whole, offsets)) or offsets[0] > offsets[1]:
        raise Unusable(f"data_offsets {reprlib.repr(offsets)} are no begin and end")
    size = math.prod(shape) * ITEM_BYTES[dtype]
    if offsets[1] - offsets[0] != size:
        raise Unusable(f"shape {reprlib.repr(shape)} in {dtype} takes {size} bytes, data_offsets give it "
                       f"{offsets[1] - offsets[0]}")
    return dtype, tuple(shape), *offsets


def _check_layout(spans, data_size):
    """Tensors lie end to end: spans of (begin, end, name) without overlap, hole or rest."""
    reached, last = 0, "the header"
    for begin, end, name in sorted(spans):
        if begin != reached:
            problem = "overlaps" if begin < reached else "leaves a hole after"
            raise Unusable(f"{_shown(name)} {problem} {_shown(last)}")
        reached, last = end, name
    if reached != data_size:
        raise Unusable(f"the header describes {reached} bytes of tensors and the file has {data_size}"
                       + (": it is cut short" if reached > data_size else ""))


def _parse_header(file, size):
    """An open safetensors file of `size` bytes -> {name: (dtype, shape, start)}."""
    if size < 8:
        raise Unusable(f"{size} bytes are too few for a safetensors file")
    length, = struct.unpack("<Q", file.read(8))
    if length > min(size - 8, LONGEST_HEADER):
        raise Unusable(f"its header claims {length} bytes of a file of {size}: not a safetensors file, or cut short")
    try:
        header = json.loads(file.read(length).decode("utf-8"), object_pairs_hook=_unique)
    except Unusable:
        raise
    except (ValueError, RecursionError) as error:
        raise Unusable(f"its header is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise Unusable("its header is no JSON object")
    header.pop("__metadata__", None)
    tensors, spans = {}, []
    for name, entry in header.items():
        try:
            dtype, shape, begin, end = _check_entry(entry)
        except Unusable as problem:
            raise Unusable(f"{_shown(name)}: {problem}") from None
        tensors[name] = dtype, shape, 8 + length + begin
        spans.append((begin, end, name))
    _check_layout(spans, size - 8 - length)
    return tensors


def read_header(path):
    """What a safetensors file says that it holds, every claim checked against the file: {name: Stored}.

    No tensor is touched. Raises Unusable with the file, the tensor and what is wrong. Format: the safetensors README.
    """
    try:
        with open(path, "rb") as file:
            tensors = _parse_header(file, os.fstat(file.fileno()).st_size)
    except Unusable as problem:
        raise Unusable(f"{path}: {problem}") from None
    except OSError as error:
        raise Unusable(f"{path}: cannot be read ({error.strerror})") from None
    return {name: Stored(path, name, *tensor) for name, tensor in tensors.items()}


def _read_shards(folder, index_path):
    """All tensors of the files that the index names, each found where the index says."""
    index = read_json(index_path)
    where = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise Unusable(f"{index_path}: expected an object weight_map from tensor names to file names")
    files = sorted(set(where.values()))
    for file in files:
        # The index may come from anywhere: it names files of its own folder, never a path out of it.
        if not re.fullmatch(r"[^/\\\0]{1,200}\.safetensors", file):
            raise Unusable(f"{index_path}: {_shown(file)} is no name of a safetensors file in this folder")
        if not os.path.exists(folder / file):
            raise Unusable(f"{folder / file}: no such file, and {index_path.name} names it")
    found = []
    for file in files:
        for name, stored in read_header(folder / file).items():
            if where.get(name) != file:
                raise Unusable(f"{folder / file}: holds {_shown(name)}, which {index_path.name} "
                               + (f"places in {_shown(where[name])}" if name in where else "does not name"))
            found.append(stored)
    missing = sorted(set(where) - {stored.name for stored in found})
    if missing:
        raise Unusable(f"{folder / where[missing[0]]}: {_shown(missing[0])} is missing, and {index_path.name} "
                       "places it there")
    return found


def _read_files(folder):
    """Every tensor of a folder: model.safetensors, or the shards of its index, or whatever *.safetensors there are."""
    single, index_path = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        paths = [single]
    elif index_path.exists():
        return _read_shards(folder, index_path)
    else:
        paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise Unusable(f"{folder}: expected model.safetensors, or its shards and their index, and found neither")
    return [stored for path in paths for stored in read_header(path).values()]


# What was wrapped around the model when it was saved, and the module where the model's own names begin.
_WRAPPERS = re.compile(r"^(?:(?:model|paligemma|paligemma_with_expert)\.)+"
                       r"(?=(?:language_model|lm_head|vision_tower|multi_modal_projector|vision_model|text_model)\."
                       r"|logit_)")
# Buffers that older versions stored beside the weights; each is computed, never learned.
_BUFFER = re.compile(r"(?:^|\.)(?:position_ids|rotary_emb\.(?:original_)?inv_freq)$")


def canonical(name):
    """A tensor's name in any of the hub's schemes -> its name in the published files, which is the model's own.

    Newer versions of transformers put `model.` in front, take it out of the middle, and drop `vision_model.`;
    robotics models wrap the whole in modules of their own. A Gemma by itself has no `language_model.` in front.
    """
    name = _WRAPPERS.sub("", name)
    name = re.sub(r"^(?:model\.)?(?=(?:embed_tokens|layers|norm)\.)", "language_model.model.", name)
    name = re.sub(r"^lm_head\.", "language_model.lm_head.", name)
    name = re.sub(r"^language_model\.(?!model\.|lm_head\.)", "language_model.model.", name)
    return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)


def _find_tensors(folder):
    """{canonical name: Stored} of everything in the folder that can be a parameter."""
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise Unusable(f"{folder}: " + ("expected a folder with config.json and *.safetensors, and this is a file"
                                        if os.path.exists(folder) else "no such folder"))
    tensors = {}
    for stored in _read_files(folder):
        if _BUFFER.search(stored.name):
            continue
        name = canonical(stored.name)
        if name in tensors:
            raise Unusable(f"{stored.path}: {_shown(stored.name)} is the same parameter as {_shown(tensors[name].name)}"
                           f" in {tensors[name].path.name}")
        tensors[name] = stored
    return tensors


def inventory(folder):
    """{parameter: (dtype as the file spells it, shape)} of a folder in the hub's layout, without loading a tensor."""
    return {name: (stored.dtype, stored.shape) for name, stored in _find_tensors(folder).items()}


def _without_unused(tensors, cfg):
    """Leave out what a file may hold and the model never reads."""
    if not isinstance(cfg, PaliGemmaConfig):
        return tensors
    prefixes = ()
    if cfg.vision_config is None:  # the decoder of a Gemma 3 that also sees
        prefixes = "vision_tower.", "multi_modal_projector."
    elif cfg.vision_config.vision_use_head:
        prefixes = ("vision_tower.vision_model.head.",)
    unused = [name for name in tensors if name.startswith(prefixes)]
    # Some files store the output head although it is the embedding table; transformers ties the two as well.
    head, table = (tensors.get(f"language_model.{name}.weight") for name in ["lm_head", "model.embed_tokens"])
    if cfg.tie_word_embeddings and head and table and head.shape == table.shape:
        unused.append("language_model.lm_head.weight")
    return {name: stored for name, stored in tensors.items() if name not in unused}


def _list_some(problems):
    shown = ", ".join(_shown(problem) for problem in problems[:3])
    return shown + (", …" if len(problems) > 3 else "")


def check_tensors(tensors, shapes, where):
    """Strict: exactly the names and shapes that a model calls for, all of them numbers that can be weights.

    A loader that lets a missing tensor pass runs a PaliGemma 2 as a PaliGemma 1, and prints nonsense without an error.
    """
    missing = [name for name in shapes if name not in tensors]
    unexpected = [stored.name for name, stored in tensors.items() if name not in shapes]
    misshapen = [f"{name} {list(tensors[name].shape)} where {list(shape)} belongs" for name, shape in shapes.items()
                 if name in tensors and tensors[name].shape != shape]
    unsupported = [f"{name} {tensors[name].dtype}" for name in shapes
                   if name in tensors and tensors[name].dtype not in FLOATS]
    faults = [f"{len(names)} {kind} ({_list_some(names)})" for kind, names in [
        ("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen),
        (f"of a dtype other than {', '.join(FLOATS)}", unsupported)] if names]
    if faults:
        raise Unusable(f"{where}: " + "; ".join(faults))


def open_checkpoint(folder):
    """config.json and every header of a folder, checked against each other: PaliGemmaConfig or SiglipConfig, and
    {name: Stored} in the order of the forward pass. Raises Unusable, in one line."""
    tensors = _find_tensors(folder)
    cfg = read_config(folder, {name: stored.shape for name, stored in tensors.items()})
    shapes = param_shapes(cfg)
    tensors = _without_unused(tensors, cfg)
    check_tensors(tensors, shapes, f"{folder}: of the {len(shapes)} tensors that config.json calls for")
    return cfg, {name: tensors[name] for name in shapes}


def _read_tensor(stored, mapped, dtype):
    """One tensor as an array of `dtype`: a read-only view of the mapped file where that is possible."""
    size, file_dtype = math.prod(stored.shape), np.dtype(FLOATS[stored.dtype])
    if stored.dtype != "BF16" and file_dtype == dtype:
        end = stored.start + size * file_dtype.itemsize
        in_place = np.asarray(mapped[stored.start:end]).view(file_dtype).reshape(stored.shape)
        return np.require(in_place, requirements="A")  # an odd header length would leave it between two words
    # Read in pieces, not through the map: mapped pages would stay in memory beside the result.
    out = np.empty(size, dtype)
    with open(stored.path, "rb") as file, np.errstate(invalid="ignore", over="ignore"):
        file.seek(stored.start)
        for at in range(0, size, CHUNK):
            piece = np.fromfile(file, file_dtype, min(CHUNK, size - at))
            out[at:at + CHUNK] = from_bfloat16(piece) if stored.dtype == "BF16" else piece
    return out.reshape(stored.shape)


def load(folder, dtype=np.float32):
    """A folder in the hub's layout -> (cfg, params): the tree that the model reads, in `dtype`.

    float32 tensors asked for as float32 stay in the file: read-only, mapped, and read when first used. Others are
    converted one by one; the files are never in memory as a whole. Raises Unusable, in one line that names the file or
    the tensor: a checkpoint is loaded exactly or not at all.
    """
    cfg, tensors = open_checkpoint(folder)
    dtype = np.dtype(dtype)
    mapped = {path: np.memmap(path, np.uint8, "r") for path in {stored.path for stored in tensors.values()}}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        arrays = pool.map(lambda stored: _read_tensor(stored, mapped[stored.path], dtype), tensors.values())
        return cfg, unflatten(dict(zip(tensors, arrays)))


@contextlib.contextmanager
def _replacing(path):
    """A file to write to that takes the place of `path` when it is whole, and vanishes if it does not get there."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _write_safetensors(file, arrays, dtype):
    """The format's header and, one by one, the tensors. The safetensors package writes no bfloat16 from NumPy."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, x in arrays.items():
        begin, end = end, end + x.size * ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(x.shape), "data_offsets": [begin, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)  # so that the tensors begin on a whole word
    file.write(struct.pack("<Q", len(head)) + head)
    for x in arrays.values():
        file.write(np.asarray(to_bfloat16(x) if dtype == "BF16" else x, FLOATS[dtype], order="C").data)


def save(folder, config, params, dtype):
    """Write a checkpoint in the hub's layout: model.safetensors under the published names, and config.json.
    A Gemma by itself gets the names that it has on the hub, without `language_model.` in front.

    `config`: the content of config.json, a dict; `params`: the tree, in host memory; `dtype`: float64, float32, float16
    or bfloat16. Both files are whole before either appears. Raises Unusable if they cannot be written.
    """
    folder, file_dtype = Path(folder), SAVED_AS[dtype]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (_replacing(folder / "model.safetensors") as weights_file,
              _replacing(folder / "config.json") as json_file):
            tree = params if "vision_tower" in params else params.get("language_model", params)
            _write_safetensors(weights_file, flatten(tree), file_dtype)
            json_file.write((json.dumps(config, indent=2) + "\n").encode())
    except OSError as error:
        raise Unusable(f"{folder}: cannot be written ({error.strerror})") from None


def count_parameters(cfg):
    """How many numbers a checkpoint of this config holds."""
    return sum(math.prod(shape) for shape in param_shapes(cfg).values())


def _describe(cfg):
    """The sizes of a model in a line or two: how it sees, if it does, and how it reads."""
    vision, text = cfg.vision_config, cfg.text_config
    if vision:
        yield (f"picture: {vision.image_size}x{vision.image_size} as {vision.num_patches} patches, "
               f"{vision.num_hidden_layers} layers of width {vision.hidden_size}, {vision.num_attention_heads} heads")
    if isinstance(cfg, SiglipConfig):
        yield (f"text: {text.max_position_embeddings} tokens out of {text.vocab_size}, "
               f"{text.num_hidden_layers} layers of width {text.hidden_size}, {text.num_attention_heads} heads")
    else:
        yield (f"text: tokens out of {text.vocab_size}, {text.num_hidden_layers} layers of width {text.hidden_size}, "
               f"{text.num_attention_heads} query heads on {text.num_key_value_heads} key/value heads of "
               f"{text.head_dim}")


def family(cfg):
    """The name of the kind of model."""
    if isinstance(cfg, SiglipConfig):
        return "SigLIP"
    number = " 3" if cfg.text_config.qk_norms else " 2" if cfg.text_config.post_norms else ""
    return ("PaliGemma" if cfg.vision_config else "Gemma") + number


def summary(path):
    """What a checkpoint holds, in lines: family, sizes, parameters, then every tensor, those of all layers as one."""
    if Path(path).suffix == ".npz":
        # Here and not at the top, since it imports this module.
        from minipali.checkpoint.big_vision import open_npz
        cfg, tensors = open_npz(path)
    else:
        cfg, tensors = open_checkpoint(path)
    total = sum(math.prod(stored.shape) * ITEM_BYTES[stored.dtype] for stored in tensors.values())
    files = len({stored.path for stored in tensors.values()})
    yield (f"{family(cfg)}: {count_parameters(cfg):,} parameters in {len(tensors)} tensors, {total / 1e6:,.1f} MB in "
           f"{files} " + ("file" if files == 1 else "files"))
    yield from _describe(cfg)
    alike = Counter((re.sub(r"(\.layers\.|/encoderblock_)\d+", r"\1*", name), stored.dtype, stored.shape)
                    for name, stored in tensors.items())
    for (name, dtype, shape), count in alike.items():
        yield f"{count:4} x {dtype:4} {list(shape)!s:20} {name}"


def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m minipali.checkpoint.safetensors_file",
                                     description="Print what a checkpoint holds, without loading it.")
    parser.add_argument("path", help="a folder with config.json and *.safetensors, or a big_vision .npz file")
    try:
        print("\n".join(summary(parser.parse_args(arguments).path)))
    except Unusable as problem:
        print(f"minipali.checkpoint.safetensors_file: error: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
