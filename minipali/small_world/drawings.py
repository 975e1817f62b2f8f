"""Scenes of emoji drawings by many artists on the small world's backgrounds, with exact ground truth.

One to four drawings a picture, each at least a third of the picture long, turned a little, mirrored where the thing
allows it, with brightness and colors changed a little. The drawings' own alpha gives exact boxes and masks. As in
`world.py`, a seed gives the same picture on every machine, and no held-out picture has a training picture's seed.

    python -m minipali.small_world.drawings SHEET.png     draws a contact sheet of held-out pictures
"""

import functools
import math
import sys
from dataclasses import dataclass

import numpy as np
from PIL import Image

from minipali.errors import Parser, path_name, prepare_process, run_command
from minipali.outputs.picture_file import check_picture_file, save_picture
from minipali.outputs.sheets import contact_sheet
from minipali.small_world import artwork
from minipali.small_world.world import CELL, MARGIN, PLACES, SIDE, VISIBLE, Scene, background, generator

STREAM = 3  # of random numbers; those of shapes, letters and easy-VQA are 0, 1 and 2
SMALLEST = SIDE / 3  # pixels of a drawing's longer side
LONGEST = {1: 0.92, 2: 0.62, 3: 0.5, 4: 0.46}  # the longer side at most, in picture sides, by the number of drawings
MAX_SHARED = 0.12  # the share of the smaller of two boxes that the other may overlap
TURN = 15  # degrees at most, either way
# Artists differ in proportions and colors, so training pictures are augmented more than held-out ones: how far a
# drawing is stretched and slanted, how far its hues are rotated (degrees), and the range of its saturation.
STRETCH = {"train": 0.18, "test": 0.0}
HUE = {"train": 35, "test": 15}
SATURATION = {"train": (0.4, 1.4), "test": (0.7, 1.3)}
REPEATED = 0.25  # the share of drawings that show the same thing as an earlier one, so that counting is worth asking
ATTEMPTS = 60  # at finding places for drawings of given sizes, before other sizes are tried
TRAINED_ON = tuple(name for name in artwork.ARTISTS if name not in (artwork.TEST, artwork.VALIDATION))
# Wrong when mirrored: writing, digits, and what has a left and a right side.
UNMIRRORED = frozenset({
    "bar chart", "billiard ball", "calendar", "clapper board", "floppy disk", "money bag", "musical note", "piano",
    "stop sign", "taxi", "treble clef", "ambulance", "police car",
})  # fmt: skip
NO_COLORS = np.full((1, 3), np.inf)  # any background will do


@dataclass(frozen=True, eq=False)
class PlacedDrawing:
    """A drawing in a scene: its name, its place, `box` (x0, y0, x1, y1), `mask` (SIDE, SIDE) of its visible pixels."""

    name: str
    place: str
    box: tuple
    mask: np.ndarray


@dataclass(frozen=True, eq=False)
class Drawing:
    """A drawing with premultiplied alpha at full and at half size, and the corners (n, 2) of its outline."""

    sizes: tuple
    corners: np.ndarray

    @classmethod
    def of(cls, pixels):
        """The Drawing of an RGBA array (side, side, 4) uint8."""
        inside = pixels[:, :, 3] > 127
        rows = np.flatnonzero(inside.any(1))
        left, right = inside.argmax(1)[rows], inside.shape[1] - inside[:, ::-1].argmax(1)[rows]
        corners = [np.stack([x, y], 1) for x in (left, right) for y in (rows, rows + 1)]
        picture = Image.fromarray(pixels).convert("RGBa")  # premultiplied, so that transparent pixels add no color
        return cls((picture, picture.reduce(2)), np.concatenate(corners).astype(np.float64))


class Gallery:
    """The drawings of some artists: `by_name`, a list of (name, [every artist's Drawing of that thing]).

    `pictures`: {(artist, code point): (side, side, 4) uint8}, such as `artwork.load()`; `names`: {code point: name}.
    """

    def __init__(self, pictures, names, artists):
        versions = {}
        for (artist, point), pixels in pictures.items():
            if artist in artists and point in names:
                versions.setdefault(names[point], []).append(Drawing.of(pixels))
        self.by_name = [(name, versions[name]) for name in names.values() if name in versions]
        self.names = [name for name, _ in self.by_name]


@functools.cache
def gallery(artists, path=artwork.CACHE):
    """The drawings of these artists in the cache."""
    return Gallery(artwork.load(path), artwork.names(), artists)


def _kinds(rng, gallery, most):
    """The (name, Drawing) of one to `most` things."""
    numbers, kinds = [], []
    for _ in range(rng.integers(1, most + 1)):
        number = int(rng.integers(len(gallery.by_name)))
        if numbers and rng.random() < REPEATED:
            number = numbers[rng.integers(len(numbers))]
        numbers.append(number)
        name, versions = gallery.by_name[number]
        kinds.append((name, versions[rng.integers(len(versions))]))
    return kinds


def _turns(rng, kinds, split):
    """For each thing the matrix (2, 2) that turns and perhaps mirrors it, and the low and high corner of the result."""
    turns = []
    for name, drawing in kinds:
        turn = math.radians(rng.uniform(-TURN, TURN))
        mirror = -1 if name not in UNMIRRORED and rng.random() < 0.5 else 1
        c, s = math.cos(turn), math.sin(turn)
        stretch, slant = (rng.uniform(-STRETCH[split], STRETCH[split]) for _ in range(2))
        matrix = np.array([(mirror * c, -s), (mirror * s, c)]) @ np.array([(math.exp(stretch), slant), (0.0, 1.0)])
        corners = drawing.corners @ matrix.T
        turns.append((matrix, corners.min(0), corners.max(0)))
    return turns


def _room(half, row):
    """The range of the center of a thing of half size `half` in a row of the grid (or a column), or None."""
    low, high = max(row * CELL + MARGIN, half), min((row + 1) * CELL - MARGIN, SIDE - half)
    return (low, high) if low <= high else None


def _overlaps(box, boxes):
    """Whether a box (x and y of its center, half its width and height) overlaps too much with one of the others."""
    x, y, w, h = box
    for u, v, width, height in boxes:
        across, down = min(x + w, u + width) - max(x - w, u - width), min(y + h, v + height) - max(y - h, v - height)
        if across > 0 and down > 0 and across * down > MAX_SHARED * 4 * min(w * h, width * height):
            return True
    return False


def _places(rng, sizes):
    """The cells of the 3x3 grid and the centers (n, 2) of boxes of these (width, height), or None if none were found.

    Plain Python numbers, since this is tried many times.
    """
    halves = [(float(width) / 2, float(height) / 2) for width, height in sizes]
    rooms = [([_room(w, k) for k in range(3)], [_room(h, k) for k in range(3)]) for w, h in halves]
    cells = [[3 * row + column for row in range(3) for column in range(3) if across[column] and down[row]]
             for across, down in rooms]  # the cell in the center is always among them
    for attempt in rng.random((ATTEMPTS, len(halves), 3)).tolist():
        taken, boxes = [], []
        for (w, h), (across, down), fitting, (which, a, b) in zip(halves, rooms, cells, attempt):
            cell = fitting[int(which * len(fitting))]
            (x0, x1), (y0, y1) = across[cell % 3], down[cell // 3]
            box = x0 + a * (x1 - x0), y0 + b * (y1 - y0), w, h
            if cell in taken or _overlaps(box, boxes):
                break
            taken.append(cell)
            boxes.append(box)
        else:
            return taken, np.array([(x, y) for x, y, _, _ in boxes])
    return None


def _tint(rng, split):
    """A matrix (3, 3) and an offset in 0..255 that change brightness, saturation and hue of colors a little."""
    gain, saturation = rng.uniform(0.85, 1.12), rng.uniform(*SATURATION[split])
    hue = math.radians(rng.uniform(-HUE[split], HUE[split]))
    gray = np.full((3, 3), 1 / 3)
    quarter_turn = np.array([(0, -1, 1), (1, 0, -1), (-1, 1, 0)]) / math.sqrt(3)  # about the axis of grays
    turned = gray + math.cos(hue) * (np.eye(3) - gray) + math.sin(hue) * quarter_turn
    matrix = gain * (gray + saturation * (turned - gray)) * rng.uniform(0.93, 1.07, (3, 1))
    return matrix.astype(np.float32), np.float32(rng.uniform(-12, 12))


def _stamp(drawing, matrix, low, scale, at, tint):
    """A turned drawing as it lies in the picture, its box's top left corner at `at`.

    Returns its top left pixel (x, y), its premultiplied colors (height, width, 3) in 0..255, and its alpha
    (height, width, 1) in 0..1, both float32.
    """
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
    alpha, (color_matrix, brightness) = pixels[:, :, 3:], tint
    colors = np.clip(pixels[:, :, :3] @ color_matrix.T + brightness * (alpha / 255), 0, alpha)
    return corner, colors, alpha / 255


def _arrange(rng, kinds, split):
    """(cell, matrix, low corner, scale, top left) of each thing, or None if no places were found for these sizes."""
    turns = _turns(rng, kinds, split)
    longest = LONGEST[len(kinds)] * SIDE
    scales = [rng.uniform(SMALLEST + 1, longest) / (high - low).max() for _, low, high in turns]
    sizes = np.array([(high - low) * scale for (_, low, high), scale in zip(turns, scales)])
    if (places := _places(rng, sizes)) is None:
        return None
    return [(cell, matrix, low, scale, center - size / 2) for cell, center, (matrix, low, _), scale, size
            in zip(*places, turns, scales, sizes)]


def _box(x, y, inside):
    columns, rows = np.flatnonzero(inside.any(0)), np.flatnonzero(inside.any(1))
    return float(x + columns[0]), float(y + rows[0]), float(x + columns[-1] + 1), float(y + rows[-1] + 1)


def draw(seed, gallery, split="train", most=4):
    """The Scene of a seed, with one to `most` drawings from a gallery; `split` is "train" or "test"."""
    rng = generator(seed, split, STREAM)
    while True:
        kinds = _kinds(rng, gallery, most)
        if (arranged := _arrange(rng, kinds, split)) is None:
            continue
        picture = background(rng, NO_COLORS, 0)
        top, placed = np.full((SIDE, SIDE), -1, dtype=np.int8), []  # top: which thing is uppermost at each pixel
        for i, ((name, drawing), (cell, matrix, low, scale, at)) in enumerate(zip(kinds, arranged)):
            (x, y), colors, alpha = _stamp(drawing, matrix, low, scale, at, _tint(rng, split))
            part = slice(y, y + alpha.shape[0]), slice(x, x + alpha.shape[1])
            picture[part] = np.rint(colors + picture[part] * (1 - alpha)).astype(np.uint8)
            inside = alpha[:, :, 0] > 0.5
            if not inside.any():
                break
            top[part][inside] = i
            placed.append((cell, name, _box(x, y, inside), np.count_nonzero(inside)))
        masks = [top == i for i in range(len(placed))]
        visible = all(np.count_nonzero(mask) >= VISIBLE * area for mask, (*_, area) in zip(masks, placed))
        large = all(max(x1 - x0, y1 - y0) >= SMALLEST for _, _, (x0, y0, x1, y1), _ in placed)
        if len(placed) == len(kinds) and visible and large:
            in_order = sorted(zip(placed, masks), key=lambda pair: pair[0][0])
            things = [PlacedDrawing(name, PLACES[cell], box, mask) for (cell, name, box, _), mask in in_order]
            return Scene(picture, things)


def held_out_sheet(count, columns, gallery):
    """Held-out pictures with the names of what is in them, as one picture."""
    scenes = [draw(i, gallery, "test") for i in range(count)]
    captions = [", ".join(f"{thing.name} {thing.place}" for thing in scene.things) for scene in scenes]
    return contact_sheet([Image.fromarray(scene.image) for scene in scenes], captions, columns=columns)


def main(argv):
    parser = Parser("minipali.small_world.drawings", "Draw 36 held-out pictures by the validation artist, with the "
                    "names of what is in them.", "  python -m minipali.small_world.drawings sheet.png")
    parser.add_argument("sheet", type=path_name, metavar="SHEET", help="the picture file to write")
    path = parser.parse_args(argv).sheet
    check_picture_file(path)
    save_picture(held_out_sheet(36, 6, gallery((artwork.VALIDATION,))), path)


if __name__ == "__main__":
    prepare_process()
    sys.exit(run_command("minipali.small_world.drawings", main, sys.argv[1:]))
