"""Write the golden files: what `transformers` computes, in float64, for small random models whose sizes all differ.

    pip install torch==2.13.0 transformers==5.23.0 safetensors
    python tests/golden/make_golden.py

The tests read these files and never run this. Each holds, under `weights/`, `inputs/`, `taps/`, `outputs/` and
`gradients/`, one model, one batch and all that came of it. Weights and pixels are float16 values, which float32 and
float64 hold exactly, so that a test in either dtype starts from the same model.
"""
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from safetensors.numpy import save
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipConfig,
    SiglipModel,
)
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

FOLDER = Path(__file__).parent
VERSION = "1"  # tests/test_golden.py reads this version only

# RMSNorm, softmax, the rotary angles and the loss are computed in float32 whatever the model's dtype, and the
# frequencies and the embedding's scale are stored in it: comparisons would end at 1e-6. Here float32 means float64.
torch.set_default_dtype(torch.float64)
torch.float32 = torch.float = torch.float64
torch.Tensor.float = torch.Tensor.double


class NoFloat32(TorchDispatchMode):
    """Proof of the above: any operation whose result is not float64 (or integers) stops the program."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64:
                raise TypeError(f"{function} gave {tensor.dtype}")
        return result


# 2 × 2 patches and one pixel over.
VISION = {"hidden_size": 15, "intermediate_size": 21, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 7,
          "patch_size": 3, "num_channels": 3, "layer_norm_eps": 1e-6, "hidden_act": "gelu_pytorch_tanh"}
TEXT = {"hidden_size": 16, "intermediate_size": 22, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 6,
        "vocab_size": 41, "max_position_embeddings": 64, "rms_norm_eps": 1e-6}
GEMMA = TEXT | {"model_type": "gemma", "num_hidden_layers": 2, "hidden_act": "gelu_pytorch_tanh"}
# The window is shorter than the suffixes, the caps are low enough to bend, the scale is not that of the head size.
GEMMA2 = TEXT | {"model_type": "gemma2", "num_hidden_layers": 3, "hidden_activation": "gelu_pytorch_tanh",
                 "sliding_window": 4, "attn_logit_softcapping": 2.5, "final_logit_softcapping": 3.5,
                 "query_pre_attn_scalar": 9}
SIGLIP_TEXT = {"hidden_size": 12, "intermediate_size": 19, "num_hidden_layers": 2, "num_attention_heads": 4,
               "vocab_size": 31, "max_position_embeddings": 7, "projection_size": 15, "layer_norm_eps": 1e-6,
               "hidden_act": "gelu_pytorch_tanh"}

# The decoders alone: smaller, for Gemma 3 needs more layers, two local ones, a global one and one after that. Windows,
# bases and stretched positions are such that they all matter within a dozen tokens.
ALONE = {"hidden_size": 12, "intermediate_size": 14, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4,
         "vocab_size": 29, "max_position_embeddings": 64, "rms_norm_eps": 1e-6}
TEXT_MODELS = {
    "gemma1": ALONE | {"model_type": "gemma", "num_hidden_layers": 2, "hidden_act": "gelu_pytorch_tanh"},
    "gemma2": ALONE | {"model_type": "gemma2", "num_hidden_layers": 2, "hidden_activation": "gelu_pytorch_tanh",
                       "sliding_window": 3, "attn_logit_softcapping": 2.5, "final_logit_softcapping": 3.5,
                       "query_pre_attn_scalar": 9},
    "gemma3": ALONE | {"model_type": "gemma3_text", "num_hidden_layers": 4, "hidden_activation": "gelu_pytorch_tanh",
                       "sliding_window": 3, "sliding_window_pattern": 3, "query_pre_attn_scalar": 9,
                       "rope_parameters": {
                           "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 200.0},
                           "sliding_attention": {"rope_type": "default", "rope_theta": 10.0}}}}

IMAGE, BOS, EOS, NEWLINE = 40, 2, 1, 5
PROMPTS = [[BOS, 7, 11, NEWLINE], [BOS, NEWLINE], [BOS, 23, 7, 7, 30, NEWLINE]]
SUFFIXES = [[12, 9, 9, 33, 17, EOS], [8, 21, 8, 3, 36, 7, 27, EOS], [14, 28, EOS]]
NEW_TOKENS = 7
TEXTS, BEGINNINGS = [[BOS, 7, 11, 25, 9, 9, 28], [BOS, 19, 3, EOS], [BOS, 23, 7, 7, 14]], [4, 1, 3]


def checkpoint_name(name):
    """Module and parameter names in memory -> in published files. Only prefixes differ, and one flattened scope."""
    for ours, published in [("model.vision_tower.", "vision_tower.vision_model."), ("lm_head", "logits"),
                            ("model.language_model.", "language_model.model."),
                            # A Gemma by itself is published without the first of these words, which we keep.
                            *((f"model.{p}", f"language_model.model.{p}") for p in ("embed", "layers", "norm")),
                            ("model.", "")]:
        if name.startswith(ours):
            return published + name.removeprefix(ours)
    return name


def fill(model, rng):
    """Random weights. Norm weights stay away from 0 and from 1, the values at which a wrong norm looks right."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            value = rng.standard_normal(p.shape)
            if p.ndim >= 2:
                value *= 1.2 / np.sqrt(np.prod(p.shape[1:]))
            elif "norm" in name and name.endswith("weight"):
                value = rng.choice([-1, 1], p.shape) * rng.uniform(0.3, 0.8, p.shape) + (
                    0 if "language_model" in checkpoint_name(name) else 1)
            else:
                value *= 0.4
            p.copy_(torch.tensor(value.astype(np.float16).astype(np.float64)))
    return model.eval()


def recorded(model, run):
    """Run, and return the result and the output of every module by its published name."""
    taps = {}

    def keep(name):
        def hook(module, inputs, output):
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(output, torch.Tensor):
                taps[name] = output.detach()
        return hook

    handles = [module.register_forward_hook(keep(checkpoint_name(name))) for name, module in model.named_modules()
               if not name.endswith(("act_fn", "activation_fn", "rotary_emb", "patch_embedding", "position_embedding",
                                     "token_embedding"))]
    result = run()
    for handle in handles:
        handle.remove()
    return result, taps


def batch(prompts, suffixes, patches, side):
    """Ragged rows -> what the processor would give, padded on one side."""
    rows = {"input_ids": [], "attention_mask": [], "token_type_ids": [], "labels": []}
    width = patches + max(len(p) + len(s) for p, s in zip(prompts, suffixes))
    for prompt, suffix in zip(prompts, suffixes):
        prefix = [IMAGE] * patches + prompt
        pad = width - len(prefix) - len(suffix)

        for name, content, padding in [("input_ids", prefix + suffix, 0),
                                       ("attention_mask", [1] * (len(prefix) + len(suffix)), 0),
                                       ("token_type_ids", [0] * len(prefix) + [1] * len(suffix), int(side == "right")),
                                       ("labels", [-100] * len(prefix) + suffix, -100)]:
            padding = [padding] * pad
            rows[name].append(padding + content if side == "left" else content + padding)
    return {name: torch.tensor(value) for name, value in rows.items()}


def agree(a, b, what):
    worst = (a - b).abs().max() / a.abs().max()
    assert worst < 1e-12, f"transformers disagrees with itself about {what}: {worst}"


def paligemma(text, seed):
    rng = np.random.default_rng(seed)
    config = PaliGemmaConfig(vision_config=VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
                             text_config=text, image_token_index=IMAGE, projection_dim=text["hidden_size"],
                             bos_token_id=BOS, eos_token_id=EOS, pad_token_id=0)
    config.vision_config.projection_dim = text["hidden_size"]
    config._attn_implementation = "eager"
    model = fill(PaliGemmaForConditionalGeneration(config), rng)
    patches = (VISION["image_size"] // VISION["patch_size"]) ** 2
    pixels = rng.uniform(-1, 1, (len(PROMPTS), 3, VISION["image_size"], VISION["image_size"])).astype(np.float16)
    images = torch.tensor(pixels.astype(np.float64))

    inputs = batch(PROMPTS, SUFFIXES, patches, "right")
    output, taps = recorded(model, lambda: model(pixel_values=images, **inputs))
    output.loss.backward()
    valid = inputs["attention_mask"].bool()
    is_text = valid & (inputs["input_ids"] != IMAGE)
    logits = output.logits.detach()

    # The padded batch is what each row gives alone, and what a batch padded on the left gives.
    left = batch(PROMPTS, SUFFIXES, patches, "left")
    with torch.no_grad():
        agree(logits[valid], model(pixel_values=images, **left).logits[left["attention_mask"].bool()], "left padding")
        for i in range(len(PROMPTS)):
            alone = batch(PROMPTS[i:i + 1], SUFFIXES[i:i + 1], patches, "right")
            agree(logits[i][valid[i]], model(pixel_values=images[i:i + 1], **alone).logits[0], "a single row")

    # Greedy decoding with its own cache and masks.
    left = batch(PROMPTS, [[]] * len(PROMPTS), patches, "left")
    del left["labels"]
    generated = model.generate(pixel_values=images, **left, max_new_tokens=NEW_TOKENS, do_sample=False,
                               eos_token_id=None, return_dict_in_generate=True, output_logits=True)

    taps["logits"] = logits
    kept = {}
    for name, x in taps.items():
        if name.startswith("language_model.model.embed_tokens") or name == "logits":
            kept[name] = x[is_text]
        elif name.startswith("language_model."):
            kept[name] = x[valid]
        elif name.startswith(("vision_tower.vision_model.", "multi_modal_projector")) and "linear" not in name:
            kept[name] = x
    lengths = [len(p) + len(s) for p, s in zip(PROMPTS, SUFFIXES)]
    ids = np.array([p + s + [0] * (max(lengths) - len(p) - len(s)) for p, s in zip(PROMPTS, SUFFIXES)])
    tensors = {"inputs/pixel_values": pixels, "inputs/ids": ids, "inputs/lengths": np.array(lengths),
               "inputs/prompt_lengths": np.array([len(p) for p in PROMPTS]),
               "outputs/loss": output.loss.detach(),
               "outputs/greedy_ids": generated.sequences[:, -NEW_TOKENS:],
               "outputs/greedy_logits": torch.stack(generated.logits, 1)}
    return model, kept, tensors


def text_model(config, seed):
    """A Gemma by itself, trained on every token after the first, and its greedy continuation of unequal beginnings."""
    config = AutoConfig.for_model(**config, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=0)
    config._attn_implementation = "eager"
    model = fill(AutoModelForCausalLM.from_config(config), np.random.default_rng(seed))
    width = max(map(len, TEXTS))
    ids, mask = (torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
                 for rows in (TEXTS, [[1] * len(text) for text in TEXTS]))
    valid = mask.bool()
    output, taps = recorded(model, lambda: model(
        input_ids=ids, attention_mask=mask, labels=ids.where(valid, torch.tensor(-100))))
    output.loss.backward()
    logits = output.logits.detach()

    # The padded batch is what each text gives alone, and no token changes what stands before it: the mask is causal.
    for i, text in enumerate(TEXTS):
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([text])).logits[0]
            agree(logits[i][valid[i]], alone, "a single row")
            agree(alone[:2], model(input_ids=torch.tensor([text[:2]])).logits[0], "what comes later")

    beginnings = [text[:length] for text, length in zip(TEXTS, BEGINNINGS)]
    width = max(BEGINNINGS)
    generated = model.generate(
        input_ids=torch.tensor([[0] * (width - len(row)) + row for row in beginnings]),
        attention_mask=torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in beginnings]),
        max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None, return_dict_in_generate=True, output_logits=True)

    taps["logits"] = logits
    kept = {}
    for name, x in taps.items():
        # These two norms stand behind the exchange of the axes of tokens and heads, ours before it.
        x = x.transpose(1, 2) if name.endswith(("q_norm", "k_norm")) else x
        if name.startswith("language_model.") or name == "logits":
            kept[name] = x[valid]
    tensors = {"inputs/ids": ids, "inputs/lengths": mask.sum(1), "inputs/prompt_lengths": np.array(BEGINNINGS),
               "outputs/loss": output.loss.detach(), "outputs/greedy_ids": generated.sequences[:, -NEW_TOKENS:],
               "outputs/greedy_logits": torch.stack(generated.logits, 1)}
    return model, kept, tensors


def siglip(seed):
    rng = np.random.default_rng(seed)
    config = SiglipConfig(vision_config=VISION, text_config=SIGLIP_TEXT | {"bos_token_id": None, "eos_token_id": None})
    config._attn_implementation = "eager"
    model = SiglipModel(config)
    for tower in [model.text_model, model.vision_model]:
        tower.config._attn_implementation = "eager"
    fill(model, rng)
    pixels = rng.uniform(-1, 1, (4, 3, VISION["image_size"], VISION["image_size"])).astype(np.float16)
    ids = rng.integers(0, SIGLIP_TEXT["vocab_size"], (4, SIGLIP_TEXT["max_position_embeddings"]))
    output, taps = recorded(model, lambda: model(
        pixel_values=torch.tensor(pixels.astype(np.float64)), input_ids=torch.tensor(ids), return_loss=True))
    output.loss.backward()
    taps = {name: x for name, x in taps.items() if name.startswith(("vision_model.", "text_model."))
            and not name.endswith("attention.out_proj")}

    # CLIP's loss over the same two sets of vectors; its gradients end at these, the rest of the way is the same.
    vectors = [taps[name].clone().requires_grad_() for name in ["vision_model.head", "text_model.head"]]
    scale = model.logit_scale.detach().clone().requires_grad_()
    images, texts = [v / v.norm(dim=-1, keepdim=True) for v in vectors]
    loss = image_text_contrastive_loss(texts @ images.T * scale.exp())
    loss.backward()
    tensors = {"inputs/pixel_values": pixels, "inputs/ids": ids, "outputs/siglip_loss": output.loss.detach(),
               "outputs/clip_loss": loss.detach(), "outputs/clip_dimages": vectors[0].grad,
               "outputs/clip_dtexts": vectors[1].grad, "outputs/clip_dlog_scale": scale.grad}
    return model, taps, tensors


def write(name, model, taps, tensors):
    tensors = dict(tensors)
    for key, p in model.named_parameters():
        tensors[f"weights/{checkpoint_name(key)}"] = p.detach().numpy().astype(np.float16)
        tensors[f"gradients/{checkpoint_name(key)}"] = p.grad
    tensors.update((f"taps/{key}", x) for key, x in taps.items())
    tensors = {key: np.ascontiguousarray(np.asarray(x)).reshape(np.shape(x)) for key, x in tensors.items()}
    config = json.dumps(json.loads(model.config.to_json_string()))
    metadata = {"format": "minipali golden", "version": VERSION, "config": config,
                "written_by": f"transformers {transformers.__version__}, torch {torch.__version__}"}
    path = FOLDER / f"{name}.safetensors"
    path.write_bytes(save(tensors, metadata))
    print(f"{path.name}: {len(tensors)} tensors, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    with NoFloat32():
        models = [("paligemma1", *paligemma(GEMMA, 1)), ("paligemma2", *paligemma(GEMMA2, 2)), ("siglip", *siglip(3)),
                  *((name, *text_model(config, seed)) for seed, (name, config) in enumerate(TEXT_MODELS.items(), 7))]
    for model in models:
        write(*model)
