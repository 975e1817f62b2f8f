"""Write adamw.safetensors: what PyTorch's optimizer does, in float64, to a few arrays and to a small PaliGemma.

    pip install torch==2.13.0 transformers==5.23.0 safetensors
    python tests/golden/make_adamw_golden.py

tests/test_learning.py reads the file and never runs this. `steps/` has 20 steps with given gradients: the gradients,
and the weights before each step and after the last. `curve/` has 10 steps of the model of paligemma1.safetensors: the
batches, and loss and length of the gradient at each step.
"""
import json
from pathlib import Path

import numpy as np
import torch
import transformers
from make_golden import BOS, EOS, GEMMA, NEWLINE, VISION, NoFloat32, batch, paligemma
from safetensors.numpy import load_file, save
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

FOLDER = Path(__file__).parent
VERSION = "1"  # tests/test_learning.py reads this version only
SETTINGS = {"rate": 0.02, "warmup": 3, "beta1": 0.8, "beta2": 0.95, "eps": 1e-5, "decay": 0.1, "clip": 1.0}
SHAPES = {"matrix.weight": (4, 3), "matrix.bias": (4,), "kernel": (2, 1, 2, 3), "norm.weight": (5,), "scale": (1,)}
# PyTorch's clipping divides by the length + 1e-6. Lengths are either far above that or below the limit of 1.
SIZES = [1e7, 0.1, 0.02, 3e7, 0.1]


def optimizer(parameters, steps):
    """AdamW that decays matrices only, and its schedule: up in a straight line, down along half a cosine."""
    s = SETTINGS
    groups = [{"params": [p for p in parameters if p.ndim > 1], "weight_decay": s["decay"]},
              {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}]
    adamw = torch.optim.AdamW(groups, lr=s["rate"], betas=(s["beta1"], s["beta2"]), eps=s["eps"])
    up = LinearLR(adamw, 1 / s["warmup"], 1.0, s["warmup"] - 1)
    down = CosineAnnealingLR(adamw, steps - s["warmup"])
    return adamw, SequentialLR(adamw, [up, down], [s["warmup"]])


def given_gradients(steps, rng):
    parameters = {name: torch.nn.Parameter(torch.tensor(rng.standard_normal(shape))) for name, shape in SHAPES.items()}
    adamw, schedule = optimizer(list(parameters.values()), steps)
    gradients = {name: np.stack([SIZES[i % len(SIZES)] * rng.standard_normal(shape) for i in range(steps)])
                 for name, shape in SHAPES.items()}
    weights = {name: [p.detach().numpy().copy()] for name, p in parameters.items()}
    for i in range(steps):
        for name, p in parameters.items():
            p.grad = torch.tensor(gradients[name][i])
        clip_grad_norm_(parameters.values(), SETTINGS["clip"])
        adamw.step()
        schedule.step()
        for name, p in parameters.items():
            weights[name].append(p.detach().numpy().copy())
    return {**{f"steps/gradients/{name}": x for name, x in gradients.items()},
            **{f"steps/weights/{name}": np.stack(x) for name, x in weights.items()}}


def curve(steps, rng):
    model, _, _ = paligemma(GEMMA, 1)
    stored = load_file(FOLDER / "paligemma1.safetensors")["weights/language_model.model.embed_tokens.weight"]
    assert np.array_equal(model.get_input_embeddings().weight.detach().numpy(), stored), "run make_golden.py first"
    model.zero_grad()
    adamw, schedule = optimizer(list(model.parameters()), steps)
    side, patches = VISION["image_size"], (VISION["image_size"] // VISION["patch_size"]) ** 2
    rows = {"ids": np.zeros((steps, 2, 8), np.uint8), "lengths": [], "prompt_lengths": [], "loss": [], "length": []}
    pixels = rng.uniform(-1, 1, (steps, 2, 3, side, side)).astype(np.float16)
    for i in range(steps):
        prompts = [[BOS, *rng.integers(6, 40, n), NEWLINE] for n in rng.integers(0, 3, 2)]
        suffixes = [[*rng.integers(6, 40, n), EOS] for n in rng.integers(0, 4, 2)]
        for row, prompt, suffix in zip(rows["ids"][i], prompts, suffixes):
            row[:len(prompt) + len(suffix)] = prompt + suffix
        inputs = batch(prompts, suffixes, patches, "right")
        loss = model(pixel_values=torch.tensor(pixels[i].astype(np.float64)), **inputs).loss
        adamw.zero_grad()
        loss.backward()
        length = clip_grad_norm_(model.parameters(), float("inf"))  # only measures
        for p in model.parameters():
            if p.grad is not None:
                p.grad *= min(1, SETTINGS["clip"] / length)
        adamw.step()
        schedule.step()
        rows["prompt_lengths"].append([len(prompt) for prompt in prompts])
        rows["lengths"].append([len(prompt) + len(suffix) for prompt, suffix in zip(prompts, suffixes)])
        rows["loss"].append(loss.item())
        rows["length"].append(length.item())
    print("losses", np.round(rows["loss"], 3), "gradients", np.round(rows["length"], 3))
    return {"curve/pixels": pixels, **{f"curve/{name}": np.array(x) for name, x in rows.items()}}


if __name__ == "__main__":
    with NoFloat32():
        tensors = {**given_gradients(20, np.random.default_rng(1)), **curve(10, np.random.default_rng(2))}
    metadata = {"format": "minipali golden", "version": VERSION, "settings": json.dumps(SETTINGS),
                "written_by": f"transformers {transformers.__version__}, torch {torch.__version__}"}
    path = FOLDER / "adamw.safetensors"
    path.write_bytes(save(tensors, metadata))
    print(f"{path.name}: {len(tensors)} tensors, {path.stat().st_size:,} bytes")
