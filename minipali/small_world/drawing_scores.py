"""What a model knows of drawings, measured on scenes that no training saw, artist by artist."""

from collections import Counter

import numpy as np
from PIL import Image

from minipali.errors import InputError
from minipali.outputs.masks import Shapes
from minipali.small_world import artwork, drawing_tasks, drawings, tasks
from minipali.small_world.scores import answers, found_objects, mask_overlap, no_codes

ASKED = ("count", "what", "where", "exists", "region")
# Whose drawings the table is about: those of the training sets, and the one that nobody trained on or chose by.
ARTISTS = {"seen artists": drawings.TRAINED_ON, "new artist": (artwork.TEST,)}


def knows_names(tokenizer):
    """Whether the vocabulary was made for drawings: every word of their names is one token."""
    words = {word for name in artwork.names().values() for word in name.split()}
    return all(len(tokenizer.encode(f" {word}")) == 1 for word in words)


def scenes_of(gallery, count, things):
    """The first `count` held-out scenes whose number of things is among `things`."""
    found, number = [], 0
    while len(found) < count:
        scene = drawings.draw(number, gallery, "test", most=max(things))
        if len(scene.things) in things:
            found.append(scene)
        number += 1
    return found


def common(said, true):
    """How many entries two lists have in common, each counted as often as it is in both."""
    return (Counter(said) & Counter(true)).total()


def told(texts, scenes):
    """Of the things in the scenes: how many names the captions tell, how many with their places, how many there are."""
    names = places = things = 0
    for text, scene in zip(texts, scenes, strict=True):
        said, true = drawing_tasks.named_in(text), [(thing.name, thing.place) for thing in scene.things]
        names += common([name for name, _ in said], [name for name, _ in true])
        places += common(said, true)
        things += len(true)
    return names, places, things


def examples_of(scenes, names):
    """[(picture's number, task, prompt, right answer)]: `detect` for every name in a scene, `segment` for every thing
    whose name no other has, and one question of each kind that the scene allows."""
    found = []
    for number, scene in enumerate(scenes):
        rng = np.random.default_rng((7, number))
        present = Counter(thing.name for thing in scene.things)
        found += [(number, "detect", *drawing_tasks.boxes_of([name], scene)) for name in present]
        found += [(number, "segment", *drawing_tasks.mask_of(thing, no_codes)) for thing in scene.things
                  if present[thing.name] == 1]
        asked = ((task, drawing_tasks.ask(task, scene, rng, names)) for task in ASKED)
        found += [(number, task, *example) for task, example in asked if example is not None]
    return found


def drawing_rows(model, gallery, whose, count, note=None):
    """Rows (what, right, of) for `count` pictures of one drawing and as many of two to four, by `whose` hand."""
    one, several = scenes_of(gallery, count, (1,)), scenes_of(gallery, count, (2, 3, 4))
    for scenes, what in (one, "one drawing"), (several, "two to four"):
        pictures = [Image.fromarray(scene.image) for scene in scenes]
        texts = answers(model, pictures, [(number, "caption en") for number in range(len(scenes))], note=note)
        names, places, things = told(texts, scenes)
        yield f"{whose}, {what}: names", names, things
        if len(scenes[0].things) > 1:
            yield f"{whose}, {what}: names and places", places, things
    examples = examples_of(several, gallery.names)
    texts = answers(model, pictures, [(number, prompt) for number, _, prompt, _ in examples], note=note)
    objects = [found_objects(said, truth) for (_, task, _, truth), said in zip(examples, texts) if task == "detect"]
    hit, there, _ = np.sum(objects, axis=0)
    yield f"{whose}: found, IoU >= 0.5", hit, there
    shapes = Shapes(model)
    if shapes.codec is not None:
        overlaps = [mask_overlap(said, truth, several[number], shapes)
                    for (number, task, _, truth), said in zip(examples, texts) if task == "segment"]
        yield f"{whose}: masks, mean IoU", sum(overlaps), len(overlaps)
    asked = [said == truth for (_, task, _, truth), said in zip(examples, texts) if task in ASKED]
    yield f"{whose}: questions", sum(asked), len(asked)


def failures(model, gallery, count, note=None, tried=64):
    """The first `count` held-out pictures whose caption is wrong, as (picture, "what was said (what is there)")."""
    found, start = [], 0
    while len(found) < count and start < 20 * tried:
        scenes = [drawings.draw(number, gallery, "test") for number in range(start, start + tried)]
        pictures = [Image.fromarray(scene.image) for scene in scenes]
        texts = answers(model, pictures, [(number, "caption en") for number in range(tried)], note=note)
        truths = [drawing_tasks.caption(scene)[1] for scene in scenes]
        told = zip(pictures, texts, truths)
        found += [(picture, f"{said} ({truth})") for picture, said, truth in told if said != truth]
        start += tried
    if not found:
        raise InputError(f"none of {start} captions is wrong: there is nothing to draw")
    return found[:count]


def drawing_retrieval(pair, gallery, whose, batches, size=64):
    """Rows for finding the caption of a picture of drawings among `size` different ones, and the other way round."""
    to_text = to_image = 0
    for batch in range(batches):
        scenes = tasks.distinct(lambda number: drawings.draw((1, batch, number), gallery, "test"), size,  # noqa: B023
                                drawing_tasks.caption)
        table = pair.logits([Image.fromarray(scene.image) for scene in scenes.values()], list(scenes))
        to_text += np.count_nonzero(table.argmax(1) == np.arange(size))
        to_image += np.count_nonzero(table.argmax(0) == np.arange(size))
    yield f"{whose}: caption of a picture, of {size}", to_text, batches * size
    yield f"{whose}: picture of a caption, of {size}", to_image, batches * size
