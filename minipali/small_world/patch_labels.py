"""What lies on each patch: the second loss of the vision tower's first stage.

A caption says what is in a picture and not where, so nothing in the contrastive loss makes a token describe its own
patch. SigLIP 2 (Tschannen et al. 2025) adds losses on every patch for that reason. Its targets come from the model
itself; ours are exact, since the pictures are drawn. A linear layer on the tower's tokens predicts, for each of the 49
patches: which shape, which color, how large, its box, the codes of its mask, which letters. The layer is dropped after
the stage. It matters most for telling shapes apart: weights/README.md has the figures.
"""
import itertools

import numpy as np

from minipali.learning.backward.losses import cross_entropy
from minipali.learning.backward.ops import linear
from minipali.outputs.boxes import CODES
from minipali.small_world import artwork, easy_vqa, tasks, world

KINDS = ("nothing", *world.SHAPES, "rectangle", *artwork.names().values())
BOOK_SIZE = 16  # how many different codes our masks have
ROWS = COLUMNS = world.SIDE // 14
THING_PIXELS = 12  # the least of a patch's 196 pixels that a thing covers for the patch to be labeled as its own
INK_PIXELS = 4  # likewise of a letter, of the 98 pixels of half a patch

# {question: (how many answers it has, its weight in the loss)}
QUESTIONS = {
    "kind": (len(KINDS), 1.0), "color": (len(world.COLORS), 0.5), "size": (len(world.SIZES), 0.3),
    **{edge: (world.SIDE + 1, 0.15) for edge in ("x0", "y0", "x1", "y1")},
    **{f"code {i}": (BOOK_SIZE, 0.03) for i in range(CODES)},
    "letter on the left": (1 + len(world.LETTERS), 0.5), "letter on the right": (1 + len(world.LETTERS), 0.5),
}  # fmt: skip
ANSWERS = sum(answers for answers, _ in QUESTIONS.values())
UNKNOWN = -1  # no label: the question has no answer here and is left out of the loss


def per_patch(mask, columns=COLUMNS):
    """How many pixels of a mask lie on each patch, or, with `columns` twice as many, on each half of a patch."""
    # (height,width) -> (rows,columns)
    return mask.reshape(ROWS, world.SIDE // ROWS, columns, world.SIDE // columns).sum((1, 3))


def attributes(thing):
    """The labels of a thing's kind, color and size; a drawing has only a kind, its name."""
    if hasattr(thing, "name"):
        return KINDS.index(thing.name), UNKNOWN, UNKNOWN
    size = list(world.SIZES).index(thing.size) if thing.size else UNKNOWN
    return KINDS.index(thing.shape), list(world.COLORS).index(thing.color), size


def labels(things, codes=None):
    """The labels of a scene. A patch belongs to the thing that covers most of it. `codes`: of each thing's mask."""
    # n things, (n,16) -> (P,questions)
    table = np.full((ROWS * COLUMNS, len(QUESTIONS)), UNKNOWN)
    cover = np.stack([per_patch(thing.mask).reshape(-1) for thing in things])
    owner, covered = cover.argmax(0), cover.max(0) >= THING_PIXELS
    codes = [[UNKNOWN] * CODES] * len(things) if codes is None else codes
    for i, thing in enumerate(things):
        table[covered & (owner == i), :-2] = [*attributes(thing), *tasks.rounded(thing.box), *codes[i]]
    table[~covered, 0] = 0
    return table


def letter_labels(letter_map):
    """The labels of a picture of letters, from the map that `world.lettering` returns."""
    # (height,width) -> (P,questions)
    table = np.full((ROWS * COLUMNS, len(QUESTIONS)), UNKNOWN)
    numbers = [0, *np.unique(letter_map[letter_map > 0])]
    ink = np.stack([per_patch(letter_map == number, 2 * COLUMNS) for number in numbers])
    ink[0] = INK_PIXELS - 1  # a letter needs more than this, or the half patch is labeled 0: no letter
    table[:, -2:] = np.array(numbers)[ink.argmax(0)].reshape(-1, 2)
    return table


def scene_examples(scenes, codes_of=None):
    """The (picture, labels) of each scene. All masks are encoded together, which takes a quarter of the time."""
    if codes_of is None:
        return [(scene.image, labels(scene.things)) for scene in scenes]
    crops = [tasks.mask_crop(thing.mask, thing.box) for scene in scenes for thing in scene.things]
    codes = iter(codes_of(np.stack(crops)))
    return [(scene.image, labels(scene.things, list(itertools.islice(codes, len(scene.things))))) for scene in scenes]


def easy_example(seed, split="train"):
    """A picture like easy-VQA's, and its labels."""
    picture, thing = easy_vqa.scene(seed, split, world.SIDE)
    return picture, labels([thing])


def text_example(seed, split="train"):
    """A picture of letters, and its labels."""
    picture, _, letter_map = world.lettering(seed, split)
    return picture, letter_labels(letter_map)


def loss_of(features, labels, p):
    """The sum over the questions of their weight times the mean cross-entropy over the patches that have a label.

    Returns the loss and its pull. Three quarters of the patches show nothing; each of them counts a third.
    """  # (B,P,D), (B,P,questions) -> ()
    tokens = features.reshape(-1, features.shape[-1])
    labels = np.asarray(labels, like=tokens).reshape(tokens.shape[0], -1)
    logits, pull_linear = linear(tokens, **p)
    loss, dlogits, start = 0, np.zeros_like(logits), 0
    for question, (answers, share) in enumerate(QUESTIONS.values()):
        labeled = np.flatnonzero(labels[:, question] != UNKNOWN)
        if labeled.size:
            truth, part = labels[labeled, question], slice(start, start + answers)
            losses, pull = cross_entropy(logits[labeled, part], truth)
            weights = np.where(truth == 0, 1 / 3, 1.0).astype(tokens.dtype) if question == 0 else np.ones_like(losses)
            weights = weights * (share / weights.sum())
            loss = loss + (losses * weights).sum()
            dlogits[labeled, part] = pull(weights)
        start += answers

    def pull(dy):
        dtokens, grads = pull_linear(dlogits * dy)
        return dtokens.reshape(features.shape), grads
    return loss, pull
