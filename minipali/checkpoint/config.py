"""What a checkpoint says about itself: config.json as a config object, and the way back.

The published files leave out whatever equals a default of the class that wrote them, and a few of their fields are
stale. The defaults below are therefore those of the writing classes, and where a tensor's shape knows better than the
file (head size, picture size), the shape wins. A field that may stand in several places is read as transformers 5 reads
it, or refused. null means the same as leaving a field out, except where null switches something off.
"""
import dataclasses
import math
from pathlib import Path
from typing import Any

from minipali.checkpoint.fields import MOST_LAYERS, Fields
from minipali.checkpoint.gemma_config import GEMMA_DEFAULTS, GemmaConfig, parse_gemma
from minipali.errors import InputError
from minipali.files import read_json


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """SigLIP's vision tower. `vision_use_head`: whether its file may hold the attention-pooling head."""
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int
    patch_size: int
    num_channels: int
    layer_norm_eps: float
    vision_use_head: bool

    @property
    def num_patches(self):
        return (self.image_size // self.patch_size) ** 2


@dataclasses.dataclass(frozen=True)
class SiglipTextConfig:
    """SigLIP's text tower; `projection_size` is the width that it shares with the vision tower's pooled output."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int
    layer_norm_eps: float
    projection_size: int
    pad_token_id: int


@dataclasses.dataclass(frozen=True)
class SiglipConfig:
    """The two towers of contrastive learning."""
    vision_config: VisionConfig
    text_config: SiglipTextConfig


@dataclasses.dataclass(frozen=True)
class PaliGemmaConfig:
    """The complete model: a vision tower, one linear map into the width of the language model, and the language model.

    A Gemma by itself is the same without the tower and the map: vision_config and image_token_index are None.
    """
    vision_config: VisionConfig | None
    text_config: GemmaConfig
    image_token_index: int | None
    bos_token_id: int
    eos_token_ids: tuple
    pad_token_id: int
    tie_word_embeddings: bool


def _vision(f):
    f.choice("model_type", "siglip_vision_model", ["siglip_vision_model"])
    f.choice("hidden_act", "gelu_pytorch_tanh", ["gelu_pytorch_tanh"])
    cfg = VisionConfig(
        hidden_size=f.integer("hidden_size", 768), intermediate_size=f.integer("intermediate_size", 3072),
        num_hidden_layers=f.integer("num_hidden_layers", 12, most=MOST_LAYERS),
        num_attention_heads=f.integer("num_attention_heads", 12),
        image_size=f.integer("image_size", 224), patch_size=f.integer("patch_size", 16),
        num_channels=f.integer("num_channels", 3), layer_norm_eps=f.real("layer_norm_eps", 1e-6),
        vision_use_head=f.flag("vision_use_head", True))
    if cfg.hidden_size % cfg.num_attention_heads:
        raise InputError(f"{f.where}: hidden_size {cfg.hidden_size} is not a multiple of num_attention_heads "
                       f"{cfg.num_attention_heads}")
    if cfg.num_channels != 3:
        raise InputError(f"{f.where}: num_channels is {cfg.num_channels}, expected 3")
    if cfg.image_size < cfg.patch_size:
        raise InputError(f"{f.where}: image_size {cfg.image_size} is smaller than one patch of {cfg.patch_size}")
    return cfg


def _siglip_text(f):
    f.choice("model_type", "siglip_text_model", ["siglip_text_model"])
    f.choice("hidden_act", "gelu_pytorch_tanh", ["gelu_pytorch_tanh"])
    width, vocab_size = f.integer("hidden_size", 768), f.integer("vocab_size", 32000)
    cfg = SiglipTextConfig(
        vocab_size=vocab_size, hidden_size=width,
        intermediate_size=f.integer("intermediate_size", 3072),
        num_hidden_layers=f.integer("num_hidden_layers", 12, most=MOST_LAYERS),
        num_attention_heads=f.integer("num_attention_heads", 12),
        max_position_embeddings=f.integer("max_position_embeddings", 64),
        layer_norm_eps=f.real("layer_norm_eps", 1e-6), projection_size=f.integer("projection_size", width),
        pad_token_id=_ids([f], "pad_token_id", 1, vocab_size)[0])
    if width % cfg.num_attention_heads:
        raise InputError(f"{f.where}: hidden_size {width} is not a multiple of num_attention_heads "
                       f"{cfg.num_attention_heads}")
    return cfg


def _ids(places, name, default, vocab_size):
    """Token ids, one or a list, from the first of the objects `places` that gives any."""
    declared = [f for f in places if f.get(name) is not None]
    lists = [f.get(name) if isinstance(f.get(name), list) else [f.get(name)] for f in declared]
    for f, ids in zip(declared, lists):
        if not ids or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            f.fail(name, "a token id or a list of them")
    if declared and max(lists[0]) >= vocab_size:
        declared[0].fail(name, f"ids of the vocabulary, 0 to {vocab_size - 1}")
    return tuple(lists[0]) if declared else (default,)


def _paligemma(f, generation):
    # The top-level hidden_size of PaliGemma 2 is stale (2048); the width is text_config's.
    text, vision = f.section("text_config"), _vision(f.section("vision_config"))
    gemma = parse_gemma(text, True, ["gemma", "gemma2"])
    spelling = "image_token_id" if f.get("image_token_id") is not None else "image_token_index"
    image = f.integer(spelling, 256000, least=0)
    return _with_ids([f, text], generation, gemma, vision, image)


def _text_model(f, generation):
    """A Gemma by itself, or that of a Gemma 3 with pictures, whose tower is another: pooled, and a norm behind it."""
    outer = f.get("model_type") == "gemma3"
    text = f.section("text_config") if outer else f
    gemma = parse_gemma(text, False, ["gemma3_text"] if outer else list(GEMMA_DEFAULTS))
    return _with_ids([f, text], generation, gemma, None, None)


def _with_ids(places, generation, gemma, vision, image):
    """The complete config. Where a token is named in two places, transformers uses the outer one; for the stop tokens,
    generation_config.json comes before both."""
    def ids(name, default, places=places):
        return _ids(places, name, default, gemma.vocab_size)

    return PaliGemmaConfig(
        vision_config=vision, text_config=gemma, image_token_index=image, bos_token_id=ids("bos_token_id", 2)[0],
        eos_token_ids=ids("eos_token_id", 1, [generation, *places]), pad_token_id=ids("pad_token_id", 0)[0],
        tie_word_embeddings=places[0].flag("tie_word_embeddings", True))


def _siglip(f, generation):
    vision, text = _vision(f.section("vision_config", {})), _siglip_text(f.section("text_config", {}))
    if not vision.vision_use_head:
        raise InputError(f"{f.where}: vision_use_head is false, and without the head a picture is no single vector")
    if text.projection_size != vision.hidden_size:
        raise InputError(f"{f.where}: a picture becomes {vision.hidden_size} numbers and a caption "
                       f"{text.projection_size}: they cannot be compared")
    return SiglipConfig(vision_config=vision, text_config=text)


def parse_config(values: Any, where: str | Path = "config.json",
                 generation: Any = None) -> PaliGemmaConfig | SiglipConfig:
    """The parsed JSON of a config file -> PaliGemmaConfig or SiglipConfig; InputError names the field that is wrong.

    `generation`: the Fields of the generation_config.json beside it, if there is one; its stop tokens come first.
    """
    f, generation = Fields(values, where), generation or Fields({}, "generation_config.json")
    for name in ("quantization_config", "quantization"):  # of the hub's tools, and of MLX
        if f.get(name) is not None:
            raise InputError(f"{where}: {name} is there, expected weights that are not quantized")
    parsers = {"paligemma": _paligemma, "siglip": _siglip} | dict.fromkeys([*GEMMA_DEFAULTS, "gemma3"], _text_model)
    return parsers[f.choice("model_type", None, list(parsers))](f, generation)


def read_config(folder: str | Path, shapes: dict[str, tuple] | None = None) -> PaliGemmaConfig | SiglipConfig:
    """config.json of a folder in the hub's layout, with the stop tokens of the generation_config.json beside it.

    `shapes`: names to shapes of the folder's tensors, if known; they settle the head size and the picture size
    where the file leaves these out. Raises InputError, in one line that names the file and the field.
    """
    path, generation = Path(folder) / "config.json", Path(folder) / "generation_config.json"
    values = read_json(path)
    cfg = parse_config(values, str(path), Fields(read_json(generation), generation) if generation.exists() else None)
    if not isinstance(cfg, PaliGemmaConfig):
        return cfg
    text, vision = cfg.text_config, cfg.vision_config
    # A picture's tokens are never looked up in the table: in the original files <image> is the id after its last row.
    f, behind = Fields(values, path), text.vocab_size
    for name in ("image_token_index", "image_token_id"):
        if vision and f.integer(name, 0, least=0) > behind:
            f.fail(name, f"an id of the vocabulary, 0 to {behind - 1}, or the one behind it")
    if not shapes:
        return cfg
    q_proj = shapes.get("language_model.model.layers.0.self_attn.q_proj.weight")
    head_dim = q_proj[0] // text.num_attention_heads if q_proj else 0
    if (values.get("text_config") or values).get("head_dim") is None and head_dim and head_dim % 2 == 0:
        scale = text.query_pre_attn_scalar if text.post_norms else float(head_dim)
        text = dataclasses.replace(text, head_dim=head_dim, query_pre_attn_scalar=scale)
    positions = shapes.get("vision_tower.vision_model.embeddings.position_embedding.weight")
    side = math.isqrt(positions[0]) if vision and positions else 0
    if vision and values["vision_config"].get("image_size") is None and side and side * side == positions[0]:
        vision = dataclasses.replace(vision, image_size=side * vision.patch_size)
    return dataclasses.replace(cfg, text_config=text, vision_config=vision)


def config_json(cfg: PaliGemmaConfig) -> dict:
    """The content of config.json for a PaliGemmaConfig, for a model that had no such file: an .npz has none.

    `projection_dim` is what the hub's code builds the projector from; the width of its default is another.
    """
    text, width = dataclasses.asdict(cfg.text_config), cfg.text_config.hidden_size
    windows, second = text.pop("sliding_windows"), text.pop("post_norms")
    text["rope_theta"] = text.pop("rope_thetas")[0]  # of Gemma 1 and 2 all layers have one, and nothing scales it
    for name in ("rope_factors", "qk_norms", "prefix_lm"):
        del text[name]
    if second:
        # transformers 5 fails on a scalar such as 256.0, and on a window of null even if no layer uses one.
        if float(text["query_pre_attn_scalar"]).is_integer():
            text["query_pre_attn_scalar"] = int(text["query_pre_attn_scalar"])
        text["sliding_window"] = next((window for window in windows if window is not None), 4096)
        text["layer_types"] = ["full_attention" if window is None else "sliding_attention" for window in windows]
    else:
        del text["query_pre_attn_scalar"], text["attn_logit_softcapping"]
    text |= {"model_type": "gemma2" if second else "gemma", "hidden_activation": "gelu_pytorch_tanh"}
    vision = {**dataclasses.asdict(cfg.vision_config), "model_type": "siglip_vision_model", "projection_dim": width}
    eos = list(cfg.eos_token_ids) if len(cfg.eos_token_ids) > 1 else cfg.eos_token_ids[0]
    return {"architectures": ["PaliGemmaForConditionalGeneration"], "model_type": "paligemma",
            "image_token_index": cfg.image_token_index, "bos_token_id": cfg.bos_token_id, "eos_token_id": eos,
            "pad_token_id": cfg.pad_token_id, "hidden_size": width, "projection_dim": width,
            "tie_word_embeddings": cfg.tie_word_embeddings, "text_config": text, "vision_config": vision}
