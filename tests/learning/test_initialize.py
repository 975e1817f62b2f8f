"""The weights that training starts from."""
import itertools
import math

import numpy as np
import pytest
from small_models import PALIGEMMA_2, SIGLIP_CONFIG
from small_stages import tokenizer

from minipali.checkpoint.config import parse_config
from minipali.checkpoint.tensors import flatten, param_shapes
from minipali.learning.initialize import line_waves, order_locations, random_params, waves
from minipali.model.paligemma import forward, image_features
from minipali.small_world.vocabulary import ROWS
from minipali.trace import record


@pytest.mark.parametrize("config", [PALIGEMMA_2, SIGLIP_CONFIG], ids=["paligemma", "siglip"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_random_params(config, dtype):
    """Matrices keep the size of what goes through them; norms, biases and SigLIP's scalars start where they should."""
    cfg = parse_config(config)
    params = flatten(random_params(cfg, np.random.default_rng(3), dtype))
    assert {name: x.shape for name, x in params.items()} == param_shapes(cfg)
    assert all(x.dtype == dtype for x in params.values())
    readers = [x.ravel() * np.sqrt(x.shape[1]) for name, x in params.items()
               if name.endswith(("q_proj.weight", "fc1.weight", "gate_proj.weight"))]
    assert abs(np.concatenate(readers).std() - 1) < 0.1
    for name, x in params.items():
        if name.startswith("logit"):
            assert x == pytest.approx(np.log(10) if name == "logit_scale" else -10)
        elif x.ndim == 1:
            vision_norm = "norm" in name and not name.startswith("language_model") and name.endswith(".weight")
            assert (x == (1 if vision_norm else 0)).all(), name
    again = flatten(random_params(cfg, np.random.default_rng(3), dtype))
    assert all((again[name] == x).all() for name, x in params.items())


def deep_config():
    base = {"vision_config": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 6,
                              "num_attention_heads": 4, "image_size": 28, "patch_size": 7, "vision_use_head": False},
            "text_config": {"model_type": "gemma", "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3,
                            "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 300}}
    return parse_config({"model_type": "paligemma", "image_token_index": 299, **base})


def test_signals_keep_their_size_through_depth():
    """Every activation between layers has a spread of the order of 1, in both towers, before any training."""
    cfg, rng = deep_config(), np.random.default_rng(0)
    params = random_params(cfg, rng)
    pixels = rng.uniform(-1, 1, (4, 3, 28, 28)).astype(np.float32)
    ids = rng.integers(0, 290, (4, 9))
    with record() as activations:
        features = image_features(pixels, params, cfg)
        out = forward(features, ids, np.full(4, 9), np.full(4, 20), params, cfg)
    spreads = {name: float(x.std()) for name, x in activations.items()
               if name.rpartition(".")[0].endswith("layers") or name == "multi_modal_projector"}
    assert len(spreads) == 10
    assert all(0.3 < spread < 3 for spread in spreads.values()), spreads
    assert 0.3 < out.std() < 3
    assert all(x.dtype == np.float32 for x in flatten(params).values())


def test_norms_start_as_the_identity():
    """LayerNorm's scale is stored as it is, Gemma's as what is added to 1."""
    flat = flatten(random_params(deep_config(), np.random.default_rng(0)))
    for name, x in flat.items():
        if name.endswith("bias"):
            assert not x.any(), name
        elif "norm" in name:
            assert (x == (0 if name.startswith("language_model") else 1)).all(), name
        else:
            assert x.std() > 0, name


def cosines(table):
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    return unit @ unit.T


def test_waves_make_neighbors_alike():
    """In the table of patches, those beside and below are nearer than those further off, and no two are the same."""
    table = waves(49, 32)
    assert table.shape == (49, 32)
    near = cosines(table)
    for patch in (0, 24, 30):
        row, column = divmod(patch, 7)
        order = np.argsort(-near[patch], kind="stable")[1:4] if patch else np.argsort(-near[patch], kind="stable")[1:3]
        assert all(abs(other // 7 - row) + abs(other % 7 - column) == 1 for other in order), (patch, order)
    assert (near - np.eye(49)).max() < 0.999
    assert np.allclose(near, near.T)
    assert waves(7, 10).shape == (7, 10), "sizes that do not divide leave zeros"


def test_line_waves_make_close_numbers_alike():
    table = line_waves(1024, 64, 2048)
    near = cosines(table)
    assert np.allclose(np.linalg.norm(table, axis=1), 1)
    assert (np.diff(near[500, 500:506]) < 0).all(), "likeness falls at once, and on the whole goes on falling"
    means = [near[500, 500 + d:500 + 2 * d].mean() for d in (1, 2, 4, 8, 16, 32, 64, 128, 256)]
    assert all(a > b for a, b in itertools.pairwise(means))
    assert line_waves(3, 5, 8).shape == (3, 5)
    assert not line_waves(3, 5, 8)[:, 4].any()


def test_locations_start_in_order():
    """Rows of <loc> turn into points along a line, and no other row changes."""
    table = np.random.default_rng(0).standard_normal((ROWS, 128)) / math.sqrt(128)
    params = {"language_model": {"model": {"embed_tokens": {"weight": table.copy()}}}}
    order_locations(params, tokenizer())
    ordered = params["language_model"]["model"]["embed_tokens"]["weight"]
    first = tokenizer().id_of("<loc0000>")
    others = np.r_[0:first, first + 1024:ROWS]
    assert np.array_equal(ordered[others], table[others])
    near = cosines(ordered[first:first + 1024])
    assert np.diagonal(near, 5).mean() > np.diagonal(near, 200).mean() + 0.1
    spread = np.linalg.norm(ordered[first:first + 1024], axis=1).mean() / np.linalg.norm(table, axis=1).mean()
    assert 0.8 < spread < 1.2, "they are neither louder nor quieter than the other words"
    assert abs(np.diagonal(cosines(table[first:first + 1024]), 5).mean()) < 0.05


@pytest.mark.parametrize("config", [None, SIGLIP_CONFIG], ids=["paligemma", "siglip"])
def test_what_writes_into_the_residual_stream_starts_smaller(config):
    """By √(2L) than what reads from it, L being the layers of its own tower; and every matrix by its inputs."""
    cfg = parse_config(config) if config else deep_config()
    samples = [flatten(random_params(cfg, np.random.default_rng(seed))) for seed in range(20)]
    checked = 0
    for name, shape in param_shapes(cfg).items():
        if len(shape) != 2 or "position_embedding" in name:
            continue
        text = name.startswith(("language_model", "text_model"))
        layers = (cfg.text_config if text else cfg.vision_config).num_hidden_layers
        writes = name.removesuffix(".weight").endswith(("out_proj", "fc2", "o_proj", "down_proj"))
        expected = 1 / math.sqrt(shape[1] * (2 * layers if writes else 1))
        assert np.std([sample[name] for sample in samples]) == pytest.approx(expected, rel=0.1), name
        checked += writes
    assert checked >= 4


def test_tables_of_positions():
    """Patches start as waves, the positions of captions and the pooling head's probe at random."""
    cfg = deep_config()
    table = flatten(random_params(cfg, np.random.default_rng(0)))[
        "vision_tower.vision_model.embeddings.position_embedding.weight"]
    assert np.array_equal(table, waves(*table.shape).astype(np.float32))
    pair = [flatten(random_params(parse_config(SIGLIP_CONFIG), np.random.default_rng(seed))) for seed in range(40)]
    for name in ("text_model.embeddings.position_embedding.weight", "vision_model.head.probe"):
        assert np.std([sample[name] for sample in pair]) == pytest.approx(0.2, rel=0.1)
