"""Masks in pixels of the picture: stretched over their boxes, as run lengths, and from the codes of an answer."""
from functools import cached_property

import numpy as np
from PIL import Image

from minipali.checkpoint import folder_of


def paste(mask, box, height, width):
    """Stretch a decoded mask over `box` (x0, y0, x1, y1), in pixels of a height x width picture; True where above 0.

    As in big_vision's evaluator: coordinates are cut to integers (never rounded), the resizing is Pillow's bilinear
    one on floats, and the threshold comes after it; thresholding first would leave a staircase. A box less than a
    pixel wide gives an empty mask. Raises ValueError where the box leaves the picture.
    """  # (64,64) -> (height,width) bool
    x0, y0, x1, y1 = (int(v) for v in box)
    if min(x0, y0) < 0 or x1 > width or y1 > height:
        raise ValueError(f"the box {tuple(box)} leaves the picture of {width}x{height} pixels")
    canvas = np.zeros((height, width), bool)
    if x1 > x0 and y1 > y0:
        inside = Image.fromarray(np.asarray(mask, np.float32)).resize((x1 - x0, y1 - y0), Image.BILINEAR)
        canvas[y0:y1, x0:x1] = np.asarray(inside) > 0
    return canvas


def run_lengths(mask: np.ndarray) -> list[int]:
    """How many pixels are outside, then inside, then outside ..., row by row from the top left; the first may be 0.

    COCO's run lengths count down the columns instead.
    """  # (height,width) bool -> list of int
    flat = mask.reshape(-1)
    changes = np.flatnonzero(np.diff(flat, prepend=False))
    return np.diff([0, *changes, flat.size]).tolist()


def from_run_lengths(runs, height, width):
    """The inverse of `run_lengths`."""  # list of int -> (height,width) bool
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(height, width)


class Shapes:
    """The masks that <seg> codes describe, through the VQ-VAE beside the model, read when the first codes come.

    A code book belongs to the model that was trained with it: where no vae-oid.npz lies beside the model none is
    taken from elsewhere, `say` is called once with a line about it, and boxes stay without masks.
    """

    def __init__(self, model, say=lambda text: None):
        self.path, self.say = folder_of(model.path) / "vae-oid.npz", say

    @cached_property
    def codec(self):
        from minipali.checkpoint import vae_oid  # most answers have no shapes
        if self.path.exists():
            return vae_oid.read(self.path)
        self.say(f"{self.path}: no such file, so boxes come without the shapes inside them")
        return None

    def masks(self, detections, height, width):
        """For each detection its mask as (height, width) of bool, or None without codes that are in the book."""
        return [self._mask(detection, height, width) if detection.codes else None for detection in detections]

    def _mask(self, detection, height, width):
        from minipali.model.vq_vae import decode
        if self.codec is None:
            return None
        try:
            [mask] = decode(np.array([detection.codes]), self.codec)
        except ValueError:  # an answer can name 128 codes, and the book may hold fewer
            return None
        return paste(mask, detection.box, height, width)
