"""A model on disk to a tree of weights, and back.

A model lies in a folder in the hub's layout or in one of big_vision's .npz files. The functions here take the path of
either, and no other file of the package asks which of the two it is. Read on in this order: config.py with
gemma_config.py (what model it is), tensors.py (what it must hold), then hub.py with safetensors_file.py, or
big_vision.py with npz_file.py. matrices.py keeps large matrices in 16 or 8 bits, read_matrices.py reads them,
choice.py says when, int8_file.py writes them so. vae_oid.py reads the mask codec, a file beside the model.
"""
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from minipali.checkpoint.big_vision import load_npz, open_npz
from minipali.checkpoint.config import PaliGemmaConfig, SiglipConfig, config_json
from minipali.checkpoint.hub import copy_companions, load, open_checkpoint, save
from minipali.checkpoint.read_matrices import held_as
from minipali.checkpoint.safetensors_file import SAVED_AS
from minipali.checkpoint.tensors import flatten, unflatten
from minipali.files import read_json
from minipali.inputs.folder import COMPANIONS


def _is_npz(path):
    return Path(path).suffix.lower() == ".npz"


def folder_of(path: str | Path) -> Path:
    """The folder in which the model's tokenizer and its other files lie: the path itself, or the .npz file's."""
    return Path(path).parent if _is_npz(path) else Path(path)


def open_any(path: str | Path) -> tuple[PaliGemmaConfig | SiglipConfig, dict]:
    """The config of a checkpoint, and where each of its tensors lies; no tensor is loaded.

    Raises InputError, in one line, unless it holds exactly the tensors of such a model.
    """
    return (open_npz if _is_npz(path) else open_checkpoint)(path)


def load_any(path: str | Path, dtype: DTypeLike = np.float32,
             weights: str | None = None) -> tuple[PaliGemmaConfig | SiglipConfig, dict]:
    """The config of a checkpoint, and the tree of its parameters in `dtype`; raises InputError as `open_any` does.

    `weights`: the form in which matrices are held, see choice.py; None for plain arrays.
    """
    if not _is_npz(path):
        return load(path, dtype, weights)
    cfg, params = load_npz(path, dtype)
    return cfg, unflatten(held_as(flatten(params), weights)) if weights else params


def stored_dtype(path) -> str:
    """The dtype of a checkpoint's tensors, as `save` calls it; float32 if they have several."""
    dtypes = {stored.dtype for stored in open_any(path)[1].values()}
    names = [name for name, spelled in SAVED_AS.items() if spelled in dtypes]
    return names[0] if len(names) == 1 else "float32"


def write_like(model, folder: str | Path, weights: dict[str, np.ndarray], dtype: str | None = None) -> None:
    """Write `weights` ({name: array}, all of them) as a folder that answers as `model`, an opened one, does.

    config.json, tokenizer and preprocessor come from where `model` lies, the dtype too unless `dtype` names another.
    The weights come last: a folder that has them is complete. Raises InputError if the folder cannot be written.
    """
    source, folder, dtype = folder_of(model.path), Path(folder), dtype or stored_dtype(model.path)
    config = config_json(model.cfg) if _is_npz(model.path) else read_json(source / "config.json")
    sections = [config, *(config[name] for name in ("text_config", "vision_config") if name in config)]
    if not model.cfg.tie_word_embeddings:  # the file may say otherwise of an output head that was trained by itself
        for section in sections[:2]:  # the second is where older versions of transformers look
            section["tie_word_embeddings"] = False
    for section in sections:
        for name in {"dtype", "torch_dtype"} & set(section):  # transformers rounds the weights to what stands there
            section[name] = dtype
    # What stands beside an .npz is for its tokenizer and pictures; a generation_config.json there was not read either.
    names = [name for name in COMPANIONS if name != "generation_config.json" or not _is_npz(model.path)]
    copy_companions(names, source, folder, model)
    save(folder, config, unflatten(weights), dtype)
