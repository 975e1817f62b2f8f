"""A folder in the hub's layout: config.json, one safetensors file or several with an index."""
import dataclasses
import functools
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from minipali.checkpoint.config import PaliGemmaConfig, SiglipConfig, read_config
from minipali.checkpoint.read_matrices import read_matrix, stays_matrix, with_scales
from minipali.checkpoint.safetensors_file import (
    FLOATS,
    SAVED_AS,
    Stored,
    is_used_in_place,
    map_file,
    read_header,
    read_tensor,
    same_numbers,
    write_safetensors,
)
from minipali.checkpoint.tensors import (
    HEAD,
    TABLE,
    canonical,
    check_tensors,
    flatten,
    is_buffer,
    param_shapes,
    unflatten,
)
from minipali.errors import InputError, short_name
from minipali.files import make_folder, read_json, replacing, write_json


def _read_shards(folder, index_path):
    """All tensors of the files that the index names, each found where the index says.

    Indexes are written from another list than the files: an output head that is the embedding table may be named and
    stored nowhere, and a buffer may be stored and not named. Whether anything is missing is for the config to say.
    """
    index = read_json(index_path)
    where = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(where, dict) or not all(isinstance(file, str) for file in where.values()):
        raise InputError(f"{index_path}: expected an object weight_map from tensor names to file names")
    files = sorted(set(where.values()))
    for file in files:
        # The index may come from anywhere: it names files of its own folder, never a path out of it.
        if not re.fullmatch(r"[^/\\\0]{1,200}\.safetensors", file):
            raise InputError(f"{index_path}: {short_name(file)} is no name of a safetensors file in this folder")
        if not os.path.exists(folder / file):
            raise InputError(f"{folder / file}: no such file, and {index_path.name} names it")

    def is_loose(name):
        return is_buffer(name) or canonical(name) == HEAD

    tensors = []
    for file in files:
        for name, stored in read_header(folder / file).items():
            if where.get(name) != file and not (is_loose(name) and name not in where):
                raise InputError(f"{folder / file}: holds {short_name(name)}, which {index_path.name} "
                                 + (f"places in {short_name(where[name])}" if name in where else "does not name"))
            tensors.append(stored)
    missing = sorted(name for name in set(where) - {stored.name for stored in tensors} if not is_loose(name))
    if missing:
        raise InputError(f"{folder / where[missing[0]]}: {short_name(missing[0])} is missing, and {index_path.name} "
                         "places it there")
    return tensors


def _no_weights(folder):
    """What to say of a folder without weights, from what lies there instead."""
    names = sorted(os.listdir(folder))
    if "adapter_config.json" in names:
        return "an adapter without its model, expected a whole one (peft: merge_and_unload, then save_pretrained)"
    for name in names:
        if name.endswith((".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")):
            return f"expected *.safetensors and found {short_name(name)} (transformers: save_pretrained writes them)"
        if name.endswith(".npz"):
            return f"expected *.safetensors; to use {short_name(name)}, give its own path"
    return "expected model.safetensors, or its shards and their index, and found neither"


def _read_files(folder):
    """Every tensor of a folder: model.safetensors, or the shards of its index, or whatever *.safetensors there are."""
    single, index_path = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        paths = [single]
    elif index_path.exists():
        return _read_shards(folder, index_path)
    else:  # macOS puts ._x.safetensors, no such file, beside x.safetensors on the disks of other systems
        paths = [path for path in sorted(folder.glob("*.safetensors"))
                 if path.name[0] != "." and path.name != "adapter_model.safetensors"]
    for path in paths:
        if not path.exists():
            raise InputError(f"{path}: a link to a file that does not exist: was its download finished?")
    if not paths:
        raise InputError(f"{folder}: {_no_weights(folder)}")
    return [stored for path in paths for stored in read_header(path).values()]


def _find_tensors(folder):
    """{canonical name: Stored} of everything in the folder that can be a parameter."""
    folder = Path(folder)
    if not os.path.isdir(folder):
        problem = "expected a folder with config.json and *.safetensors or an .npz, and this is a file"
        raise InputError(f"{folder}: {problem if os.path.exists(folder) else 'no such folder'}")
    try:
        stored_tensors = _read_files(folder)
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror})") from None
    tensors = {}
    for stored in stored_tensors:
        if is_buffer(stored.name):
            continue
        if ".lora_A." in stored.name:
            raise InputError(f"{stored.path}: {short_name(stored.name)} is half of a LoRA, expected weights into which "
                             "it has been merged (peft: merge_and_unload)")
        name = canonical(stored.name)
        if name in tensors:
            raise InputError(f"{stored.path}: {short_name(stored.name)} is the same parameter as "
                             f"{short_name(tensors[name].name)} in {tensors[name].path.name}")
        tensors[name] = stored
    return with_scales(tensors)


def inventory(folder) -> dict[str, tuple]:
    """{parameter: (dtype as the file spells it, shape)} of a folder in the hub's layout, without loading a tensor."""
    return {name: (stored.dtype, stored.shape) for name, stored in _find_tensors(folder).items()}


def _without_unused(tensors, cfg):
    """The tensors without those that a file may hold and the model never reads."""
    prefixes = ()
    if cfg.vision_config is None:  # the decoder of a Gemma 3 that also sees
        prefixes = "vision_tower.", "multi_modal_projector."
    elif cfg.vision_config.vision_use_head:
        prefixes = ("vision_tower.vision_model.head.",)
    return {name: stored for name, stored in tensors.items() if not name.startswith(prefixes)}


@functools.lru_cache(maxsize=8)
def _are_same(first, second, changed):
    """`same_numbers`, once for each state of the files: `changed` says when they were last written."""
    return same_numbers(first, second)


def _settle_output_head(tensors, cfg):
    """The output head of a config that ties it to the embedding table -> tensors and config without a contradiction.

    Stored beside the table with the same numbers it is left out. With other numbers it has been trained by itself, as
    by a LoRA that was merged into it: it is used, and the config unties the two. Stored alone it is the table, since
    safetensors keeps only one name of a tensor that has two.
    """
    head, table = tensors.get(HEAD), tensors.get(TABLE)
    if not cfg.tie_word_embeddings or head is None:
        return tensors, cfg
    rest = {name: stored for name, stored in tensors.items() if name != HEAD}
    if table is None:
        return rest | {TABLE: head}, cfg
    if head.shape != table.shape or not {head.dtype, table.dtype} <= set(FLOATS):
        return tensors, cfg  # refused by its name
    if _are_same(head, table, tuple(os.stat(stored.path).st_mtime_ns for stored in (head, table))):
        return rest, cfg
    return tensors, dataclasses.replace(cfg, tie_word_embeddings=False)


def open_checkpoint(folder) -> tuple[PaliGemmaConfig | SiglipConfig, dict[str, Stored]]:
    """config.json and every header of a folder, checked against each other: the config, and {name: Stored} in the order
    of the forward pass. No tensor is loaded. Raises InputError, in one line."""
    tensors = _find_tensors(folder)
    cfg = read_config(folder, {name: stored.shape for name, stored in tensors.items()})
    if isinstance(cfg, PaliGemmaConfig):
        tensors, cfg = _settle_output_head(_without_unused(tensors, cfg), cfg)
    shapes = param_shapes(cfg)
    check_tensors(tensors, shapes, f"{folder}: of the {len(shapes)} tensors that config.json calls for")
    return cfg, {name: tensors[name] for name in shapes}


def load(folder, dtype=np.float32, weights: str | None = None) -> tuple[PaliGemmaConfig | SiglipConfig, dict]:
    """A folder in the hub's layout -> (cfg, params): the tree that the model reads, in `dtype`.

    float32 tensors asked for as float32 stay in the file: read-only, mapped, and read when first used. Others are
    converted one by one; the files are never in memory as a whole. `weights`: float32, bfloat16 or int8, the matrices
    are then those of matrices.py and not arrays. Raises InputError, in one line that names the file or the tensor: a
    checkpoint is loaded exactly or not at all.
    """
    cfg, tensors = open_checkpoint(folder)
    dtype = np.dtype(dtype)
    compact = {name for name, stored in tensors.items() if weights and stays_matrix(name, stored.shape)}
    mapped = {path: map_file(path) for path in {stored.path for name, stored in tensors.items()
                                                if name in compact or is_used_in_place(stored, dtype)}}
    others = [name for name in tensors if name not in compact]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        arrays = pool.map(lambda name: read_tensor(tensors[name], mapped.get(tensors[name].path), dtype), others)
        flat = dict.fromkeys(tensors) | dict(zip(others, arrays))
    # One by one, for each of them is converted on all threads.
    flat |= {name: read_matrix(tensors[name], mapped[tensors[name].path], weights) for name in compact}
    return cfg, unflatten(flat)


def save(folder: str | Path, config: dict, params: dict, dtype: str) -> None:
    """Write a checkpoint in the hub's layout: model.safetensors under the published names, and config.json.
    A Gemma by itself gets the names that it has on the hub, without `language_model.` in front.

    `config`: the content of config.json, a dict; `params`: the tree, in host memory; `dtype`: float64, float32, float16
    or bfloat16. Both files are whole before either appears. Raises InputError if they cannot be written, or if a weight
    is too large for the dtype.
    """
    folder, file_dtype = Path(folder), SAVED_AS[dtype]
    make_folder(folder)
    with (replacing(folder / "model.safetensors") as weights_file,
          replacing(folder / "config.json") as json_file):
        tree = params if "vision_tower" in params else params.get("language_model", params)
        write_safetensors(weights_file, flatten(tree), file_dtype)
        json_file.write((json.dumps(config, indent=2) + "\n").encode())


def preprocessor_json(model):
    """The content of preprocessor_config.json for a model that had no such file."""
    own = model.preprocessor
    return {"image_processor_type": "SiglipImageProcessor", "processor_class": "PaliGemmaProcessor",
            "do_convert_rgb": True, "do_resize": True, "size": {"height": own.size, "width": own.size},
            "resample": own.resample, "do_rescale": True, "rescale_factor": own.rescale_factor, "do_normalize": True,
            "image_mean": own.mean, "image_std": own.std, "image_seq_length": model.cfg.vision_config.num_patches}


def copy_companions(names, source, folder, model):
    """Copy the files `names` that stand in `source`; a preprocessor_config.json is written where none is."""
    present = [name for name in names if (source / name).exists()]
    make_folder(folder)
    for name in present:
        try:
            content = (source / name).read_bytes()
        except OSError as error:
            raise InputError(f"{source / name}: cannot be read ({error.strerror})") from None
        with replacing(folder / name) as file:
            file.write(content)
    if model.preprocessor and not {"preprocessor_config.json", "processor_config.json"} & set(present):
        write_json(folder / "preprocessor_config.json", preprocessor_json(model))
