"""LoRA's thin matrices, and matrices that do not learn: the same model, without the gradients that nobody needs."""
import numpy as np
import pytest
from helpers import assert_close, paligemma_configs, random_batch, random_params, random_pixels, seeds
from hypothesis import given
from hypothesis import strategies as st

from minipali.checkpoint.tensors import flatten, unflatten
from minipali.learning import lora
from minipali.learning.backward import ops, paligemma
from minipali.model import ops as forward


@given(seeds, st.integers(1, 3), st.floats(0.1, 4))
def test_lora_gradients_are_slopes(seed, rank, scale):
    """Of Σ c · (W + s B A), entry by entry, whose gradient with respect to the merged matrix is c; W has none."""
    rng = np.random.default_rng(seed)
    weights = {"a.q_proj.weight": rng.standard_normal((4, 5)), "b.weight": rng.standard_normal((2, 2))}
    adapted = ["a.q_proj.weight"]
    thin = lora.start({"a.q_proj.weight": (4, 5)}, rank, rng, np.float64)
    for name, x in lora.merged(weights, thin, adapted, scale).items():
        assert np.array_equal(np.asarray(x), weights[name])
    thin = {name: rng.standard_normal(x.shape) for name, x in thin.items()}
    cotangent = rng.standard_normal((4, 5))

    def loss(thin):
        changed = lora.merged(weights, thin, adapted, scale)
        assert changed["b.weight"] is weights["b.weight"]
        return (cotangent * np.sin(np.asarray(changed["a.q_proj.weight"]))).sum()
    merged = np.asarray(lora.merged(weights, thin, adapted, scale)["a.q_proj.weight"])
    grads = lora.pull({"a.q_proj.weight": cotangent * np.cos(merged)}, thin, adapted, scale)
    assert list(grads) == list(thin) == ["a.q_proj.lora_A.weight", "a.q_proj.lora_B.weight"]
    for name, x in thin.items():
        slopes = np.zeros_like(x)
        for at in np.ndindex(x.shape):
            step = np.zeros_like(x)
            step[at] = 1e-6
            slopes[at] = (loss({**thin, name: x + step}) - loss({**thin, name: x - step})) / 2e-6
        assert_close(name, grads[name], slopes, "gradient", scale=max(np.abs(slopes).max(), scale))


@st.composite
def adapted_matrices(draw):
    """An Adapted of random sizes, its sum as an array, and the generator of random numbers."""
    rng = np.random.default_rng(draw(seeds))
    outputs, inputs, rank = (draw(st.integers(1, 5)) for _ in range(3))
    w, a, b = (rng.standard_normal(shape) for shape in ((outputs, inputs), (rank, inputs), (outputs, rank)))
    scale = draw(st.floats(0.1, 4))
    return lora.Adapted(w, a, b, scale), w + scale * (b @ a), rng


@given(adapted_matrices())
def test_a_linear_map_with_lora_is_that_of_the_sum(drawn):
    """y, dx and the gradients of A and B (from dW of the sum, by `pull`), without the sum."""
    matrix, whole, rng = drawn
    assert matrix.shape == whole.shape and matrix.size == whole.size and matrix.dtype == whole.dtype
    assert_close("the sum", np.asarray(matrix), whole, "formula")
    x, bias = rng.standard_normal((2, 3, whole.shape[1])), rng.standard_normal(whole.shape[0])
    dy = rng.standard_normal((2, 3, whole.shape[0]))
    y, pull = ops.linear(x, matrix, bias)
    expected, pull_whole = ops.linear(x, whole, bias)
    assert_close("y", y, expected, "reordered", scale=10)
    (dx, grads), (dx_whole, grads_whole) = pull(dy), pull_whole(dy)
    assert_close("dx", dx, dx_whole, "reordered", scale=10)
    assert np.array_equal(grads["bias"], grads_whole["bias"])
    check_thin(grads, grads_whole["weight"], matrix)
    assert set(grads) == {"bias", "lora_A.weight", "lora_B.weight"}


@given(adapted_matrices())
def test_rows_with_lora_are_those_of_the_sum(drawn):
    """A row that is read twice gets both gradients."""
    table, whole, rng = drawn
    ids = rng.integers(0, whole.shape[0], (2, 6))
    dy = rng.standard_normal((2, 6, whole.shape[1]))
    y, pull = ops.embed(ids, table)
    expected, pull_whole = ops.embed(ids, whole)
    assert_close("rows", y, expected, "reordered", scale=10)
    check_thin(pull(dy), pull_whole(dy)["weight"], table)


def check_thin(grads, dwhole, matrix):
    thin = {"m.lora_A.weight": matrix.a, "m.lora_B.weight": matrix.b}
    expected = lora.pull({"m.weight": dwhole}, thin, ["m.weight"], matrix.scale)
    for name, x in thin.items():
        assert grads[name.removeprefix("m.")].shape == x.shape
        assert_close(name, grads[name.removeprefix("m.")], expected[name], "reordered", scale=30)


@given(paligemma_configs(), seeds, st.booleans())
def test_frozen_matrices_change_no_bit_and_get_no_gradient(cfg, seed, recompute):
    """Whichever they are: the loss and all other gradients are those of arrays; recomputing changes nothing either."""
    rng = np.random.default_rng(seed)
    flat = flatten(random_params(cfg, rng))
    ids, lengths, prompt_lengths = random_batch(cfg, 2, rng)
    pixels, weights = random_pixels(cfg, 2, rng), rng.random(ids.shape) * (rng.random(ids.shape) < 0.5)
    weights[:, 1] = 1

    def run(flat, recompute):
        params = unflatten(flat)
        features, pull_features = paligemma.image_features(pixels, params, cfg, recompute)
        loss, pull = paligemma.suffix_loss(features, ids, lengths, features.shape[1] + prompt_lengths, params, cfg,
                                           weights, recompute)
        dfeatures, grads = pull(1.0)
        dpixels, tower = pull_features(dfeatures)
        return loss, dpixels, flatten({**tower, **grads})
    loss, dpixels, grads = run(flat, False)
    frozen = [name for name, x in flat.items() if x.ndim == 2 and "position" not in name and rng.random() < 0.5]
    wrapped = {name: lora.Frozen(x) if name in frozen else x for name, x in flat.items()}
    again, dpixels_again, fewer = run(wrapped, recompute)
    assert again == loss
    assert np.array_equal(dpixels, dpixels_again)
    assert set(fewer) == set(grads) - set(frozen)
    assert all(np.array_equal(x, grads[name]) for name, x in fewer.items())


def test_recomputing_keeps_the_arguments_alone():
    """The function runs once forward, and once for each pull."""
    calls = []

    def square(x):
        calls.append(x)
        return x * x, lambda dy: 2 * x * dy
    y, pull = ops.recomputed(square)(3.0)
    assert (y, len(calls)) == (9.0, 1)
    assert [pull(1.0), pull(2.0)] == [6.0, 12.0]
    assert calls == [3.0] * 3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_forward_with_frozen_matrices(dtype):
    """The model's own functions take them as they are."""
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((5, 4)).astype(dtype), rng.standard_normal((2, 3, 4)).astype(dtype)
    assert np.array_equal(forward.linear(x, lora.Frozen(w)), forward.linear(x, w))
    assert np.array_equal(forward.embed([[1, 4], [4, 0]], lora.Frozen(w)), forward.embed([[1, 4], [4, 0]], w))
    y = forward.linear(x, lora.Adapted(w, w[:2], w[:, :2], 0.5))
    assert y.dtype == dtype


def test_lora_starts_small_and_by_its_seed():
    thin = lora.start({"q.weight": (200, 400)}, 64, np.random.default_rng(1))
    a, b = thin["q.lora_A.weight"], thin["q.lora_B.weight"]
    assert (a.shape, b.shape, a.dtype, b.dtype) == ((64, 400), (200, 64), np.float32, np.float32)
    assert a.std() == pytest.approx(0.05, rel=0.02)
    assert not b.any()
    again = lora.start({"q.weight": (200, 400)}, 64, np.random.default_rng(1))
    assert np.array_equal(a, again["q.lora_A.weight"])
