"""The course's drawings that need no weights: what they show is arithmetic. Those of the model are in `measured.py`."""
import math

import numpy as np

from minipali.looking.svg import WIDTH, Drawing
from minipali.model.gemma import prefix_lm_mask
from minipali.model.ops import gelu, rope


def activation():
    """GELU beside the identity and ReLU."""
    d = Drawing("GELU: large numbers pass, very negative ones become 0, with a smooth turn between", 300)
    left, top, unit = 60, 40, 60

    def at(x, y):
        return left + (x + 3) * unit, top + (3 - y) * unit
    x = np.linspace(-3, 3, 61)
    d.line(*at(-3, 0), *at(3, 0))
    d.line(*at(0, -0.5), *at(0, 3))
    for value in (-2, -1, 1, 2):
        d.text(at(value, 0)[0], at(0, 0)[1] + 20, str(value), "soft", 14)
        if value > 0:
            d.text(at(0, 0)[0] - 14, at(0, value)[1] + 5, str(value), "soft", 14)
    d.curve(*zip(*[at(a, max(a, 0)) for a in x]), "orangeline")
    d.curve(*zip(*[at(a, b) for a, b in zip(x, gelu(x))]), "blueline")
    d.text(130, 130, "GELU", "", 16)
    d.line(60, 140, 110, 140, "blueline")
    d.text(130, 180, "ReLU, before it", "", 16)
    d.line(60, 190, 110, 190, "orangeline")
    d.text(WIDTH / 2, 285, "at -0.75 GELU is -0.17: a little of what is below 0 passes", "soft", 15)
    return d


def normalization():
    """Which numbers share one mean: BatchNorm's, LayerNorm's, RMSNorm's."""
    d = Drawing("Three norms over the same numbers: BatchNorm averages over tokens, the others over one token", 330)
    for i, (name, note, inside) in enumerate([
            ("BatchNorm", "one feature,\nall tokens", lambda t, f: f == 2),
            ("LayerNorm", "one token,\nall features", lambda t, f: t == 3),
            ("RMSNorm", "one token, and\nno mean removed", lambda t, f: t == 3)]):
        x, y, cell = 28 + i * 152, 70, 20
        d.text(x + 3 * cell, 32, name, "", 18, bold=True)
        d.text(x + 3 * cell, 58, "features →", "soft", 14)
        for t in range(8):
            for f in range(6):
                d.rect(x + f * cell, y + t * cell, cell - 2, cell - 2, "blue" if inside(t, f) else "pale")
        if i == 1:
            d.text(x + 3 * cell, y + 8 * cell + 22, "mean 0, variance 1", "", 14)
        else:
            d.text(x + 3 * cell, y + 8 * cell + 22, "mean 0, variance 1" if i == 0 else "mean square 1", "", 14)
        for j, line in enumerate(note.split("\n")):
            d.text(x + 3 * cell, y + 8 * cell + 48 + j * 20, line, "soft", 14)
    d.text(20, 150, "tokens", "soft", 14)
    d.parts[-1] = d.parts[-1].replace("<text", '<text transform="rotate(-90 20 150)"')
    return d


def rotary():
    """Clock hands: rows are pairs of features, columns positions; each hand as `rope` turns it."""
    d = Drawing("Rotary positions: each pair of features is a clock hand with its own speed", 345)
    pairs, H = [0, 2, 4, 8], 32
    d.text(52, 30, "pair", "soft", 15)
    for m in range(6):
        d.text(130 + m * 62, 30, f"position {m}" if m == 0 else str(m), "soft", 15)
    for row, i in enumerate(pairs):
        y = 75 + row * 66
        d.text(52, y - 2, f"{i}", "", 18, bold=True)
        if row in (0, len(pairs) - 1):
            d.text(52, y + 18, "slow" if row else "fast", "soft", 15)
        x = np.zeros((1, 6, 1, H))
        x[..., i] = 1
        turned = rope(x, np.arange(6)[None], 10000.0)[0, :, 0]
        for m in range(6):
            d.add("circle", "box", cx=130 + m * 62, cy=y, r=27)
            d.arrow(130 + m * 62, y, 130 + m * 62 + 25 * turned[m, i], y - 25 * turned[m, i + H // 2], "blueline")
    d.text(WIDTH / 2, 332, "two hands 2 apart enclose the same angle wherever they stand", "soft", 15)
    return d


def cache():
    """Which rows of keys and values are computed in each step, with and without a cache."""
    d = Drawing("KV cache: after the prefill each step computes one new column and reads the others", 330)
    for x, title, cached in [(30, "with the cache", True), (260, "without", False)]:
        d.text(x + 95, 28, title, "", 18, bold=True)
        for step in range(6):
            for token in range(4 + step):
                new = not cached or step == 0 or token == 3 + step
                d.rect(x + token * 21, 48 + step * 34, 18, 26, "blue" if new else "pale")
    for step in range(6):
        d.text(246, 66 + step * 34, str(step), "soft", 14)
    d.text(30, 272, "prefix: 4 tokens", "soft", 15, "start")
    d.rect(30, 290, 18, 18, "blue")
    d.text(54, 305, "computed in this step", "", 15, "start")
    d.rect(260, 290, 18, 18, "pale")
    d.text(284, 305, "read from the cache", "", 15, "start")
    return d


def mask():
    """The real mask of 3 picture tokens, a prompt and an answer, beside that of a plain language model."""
    names = ["pic", "pic", "pic", "BOS", "cap", "\\n", "a", "red", "star"]
    d = Drawing("Who may look at whom: the prefix sees all of itself, the answer only what is before it", 320)
    positions = np.arange(len(names))[None]
    for x, title, prefix in [(44, "PaliGemma", 6), (270, "plain causal", 0)]:
        allowed = prefix_lm_mask(positions, positions, np.array([prefix]))[0]
        d.text(x + 95, 28, title, "", 18, bold=True)
        for q in range(len(names)):
            if x < 100:
                d.text(x - 6, 66 + q * 21, names[q], "soft mono", 14, "end")
            for k in range(len(names)):
                d.rect(x + k * 21, 50 + q * 21, 19, 19, "blue" if allowed[q, k] else "pale")
    d.text(139, 266, "keys: the same tokens, in order", "soft", 15)
    d.rect(44, 284, 18, 18, "blue")
    d.text(68, 299, "may look", "", 15, "start")
    d.rect(160, 284, 18, 18, "pale")
    d.text(184, 299, "may not", "", 15, "start")
    d.text(370, 266, "the picture cannot see", "soft", 15)
    d.text(370, 286, "the question", "soft", 15)
    return d


def backward():
    """The chain of an MLP, forward and back, and what each pull leaves behind."""
    d = Drawing("Backward without a tape: every function hands back its pull, and they are called in reverse", 310)
    names = ["linear", "gelu", "linear"]
    d.text(16, 62, "x", "", 18, "start")
    d.text(464, 62, "y", "", 18, "end")
    for i, name in enumerate(names):
        x = 62 + i * 130
        d.box(x, 36, 96, 44, name, "blue", 17)
        d.arrow(x - 28, 58, x - 3, 58)
        d.box(x, 150, 96, 44, "pull", "orange", 17)
        d.line(x + 16, 82, x + 16, 148, "grid")
        d.arrow(x + 124, 172, x + 99, 172)
        if name == "linear":
            d.arrow(x + 48, 196, x + 48, 232)
            d.text(x + 48, 254, "dweight, dbias", "", 15)
    d.arrow(422, 58, 444, 58)
    d.text(470, 178, "dy", "", 18, "end")
    d.arrow(59, 172, 38, 172)
    d.text(10, 178, "dx", "", 18, "start")
    d.text(176, 24, "forward →", "soft", 15)
    d.text(176, 140, "← backward", "soft", 15)
    d.text(WIDTH / 2, 288, "each pull remembers what its function saw", "soft", 15)
    return d


def softmax_shift():
    """exp of three scores before and after the largest is subtracted."""
    d = Drawing("The stable softmax: subtract the largest score first, then nothing overflows", 270)
    scores = [1, 2, 100]
    for column, title in enumerate(["score x", "exp(x), float32", "exp(x - 100)"]):
        d.text(90 + column * 150, 34, title, "", 16, bold=True)
    for row, x in enumerate(scores):
        y = 50 + row * 46
        with np.errstate(over="ignore"):
            naive = np.exp(np.float32(x))
        shifted = math.exp(x - 100)
        cells = [str(x), f"{naive:.1f}" if np.isfinite(naive) else "inf", f"{shifted:.0e}" if shifted < 1 else "1"]
        for column, words in enumerate(cells):
            bad = words == "inf"
            d.box(30 + column * 150, y, 120, 38, words, "orange" if bad else "box", 16)
    d.text(90, 215, "share:", "soft", 16)
    d.text(240, 215, "0, 0, nan", "", 17, bold=True)
    d.text(390, 215, "1e-43, 3e-43, 1", "", 17, bold=True)
    d.text(WIDTH / 2, 250, "same fraction, both parts divided by exp(100)", "soft", 15)
    return d


DRAWINGS = {"activation": activation, "normalization": normalization, "rotary": rotary, "cache": cache, "mask": mask,
            "backward": backward, "softmax": softmax_shift}
