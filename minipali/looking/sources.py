"""The lines of this package that computed what a panel shows, with the file and the line."""
import ast
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]

# For each panel the functions whose lines it shows (file, name), and the recorder's names to copy; {} is the layer.
PANELS = {
    "answer": ([("decoding/sampling.py", "log_probs"), ("decoding/sampling.py", "greedy")], ["logits"]),
    "picture": ([("model/ops.py", "attention_weights"), ("looking/attribution.py", "gradient_times_input"),
                 ("looking/attribution.py", "erased_pictures")],
                ["language_model.model.layers.{}.self_attn.attn_weights", "multi_modal_projector"]),
    "patch": ([("model/siglip.py", "patchify"), ("model/siglip.py", "patch_embeddings")],
              ["vision_tower.vision_model.embeddings"]),
    "vision": ([("model/siglip.py", "self_attention"), ("model/siglip.py", "encoder_layer")],
               ["vision_tower.vision_model.encoder.layers.{}.self_attn.attn_weights",
                "vision_tower.vision_model.encoder.layers.{}"]),
    "sequence": ([("model/paligemma.py", "join"), ("model/gemma.py", "prefix_lm_mask")],
                 ["language_model.model.embed_tokens"]),
    "attention": ([("model/ops.py", "attention_weights"), ("model/ops.py", "weighted_values")],
                  ["language_model.model.layers.{}.self_attn.attn_weights"]),
    "stream": ([("model/gemma.py", "decoder_layer")],
               ["language_model.model.layers.{}.self_attn", "language_model.model.layers.{}.mlp",
                "language_model.model.layers.{}"]),
    "lens": ([("looking/logit_lens.py", "read_out"), ("model/gemma.py", "output_logits")],
             ["language_model.model.layers.{}", "language_model.model.norm"]),
    "next": ([("decoding/sampling.py", "candidates"), ("model/ops.py", "softmax")], ["logits"]),
    "cache": ([("model/gemma.py", "KVCache.reserve"), ("model/gemma.py", "KVCache.store")],
              ["language_model.model.layers.{}.self_attn.k_proj", "language_model.model.layers.{}.self_attn.v_proj"]),
    "rope": ([("model/ops.py", "rope")],
             ["language_model.model.layers.{}.self_attn.q_proj", "language_model.model.layers.{}.self_attn.k_proj"]),
    "norm": ([("model/ops.py", "rms_norm")], ["language_model.model.layers.{}.input_layernorm"]),
    "contrast": ([("model/losses.py", "similarity"), ("model/losses.py", "clip_loss"),
                  ("model/losses.py", "siglip_loss")], ["vision_model.head", "text_model.head"]),
    "boxes": ([("outputs/boxes.py", "parse"), ("outputs/masks.py", "paste")], []),
}


def source(file, name):
    """A function's lines without its docstring -> {"file", "line", "name", "code"}; `name` may be Class.method."""
    text = (PACKAGE / file).read_text(encoding="utf-8")
    node = ast.parse(text)
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    lines = text.splitlines()[first - 1:node.end_lineno]
    if ast.get_docstring(node) is not None:
        said = node.body[0]
        del lines[said.lineno - first:said.end_lineno - first + 1]
    indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    return {"file": f"minipali/{file}", "line": first, "name": name, "code": "\n".join(line[indent:] for line in lines)}


def sources():
    """{panel: {"code": [its functions], "taps": [its recorded names]}}."""
    return {panel: {"code": [source(*function) for function in functions], "taps": taps}
            for panel, (functions, taps) in PANELS.items()}
