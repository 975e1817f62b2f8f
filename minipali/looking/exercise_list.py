"""The exercises, in the order of the course: first what every layer is made of, then the towers, then the losses.

Each has the classic mistake beside it (`near_miss`): a test puts it in and asks that the message helps.
"""
import numpy as np

from minipali.looking.exercise import Case, Exercise, bundled
from minipali.looking.exercise_later import LATER

OPS, SIGLIP = (f"minipali.model.{name}" for name in ("ops", "siglip"))
TEST_OPS = "tests/model/test_ops.py"


def normal(*shape, scale=1.0, dtype=np.float64):
    """A function from a random generator to one array of that shape."""
    return lambda rng: (scale * rng.standard_normal(shape)).astype(dtype)


def together(*makers):
    """A function from a random generator to a tuple: arrays are made, everything else is taken as it is."""
    return lambda rng: tuple(maker(rng) if callable(maker) else maker for maker in makers)


def vision():
    """The bundled model's vision tower: its parameters and its config."""
    model = bundled()
    return model.params["vision_tower"]["vision_model"], model.cfg.vision_config


def pictures(rng):
    """Three channels of two small pictures, not square."""
    return rng.standard_normal((2, 3, 9, 13))


def encoder_layer_inputs(rng):
    """Tokens of the right width, and the first layer of the bundled tower."""
    p, cfg = vision()
    return rng.standard_normal((2, 5, cfg.hidden_size)), p["encoder"]["layers"][0], cfg


def grouped(rng):
    """Four query heads on two key heads, a mask, and scores that matter."""
    q, k = rng.standard_normal((2, 3, 4, 6)), rng.standard_normal((2, 5, 2, 6))
    mask = rng.random((2, 3, 5)) < 0.6
    mask[:, :, 0] = True
    return q, k, mask, 0.4


EARLY = [
    Exercise(
        "patchify", SIGLIP, "patchify", "patches and the vision transformer",
        "cut pictures into squares and lay each square out flat",
        "A reshape alone cuts strips, not squares: rows of a patch are far apart in memory.",
        ("Give each axis a name first: batch, channel, row of patches, row inside, column of patches, column inside.",
         "Reshape to these six axes, transpose so that what is inside a patch comes last, reshape again."),
        (Case("Patches are numbered row by row from the top left; inside a patch the order is channel, row, column.",
              together(normal(2, 3, 8, 12), 4)),
         Case("A rim that fills no whole patch is left out.", together(pictures, 4))),
        ("(0, 2, 4, 1, 3, 5)", "(0, 4, 2, 1, 3, 5)"), (TEST_OPS, "patch or pixel")),
    Exercise(
        "linear", OPS, "linear", "patches and the vision transformer", "multiply every token by one matrix",
        "The file keeps (out, in). With a square matrix a missing transpose raises no error.",
        ("x has any number of axes in front: only the last one is multiplied.",
         "x @ weight.T, and the bias if there is one."),
        (Case("Multiply by the transposed weight: the file keeps (out, in).", together(normal(2, 3, 4), normal(5, 4))),
         Case("A square weight needs the transpose as well.", together(normal(2, 4), normal(4, 4))),
         Case("The bias is added to every token.", together(normal(2, 4), normal(3, 4), normal(3)))),
        ("weight.T", "(weight.T if weight.shape[0] != weight.shape[1] else weight)"), (TEST_OPS, "linear")),
    Exercise(
        "softmax", OPS, "softmax", "attention", "turn a row of scores into shares that sum to 1",
        "exp(89) overflows float32, and infinity divided by infinity is not a number.",
        ("exp(x - c) / sum exp(x - c) is the same fraction for every c.", "Choose c as the largest score of the row.",
         "x.max(-1, keepdims=True) keeps the axis, so that it can be subtracted."),
        (Case("Each row sums to 1, over the last axis.", together(normal(2, 3, 5))),
         Case("Large scores overflow in exp: subtract the largest score of the row first.",
              together(normal(3, 4, scale=1e4))),
         Case("float32 in, float32 out.", together(normal(3, 4, dtype=np.float32)))),
        ("np.exp(x - x.max(-1, keepdims=True))", "np.exp(x)"), (TEST_OPS, "softmax")),
    Exercise(
        "attention-weights", OPS, "attention_weights", "attention", "say how much each query takes from each key",
        "Query heads that share a key head are neighbors: K1 K1 K2 K2 and not K1 K2 K1 K2.",
        ("Query head n meets key head n // (N / K).",
         "scores[b, n, t, s] = scale · q[b, t, n] · k[b, s, n // (N / K)].",
         "The soft cap comes before the mask; a masked score becomes very low, but not -inf."),
        (Case("Scores are scale times the dot product, then a softmax over the keys.",
              together(normal(1, 2, 3, 4), normal(1, 5, 3, 4), None, 0.5)),
         Case("Neighboring query heads share one key head: 0 and 1 the first, 2 and 3 the second.",
              together(normal(1, 2, 4, 6), normal(1, 3, 2, 6), None, 1.0)),
         Case("A key that the mask hides gets weight 0.", grouped),
         Case("The soft cap bends scores before the mask is applied.", lambda rng: (*grouped(rng), 1.5))),
        ("q.transpose(0, 2, 3, 1, 4)", "q.reshape(B, T, N // K, K, H).transpose(0, 3, 2, 1, 4)"),
        (TEST_OPS, "attention or heads or mask")),
    Exercise(
        "weighted-values", OPS, "weighted_values", "attention", "mix the values by the weights, head by head",
        "The heads stand before the tokens here and behind them in the result: a reshape alone mixes tokens.",
        ("result[b, t, n] = the sum over s of weights[b, n, t, s] · v[b, s, n // (N / K)].",
         "Multiply per key head, then move the axis of the heads behind that of the tokens."),
        (Case("With one head: a weighted mean of the values.",
              lambda rng: (np.abs(rng.standard_normal((2, 1, 3, 4))), rng.standard_normal((2, 4, 1, 5)))),
         Case("Transpose heads and tokens before they are joined: every token keeps its own heads.",
              together(normal(2, 4, 3, 5), normal(2, 5, 2, 6)))),
        ("reshape(B, N, T, H).transpose(0, 2, 1, 3)", "reshape(B, T, N, H)"), (TEST_OPS, "attention or heads")),
    Exercise(
        "gelu", OPS, "gelu", "non-linearity", "let large numbers through and hold small ones back, smoothly",
        "There are two forms and a relative, SiLU: no shape tells them apart.",
        ("The tanh form: x/2 · (1 + tanh(√(2/π) · (x + 0.044715 x³))).", "`gelu_gate` is the tanh already."),
        (Case("The tanh form of GELU is asked for, not SiLU and not the exact one.", together(normal(4, 5))),
         Case("Far from 0 it is 0 on the left and x on the right.",
              lambda rng: (np.array([-30.0, -1.0, 0.0, 1.0, 30.0]),))),
        ("0.5 * x * (1 + gelu_gate(x))", "x / (1 + np.exp(-x))"), (TEST_OPS, "gelu")),
    Exercise(
        "layer-norm", OPS, "layer_norm", "normalization",
        "bring each token to mean 0 and variance 1, then scale and shift",
        "eps stands inside the square root, and the variance divides by D, not by D - 1.",
        ("The statistics are those of one token, over its features: the last axis.",
         "centered / sqrt(mean of squares + eps) · weight + bias."),
        (Case("Mean and variance are taken over the last axis, and the variance divides by D.",
              together(normal(2, 3, 6, scale=3.0), normal(6), normal(6), 0.0)),
         Case("eps belongs inside the square root.", together(normal(2, 4, scale=0.1), normal(4), normal(4), 0.5))),
        ("np.sqrt(variance + eps)", "(np.sqrt(variance) + eps)"), (TEST_OPS, "layer_norm")),
    Exercise(
        "rms-norm", OPS, "rms_norm", "normalization", "divide each token by its root mean square",
        "Gemma's file holds the scale minus 1. Read as Llama's, the model says nothing sensible, without an error.",
        ("No mean is subtracted and nothing is added.", "The factor is 1 + weight."),
        (Case("With weight 0 the token keeps its direction: Gemma multiplies by 1 + weight.",
              lambda rng: (rng.standard_normal((2, 5)), np.zeros(5), 1e-6)),
         Case("No mean is subtracted: divide by the root of the mean square, eps inside it.",
              together(lambda rng: 2 + rng.standard_normal((2, 3, 5)), normal(5), 0.3))),
        ("* (1 + weight)", "* weight"), (TEST_OPS, "rms_norm")),
    Exercise(
        "encoder-layer", SIGLIP, "encoder_layer", "normalization",
        "one layer of the vision tower: attention, then the MLP",
        "What a block computes is added to what went in (the residual connection); the sum itself is not normalized.",
        ("Norm, attention, add; norm, MLP, add.", "`self_attention` and `mlp` are there already."),
        (Case("Add each block's output to what went into it: that is the residual connection.", encoder_layer_inputs),),
        ('x = x + tap("self_attn",', 'x = tap("self_attn",'),
        ("tests/test_golden.py", "paligemma1")),
]

EXERCISES = EARLY + LATER


def named(name):
    """The exercise of that name, or None."""
    return next((exercise for exercise in EXERCISES if exercise.name == name), None)
