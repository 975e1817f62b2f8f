"""Write fine_tune.safetensors.xz: how a small PaliGemma learns six pictures in PyTorch, partly frozen, or by LoRA.

    pip install torch==2.13.0 transformers==5.23.0 safetensors pillow
    python tests/golden/make_fine_tune_golden.py

tests/test_fine_tune.py reads the file and never runs this. Everything goes the hub's way: its processor with `suffix=`
makes ids, labels and pixels of pictures and texts, its model the loss of `labels`, torch.optim the steps. Only the
order of the examples is ours. `runs/` has the losses and the gradients' lengths of ten steps, and what was learned.
"""
import json
import lzma
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
import transformers
from make_adamw_golden import SETTINGS, optimizer
from make_golden import NoFloat32, checkpoint_name, fill
from make_image_golden import picture
from PIL import Image
from safetensors.numpy import save
from torch.nn.utils import clip_grad_norm_
from transformers import (
    AutoProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
)

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from minipali.learning.examples import order
from minipali.small_world.vocabulary import ROWS

VERSION = "1"  # tests/test_fine_tune.py reads this version only
STEPS, SIZE, SEED = 10, 4, 5
VISION = {"model_type": "siglip_vision_model", "hidden_size": 10, "intermediate_size": 9, "num_hidden_layers": 2,
          "num_attention_heads": 2, "image_size": 28, "patch_size": 14, "vision_use_head": False, "projection_dim": 8}
TEXT = {"hidden_size": 8, "intermediate_size": 7, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
        "vocab_size": ROWS, "max_position_embeddings": 128, "num_hidden_layers": 2}
MODELS = {"gemma": TEXT | {"model_type": "gemma"},
          "gemma2": TEXT | {"model_type": "gemma2", "sliding_window": 4, "attn_logit_softcapping": 2.5,
                            "final_logit_softcapping": 3.5, "query_pre_attn_scalar": 9}}
EXAMPLES = [("caption en", "a red circle on the left"), ("answer en what color is the star?", "blue"), ("", "größer"),
            ("detect square", "<loc0100><loc0200><loc0300><loc0400> square"), ("answer en how many?", "3"), ("ocr", "")]
RUNS = {  # the text model, what is frozen, what LoRA adapts
    "tower frozen": ("gemma", ["vision_tower.*"], []),
    "parts frozen": ("gemma2", ["*embed_tokens*", "*.layers.0.*", "*bias"], []),
    "lora": ("gemma2", ["*"], ["language_model.*.q_proj", "*.v_proj"])}
RANK, ALPHA = 2, 6.0


def processed(pictures):
    """All examples through the hub's processor: (1,T) ids and the rest for each alone, and one batch of all."""
    processor = AutoProcessor.from_pretrained(ROOT / "weights")
    processor.image_processor.size = {"height": VISION["image_size"], "width": VISION["image_size"]}
    processor.image_seq_length = processor.image_processor.image_seq_length = 4
    images = [Image.fromarray(pixels) for pixels in pictures]
    return processor(text=["<image>" + prefix for prefix, _ in EXAMPLES], images=images, padding="longest",
                     suffix=[suffix for _, suffix in EXAMPLES], return_tensors="np")


def chosen(rows, inputs):
    """Some rows of the batch; more padding on their left than these rows need changes nothing."""
    some = {name: np.asarray(x)[rows] for name, x in inputs.items()}
    return {name: torch.tensor(x.astype(np.float64) if x.dtype.kind == "f" else x) for name, x in some.items()}


def with_lora(model, patterns, rng):
    """Linear layers that add s B A x to what they give; returns {name: parameter} of the A and B."""
    thin = {}
    for name, module in model.named_modules():
        name = checkpoint_name(name)
        if isinstance(module, torch.nn.Linear) and any(fnmatchcase(name, pattern) for pattern in patterns):
            a = torch.nn.Parameter(torch.tensor(rng.standard_normal((RANK, module.in_features)) / 3))
            b = torch.nn.Parameter(torch.zeros(module.out_features, RANK))
            thin |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
            module.register_forward_hook(lambda module, inputs, y, a=a, b=b: y + ALPHA / RANK * (inputs[0] @ a.T) @ b.T)
    return thin


def learned(kind, freeze, adapt, inputs):
    config = PaliGemmaConfig(vision_config=VISION, text_config=MODELS[kind], image_token_index=ROWS - 1,
                             projection_dim=8, bos_token_id=2, eos_token_id=1, pad_token_id=0)
    config._attn_implementation = "eager"
    model = fill(PaliGemmaForConditionalGeneration(config), np.random.default_rng(7))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.round(p * 128) / 128)  # the file packs better so, and the table of tokens is most of it
    weights = {checkpoint_name(name): p.detach().numpy().astype(np.float16) for name, p in model.named_parameters()}
    parameters = {}
    for name, p in model.named_parameters():
        p.requires_grad_(not any(fnmatchcase(checkpoint_name(name), pattern) for pattern in freeze))
        if p.requires_grad:
            parameters[checkpoint_name(name)] = p
    parameters |= with_lora(model, adapt, np.random.default_rng(8))
    start = {name: p.detach().numpy().copy() for name, p in parameters.items()}
    adamw, schedule = optimizer(list(parameters.values()), STEPS)
    losses, lengths = [], []
    for step in range(STEPS):
        loss = model(**chosen(order(SEED, step, SIZE, len(EXAMPLES)), inputs)).loss
        adamw.zero_grad()
        loss.backward()
        length = clip_grad_norm_(parameters.values(), float("inf"))  # only measures
        for p in parameters.values():
            p.grad *= min(1, SETTINGS["clip"] / length)
        adamw.step()
        schedule.step()
        losses.append(loss.item())
        lengths.append(length.item())
    print(kind, freeze, adapt, np.round(losses, 3), np.round(lengths, 3))
    run = {"loss": np.array(losses), "length": np.array(lengths)}
    for name, p in parameters.items():
        if "lora" in name:
            run |= {f"start/{name}": start[name], f"end/{name}": p.detach().numpy()}
    return json.loads(model.config.to_json_string()), weights, run


if __name__ == "__main__":
    rng = np.random.default_rng(6)
    pictures = [picture(*rng.integers(9, 40, 2), rng) for _ in EXAMPLES]
    inputs = processed(pictures)
    tensors = {f"pictures/{i}": pixels for i, pixels in enumerate(pictures)}
    tensors |= {f"processor/{name}": np.asarray(inputs[name]) for name in ("input_ids", "labels", "attention_mask")}
    tensors["processor/pixel_values"] = np.asarray(inputs["pixel_values"], np.float32)
    configs = {}
    for run, (kind, freeze, adapt) in RUNS.items():
        with NoFloat32():
            configs[kind], weights, found = learned(kind, freeze, adapt, inputs)
        tensors |= {f"weights/{kind}/{name}": x for name, x in weights.items()}
        tensors |= {f"runs/{run}/{name}": x for name, x in found.items()}
    about = {"format": "minipali golden", "version": VERSION, "settings": json.dumps(SETTINGS),
             "configs": json.dumps(configs), "examples": json.dumps(EXAMPLES), "runs": json.dumps(RUNS),
             "order": json.dumps([STEPS, SIZE, SEED]), "lora": json.dumps([RANK, ALPHA]),
             "written_by": f"transformers {transformers.__version__}, torch {torch.__version__}"}
    path = Path(__file__).with_name("fine_tune.safetensors.xz")
    content = save({name: np.ascontiguousarray(x) for name, x in tensors.items()}, about)
    path.write_bytes(lzma.compress(content, preset=9 | lzma.PRESET_EXTREME))
    print(f"{path.name}: {len(tensors)} tensors, {path.stat().st_size:,} bytes")
