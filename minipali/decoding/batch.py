"""Many questions about many pictures: which files, how many at a time, and the shapes that the answers describe.

The vision tower is the slowest part of a short answer, so each picture goes through it once, however much is asked.
Several pictures in one prompt stand in a row before it, as the hub's processor lays them out:

    [picture 0's tokens] [picture 1's tokens] … [BOS prompt "\\n"]

with positions that simply count on: nothing but their order tells the model where one picture ends.
"""
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import numpy as np

from minipali.decoding.generate import generate
from minipali.decoding.loaded_model import Model
from minipali.decoding.sampling import Decoding
from minipali.errors import InputError
from minipali.inputs.image import open_image

# Picture and prompt tokens that go through the model together. Attention needs memory for each pair of them within a
# row, so a long row takes the place of many short ones: 15 prompts at 224 pixels, 3 at 448, one at 896.
BATCH_TOKENS = 4096


def in_one_prompt(features: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Each of B pictures followed by the same others: what B prompts about 1 + others pictures begin with."""
    # (B,P,D), (others,P,D) -> (B,(1+others)·P,D)
    row = others.reshape(1, -1, features.shape[2])
    return np.concatenate([features, np.concatenate([row] * len(features))], axis=1)


def read_pictures(model: Model, numbered: list[tuple]) -> tuple[list[tuple], list[InputError], float]:
    """Picture files (number, path) as the model's pixels.

    Returns [(number, path, (width, height), pixels)], the errors of those that are no pictures, and the seconds.
    """
    started, usable, problems = perf_counter(), [], []
    for number, path in numbered:
        try:
            image = open_image(path)  # not kept: a thousand times larger than what the model sees of it
        except InputError as error:
            problems.append(error)
            continue
        usable.append((number, path, image.size, model.preprocessor(image)))
    return usable, problems, perf_counter() - started


def read_ahead(model: Model, batches: list[list[tuple]]) -> Iterator[tuple]:
    """`read_pictures` of each batch, the next one on a thread of its own while the model works on this one."""
    with ThreadPoolExecutor(1) as reader:
        reading = None
        for batch in [*batches, []]:  # the empty one is read while the model works on the last
            pictures = reading and reading.result()
            reading = reader.submit(read_pictures, model, batch)
            if pictures:
                yield pictures


def answer_all(model: Model, paths: list, prompts: list[list[int]], others: np.ndarray | None, decoding: Decoding,
               on_unusable: Callable[[InputError], None], logprobs: bool = True) -> Iterator[tuple]:
    """Ask every prompt (a list of ids) about every picture file; `others` (others,P,D) or None follow it in each.

    Yields (path, (width, height), seconds of reading and vision, an Answer for each prompt), picture by picture. One
    batch is in memory, and the pixels of the next. `on_unusable(error)` is called for a file that is no picture, and
    the others are answered. What is drawn for an answer follows from the seed and the answer's number, however the
    pictures fall into batches.
    """
    each = model.cfg.vision_config.num_patches * (1 if others is None else 1 + len(others))
    rows = max(1, BATCH_TOKENS // (each + max(map(len, prompts))))
    at_once = max(1, rows // len(prompts))
    numbered = list(enumerate(paths))
    batches = [numbered[start:start + at_once] for start in range(0, len(paths), at_once)]
    for usable, problems, seconds in read_ahead(model, batches):
        for problem in problems:
            on_unusable(problem)
        if not usable:
            continue
        started, answers = perf_counter(), []
        features = model.features_of(np.stack([pixels for *_, pixels in usable]))
        if others is not None:
            features = in_one_prompt(features, others)
        seconds += perf_counter() - started
        numbers = [number * len(prompts) + i for number, *_ in usable for i in range(len(prompts))]
        asked = [(picture, prompt) for picture in range(len(usable)) for prompt in prompts]
        for first in range(0, len(asked), rows):
            part = asked[first:first + rows]
            pictures = features[[picture for picture, _ in part]]
            answers += generate(model, pictures, [prompt for _, prompt in part], decoding, logprobs=logprobs,
                                numbers=numbers[first:first + rows])
        for picture, (_, path, size, _) in enumerate(usable):
            yield path, size, seconds, answers[picture * len(prompts):(picture + 1) * len(prompts)]
