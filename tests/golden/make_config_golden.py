"""Write configs.json.xz: what transformers makes of config.json files whose fields stand in one of several places.

    python tests/golden/make_config_golden.py        needs torch and transformers, which the tests never import

Each case is a small config with some fields changed, and what the model that transformers builds from it holds: rotary
frequencies, windows, scales, caps, the activation's value at 1.5, stop tokens. null: transformers fails on the file.
"""
import copy
import json
import lzma
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, GenerationConfig

transformers.logging.set_verbosity_error()

VISION = {"model_type": "siglip_vision_model", "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1,
          "num_attention_heads": 3, "image_size": 8, "patch_size": 4, "vision_use_head": False}
TEXT = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 6}

GEMMA_3 = TEXT | {"model_type": "gemma3_text", "sliding_window_pattern": 2}  # so that the second layer is global


def paligemma(kind):
    return {"model_type": "paligemma", "image_token_index": 29, "projection_dim": 16, "vision_config": VISION,
            "text_config": TEXT | {"model_type": kind}}


BASES = {"paligemma": paligemma("gemma"), "paligemma 2": paligemma("gemma2"), "gemma": TEXT | {"model_type": "gemma"},
         "gemma 2": TEXT | {"model_type": "gemma2"}, "gemma 3": GEMMA_3,
         "gemma 3 that sees": {"model_type": "gemma3", "vision_config": VISION, "mm_tokens_per_image": 4,
                               "text_config": GEMMA_3}}
LINEAR = {"rope_type": "linear", "factor": 4.0}
OLD_LINEAR = {"type": "linear", "factor": 4.0}
FULL, SLIDING = "full_attention", "sliding_attention"
# Fields of the text model.
PATCHES = [
    {}, {"rope_theta": 500.0}, {"rope_theta": 500}, {"rope_scaling": LINEAR}, {"rope_scaling": OLD_LINEAR},
    {"rope_scaling": LINEAR, "rope_theta": 500.0},
           {"rope_scaling": LINEAR | {"rope_theta": 700.0}, "rope_theta": 500.0},
    {"rope_scaling": {"rope_type": "default"}}, {"rope_scaling": {}}, {"rope_scaling": None, "rope_parameters": None},
    {"rope_scaling": {"rope_type": "default", "type": "linear", "factor": 4.0}},
    {"rope_scaling": {"rope_type": "linear", "type": "default", "factor": 4.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 700.0}},
    {"rope_parameters": {"rope_theta": 700.0}, "rope_theta": 500.0}, {"rope_parameters": {"rope_type": "default"}},
    {"rope_parameters": {"rope_type": "default"}, "rope_theta": 500.0},
    {"rope_parameters": LINEAR | {"rope_theta": 700.0}}, {"rope_parameters": OLD_LINEAR | {"rope_theta": 700.0}},
    {"rope_parameters": {"rope_theta": 700.0, "rope_type": "default"}, "rope_scaling": LINEAR},
    {"rope_parameters": {"rope_theta": 700.0, "rope_type": "default"}, "rope_scaling": LINEAR, "rope_theta": 500.0},
    {"rope_parameters": LINEAR, "rope_scaling": {"rope_type": "default"}},
    {"rope_parameters": {FULL: {"rope_type": "default", "rope_theta": 700.0}}},
    {"rope_parameters": {FULL: LINEAR | {"rope_theta": 700.0}, SLIDING: {"rope_type": "default", "rope_theta": 300.0}}},
    {"rope_parameters": {FULL: OLD_LINEAR, SLIDING: {"rope_theta": 300.0}}},
    {"rope_parameters": {FULL: {"rope_theta": 700.0}, SLIDING: LINEAR}, "rope_local_base_freq": 400.0},
    {"rope_parameters": {FULL: {"rope_theta": 700.0, "rope_type": "default"}}, "rope_scaling": LINEAR},
    {"rope_parameters": {FULL: {"rope_theta": 700.0}}, "rope_scaling": OLD_LINEAR},
    {"rope_parameters": {SLIDING: {"rope_type": "default"}}, "rope_theta": 500.0, "rope_local_base_freq": 400.0},
    {"rope_local_base_freq": 400.0}, {"rope_local_base_freq": 400.0, "rope_theta": 500.0, "rope_scaling": LINEAR},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, {"rope_scaling": {"rope_type": "linear"}},
    {"partial_rotary_factor": 0.5}, {"rope_parameters": LINEAR | {"partial_rotary_factor": 0.34}},
    {"hidden_act": "gelu"}, {"hidden_activation": "gelu"}, {"hidden_act": "gelu", "hidden_activation": "gelu"},
    {"hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh"}, {"hidden_act": "silu"},
    {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu"}, {"hidden_activation": "relu"},
    {"sliding_window": 3}, {"layer_types": [FULL, FULL, SLIDING]}, {"layer_types": [FULL] * 3},
    {"layer_types": [SLIDING] * 2}, {"sliding_window_pattern": 3}, {"_sliding_window_pattern": 2},
    {"final_logit_softcapping": 7.0}, {"final_logit_softcapping": None}, {"attn_logit_softcapping": 7.0},
    {"attn_logit_softcapping": None}, {"query_pre_attn_scalar": 9}, {"head_dim": 8}, {"rms_norm_eps": 0.01},
    {"attention_bias": True}, {"use_bidirectional_attention": True}, {"use_bidirectional_attention": False},
    {"num_key_value_heads": 4}, {"tie_word_embeddings": False}, {"eos_token_id": 7}, {"eos_token_id": [7, 8]},
]
# Fields beside the text model (for a text model alone these are its own), and generation_config.json.
OUTER = [
    ({"eos_token_id": 5}, {}, None), ({"eos_token_id": 5}, {"eos_token_id": [6, 7]}, None),
    ({"eos_token_id": [5, 6]}, {"eos_token_id": 7}, None), ({"eos_token_id": None}, {"eos_token_id": [6, 7]}, None),
    ({}, {"eos_token_id": 6}, None), ({"eos_token_id": 5}, {}, {"eos_token_id": 8}),
    ({"eos_token_id": 5}, {"eos_token_id": 6}, {"eos_token_id": [8, 9], "_from_model_config": True}),
    ({}, {}, {"eos_token_id": [8]}), ({"tie_word_embeddings": False}, {}, None),
    ({"tie_word_embeddings": False}, {"tie_word_embeddings": True}, None),
    ({"tie_word_embeddings": True}, {"tie_word_embeddings": False}, None),
    ({"image_token_index": 28}, {}, None), ({"image_token_id": 28}, {}, None),
    ({"image_token_id": 27, "image_token_index": 28}, {}, None), ({"image_token_index": None}, {}, None),
    ({"rope_theta": 500.0}, {}, None), ({"hidden_size": 99, "vocab_size": 99}, {}, None),
    ({"final_logit_softcapping": 7.0}, {}, None), ({"sliding_window": 3}, {}, None),
]


def cases():
    """Base, changed fields of its text model, changed fields beside it, and generation_config of each case."""
    for base, config in BASES.items():
        yield from ((base, patch, {}, None) for patch in PATCHES)
        if "text_config" in config:
            yield from ((base, inner, outer, generation) for outer, inner, generation in OUTER)
    for name, value in [("hidden_act", "gelu"), ("layer_norm_eps", 0.01), ("image_size", 16),
                        ("vision_use_head", True)]:
        yield "paligemma", {}, {"vision_config": VISION | {name: value}}, None


def changed(base, text, outer):
    """The config of a case; null in `outer` takes a field away."""
    config = copy.deepcopy(BASES[base])
    config.get("text_config", config).update(text)
    return {name: value for name, value in (config | outer).items() if value is not None}


def describe(config, generation):
    """What transformers builds."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        if generation is not None:
            (Path(folder) / "generation_config.json").write_text(json.dumps(generation))
            stops = GenerationConfig.from_pretrained(folder)
        else:
            stops = GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)
        cfg = AutoConfig.from_pretrained(folder)
    model = (AutoModelForImageTextToText if "vision_config" in config else AutoModelForCausalLM).from_config(cfg)
    # A forward pass: some faults show only then. Of a picture where there is a tower, whose tokens stand in front.
    ids, more = [[3, 4]], {}
    if config["model_type"] == "paligemma":
        patches = (config["vision_config"]["image_size"] // 4) ** 2
        more["pixel_values"] = torch.zeros(1, 3, *[config["vision_config"]["image_size"]] * 2)
        ids = [[cfg.image_token_id] * patches + ids[0]]
        more["token_type_ids"] = torch.zeros(1, len(ids[0]), dtype=torch.long)
    model(input_ids=torch.tensor(ids), attention_mask=torch.ones(1, len(ids[0]), dtype=torch.long), **more)
    language = getattr(model.model, "language_model", model.model)
    text = cfg.get_text_config()
    layers = []
    seen = {"tied": cfg.tie_word_embeddings, "eos": stops.eos_token_id,
            "parameters": sum(x.numel() for x in language.parameters())}
    for i, layer in enumerate(language.layers):
        attention, rotary = layer.self_attn, language.rotary_emb
        frequencies = (getattr(rotary, f"{text.layer_types[i]}_inv_freq") if text.model_type == "gemma3_text"
                       else rotary.inv_freq)
        layers.append({
            "frequencies": [round(x, 9) for x in frequencies.tolist()], "scale": attention.scaling,
            "window": getattr(attention, "sliding_window", None),
            "attention_cap": getattr(attention, "attn_logit_softcapping", None),
            "activation": layer.mlp.act_fn(torch.tensor(1.5)).item(), "eps": layer.input_layernorm.eps})
    seen |= {name: [layer[name] for layer in layers] for name in layers[0]}
    capped = config["model_type"] == "paligemma" or text.model_type != "gemma"
    seen["cap"] = getattr(text, "final_logit_softcapping", None) if capped else None
    if config["model_type"] == "paligemma":
        tower = model.model.vision_tower
        layer = next(module for name, module in tower.named_modules() if name.endswith("layers.0"))
        seen |= {"image": cfg.image_token_id, "tower": {
            "activation": layer.mlp.activation_fn(torch.tensor(1.5)).item(), "eps": layer.layer_norm1.eps,
            "positions": next(x for name, x in tower.named_parameters() if "position_embedding" in name).shape[0]}}
    return seen


def main():
    plain, found = {base: describe(config, None) for base, config in BASES.items()}, []
    for base, text, outer, generation in cases():
        case = {"base": base, "text": text, "outer": outer, "generation": generation}
        try:
            seen = describe(changed(base, text, outer), generation)
        except Exception as error:  # noqa: BLE001 - whatever it is, the file cannot be used there
            print(f"fails: {case}: {type(error).__name__}: {str(error).splitlines()[0][:90]}")
            seen = None
        differs = seen and {name: value for name, value in seen.items() if value != plain[base][name]}
        found.append(case | {"differs": differs})
    lines = ",\n".join(json.dumps(case) for case in found)
    seen = {base: json.dumps({"config": BASES[base], "seen": plain[base]}) for base in BASES}
    bases = ",\n".join(f"{json.dumps(base)}: {text}" for base, text in seen.items())
    content = f'{{"bases": {{\n{bases}}},\n"cases": [\n{lines}\n]}}\n'.encode()
    packed = lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)
    Path(__file__).with_name("configs.json.xz").write_bytes(packed)
    print(f"{len(found)} cases, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
