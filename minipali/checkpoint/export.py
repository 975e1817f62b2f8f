"""A changed model as a folder in the hub's layout: its weights, its config.json, and what stood beside them."""
import dataclasses
from pathlib import Path

from minipali.checkpoint.big_vision import open_npz
from minipali.checkpoint.hub import open_checkpoint, save
from minipali.checkpoint.safetensors_file import SAVED_AS
from minipali.checkpoint.tensors import unflatten
from minipali.errors import InputError
from minipali.files import make_folder, read_json, replacing, write_json
from minipali.inputs.folder import COMPANIONS


def stored_dtype(path):
    """The dtype of a checkpoint's tensors, as `save` calls it; float32 if they have several."""
    open_any = open_npz if Path(path).suffix == ".npz" else open_checkpoint
    dtypes = {stored.dtype for stored in open_any(path)[1].values()}
    names = [name for name, spelled in SAVED_AS.items() if spelled in dtypes]
    return names[0] if len(names) == 1 else "float32"


def config_json(cfg):
    """The content of config.json for a PaliGemmaConfig, for a model that had no such file: an .npz has none.

    `projection_dim` is what the hub's code builds the projector from; the width of its default is another.
    """
    text, width = dataclasses.asdict(cfg.text_config), cfg.text_config.hidden_size
    windows, second = text.pop("sliding_windows"), text.pop("post_norms")
    text["rope_theta"] = text.pop("rope_thetas")[0]  # of Gemma 1 and 2 all layers have one, and nothing scales it
    for name in ("rope_factors", "qk_norms", "prefix_lm"):
        del text[name]
    if second:
        text["sliding_window"] = next((window for window in windows if window is not None), None)
        text["layer_types"] = ["full_attention" if window is None else "sliding_attention" for window in windows]
    else:
        text = {name: value for name, value in text.items() if "softcapping" not in name and "query" not in name}
    text |= {"model_type": "gemma2" if second else "gemma", "hidden_activation": "gelu_pytorch_tanh"}
    vision = {**dataclasses.asdict(cfg.vision_config), "model_type": "siglip_vision_model", "projection_dim": width}
    return {"architectures": ["PaliGemmaForConditionalGeneration"], "model_type": "paligemma",
            "image_token_index": cfg.image_token_index, "bos_token_id": cfg.bos_token_id,
            "eos_token_id": cfg.eos_token_ids[0], "pad_token_id": cfg.pad_token_id, "hidden_size": width,
            "projection_dim": width, "tie_word_embeddings": cfg.tie_word_embeddings, "text_config": text,
            "vision_config": vision}


def preprocessor_json(model):
    """The content of preprocessor_config.json for a model that had no such file."""
    own = model.preprocessor
    return {"image_processor_type": "SiglipImageProcessor", "processor_class": "PaliGemmaProcessor",
            "do_convert_rgb": True, "do_resize": True, "size": {"height": own.size, "width": own.size},
            "resample": own.resample, "do_rescale": True, "rescale_factor": own.rescale_factor, "do_normalize": True,
            "image_mean": own.mean, "image_std": own.std, "image_seq_length": model.cfg.vision_config.num_patches}


def write_like(model, folder, weights, dtype=None):
    """Write `weights` ({name: array}, all of them) as a folder that answers as `model`, an opened one, does.

    config.json, tokenizer and preprocessor come from where `model` lies, the dtype too unless `dtype` names another.
    The weights come last: a folder that has them is whole. Raises InputError if the folder cannot be written.
    """
    from_npz, folder = model.path.suffix == ".npz", Path(folder)
    source = model.path.parent if from_npz else model.path
    config = config_json(model.cfg) if from_npz else read_json(source / "config.json")
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
    save(folder, config, unflatten(weights), dtype or stored_dtype(model.path))
