"""Scenes of emoji drawings on the small world's backgrounds: what many artists drew, and every truth about it.

One to four drawings a picture, each at least a third of the picture long, turned a little, mirrored where the thing
allows it, with light and colors changed a little. The drawings' own alpha gives exact boxes and masks. As in `world.py`
a seed is a picture, the same on every machine, and held-out seeds can never be training ones.

    python -m minipali.small_world.drawings SHEET.png     draws a contact sheet of held-out pictures
"""

import functools
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from minipali.small_world import artwork
from minipali.small_world.world import CELL, MARGIN, PLACES, SIDE, VISIBLE, Scene, background, generator

STREAM = 3  # beside those of shapes (0), letters (1) and easy-VQA (2)
SMALLEST = SIDE / 3  # pixels of a drawing's longer side
LONGEST = {1: 0.92, 2: 0.62, 3: 0.5, 4: 0.46}  # the same at most, of the picture's side, by how many there are
SHARED = 0.12  # of the smaller of two boxes at most: the rest of each stays in sight
TURN = 15  # degrees, either way
# Other artists draw in other proportions and colors, so a training picture changes more than a held-out one: how far a
# drawing is stretched and slanted, how far colors go round (degrees), and how weak and strong they become.
STRETCH = {"train": 0.18, "test": 0.0}
HUE = {"train": 35, "test": 15}
STRENGTH = {"train": (0.4, 1.4), "test": (0.7, 1.3)}
REPEATED = 0.25  # the share of drawings that show the same thing as one before, so that counting matters
ATTEMPTS = 60  # at places for drawings of given sizes, before other sizes are drawn
TRAINED_ON = tuple(name for name in artwork.ARTISTS if name not in (artwork.TEST, artwork.CHOICE))
# Not themselves in a mirror: writing, digits, and what leads from left to right.
UNMIRRORED = frozenset({
    "bar chart", "billiard ball", "calendar", "clapper board", "floppy disk", "money bag", "musical note", "piano",
    "stop sign", "taxi", "treble clef", "ambulance", "police car",
})  # fmt: skip
NOTHING = np.full((1, 3), np.inf)  # no color has to stand out from the background


@dataclass(frozen=True, eq=False)
class Drawn:
    """A drawing in a scene: its name, where it is, `box` (x0, y0, x1, y1), `mask` (SIDE, SIDE) of what is in sight."""

    name: str
    place: str
    box: tuple
    mask: np.ndarray


@dataclass(frozen=True, eq=False)
class Drawing:
    """A drawing ready to be turned: as it is and halved, colors times alpha, and corners of its outline (n, 2)."""

    sizes: tuple
    corners: np.ndarray

    @classmethod
    def of(cls, pixels):
        """From (side, side, 4) uint8."""
        inside = pixels[:, :, 3] > 127
        rows = np.flatnonzero(inside.any(1))
        left, right = inside.argmax(1)[rows], inside.shape[1] - inside[:, ::-1].argmax(1)[rows]
        corners = [np.stack([x, y], 1) for x in (left, right) for y in (rows, rows + 1)]
        picture = Image.fromarray(pixels).convert("RGBa")  # so that what is transparent lends no color when resized
        return cls((picture, picture.reduce(2)), np.concatenate(corners).astype(np.float64))


class Gallery:
    """The drawings of some artists, as {name: [Drawing, ...]} with every artist's drawing of that thing.

    `pictures`: {(artist, code point): (side, side, 4) uint8}, such as `artwork.load()`; `names`: {code point: name}.
    """

    def __init__(self, pictures, names, artists):
        shown = {}
        for (artist, point), pixels in pictures.items():
            if artist in artists and point in names:
                shown.setdefault(names[point], []).append(Drawing.of(pixels))
        self.shown = [(name, shown[name]) for name in names.values() if name in shown]
        self.names = [name for name, _ in self.shown]


@functools.cache
def gallery(artists, path=artwork.CACHE):
    """The drawings of these artists in the cache."""
    return Gallery(artwork.load(path), artwork.names(), artists)


def _kinds(rng, gallery, most):
    """The (name, Drawing) of one to `most` things."""
    numbers, kinds = [], []
    for _ in range(rng.integers(1, most + 1)):
        number = int(rng.integers(len(gallery.shown)))
        if numbers and rng.random() < REPEATED:
            number = numbers[rng.integers(len(numbers))]
        numbers.append(number)
        name, versions = gallery.shown[number]
        kinds.append((name, versions[rng.integers(len(versions))]))
    return kinds


def _turns(rng, kinds, split):
    """For each thing the matrix (2, 2) that turns it, perhaps in a mirror, and the box of what comes out."""
    turns = []
    for name, drawing in kinds:
        turn = math.radians(rng.uniform(-TURN, TURN))
        mirror = -1 if name not in UNMIRRORED and rng.random() < 0.5 else 1
        c, s = math.cos(turn), math.sin(turn)
        wider, slant = (rng.uniform(-STRETCH[split], STRETCH[split]) for _ in range(2))
        matrix = np.array([(mirror * c, -s), (mirror * s, c)]) @ np.array([(math.exp(wider), slant), (0.0, 1.0)])
        corners = drawing.corners @ matrix.T
        turns.append((matrix, corners.min(0), corners.max(0)))
    return turns


def _room(half, row):
    """From where to where the middle of something can lie in a row of the grid (or a column), or None."""
    low, high = max(row * CELL + MARGIN, half), min((row + 1) * CELL - MARGIN, SIDE - half)
    return (low, high) if low <= high else None


def _crowded(x, y, w, h, boxes):
    """Whether a box, given by its center and half its size, shares too much with one of the others."""
    for u, v, width, height in boxes:
        across, down = min(x + w, u + width) - max(x - w, u - width), min(y + h, v + height) - max(y - h, v - height)
        if across > 0 and down > 0 and across * down > SHARED * 4 * min(w * h, width * height):
            return True
    return False


def _places(rng, sizes):
    """A cell of the 3x3 grid and a center for boxes of these (width, height), none in doubt, or None. Plain numbers:
    this is tried many times."""
    halves = [(float(width) / 2, float(height) / 2) for width, height in sizes]
    rooms = [([_room(w, k) for k in range(3)], [_room(h, k) for k in range(3)]) for w, h in halves]
    cells = [[3 * row + column for row in range(3) for column in range(3) if across[column] and down[row]]
             for across, down in rooms]  # the cell in the center is always among them
    for attempt in rng.random((ATTEMPTS, len(halves), 3)).tolist():
        taken, boxes = [], []
        for (w, h), (across, down), free, (which, a, b) in zip(halves, rooms, cells, attempt):
            cell = free[int(which * len(free))]
            (x0, x1), (y0, y1) = across[cell % 3], down[cell // 3]
            x, y = x0 + a * (x1 - x0), y0 + b * (y1 - y0)
            if cell in taken or _crowded(x, y, w, h, boxes):
                break
            taken.append(cell)
            boxes.append((x, y, w, h))
        else:
            return taken, np.array([(x, y) for x, y, _, _ in boxes])
    return None


def _tint(rng, split):
    """A matrix (3, 3) and an offset in 0..255 that change light, strength and hue of colors a little."""
    gain, strength = rng.uniform(0.85, 1.12), rng.uniform(*STRENGTH[split])
    hue = math.radians(rng.uniform(-HUE[split], HUE[split]))
    gray = np.full((3, 3), 1 / 3)
    across = np.array([(0, -1, 1), (1, 0, -1), (-1, 1, 0)]) / math.sqrt(3)  # a quarter turn about the axis of grays
    turned = gray + math.cos(hue) * (np.eye(3) - gray) + math.sin(hue) * across
    matrix = gain * (gray + strength * (turned - gray)) * rng.uniform(0.93, 1.07, (3, 1))
    return matrix.astype(np.float32), np.float32(rng.uniform(-12, 12))


def _stamp(drawing, matrix, low, scale, at, tint):
    """A turned drawing as it lies in the picture with its box's top left at `at`: pixel (x, y), colors times alpha
    (h, w, 3) and alpha (h, w, 1), as float32, the former in 0..255, the latter in 0..1."""
    corner = np.floor(at).astype(int)
    high = (drawing.corners @ matrix.T).max(0)
    width, height = np.ceil(at + (high - low) * scale).astype(int) - corner
    halved = bool(scale <= 0.6)
    back = np.linalg.inv(matrix) / scale  # from the picture to the drawing
    offset = back @ (corner - at + low * scale)
    data = np.concatenate([back, offset[:, None]], 1) * (0.5 if halved else 1)
    size, data = (int(width), int(height)), data.ravel().tolist()
    picture = drawing.sizes[halved].transform(size, Image.AFFINE, data, Image.BILINEAR)
    pixels = np.asarray(picture).astype(np.float32)
    alpha, (colors, light) = pixels[:, :, 3:], tint
    paint = np.clip(pixels[:, :, :3] @ colors.T + light * (alpha / 255), 0, alpha)
    return corner, paint, alpha / 255


def _arrange(rng, kinds, split):
    """What `draw` needs of each thing, or None if these sizes find no room."""
    turns = _turns(rng, kinds, split)
    longest = LONGEST[len(kinds)] * SIDE
    scales = [rng.uniform(SMALLEST + 1, longest) / (high - low).max() for _, low, high in turns]
    sizes = np.array([(high - low) * scale for (_, low, high), scale in zip(turns, scales)])
    if (found := _places(rng, sizes)) is None:
        return None
    return [(cell, matrix, low, scale, center - size / 2) for cell, center, (matrix, low, _), scale, size
            in zip(*found, turns, scales, sizes)]


def _box(x, y, inside):
    columns, rows = np.flatnonzero(inside.any(0)), np.flatnonzero(inside.any(1))
    return float(x + columns[0]), float(y + rows[0]), float(x + columns[-1] + 1), float(y + rows[-1] + 1)


def draw(seed, gallery, split="train", most=4):
    """The picture of a seed with one to `most` drawings from a gallery, and its things in reading order; `split` is
    "train" or "test"."""
    rng = generator(seed, split, STREAM)
    while True:
        kinds = _kinds(rng, gallery, most)
        if (arranged := _arrange(rng, kinds, split)) is None:
            continue
        picture = background(rng, NOTHING, 0)
        top, found = np.full((SIDE, SIDE), -1, dtype=np.int8), []
        for i, ((name, drawing), (cell, matrix, low, scale, at)) in enumerate(zip(kinds, arranged)):
            (x, y), paint, alpha = _stamp(drawing, matrix, low, scale, at, _tint(rng, split))
            part = slice(y, y + alpha.shape[0]), slice(x, x + alpha.shape[1])
            picture[part] = np.rint(paint + picture[part] * (1 - alpha)).astype(np.uint8)
            inside = alpha[:, :, 0] > 0.5
            if not inside.any():
                break
            top[part][inside] = i
            found.append((cell, name, _box(x, y, inside), np.count_nonzero(inside)))
        masks = [top == i for i in range(len(found))]
        seen = all(np.count_nonzero(mask) >= VISIBLE * area for mask, (*_, area) in zip(masks, found))
        large = all(max(x1 - x0, y1 - y0) >= SMALLEST for _, _, (x0, y0, x1, y1), _ in found)
        if len(found) == len(kinds) and seen and large:
            things = sorted(zip(found, masks), key=lambda pair: pair[0][0])
            return Scene(picture, [Drawn(name, PLACES[cell], box, mask) for (cell, name, box, _), mask in things])


def contact_sheet(count, columns, gallery):
    """Held-out pictures with the names of what is in them, as one picture."""
    from minipali.outputs.sheets import contact_sheet as sheet

    scenes = [draw(i, gallery, "test") for i in range(count)]
    captions = [", ".join(f"{thing.name} {thing.place}" for thing in scene.things) for scene in scenes]
    return sheet([Image.fromarray(scene.image) for scene in scenes], captions, columns=columns)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m minipali.small_world.drawings SHEET.png")
    contact_sheet(36, 6, gallery((artwork.CHOICE,))).save(Path(sys.argv[1]))
