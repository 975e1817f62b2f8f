"""A few drawings made here, in place of the artists': so that no test needs the cache."""
import numpy as np

from minipali.small_world.drawings import Gallery

NAMES = {"1": "disc", "2": "tall box", "3": "flag", "4": "ring", "5": "wide box", "6": "umbrella"}
COLORS = {"light": (230, 60, 40), "dark": (20, 70, 160)}


def painted(kind, color, side=48):
    """(side, side, 4) uint8: a shape on nothing, its rim half transparent where it is round."""
    y, x = (np.mgrid[:side, :side] + 0.5) / side * 2 - 1
    far = np.hypot(x, y)
    alpha = {
        "disc": np.clip((0.8 - far) * 10, 0, 1), "ring": np.clip((0.2 - np.abs(far - 0.6)) * 10, 0, 1),
        "tall box": (np.abs(x) < 0.4) & (np.abs(y) < 0.9), "wide box": (np.abs(x) < 0.9) & (np.abs(y) < 0.5),
        "flag": (x < -0.6) & (x > -0.8) | (y < 0) & (y > -0.9) & (np.abs(x) < 0.8),
        "umbrella": (np.abs(x) < 0.1) & (y < 0.9) | (y < 0) & (far < 0.9),
    }[kind]  # fmt: skip
    pixels = np.zeros((side, side, 4), dtype=np.uint8)
    pixels[:, :, :3] = color
    pixels[:, :, 3] = np.rint(255 * alpha)
    return pixels


PICTURES = {(artist, point): painted(name, color) for artist, color in COLORS.items() for point, name in NAMES.items()}


def small_gallery(*artists):
    """A gallery of the drawings by "light", "dark" or, without arguments, both."""
    return Gallery(PICTURES, NAMES, artists or tuple(COLORS))
