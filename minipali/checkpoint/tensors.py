"""The name and the shape of every tensor, in the file's spelling and in the model's."""
import math
import re

from minipali.checkpoint.config import PaliGemmaConfig, SiglipConfig
from minipali.checkpoint.safetensors_file import FLOATS
from minipali.errors import InputError, short_name


def _linear(name, out_size, in_size, bias=True):
    yield f"{name}.weight", (out_size, in_size)
    if bias:
        yield f"{name}.bias", (out_size,)


def _norm(name, size):
    yield f"{name}.weight", (size,)
    yield f"{name}.bias", (size,)


def _encoder_shapes(root, cfg):
    D, F = cfg.hidden_size, cfg.intermediate_size
    for i in range(cfg.num_hidden_layers):
        layer = f"{root}.encoder.layers.{i}"
        yield from _norm(f"{layer}.layer_norm1", D)
        for proj in ["q_proj", "k_proj", "v_proj", "out_proj"]:
            yield from _linear(f"{layer}.self_attn.{proj}", D, D)
        yield from _norm(f"{layer}.layer_norm2", D)
        yield from _linear(f"{layer}.mlp.fc1", F, D)
        yield from _linear(f"{layer}.mlp.fc2", D, F)


def _vision_shapes(root, cfg):
    D, patch = cfg.hidden_size, cfg.patch_size
    yield f"{root}.embeddings.patch_embedding.weight", (D, cfg.num_channels, patch, patch)
    yield f"{root}.embeddings.patch_embedding.bias", (D,)
    yield f"{root}.embeddings.position_embedding.weight", (cfg.num_patches, D)
    yield from _encoder_shapes(root, cfg)
    yield from _norm(f"{root}.post_layernorm", D)


def _pooling_head_shapes(root, cfg):
    D, F = cfg.hidden_size, cfg.intermediate_size
    yield f"{root}.probe", (1, 1, D)
    yield f"{root}.attention.in_proj_weight", (3 * D, D)
    yield f"{root}.attention.in_proj_bias", (3 * D,)
    yield from _linear(f"{root}.attention.out_proj", D, D)
    yield from _norm(f"{root}.layernorm", D)
    yield from _linear(f"{root}.mlp.fc1", F, D)
    yield from _linear(f"{root}.mlp.fc2", D, F)


def _siglip_text_shapes(root, cfg):
    D = cfg.hidden_size
    yield f"{root}.embeddings.token_embedding.weight", (cfg.vocab_size, D)
    yield f"{root}.embeddings.position_embedding.weight", (cfg.max_position_embeddings, D)
    yield from _encoder_shapes(root, cfg)
    yield from _norm(f"{root}.final_layer_norm", D)
    yield from _linear(f"{root}.head", cfg.projection_size, D)


def _gemma_shapes(root, cfg):
    D, F, H = cfg.hidden_size, cfg.intermediate_size, cfg.head_dim
    N, K = cfg.num_attention_heads, cfg.num_key_value_heads
    yield f"{root}.embed_tokens.weight", (cfg.vocab_size, D)
    for i in range(cfg.num_hidden_layers):
        layer = f"{root}.layers.{i}"
        yield f"{layer}.input_layernorm.weight", (D,)
        yield from _linear(f"{layer}.self_attn.q_proj", N * H, D, bias=False)
        yield from _linear(f"{layer}.self_attn.k_proj", K * H, D, bias=False)
        yield from _linear(f"{layer}.self_attn.v_proj", K * H, D, bias=False)
        if cfg.qk_norms:
            yield f"{layer}.self_attn.q_norm.weight", (H,)
            yield f"{layer}.self_attn.k_norm.weight", (H,)
        yield from _linear(f"{layer}.self_attn.o_proj", D, N * H, bias=False)
        yield f"{layer}.post_attention_layernorm.weight", (D,)
        if cfg.post_norms:
            yield f"{layer}.pre_feedforward_layernorm.weight", (D,)
            yield f"{layer}.post_feedforward_layernorm.weight", (D,)
        yield from _linear(f"{layer}.mlp.gate_proj", F, D, bias=False)
        yield from _linear(f"{layer}.mlp.up_proj", F, D, bias=False)
        yield from _linear(f"{layer}.mlp.down_proj", D, F, bias=False)
    yield f"{root}.norm.weight", (D,)


def param_shapes(cfg: PaliGemmaConfig | SiglipConfig) -> dict[str, tuple]:
    """The one statement of what a checkpoint contains: {dotted name: shape}, in the order of the forward pass.

    Strict loading, random initialization and the parameter count all come from here. The output head of Gemma is its
    embedding table, so `lm_head` is listed only for a config that unties the two; PaliGemma reads every patch, so the
    head that pools them into one vector is SigLIP's alone.
    """
    if isinstance(cfg, SiglipConfig):
        return dict([*_vision_shapes("vision_model", cfg.vision_config),
                     *_pooling_head_shapes("vision_model.head", cfg.vision_config),
                     *_siglip_text_shapes("text_model", cfg.text_config), ("logit_scale", (1,)), ("logit_bias", (1,))])
    text, shapes = cfg.text_config, {}
    if cfg.vision_config:
        shapes.update(_vision_shapes("vision_tower.vision_model", cfg.vision_config))
        shapes.update(_linear("multi_modal_projector.linear", text.hidden_size, cfg.vision_config.hidden_size))
    shapes.update(_gemma_shapes("language_model.model", text))
    if not cfg.tie_word_embeddings:
        shapes[HEAD] = (text.vocab_size, text.hidden_size)
    return shapes


def unflatten(flat: dict) -> dict:
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


def flatten(tree: dict | list) -> dict:
    """The way back: {"layers": [{"weight": x}]} -> {"layers.0.weight": x}."""
    flat = {}
    for key, child in enumerate(tree) if isinstance(tree, list) else tree.items():
        if isinstance(child, (dict, list)):
            flat.update({f"{key}.{name}": leaf for name, leaf in flatten(child).items()})
        else:
            flat[str(key)] = child
    return flat


# What was wrapped around the model when it was saved, and the module where the model's own names begin.
_WRAPPERS = re.compile(r"^(?:(?:model|paligemma|paligemma_with_expert|module|_orig_mod)\.)+"
                       r"(?=(?:language_model|lm_head|vision_tower|multi_modal_projector|vision_model|text_model)\."
                       r"|logit_)")


# The embedding table and, where it is not the same, the output head.
TABLE, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
# Buffers that older versions stored beside the weights; each is computed, never learned.
_BUFFER = re.compile(r"(?:^|\.)(?:position_ids|rotary_emb\.(?:original_)?inv_freq)$")


def is_buffer(name: str) -> bool:
    """Whether a file's tensor of this name is computed, so that it belongs to no checkpoint."""
    return _BUFFER.search(name) is not None


def canonical(name: str) -> str:
    """A tensor's name in any of the hub's schemes -> its name in the published files, which is the model's own.

    Newer versions of transformers put `model.` in front, take it out of the middle, and drop `vision_model.`; what
    wraps a model (robotics, parallel and compiled ones) adds a module's name; a Gemma by itself has no
    `language_model.` in front.
    """
    name = _WRAPPERS.sub("", name)
    name = re.sub(r"^(?:model\.)?(?=(?:embed_tokens|layers|norm)\.)", "language_model.model.", name)
    name = re.sub(r"^lm_head\.", "language_model.lm_head.", name)
    name = re.sub(r"^language_model\.(?!model\.|lm_head\.)", "language_model.model.", name)
    return re.sub(r"^vision_tower\.(?!vision_model\.)", "vision_tower.vision_model.", name)


def _list_some(problems):
    shown = ", ".join(short_name(problem) for problem in problems[:3])
    return shown + (", …" if len(problems) > 3 else "")


def check_tensors(tensors: dict, shapes: dict[str, tuple], where: str):
    """Strict: exactly the names and shapes that a model calls for, all of them numbers that can be weights.

    A loader that lets a missing tensor pass runs a PaliGemma 2 as a PaliGemma 1, and prints nonsense without an error.
    """
    missing = [name for name in shapes if name not in tensors]
    unexpected = [stored.name for name, stored in tensors.items() if name not in shapes]
    misshapen = [f"{name} {list(tensors[name].shape)} where {list(shape)} belongs" for name, shape in shapes.items()
                 if name in tensors and tensors[name].shape != shape]
    unsupported = [f"{name} {tensors[name].dtype}" for name in shapes
                   if name in tensors and tensors[name].dtype not in FLOATS
                   and getattr(tensors[name], "scale", None) is None]
    faults = [f"{len(names)} {kind} ({_list_some(names)})" for kind, names in [
        ("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen),
        (f"of a dtype other than {', '.join(FLOATS)}", unsupported)] if names]
    if faults:
        raise InputError(f"{where}: " + "; ".join(faults))


def count_parameters(cfg: PaliGemmaConfig | SiglipConfig) -> int:
    """How many numbers a checkpoint of this config holds."""
    return sum(math.prod(shape) for shape in param_shapes(cfg).values())


def family(cfg: PaliGemmaConfig | SiglipConfig) -> str:
    """The name of the kind of model."""
    if isinstance(cfg, SiglipConfig):
        return "SigLIP"
    number = " 3" if cfg.text_config.qk_norms else " 2" if cfg.text_config.post_norms else ""
    return ("PaliGemma" if cfg.vision_config else "Gemma") + number
