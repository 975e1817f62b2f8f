"""The names of recorded activations in the order of execution, and what usually is wrong where one differs first.

A tap is the output of a module, so what is wrong stands between the taps before it, which agree, and this one.
"""
import re

from minipali.checkpoint.tensors import canonical

_ENCODER_LAYER = {
    "layer_norm1": "LayerNorm: eps 1e-6 inside the square root, the mean subtracted, weight and bias in their places",
    "self_attn.q_proj": "the matrix: the file keeps (out, in), so x @ weight.T; and its bias",
    "self_attn.k_proj": "the matrix: the file keeps (out, in), so x @ weight.T; and its bias",
    "self_attn.v_proj": "the matrix: the file keeps (out, in), so x @ weight.T; and its bias",
    "self_attn.attn_weights": "the scale 1/sqrt(head size), how features are cut into heads, a causal mask (none here)",
    "self_attn.out_proj": "attention: the scale 1/sqrt(head size), how features are cut into heads and put together "
                          "again, a causal mask (here is none); or this matrix and its bias",
    "self_attn": "the attention block as a whole: its parts agree, so look at what it returns",
    "layer_norm2": "the residual sum x + attention before it, or this LayerNorm (eps, weight, bias)",
    "mlp.fc1": "the matrix: the file keeps (out, in), so x @ weight.T; and its bias",
    "mlp.fc2": "GELU: the tanh form is the right one here, the exact form differs by up to 5e-4; or this matrix",
    "mlp": "GELU: the tanh form is the right one here, the exact form differs by up to 5e-4; or one of both matrices",
    "": "the residual sum x + mlp; if no part of the layer was recorded, anything in it: record its parts",
}
_DECODER_LAYER = {
    "input_layernorm": "RMSNorm: Gemma's factor is (1 + weight), eps is inside the square root, no mean is subtracted; "
                       "in the first layer also what was joined: text is scaled by sqrt(D), the picture is not",
    "self_attn.q_proj": "the matrix: the file keeps (out, in), so x @ weight.T; there is no bias",
    "self_attn.k_proj": "the matrix: the file keeps (out, in), so x @ weight.T; there is no bias",
    "self_attn.v_proj": "the matrix: the file keeps (out, in), so x @ weight.T; there is no bias",
    "self_attn.q_norm": "Gemma 3's norm of each head: over the head's features, before the rotation, factor 1 + weight",
    "self_attn.k_norm": "Gemma 3's norm of each head: over the head's features, before the rotation, factor 1 + weight",
    "self_attn.attn_weights": "rotary positions (pairs are i and i + H/2, not 2i and 2i + 1; the base; positions from "
                              "0), the mask (the prefix sees all of itself; Gemma 2's sliding window), which query "
                              "heads share a key head (K1 K1 K2 K2), the scale, Gemma 2's soft cap before the mask",
    "self_attn.o_proj": "rotary positions (pairs are i and i + H/2, not 2i and 2i + 1; the base; positions from 0; "
                        "values are not turned), the mask (the prefix sees all of itself; Gemma 2's sliding window), "
                        "which query heads share a key head (K1 K1 K2 K2), the scale, Gemma 2's soft cap; or the "
                        "matrix",
    "self_attn": "the attention block as a whole: its parts agree, so look at what it returns",
    "post_attention_layernorm": "in Gemma 1 the norm before the MLP, so also the residual sum x + attention; in "
                                "Gemma 2 and 3 a norm of what attention gives, before it is added; factor (1 + weight)",
    "pre_feedforward_layernorm": "the residual sum x + attention before it, or this RMSNorm (Gemma 2 and 3)",
    "mlp.gate_proj": "the matrix: gate and up exchanged look like this",
    "mlp.up_proj": "the matrix: gate and up exchanged look like this",
    "mlp.down_proj": "gelu(gate) * up: the tanh form of GELU, on the gate and not on up; or this matrix",
    "mlp": "gelu(gate) * up: the tanh form of GELU, on the gate and not on up; or one of the three matrices",
    "post_feedforward_layernorm": "Gemma 2's norm of what the MLP gives, before it is added",
    "": "the residual sum x + mlp; if no part of the layer was recorded, anything in it: record its parts",
}
_PIXELS = ("the picture: Pillow's bicubic filter on bytes (with antialiasing), 0..255 to 0..1, minus 0.5 over 0.5, "
           "channels R, G, B first")
_EMBEDDINGS = ("patches: rows from the top left, inside a patch channel, row, column; the kernel's bias; the position "
               "table (interpolated, or off by one for a CLS token that is not there)")
_VISION_END = "the last LayerNorm, after all layers: PaliGemma reads what comes out of it"
_HEAD = "the pooling head: q, k and v are rows 0..D, D..2D and 2D..3D of one matrix"

# Stage by stage: what its names begin with, the parts of one of its layers, and the taps of the stage.
_STAGES = [
    ("", None, {"pixel_values": _PIXELS,
                "input_ids": "the tokens: picture tokens, BOS, prompt, and a newline, tokenized with the prompt"}),
    *[(root, _ENCODER_LAYER, {
        "embeddings": _EMBEDDINGS, "encoder.layers": "", "post_layernorm": _VISION_END, "head.attn_weights": _HEAD,
        "head.attention": _HEAD, "head.layernorm": _HEAD, "head.mlp.fc1": _HEAD, "head.mlp.fc2": _HEAD,
        "head.mlp": _HEAD, "head": _HEAD}) for root in ["vision_tower.vision_model.", "vision_model."]],
    ("text_model.", _ENCODER_LAYER, {
        "embeddings": "token and position tables; captions are padded to the full length", "encoder.layers": "",
        "final_layer_norm": "the last LayerNorm", "head": "read off the last position, padding included; has a bias"}),
    ("", None, {"multi_modal_projector": "the linear map with its bias; what it gives is not divided by sqrt(D) here. "
                                         "(Where it is, everything is multiplied by sqrt(D) afterwards: the same)"}),
    ("language_model.model.", _DECODER_LAYER, {
        "embed_tokens": "the table's rows times sqrt(D), in full and not rounded to 16 bits", "layers": "",
        "norm": "the last RMSNorm: factor (1 + weight)"}),
    ("", None, {"logits": "the output head: the embedding table unless the config unties it, unscaled; Gemma 2's soft "
                          "cap; and which position was read: the last of the prefix"}),
]
_LAYER = re.compile(r"(.*\blayers)\.(\d+)(?:\.(.*))?$")


def standard_name(name):
    """A module's name in any of the hub's schemes -> the name that the recorder gives to the module's output."""
    name = canonical(f"{name}.")[:-1]  # with the dot that follows it in the name of a parameter
    return "logits" if name in ("lm_head", "language_model.lm_head") else name


def place(name):
    """A sort key that puts names in the order of execution; None for a name that this package does not give."""
    match = _LAYER.match(name)
    tap, layer, part = (match[1], int(match[2]), match[3] or "") if match else (name, -1, "")
    for number, (root, parts, taps) in enumerate(_STAGES):
        inside = tap.removeprefix(root)
        if not tap.startswith(root) or inside not in taps or (layer < 0) != (not inside.endswith("layers")):
            continue
        if layer < 0:
            return number, list(taps).index(inside), 0, 0
        if part in parts:
            return number, list(taps).index(inside), layer, list(parts).index(part)
    return None


def usual_cause(name):
    """What usually is wrong where this array is the first to differ; "" for a name that is not known."""
    at = place(name)
    if at is None:
        return ""
    number, tap, _, part = at
    _, parts, taps = _STAGES[number]
    return list(taps.values())[tap] or list(parts.values())[part]
