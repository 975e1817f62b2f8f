"""The easy-VQA dataset, and any number of pictures like its own: one circle, rectangle or triangle, and questions.

The dataset (MIT license) is the package `easy-vqa`, needed only for training and for the published test split:

    pip install easy-vqa
"""

import functools
import math

import numpy as np
from PIL import Image, ImageDraw

from minipali.errors import InputError
from minipali.small_world.world import Thing, generator

SIDE = 64  # pixels, in the dataset
SHAPES = ("circle", "rectangle", "triangle")
COLORS = {
    "black": (0, 0, 0), "gray": (128, 128, 128), "red": (255, 0, 0), "green": (0, 255, 0),
    "blue": (0, 0, 255), "yellow": (255, 255, 0), "brown": (165, 42, 42), "teal": (0, 128, 128),
}  # fmt: skip
DARKEST = 230  # the least value of a background's three channels

# The dataset's 107 questions. {kind} is a shape ("circle") or a color ("red shape").
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
    """Resize as inference does: Pillow's bicubic filter."""
    # (height,width,3) uint8 -> (side,side,3) uint8
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
    examples = [[] for _ in row]
    for question, answer, number in zip(questions, answers, numbers):
        examples[row[number]].append(example(question, answer))
    return pictures, examples


def _most_frequent_color(picture):
    codes = picture.reshape(-1, 3).astype(np.int32) @ np.array([65536, 256, 1], dtype=np.int32)
    values, counts = np.unique(codes, return_counts=True)
    code = int(values[counts.argmax()])
    return np.array([code >> 16, code >> 8 & 255, code & 255], dtype=np.float32)


def augment(picture, rng):
    """The same shape moved, perhaps mirrored, and on another pastel background: every answer stays true."""
    background = _most_frequent_color(picture)
    offset = picture.astype(np.float32) - background
    distance = np.abs(offset).sum(-1)
    ys, xs = np.nonzero(distance)
    shape = offset.reshape(-1, 3)[distance.argmax()]  # the color farthest from the background is the shape's
    cover = (offset @ shape / (shape @ shape))[ys.min():ys.max() + 1, xs.min():xs.max() + 1, None]
    if rng.random() < 0.5:
        cover = cover[:, ::-1]
    y, x = (int(rng.integers(SIDE - n + 1)) for n in cover.shape[:2])
    pastel = rng.integers(DARKEST, 256, size=3).astype(np.float32)
    moved = np.broadcast_to(pastel, picture.shape).copy()
    moved[y:y + cover.shape[0], x:x + cover.shape[1]] += cover * (background + shape - pastel)
    return np.clip(np.rint(moved), 0, 255).astype(np.uint8)


def train_example(rng, side):
    """A picture (side,side,3) of the training split, augmented, and its list of (prefix, suffix)."""
    pictures, examples = load("train")
    i = int(rng.integers(len(pictures)))
    return enlarge(augment(pictures[i], rng), side), examples[i]


def questions(shape, color):
    """Every question of the dataset that fits a picture of one shape, with its answer, as (question, answer)."""
    pairs = [(question, shape) for question in ABOUT_SHAPE]
    pairs += [(form.format(shape=noun), color) for form in ABOUT_COLOR for noun in ("shape", shape)]
    pairs.append((WHICH.format(color=color), shape))
    for kind in KINDS:
        there = kind in (shape, f"{color} shape")
        pairs += [(form.format(kind=kind), "yes" if there else "no") for form in THERE]
        pairs += [(form.format(kind=kind), "no" if there else "yes") for form in NOT_THERE]
    return pairs


def ask(shape, color, rng, count):
    """`count` questions about a picture as (prefix, suffix).

    A third asks for the shape or the color, a third whether something is there that is, and a third whether something
    is there that is not.
    """
    pairs = questions(shape, color)
    direct = len(ABOUT_SHAPE) + 2 * len(ABOUT_COLOR) + 1
    present = [pair for pair in pairs[direct:] if f" {shape}" in pair[0] or f" {color} " in pair[0]]
    absent = [pair for pair in pairs[direct:] if pair not in present]
    pools = (pairs[:direct], present, absent)
    chosen = (pools[rng.integers(3)] for _ in range(count))
    return [example(*pool[rng.integers(len(pool))]) for pool in chosen]


def _corners(shape, x0, y0, x1, y1):
    if shape == "rectangle":
        return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]
    if shape == "triangle":
        return [((x0 + x1) / 2, y0), (x1, y1), (x0, y1)]
    # One corner for each degree, rounded to pixels: what Pillow drew for an ellipse when the dataset was made.
    x, y, width, height = (x0 + x1) // 2, (y0 + y1) // 2, x1 - x0, y1 - y0
    angles = [math.radians(i) for i in range(360)]
    circle = ((x + math.cos(t) * width / 2, y + math.sin(t) * height / 2) for t in angles)
    return [(math.floor(u + 0.5), math.floor(v + 0.5)) for u, v in circle]


def paint(shape, color, background, box):
    """One shape in the box (x0, y0, x1, y1) of a 128-pixel picture with hard edges, halved, as the dataset was made."""
    picture = Image.new("RGB", (2 * SIDE, 2 * SIDE), tuple(background))
    ImageDraw.Draw(picture).polygon(_corners(shape, *box), fill=COLORS[color])
    return np.array(picture.resize((SIDE, SIDE), Image.BILINEAR))


def _random_picture(rng, side):
    shape, color = SHAPES[rng.integers(len(SHAPES))], list(COLORS)[rng.integers(len(COLORS))]
    width, height = rng.integers(16, 65, size=2).tolist()
    if shape != "rectangle":
        height = width if shape == "circle" else round(width * math.sqrt(3) / 2)
    x, y = (int(rng.integers(2 * SIDE - n)) for n in (width, height))
    box, background = (x, y, x + width, y + height), rng.integers(DARKEST, 256, size=3).tolist()
    picture = enlarge(paint(shape, color, background, box), side)
    mask = enlarge(paint(shape, "red", (0, 0, 0), box), side)[:, :, 0] > 127
    scaled_box = tuple(value * side / (2 * SIDE) for value in box)
    return picture, Thing(shape, color, None, None, scaled_box, mask)


def scene(seed, split, side):
    """A picture (side,side,3) like the dataset's, from a seed, and its one Thing, which has neither size nor place."""
    return _random_picture(generator(seed, split, 2), side)


def synthetic(seed, split, side, count):
    """The picture of `scene`, and `count` questions as (prefix, suffix)."""
    rng = generator(seed, split, 2)
    picture, thing = _random_picture(rng, side)
    return picture, ask(thing.shape, thing.color, rng, count)
