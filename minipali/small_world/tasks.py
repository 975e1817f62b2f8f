"""What can be asked about a scene, and the one right answer: pairs (prefix, suffix) in the form of PaliGemma's prompts.

Prefixes stand here without BOS and newline, suffixes without EOS. A model that ignores the picture should stay near
chance, so every question draws its answer first, and then a question that has this answer.
"""
from dataclasses import dataclass

import numpy as np
from PIL import Image

from minipali.outputs.boxes import Detection, parse, to_text
from minipali.small_world import relations
from minipali.small_world.relations import choice
from minipali.small_world.world import COLORS, PLACES, SHAPES, SIDE, SIZES

MASK_SIDE = 64  # pixels of a mask that the codec encodes

# How often `sample` draws each task, as shares of their sum. Not among them: captions, since training asks for one of
# every scene, and "ocr", which has pictures of its own.
WEIGHTS = {
    "detect": 4, "segment": 7, "count": 3, "color": 0.5, "shape": 0.5,
    "what": 1, "where": 0.5, "exists": 1.5, "relation": 3, "side": 3, "size": 1.5,
}  # fmt: skip
QUESTIONS = {
    "count": "how many {plural} are there?",
    "color": "what color is the {noun}?",
    "shape": "what shape is {color}?",
    "what": "what is {place}?",
    "where": "where is the {noun}?",
    "exists": "is there a {noun}?",
    **relations.QUESTIONS,
    "size": "is the {noun} {size}?",
}
ABSENT = 0.1  # the share of "detect" prompts whose object is not there: the suffix is empty


@dataclass(frozen=True)
class Noun:
    """Words that describe things: "large red circle", "red shape"; an attribute that is None is left open."""

    size: str | None = None
    color: str | None = None
    shape: str | None = None

    def __str__(self):
        return " ".join(word for word in (self.size, self.color, self.shape or "shape") if word)

    @property
    def plural(self):
        """The noun for any number of things."""
        return f"{self}es" if self.shape == "cross" else f"{self}s"

    def among(self, things):
        """The things that the noun fits, in the order given."""
        words = [(name, word) for name, word in vars(self).items() if word]
        return [thing for thing in things if all(getattr(thing, name) == word for name, word in words)]


def _nouns(thing, forms):
    """The nouns that fit a thing, one for each of `forms`, such as "color shape"."""
    return [Noun(**{word: getattr(thing, word) for word in form.split()}) for form in forms]


FORMS = ("shape", "color", "color shape", "size shape", "size color", "size color shape", "size")


def _unique_nouns(thing, things, forms):
    """The nouns that fit this thing and no other."""
    return [noun for noun in _nouns(thing, forms) if len(noun.among(things)) == 1]


def _identified(scene, rng, forms):
    """A thing and a noun that fits it alone; (None, None) where there is none."""
    pairs = [(thing, noun) for thing in scene.things for noun in _unique_nouns(thing, scene.things, forms)]
    return choice(rng, pairs) if pairs else (None, None)


def _absent(rng, noun, things):
    """The noun with one word changed so that it fits nothing; mostly, each of its words fits something in the scene."""
    words = {"size": SIZES, "color": COLORS, "shape": SHAPES}
    changed = [Noun(**{**vars(noun), word: value}) for word, old in vars(noun).items() if old for value in words[word]]
    absent = [other for other in changed if not other.among(things)]
    seen = {value for thing in things for value in (thing.size, thing.color, thing.shape)}
    plausible = [other for other in absent if seen.issuperset(filter(None, vars(other).values()))]
    return choice(rng, plausible if plausible and rng.random() < 0.7 else absent)


def _answer(task, answer, **words):
    return "answer en " + QUESTIONS[task].format(**words), answer


def _phrase(thing):
    return f"a {thing.size} {thing.color} {thing.shape}"


def caption(scene, rng):
    """Everything in the picture in reading order."""
    parts = [f"{_phrase(thing)} {thing.place}" for thing in scene.things]
    return "caption en", " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def distinct(draw, count, caption=caption):
    """The first `count` scenes of draw(0), draw(1), ... with different captions, as {caption: scene}."""
    scenes, number = {}, 0
    while len(scenes) < count:
        scene = draw(number)
        scenes.setdefault(caption(scene, None)[1], scene)
        number += 1
    return scenes


def how_many(scene, rng):
    """How many there are: the number is drawn first, then a noun with that many, or most answers would be 0 or 1."""
    things = scene.things
    if rng.random() < 0.2:
        return _answer("count", str(len(things)), plural="shapes")
    nouns = [Noun(shape=shape) for shape in SHAPES] + [Noun(color=color) for color in COLORS]
    nouns += [Noun(size=size) for size in SIZES]
    nouns += dict.fromkeys(Noun(color=a.color, shape=b.shape) for a in things for b in things)
    by_number = {}
    for noun in nouns:
        by_number.setdefault(len(noun.among(things)), []).append(noun)
    number = choice(rng, sorted(by_number))
    return _answer("count", str(number), plural=choice(rng, by_number[number]).plural)


def color(scene, rng):
    """The color of the one thing that the words fit; the words may include its place."""
    if rng.random() < 0.3:
        thing = choice(rng, scene.things)
        return _answer("color", thing.color, noun=f"{choice(rng, (thing.shape, 'shape'))} {thing.place}")
    thing, noun = _identified(scene, rng, ("shape", "size shape", "size"))
    return None if thing is None else _answer("color", thing.color, noun=noun)


def shape(scene, rng):
    """The shape of the one thing of a color."""
    thing, _ = _identified(scene, rng, ("color",))
    return None if thing is None else _answer("shape", thing.shape, color=thing.color)


def what(scene, rng):
    """What lies at a place; one time in four, nothing."""
    taken = {thing.place: _phrase(thing) for thing in scene.things}
    place = choice(rng, [p for p in PLACES if p not in taken] if rng.random() < 0.25 else list(taken))
    return _answer("what", taken.get(place, "nothing"), place=place)


def where(scene, rng):
    """The place of the one thing that the words fit."""
    thing, noun = _identified(scene, rng, FORMS)
    return None if thing is None else _answer("where", thing.place, noun=noun)


def exists(scene, rng):
    """Yes or no, equally often; "no" mostly for a color and a shape that are both there, but not in one thing."""
    forms = ("shape", "color", "color shape", "color shape", "size color shape")
    noun = choice(rng, _nouns(choice(rng, scene.things), forms))
    if rng.random() < 0.5:
        return _answer("exists", "yes", noun=noun)
    return _answer("exists", "no", noun=_absent(rng, noun, scene.things))


def _identified_things(scene):
    """(a thing, the nouns that fit it alone) for every thing that has such nouns."""
    return [(thing, nouns) for thing in scene.things if (nouns := _unique_nouns(thing, scene.things, FORMS))]


def relation(scene, rng):
    """Whether one thing lies left of, right of, above or below another."""
    return relations.relation(_identified_things(scene), rng)


def side(scene, rng):
    """On which of two sides of another a thing lies."""
    return relations.side(_identified_things(scene), rng)


def size(scene, rng):
    """Whether the one thing that the words fit is large, or small."""
    thing, noun = _identified(scene, rng, ("shape", "color", "color shape"))
    if thing is None:
        return None
    asked = choice(rng, list(SIZES))
    return _answer("size", "yes" if thing.size == asked else "no", noun=noun, size=asked)


def rounded(box):
    """A box in integer pixels: ten of the 1024 locations lie on one pixel, and no picture can show which is meant."""
    return tuple(round(value) for value in box)


def detect(scene, rng):
    """The box of every thing of one class, or of two, the first class first; an empty suffix if there is none."""
    things = scene.things
    form = choice(rng, ("shape", "color shape", "color shape", "shape ; shape"))
    present = list(dict.fromkeys(_nouns(t, (form.split(" ; ")[0],))[0] for t in things))
    classes = [choice(rng, present)]
    if rng.random() < ABSENT:
        classes = [_absent(rng, classes[0], things)]
    elif form == "shape ; shape":
        others = [noun for noun in present if noun not in classes]
        if not others or rng.random() < ABSENT:
            others = [_absent(rng, classes[0], things)]
        classes.insert(int(rng.integers(2)), choice(rng, others))
    boxes = [Detection(str(noun), rounded(thing.box)) for noun in classes for thing in noun.among(things)]
    return "detect " + " ; ".join(map(str, classes)), to_text(boxes, SIDE, SIDE)


def mask_crop(mask, box):
    """The part of a mask inside the box that the `<loc>` tokens decode to, resized for the codec."""
    # (SIDE,SIDE) bool -> (64,64) float32 in 0..1
    [decoded] = parse(to_text([Detection("", rounded(box))], SIDE, SIDE), SIDE, SIDE)
    x0, y0, x1, y1 = (int(v) for v in decoded.box)
    crop = Image.fromarray(mask[y0:y1, x0:x1].astype(np.float32))
    return np.asarray(crop.resize((MASK_SIDE, MASK_SIDE), Image.BILINEAR))


def segment(scene, rng, codes_of):
    """Box and mask of the one thing that the words fit; `codes_of` turns a (64,64) mask into its 16 codes."""
    if codes_of is None:
        return None
    thing, noun = _identified(scene, rng, ("shape", "color shape"))
    if thing is None:
        return None
    codes = tuple(codes_of(mask_crop(thing.mask, thing.box)))
    return f"segment {noun}", to_text([Detection(str(noun), rounded(thing.box), codes)], SIDE, SIDE)


def ocr(text):
    """The example for a picture of `world.draw_text`."""
    return "ocr", text


TASKS = {
    "caption": caption, "count": how_many, "color": color, "shape": shape, "what": what, "where": where,
    "exists": exists, "relation": relation, "side": side, "size": size, "detect": detect, "segment": segment,
}  # fmt: skip


def ask(task, scene, rng, codes_of=None):
    """One example (prefix, suffix) of the named task, or None where the scene does not allow it."""
    return segment(scene, rng, codes_of) if task == "segment" else TASKS[task](scene, rng)


def sample(scene, rng, codes_of=None):
    """One example (prefix, suffix) of a task drawn by WEIGHTS."""
    bounds = np.cumsum(list(WEIGHTS.values()))
    while True:
        task = list(WEIGHTS)[np.searchsorted(bounds, rng.random() * bounds[-1], side="right")]
        if (example := ask(task, scene, rng, codes_of)) is not None:
            return example


def examples(scene, rng, codes_of=None):
    """One example of every task that the scene allows, as (task, prefix, suffix)."""
    asked = ((task, ask(task, scene, rng, codes_of)) for task in TASKS)
    return [(task, *example) for task, example in asked if example is not None]
