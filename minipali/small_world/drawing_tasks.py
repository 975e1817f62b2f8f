"""What can be asked about a scene of drawings, and the one right answer: pairs (prefix, suffix) as in `tasks.py`.

Every question draws its answer first, and then a question that has this answer, so that a model that ignores the
picture stays near chance. `names` are all names of drawings: a "no" needs one that is not in the picture.
"""

import re
from collections import Counter

import numpy as np

from minipali.outputs.boxes import Detection, to_text
from minipali.small_world import relations
from minipali.small_world.relations import choice
from minipali.small_world.tasks import mask_crop, rounded
from minipali.small_world.world import PLACES, SIDE

# How often `sample` draws each task, as shares of their sum; training asks for a caption of every scene besides.
WEIGHTS = {
    "detect": 4, "segment": 6, "what": 2, "region": 1.5, "where": 1.5, "exists": 2, "count": 2,
    "relation": 1, "side": 1,
}  # fmt: skip
QUESTIONS = {
    "count": "how many {words} are there?",
    "what": "what is {words}?",
    "where": "where is the {words}?",
    "exists": "is there {words}?",
}
ABSENT = 0.1  # the share of "detect" prompts whose object is not there: the suffix is empty
SECOND = 0.25  # the share of "detect" prompts for two classes
IRREGULAR = {
    "mouse": "mice", "knife": "knives", "loaf": "loaves", "leaf": "leaves", "wolf": "wolves", "die": "dice",
    "fish": "fish", "sheep": "sheep", "shrimp": "shrimp", "snowman": "snowmen",
    "volcano": "volcanoes", "tomato": "tomatoes",
}  # fmt: skip


def article(name):
    """A name with "a" or "an", by its sound: "unicorn" begins like "you", "hourglass" like "our"."""
    vowel = name[0] in "aeiou" and not name.startswith("uni") or name.startswith("hour")
    return f"{'an' if vowel else 'a'} {name}"


def plural(name):
    """The plural of a name, that is of its last word, or of the word before "of"."""
    head, of, rest = name.partition(" of ")
    *before, noun = head.split(" ")
    if noun in IRREGULAR:
        noun = IRREGULAR[noun]
    elif noun.endswith("y") and noun[-2] not in "aeiou":
        noun = noun[:-1] + "ies"
    else:
        noun += "es" if noun.endswith(("s", "x", "z", "ch", "sh")) else "s"
    return " ".join([*before, noun]) + of + rest


def _present(scene):
    """The different names in the picture, in reading order."""
    return list(dict.fromkeys(thing.name for thing in scene.things))


def _absent(scene, rng, names):
    """A name that is not in the picture."""
    present = _present(scene)
    while (name := choice(rng, names)) in present:
        pass
    return name


def _named_once(scene):
    """The things whose names no other thing in the picture has."""
    counts = Counter(thing.name for thing in scene.things)
    return [thing for thing in scene.things if counts[thing.name] == 1]


def _alone(scene, rng):
    """A thing whose name no other thing has, or None."""
    alone = _named_once(scene)
    return choice(rng, alone) if alone else None


def _answer(task, words, answer):
    return "answer en " + QUESTIONS[task].format(words=words), answer


# --- captions -------------------------------------------------------------------------------------------------------

def sentence(named):
    """Pairs (name, place) as text: "a dog on the left, a pizza at the top right and a drum at the bottom"."""
    parts = [f"{article(name)} {place}" for name, place in named]
    return " and ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))


def named_in(text):
    """The pairs (name, place) in a caption; what is not of its form is left out. "A bow and arrow" is one thing."""
    places = "|".join(sorted(PLACES, key=len, reverse=True))
    return re.findall(f"(?:^|, | and )an? (.+?) ({places})(?=, | and |$)", text)


def caption(scene, rng=None, names=()):
    """Everything in the picture with its place, in reading order."""
    return "caption en", sentence([(thing.name, thing.place) for thing in scene.things])


def wrong_captions(scenes, rng, names):
    """For each scene its caption with the name or the place of one thing changed: wrong, but hard to tell from it."""
    captions = []
    for scene in scenes:
        named = [(thing.name, thing.place) for thing in scene.things]
        i = int(rng.integers(len(named)))
        name, place = named[i]
        if rng.random() < 0.5:
            name = choice(rng, [other for other in names if other != name])
        else:
            taken = [place for _, place in named]
            place = choice(rng, [other for other in PLACES if other not in taken])
        named[i] = name, place
        captions.append(sentence(sorted(named, key=lambda pair: PLACES.index(pair[1]))))
    return captions


# --- questions ------------------------------------------------------------------------------------------------------

def how_many(scene, rng, names):
    """How many there are: the number is drawn first, then a name, or most answers would be 0 or 1."""
    counts = Counter(thing.name for thing in scene.things)
    number = choice(rng, sorted({0, *counts.values()}))
    fitting = [name for name, times in counts.items() if times == number]
    name = choice(rng, fitting) if number else _absent(scene, rng, names)
    return _answer("count", plural(name), str(number))


def what(scene, rng, names):
    """What lies at a place; one time in four, nothing."""
    taken = {thing.place: article(thing.name) for thing in scene.things}
    place = choice(rng, [p for p in PLACES if p not in taken] if rng.random() < 0.25 else list(taken))
    return _answer("what", place, taken.get(place, "nothing"))


def where(scene, rng, names):
    """The place of a thing whose name no other thing has."""
    if (thing := _alone(scene, rng)) is None:
        return None
    return _answer("where", thing.name, thing.place)


def exists(scene, rng, names):
    """Yes or no, equally often."""
    if rng.random() < 0.5:
        return _answer("exists", article(choice(rng, _present(scene))), "yes")
    return _answer("exists", article(_absent(scene, rng, names)), "no")


def relation(scene, rng, names):
    """Whether one thing lies left of, right of, above or below another, as asked about shapes."""
    return relations.relation([(thing, [thing.name]) for thing in _named_once(scene)], rng)


def side(scene, rng, names):
    """The side of another on which a thing lies, as asked about shapes."""
    return relations.side([(thing, [thing.name]) for thing in _named_once(scene)], rng)


# --- boxes and masks ------------------------------------------------------------------------------------------------

def boxes_of(classes, scene):
    """The prompt for these names, and the boxes of all things that have them, name by name."""
    boxes = [Detection(name, rounded(thing.box)) for name in classes for thing in scene.things if thing.name == name]
    return "detect " + " ; ".join(classes), to_text(boxes, SIDE, SIDE)


def mask_of(thing, codes_of):
    """The prompt for a thing's mask, and its box and mask; `codes_of` turns a (64,64) mask into its 16 codes."""
    codes = tuple(codes_of(mask_crop(thing.mask, thing.box)))
    return f"segment {thing.name}", to_text([Detection(thing.name, rounded(thing.box), codes)], SIDE, SIDE)


def detect(scene, rng, names):
    """The box of every thing of one class, or of two, the first class first; an empty suffix if there is none."""
    present = _present(scene)
    classes = [choice(rng, present)]
    if rng.random() < ABSENT:
        classes = [_absent(scene, rng, names)]
    elif rng.random() < SECOND:
        others = [name for name in present if name not in classes]
        if not others or rng.random() < ABSENT:
            others = [_absent(scene, rng, names)]
        classes.insert(int(rng.integers(2)), choice(rng, others))
    return boxes_of(classes, scene)


def segment(scene, rng, names, codes_of):
    """Box and mask of a thing whose name no other thing has."""
    if codes_of is None or (thing := _alone(scene, rng)) is None:
        return None
    return mask_of(thing, codes_of)


def region(scene, rng, names):
    """What is in a box: PaliGemma's grounded caption, whose prompt has the box's `<loc>` tokens."""
    thing = choice(rng, scene.things)
    return "caption " + to_text([Detection("", rounded(thing.box))], SIDE, SIDE).strip(), article(thing.name)


TASKS = {
    "caption": caption, "count": how_many, "what": what, "where": where, "exists": exists,
    "relation": relation, "side": side, "detect": detect, "segment": segment, "region": region,
}  # fmt: skip


def ask(task, scene, rng, names, codes_of=None):
    """One example (prefix, suffix) of the named task, or None where the scene does not allow it."""
    return segment(scene, rng, names, codes_of) if task == "segment" else TASKS[task](scene, rng, names)


def sample(scene, rng, names, codes_of=None):
    """One example (prefix, suffix) of a task drawn by WEIGHTS."""
    bounds = np.cumsum(list(WEIGHTS.values()))
    while True:
        task = list(WEIGHTS)[np.searchsorted(bounds, rng.random() * bounds[-1], side="right")]
        if (example := ask(task, scene, rng, names, codes_of)) is not None:
            return example
