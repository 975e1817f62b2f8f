"""A small world of colored shapes, drawn from a seed: any number of pictures, each with exact ground truth.

A model that learns here can be judged exactly, because no answer is a matter of opinion: colors, sizes and places keep
clear margins from one another, and no shape hides more than a little of another.
"""
import functools
import math
import string
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 98  # pixels; seven patches of 14 each way
CELL = SIDE / 3  # the nine places are the cells of a 3x3 grid
MARGIN = 8  # pixels from a thing's center to the borders of its cell, so that its place is unambiguous
OVERSAMPLING = 4  # outlines are drawn this many times larger and averaged down: smooth edges
VISIBLE = 0.8  # the least share of each thing that stays visible behind the others
CONTRAST, TEXT_CONTRAST = 110, 150  # the least RGB distance of things, and of thin letters, from the background
SPLITS = {"train": 1, "test": 2}  # the first number of every seed, so that the splits share no picture

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
SIZES = {"small": (9, 11), "large": (15, 19)}  # half of the longer side, in pixels
PLACES = (
    "at the top left", "at the top", "at the top right",
    "on the left", "in the center", "on the right",
    "at the bottom left", "at the bottom", "at the bottom right",
)  # fmt: skip
COLORS = {  # the range of each color in RGB: its lowest and highest corner; two ranges are at least 45 apart
    "black": ((0, 0, 0), (25, 25, 25)),
    "gray": ((116, 116, 116), (142, 142, 142)),
    "red": ((225, 0, 0), (255, 30, 30)),
    "green": ((0, 185, 0), (40, 255, 40)),
    "blue": ((0, 0, 195), (40, 40, 255)),
    "yellow": ((230, 220, 0), (255, 255, 40)),
    "brown": ((150, 34, 32), (176, 56, 46)),
    "teal": ((0, 112, 112), (28, 145, 145)),
}
TONES = ((206, 256), (80, 200), (5, 70))  # light, medium and dark backgrounds: the range of their channels
TONE_SHARES = (0.68, 0.22, 0.10)  # how often each is tried
TURNS = {"circle": 0, "square": 15, "triangle": 40, "star": 36, "cross": 15, "heart": 20}  # degrees at most, either way
LETTERS = "".join(c for c in string.ascii_uppercase + string.digits if c not in "O0I1")  # no two that look alike


@dataclass(frozen=True, eq=False)
class Thing:
    """One shape: its attributes, `box` (x0, y0, x1, y1) around its outline, `mask` (SIDE, SIDE) of what is visible."""

    shape: str
    color: str
    size: str
    place: str
    box: tuple
    mask: np.ndarray

    @property
    def center(self):
        """The center (x, y) of the box, in pixels."""
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2


@dataclass(frozen=True, eq=False)
class Scene:
    """A picture, uint8 (SIDE, SIDE, 3), and the things in it in reading order: row by row, left to right."""

    image: np.ndarray
    things: list


def generator(seed, split, stream):
    """The random generator of one picture; `seed` is a non-negative integer or a tuple of them."""
    return np.random.default_rng([SPLITS[split], stream, *(seed if isinstance(seed, tuple) else (seed,))])


def _zigzag(count, inner, start=-math.pi / 2):
    """The corners of a star of `count` points, or of a regular polygon of 2 * count corners when inner is 1."""
    angles = start + np.arange(2 * count) * (math.pi / count)
    return np.stack([np.cos(angles), np.sin(angles)], 1) * np.where(np.arange(2 * count) % 2, inner, 1.0)[:, None]


def _heart():
    t = np.linspace(0, 2 * math.pi, 40, endpoint=False)
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([16 * np.sin(t) ** 3, -y], 1)


def _cross(w):
    arm = np.array([(-w, -1.0), (w, -1.0), (w, -w)])
    quarter = np.array([(0.0, 1.0), (-1.0, 0.0)])
    return np.concatenate([arm @ np.linalg.matrix_power(quarter, k) for k in range(4)])


CIRCLE, HEART = _zigzag(32, 1.0), _heart()


def outline(shape, rng):
    """The corners (corners, 2) of a shape, turned a little; its box is centered on 0 and the longer side is 2."""
    if shape == "circle":
        corners = CIRCLE
    elif shape == "square":
        corners = np.array([(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)])
    elif shape == "triangle":
        corners = np.array([(0.0, -1.0), (1.0, 0.73), (-1.0, 0.73)]) * (1.0, rng.uniform(0.9, 1.15))
    elif shape == "star":
        corners = _zigzag(5, rng.uniform(0.38, 0.48))
    elif shape == "cross":
        corners = _cross(rng.uniform(0.28, 0.4))
    else:
        corners = HEART
    turn = math.radians(rng.uniform(-TURNS[shape], TURNS[shape]))
    c, s = math.cos(turn), math.sin(turn)
    corners = corners @ np.array([(c, s), (-s, c)])
    low, high = corners.min(0), corners.max(0)
    return (corners - (low + high) / 2) * (2 / (high - low).max())


def _stamp(corners):
    """Rasterize an outline (in pixels): its top left pixel, its coverage as an "L" picture, and its exact box."""
    left, top = np.floor(corners.min(0)).astype(int) - 1
    width, height = np.ceil(corners.max(0)).astype(int) + 2 - (left, top)
    large = Image.new("L", (int(width) * OVERSAMPLING, int(height) * OVERSAMPLING))
    points = np.rint((corners - (left, top)) * OVERSAMPLING).astype(int)
    ImageDraw.Draw(large).polygon(points.ravel().tolist(), fill=255)
    x0, y0, x1, y1 = (value / OVERSAMPLING for value in large.getbbox())
    box = (left + x0, top + y0, left + x1, top + y1)
    return (int(left), int(top)), large.reduce(OVERSAMPLING), tuple(float(v) for v in box)


def _background_ends(rng, colors, contrast, graded):
    """The background's color at its two ends, both far enough from every color that will lie on it."""
    while True:
        darkest, lightest = TONES[rng.choice(len(TONES), p=TONE_SHARES)]
        ends = np.repeat(rng.uniform(darkest, lightest, (1, 3)), 2, axis=0)
        if graded:
            ends[1] = np.clip(ends[1] + rng.uniform(-60, 60, 3), 0, 255)
        between = ends[0] + np.linspace(0, 1, 5)[:, None] * (ends[1] - ends[0])
        if ((between[:, None] - colors) ** 2).sum(-1).min() >= contrast**2:
            return ends


AXIS = np.linspace(-1, 1, SIDE, dtype=np.float32)


def background(rng, colors, contrast):
    """A plain, graded, blotched or noisy picture, uint8 (SIDE, SIDE, 3), on which `colors` (n, 3) stand out."""
    kind = ("plain", "graded", "graded", "blotched", "noisy")[rng.integers(5)]
    ends = _background_ends(rng, colors, contrast, kind == "graded" or kind == "noisy" and rng.random() < 0.5)
    if kind == "plain":
        return np.broadcast_to(ends[0].astype(np.uint8), (SIDE, SIDE, 3)).copy()
    if kind == "blotched":
        n = rng.integers(4, 9)
        blots = np.clip(ends[0] + rng.uniform(-24, 24, (n, n, 3)), 0, 255).astype(np.uint8)
        return np.array(Image.fromarray(blots).resize((SIDE, SIDE), Image.BICUBIC))
    angle = rng.uniform(0, 2 * math.pi)
    c, s = math.cos(angle), math.sin(angle)
    ramp = 0.5 + (c * AXIS + s * AXIS[:, None]) / (2 * (abs(c) + abs(s)))
    picture = ends[0].astype(np.float32) + ramp[:, :, None] * (ends[1] - ends[0]).astype(np.float32)
    if kind == "noisy":
        noise = rng.standard_normal((SIDE, SIDE, 1), dtype=np.float32)
        picture += noise * np.float32(rng.uniform(4, 12))
    return np.clip(picture, 0, 255).astype(np.uint8)


def _shade(rng, name):
    low, high = COLORS[name]
    return rng.integers(low, np.add(high, 1))


def _kinds(rng):
    """The (shape, color) of one to four things; they often share one of the two, so that counting is worth asking."""
    kinds = []
    for _ in range(rng.integers(1, 5)):
        shape, color = SHAPES[rng.integers(len(SHAPES))], list(COLORS)[rng.integers(len(COLORS))]
        if kinds and rng.random() < 0.25:
            shape = kinds[rng.integers(len(kinds))][0]
        if kinds and rng.random() < 0.25:
            color = kinds[rng.integers(len(kinds))][1]
        kinds.append((shape, color))
    return kinds


def _touches(box, color, others):
    """Whether a thing comes within two pixels of one of its own color, so that the two could look like one."""
    x0, y0, x1, y1 = box
    return any(
        color == other and x0 - 2 < u1 and u0 < x1 + 2 and y0 - 2 < v1 and v0 < y1 + 2
        for other, (u0, v0, u1, v1) in others
    )


def _arrange(rng, kinds):
    """(cell, size, stamp, mask) of each thing, or None if one hides too much of another or touches one of its color."""
    top = np.full((SIDE, SIDE), -1, dtype=np.int8)  # which thing is uppermost, pixel by pixel
    placed, areas, boxes = [], [], []
    for i, (cell, (_, color)) in enumerate(zip(rng.permutation(9)[:len(kinds)].tolist(), kinds)):
        size = "small" if rng.random() < 0.5 else "large"
        radius = rng.uniform(*SIZES[size])
        corner = np.array([cell % 3, cell // 3]) * CELL
        low, high = np.maximum(corner + MARGIN, radius + 2), np.minimum(corner + CELL - MARGIN, SIDE - radius - 2)
        (x, y), cover, box = stamp = _stamp(outline(kinds[i][0], rng) * radius + rng.uniform(low, high))
        if _touches(box, color, boxes):
            return None
        boxes.append((color, box))
        inside = np.asarray(cover) > 127
        top[y:y + cover.height, x:x + cover.width][inside] = i
        areas.append(np.count_nonzero(inside))
        placed.append((cell, size, stamp))
    placed = [(*entry, top == i) for i, entry in enumerate(placed)]
    if any(np.count_nonzero(mask) < VISIBLE * area for (*_, mask), area in zip(placed, areas)):
        return None
    return placed


def draw(seed, split="train"):
    """The Scene of a seed, the same on every machine, with one to four things; `split` is "train" or "test"."""
    rng = generator(seed, split, 0)
    kinds = _kinds(rng)
    while (arranged := _arrange(rng, kinds)) is None:
        pass
    shades = np.array([_shade(rng, color) for _, color in kinds])
    picture = Image.fromarray(background(rng, shades, CONTRAST))
    things = {}
    for (shape, color), shade, (cell, size, (at, cover, box), mask) in zip(kinds, shades.tolist(), arranged):
        picture.paste(tuple(shade), at, cover)
        things[cell] = Thing(shape, color, size, PLACES[cell], box, mask)
    return Scene(np.array(picture), [things[cell] for cell in sorted(things)])


@functools.cache
def _font(size):
    return ImageFont.load_default(size)


def lettering(seed, split="train"):
    """A picture, uint8 (SIDE, SIDE, 3), of three to six letters and digits in one line; its text; and a map
    (SIDE, SIDE) of the letter that each pixel belongs to, numbered from 1 in the order of LETTERS; 0: none."""
    rng = generator(seed, split, 1)
    text = "".join(LETTERS[i] for i in rng.integers(len(LETTERS), size=rng.integers(3, 7)))
    shade = _shade(rng, list(COLORS)[rng.integers(len(COLORS))])
    picture = Image.fromarray(background(rng, shade[None], TEXT_CONTRAST))
    largest = min(30, int(30 * (SIDE - 12) / _font(30).getlength(text)))
    font = _font(2 * int(rng.integers(min(16, largest), largest + 1)))  # drawn twice as large, then turned and reduced
    x0, y0, x1, y1 = font.getbbox(text)
    ink, letters = (Image.new("L", (int(x1 - x0), int(y1 - y0))) for _ in range(2))
    ImageDraw.Draw(ink).text((-x0, -y0), text, font=font, fill=255)
    for i, letter in enumerate(text):
        left, right = (font.getlength(text[:n]) - x0 for n in (i, i + 1))
        letters.paste(1 + LETTERS.index(letter), (round(left), 0, round(right), letters.height))
    turn = rng.uniform(-6, 6)
    ink = ink.rotate(turn, Image.BICUBIC, expand=True).reduce(2)
    letters = letters.rotate(turn, Image.NEAREST, expand=True).resize(ink.size, Image.NEAREST)
    at = (int(rng.integers(0, SIDE - ink.width + 1)), int(rng.integers(0, SIDE - ink.height + 1)))
    picture.paste(tuple(shade.tolist()), at, ink)
    letter_map = Image.new("L", (SIDE, SIDE))
    letter_map.paste(letters, at, ink.point(lambda value: 255 * (value > 127)))
    return np.array(picture), text, np.array(letter_map)


def draw_text(seed, split="train"):
    """The picture and the text of `lettering`."""
    picture, text, _ = lettering(seed, split)
    return picture, text
