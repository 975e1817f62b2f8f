"""The course's drawings of the bundled model: what is shown was computed by it, on a bundled picture."""
import textwrap
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image

from minipali.checkpoint.config import PaliGemmaConfig
from minipali.decoding.loaded_model import encode_prompt, load_model
from minipali.decoding.pair import load_pair
from minipali.looking.svg import WIDTH, Drawing
from minipali.model.gemma import KVCache
from minipali.model.ops import sigmoid, softmax
from minipali.model.paligemma import decode, forward, prefill
from minipali.outputs.boxes import parse
from minipali.small_world.world import SHAPES
from minipali.trace import record


class Answer:
    """The bundled model's answer about one picture, with what it computed on the way, each thing computed once."""

    def __init__(self, model, picture, prompt, most=80):
        self.model, self.cfg, self.prompt, self.most = model, model.cfg, prompt, most
        self.picture = Image.open(picture).convert("RGB")
        self.prompt_ids = encode_prompt(prompt, model)

    @cached_property
    def features(self):
        return self.model.features([self.picture])

    @cached_property
    def steps(self):
        """The logits of every step, that of the stop token included: (T, V)."""
        p, cfg = self.model.params, self.cfg
        cache = KVCache(self.features, 1, self.features.shape[1] + len(self.prompt_ids) + self.most, cfg.text_config)
        rows = [prefill(self.features, np.array([self.prompt_ids]), np.array([len(self.prompt_ids)]), p, cfg, cache)[0]]
        while rows[-1].argmax() not in cfg.eos_token_ids and len(rows) < self.most:
            rows.append(decode(rows[-1].argmax().reshape(1, 1), p, cfg, cache)[0, 0])
        return np.array(rows)

    @property
    def ids(self):
        """The answer's tokens, without the stop token."""
        return [int(row.argmax()) for row in self.steps[:-1]]

    @property
    def text(self):
        return self.model.tokenizer.decode(self.ids)

    def names(self, ids):
        return [self.model.tokenizer.decode([int(i)]).strip() or "·" for i in ids]

    @cached_property
    def attention(self):
        """How much each answer token looked at each patch when it was chosen, the mean of all layers and heads."""
        P, ids = self.features.shape[1], np.array([self.prompt_ids + self.ids])
        prefix = P + len(self.prompt_ids)
        with record(attention=True, only=lambda name: name.endswith("attn_weights")) as seen:
            forward(self.features, ids, [ids.shape[1]], [prefix], self.model.params, self.cfg)
        return np.mean([weights[0].mean(0) for weights in seen.values()], 0)[prefix - 1:-1, :P]


def sides(cfg: PaliGemmaConfig):
    """(pixels of the picture, pixels of a patch, patches) along a side."""
    vision = cfg.vision_config
    return vision.image_size, vision.patch_size, vision.image_size // vision.patch_size


def path(answer):
    """From pixels and a prompt to one token, and round again."""
    cfg, (_, patch, side) = answer.cfg, sides(answer.cfg)
    P, T = side * side, len(answer.prompt_ids)
    d = Drawing("The path of one answer: picture and prompt become tokens, Gemma reads both and writes the next", 640)
    d.picture(24, 20, np.asarray(answer.picture), 128 / answer.picture.width)
    d.text(300, 62, f'"{answer.prompt}"', "mono", 17)
    d.text(300, 88, "the prompt", "soft", 15)

    def step(x, y, width, words, note, cls="box"):
        d.box(x, y, width, 46, words, cls)
        d.text(x + width / 2, y + 64, note, "soft", 14)
    step(12, 180, 190, "cut into squares", f"{P} patches of {3 * patch * patch} numbers")
    step(12, 276, 190, "SigLIP, a vision\ntransformer", f"{P} tokens of {cfg.vision_config.hidden_size}", "blue")
    step(12, 372, 190, "projector", f"{P} soft tokens of {cfg.text_config.hidden_size}", "blue")
    step(232, 276, 190, "tokenizer", f"{T} ids: BOS, prompt, newline")
    step(232, 372, 190, "embedding table", f"{T} tokens of {cfg.text_config.hidden_size}", "blue")
    for y in (152, 248, 344):
        d.arrow(107, y, 107, y + 26)
    d.arrow(327, 104, 327, 272)
    d.arrow(327, 344, 327, 370)
    d.arrow(107, 440, 170, 472)
    d.arrow(327, 440, 270, 472)
    step(92, 474, 260, "Gemma, a language model", f"a row of {cfg.text_config.vocab_size:,} scores: the logits", "blue")
    d.arrow(222, 542, 222, 566)
    d.box(92, 568, 260, 46, f'the best: "{answer.names(answer.ids[:1])[0]}"', "orange")
    d.curve([352, 456, 456, 425], [591, 591, 395, 395], "line")
    d.arrow(440, 395, 424, 395)
    d.text(WIDTH / 2 - 18, 634, "append it and ask again, until the stop token", "soft", 15)
    return d


def patches(answer):
    """The grid, one patch enlarged, and the tokens in their order."""
    (size, patch, side), pixels = sides(answer.cfg), np.asarray(answer.picture)
    d = Drawing("A picture is cut into squares, row by row, and each square becomes one token", 330)
    scale = 238 / size
    d.picture(20, 20, pixels, scale)
    for i in range(side + 1):
        d.line(20 + i * patch * scale, 20, 20 + i * patch * scale, 20 + size * scale, "grid")
        d.line(20, 20 + i * patch * scale, 20 + size * scale, 20 + i * patch * scale, "grid")
    row, column = 1, side - 1
    d.rect(20 + column * patch * scale, 20 + row * patch * scale, patch * scale, patch * scale, "blueline")
    d.picture(318, 34, pixels[row * patch:(row + 1) * patch, column * patch:(column + 1) * patch], 126 / patch)
    d.arrow(22 + size * scale, 20 + (row + 0.5) * patch * scale, 312, 70)
    d.text(381, 184, f"patch {row * side + column}", "", 16, bold=True)
    d.text(381, 206, f"{patch} × {patch} × 3", "soft", 15)
    d.text(381, 226, f"= {3 * patch * patch} numbers", "soft", 15)
    step = 440 / (side * side)
    for i in range(side * side):
        d.rect(20 + i * step, 276, step - 2, 20, "orange" if i == row * side + column else "blue")
    d.text(20, 318, f"0 … {side * side - 1}: the sequence of tokens that the transformer reads", "soft", 15, "start")
    return d


def attention(answer):
    """Where three tokens of the answer looked, over the patches."""
    side = sides(answer.cfg)[2]
    names = answer.names(answer.ids)
    d = Drawing("Where the answer's tokens looked: attention over the patches, mean of all layers and heads", 250)
    chosen = [i for i, name in enumerate(names) if name in SHAPES][:3]  # the things that the caption names
    for column, i in enumerate(chosen):
        x, cell = 18 + column * 152, 20
        weights = answer.attention[i]
        d.picture(x, 48, np.asarray(answer.picture), 140 / answer.picture.width)
        d.rect(x, 48, 140, 140, "paper", 0.55)
        for patch, weight in enumerate(weights / weights.max()):
            d.rect(x + patch % side * cell, 48 + patch // side * cell, cell, cell, "blue", round(0.85 * weight, 2))
        d.text(x + 70, 32, f'"{names[i]}"', "", 18, bold=True)
        d.text(x + 70, 212, f"picture: {weights.sum():.0%}", "soft", 15)
    d.text(WIDTH / 2, 240, "share of its attention that went to the picture", "soft", 14)
    return d


def contrastive(pair, picture, captions):
    """One picture against captions: shares that sum to 1, and yes or no for each."""
    [logits] = pair.logits([picture], captions)
    d = Drawing("One picture, several captions: softmax shares one unit among them, sigmoid judges each alone",
                70 + 98 * len(captions))
    d.text(128, 32, "softmax (CLIP)", "", 16, bold=True)
    d.text(358, 32, "sigmoid (SigLIP)", "", 16, bold=True)
    for i, (caption, a, b) in enumerate(zip(captions, softmax(logits[None])[0], sigmoid(logits))):
        y = 86 + i * 98
        for row, words in enumerate(textwrap.wrap(caption, 56)):
            d.text(16, y - 18 + row * 18, words, "", 14, "start")
        for x, share, cls in [(16, a, "orange"), (246, b, "blue")]:
            d.rect(x, y + 10, 160, 18, "pale")
            d.rect(x, y + 10, 160 * float(share), 18, cls)
            d.text(x + 166, y + 25, f"{share:.1%}", "", 15, "start")
    d.text(16, 54 + 98 * len(captions), f"sums to {softmax(logits[None]).sum():.0%}", "soft", 15, "start")
    d.text(246, 54 + 98 * len(captions), f"sums to {sigmoid(logits).sum():.0%}", "soft", 15, "start")
    return d


def next_token(answer, first=1, steps=3, best=4):
    """The best tokens of some steps; the bars are logits, since the probabilities of all but one would not be seen."""
    d = Drawing("Next-token prediction: a score for every token of the vocabulary, the best is appended", 330)
    for column in range(steps):
        step = first + column
        row, x = answer.steps[step], 14 + column * 156
        order = np.argsort(-row)[:best]
        text = " ".join(answer.names(answer.ids[:step]))
        d.text(x + 68, 30, f"… {text} ?", "", 15, bold=True)
        for j, (name, i) in enumerate(zip(answer.names(order), order)):
            y, width = 52 + j * 60, 136 * float((row[i] - row.min()) / (row.max() - row.min()))
            d.rect(x, y, width, 24, "orange" if j == 0 else "pale")
            d.text(x, y + 42, f"{name}  {row[i]:.1f}", "", 15, "start")
    d.text(WIDTH / 2, 316, "numbers: logits. The orange one is chosen", "soft", 15)
    return d


def temperature(answer, temperatures=(1, 3), best=4):
    """One step's probabilities at two temperatures, where the second best came closest."""
    top = np.sort(softmax(answer.steps), -1)
    step = int(np.argmin(top[:, -1]))
    order = np.argsort(-answer.steps[step])[:best]
    d = Drawing("Temperature divides the logits before the softmax: higher is flatter", 90 + (best + 1) * 44)
    d.text(WIDTH / 2, 28, "… " + " ".join(answer.names(answer.ids[max(step - 4, 0):step])) + " ?", "", 16, bold=True)
    for column, t in enumerate(temperatures):
        d.text(178 + column * 200, 58, f"T = {t}", "", 16)
        shares = softmax(answer.steps[step][None] / t)[0]
        for j, share in enumerate([*shares[order], 1 - shares[order].sum()]):
            y = 72 + j * 44
            d.rect(110 + column * 190, y, 120, 24, "pale")
            d.rect(110 + column * 190, y, 120 * float(share), 24, "orange" if column else "blue")
            d.text(236 + column * 190, y + 18, f"{share:.1%}", "", 15, "start")
    for j, name in enumerate([*answer.names(order), "all others"]):
        d.text(100, 90 + j * 44, name, "", 16, "end")
    return d


def detection(answer):
    """The four locations of a box, on the picture's edges."""
    width, height = answer.picture.size
    d = Drawing("A box as text: four location tokens, ymin xmin ymax xmax, in 1023rds of the picture", 400)
    scale, left, top = 270 / width, 120, 70
    d.picture(left, top, np.asarray(answer.picture), scale)
    box = parse(answer.text, height, width)[0].box
    x0, y0, x1, y1 = (v * scale for v in box)
    d.rect(left + x0, top + y0, x1 - x0, y1 - y0, "orangeline")
    tokens = [name for name in answer.text.replace(">", "> ").split() if name.startswith("<loc")][:4]
    for name, what, y in [(tokens[0], "ymin", y0), (tokens[2], "ymax", y1)]:
        d.line(110, top + y, left + x0, top + y, "grid")
        d.text(104, top + y - 2, name, "mono", 14, "end")
        d.text(104, top + y + 16, what, "soft", 14, "end")
    for name, what, x, dy in [(tokens[1], "xmin", x0, 0), (tokens[3], "xmax", x1, 0)]:
        d.line(left + x, top - 8, left + x, top + y0, "grid")
        d.text(left + x, 36 + dy, name, "mono", 14)
        d.text(left + x, 54 + dy, what, "soft", 14)
    d.text(WIDTH / 2, 372, answer.prompt + "  →", "soft", 15)
    d.text(WIDTH / 2, 392, answer.text, "mono", 14)
    return d


def soft_tokens(answer):
    """How near the projector's tokens come to any row of the vocabulary, beside how near text tokens do."""
    table = answer.model.params["language_model"]["model"]["embed_tokens"]["weight"]

    def cosines(x):
        unit = x / np.linalg.norm(x, axis=-1, keepdims=True)
        return unit @ (table / np.linalg.norm(table, axis=-1, keepdims=True)).T
    nearest = np.sort(cosines(answer.features[0]).max(-1))[::-1]
    text = cosines(table[answer.prompt_ids]).max(-1)
    d = Drawing("Soft tokens: no row of the vocabulary lies near what the projector makes", 300)
    bars = [("soft", value, "blue") for value in nearest] + [("text", value, "orange") for value in text]
    left, bottom, step = 60, 220, 390 / len(bars)
    for value in (0, 0.5, 1):
        d.line(left, bottom - 160 * value, 460, bottom - 160 * value, "grid")
        d.text(left - 8, bottom - 160 * value + 5, str(value), "soft", 14, "end")
    for i, (_, value, cls) in enumerate(bars):
        d.rect(left + 4 + i * step, bottom - 160 * float(value), step - 2, 160 * float(value), cls)
    d.text(WIDTH / 2, 32, "cosine with the nearest row of the vocabulary", "", 16, bold=True)
    d.text(left + 4, 250, f"{len(nearest)} picture tokens", "", 15, "start")
    d.text(460, 250, f"{len(text)} of text", "", 15, "end")
    d.text(WIDTH / 2, 284, "a text token is a row of the table, a soft token is not", "soft", 15)
    return d


EXAMPLES = Path(__file__).resolve().parents[2] / "weights" / "examples"
CAPTIONS = ["a small red heart at the top right, a large teal star on the left and a small brown circle in the center",
            "a small red heart at the top right, a large teal star on the left and a small blue circle in the center",
            "a small red heart at the top right, a large teal circle on the left and a small brown star in the center",
            "a large green square at the bottom"]


def drawings():
    """{name: drawing} of the bundled model and pair."""
    model = load_model(EXAMPLES.parent)
    caption = Answer(model, EXAMPLES / "shapes.png", "caption en")
    box = Answer(model, EXAMPLES / "shapes.png", "detect star")
    pair = load_pair(EXAMPLES.parent / "siglip")
    return {"path": path(caption), "patches": patches(caption), "attention": attention(caption),
            "contrastive": contrastive(pair, caption.picture, CAPTIONS), "next_token": next_token(caption),
            "soft_tokens": soft_tokens(caption), "temperature": temperature(caption), "detection": detection(box)}
