"""The easy-VQA set, and endless pictures in its spirit: one circle, rectangle or triangle, and questions.

The set (MIT licence) is the package `easy-vqa`, needed for training and for the published test split alone:

    pip install easy-vqa
"""

import functools
import math

import numpy as np
from PIL import Image, ImageDraw

from minipali.errors import InputError
from minipali.small_world.world import Thing, generator

SIDE = 64  # pixels, in the set
SHAPES = ("circle", "rectangle", "triangle")
COLORS = {
    "black": (0, 0, 0), "gray": (128, 128, 128), "red": (255, 0, 0), "green": (0, 255, 0),
    "blue": (0, 0, 255), "yellow": (255, 255, 0), "brown": (165, 42, 42), "teal": (0, 128, 128),
}  # fmt: skip
DARKEST = 230  # of a background's three channels

# The set's 107 questions. {kind} is a shape ("circle") or a colour ("red shape").
ABOUT_SHAPE = ("what shape does the image contain?", "what shape is in the image?", "what shape is present?")
ABOUT_COLOR = ("what color is the {shape}?", "what is the color of the {shape}?")
WHICH = "what is the {color} shape?"
THERE = (
    "is there a {kind}?", "is there a {kind} in the image?",
    "is a {kind} present?", "does the image contain a {kind}?",
)  # fmt: skip
NOT_THERE = (
    "is there not a {kind}?", "is there not a {kind} in the image?",
    "is no {kind} present?", "does the image not contain a {kind}?",
)  # fmt: skip
KINDS = (*SHAPES, *(f"{color} shape" for color in COLORS))


def example(question, answer):
    """The pair (prefix, suffix) as the model reads it."""
    return "answer en " + question, answer


def enlarge(picture, side):
    # (h,w,3) uint8 -> (side,side,3) uint8
    """What inference does to any picture: Pillow's bicubic resize."""
    return np.array(Image.fromarray(picture).resize((side, side), Image.BICUBIC))


@functools.cache
def load(split):
    """A split, "train" or "test": pictures (n,64,64,3) uint8 and, for each, its list of (prefix, suffix)."""
    try:
        import easy_vqa
    except ImportError:
        raise InputError("easy-VQA: the package is missing; pip install easy-vqa") from None
    questions, answers, numbers = getattr(easy_vqa, f"get_{split}_questions")()
    paths = getattr(easy_vqa, f"get_{split}_image_paths")()
    row = {number: i for i, number in enumerate(sorted(paths))}
    pictures = np.stack([np.asarray(Image.open(paths[number]).convert("RGB")) for number in row])
    asked = [[] for _ in row]
    for question, answer, number in zip(questions, answers, numbers):
        asked[row[number]].append(example(question, answer))
    return pictures, asked


def _commonest(picture):
    codes = picture.reshape(-1, 3).astype(np.int32) @ np.array([65536, 256, 1], dtype=np.int32)
    values, counts = np.unique(codes, return_counts=True)
    code = int(values[counts.argmax()])
    return np.array([code >> 16, code >> 8 & 255, code & 255], dtype=np.float32)


def augment(picture, rng):
    """The same shape, perhaps mirrored, elsewhere in the picture and on another pastel: every answer stays true."""
    behind = _commonest(picture)
    offset = picture.astype(np.float32) - behind
    distance = np.abs(offset).sum(-1)
    ys, xs = np.nonzero(distance)
    shape = offset.reshape(-1, 3)[distance.argmax()]  # the colour furthest from the background is that of the shape
    cover = (offset @ shape / (shape @ shape))[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1, None]
    if rng.random() < 0.5:
        cover = cover[:, ::-1]
    y, x = (int(rng.integers(SIDE - n + 1)) for n in cover.shape[:2])
    pastel = rng.integers(DARKEST, 256, size=3).astype(np.float32)
    moved = np.broadcast_to(pastel, picture.shape).copy()
    moved[y : y + cover.shape[0], x : x + cover.shape[1]] += cover * (behind + shape - pastel)
    return np.clip(np.rint(moved), 0, 255).astype(np.uint8)


def train_example(rng, side):
    """A picture (side,side,3) of the training split, augmented, and its list of (prefix, suffix)."""
    pictures, asked = load("train")
    i = int(rng.integers(len(pictures)))
    return enlarge(augment(pictures[i], rng), side), asked[i]


def questions(shape, color):
    """Every question of the set that fits a picture of one shape, with its answer, as (question, answer)."""
    found = [(question, shape) for question in ABOUT_SHAPE]
    found += [(form.format(shape=noun), color) for form in ABOUT_COLOR for noun in ("shape", shape)]
    found.append((WHICH.format(color=color), shape))
    for kind in KINDS:
        there = kind in (shape, f"{color} shape")
        found += [(form.format(kind=kind), "yes" if there else "no") for form in THERE]
        found += [(form.format(kind=kind), "no" if there else "yes") for form in NOT_THERE]
    return found


def ask(shape, color, rng, count):
    """Questions about a picture as (prefix, suffix); of those after presence, half are after what is there."""
    found = questions(shape, color)
    direct = len(ABOUT_SHAPE) + 2 * len(ABOUT_COLOR) + 1
    mine = [pair for pair in found[direct:] if f" {shape}" in pair[0] or f" {color} " in pair[0]]
    others = [pair for pair in found[direct:] if pair not in mine]
    pools = (found[:direct], mine, others)
    chosen = (pools[rng.integers(3)] for _ in range(count))
    return [example(*pool[rng.integers(len(pool))]) for pool in chosen]


def _corners(shape, x0, y0, x1, y1):
    if shape == "rectangle":
        return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    if shape == "triangle":
        return [((x0 + x1) / 2, y0), (x1, y1), (x0, y1)]
    # A corner per degree, on whole pixels, is what Pillow's ellipse was when the set was made; today's is rounder.
    x, y, width, height = (x0 + x1) // 2, (y0 + y1) // 2, x1 - x0, y1 - y0
    turns = [math.radians(i) for i in range(360)]
    ring = ((x + math.cos(t) * width / 2, y + math.sin(t) * height / 2) for t in turns)
    return [(math.floor(u + 0.5), math.floor(v + 0.5)) for u, v in ring]


def paint(shape, color, behind, box):
    """One shape in the box (x0, y0, x1, y1) of a 128-pixel picture with hard edges, halved: how the set was made."""
    picture = Image.new("RGB", (2 * SIDE, 2 * SIDE), tuple(behind))
    ImageDraw.Draw(picture).polygon(_corners(shape, *box), fill=COLORS[color])
    return np.array(picture.resize((SIDE, SIDE), Image.BILINEAR))


def _drawn(rng, side):
    shape, color = SHAPES[rng.integers(len(SHAPES))], list(COLORS)[rng.integers(len(COLORS))]
    width, height = rng.integers(16, 65, size=2).tolist()
    if shape != "rectangle":
        height = width if shape == "circle" else round(width * math.sqrt(3) / 2)
    x, y = (int(rng.integers(2 * SIDE - n)) for n in (width, height))
    box, behind = (x, y, x + width, y + height), rng.integers(DARKEST, 256, size=3).tolist()
    inside = enlarge(paint(shape, "red", (0, 0, 0), box), side)[:, :, 0] > 127
    box = tuple(value * side / (2 * SIDE) for value in box)
    return enlarge(paint(shape, color, behind, (x, y, x + width, y + height)), side), Thing(
        shape, color, None, None, box, inside)


def scene(seed, split, side):
    """A picture (side,side,3) of our own from a seed, and the one Thing in it, which has neither size nor place."""
    return _drawn(generator(seed, split, 2), side)


def synthetic(seed, split, side, count):
    """The picture of `scene`, and `count` questions as (prefix, suffix)."""
    rng = generator(seed, split, 2)
    picture, thing = _drawn(rng, side)
    return picture, ask(thing.shape, thing.color, rng, count)
