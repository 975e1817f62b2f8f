"""The building blocks: what must be true of each for any sizes, beside the plain way to write it."""
import math

import numpy as np
import pytest
from helpers import assert_close, seeds
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from minipali.model import ops
from minipali.model.gemma import prefix_lm_mask
from minipali.model.siglip import heads, patchify

sizes = st.integers(1, 6)
floats32 = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


# --- softmax and its relatives ----------------------------------------------------------------------------------------

@given(seeds, sizes, sizes, st.floats(-1e3, 1e3))
def test_softmax_ignores_a_constant(seed, rows, n, c):
    x = normal(seed, rows, n)
    assert np.abs(ops.softmax(x + c) - ops.softmax(x)).max() <= np.finfo(float).eps * (1 + abs(c) + np.abs(x).max())


@given(hnp.arrays(np.float32, hnp.array_shapes(max_dims=3, max_side=5), elements=floats32))
def test_softmax_of_any_finite_numbers(x):
    """Up to the largest float32: finite, not negative, rows sum to 1. (Only x - max may overflow, to -inf.)"""
    with np.errstate(over="ignore"):
        y = ops.softmax(x)
    assert y.dtype == np.float32 and y.shape == x.shape
    assert np.isfinite(y).all() and (y >= 0).all()
    assert np.abs(y.astype(np.float64).sum(-1) - 1).max() < 1e-6


@given(seeds, sizes, sizes)
def test_softmax_moves_with_its_inputs(seed, rows, n):
    """Over the last axis and no other: permuting it permutes the result, and each row stands alone."""
    x, order = normal(seed, rows, n), np.random.default_rng(seed).permutation(n)
    assert_close("permuted", ops.softmax(x[:, order]), ops.softmax(x)[:, order], "formula")
    for row, y in zip(x, ops.softmax(x)):
        assert_close("row", y, np.exp(row) / np.exp(row).sum(), "formula")


def test_softmax_of_equal_numbers_is_uniform():
    assert (ops.softmax(np.full((2, 4), 7.0)) == 0.25).all()


def test_naive_softmax_overflows():
    x = np.array([100.0, 0.0], np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        assert np.isnan(ops.softmax_naive(x)).any()
    assert ops.softmax(x)[0] == 1 and ops.softmax(x)[1] < 1e-40


@given(seeds, sizes, sizes)
def test_logarithms_of_softmax(seed, rows, n):
    x = 10 * normal(seed, rows, n)
    assert_close("exp(log_softmax)", np.exp(ops.log_softmax(x)), ops.softmax(x), "formula")
    assert_close("log_sum_exp", ops.log_sum_exp(x), np.log(np.exp(x).sum(-1)), "formula", scale=max(1, np.abs(x).max()))


def test_logarithms_of_softmax_far_out():
    """Where the probability rounds to 0 its logarithm is still right; log of a sum of exps does not overflow."""
    x = np.array([0.0, -2000.0, 3000.0], np.float32)
    assert (ops.log_softmax(x) == [-3000, -5000, 0]).all()
    assert ops.log_sum_exp(x) == 3000


@given(st.floats(-600, 600))
def test_log_sigmoid(x):
    """Against log1p and exp where they are safe, and its symmetry log σ(x) - log σ(-x) = x."""
    x = np.array([x])
    assert_close("log_sigmoid", ops.log_sigmoid(x), -np.log1p(np.exp(-x)), "formula", scale=max(1, abs(x[0])))
    assert_close("odd part", ops.log_sigmoid(x) - ops.log_sigmoid(-x), x, "formula", scale=max(1, abs(x[0])))
    assert_close("sigmoid", ops.sigmoid(x), 1 / (1 + np.exp(-x)), "formula", scale=1)
    assert_close("complement", ops.sigmoid(x) + ops.sigmoid(-x), np.ones(1), "formula")


def test_naive_log_sigmoid_overflows():
    x = np.array([-100.0], np.float32)
    with np.errstate(over="ignore", divide="ignore"):
        assert ops.log_sigmoid_naive(x) == -np.inf
    assert ops.log_sigmoid(x) == -100 and ops.log_sigmoid(-x) > -1e-40
    assert ops.sigmoid(np.array([-800.0, 800.0])).tolist() == [0, 1]


# --- linear, gelu, norms, embedding -----------------------------------------------------------------------------------

@given(seeds, st.lists(sizes, min_size=1, max_size=3), sizes, sizes)
def test_linear_is_a_sum_of_products(seed, leading, inner, outer):
    x, w, b = normal(seed, *leading, inner), normal(seed + 1, outer, inner), normal(seed + 2, outer)
    expected = np.einsum("...i,oi->...o", x, w)
    assert_close("without bias", ops.linear(x, w), expected, "formula", scale=10)
    assert_close("with bias", ops.linear(x, w, b), expected + b, "formula", scale=10)


def test_gelu_is_the_tanh_form():
    """Values of the formula to 12 digits; the exact form differs from the fourth on, so it cannot be mistaken."""
    x = np.array([-3.0, -1.0, 0.0, 0.5, 2.0])
    tanh_form = [0.5 * v * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3))) for v in x]
    exact = [0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in x]
    assert_close("gelu", ops.gelu(x), np.array(tanh_form), "formula")
    assert 1e-5 < np.abs(ops.gelu(x) - exact).max() < 5e-4


@given(seeds, sizes, st.integers(2, 8), st.floats(0.1, 10))
def test_rms_norm(seed, rows, width, a):
    """Scale-free but for eps, mean square ms/(ms + eps), a weight of 0 is a factor of 1, no mean is taken out."""
    x, w, eps = normal(seed, rows, width), normal(seed + 1, width), 1e-2
    y = ops.rms_norm(x, w, eps)
    assert_close("scaled", ops.rms_norm(a * x, w, a * a * eps), y, "formula")
    assert_close("sign", ops.rms_norm(-x, w, eps), -y, "formula")
    ms = (x**2).mean(-1)
    assert_close("mean square", (ops.rms_norm(x, np.zeros(width), eps)**2).mean(-1), ms / (ms + eps), "formula")
    assert_close("factor", y, ops.rms_norm(x, np.zeros(width), eps) * (1 + w), "formula")


@given(seeds, sizes, st.integers(2, 8), st.floats(0.1, 10), st.floats(-100, 100))
def test_layer_norm(seed, rows, width, a, c):
    """Blind to a constant and to scale (but for eps); mean 0 and variance v/(v + eps) before the weights."""
    x, w, b, eps = normal(seed, rows, width), normal(seed + 1, width), normal(seed + 2, width), 1e-2
    y = ops.layer_norm(x, w, b, eps)
    assert_close("shifted", ops.layer_norm(x + c, w, b, eps), y, "formula", scale=1000)
    assert_close("scaled", ops.layer_norm(a * x, w, b, a * a * eps), y, "formula", scale=10)
    plain = ops.layer_norm(x, np.ones(width), np.zeros(width), eps)
    assert_close("mean", plain.mean(-1), np.zeros(rows), "formula", scale=10)
    assert_close("variance", plain.var(-1), x.var(-1) / (x.var(-1) + eps), "formula", scale=1)
    assert_close("weights", y, plain * w + b, "formula", scale=10)


def test_embed_reads_the_row_that_was_asked_for():
    table = np.arange(12.0).reshape(4, 3)
    assert (ops.embed([[3, 0], [1, 1]], table) == [[[9, 10, 11], [0, 1, 2]], [[3, 4, 5], [3, 4, 5]]]).all()


# --- rotary positions -------------------------------------------------------------------------------------------------

def test_rope_pairs_are_half_apart():
    """The literal case: with H = 4, features 0 and 2 turn by the position, 1 and 3 by a hundredth of it (theta 10⁴)."""
    x = np.array([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    c, s, c1, s1 = math.cos(5), math.sin(5), math.cos(0.05), math.sin(0.05)
    expected = [1 * c - 3 * s, 2 * c1 - 4 * s1, 3 * c + 1 * s, 4 * c1 + 2 * s1]
    assert_close("rope", ops.rope(x, np.array([[5]]), 1e4).ravel(), np.array(expected), "formula")


@given(seeds, st.integers(0, 8000), st.integers(0, 8000), st.integers(0, 8000), sizes)
def test_rope_sees_distance_only(seed, m, n, shift, half):
    q, k = normal(seed, 1, 1, 1, 2 * half), normal(seed + 1, 1, 1, 1, 2 * half)

    def meet(m, n):
        return (ops.rope(q, np.array([[m]]), 1e4) * ops.rope(k, np.array([[n]]), 1e4)).sum()

    assert abs(meet(m, n) - meet(m + shift, n + shift)) < 1e-10 * math.sqrt((q * q).sum() * (k * k).sum())


@given(seeds, st.integers(1, 2), sizes, st.integers(1, 3), st.integers(1, 4))
def test_rope_is_a_rotation(seed, batch, tokens, count, half):
    """Lengths stay, position 0 changes nothing, turning by m and then by n is turning by m + n."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((batch, tokens, count, 2 * half))
    m, n = rng.integers(0, 100, (2, batch, tokens))
    turned = ops.rope(x, m, 1e4)
    assert_close("length", (turned**2).sum(-1), (x**2).sum(-1), "formula")
    assert (ops.rope(x, 0 * m, 1e4) == x).all()
    assert_close("twice", ops.rope(turned, n, 1e4), ops.rope(x, m + n, 1e4), "formula", scale=10)


def test_rope_angles_are_exact_far_out_in_float32():
    """At position 8000 float32 gives what float64 does, to float32's last digit; float32 angles would be 1e-4 off."""
    x, positions = normal(0, 1, 3, 2, 8).astype(np.float32), np.array([[7999, 8000, 4095]])
    assert_close("rope", ops.rope(x, positions, 1e4), ops.rope(x.astype(np.float64), positions, 1e4), "formula")


# --- attention --------------------------------------------------------------------------------------------------------

def attention_by_loops(q, k, v, mask, scale, softcap):
    """Query by query and head by head, as the definition reads; head n uses key/value head n // G."""
    G, y = q.shape[2] // k.shape[2], np.empty(q.shape)
    for b, t, n in np.ndindex(q.shape[:3]):
        scores = np.array([scale * q[b, t, n] @ key for key in k[b, :, n // G]])
        scores = scores if softcap is None else softcap * np.tanh(scores / softcap)
        e = np.where(True if mask is None else mask[b, t], np.exp(scores), 0)
        y[b, t, n] = e @ v[b, :, n // G] / e.sum()
    return y


@st.composite
def attention_inputs(draw, max_T=4, max_S=5):
    """q, k, v and a mask in which every query sees at least the first key."""
    rng = np.random.default_rng(draw(seeds))
    B, T, S, K, G = (draw(st.integers(1, most)) for most in (2, max_T, max_S, 3, 3))
    H = draw(sizes)
    mask = rng.random((B, T, S)) < 0.6
    mask[:, :, 0] = True
    return *(rng.standard_normal(shape) for shape in [(B, T, K * G, H), (B, S, K, H), (B, S, K, H)]), mask


@given(attention_inputs(), st.sampled_from([None, 1.5]), st.booleans())
def test_attention_is_its_definition(inputs, softcap, masked):
    """Which makes it multi-head, grouped-query and multi-query attention, with and without cap and mask."""
    q, k, v, mask = inputs
    mask = mask if masked else None
    assert_close("attention", ops.attention(q, k, v, mask, 0.7, softcap),
                 attention_by_loops(q, k, v, mask, 0.7, softcap), "formula", scale=1)


@given(attention_inputs())
def test_shared_heads_are_repeated_not_tiled(inputs):
    """K1 K1 K2 K2: the same as multi-head attention over keys repeated in place."""
    q, k, v, mask = inputs
    G = q.shape[2] // k.shape[2]
    repeated = ops.attention(q, np.repeat(k, G, 2), np.repeat(v, G, 2), mask, 1.0)
    assert_close("repeated", ops.attention(q, k, v, mask, 1.0), repeated, "formula", scale=1)


@given(attention_inputs(), st.data())
def test_a_key_reaches_exactly_the_rows_whose_mask_has_it(inputs, data):
    """Changing key and value j, however much, changes row i if mask[i, j] and else not one bit of it."""
    q, k, v, mask = inputs
    j = data.draw(st.integers(0, k.shape[1] - 1))
    before = ops.attention(q, k, v, mask, 1.0)
    k, v = k.copy(), v.copy()
    k[:, j] += 1
    v[:, j] += 1e6
    changed = (ops.attention(q, k, v, mask, 1.0) != before).any((2, 3))
    assert (changed == mask[:, :, j]).all()


@given(attention_inputs())
def test_attention_is_an_average(inputs):
    """Every result lies between the smallest and the largest value of its feature; equal keys give the mean."""
    q, k, v, _ = inputs
    G = q.shape[2] // k.shape[2]
    y, wide = ops.attention(q, k, v, None, 1.0), np.repeat(v, G, 2)
    assert (y <= wide.max(1)[:, None] + 1e-12).all() and (y >= wide.min(1)[:, None] - 1e-12).all()
    equal = ops.attention(q, np.ones_like(k), v, None, 1.0)
    assert_close("equal keys", equal, np.broadcast_to(wide.mean(1)[:, None], y.shape), "formula", scale=1)


@given(attention_inputs(max_T=1, max_S=1))
def test_a_single_token_gives_its_value(inputs):
    q, k, v, _ = inputs
    assert (ops.attention(q, k, v, None, 1.0) == np.repeat(v, q.shape[2] // k.shape[2], 2)).all()


@given(attention_inputs())
def test_attention_without_a_mask_knows_no_order(inputs):
    """Permuting keys with their values changes nothing; permuting queries permutes the results."""
    q, k, v, _ = inputs
    keys, queries = (np.random.default_rng(0).permutation(n) for n in (k.shape[1], q.shape[1]))
    y = ops.attention(q, k, v, None, 1.0)
    assert_close("keys", ops.attention(q, k[:, keys], v[:, keys], None, 1.0), y, "formula", scale=1)
    assert_close("queries", ops.attention(q[:, queries], k, v, None, 1.0), y[:, queries], "formula", scale=1)


def test_masked_scores_vanish_whatever_their_size():
    """A forbidden score of +40,000 has weight 0 beside an allowed one of -40,000, with and without a cap."""
    q = np.array([1e4]).reshape(1, 1, 1, 1)
    k = np.array([4.0, -4.0]).reshape(1, 2, 1, 1)
    mask = np.array([[[False, True]]])
    for dtype in (np.float32, np.float64):
        for softcap in (None, 5.0):
            weights = ops.attention_weights(q.astype(dtype), k.astype(dtype), mask, 1.0, softcap)
            assert weights.ravel().tolist() == [0, 1]


def test_a_row_that_may_look_nowhere_is_finite():
    """Padding asks too; what it gets is never used, but nan would spread."""
    x = normal(0, 1, 2, 1, 4)
    assert np.isfinite(ops.attention(x, x, x, np.zeros((1, 2, 2), bool), 1.0)).all()


# --- masks ------------------------------------------------------------------------------------------------------------

def mask_rows(q, k, prefix_len, window=None):
    mask = prefix_lm_mask(np.array([q]), np.array([k]), np.array([prefix_len]), window)
    return ["".join("01"[int(allowed)] for allowed in row) for row in mask[0]]


def test_mask_of_prefix_two_in_five():
    assert mask_rows(range(5), range(5), 2) == ["11000",
                                                "11000",
                                                "11100",
                                                "11110",
                                                "11111"]


def test_mask_with_a_window_of_two():
    """A suffix token sees itself and one behind it; the prefix goes on seeing all of the prefix, as in transformers."""
    assert mask_rows(range(6), range(6), 3, window=2) == ["111000",
                                                          "111000",
                                                          "111000",
                                                          "001100",
                                                          "000110",
                                                          "000011"]


def test_mask_with_padding():
    """Position -1 is nobody's key, in the prefix or behind it."""
    assert mask_rows([0, 1, -1, 2, 3], [0, 1, -1, 2, 3], 2)[:2] == ["11000", "11000"]
    assert mask_rows([0, 1, -1, 2, 3], [0, 1, -1, 2, 3], 2)[3:] == ["11010", "11011"]


@given(st.integers(1, 6), st.integers(0, 8), st.sampled_from([None, 1, 2, 3]))
def test_mask_comes_from_positions(T, prefix_len, window):
    """Any rows of a whole mask are the mask of those rows alone; a prefix of 0 or 1 is causal, one of all sees all."""
    whole = mask_rows(range(T), range(T), prefix_len, window)
    for start in range(T):
        assert mask_rows(range(start, T), range(T), prefix_len, window) == whole[start:]
    if prefix_len <= 1 and window is None:
        assert whole == ["1" * (i + 1) + "0" * (T - i - 1) for i in range(T)]
    if prefix_len >= T:
        assert whole == ["1" * T] * T


# --- pictures ---------------------------------------------------------------------------------------------------------

@given(seeds, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2))
def test_patches_are_those_of_a_strided_convolution(seed, size, rows, columns, rest):
    """Row by row from the top left; inside a patch channel, row, column; a rest that fills no patch is left out."""
    rest = min(rest, size - 1)
    pixels = normal(seed, 2, 3, rows * size + rest, columns * size + rest)
    kernel = normal(seed + 1, 4, 3, size, size)
    corners = [(r * size, c * size) for r in range(rows) for c in range(columns)]
    cut = [[image[:, y:y + size, x:x + size] for y, x in corners] for image in pixels]
    expected = np.array([[[(patch * feature).sum() for feature in kernel] for patch in row] for row in cut])
    assert_close("patches", ops.linear(patchify(pixels, size), kernel.reshape(4, -1)), expected, "formula", scale=10)


def test_one_bright_pixel_lands_in_one_place():
    pixels = np.zeros((1, 3, 4, 6))
    pixels[0, 1, 2, 5] = 1  # green, third row, last column: patch (1, 2) of 2 × 3, inside it channel 1, row 0, column 1
    assert np.argwhere(patchify(pixels, 2)).tolist() == [[0, 5, 5]]


def test_heads_are_cut_one_after_the_other():
    assert heads(np.arange(6.0).reshape(1, 1, 6), 2).tolist() == [[[[0, 1, 2], [3, 4, 5]]]]


# --- dtype and purity -------------------------------------------------------------------------------------------------

def examples(rng):
    """Each function with arguments of usual shapes."""
    x, q, kv = rng.standard_normal((2, 3, 8)), rng.standard_normal((2, 3, 4, 6)), rng.standard_normal((2, 5, 2, 6))
    mask = rng.random((2, 3, 5)) < 0.7
    vector, positions = rng.standard_normal(8), rng.integers(0, 50, (2, 3))
    return {
        "softmax": (ops.softmax, x), "log_sum_exp": (ops.log_sum_exp, x), "log_softmax": (ops.log_softmax, x),
        "log_sigmoid": (ops.log_sigmoid, x), "sigmoid": (ops.sigmoid, x), "gelu": (ops.gelu, x),
        "linear": (ops.linear, x, rng.standard_normal((5, 8)), rng.standard_normal(5)),
        "layer_norm": (ops.layer_norm, x, vector, vector, 1e-6), "rms_norm": (ops.rms_norm, x, vector, 1e-6),
        "embed": (ops.embed, rng.integers(0, 8, (2, 3)), rng.standard_normal((8, 6))),
        "rope": (ops.rope, q, positions, 1e4),
        "attention": (ops.attention, q, kv, rng.standard_normal(kv.shape), mask, 0.5, 2.0),
        "patchify": (patchify, rng.standard_normal((2, 3, 6, 6)), 2),
    }


NAMES = list(examples(np.random.default_rng(0)))


def laid_out(x, order):
    """The same numbers elsewhere in memory: in Fortran's order, or as every second one of a larger array."""
    if order == "F":
        return np.asfortranarray(x)
    wide = np.zeros((*x.shape[:-1], 2 * x.shape[-1]), x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_dtype_is_kept_and_inputs_are_not_touched(name, dtype):
    function, *args = examples(np.random.default_rng(1))[name]
    args = [a.astype(dtype) if isinstance(a, np.ndarray) and a.dtype.kind == "f" else a for a in args]
    copies = [np.copy(a) if isinstance(a, np.ndarray) else a for a in args]
    assert function(*args).dtype == dtype
    assert all(np.array_equal(a, b) for a, b in zip(args, copies))


@pytest.mark.parametrize("order", ["F", "sliced"])
@pytest.mark.parametrize("name", NAMES)
def test_memory_order_does_not_matter(name, order):
    function, *args = examples(np.random.default_rng(2))[name]
    moved = [laid_out(a, order) if isinstance(a, np.ndarray) else a for a in args]
    assert_close(name, function(*moved), function(*args), "formula")
