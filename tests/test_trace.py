"""What a recording keeps: the prefill by default; attention weights, every step of decoding or a choice on request."""
import numpy as np
import pytest
from helpers import assert_close, random_batch, random_params, random_pixels
from small_models import model_config

from minipali.model import paligemma
from minipali.model.gemma import KVCache
from minipali.trace import ATTENTION, record, tap

LAYER = "language_model.model.layers.1"


def run(cfg, steps):
    """A prefill of two rows and some steps of decoding, one token each."""
    rng = np.random.default_rng(0)
    p, pixels = random_params(cfg, rng), random_pixels(cfg, 2, rng)
    ids, lengths, prompt_lengths = random_batch(cfg, 2, rng)
    features = paligemma.image_features(pixels, p, cfg)
    cache = KVCache(features, 2, 60, cfg.text_config)
    paligemma.prefill(features, ids[:, :prompt_lengths.max()], prompt_lengths, p, cfg, cache)
    for step in range(steps):
        paligemma.decode(ids[:, step:step + 1], p, cfg, cache)
    return prompt_lengths + cfg.vision_config.num_patches


@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
def test_attention_is_kept_on_request(kind):
    cfg = model_config(kind)
    with record() as plain:
        run(cfg, 0)
    with record(attention=True) as full:
        prefix = run(cfg, 0)
    extra = [name for name in full if name not in plain]
    assert list(plain) == [name for name in full if name in plain]
    assert extra == [*(f"vision_tower.vision_model.encoder.layers.{i}.self_attn.{ATTENTION}" for i in range(1)),
                     *(f"language_model.model.layers.{i}.self_attn.{ATTENTION}" for i in range(2))]
    weights = full[f"{LAYER}.self_attn.{ATTENTION}"]
    assert weights.shape == (2, 12, prefix.max(), prefix.max())
    for row, length in zip(weights, prefix):
        assert_close("each query shares out one", row[:, :length].sum(-1), np.ones((12, length)), "formula")
        assert not row[:, :length, length:].any()
    names = list(full)
    assert names.index(f"{LAYER}.self_attn.v_proj") < names.index(f"{LAYER}.self_attn.{ATTENTION}")
    assert names.index(f"{LAYER}.self_attn.{ATTENTION}") < names.index(f"{LAYER}.self_attn.o_proj")


def test_every_step_is_kept_on_request():
    """A list under each name: the prefill first, which is what a plain recording holds, then one token a step."""
    cfg = model_config("gemma")
    with record() as plain:
        run(cfg, 3)
    with record(steps=True, attention=True) as steps:
        prefix = run(cfg, 3).max()
    assert [x.shape[1] for x in steps[f"{LAYER}.mlp"]] == [prefix, 1, 1, 1]
    assert [x.shape[2:] for x in steps[f"{LAYER}.self_attn.{ATTENTION}"]] == [
        (prefix, prefix), (1, prefix + 1), (1, prefix + 2), (1, prefix + 3)]
    assert [x.shape for x in steps["logits"]] == [(2, 31), (2, 1, 31), (2, 1, 31), (2, 1, 31)]
    assert set(plain) < set(steps) and all((steps[name][0] == x).all() for name, x in plain.items())
    assert len(steps["multi_modal_projector"]) == 1


def test_a_choice_is_kept():
    with record(attention=True, only=lambda name: name.endswith((".q_proj", ATTENTION))) as chosen:
        run(model_config("gemma"), 1)
    assert {name.rpartition(".")[2] for name in chosen} == {"q_proj", ATTENTION} and len(chosen) == 6


def test_what_is_recorded_is_not_touched_later():
    """Arrays are kept, not copied: nothing that runs later may write into them."""
    cfg = model_config("gemma2")
    with record(steps=True, attention=True) as first:
        run(cfg, 1)
    copies = {name: [x.copy() for x in xs] for name, xs in first.items()}
    run(cfg, 2)
    for name, xs in first.items():
        assert all((x == copy).all() for x, copy in zip(xs, copies[name])), name


def test_the_last_one_asked_records():
    with record() as outer, record(steps=True) as inner:
        tap("x", 1)
        tap("x", 2)
    assert (outer, inner) == ({}, {"x": [1, 2]})
