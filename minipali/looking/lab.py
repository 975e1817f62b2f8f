"""The laboratory: one line of the running model made wrong, and what becomes of it.

A function keeps its code in `__code__`, and every module that imported the function holds the same object. So a bug
goes into the whole model at once when that attribute is exchanged, and comes out again when it is put back.
"""
import contextlib
import functools
import importlib
import inspect
import types
from typing import NamedTuple

import numpy as np
from PIL import Image

from minipali.decoding.loaded_model import encode_prompt
from minipali.looking.classic_bugs import BUGS
from minipali.looking.compare import compare, first_divergence
from minipali.model.gemma import KVCache
from minipali.model.paligemma import decode, image_features, prefill
from minipali.small_world import scores
from minipali.trace import record


def function_of(bug):
    """The function object that holds the bug's line, without its decorators."""
    function = functools.reduce(getattr, bug.function.split("."), importlib.import_module(bug.module))
    return inspect.unwrap(function)


def lines_of(bug):
    """The line as it is and as the bug has it, without indentation."""
    source = inspect.getsource(function_of(bug))
    changed = source.replace(bug.old, bug.new)
    pairs = zip(source.splitlines(), changed.splitlines(), strict=True)
    return next((right.strip(), wrong.strip()) for right, wrong in pairs if right != wrong)


def _inner_code(code, names):
    """The code object of a function inside that of its module or class."""
    if not names:
        return code
    inner = next(part for part in code.co_consts if isinstance(part, types.CodeType) and part.co_name == names[0])
    return _inner_code(inner, names[1:])


def wrong_code(bug):
    """The compiled function with the bug in it; ValueError unless its text stands there exactly once."""
    module, function = importlib.import_module(bug.module), function_of(bug)
    source, body = inspect.getsource(module), inspect.getsource(function)
    if body.count(bug.old) != 1:
        raise ValueError(f"{bug.name}: its text stands {body.count(bug.old)} times in {bug.function}, expected once")
    changed = source.replace(body, body.replace(bug.old, bug.new))
    return _inner_code(compile(changed, module.__file__, "exec"), bug.function.split("."))


@contextlib.contextmanager
def broken(bug):
    """Inside, the model runs with the bug; outside, as before. None: without any bug."""
    if bug is None:
        yield
        return
    function = function_of(bug)
    right = function.__code__
    function.__code__ = wrong_code(bug)
    try:
        yield
    finally:
        function.__code__ = right


class Question(NamedTuple):
    """A held-out picture's number, the task, its prompt and the right answer."""
    picture: int
    task: str
    prompt: str
    truth: str


class Trial(NamedTuple):
    """What the model says to the questions, and how many answers are right, by kind of task."""
    texts: list
    right: dict
    asked: dict


GROUPS = {"caption": "captions", "detect": "boxes"}  # every other task is a question


def questions_of(count):
    """Held-out pictures, and about each of them one question of every kind that its scene allows."""
    scenes = scores.scenes_of(count)
    wanted = {"caption", "detect", *scores.QUESTIONS}
    return [Image.fromarray(scene.image) for scene in scenes], [
        Question(*row) for row in scores.examples_of(scenes, wanted)]


def trial(model, pictures, questions, bug=None):
    """Ask everything with the bug in place. Numbers that overflow on the way are part of the experiment."""
    with broken(bug), np.errstate(all="ignore"):
        texts = scores.answers(model, pictures, [(one.picture, one.prompt) for one in questions])
    right, asked = {}, {}
    for one, said in zip(questions, texts, strict=True):
        group = GROUPS.get(one.task, "questions")
        good = said == one.truth
        if one.task == "detect":
            hit, there, boxes = scores.found_objects(said, one.truth)
            good = hit == there == boxes
        right[group] = right.get(group, 0) + good
        asked[group] = asked.get(group, 0) + 1
    return Trial(texts, right, asked)


def activations(model, image, prompt, answer, bug=None):
    """Everything that is recorded of one answer: {name: array} of the prefill, then of each written token.

    The answer's tokens are given, so that both runs write the same text and only their numbers differ.
    """
    with broken(bug), np.errstate(all="ignore"):
        pixels, ids = model.preprocessor(image)[None], encode_prompt(prompt, model)
        with record(attention=True) as prefix:
            features = image_features(pixels, model.params, model.cfg)
            cache = KVCache(features, 1, features.shape[1] + len(ids) + len(answer), model.cfg.text_config)
            prefill(features, np.array([ids]), np.array([len(ids)]), model.params, model.cfg, cache)
        recordings = [{"pixel_values": pixels, "input_ids": np.array([ids]), **prefix}]
        for token in answer:
            with record(attention=True) as step:
                decode(np.array([[token]]), model.params, model.cfg, cache)
            recordings.append(step)
    return recordings


def first_difference(right, wrong):
    """Where two runs part: (the written token's number or 0 for the prefix, a Row of `compare`), or None."""
    for step, (a, b) in enumerate(zip(right, wrong, strict=True)):
        row = first_divergence(compare(a, b)[0])
        if row is not None:
            return step, row
    return None


def bug_named(name):
    """The bug of that name, or None."""
    return next((bug for bug in BUGS if bug.name == name), None)


def caption_of(model, image):
    """The token ids of the right model's caption: what both runs are made to write."""
    text = scores.answers(model, [image], [(0, "caption en")])[0]
    return model.tokenizer.encode(text)
