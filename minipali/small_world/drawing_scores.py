"""Measure a model on held-out scenes of drawings, artist by artist."""

from collections import Counter

import numpy as np
from PIL import Image

from minipali.errors import InputError
from minipali.outputs.masks import Shapes
from minipali.small_world import artwork, drawing_tasks, drawings, tasks
from minipali.small_world.scores import answers, found_objects, mask_overlap, no_codes

QUESTION_TASKS = ("count", "what", "where", "exists", "region")
# Whose drawings the table is about: the artists of the training set, and the test artist, used for nothing else.
ARTISTS = {"seen artists": drawings.TRAINED_ON, "new artist": (artwork.TEST,)}


def knows_names(tokenizer):
    """Whether the vocabulary was made for drawings, so that every word of their names is one token."""
    words, alone = {word for name in artwork.names().values() for word in name.split()}, len(tokenizer.encode("a"))
    return all(len(tokenizer.encode(f"a {word}")) == alone + 1 for word in words)


def drawn_scenes(gallery, count, things):
    """The first `count` held-out scenes whose number of things is among `things`."""
    scenes, number = [], 0
    while len(scenes) < count:
        scene = drawings.draw(number, gallery, "test", most=max(things))
        if len(scene.things) in things:
            scenes.append(scene)
        number += 1
    return scenes


def common(predicted, true):
    """How many entries two lists have in common, each counted as often as it is in both."""
    return (Counter(predicted) & Counter(true)).total()


def count_named(texts, scenes):
    """How many things the captions name, how many with the right place, and how many things the scenes have."""
    names = places = things = 0
    for text, scene in zip(texts, scenes, strict=True):
        predicted, true = drawing_tasks.named_in(text), [(thing.name, thing.place) for thing in scene.things]
        names += common([name for name, _ in predicted], [name for name, _ in true])
        places += common(predicted, true)
        things += len(true)
    return names, places, things


def drawn_examples(scenes, names):
    """[(picture's number, task, prompt, right answer)].

    `detect` for every name in a scene, `segment` for every thing whose name no other thing has, and one question of
    each kind that the scene allows.
    """
    examples = []
    for number, scene in enumerate(scenes):
        rng = np.random.default_rng((7, number))
        present = Counter(thing.name for thing in scene.things)
        examples += [(number, "detect", *drawing_tasks.boxes_of([name], scene)) for name in present]
        examples += [(number, "segment", *drawing_tasks.mask_of(thing, no_codes)) for thing in scene.things
                     if present[thing.name] == 1]
        asked = ((task, drawing_tasks.ask(task, scene, rng, names)) for task in QUESTION_TASKS)
        examples += [(number, task, *example) for task, example in asked if example is not None]
    return examples


def drawing_rows(model, gallery, whose, count, note=None):
    """Rows (what, how many are right, of how many) for `count` pictures of one drawing and `count` of two to four.

    `whose`: what the rows call the artists of the gallery.
    """
    one, several = drawn_scenes(gallery, count, (1,)), drawn_scenes(gallery, count, (2, 3, 4))
    for scenes, what in (one, "one drawing"), (several, "two to four"):
        pictures = [Image.fromarray(scene.image) for scene in scenes]
        texts = answers(model, pictures, [(number, "caption en") for number in range(len(scenes))], note=note)
        names, places, things = count_named(texts, scenes)
        yield f"{whose}, {what}: names", names, things
        if len(scenes[0].things) > 1:
            yield f"{whose}, {what}: names and places", places, things
    examples = drawn_examples(several, gallery.names)
    texts = answers(model, pictures, [(number, prompt) for number, _, prompt, _ in examples], note=note)
    objects = [found_objects(text, truth) for (_, task, _, truth), text in zip(examples, texts) if task == "detect"]
    matched, total, _ = np.sum(objects, axis=0)
    yield f"{whose}: found, IoU >= 0.5", matched, total
    shapes = Shapes(model)
    if shapes.codec is not None:
        overlaps = [mask_overlap(text, truth, several[number], shapes)
                    for (number, task, _, truth), text in zip(examples, texts) if task == "segment"]
        yield f"{whose}: masks, mean IoU", sum(overlaps), len(overlaps)
    right = [text == truth for (_, task, _, truth), text in zip(examples, texts) if task in QUESTION_TASKS]
    yield f"{whose}: questions", sum(right), len(right)


def failures(model, gallery, count, note=None, tried=64):
    """The first `count` held-out pictures whose caption is wrong, as (picture, "the model's caption (the right one)").

    `tried` pictures are captioned at a time, at most 20 times. Raises InputError if no caption is wrong.
    """
    wrong, start = [], 0
    while len(wrong) < count and start < 20 * tried:
        scenes = [drawings.draw(number, gallery, "test") for number in range(start, start + tried)]
        pictures = [Image.fromarray(scene.image) for scene in scenes]
        texts = answers(model, pictures, [(number, "caption en") for number in range(tried)], note=note)
        truths = [drawing_tasks.caption(scene)[1] for scene in scenes]
        captioned = zip(pictures, texts, truths)
        wrong += [(picture, f"{text} ({truth})") for picture, text, truth in captioned if text != truth]
        start += tried
    if not wrong:
        raise InputError(f"none of {start} captions is wrong: there is nothing to draw")
    return wrong[:count]


def drawing_retrieval(pair, gallery, whose, batches, size=64):
    """Rows for retrieving the caption of a picture of drawings, and the picture of a caption, among `size` ones."""
    to_text = to_image = 0
    for batch in range(batches):
        scenes = tasks.distinct(lambda number: drawings.draw((1, batch, number), gallery, "test"), size,  # noqa: B023
                                drawing_tasks.caption)
        table = pair.logits([Image.fromarray(scene.image) for scene in scenes.values()], list(scenes))
        to_text += np.count_nonzero(table.argmax(1) == np.arange(size))
        to_image += np.count_nonzero(table.argmax(0) == np.arange(size))
    yield f"{whose}: caption of a picture, of {size}", to_text, batches * size
    yield f"{whose}: picture of a caption, of {size}", to_image, batches * size
