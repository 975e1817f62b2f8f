"""Write xray.safetensors: what the X-ray page shows, computed by `transformers` and autograd in float64.

    pip install torch==2.13.0 transformers==5.23.0 safetensors
    python tests/golden/make_xray_golden.py

The models, the picture and the prompt are the first of paligemma1.safetensors and paligemma2.safetensors; the answer is
the one that they give there. Attention is eager, gradients are those of autograd. The tests never run this.
"""
import json

import make_golden  # lifts what transformers keeps in float32
import numpy as np
import torch
from make_golden import EOS, FOLDER, GEMMA, GEMMA2, IMAGE, VERSION, VISION
from safetensors.numpy import load_file, save
from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

PATCHES = (VISION["image_size"] // VISION["patch_size"]) ** 2


def load(name, text):
    """The model of a golden file, and the file's tensors."""
    tensors = load_file(FOLDER / f"{name}.safetensors")
    config = PaliGemmaConfig(vision_config=VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
                             text_config=text, image_token_index=IMAGE, projection_dim=text["hidden_size"],
                             bos_token_id=2, eos_token_id=EOS, pad_token_id=0)
    config.vision_config.projection_dim = text["hidden_size"]
    config._attn_implementation = "eager"
    model = PaliGemmaForConditionalGeneration(config)
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.copy_(torch.tensor(tensors[f"weights/{make_golden.checkpoint_name(key)}"].astype(np.float64)))
    return model.eval(), tensors


def run(model, pixels, prompt, answer):
    """One pass over prompt and answer -> logits (T,V), the features, and what was seen by the name of the module."""
    seen, handles = {}, []

    def keep(name, module):
        def hook(module, arguments, keywords, output):
            inputs = arguments[0] if arguments else keywords.get("hidden_states")
            seen[name] = inputs, *(output if isinstance(output, tuple) else (output,))
        handles.append(module.register_forward_hook(hook, with_kwargs=True))

    for name, module in model.named_modules():
        keep(make_golden.checkpoint_name(name), module)
    inputs = make_golden.batch([prompt], [answer], PATCHES, "right")
    output = model(pixel_values=pixels, **inputs, use_cache=True)
    for handle in handles:
        handle.remove()
    return output.logits[0, PATCHES:], seen, output.past_key_values


def lens(model, rows, text):
    """The likeliest token of each row of the stream, its probability, and rank and probability of the final choice."""
    scores = []
    for x in rows:
        logits = model.lm_head(model.model.language_model.norm(x))
        cap = model.config.text_config.to_dict().get("final_logit_softcapping")
        logits = cap * torch.tanh(logits / cap) if cap else logits
        scores.append(logits.softmax(-1)[0, PATCHES:])
    scores = torch.stack(scores)
    final = scores[-1].argmax(-1)
    chosen = scores.gather(-1, final.expand(len(rows), -1)[..., None])
    return {"lens.top": scores.argmax(-1), "lens.probability": scores.max(-1).values,
            "lens.rank": (scores > chosen).sum(-1), "lens.final": chosen[..., 0]}


def write(name, text):
    model, tensors = load(name, text)
    pixels = torch.tensor(tensors["inputs/pixel_values"][:1].astype(np.float64))
    prompt = tensors["inputs/ids"][0, :tensors["inputs/prompt_lengths"][0]].tolist()
    answer = tensors["outputs/greedy_ids"][0].tolist()
    if EOS in answer:
        answer = answer[:answer.index(EOS)]
    logits, seen, cache = run(model, pixels, prompt, answer)
    layers = [f"language_model.model.layers.{i}" for i in range(len(model.model.language_model.layers))]
    vision = [f"vision_tower.vision_model.encoder.layers.{i}" for i in range(VISION["num_hidden_layers"])]
    between = "pre_feedforward_layernorm" if text["model_type"] == "gemma2" else "post_attention_layernorm"
    rows = [seen[layers[0]][0]]
    for layer in layers:
        rows += [seen[f"{layer}.{between}"][0], seen[layer][1]]
    # The newline predicts the first token of the answer; what the last one predicts was not asked for.
    steps = logits[len(prompt) - 1:len(prompt) - 1 + len(answer)]
    features, gradients = seen["multi_modal_projector"][1], []
    for row, chosen in zip(steps, answer):
        others = row.clone()
        others[chosen] = -torch.inf
        gradient, = torch.autograd.grad(row[chosen] - others.logsumexp(-1), features, retain_graph=True)
        gradients.append((gradient * features).sum(-1)[0])
    erased = pixels.clone()
    inside = 2 * VISION["patch_size"]
    erased[..., :inside, :inside] = pixels.mean((2, 3), keepdim=True)
    after, _, _ = run(model, erased, prompt, answer)
    after = after[len(prompt) - 1:len(prompt) - 1 + len(answer)]
    chosen = torch.tensor(answer)[:, None]
    arrays = {"answer": torch.tensor(answer), "logits": steps,
              "decoder_attention": torch.stack([seen[f"{layer}.self_attn"][2][0] for layer in layers]),
              "vision_attention": torch.stack([seen[f"{layer}.self_attn"][2][0] for layer in vision]),
              "gradient_times_input": torch.stack(gradients),
              "erase.drop": (steps.log_softmax(-1) - after.log_softmax(-1)).gather(-1, chosen),
              **lens(model, rows, text)}
    # A layer with a sliding window forgets keys here; ours keeps them, and the mask hides them.
    for i, layer in enumerate(cache.layers):
        arrays[f"cache.keys.{i}"] = layer.keys[0]
        size = sum(x.nelement() * x.element_size() for x in (layer.keys, layer.values))
        arrays[f"cache.bytes.{i}"] = torch.tensor(size)
    return {f"{name}/{key}": np.ascontiguousarray(x.detach().numpy()).reshape(x.shape) for key, x in arrays.items()}


if __name__ == "__main__":
    with make_golden.NoFloat32():
        found = {**write("paligemma1", GEMMA), **write("paligemma2", GEMMA2)}
    metadata = {"format": "minipali golden", "version": VERSION, "models": json.dumps(["paligemma1", "paligemma2"])}
    path = FOLDER / "xray.safetensors"
    path.write_bytes(save(found, metadata))
    print(f"{path.name}: {len(found)} tensors, {path.stat().st_size:,} bytes")
