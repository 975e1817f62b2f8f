"""What a checkpoint says about itself: the sizes in config.json, and from them the name and shape of every tensor.

The published files leave out whatever equals a default of the class that wrote them, and a few of their fields are
stale. The defaults below are therefore those of the writing classes, and where a tensor's shape knows better than the
file (head size, picture size), the shape wins.
"""
import dataclasses
import math
import reprlib
from pathlib import Path

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
class GemmaConfig:
    """The language model. What Gemma 2 and 3 added is None or False before, so that each difference is one field."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_thetas: tuple                      # for each layer the base of its rotary positions; Gemma 3 has two bases
    rope_factors: tuple                     # and by how much its positions are stretched: 1, or 8 in the larger Gemma 3
    max_position_embeddings: int
    query_pre_attn_scalar: float            # queries are scaled by this to the -1/2; Gemma 1: head_dim
    attn_logit_softcapping: float | None    # Gemma 2: 50
    final_logit_softcapping: float | None   # Gemma 2: 30
    sliding_windows: tuple                  # for each layer the window's length, or None
    post_norms: bool                        # Gemma 2 and 3 also normalize what comes out of each block
    qk_norms: bool                          # Gemma 3 normalizes each head's queries and keys
    prefix_lm: bool                         # the prompt sees all of itself, as PaliGemma's; False: causal throughout


@dataclasses.dataclass(frozen=True)
class PaliGemmaConfig:
    """The whole: a vision tower, one linear map into the width of the language model, and the language model.

    A Gemma by itself is the same without the tower and the map: vision_config and image_token_index are None.
    """
    vision_config: VisionConfig | None
    text_config: GemmaConfig
    image_token_index: int | None
    bos_token_id: int
    eos_token_ids: tuple
    pad_token_id: int
    tie_word_embeddings: bool


class _Fields:
    """One object of config.json, read field by field with its type checked."""

    def __init__(self, values, where):
        if not isinstance(values, dict):
            raise InputError(f"{where}: expected an object of fields, found {type(values).__name__}")
        self.values, self.where = values, where

    def get(self, name, default=None):
        """null means the same as leaving the field out."""
        value = self.values.get(name)
        return default if value is None else value

    def fail(self, name, expected):
        raise InputError(f"{self.where}: {name} is {reprlib.repr(self.get(name))}, expected {expected}")

    def integer(self, name, default, least=1, most=2**31 - 1):
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            self.fail(name, f"a whole number from {least} to {most}")
        return value

    def real(self, name, default):
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
            self.fail(name, "a positive number")
        return float(value)

    def optional_real(self, name, default):
        """A number that null switches off, where leaving it out means the default."""
        return None if self.values.get(name, default) is None else self.real(name, default)

    def flag(self, name, default):
        value = self.get(name, default)
        if not isinstance(value, bool):
            self.fail(name, "true or false")
        return value

    def choice(self, name, default, allowed):
        value = self.get(name, default)
        if value not in allowed:
            self.fail(name, " or ".join(allowed))
        return value

    def section(self, name, default=None):
        if self.get(name, default) is None:
            raise InputError(f"{self.where}: the section {name} is missing")
        return _Fields(self.get(name, default), f"{self.where}: {name}")


# A loop over the layers of a config that asks for a billion would never end. The largest published tower has 46.
MOST_LAYERS = 1000


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
        raise InputError(f"{f.where}: hidden_size {cfg.hidden_size} is no multiple of num_attention_heads "
                       f"{cfg.num_attention_heads}")
    if cfg.num_channels != 3:
        raise InputError(f"{f.where}: num_channels is {cfg.num_channels}, expected 3")
    if cfg.image_size < cfg.patch_size:
        raise InputError(f"{f.where}: image_size {cfg.image_size} is smaller than one patch of {cfg.patch_size}")
    return cfg


def _siglip_text(f):
    f.choice("model_type", "siglip_text_model", ["siglip_text_model"])
    f.choice("hidden_act", "gelu_pytorch_tanh", ["gelu_pytorch_tanh"])
    width = f.integer("hidden_size", 768)
    cfg = SiglipTextConfig(
        vocab_size=f.integer("vocab_size", 32000), hidden_size=width,
        intermediate_size=f.integer("intermediate_size", 3072),
        num_hidden_layers=f.integer("num_hidden_layers", 12, most=MOST_LAYERS),
        num_attention_heads=f.integer("num_attention_heads", 12),
        max_position_embeddings=f.integer("max_position_embeddings", 64),
        layer_norm_eps=f.real("layer_norm_eps", 1e-6), projection_size=f.integer("projection_size", width),
        pad_token_id=f.integer("pad_token_id", 1, least=0))
    if width % cfg.num_attention_heads:
        raise InputError(f"{f.where}: hidden_size {width} is no multiple of num_attention_heads "
                       f"{cfg.num_attention_heads}")
    return cfg


_GEMMA_DEFAULTS = {
    "gemma": {"vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28,
              "num_attention_heads": 16, "num_key_value_heads": 16},
    "gemma2": {"vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
               "num_attention_heads": 8, "num_key_value_heads": 4},
    "gemma3_text": {"vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
                    "num_attention_heads": 8, "num_key_value_heads": 4},
}
_LAYER_TYPES = ["sliding_attention", "full_attention"]


def _layer_types(f, kind, layers):
    """Which layers have the window. Gemma 2: every other one, the first included; Gemma 3: five, then one without."""
    period = f.integer("sliding_window_pattern", 6) if kind == "gemma3_text" else 2
    kinds = f.get("layer_types", [_LAYER_TYPES[(i + 1) % period == 0] for i in range(layers)])
    if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in _LAYER_TYPES for kind in kinds):
        raise InputError(f"{f.where}: layer_types must name full_attention or sliding_attention for each of "
                       f"{layers} layers")
    return kinds


def _rope(f, kind, layer_type):
    """For one type of layer the base of its rotary positions, and by how much they are stretched ("linear" scaling).

    transformers 5 moved both into the object rope_parameters, which in Gemma 3 holds an object for each type of layer.
    Older files of Gemma 3 call the local layers' base rope_local_base_freq; rope_scaling is not for those layers.
    """
    newer, name, theta, scaling = f.section("rope_parameters", {}), "rope_theta", 1e4, f.section("rope_scaling", {})
    if kind == "gemma3_text":
        if newer.get("rope_theta") is not None:
            newer.fail("rope_theta", "full_attention and sliding_attention, with a rope_theta in each")
        newer, theta = newer.section(layer_type, {}), 1e6
        if layer_type == "sliding_attention":
            name, theta, scaling = "rope_local_base_freq", 1e4, newer
    scaling = newer if newer.values else scaling
    spelling = "rope_type" if scaling.get("rope_type") is not None else "type"
    linear = scaling.choice(spelling, "default", ["default", "linear"]) == "linear"
    return newer.real("rope_theta", f.real(name, theta)), scaling.real("factor", None) if linear else 1.0


def _gemma(f, prefix_lm, kinds):
    kind = f.choice("model_type", kinds[0], kinds)
    first, second, third, default = *(kind == name for name in _GEMMA_DEFAULTS), _GEMMA_DEFAULTS[kind]
    # Old Gemma 1 files say "gelu" and mean the tanh form: the files were wrong, the model was trained with tanh.
    for name in ["hidden_act", "hidden_activation"]:
        f.choice(name, "gelu", ["gelu_pytorch_tanh", "gelu"])
    if f.flag("attention_bias", False):
        raise InputError(f"{f.where}: attention_bias is true, and no published Gemma has such a bias")
    # transformers writes true into every PaliGemma. In a plain Gemma it makes an encoder, which continues no text.
    if f.flag("use_bidirectional_attention", False) and not prefix_lm:
        raise InputError(f"{f.where}: use_bidirectional_attention is true, expected a model that continues a text")
    layers = f.integer("num_hidden_layers", default["num_hidden_layers"], most=MOST_LAYERS)
    heads = f.integer("num_attention_heads", default["num_attention_heads"])
    kv_heads = f.integer("num_key_value_heads", default["num_key_value_heads"])
    head_dim = f.integer("head_dim", 256)
    if heads % kv_heads:
        raise InputError(f"{f.where}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")
    if head_dim % 2:
        raise InputError(f"{f.where}: head_dim is {head_dim}, expected an even number (rotary pairs)")
    windowed = not first and not ("sliding_window" in f.values and f.get("sliding_window") is None)
    windows = {"sliding_attention": f.integer("sliding_window", 4096) if windowed else None, "full_attention": None}
    layer_types = _layer_types(f, kind, layers)
    ropes = {layer_type: _rope(f, kind, layer_type) for layer_type in _LAYER_TYPES}
    return GemmaConfig(
        vocab_size=f.integer("vocab_size", default["vocab_size"]),
        hidden_size=f.integer("hidden_size", default["hidden_size"]),
        intermediate_size=f.integer("intermediate_size", default["intermediate_size"]),
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=head_dim, rms_norm_eps=f.real("rms_norm_eps", 1e-6),
        rope_thetas=tuple(ropes[layer_type][0] for layer_type in layer_types),
        rope_factors=tuple(ropes[layer_type][1] for layer_type in layer_types),
        max_position_embeddings=f.integer("max_position_embeddings", 131072 if third else 8192),
        query_pre_attn_scalar=float(head_dim) if first else f.real("query_pre_attn_scalar", 256),
        attn_logit_softcapping=None if first else f.optional_real("attn_logit_softcapping", 50.0 if second else None),
        final_logit_softcapping=None if first else f.optional_real("final_logit_softcapping", 30.0 if second else None),
        sliding_windows=tuple(windows[layer_type] for layer_type in layer_types),
        post_norms=not first, qk_norms=third, prefix_lm=prefix_lm)


def _ids(f, text, name, default):
    """Token ids of a field that holds one or a list, and stands beside text_config or in it.

    PaliGemma 2 says eos 1 outside and [1, 107] inside: a list knows more.
    """
    inner = text.get(name)
    where = text if isinstance(inner, list) or f.get(name) is None else f
    value = where.get(name, default)
    ids = value if isinstance(value, list) else [value]
    if not ids or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
        where.fail(name, "a token id or a list of them")
    return tuple(ids)


def _paligemma(f):
    # The top-level hidden_size of PaliGemma 2 is stale (2048); the width is text_config's.
    text, vision = f.section("text_config"), _vision(f.section("vision_config"))
    image = f.integer("image_token_id" if f.get("image_token_id") is not None else "image_token_index", 257152, least=0)
    return _with_ids(f, text, _gemma(text, True, ["gemma", "gemma2"]), vision, image)


def _text_model(f):
    """A Gemma by itself, or that of a Gemma 3 with pictures, whose tower is another: pooled, and a norm behind it."""
    outer = f.get("model_type") == "gemma3"
    text = f.section("text_config") if outer else f
    return _with_ids(f, text, _gemma(text, False, ["gemma3_text"] if outer else list(_GEMMA_DEFAULTS)), None, None)


def _with_ids(f, text, gemma, vision, image):
    return PaliGemmaConfig(
        vision_config=vision, text_config=gemma, image_token_index=image,
        bos_token_id=_ids(f, text, "bos_token_id", 2)[0], eos_token_ids=_ids(f, text, "eos_token_id", 1),
        pad_token_id=_ids(f, text, "pad_token_id", 0)[0],
        tie_word_embeddings=f.flag("tie_word_embeddings", True))


def _siglip(f):
    vision, text = _vision(f.section("vision_config", {})), _siglip_text(f.section("text_config", {}))
    if not vision.vision_use_head:
        raise InputError(f"{f.where}: vision_use_head is false, and without the head a picture is no single vector")
    if text.projection_size != vision.hidden_size:
        raise InputError(f"{f.where}: a picture becomes {vision.hidden_size} numbers and a caption "
                       f"{text.projection_size}: they cannot be compared")
    return SiglipConfig(vision_config=vision, text_config=text)


def parse_config(values, where="config.json"):
    """The parsed JSON of a config file -> PaliGemmaConfig or SiglipConfig; InputError names the field that is wrong."""
    f = _Fields(values, where)
    parsers = {"paligemma": _paligemma, "siglip": _siglip} | dict.fromkeys([*_GEMMA_DEFAULTS, "gemma3"], _text_model)
    return parsers[f.choice("model_type", None, list(parsers))](f)


def read_config(folder, shapes=None):
    """config.json of a folder in the hub's layout.

    `shapes`: names to shapes of the folder's tensors, if known; they settle the head size and the picture size
    where the file leaves these out.
    """
    path = Path(folder) / "config.json"
    values = read_json(path)
    cfg = parse_config(values, str(path))
    if not shapes or not isinstance(cfg, PaliGemmaConfig):
        return cfg
    text, vision = cfg.text_config, cfg.vision_config
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
