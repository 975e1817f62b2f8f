"""The model as a whole: what may see what, the cache, batches, the trace."""
import weakref

import numpy as np
import pytest
from helpers import (
    assert_close,
    paligemma_configs,
    random_batch,
    random_params,
    random_pixels,
    seeds,
    siglip_configs,
    valid_positions,
)
from hypothesis import given
from hypothesis import strategies as st
from small_models import model_config

from minipali import trace
from minipali.model import gemma, ops, paligemma, siglip
from minipali.model.gemma import KVCache, output_logits
from minipali.trace import record, scope, tap


def all_logits(features, ids, lengths, prompt_lengths, p, cfg):
    """Scores after every text position, without a cache."""
    x = paligemma.forward(features, ids, lengths, prompt_lengths + features.shape[1], p, cfg)
    return output_logits(x, paligemma.output_head(p, cfg), cfg.text_config)


def setting(cfg, seed, batch, dtype=np.float64):
    """Parameters, picture tokens and an uneven batch of text."""
    rng = np.random.default_rng(seed)
    p = random_params(cfg, rng, dtype)
    features = paligemma.image_features(random_pixels(cfg, batch, rng, dtype), p, cfg)
    return rng, p, features, *random_batch(cfg, batch, rng)


# --- the cache --------------------------------------------------------------------------------------------------------

@given(paligemma_configs(), seeds, st.integers(1, 3), st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_cache_in_any_pieces_is_no_cache(cfg, seed, batch, chunks):
    """A padded batch, its suffix in drawn pieces, against each row alone in one piece without a cache."""
    rng, p, features, ids, _, prompt_lengths = setting(cfg, seed, batch)
    suffix = rng.integers(0, cfg.text_config.vocab_size, (batch, sum(chunks)))
    T, P = prompt_lengths.max(), features.shape[1]
    cache = KVCache(features, batch, P + T + sum(chunks), cfg.text_config)
    cached = [paligemma.prefill(features, ids[:, :T], prompt_lengths, p, cfg, cache)[:, None]]
    for piece in np.split(suffix, np.cumsum(chunks)[:-1], axis=1):
        cached.append(paligemma.decode(piece, p, cfg, cache))
    cached = np.concatenate(cached, 1)
    for i, n in enumerate(prompt_lengths):
        row = np.concatenate([ids[i, :n], suffix[i]])[None]
        whole = all_logits(features[i:i + 1], row, [row.shape[1]], prompt_lengths[i:i + 1], p, cfg)
        assert_close(f"row {i}", cached[i], whole[0, n - 1:], "reordered")


@given(paligemma_configs(), seeds)
def test_a_prefix_in_two_pieces_is_refused(cfg, seed):
    _, p, features, ids, _, _ = setting(cfg, seed, 1)
    cache = KVCache(features, 1, 50, cfg.text_config)
    paligemma.prefill(features, ids[:, :1], [1], p, cfg, cache)
    with pytest.raises(ValueError, match="one call"):
        paligemma.prefill(features[:, :0], ids[:, :1], [1], p, cfg, cache)


@given(paligemma_configs(), seeds)
def test_the_cache_declares_all_that_it_holds(cfg, seed):
    """No attribute appears later on than in the class itself, and prefill and decode say how far the answer is."""
    _, p, features, ids, _, _ = setting(cfg, seed, 1)
    cache = KVCache(features, 1, 50, cfg.text_config)
    declared = set(vars(cache))
    paligemma.prefill(features, ids[:, :1], [1], p, cfg, cache)
    assert (cache.prefix_len.tolist(), cache.written) == ([features.shape[1] + 1], 0)
    paligemma.decode(ids[:, :1], p, cfg, cache)
    assert cache.written == 1 and set(vars(cache)) == declared


@given(paligemma_configs(), seeds)
def test_a_full_cache_is_refused(cfg, seed):
    _, p, features, ids, _, _ = setting(cfg, seed, 1)
    cache = KVCache(features, 1, features.shape[1] + 1, cfg.text_config)
    paligemma.prefill(features, ids[:, :1], [1], p, cfg, cache)
    with pytest.raises(ValueError, match="cache holds"):
        paligemma.decode(ids[:, :1], p, cfg, cache)


@given(paligemma_configs(), seeds, st.sampled_from([np.float32, np.float64]))
def test_dtype_from_end_to_end(cfg, seed, dtype):
    """Every activation, the cache and the logits are in the dtype of weights and pixels; nothing given is changed."""
    rng = np.random.default_rng(seed)
    p, pixels = random_params(cfg, rng, dtype), random_pixels(cfg, 2, rng, dtype)
    ids, lengths, prompt_lengths = random_batch(cfg, 2, rng)
    given_arrays = [pixels, ids, lengths, prompt_lengths, *leaves(p)]
    copies = [x.copy() for x in given_arrays]
    with record() as activations:
        features = paligemma.image_features(pixels, p, cfg)
        all_logits(features, ids, lengths, prompt_lengths, p, cfg)
        cache = KVCache(features, 2, 50, cfg.text_config)
        paligemma.prefill(features, ids[:, :prompt_lengths.max()], prompt_lengths, p, cfg, cache)
        paligemma.decode(ids[:, :1], p, cfg, cache)
    assert {x.dtype for x in [*activations.values(), *cache.keys, *cache.values]} == {np.dtype(dtype)}
    assert all(np.array_equal(x, copy) for x, copy in zip(given_arrays, copies))


def leaves(tree):
    """All arrays of a tree."""
    for child in tree.values() if isinstance(tree, dict) else tree:
        yield from leaves(child) if isinstance(child, (dict, list)) else [child]


# --- who sees whom ----------------------------------------------------------------------------------------------------

@given(paligemma_configs(), seeds, st.integers(2, 3))
def test_a_padded_batch_is_its_rows(cfg, seed, batch):
    """And what stands in the padding changes not one bit."""
    rng, p, features, ids, lengths, prompt_lengths = setting(cfg, seed, batch)
    together = all_logits(features, ids, lengths, prompt_lengths, p, cfg)
    is_text = valid_positions(lengths, ids.shape[1])
    garbage = np.where(is_text, ids, rng.integers(0, cfg.text_config.vocab_size, ids.shape))
    assert (all_logits(features, garbage, lengths, prompt_lengths, p, cfg)[is_text] == together[is_text]).all()
    for i, n in enumerate(lengths):
        alone = all_logits(features[i:i + 1], ids[i:i + 1, :n], [n], prompt_lengths[i:i + 1], p, cfg)
        assert_close(f"row {i}", together[i, :n], alone[0], "reordered")


@given(paligemma_configs(), seeds, st.data())
def test_a_suffix_token_changes_nothing_before_it(cfg, seed, data):
    """Bit for bit; and it does change its own position's scores. A prompt token changes the prompt's first position,
    but for a plain Gemma, which reads its prompt as it writes: from left to right."""
    _, p, features, ids, lengths, prompt_lengths = setting(cfg, seed, 1)
    before = all_logits(features, ids, lengths, prompt_lengths, p, cfg)[0]
    changed = data.draw(st.integers(0, lengths[0] - 1))
    other = ids.copy()
    other[0, changed] = 2 + (other[0, changed] - 1) % (cfg.text_config.vocab_size - 3)
    after = all_logits(features, other, lengths, prompt_lengths, p, cfg)[0]
    moved = (before != after).any(-1)
    if changed >= prompt_lengths[0] or not cfg.text_config.prefix_lm:
        assert not moved[:changed].any()
    else:
        assert moved[0]
    assert moved[changed]


@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
def test_the_picture_sees_the_question(kind):
    """Changing the prompt changes the picture's own tokens inside the decoder, from the first layer on."""
    cfg = model_config(kind)
    _, p, features, ids, lengths, prompt_lengths = setting(cfg, 0, 1)
    seen = []
    for last in (7, 8):
        ids[0, prompt_lengths[0] - 1] = last
        with record() as activations:
            all_logits(features, ids, lengths, prompt_lengths, p, cfg)
        seen.append(activations["language_model.model.layers.0"][0, :features.shape[1]])
    assert (seen[0] != seen[1]).any(-1).all()


def test_text_is_scaled_by_the_root_of_the_width():
    """√20 in full, not rounded to the dtype that the weights were stored in."""
    cfg = model_config("gemma").text_config
    table = np.random.default_rng(0).standard_normal((cfg.vocab_size, cfg.hidden_size))
    x = gemma.embed_tokens(np.array([[3, 30]]), {"embed_tokens": {"weight": table}}, cfg)
    assert_close("embeddings", x, table[[[3, 30]]] * 20**0.5, "formula")


@given(paligemma_configs(), seeds)
def test_the_output_head_is_the_table_only_if_tied(cfg, seed):
    p = random_params(cfg, np.random.default_rng(seed))
    module = p["language_model"]["model"]["embed_tokens"] if cfg.tie_word_embeddings else p["language_model"]["lm_head"]
    assert paligemma.output_head(p, cfg) is module["weight"]


def test_text_alone_needs_no_picture():
    """No picture is a picture of no tokens."""
    cfg = model_config("gemma")
    _, p, features, ids, lengths, prompt_lengths = setting(cfg, 0, 2)
    logits = all_logits(features[:, :0], ids, lengths, prompt_lengths, p, cfg)
    assert logits.shape == (*ids.shape, cfg.text_config.vocab_size)
    assert (logits != all_logits(features, ids, lengths, prompt_lengths, p, cfg)).any()


def test_the_picture_is_looked_at_once(monkeypatch):
    """One run of the vision tower makes the features; prefill and every decoded token do without."""
    cfg, calls = model_config("gemma"), []
    tower = paligemma.vision_tower
    monkeypatch.setattr(paligemma, "vision_tower", lambda *args: calls.append(1) or tower(*args))
    _, p, features, ids, _, _ = setting(cfg, 0, 1)
    cache = KVCache(features, 1, 50, cfg.text_config)
    logits = paligemma.prefill(features, ids[:, :2], [2], p, cfg, cache)
    for _ in range(3):
        logits = paligemma.decode(logits.reshape(1, 1, -1).argmax(-1), p, cfg, cache)
    assert len(calls) == 1


@given(siglip_configs(), seeds)
def test_patches_without_positions_have_no_order(cfg, seed):
    """Without its position table the tower cannot tell where a patch lies: permuted patches give permuted tokens."""
    rng = np.random.default_rng(seed)
    p, size = random_params(cfg, rng)["vision_model"], cfg.vision_config.patch_size
    x = rng.standard_normal((2, cfg.vision_config.num_patches, 3 * size * size))
    kernel = p["embeddings"]["patch_embedding"]["weight"]
    order = rng.permutation(x.shape[1])
    tokens = ops.linear(x, kernel.reshape(kernel.shape[0], -1))
    y = siglip.encoder(tokens, p["encoder"], cfg.vision_config)
    assert_close("tokens", siglip.encoder(tokens[:, order], p["encoder"], cfg.vision_config), y[:, order], "reordered")


@given(siglip_configs(), seeds)
def test_siglip_rows_do_not_mix(cfg, seed):
    """A picture's and a caption's vector are the same alone and in a batch."""
    rng = np.random.default_rng(seed)
    p, pixels = random_params(cfg, rng), random_pixels(cfg, 3, rng)
    ids = rng.integers(0, cfg.text_config.vocab_size, (3, cfg.text_config.max_position_embeddings))
    images, texts = siglip.encode_image(pixels, p, cfg), siglip.encode_text(ids, p, cfg)
    assert_close("image", siglip.encode_image(pixels[1:2], p, cfg), images[1:2], "reordered")
    assert_close("text", siglip.encode_text(ids[1:2], p, cfg), texts[1:2], "reordered")


# --- the trace --------------------------------------------------------------------------------------------------------

def test_trace_names_what_it_records():
    with record() as activations:
        with scope("layers", 0):
            tap("mlp", 1)
        with scope("a", "b"), scope("c"):
            tap("d", 2)
        tap("end", 3)
    assert activations == {"layers.0.mlp": 1, "a.b.c.d": 2, "end": 3}


def test_trace_is_put_back_after_an_error():
    """The path and the recorder are as before, so the next recording has right names."""
    with pytest.raises(RuntimeError), record(), scope("layers"):
        raise RuntimeError
    with record() as activations:
        tap("x", 1)
    assert activations == {"x": 1}


def test_recordings_nest():
    with record() as outer:
        with record() as inner:
            tap("x", 1)
        tap("y", 2)
    assert (outer, inner) == ({"y": 2}, {"x": 1})


def test_trace_keeps_nothing_unless_asked():
    """A tap gives back the very array; without a recorder nothing holds on to it."""
    x = np.ones(3)
    assert tap("x", x) is x
    alive = weakref.ref(x)
    del x
    assert alive() is None
    with record() as activations:
        tap("x", np.ones(3))
    assert list(activations) == ["x"] and tap("y", 1) == 1 and list(activations) == ["x"]
    assert trace._recorder is None and trace._path == []


def test_recording_changes_nothing():
    cfg = model_config("gemma2")
    _, p, features, ids, lengths, prompt_lengths = setting(cfg, 0, 2)
    plain = all_logits(features, ids, lengths, prompt_lengths, p, cfg)
    with record():
        assert (all_logits(features, ids, lengths, prompt_lengths, p, cfg) == plain).all()
