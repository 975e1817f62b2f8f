"""Measure a model on held-out pictures of the small world."""

import numpy as np
from PIL import Image

from minipali.decoding.generate import generate
from minipali.decoding.loaded_model import encode_prompt
from minipali.decoding.sampling import Decoding
from minipali.outputs.boxes import CODES, parse
from minipali.outputs.masks import Shapes
from minipali.small_world import easy_vqa, tasks, world

GREEDY = Decoding(max_new_tokens=160)
QUESTIONS = tuple(tasks.QUESTIONS)


def held_out(seed, count):
    """Held-out pictures and their captions, all different: ([Pillow pictures], [str]).

    `seed`: a tuple of integers; another one gives other pictures.
    """
    scenes = tasks.distinct(lambda number: world.draw((*seed, number), "test"), count)
    return [Image.fromarray(scene.image) for scene in scenes.values()], list(scenes)


def answers(model, pictures, asked, rows=64, note=None):
    """The model's texts for [(picture's number, prompt)], in that order; each picture is encoded once.

    `note(done, of)` is called after each batch. Similar prompts share a batch, since their answers have similar
    lengths, and a batch takes as long as its longest answer.
    """
    parts = [model.features(pictures[start:start + rows]) for start in range(0, len(pictures), rows)]
    features, texts = np.concatenate(parts), [None] * len(asked)
    order = sorted(range(len(asked)), key=lambda i: asked[i][1])
    for start in range(0, len(order), rows):
        batch = order[start:start + rows]
        prompts = [encode_prompt(asked[i][1], model) for i in batch]
        results = generate(model, features[[asked[i][0] for i in batch]], prompts, GREEDY, logprobs=False)
        for i, answer in zip(batch, results):
            texts[i] = model.tokenizer.decode(answer.ids)
        if note:
            note(start + len(batch), len(order))
    return texts


def scenes_of(count):
    """`count` held-out scenes; no training scene has the same seed (see world.generator)."""
    return [world.draw(number, "test") for number in range(count)]


def no_codes(_):
    """Stand in for a mask's codes, since a mask is judged by its pixels."""
    return [0] * CODES


def examples_of(scenes, wanted):
    """[(picture's number, task, prompt, right answer)], one for each scene and each task in `wanted` that it allows."""
    return [(number, task, prefix, suffix) for number, scene in enumerate(scenes) for task, prefix, suffix
            in tasks.examples(scene, np.random.default_rng((7, number)), no_codes) if task in wanted]


def overlap(a, b):
    """Intersection over union of two boxes (x0, y0, x1, y1)."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    shared = width * height
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def found_objects(answer, truth):
    """How many objects have a box of the right label with IoU ≥ 0.5, how many there are, how many boxes the answer has.

    Both arguments are texts of <loc> tokens. The closest pairs are matched first, and each box counts once.
    """
    answered, true = parse(answer, world.SIDE, world.SIDE), parse(truth, world.SIDE, world.SIDE)
    pairs = sorted(((overlap(a.box, b.box), i, j) for i, a in enumerate(answered) for j, b in enumerate(true)
                    if a.label == b.label), reverse=True)
    used, matched = set(), set()
    for iou, i, j in pairs:
        if iou >= 0.5 and i not in used and j not in matched:
            used.add(i)
            matched.add(j)
    return len(matched), len(true), len(answered)


def mask_overlap(answer, truth, scene, shapes):
    """Intersection over union of the first mask in `answer` and that of the thing that `truth` names; 0 without one."""
    [target], answered = parse(truth, world.SIDE, world.SIDE), parse(answer, world.SIDE, world.SIDE)
    thing = max(scene.things, key=lambda thing: overlap(thing.box, target.box))
    mask = next(iter(shapes.masks(answered[:1], world.SIDE, world.SIDE)), None)
    if mask is None:
        return 0.0
    return np.count_nonzero(mask & thing.mask) / np.count_nonzero(mask | thing.mask)


def small_world(model, count, note):
    """Rows (what, how many are right, of how many) for captions, questions by kind, detection, masks and letters."""
    scenes = scenes_of(count)
    pictures = [Image.fromarray(scene.image) for scene in scenes]
    right = {task: [] for task in ("caption", *QUESTIONS, "detect", "segment")}
    examples = examples_of(scenes, right)
    texts = answers(model, pictures, [(number, prompt) for number, _, prompt, _ in examples], note=note)
    for (_, task, _, truth), text in zip(examples, texts):
        right[task].append(text == truth)
    objects = np.array([found_objects(text, truth) for (_, task, _, truth), text in zip(examples, texts)
                        if task == "detect"]).sum(0)
    yield "captions exactly right", sum(right["caption"]), len(right["caption"])
    all_questions = [is_right for task in QUESTIONS for is_right in right[task]]
    yield "own questions right", sum(all_questions), len(all_questions)
    for task in QUESTIONS:
        yield f"  {task}", sum(right[task]), len(right[task])
    yield "objects found, IoU >= 0.5", objects[0], objects[1]
    yield "  boxes that are right", objects[0], objects[2]
    shapes = Shapes(model)
    if shapes.codec is not None:
        overlaps = [mask_overlap(text, truth, scenes[number], shapes)
                    for (number, task, _, truth), text in zip(examples, texts) if task == "segment"]
        yield "masks, mean IoU", sum(overlaps), len(overlaps)
    lettering = [world.draw_text(number, "test") for number in range(count)]
    asked = [(number, tasks.ocr(truth)[0]) for number, (_, truth) in enumerate(lettering)]
    texts = answers(model, [Image.fromarray(picture) for picture, _ in lettering], asked, note=note)
    yield "texts read exactly right", sum(text == truth for text, (_, truth) in zip(texts, lettering)), len(lettering)


def easy_vqa_test(model, count, note):
    """The row for the published test split; only a generated answer that is exactly right counts."""
    images, examples = easy_vqa.load("test")
    pictures = [Image.fromarray(image) for image in images[:count]]
    questions = [(number, *pair) for number, pairs in enumerate(examples[:count]) for pair in pairs]
    texts = answers(model, pictures, [(number, prompt) for number, prompt, _ in questions], note=note)
    yield "easy-VQA test split", sum(text == truth for (_, _, truth), text in zip(questions, texts)), len(questions)


def retrieval(pair, batches, size=64):
    """Rows for retrieving the caption of a picture, and the picture of a caption, among `size` different ones."""
    to_text = to_image = 0
    for batch in range(batches):
        table = pair.logits(*held_out((1, batch), size))
        to_text += np.count_nonzero(table.argmax(1) == np.arange(size))
        to_image += np.count_nonzero(table.argmax(0) == np.arange(size))
    yield f"caption of a picture, of {size}", to_text, batches * size
    yield f"picture of a caption, of {size}", to_image, batches * size
