"""What lies on each patch: the second half of what the vision tower is taught in its first stage.

A caption says what is in a picture and not where, so the contrastive loss alone leaves it to chance that a token knows
its own piece of the picture. SigLIP 2 (Tschannen et al. 2025) adds losses on every patch for that reason; it has to
invent the targets, while our pictures are drawn and their truths known. A linear layer on the tower's tokens answers,
for each of the 49: which shape, which colour, how large, between which borders, with which outline, which letters.
The layer is thrown away afterwards. Shapes are why it is here: weights/README.md has the figures.
"""
import itertools

import numpy as np

from minipali.learning.backward.losses import cross_entropy
from minipali.learning.backward.ops import linear
from minipali.outputs.boxes import CODES
from minipali.small_world import artwork, easy_vqa, tasks, world

KINDS = ("nothing", *world.SHAPES, "rectangle", *artwork.names().values())
BOOK = 16  # the codes of our masks
ROWS = COLUMNS = world.SIDE // 14
THING = 12  # pixels of a thing that make a patch its own, of 196
INK = 4  # pixels of a letter that make half a patch its own, of 98

# A question: how many answers it has, and its share in the loss.
QUESTIONS = {
    "kind": (len(KINDS), 1.0), "color": (len(world.COLORS), 0.5), "size": (len(world.SIZES), 0.3),
    **{edge: (world.SIDE + 1, 0.15) for edge in ("x0", "y0", "x1", "y1")},
    **{f"code {i}": (BOOK, 0.03) for i in range(CODES)},
    "letter on the left": (1 + len(world.LETTERS), 0.5), "letter on the right": (1 + len(world.LETTERS), 0.5),
}  # fmt: skip
ANSWERS = sum(answers for answers, _ in QUESTIONS.values())
UNKNOWN = -1  # not asked: there is no answer, or nobody knows it


def per_patch(mask, columns=COLUMNS):
    """How many pixels of a mask are on each patch, or on each half with `columns` twice as many."""
    # (S,S) -> (rows, columns)
    return mask.reshape(ROWS, world.SIDE // ROWS, columns, world.SIDE // columns).sum((1, 3))


def about(thing):
    """What a thing is, its color and its size, as numbers; a drawing has a name alone."""
    if hasattr(thing, "name"):
        return KINDS.index(thing.name), UNKNOWN, UNKNOWN
    size = list(world.SIZES).index(thing.size) if thing.size else UNKNOWN
    return KINDS.index(thing.shape), list(world.COLORS).index(thing.color), size


def labels(things, codes=None):
    """The answers for a scene; a patch belongs to the thing that has most of it. `codes`: those of each thing's mask."""
    # n things, (n,16) -> (P, questions)
    found = np.full((ROWS * COLUMNS, len(QUESTIONS)), UNKNOWN)
    cover = np.stack([per_patch(thing.mask).reshape(-1) for thing in things])
    owner, taken = cover.argmax(0), cover.max(0) >= THING
    outlines = [[UNKNOWN] * CODES] * len(things) if codes is None else codes
    for i, thing in enumerate(things):
        found[taken & (owner == i), :-2] = [*about(thing), *tasks.whole(thing.box), *outlines[i]]
    found[~taken, 0] = 0
    return found


def letter_labels(written):
    """The answers for a picture of letters; `written` (S,S) has at each pixel of ink the letter's number from 1, else 0."""
    found = np.full((ROWS * COLUMNS, len(QUESTIONS)), UNKNOWN)
    numbers = [0, *np.unique(written[written > 0])]
    ink = np.stack([per_patch(written == number, 2 * COLUMNS) for number in numbers])
    ink[0] = INK - 1  # what a letter must have more of
    found[:, -2:] = np.array(numbers)[ink.argmax(0)].reshape(-1, 2)
    return found


def scene_examples(scenes, codes_of=None):
    """The (picture, labels) of each scene; all the masks are turned into codes together, a quarter of the time."""
    if codes_of is None:
        return [(scene.image, labels(scene.things)) for scene in scenes]
    crops = [tasks.mask_crop(thing.mask, thing.box) for scene in scenes for thing in scene.things]
    codes = iter(codes_of(np.stack(crops)))
    return [(scene.image, labels(scene.things, list(itertools.islice(codes, len(scene.things))))) for scene in scenes]


def easy_example(seed, split="train"):
    """A picture in the spirit of easy-VQA, and its labels."""
    picture, thing = easy_vqa.scene(seed, split, world.SIDE)
    return picture, labels([thing])


def text_example(seed, split="train"):
    """A picture of letters, and its labels."""
    picture, _, written = world.lettering(seed, split)
    return picture, letter_labels(written)


def loss_of(features, wanted, p):
    """For each question the mean cross-entropy over the patches that have an answer, times its share.

    Returns the loss and its pull. Three quarters of the patches show nothing; they count a third each.
    """  # (B,P,D), (B,P,questions) -> ()
    tokens = features.reshape(-1, features.shape[-1])
    wanted = np.asarray(wanted, like=tokens).reshape(tokens.shape[0], -1)
    logits, pull_linear = linear(tokens, **p)
    loss, dlogits, start = 0, np.zeros_like(logits), 0
    for question, (answers, share) in enumerate(QUESTIONS.values()):
        asked = np.flatnonzero(wanted[:, question] != UNKNOWN)
        if asked.size:
            truth, part = wanted[asked, question], slice(start, start + answers)
            losses, pull = cross_entropy(logits[asked, part], truth)
            weights = np.where(truth == 0, 1 / 3, 1.0).astype(tokens.dtype) if question == 0 else np.ones_like(losses)
            weights = weights * (share / weights.sum())
            loss = loss + (losses * weights).sum()
            dlogits[asked, part] = pull(weights)
        start += answers

    def pull(dy):
        dtokens, grads = pull_linear(dlogits * dy)
        return dtokens.reshape(features.shape), grads
    return loss, pull
