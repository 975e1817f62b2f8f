"""The whole model against `transformers`: every activation, logits, losses and every gradient, by name.

The reference was computed in float64 by tests/golden/make_golden.py over random models whose sizes all differ.
"""
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_close, valid_positions
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load_file

from minipali.checkpoint.config import parse_config
from minipali.checkpoint.tensors import flatten, param_shapes, unflatten
from minipali.decoding.batch import in_one_prompt
from minipali.inputs.image import Preprocessor
from minipali.learning.backward import losses as backward_losses
from minipali.learning.backward import paligemma as backward_paligemma
from minipali.learning.backward import siglip as backward_siglip
from minipali.model import losses, paligemma, siglip
from minipali.model.gemma import KVCache, output_logits
from minipali.trace import record

VERSION = "1"
DTYPES = ["float64", "float32"]
PALIGEMMAS = ["paligemma1", "paligemma2"]
GEMMAS = ["gemma1", "gemma2", "gemma3"]  # the decoders alone


@cache
def golden(name):
    """The file's config and its tensors, in groups: golden(name)[1]["taps"]["vision_model.post_layernorm"]."""
    with safe_open(Path(__file__).parent / "golden" / f"{name}.safetensors", "np") as f:
        metadata, groups = f.metadata(), {}
        for key in sorted(f.keys()):
            group, _, rest = key.partition("/")
            groups.setdefault(group, {})[rest] = f.get_tensor(key)
    assert (metadata["format"], metadata["version"]) == ("minipali golden", VERSION), (
        f"{name}: written as version {metadata['version']}, read as {VERSION}; run: python tests/golden/make_golden.py")
    return parse_config(json.loads(metadata["config"])), groups


def model_of(name, dtype):
    cfg, groups = golden(name)
    params = unflatten({key: w.astype(dtype) for key, w in groups["weights"].items()})
    return cfg, groups, params, groups["inputs"]["pixel_values"].astype(dtype), groups["inputs"]["ids"]


def assert_all_close(ours, reference, kind, scales=()):
    assert set(ours) == set(reference), f"names differ: {sorted(set(ours) ^ set(reference))}"
    for name, ref in reference.items():
        assert_close(name, ours[name], ref, kind, dict(scales).get(name))


def gradient_scales(gradients):
    """A key's bias adds the same to a whole row of scores and softmax takes it out again: its gradient is 0 but for
    rounding, which is measured by the gradient of the key's weight."""
    return {name: np.abs(gradients[name.replace("bias", "weight")]).max()
            for name in gradients if name.endswith("k_proj.bias")}


@pytest.mark.parametrize("name", [*PALIGEMMAS, *GEMMAS, "siglip"])
def test_parameter_names_and_shapes(name):
    """The config states exactly the tensors that the transformers model has."""
    cfg, groups = golden(name)
    assert {key: tuple(shape) for key, shape in param_shapes(cfg).items()} == {
        key: w.shape for key, w in groups["weights"].items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PALIGEMMAS)
def test_paligemma_activations_and_logits(name, dtype):
    cfg, groups, p, pixels, ids = model_of(name, dtype)
    patches, lengths = cfg.vision_config.num_patches, groups["inputs"]["lengths"]
    with record() as activations:
        features = paligemma.image_features(pixels, p, cfg)
        x = paligemma.forward(features, ids, lengths, groups["inputs"]["prompt_lengths"] + patches, p, cfg)
    activations["logits"] = output_logits(x, paligemma.output_head(p, cfg), cfg.text_config)
    is_text = valid_positions(lengths, ids.shape[1])
    is_valid = valid_positions(lengths + patches, patches + ids.shape[1])
    for key, x in activations.items():
        if key in ("logits", "language_model.model.embed_tokens"):
            activations[key] = x[is_text]
        elif key.startswith("language_model."):
            activations[key] = x[is_valid]
    assert_all_close(activations, groups["taps"], "golden")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PALIGEMMAS)
def test_paligemma_loss_and_gradients(name, dtype):
    """The mean over all suffix tokens, as transformers computes it from `labels`."""
    cfg, groups, p, pixels, ids = model_of(name, dtype)
    lengths, prompt_lengths = groups["inputs"]["lengths"], groups["inputs"]["prompt_lengths"]
    weights = (valid_positions(lengths, ids.shape[1]) & ~valid_positions(prompt_lengths, ids.shape[1])).astype(dtype)
    weights /= weights.sum()
    features, pull_features = backward_paligemma.image_features(pixels, p, cfg)
    prefix_len = prompt_lengths + cfg.vision_config.num_patches
    loss, pull = backward_paligemma.suffix_loss(features, ids, lengths, prefix_len, p, cfg, weights)
    dfeatures, grads = pull(1.0)
    grads.update(pull_features(dfeatures)[1])
    assert_close("loss", loss, groups["outputs"]["loss"], "golden")
    assert_all_close(flatten(grads), groups["gradients"], "golden gradient", gradient_scales(groups["gradients"]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PALIGEMMAS)
def test_paligemma_greedy_decoding(name, dtype):
    """Prefill of an uneven batch and cached steps against generate(), whose batch is padded on the other side."""
    cfg, groups, p, pixels, ids = model_of(name, dtype)
    lengths = groups["inputs"]["prompt_lengths"]
    assert_greedy(cfg, groups, p, paligemma.image_features(pixels, p, cfg), ids[:, :lengths.max()], lengths)


def assert_greedy(cfg, groups, p, features, prompts, lengths):
    expected_ids, expected_logits = groups["outputs"]["greedy_ids"], groups["outputs"]["greedy_logits"]
    steps = expected_ids.shape[1]
    cache = KVCache(features, len(prompts), features.shape[1] + prompts.shape[1] + steps, cfg.text_config)
    logits = [paligemma.prefill(features, prompts, lengths, p, cfg, cache)]
    for _ in range(steps - 1):
        logits.append(paligemma.decode(logits[-1].argmax(-1)[:, None], p, cfg, cache)[:, 0])
    assert_close("logits of each step", np.stack(logits, 1), expected_logits, "golden")
    assert (np.stack(logits, 1).argmax(-1) == expected_ids).all()


def text_of(name, dtype):
    """A decoder alone: its config, the file's groups, its parameters, and the picture that there is not, (B,0,D)."""
    cfg, groups = golden(name)
    params = unflatten({key: w.astype(dtype) for key, w in groups["weights"].items()})
    return cfg, groups, params, np.empty((len(groups["inputs"]["ids"]), 0, cfg.text_config.hidden_size), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GEMMAS)
def test_text_activations_and_logits(name, dtype):
    """Whatever is called a prompt, a plain Gemma reads it from left to right."""
    cfg, groups, p, nothing = text_of(name, dtype)
    ids, lengths = groups["inputs"]["ids"], groups["inputs"]["lengths"]
    for prefix_len in [0 * lengths, groups["inputs"]["prompt_lengths"], lengths]:
        with record() as activations:
            x = paligemma.forward(nothing, ids, lengths, prefix_len, p, cfg)
        activations["logits"] = output_logits(x, paligemma.output_head(p, cfg), cfg.text_config)
        valid = valid_positions(lengths, ids.shape[1])
        assert_all_close({key: x[valid] for key, x in activations.items()}, groups["taps"], "golden")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GEMMAS)
def test_text_loss_and_gradients(name, dtype):
    """The mean over all tokens but the first."""
    cfg, groups, p, nothing = text_of(name, dtype)
    ids, lengths = groups["inputs"]["ids"], groups["inputs"]["lengths"]
    weights = valid_positions(lengths, ids.shape[1]).astype(dtype)
    weights /= weights[:, 1:].sum()
    loss, pull = backward_paligemma.suffix_loss(nothing, ids, lengths, lengths, p, cfg, weights)
    assert_close("loss", loss, groups["outputs"]["loss"], "golden")
    assert_all_close(flatten(pull(1.0)[1]), groups["gradients"], "golden gradient")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", GEMMAS)
def test_text_greedy_decoding(name, dtype):
    cfg, groups, p, nothing = text_of(name, dtype)
    ids, lengths = groups["inputs"]["ids"], groups["inputs"]["prompt_lengths"]
    assert_greedy(cfg, groups, p, nothing, ids[:, :lengths.max()], lengths)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PALIGEMMAS)
@pytest.mark.parametrize("count", [2, 3])
def test_several_pictures_in_one_prompt(name, dtype, count):
    """The hub's processor laid these out (make_pictures_golden.py): picture by picture, then BOS, prompt, newline."""
    cfg, _, p, _, _ = model_of(name, dtype)
    reference = load_file(Path(__file__).parent / "golden" / "pictures.safetensors")
    expected_ids, [ids] = reference[f"{count}/{name}/greedy_ids"], reference[f"{count}/input_ids"].tolist()
    preprocessor = Preprocessor(cfg.vision_config.image_size)
    pixels = np.stack([preprocessor(Image.fromarray(picture)) for picture in reference[f"{count}/pictures"]])
    features = paligemma.image_features(pixels.astype(dtype), p, cfg)
    features = in_one_prompt(features[:1], features[1:])
    tokens, prompt = features.shape[1], np.array([ids[features.shape[1]:]])
    assert ids[:tokens] == [cfg.image_token_index] * tokens and prompt[0, 0] == cfg.bos_token_id
    cache = KVCache(features, 1, len(ids) + expected_ids.shape[1], cfg.text_config)
    logits = paligemma.prefill(features, prompt, np.array([prompt.size]), p, cfg, cache)[:, None]
    later = paligemma.decode(expected_ids[:, :-1], p, cfg, cache)
    assert_close("logits of each step", np.concatenate([logits, later], 1),
                 reference[f"{count}/{name}/greedy_logits"], "golden")


@pytest.mark.parametrize("dtype", DTYPES)
def test_siglip_activations(dtype):
    cfg, groups, p, pixels, ids = model_of("siglip", dtype)
    with record() as activations:
        siglip.encode_image(pixels, p, cfg)
        siglip.encode_text(ids, p, cfg)
    assert_all_close(activations, groups["taps"], "golden")


@pytest.mark.parametrize("dtype", DTYPES)
def test_siglip_loss_and_gradients(dtype):
    cfg, groups, p, pixels, ids = model_of("siglip", dtype)
    images, pull_images = backward_siglip.encode_image(pixels, p, cfg)
    texts, pull_texts = backward_siglip.encode_text(ids, p, cfg)
    loss, pull = backward_losses.siglip_loss(images, texts, p["logit_scale"], p["logit_bias"])
    dimages, dtexts, dscale, dbias = pull(1.0)
    grads = {**pull_images(dimages)[1], **pull_texts(dtexts), "logit_scale": dscale, "logit_bias": dbias}
    assert_close("loss", loss, groups["outputs"]["siglip_loss"], "golden")
    assert_all_close(flatten(grads), groups["gradients"], "golden gradient", gradient_scales(groups["gradients"]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_clip_loss_and_gradients(dtype):
    """The other contrastive loss over the same vectors."""
    cfg, groups, p, pixels, ids = model_of("siglip", dtype)
    images, texts = siglip.encode_image(pixels, p, cfg), siglip.encode_text(ids, p, cfg)
    loss, pull = backward_losses.clip_loss(images, texts, p["logit_scale"])
    assert loss == losses.clip_loss(images, texts, p["logit_scale"])
    assert_close("loss", loss, groups["outputs"]["clip_loss"], "golden")
    for name, gradient in zip(["clip_dimages", "clip_dtexts", "clip_dlog_scale"], pull(1.0)):
        assert_close(name, gradient, groups["outputs"][name], "golden gradient")


@pytest.mark.parametrize("name", [*PALIGEMMAS, *GEMMAS])
def test_sizes_all_differ(name):
    """What the comparison rests on: no two sizes are equal, so that no swapped axis passes unseen."""
    cfg, groups = golden(name)
    text, vision, ids = cfg.text_config, cfg.vision_config, groups["inputs"]["ids"]
    sizes = [ids.shape[0], ids.shape[1], text.hidden_size, text.num_key_value_heads, text.num_attention_heads,
             text.head_dim, text.intermediate_size, text.vocab_size, text.num_attention_heads * text.head_dim,
             text.num_key_value_heads * text.head_dim]
    if vision:
        sizes += [vision.num_patches, vision.num_patches + ids.shape[1], vision.hidden_size, vision.intermediate_size]
    assert len(set(sizes)) == len(sizes), sizes
    assert text.num_attention_heads > text.num_key_value_heads > 1
