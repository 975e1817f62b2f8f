"""Cross-entropy and the two contrastive losses: what must hold for any batch, beside the plain way to write them."""
import math

import numpy as np
import pytest
from helpers import assert_close, seeds
from hypothesis import given
from hypothesis import strategies as st

from minipali.model import losses

batches, widths = st.integers(1, 6), st.integers(2, 5)
one = np.ones(1)


def pairs(seed, batch, width):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, batch, width))


def both_losses(images, texts, log_scale=0.7, bias=-1.5):
    scale, bias = log_scale * one, bias * one
    return losses.clip_loss(images, texts, scale), losses.siglip_loss(images, texts, scale, bias)


@given(seeds, batches, widths)
def test_cross_entropy_picks_the_target(seed, rows, vocabulary):
    rng = np.random.default_rng(seed)
    logits, targets = rng.standard_normal((rows, vocabulary)), rng.integers(0, vocabulary, rows)
    expected = [-math.log(math.exp(row[t]) / sum(map(math.exp, row))) for row, t in zip(logits, targets)]
    assert_close("cross_entropy", losses.cross_entropy(logits, targets), np.array(expected), "formula", scale=1)


def test_cross_entropy_of_hopeless_logits_is_finite():
    logits = np.array([[0.0, -1e30, 1e30]], np.float32)
    assert losses.cross_entropy(logits, np.array([2])) == 0
    assert np.isfinite(losses.cross_entropy(logits, np.array([0]))).all()


@given(seeds, batches, widths, st.floats(0.01, 100))
def test_similarity_is_a_scaled_cosine(seed, batch, width, loud):
    """Lengths do not count, exp(log_scale) does."""
    images, texts = pairs(seed, batch, width)
    table = losses.similarity(images, texts, 0.3 * one)
    cosine = [[i @ t / math.sqrt(i @ i * (t @ t)) for t in texts] for i in images]
    assert_close("table", table, math.exp(0.3) * np.array(cosine), "formula", scale=1)
    assert_close("louder", losses.similarity(loud * images, texts, 0.3 * one), table, "formula", scale=1)
    assert_close("length", (losses.l2_normalize(images)**2).sum(-1), np.ones(batch), "formula")


@given(seeds, batches, widths)
def test_losses_are_their_definitions(seed, batch, width):
    """Written out pair by pair: SigLIP sums over all pairs and divides by B (not by B²), CLIP averages 2 B choices."""
    images, texts = pairs(seed, batch, width)
    table = losses.similarity(images, texts, 0.7 * one)
    clip, siglip = both_losses(images, texts)
    choices = [[line[i] - math.log(sum(map(math.exp, line))) for i, line in enumerate(t)] for t in (table, table.T)]
    assert_close("clip", clip, np.array(-np.sum(choices) / (2 * batch)), "formula", scale=1)
    answers = [math.log1p(math.exp(-(1 if i == j else -1) * (table[i, j] - 1.5))) for i, j in np.ndindex(table.shape)]
    assert_close("siglip", siglip, np.array(sum(answers) / batch), "formula", scale=1)


@given(seeds, batches, widths)
def test_order_of_the_pairs_does_not_matter(seed, batch, width):
    images, texts = pairs(seed, batch, width)
    order = np.random.default_rng(seed).permutation(batch)
    for name, a, b in zip(["clip", "siglip"], both_losses(images, texts), both_losses(images[order], texts[order])):
        assert_close(name, b, a, "formula", scale=1)


@given(seeds, batches, widths)
def test_pictures_and_captions_have_equal_rights(seed, batch, width):
    images, texts = pairs(seed, batch, width)
    for name, a, b in zip(["clip", "siglip"], both_losses(images, texts), both_losses(texts, images)):
        assert_close(name, b, a, "formula", scale=1)


@given(seeds, st.integers(2, 6), widths)
def test_right_pairs_cost_less_than_shuffled_ones(seed, batch, width):
    images, _ = pairs(seed, batch, width)
    for right, wrong in zip(both_losses(images, images), both_losses(images, np.roll(images, 1, 0))):
        assert right < wrong


@given(seeds, batches, widths, st.sampled_from([np.float32, np.float64]))
def test_pieces_of_any_size_give_the_whole(seed, batch, width, dtype):
    """SigLIP's loss needs no more of the table than B × chunk at a time."""
    images, texts = pairs(seed, batch, width).astype(dtype)
    scale, bias = one.astype(dtype), -one.astype(dtype)
    whole = losses.siglip_loss(images, texts, scale, bias)
    for chunk in range(1, batch + 2):
        piecewise = losses.siglip_loss_chunked(images, texts, scale, bias, chunk)
        assert piecewise.dtype == dtype
        assert_close(f"in pieces of {chunk}", piecewise, whole, "reordered", scale=max(1, float(whole)))


@given(seeds, widths)
def test_a_batch_of_one(seed, width):
    """CLIP has nothing to choose from and costs 0; SigLIP still asks its one question."""
    images, texts = pairs(seed, 1, width)
    clip, siglip = both_losses(images, texts)
    assert clip == 0
    score = losses.similarity(images, texts, 0.7 * one)[0, 0] - 1.5
    assert_close("siglip", siglip, np.array(math.log1p(math.exp(-score))), "formula", scale=1)


def test_bias_starts_at_no():
    """With a bias far below 0 all B² - B wrong pairs cost nothing and each right one costs its distance to 0."""
    images, texts = pairs(0, 4, 3)
    table = losses.similarity(images, texts, 0 * one)
    loss = losses.siglip_loss(images, texts, 0 * one, -50 * one)
    assert_close("siglip", loss, 50 - np.trace(table) / 4, "formula")


@pytest.mark.parametrize("log_scale", [4.6, 9.0])
def test_large_similarities_stay_finite(log_scale):
    """At CLIP's largest scale, 100, float32's exp overflows in the formula as it is written, not in ours."""
    images, texts = pairs(0, 5, 3).astype(np.float32)
    scale = np.array([log_scale], np.float32)
    table = losses.similarity(images, images, scale)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        naive = -np.log(np.exp(table) / np.exp(table).sum(-1, keepdims=True))
    assert not np.isfinite(naive).all()
    assert np.isfinite(losses.clip_loss(images, texts, scale))
    assert np.isfinite(losses.siglip_loss(images, texts, scale, scale))
    assert losses.clip_loss(images, images, scale) < 1e-3


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dtype_is_kept_and_inputs_are_not_touched(dtype):
    images, texts = pairs(0, 4, 3).astype(dtype)
    scale, bias = np.array([2], dtype), np.array([-3], dtype)
    args = [images, texts, scale, bias]
    copies = [x.copy() for x in args]
    results = [losses.clip_loss(images, texts, scale), losses.siglip_loss(*args), losses.siglip_loss_chunked(*args, 3),
               losses.cross_entropy(images, np.array([0, 1, 2, 0])), losses.similarity(images, texts, scale)]
    assert {x.dtype for x in results} == {np.dtype(dtype)}
    assert all(np.array_equal(x, copy) for x, copy in zip(args, copies))
