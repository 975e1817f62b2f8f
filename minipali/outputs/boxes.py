"""Boxes as text: PaliGemma points with 1024 location tokens, and here they become pixels and back.

    detect cat ; dog  ->  <loc0100><loc0200><loc0800><loc0900> cat ; <loc0000><loc0010><loc0300><loc0400> dog

The four are ymin, xmin, ymax, xmax - y first, unlike every drawing library - as fractions of the picture's own height
and width; that the model saw it squeezed to a square changes no fraction. With `segment`, sixteen <seg> tokens follow
and describe the shape inside the box (see `segmentation`).

A fraction v is written as round(1023 v). big_vision reads it back as n / 1023 and so do we; the hub's demo, Google's
documentation and several notebooks divide by 1024. The two differ by less than a thousandth of the side.
"""
import dataclasses
import re

import numpy as np
from PIL import Image, ImageDraw, ImageFont

LAST = 1023  # the largest location, hence the number of steps across the picture
CODES = 16   # <seg> tokens of one shape

# A run of <loc>, perhaps a run of <seg>, then the label: anything up to ";" or the next token of either kind.
_OBJECT = re.compile(r"((?:<loc\d{4}>\s*)+)((?:<seg\d{3}>\s*)*)((?:(?!<loc\d{4}>|<seg\d{3}>)[^;])*)", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Detection:
    """One object: `box` is (x0, y0, x1, y1) in pixels, `codes` the 16 numbers of its shape or ()."""
    label: str
    box: tuple
    codes: tuple = ()


def _numbers(tokens):
    return [int(digits) for digits in re.findall(r"\d+", tokens)]


def parse(text, width, height, steps=LAST):
    """The model's answer as a list of Detections in pixels of a width x height picture; never raises.

    What is not a valid box is left out, by big_vision's rule: exactly four locations up to 1023, ymax > ymin and
    xmax > xmin. Codes count if there are exactly 16 up to 127; a box is a box without them. `steps` is what a location
    is divided by: 1023 as in training, or 1024 to agree with the hub's demo.
    """
    detections = []
    for locations, codes, label in _OBJECT.findall(text):
        locations, codes = _numbers(locations), _numbers(codes)
        if len(locations) != 4 or max(locations) > LAST:
            continue
        y0, x0, y1, x1 = locations
        if y1 <= y0 or x1 <= x0:
            continue
        if len(codes) != CODES or max(codes) > 127:
            codes = []
        box = (x0 / steps * width, y0 / steps * height, x1 / steps * width, y1 / steps * height)
        detections.append(Detection(" ".join(label.split()), box, tuple(codes)))
    return detections


def _location(value, length):
    return f"<loc{min(max(round(value / length * LAST), 0), LAST):04d}>"


def to_text(detections, width, height):
    """The inverse of `parse`: what the model would have to say to name these objects."""
    objects = []
    for detection in detections:
        x0, y0, x1, y1 = detection.box
        tokens = [_location(y0, height), _location(x0, width), _location(y1, height), _location(x1, width)]
        tokens += [f"<seg{code:03d}>" for code in detection.codes]
        objects.append(f"{''.join(tokens)} {detection.label}".rstrip())
    return " ; ".join(objects)


# Dark enough for white letters, and told apart by most color-blind readers.
_COLORS = ["#c2410c", "#0369a1", "#15803d", "#a21caf", "#854d0e", "#4338ca", "#be123c", "#0f766e"]


def shorten(text, font, width):
    """The text, cut and ended with dots where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def _overlap(a, b):
    """Area that two (x0, y0, x1, y1) share."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def _place(box, width, height, bounds, taken):
    """Where the label of a box goes: at one of its corners, inside the picture, over the fewest other labels."""
    x0, y0, x1, y1 = box
    above, below, right = y0 - height, y1, x1 - width
    spots = []
    for x, y in [(x0, above), (x0, y0), (x0, below), (right, above), (right, below), (right, y0), (x0, y1 - height)]:
        x, y = max(0, min(x, bounds[0] - width)), max(0, min(y, bounds[1] - height))
        spots.append((x, y, x + width, y + height))
    return min(spots, key=lambda spot: sum(_overlap(spot, other) for other in taken))


def draw(image, detections, masks=None):
    """A copy of the picture with boxes and labels on it; a small one is enlarged first, so that they can be read.

    `masks`: for each detection its shape as an array (height, width) of the original picture, bool or 0..1, or None.
    """
    scale = max(1, round(640 / max(image.size)))
    canvas = image.convert("RGB").resize((image.width * scale, image.height * scale), Image.Resampling.BICUBIC)
    line = max(2, round(max(canvas.size) / 320))
    font = ImageFont.load_default(max(14, round(max(canvas.size) / 40)))
    labels = list(dict.fromkeys(detection.label for detection in detections))
    colors = [_COLORS[labels.index(detection.label) % len(_COLORS)] for detection in detections]
    boxes = [[round(scale * side) for side in detection.box] for detection in detections]

    for color, mask in zip(colors, masks or []):
        if mask is not None:
            opacity = Image.fromarray(np.rint(140 * np.asarray(mask, np.float32)).astype(np.uint8))
            canvas.paste(color, mask=opacity.resize(canvas.size, Image.Resampling.BILINEAR))
    pen = ImageDraw.Draw(canvas)
    for color, (x0, y0, x1, y1) in zip(colors, boxes):
        pen.rectangle([x0, y0, max(x0, x1 - 1), max(y0, y1 - 1)], outline=color, width=line)
    taken = []
    for color, box, detection in zip(colors, boxes, detections):
        if detection.label:
            label = shorten(detection.label, font, canvas.width - 3 * line)
            spot = _place(box, round(font.getlength(label)) + 3 * line, sum(font.getmetrics()), canvas.size, taken)
            pen.rectangle([spot[0], spot[1], spot[2] - 1, spot[3] - 1], fill=color)
            pen.text((spot[0] + 1.5 * line, spot[1]), label, fill="white", font=font)
            taken.append(spot)
    return canvas
