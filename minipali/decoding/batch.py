"""Many questions about many pictures: which files, how many at a time, and the shapes that the answers describe.

The vision tower is the dear part of a short answer, so each picture goes through it once, whatever is asked about it.
Several pictures in one prompt stand in a row before it, as the hub's processor lays them out:

    [picture 0's tokens] [picture 1's tokens] … [BOS prompt "\\n"]

with positions that simply count on: nothing but their order tells the model where one picture ends.
"""
import os
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from time import perf_counter

import numpy as np
from PIL import Image

from minipali.checkpoint.config import Unusable
from minipali.decoding.generate import generate
from minipali.inputs.image import open_image

# Picture and prompt tokens that go through the model together. Attention needs memory for each pair of them within a
# row, so a long row takes the place of many short ones: 15 prompts at 224 pixels, 3 at 448, one at 896.
BATCH_TOKENS = 4096


def picture_files(paths):
    """Files as they are given, folders as the pictures in them by name; and how many other files the folders hold.

    In a folder a picture is what has the ending of a format that Pillow reads: a damaged one is still meant to be one.
    Hidden files and subfolders are passed over. Raises Unusable for a folder without pictures.
    """
    pictures, passed_over = [], 0
    for path in paths:
        if not os.path.isdir(path):
            pictures.append(path)
            continue
        try:
            files = sorted(entry.name for entry in os.scandir(path) if entry.is_file() and entry.name[0] != ".")
        except OSError as error:
            raise Unusable(f"{path}: cannot be read as a folder ({error.strerror})") from None
        endings = {ending for ending, format in Image.registered_extensions().items() if format in Image.OPEN}
        found = [os.path.join(path, name) for name in files if Path(name).suffix.lower() in endings]
        if not found:
            raise Unusable(f"{path}: a folder without pictures, expected a picture file or a folder of them")
        pictures += found
        passed_over += len(files) - len(found)
    return pictures, passed_over


def in_one_prompt(features, others):
    """Each of B pictures followed by the same C others: what B prompts about 1 + C pictures begin with."""
    # (B,P,D), (C,P,D) -> (B,(1+C)P,D)
    row = others.reshape(1, -1, features.shape[2])
    return np.concatenate([features, np.concatenate([row] * len(features))], axis=1)


def answer_all(model, paths, prompts, others, decoding, on_unusable):
    """Ask every prompt (a list of ids) about every picture file; others (C,P,D), or None, follow it in each prompt.

    Yields (path, (width, height), seconds of reading and vision, an Answer for each prompt), picture by picture. Only
    one batch is in memory. `on_unusable(error)` hears of a file that is no picture, and the rest go on.
    """
    each = model.cfg.vision_config.num_patches * (1 if others is None else 1 + len(others))
    rows = max(1, BATCH_TOKENS // (each + max(map(len, prompts))))
    at_once = max(1, rows // len(prompts))
    for start in range(0, len(paths), at_once):
        started, usable, pixels = perf_counter(), [], []
        for path in paths[start:start + at_once]:
            try:
                image = open_image(path)  # not kept: a thousand times larger than what the model sees of it
            except Unusable as error:
                on_unusable(error)
                continue
            usable.append((path, image.size))
            pixels.append(model.preprocessor(image))
        if not pixels:
            continue
        features = model.features_of(np.stack(pixels))
        if others is not None:
            features = in_one_prompt(features, others)
        seconds, answers = perf_counter() - started, []
        asked = [(picture, prompt) for picture in range(len(usable)) for prompt in prompts]
        for first in range(0, len(asked), rows):
            part = asked[first:first + rows]
            pictures = features[[picture for picture, _ in part]]
            answers += generate(model, pictures, [prompt for _, prompt in part], decoding)
            if decoding.seed is not None:  # the next batch draws afresh, not the same numbers again
                decoding = replace(decoding, seed=decoding.seed + 1)
        for picture, (path, size) in enumerate(usable):
            yield path, size, seconds, answers[picture * len(prompts):(picture + 1) * len(prompts)]


class Shapes:
    """The masks that <seg> codes describe, through the VQ-VAE beside the model, read when the first codes come.

    A code book belongs to the model that was trained with it: where no vae-oid.npz lies beside the model none is
    taken from elsewhere, `say` hears of it once, and boxes stay without masks.
    """

    def __init__(self, model, say=lambda text: None):
        self.path, self.say = (model.path.parent if model.path.suffix == ".npz" else model.path) / "vae-oid.npz", say

    @cached_property
    def codec(self):
        from minipali.model import vq_vae as segmentation  # most answers have no shapes
        if self.path.exists():
            return segmentation.read(self.path)
        self.say(f"{self.path}: no such file, so boxes come without the shapes inside them")
        return None

    def masks(self, detections, width, height):
        """For each detection its mask as (height, width) of bool, or None without codes that are in the book."""
        return [self._mask(detection, width, height) if detection.codes else None for detection in detections]

    def _mask(self, detection, width, height):
        from minipali.model.vq_vae import decode, paste
        if self.codec is None:
            return None
        try:
            [mask] = decode(np.array([detection.codes]), self.codec)
        except ValueError:  # 128 codes can be said, and a book may hold fewer
            return None
        return paste(mask, detection.box, height, width)
