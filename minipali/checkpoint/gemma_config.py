"""What config.json says about the language model: Gemma 1, 2 or 3, in the spelling of any version of transformers."""
import dataclasses

from minipali.checkpoint.fields import MOST_LAYERS, Fields
from minipali.errors import InputError


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


GEMMA_DEFAULTS = {
    "gemma": {"vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28,
              "num_attention_heads": 16, "num_key_value_heads": 16},
    "gemma2": {"vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
               "num_attention_heads": 8, "num_key_value_heads": 4},
    "gemma3_text": {"vocab_size": 262208, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
                    "num_attention_heads": 8, "num_key_value_heads": 4},
}
LAYER_TYPES = ["sliding_attention", "full_attention"]


def _layer_types(f, kind, layers):
    """Which layers have the window. Gemma 2: every other one, the first included; Gemma 3: five, then one without."""
    period = f.integer("sliding_window_pattern", 6) if kind == "gemma3_text" else 2
    types = f.get("layer_types", [LAYER_TYPES[(i + 1) % period == 0] for i in range(layers)])
    if not isinstance(types, list) or len(types) != layers or any(name not in LAYER_TYPES for name in types):
        raise InputError(f"{f.where}: layer_types must name full_attention or sliding_attention for each of "
                         f"{layers} layers")
    return types


def _check_activation(f, kind):
    """The tanh form of GELU is the only one that the model computes; the exact one differs by up to 5e-4."""
    # Old Gemma 1 files say "gelu" and mean the tanh form: the files were wrong, the model was trained with tanh.
    # Gemma 2 and 3 read hidden_activation alone, and there "gelu" is the exact one.
    f.choice("hidden_act", "gelu_pytorch_tanh", ["gelu_pytorch_tanh", "gelu"])
    f.choice("hidden_activation", "gelu_pytorch_tanh", ["gelu_pytorch_tanh"] + ["gelu"] * (kind == "gemma"))


def _rope(f, kind, layer_type):
    """For one type of layer the base of its rotary positions, and by how much they are stretched ("linear" scaling).

    transformers 5 keeps both in the object rope_parameters, in Gemma 3 one object for each type of layer. Older files
    have rope_theta and rope_scaling, and in Gemma 3 rope_local_base_freq for the local layers, which are not scaled.
    Where a file has the old and the new, transformers lets rope_scaling replace rope_parameters as a whole in Gemma 1
    and 2, and field by field in Gemma 3.
    """
    newer, older = f.section("rope_parameters", {}), f.section("rope_scaling", {})
    name, default = "rope_theta", 1e4
    where = older if older.values else newer
    if kind == "gemma3_text":
        for other in newer.values:
            if other not in LAYER_TYPES:
                newer.fail(other, "full_attention and sliding_attention alone, with a rope_theta in each")
        values = newer.section(layer_type, {"rope_type": "default"}).values
        if older.get("type") is not None and older.get("rope_type") is None:
            older.fail("type", "rope_type beside it: transformers 5 passes over the older name in Gemma 3")
        if layer_type == "full_attention":
            default, values = 1e6, values | older.values
        else:
            name, where = "rope_local_base_freq", newer
    else:
        for other in LAYER_TYPES:
            if newer.get(other) is not None:
                newer.fail(other, "rope_theta and rope_type without an object for each type of layer")
        values = older.values or newer.values
    rope = Fields(values, where.where)
    spelling = "rope_type" if rope.get("rope_type") is not None else "type"
    linear = rope.choice(spelling, "default", ["default", "linear"]) == "linear"
    for fields in (rope, f):
        if fields.get("partial_rotary_factor", 1) != 1:
            fields.fail("partial_rotary_factor", "1: all of a head is rotated")
    return rope.real("rope_theta", f.real(name, default)), rope.real("factor", None) if linear else 1.0


def parse_gemma(f: Fields, prefix_lm: bool, kinds: list[str]) -> GemmaConfig:
    """The language model's fields -> GemmaConfig; `kinds`: the model types that may stand here, the default first."""
    kind = f.choice("model_type", kinds[0], kinds)
    first, second, third, default = *(kind == name for name in GEMMA_DEFAULTS), GEMMA_DEFAULTS[kind]
    _check_activation(f, kind)
    if f.flag("attention_bias", False):
        f.fail("attention_bias", "false: no published Gemma has such a bias")
    # transformers writes true into every PaliGemma. In a plain Gemma it makes an encoder, which continues no text.
    if f.flag("use_bidirectional_attention", False) and not prefix_lm:
        f.fail("use_bidirectional_attention", "a model that continues a text")
    layers = f.integer("num_hidden_layers", default["num_hidden_layers"], most=MOST_LAYERS)
    heads = f.integer("num_attention_heads", default["num_attention_heads"])
    kv_heads = f.integer("num_key_value_heads", default["num_key_value_heads"])
    head_dim = f.integer("head_dim", 256)
    if heads % kv_heads:
        raise InputError(f"{f.where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if head_dim % 2:
        raise InputError(f"{f.where}: head_dim is {head_dim}, expected an even number (rotary pairs)")
    windowed = not first and not ("sliding_window" in f.values and f.get("sliding_window") is None)
    windows = {"sliding_attention": f.integer("sliding_window", 4096) if windowed else None, "full_attention": None}
    layer_types = _layer_types(f, kind, layers)
    ropes = {layer_type: _rope(f, kind, layer_type) for layer_type in LAYER_TYPES}
    attention_cap, final_cap = (f.optional_real(f"{where}_logit_softcapping", value if second else None)
                                for where, value in [("attn", 50.0), ("final", 30.0)])
    if first:  # its code applies no softcap, but transformers' PaliGemma caps any Gemma's logits if the file says so
        attention_cap, final_cap = None, final_cap if prefix_lm else None
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
        attn_logit_softcapping=attention_cap, final_logit_softcapping=final_cap,
        sliding_windows=tuple(windows[layer_type] for layer_type in layer_types),
        post_norms=not first, qk_norms=third, prefix_lm=prefix_lm)
