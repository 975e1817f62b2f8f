"""Boxes, labels and masks drawn onto the picture."""
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from minipali.outputs.boxes import Detection

# Dark enough for white letters, and different enough for most color-blind readers.
_COLORS = ["#c2410c", "#0369a1", "#15803d", "#a21caf", "#854d0e", "#4338ca", "#be123c", "#0f766e"]


def shorten(text: str, font: ImageFont.ImageFont, width: float) -> str:
    """The text, cut and ended with dots where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def _overlap(a, b):
    """Area that two (x0, y0, x1, y1) share."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def _place(box, height, width, bounds, taken):
    """Where the label of a box goes: at one of its corners, inside the picture, over the fewest other labels."""
    x0, y0, x1, y1 = box
    above, below, right = y0 - height, y1, x1 - width
    spots = []
    for x, y in [(x0, above), (x0, y0), (x0, below), (right, above), (right, below), (right, y0), (x0, y1 - height)]:
        x, y = max(0, min(x, bounds[0] - width)), max(0, min(y, bounds[1] - height))
        spots.append((x, y, x + width, y + height))
    return min(spots, key=lambda spot: sum(_overlap(spot, other) for other in taken))


def draw_detections(image: Image.Image, detections: Sequence[Detection],
                    masks: Sequence[np.ndarray | None] | None = None) -> Image.Image:
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
            spot = _place(box, sum(font.getmetrics()), round(font.getlength(label)) + 3 * line, canvas.size, taken)
            pen.rectangle([spot[0], spot[1], spot[2] - 1, spot[3] - 1], fill=color)
            pen.text((spot[0] + 1.5 * line, spot[1]), label, fill="white", font=font)
            taken.append(spot)
    return canvas
