"""Write image.npz: small pictures and what the hub's processor makes of them. Needs `transformers`; no test runs it.

    python tests/golden/make_image_golden.py
"""
import json
from pathlib import Path

import numpy as np
from transformers.models.siglip.image_processing_pil_siglip import (
    SiglipImageProcessorPil,
)

PUBLISHED = {"resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 255}
ODD = {"resample": 2, "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "rescale_factor": 1 / 127.5}
CASES = [  # height, width, size, the rest
    (37, 53, 28, PUBLISHED),
    (96, 61, 28, PUBLISHED),
    (9, 14, 28, PUBLISHED),
    (28, 28, 28, PUBLISHED),
    (45, 30, 20, ODD),
    (30, 45, 21, dict(PUBLISHED, resample=1)),
]


def picture(height, width, rng):
    """Soft stripes with hard noise on a third of the pixels: smooth areas, edges, and overshoot that is clipped."""
    y, x = np.mgrid[:height, :width] / 10
    waves = np.stack([np.sin(x + y), np.cos(2 * x - y), np.sin(x) * np.cos(y)], -1)
    noise = rng.choice([0.0, 1.0], (height, width, 3))
    return np.rint(255 * np.where(rng.random((height, width, 1)) < 1 / 3, noise, waves / 2 + 0.5)).astype(np.uint8)


def main():
    rng, arrays = np.random.default_rng(0), {}
    for n, (height, width, size, fields) in enumerate(CASES):
        pixels = picture(height, width, rng)
        fields = dict(fields, size={"height": size, "width": size})
        arrays[f"{n}.fields"] = np.array(json.dumps(fields))
        arrays[f"{n}.picture"] = pixels
        arrays[f"{n}.pixel_values"] = np.asarray(SiglipImageProcessorPil(**fields)(pixels)["pixel_values"][0])
    np.savez_compressed(Path(__file__).with_name("image.npz"), **arrays)


if __name__ == "__main__":
    main()
