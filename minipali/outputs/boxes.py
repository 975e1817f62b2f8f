"""Boxes as text: PaliGemma points with 1024 location tokens, and here they become pixels and back.

    detect cat ; dog  ->  <loc0100><loc0200><loc0800><loc0900> cat ; <loc0000><loc0010><loc0300><loc0400> dog

The four are ymin, xmin, ymax, xmax - y first, unlike every drawing library - as fractions of the picture's own height
and width; that the model saw it squeezed to a square changes no fraction. With `segment`, sixteen <seg> tokens follow
and describe the shape inside the box (see model/vq_vae.py).

A fraction v is written as round(1023 v). big_vision reads it back as n / 1023 and so do we; the hub's demo, Google's
documentation and several notebooks divide by 1024. The two differ by less than a thousandth of the side.
"""
import dataclasses
import re
from collections.abc import Iterable

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


def parse(text: str, height: float, width: float, steps: int = LAST) -> list[Detection]:
    """The model's answer as a list of Detections in pixels of a picture of height x width; never raises.

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


def to_text(detections: Iterable[Detection], height: float, width: float) -> str:
    """The inverse of `parse`: the answer that describes these objects."""
    objects = []
    for detection in detections:
        x0, y0, x1, y1 = detection.box
        tokens = [_location(y0, height), _location(x0, width), _location(y1, height), _location(x1, width)]
        tokens += [f"<seg{code:03d}>" for code in detection.codes]
        objects.append(f"{''.join(tokens)} {detection.label}".rstrip())
    return " ; ".join(objects)
