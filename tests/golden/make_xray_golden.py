"""Write xray.safetensors.gz: what the X-ray page shows, computed by `transformers` and autograd in float64.

    pip install torch==2.13.0 transformers==5.23.0 safetensors
    python tests/golden/make_xray_golden.py

The models, the picture and the prompt are the first of paligemma1.safetensors and paligemma2.safetensors; the answer is
the one that they give there. Attention is eager, gradients are those of autograd. The tests never run this.

Attention and keys are kept as products with fixed random numbers, so that the file stays small: any wrong entry shows.
"""
import gzip

import make_golden  # lifts what transformers keeps in float32
import numpy as np
import torch
from make_golden import EOS, FOLDER, GEMMA, GEMMA2, IMAGE, VISION
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


def digest(x, axes):
    """The products of the last axes with fixed random numbers."""
    for _ in range(axes):
        x = x @ np.random.default_rng(x.shape[-1]).standard_normal(x.shape[-1])
    return x


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
    scored = PATCHES + len(prompt) - 1 + np.arange(len(answer))
    decoder, encoder = (np.stack([seen[f"{layer}.self_attn"][2][0].detach().numpy() for layer in names])
                        for names in (layers, vision))
    found = {key: x.detach().numpy() for key, x in lens(model, rows, text).items()}
    return {f"{name}/{key}": np.ascontiguousarray(x) for key, x in {
        "answer": np.array(answer, np.uint8),
        "decoder_attention": digest(decoder[:, :, scored].transpose(0, 2, 1, 3), 2),
        "vision_attention": digest(encoder.transpose(0, 2, 1, 3), 2),
        "gradient_times_input": torch.stack(gradients).detach().numpy(),
        "erase.drop": (steps.log_softmax(-1) - after.log_softmax(-1)).gather(-1, chosen).detach().numpy(),
        "lens.top": found["lens.top"].astype(np.uint8), "lens.rank": found["lens.rank"].astype(np.uint8),
        "lens.probability": digest(found["lens.probability"], 1), "lens.final": digest(found["lens.final"], 1),
        # A layer with a sliding window forgets keys here; ours keeps them, and the mask hides them.
        "cache.keys": np.stack([digest(layer.keys[0, :, -3:].detach().numpy().transpose(1, 0, 2), 2)
                                for layer in cache.layers]),
        "cache.bytes": np.array([sum(x.nelement() * x.element_size() for x in (layer.keys, layer.values))
                                 // layer.keys.shape[2] for layer in cache.layers])}.items()}


if __name__ == "__main__":
    with make_golden.NoFloat32():
        found = {**write("paligemma1", GEMMA), **write("paligemma2", GEMMA2)}
    path = FOLDER / "xray.safetensors.gz"
    path.write_bytes(gzip.compress(save(found), mtime=0))
    print(f"{path.name}: {len(found)} tensors, {path.stat().st_size:,} bytes")
