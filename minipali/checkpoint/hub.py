"""A folder in the hub's layout: config.json, one safetensors file or several with an index."""
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from minipali.checkpoint.config import PaliGemmaConfig, read_config
from minipali.checkpoint.safetensors_file import (
    SAVED_AS,
    read_header,
    read_tensor,
    write_safetensors,
)
from minipali.checkpoint.tensors import (
    _BUFFER,
    canonical,
    check_tensors,
    flatten,
    param_shapes,
    unflatten,
)
from minipali.errors import InputError, short_name
from minipali.files import make_folder, read_json, replacing, write_json
from minipali.inputs.folder import COMPANIONS


def _read_shards(folder, index_path):
    """All tensors of the files that the index names, each found where the index says."""
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
    found = []
    for file in files:
        for name, stored in read_header(folder / file).items():
            if where.get(name) != file:
                raise InputError(f"{folder / file}: holds {short_name(name)}, which {index_path.name} "
                               + (f"places in {short_name(where[name])}" if name in where else "does not name"))
            found.append(stored)
    missing = sorted(set(where) - {stored.name for stored in found})
    if missing:
        raise InputError(f"{folder / where[missing[0]]}: {short_name(missing[0])} is missing, and {index_path.name} "
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
        raise InputError(f"{folder}: expected model.safetensors, or its shards and their index, and found neither")
    return [stored for path in paths for stored in read_header(path).values()]


def _find_tensors(folder):
    """{canonical name: Stored} of everything in the folder that can be a parameter."""
    folder = Path(folder)
    if not os.path.isdir(folder):
        raise InputError(f"{folder}: " + ("expected a folder with config.json and *.safetensors, and this is a file"
                                        if os.path.exists(folder) else "no such folder"))
    tensors = {}
    for stored in _read_files(folder):
        if _BUFFER.search(stored.name):
            continue
        name = canonical(stored.name)
        if name in tensors:
            raise InputError(f"{stored.path}: {short_name(stored.name)} is the same parameter as {short_name(tensors[name].name)}"
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


def open_checkpoint(folder):
    """config.json and every header of a folder, checked against each other: PaliGemmaConfig or SiglipConfig, and
    {name: Stored} in the order of the forward pass. Raises InputError, in one line."""
    tensors = _find_tensors(folder)
    cfg = read_config(folder, {name: stored.shape for name, stored in tensors.items()})
    shapes = param_shapes(cfg)
    tensors = _without_unused(tensors, cfg)
    check_tensors(tensors, shapes, f"{folder}: of the {len(shapes)} tensors that config.json calls for")
    return cfg, {name: tensors[name] for name in shapes}


def load(folder, dtype=np.float32):
    """A folder in the hub's layout -> (cfg, params): the tree that the model reads, in `dtype`.

    float32 tensors asked for as float32 stay in the file: read-only, mapped, and read when first used. Others are
    converted one by one; the files are never in memory as a whole. Raises InputError, in one line that names the file or
    the tensor: a checkpoint is loaded exactly or not at all.
    """
    cfg, tensors = open_checkpoint(folder)
    dtype = np.dtype(dtype)
    mapped = {path: np.memmap(path, np.uint8, "r") for path in {stored.path for stored in tensors.values()}}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        arrays = pool.map(lambda stored: read_tensor(stored, mapped[stored.path], dtype), tensors.values())
        return cfg, unflatten(dict(zip(tensors, arrays)))


def save(folder, config, params, dtype):
    """Write a checkpoint in the hub's layout: model.safetensors under the published names, and config.json.
    A Gemma by itself gets the names that it has on the hub, without `language_model.` in front.

    `config`: the content of config.json, a dict; `params`: the tree, in host memory; `dtype`: float64, float32, float16
    or bfloat16. Both files are whole before either appears. Raises InputError if they cannot be written.
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


def copy_companions(source, folder, model):
    """Copy what stands beside the weights in `source`; a preprocessor_config.json is written where there is none."""
    found = [name for name in COMPANIONS if (source / name).exists()]
    make_folder(folder)
    for name in found:
        try:
            content = (source / name).read_bytes()
        except OSError as error:
            raise InputError(f"{source / name}: cannot be read ({error.strerror})") from None
        with replacing(folder / name) as file:
            file.write(content)
    if not {"preprocessor_config.json", "processor_config.json"} & set(found):
        write_json(folder / "preprocessor_config.json", preprocessor_json(model))
