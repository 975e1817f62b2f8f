"""Checkpoints as the original code wrote them: big_vision's .npz files of PaliGemma 1, PaliGemma 2 and SigLIP.

An .npz is a zip of arrays. It has no config beside it: the sizes are read off the arrays. Three things differ from the
hub's layout. A linear map is stored (in, out) and used as x @ kernel. Heads have an axis of their own: a query kernel
is (D,N,H), where the hub has (N·H,D). And the layers of a stack lie in one array along a first axis L, since the
training code scans over them; older files have one array per layer. The parameters that come out are the hub's.
"""
import math
import re
from collections import Counter, defaultdict
from typing import NamedTuple

import numpy as np

from minipali.checkpoint.config import parse_config
from minipali.checkpoint.npz_file import read_arrays, read_members
from minipali.checkpoint.tensors import check_tensors, family, param_shapes, unflatten
from minipali.errors import InputError

# --- what lies where --------------------------------------------------------------------------------------------------

# A row is: parameter, array, the array's axes, the order in which the parameter has them, and, where the parameter is
# only a part of the array, its index in the first axes. Letters as everywhere (S: positions of a caption), and y, x, C
# for a patch's rows, columns and channels, E for the width that a head leads to. Arrays that share a parameter lie in
# it one after the other.
PATCHES = [
    ("patch_embedding.weight", "embedding/kernel", "yxCD", "DCyx"),
    ("patch_embedding.bias", "embedding/bias", "D", "D"),
    ("position_embedding.weight", "pos_embedding", "1PD", "PD", 0),
]
MLP = [
    ("mlp.fc1.weight", "MlpBlock_0/Dense_0/kernel", "DF", "FD"),
    ("mlp.fc1.bias", "MlpBlock_0/Dense_0/bias", "F", "F"),
    ("mlp.fc2.weight", "MlpBlock_0/Dense_1/kernel", "FD", "DF"),
    ("mlp.fc2.bias", "MlpBlock_0/Dense_1/bias", "D", "D"),
]
ATTENTION = "MultiHeadDotProductAttention_0"
ENCODER_LAYER = [
    ("layer_norm1.weight", "LayerNorm_0/scale", "D", "D"),
    ("layer_norm1.bias", "LayerNorm_0/bias", "D", "D"),
    ("self_attn.q_proj.weight", f"{ATTENTION}/query/kernel", "DNH", "NHD"),
    ("self_attn.q_proj.bias", f"{ATTENTION}/query/bias", "NH", "NH"),
    ("self_attn.k_proj.weight", f"{ATTENTION}/key/kernel", "DNH", "NHD"),
    ("self_attn.k_proj.bias", f"{ATTENTION}/key/bias", "NH", "NH"),
    ("self_attn.v_proj.weight", f"{ATTENTION}/value/kernel", "DNH", "NHD"),
    ("self_attn.v_proj.bias", f"{ATTENTION}/value/bias", "NH", "NH"),
    ("self_attn.out_proj.weight", f"{ATTENTION}/out/kernel", "NHD", "DNH"),
    ("self_attn.out_proj.bias", f"{ATTENTION}/out/bias", "D", "D"),
    ("layer_norm2.weight", "LayerNorm_1/scale", "D", "D"),
    ("layer_norm2.bias", "LayerNorm_1/bias", "D", "D"),
    *MLP,
]
ENCODER_NORM = [("weight", "encoder_norm/scale", "D", "D"), ("bias", "encoder_norm/bias", "D", "D")]
HEAD = [("weight", "head/kernel", "DE", "ED"), ("bias", "head/bias", "E", "E")]
POOLING_HEAD = [
    ("probe", "probe", "11D", "D", 0, 0),
    *[("attention.in_proj_weight", f"{ATTENTION}/{one}/kernel", "DNH", "NHD") for one in ["query", "key", "value"]],
    *[("attention.in_proj_bias", f"{ATTENTION}/{one}/bias", "NH", "NH") for one in ["query", "key", "value"]],
    ("attention.out_proj.weight", f"{ATTENTION}/out/kernel", "NHD", "DNH"),
    ("attention.out_proj.bias", f"{ATTENTION}/out/bias", "D", "D"),
    ("layernorm.weight", "LayerNorm_0/scale", "D", "D"),
    ("layernorm.bias", "LayerNorm_0/bias", "D", "D"),
    *MLP,
]
CAPTIONS = [("token_embedding.weight", "Embed_0/embedding", "VD", "VD"),
            ("position_embedding.weight", "pos_embedding", "1SD", "SD", 0)]
SCALARS = [("logit_scale", "t", "1", "1"), ("logit_bias", "b", "1", "1")]  # t is the logarithm in both layouts

GEMMA_LAYER = [
    ("input_layernorm.weight", "pre_attention_norm/scale", "D", "D"),
    ("self_attn.o_proj.weight", "attn/attn_vec_einsum/w", "NHD", "DNH"),
    ("mlp.gate_proj.weight", "mlp/gating_einsum", "2DF", "FD", 0),  # 0 goes through GELU, 1 does not
    ("mlp.up_proj.weight", "mlp/gating_einsum", "2DF", "FD", 1),
    ("mlp.down_proj.weight", "mlp/linear", "FD", "DF"),
]
GROUPED_QUERY = [
    ("self_attn.q_proj.weight", "attn/q_einsum/w", "NDH", "NHD"),
    ("self_attn.k_proj.weight", "attn/kv_einsum/w", "2KDH", "KHD", 0),
    ("self_attn.v_proj.weight", "attn/kv_einsum/w", "2KDH", "KHD", 1),
]
MULTI_HEAD = [  # how the training code stores K = N; no published PaliGemma has it
    ("self_attn.q_proj.weight", "attn/qkv_einsum/w", "3NDH", "NHD", 0),
    ("self_attn.k_proj.weight", "attn/qkv_einsum/w", "3NDH", "NHD", 1),
    ("self_attn.v_proj.weight", "attn/qkv_einsum/w", "3NDH", "NHD", 2),
]
# The original names say what each norm does; the hub's `post_attention_layernorm` means the first one here in Gemma 1
# and the second one in Gemma 2.
GEMMA1_NORMS = [("post_attention_layernorm.weight", "pre_ffw_norm/scale", "D", "D")]
GEMMA2_NORMS = [
    ("pre_feedforward_layernorm.weight", "pre_ffw_norm/scale", "D", "D"),
    ("post_attention_layernorm.weight", "post_attention_norm/scale", "D", "D"),
    ("post_feedforward_layernorm.weight", "post_ffw_norm/scale", "D", "D"),
]
TABLE = [("embed_tokens.weight", "embedder/input_embedding", "VD", "VD")]
LAST_NORM = [("norm.weight", "final_norm/scale", "D", "D")]

DIGITS = {"1": 1, "2": 2, "3": 3}
IMAGE_TOKEN = 257152             # the hub's <image>, the row after the 257152 of the original table
MULTILINGUAL_VOCABULARY = 250_000


class Place(NamedTuple):
    """Where a parameter, or a part of it, lies: `array` has `shape`; after `index` its axes come in `order`."""
    array: str
    shape: tuple
    index: tuple
    order: tuple


def _places(rows, parameters, arrays, sizes, layer=()):
    """The rows of a table as (parameter, Place), below the names `parameters` and `arrays`."""
    for parameter, array, axes, order, *index in rows:
        shape = tuple(sizes[letter] for letter in "L" * len(layer) + axes)
        order = tuple(map(axes[len(index):].index, order))
        yield parameters + parameter, Place(arrays + array, shape, (*layer, *index), order)


def _is_scanned(arrays, shapes):
    return any(name.startswith(f"{arrays}/encoderblock/") for name in shapes)


def _encoder_places(parameters, arrays, sizes, shapes):
    """A stack of encoder layers, in one array per kind of weight or in one per layer."""
    scanned = _is_scanned(arrays, shapes)
    for i in range(sizes["L"]):
        block, layer = ("encoderblock", (i,)) if scanned else (f"encoderblock_{i}", ())
        yield from _places(ENCODER_LAYER, f"{parameters}.{i}.", f"{arrays}/{block}/", sizes, layer)


def _vision_places(root, sizes, shapes):
    yield from _places(PATCHES, f"{root}.embeddings.", "img/", sizes)
    yield from _encoder_places(f"{root}.encoder.layers", "img/Transformer", sizes, shapes)
    yield from _places(ENCODER_NORM, f"{root}.post_layernorm.", "img/Transformer/", sizes)


def _paligemma_places(cfg, shapes):
    vision, text = _vision_sizes(cfg.vision_config), cfg.text_config
    sizes = DIGITS | {"V": text.vocab_size, "D": text.hidden_size, "F": text.intermediate_size, "H": text.head_dim,
                      "L": text.num_hidden_layers, "N": text.num_attention_heads, "K": text.num_key_value_heads}
    attention = MULTI_HEAD if "llm/layers/attn/qkv_einsum/w" in shapes else GROUPED_QUERY
    norms = GEMMA2_NORMS if text.post_norms else GEMMA1_NORMS
    yield from _vision_places("vision_tower.vision_model", vision, shapes)
    yield from _places(HEAD, "multi_modal_projector.linear.", "img/", vision | {"E": text.hidden_size})
    root = "language_model.model."
    yield from _places(TABLE + LAST_NORM, root, "llm/", sizes)
    for i in range(text.num_hidden_layers):
        yield from _places(GEMMA_LAYER + attention + norms, f"{root}layers.{i}.", "llm/layers/", sizes, (i,))


def _siglip_places(cfg, shapes):
    vision, text = _vision_sizes(cfg.vision_config), cfg.text_config
    sizes = _encoder_sizes(text) | {"V": text.vocab_size, "S": text.max_position_embeddings, "E": text.projection_size}
    yield from _vision_places("vision_model", vision, shapes)
    yield from _places(POOLING_HEAD, "vision_model.head.", "img/MAPHead_0/", vision)
    yield from _places(CAPTIONS, "text_model.embeddings.", "txt/", sizes)
    yield from _encoder_places("text_model.encoder.layers", "txt/Encoder_0", sizes, shapes)
    yield from _places(ENCODER_NORM, "text_model.final_layer_norm.", "txt/Encoder_0/", sizes)
    if not _is_headless(shapes):
        yield from _places(HEAD, "text_model.head.", "txt/", sizes)
    yield from _places(SCALARS, "", "", DIGITS)


def _encoder_sizes(cfg):
    return DIGITS | {"D": cfg.hidden_size, "F": cfg.intermediate_size, "L": cfg.num_hidden_layers,
                     "N": cfg.num_attention_heads, "H": cfg.hidden_size // cfg.num_attention_heads}


def _vision_sizes(cfg):
    return _encoder_sizes(cfg) | {"y": cfg.patch_size, "x": cfg.patch_size, "C": cfg.num_channels,
                                 "P": cfg.num_patches}


def _is_headless(shapes):
    """The multilingual SigLIPs end in their last norm; the hub's copies of them have an identity for a head."""
    return (shapes.get("txt/Embed_0/embedding", ())[:1] == (MULTILINGUAL_VOCABULARY,)
            and not any(name.startswith("txt/head/") for name in shapes))


# --- the sizes, from the shapes ---------------------------------------------------------------------------------------

def _measure(shapes, arrays):
    """{array: its axes} -> {letter: size}; whether all other arrays agree is checked later."""
    sizes = {}
    for name, axes in arrays.items():
        if name not in shapes:
            raise InputError(f"there is no array {name}")
        if len(shapes[name]) != len(axes):
            raise InputError(f"{name} has the shape {list(shapes[name])}, expected {len(axes)} axes")
        sizes.update(zip(axes, shapes[name]))
    return sizes


def _measure_encoder(shapes, arrays):
    """The fields of a config that the layers of an encoder tell."""
    block, L = ("encoderblock", "L") if _is_scanned(arrays, shapes) else ("encoderblock_0", "")
    sizes = _measure(shapes, {f"{arrays}/{block}/{ATTENTION}/query/kernel": L + "DNH",
                              f"{arrays}/{block}/MlpBlock_0/Dense_0/kernel": L + "DF"})
    blocks = {match.group() for name in shapes if (match := re.match(rf"{arrays}/encoderblock_\d+/", name))}
    return {"hidden_size": sizes["D"], "intermediate_size": sizes["F"], "num_attention_heads": sizes["N"],
            "num_hidden_layers": sizes.get("L", len(blocks))}


def _measure_vision(shapes, use_head):
    sizes = _measure(shapes, {"img/embedding/kernel": "yxCD", "img/pos_embedding": "1PD"})
    patch_size = sizes["y"]
    image_size = math.isqrt(sizes["P"]) * patch_size
    # So400m/14 at 384 pixels is the one published tower whose patches leave a rim of the picture unseen.
    image_size = 384 if (patch_size, image_size) == (14, 378) else image_size
    return _measure_encoder(shapes, "img/Transformer") | {
        "image_size": image_size, "patch_size": patch_size, "num_channels": sizes["C"], "vision_use_head": use_head}


def _measure_paligemma(shapes):
    """The config.json that the hub has for these shapes: what it leaves out is what every published file agrees on."""
    queries = ({"llm/layers/attn/qkv_einsum/w": "L3NDH"} if "llm/layers/attn/qkv_einsum/w" in shapes else
               {"llm/layers/attn/q_einsum/w": "LNDH", "llm/layers/attn/kv_einsum/w": "L2KDH"})
    sizes = _measure(shapes, {"llm/embedder/input_embedding": "VD", "llm/layers/mlp/linear": "LFD", **queries})
    D, N, H, V = (sizes[letter] for letter in "DNHV")
    second = "llm/layers/post_attention_norm/scale" in shapes
    text = {"model_type": "gemma2" if second else "gemma", "vocab_size": V, "hidden_size": D,
            "intermediate_size": sizes["F"], "num_hidden_layers": sizes["L"], "num_attention_heads": N,
            "num_key_value_heads": sizes.get("K", N), "head_dim": H,
            # Gemma 2 27B alone scales its queries by (D/N)^-1/2. No shape tells, so it is known by its sizes.
            "query_pre_attn_scalar": D // N if (D, N, H) == (4608, 32, 128) else H,
            # big_vision's own Gemma 2 has no sliding window; the hub's copies have one of 4096 on every other layer. A
            # file is computed as the code that wrote it does. At 896 pixels, where a prompt is longer, answers differ.
            "sliding_window": None}
    # Picture tokens never look up the table, which ends before the hub's <image>: any id beyond it does as their name.
    return {"model_type": "paligemma", "image_token_index": min(V, IMAGE_TOKEN), "text_config": text,
            "vision_config": _measure_vision(shapes, False)}


def _measure_siglip(shapes):
    sizes = _measure(shapes, {"txt/Embed_0/embedding": "VD", "txt/pos_embedding": "1SD"})
    sizes["E"] = sizes["D"] if _is_headless(shapes) else _measure(shapes, {"txt/head/kernel": "DE"})["E"]
    text = {"vocab_size": sizes["V"], "max_position_embeddings": sizes["S"], "projection_size": sizes["E"]}
    return {"model_type": "siglip", "text_config": text | _measure_encoder(shapes, "txt/Encoder_0"),
            "vision_config": _measure_vision(shapes, True)}


def find_model(members):
    """{array: Member} -> cfg, and as (parameter, Place) pairs where each parameter lies.

    Raises InputError unless these are exactly the arrays of such a model, in its shapes.
    """
    shapes = {name: member.shape for name, member in members.items()}
    if any(name.startswith("llm/") for name in shapes):
        kind, measure, places_of = "PaliGemma", _measure_paligemma, _paligemma_places
    elif any(name.startswith("txt/") for name in shapes):
        kind, measure, places_of = "SigLIP", _measure_siglip, _siglip_places
    else:
        some = ", ".join(name[:60] for name in list(shapes)[:3]) or "nothing"
        raise InputError(f"expected the arrays of a PaliGemma (llm/…) or a SigLIP (txt/…), found {some}")
    try:
        cfg = parse_config(measure(shapes), "sizes")
    except InputError as problem:
        raise InputError(f"not usable as a {kind}: {problem}") from None
    places = list(places_of(cfg, shapes))
    expected = {place.array: place.shape for _, place in places}
    check_tensors(members, expected, f"of the {len(expected)} arrays that a {family(cfg)} of its sizes has")
    return cfg, places


def _open(path):
    """-> {array: Member}, cfg, the (parameter, Place) pairs; nothing but headers is read."""
    members = read_members(path)
    try:
        return (members, *find_model(members))
    except InputError as problem:
        raise InputError(f"{path}: {problem}") from None


def open_npz(path):
    """The headers of an .npz file, checked: PaliGemmaConfig or SiglipConfig, and {array: Member}.

    Raises InputError, in one line, unless the file has exactly the arrays and shapes of such a model.
    """
    members, cfg, _ = _open(path)
    return cfg, members


def load_npz(path, dtype=np.float32):
    """A big_vision .npz file -> (cfg, params), as `hub.load` gives them for the same model in the hub's layout.

    The vocabulary has the file's own rows: 257152 in the published files, where the hub's copies add unused ones.
    Raises InputError, in one line that names the file: a checkpoint is loaded exactly or not at all.
    """
    members, cfg, places = _open(path)
    params = {name: np.empty(shape, dtype) for name, shape in param_shapes(cfg).items()}
    targets, parts = defaultdict(dict), Counter()
    for name, place in places:
        axes = place.shape[len(place.index):]
        part = params[name].reshape(-1, *(axes[i] for i in place.order))[parts[name]]
        targets[place.array][place.index] = part.transpose(np.argsort(place.order))
        parts[name] += 1
    if "text_model.head.weight" in params and "text_model.head.weight" not in parts:
        params["text_model.head.weight"][...] = np.eye(cfg.text_config.hidden_size)
        params["text_model.head.bias"][...] = 0
    read_arrays(path, members, targets)
    return cfg, unflatten(params)
