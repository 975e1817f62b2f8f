"""What is asked about drawings: every answer is right, and nobody does well without looking."""
import re
from collections import Counter, defaultdict

import numpy as np
import pytest
from galleries import NAMES, small_gallery
from helpers import seeds
from hypothesis import given

from minipali.outputs.boxes import parse
from minipali.small_world import drawing_tasks, tasks
from minipali.small_world.drawings import draw
from minipali.small_world.world import PLACES, SIDE

GALLERY = small_gallery()
THERE = [*NAMES.values(), "bow and arrow", "ice cream cone"]  # the last two are in no picture


@pytest.fixture(scope="module")
def scenes():
    return [draw(seed, GALLERY, "test") for seed in range(200)]


def codes_of(crop):
    """Stand in for the mask's encoder: how full each cell of the 4x4 grid is."""
    return np.rint(crop.reshape(4, 16, 4, 16).mean((1, 3)) * 127).astype(int).ravel().tolist()


def oracle(prefix, facts):
    """The answer to a prompt about facts [(name, place, box)], worked out from its words alone."""
    counts = Counter(name for name, _, _ in facts)
    if prefix == "caption en":
        parts = [f"{drawing_tasks.article(name)} {place}" for name, place, _ in facts]
        return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    if prefix.startswith("caption <loc"):
        [found] = parse(prefix.removeprefix("caption ") + " x", SIDE, SIDE)
        [name] = [name for name, _, box in facts if np.abs(np.array(box) - found.box).max() <= 0.6]
        return drawing_tasks.article(name)
    question = prefix.removeprefix("answer en ")
    if question.startswith("how many "):
        many = question.removeprefix("how many ").removesuffix(" are there?")
        [name] = [name for name in THERE if drawing_tasks.plural(name) == many]
        return str(counts[name])
    if question.startswith("what is "):
        place = question.removeprefix("what is ").removesuffix("?")
        return next((drawing_tasks.article(name) for name, where, _ in facts if where == place), "nothing")
    if question.startswith("where is the "):
        name = question.removeprefix("where is the ").removesuffix("?")
        [place] = [place for other, place, _ in facts if other == name]
        return place
    if question.startswith("is the "):
        return compared(question, facts)
    phrase = question.removeprefix("is there ").removesuffix("?")
    return "yes" if any(phrase == drawing_tasks.article(name) for name in counts) else "no"


def compared(question, facts):
    """The answer to "is the dog left of the drum?" and to "is the dog left or right of the drum?", from the words."""
    rows = {name: 3 if "bottom" in place else 1 if "top" in place else 2 for name, place, _ in facts}
    columns = {name: 3 if "right" in place else 1 if "left" in place else 2 for name, place, _ in facts}
    words = "above or below|left or right of|left of|right of|above|below"
    name, words, other = re.fullmatch(f"is the (.+?) ({words}) the (.+)\\?", question).groups()
    down, across = rows[other] - rows[name], columns[other] - columns[name]
    holds = {"left": across > 0, "right": across < 0, "above": down > 0, "below": down < 0}
    if " or " not in words:
        assert across if words in ("left of", "right of") else down
        return "yes" if holds[words.split(" ")[0]] else "no"
    [answer] = [word for word in holds if word in words.split(" ") and holds[word]]
    return answer


def facts_of(scene):
    return [(thing.name, thing.place, thing.box) for thing in scene.things]


def test_every_answer_is_right(scenes):
    asked = Counter()
    for number, scene in enumerate(scenes):
        rng = np.random.default_rng(number)
        for task in ("caption", "count", "what", "where", "exists", "region", "relation", "side"):
            if (example := drawing_tasks.ask(task, scene, rng, THERE)) is not None:
                assert example[1] == oracle(example[0], facts_of(scene)), example
                asked[task] += 1
    assert asked["where"] > 100 and asked["relation"] == asked["side"] > 60
    assert all(asked[task] == len(scenes) for task in asked if task not in ("where", "relation", "side"))


def test_where_is_asked_of_what_is_there_once(scenes):
    twice = [scene for scene in scenes if len({t.name for t in scene.things}) == 1 < len(scene.things)]
    assert twice
    for scene in twice:
        for task in ("where", "relation", "side"):
            assert drawing_tasks.ask(task, scene, np.random.default_rng(0), THERE) is None
        assert drawing_tasks.ask("segment", scene, np.random.default_rng(0), THERE, codes_of) is None


def test_detect_boxes_every_thing_of_its_classes(scenes):
    numbers = Counter()
    for number, scene in enumerate(scenes):
        prefix, suffix = drawing_tasks.ask("detect", scene, np.random.default_rng(number), THERE)
        classes = prefix.removeprefix("detect ").split(" ; ")
        found = parse(suffix, SIDE, SIDE)
        expected = [thing for name in classes for thing in scene.things if thing.name == name]
        assert [detection.label for detection in found] == [thing.name for thing in expected]
        for detection, thing in zip(found, expected):
            assert np.abs(np.array(detection.box) - thing.box).max() <= 0.6
        numbers[len(classes), min(1, len(found))] += 1
    assert numbers[1, 1] > 100 and numbers[2, 1] > 10 and numbers[1, 0] > 5


def test_segment_has_the_box_and_the_codes(scenes):
    for number, scene in enumerate(scenes[:60]):
        if (example := drawing_tasks.ask("segment", scene, np.random.default_rng(number), THERE, codes_of)) is not None:
            [found] = parse(example[1], SIDE, SIDE)
            [thing] = [thing for thing in scene.things if thing.name == found.label]
            assert example[0] == f"segment {thing.name}"
            assert list(found.codes) == codes_of(tasks.mask_crop(thing.mask, thing.box))


def test_blind_guesses_fail(scenes):
    """The commonest answer to each kind of question is far from always right."""
    answers = defaultdict(Counter)
    for number, scene in enumerate(scenes):
        rng = np.random.default_rng(number)
        for task in ("count", "what", "where", "exists", "region", "relation", "side"):
            if (example := drawing_tasks.ask(task, scene, rng, THERE)) is not None:
                answers[task][example[1]] += 1
    share = {task: max(counts.values()) / counts.total() for task, counts in answers.items()}
    assert share["exists"] < 0.62 and share["count"] < 0.6 and share["where"] < 0.3
    assert share["what"] < 0.35 and share["region"] < 0.3 and share["relation"] < 0.62 and share["side"] < 0.4
    assert answers["what"]["nothing"] > 20


def test_sample_follows_the_weights(scenes):
    rng, seen = np.random.default_rng(0), Counter()
    [scene] = [scene for scene in scenes if len({t.name for t in scene.things}) == 4][:1]
    for _ in range(2000):
        prefix, _ = drawing_tasks.sample(scene, rng, THERE, codes_of)
        word, *rest = prefix.split(" ")
        seen["side" if " or " in prefix else " ".join(rest[1:3]) if word == "answer" else word] += 1
    total = sum(drawing_tasks.WEIGHTS.values())
    for task, words in (("detect", "detect"), ("segment", "segment"), ("region", "caption"), ("count", "how many"),
                        ("what", "what is"), ("where", "where is"), ("exists", "is there"), ("relation", "is the"),
                        ("side", "side")):
        assert abs(seen[words] / 2000 - drawing_tasks.WEIGHTS[task] / total) < 0.03


@given(seeds)
def test_captions_can_be_read_back(seed):
    rng = np.random.default_rng(seed)
    places = sorted(rng.permutation(9)[:rng.integers(1, 5)].tolist())
    named = [(THERE[rng.integers(len(THERE))], PLACES[place]) for place in places]
    assert drawing_tasks.named_in(drawing_tasks.sentence(named)) == named


def test_what_is_no_caption_tells_nothing():
    for text in ("", "a dog", "dog on the left", "yes", "a dog on the moon"):
        assert drawing_tasks.named_in(text) == []
    assert drawing_tasks.named_in("a dog on the left, a cat") == [("dog", "on the left")]


def test_wrong_captions_change_one_thing(scenes):
    changed = Counter()
    for scene, text in zip(scenes, drawing_tasks.wrong_captions(scenes, np.random.default_rng(0), THERE)):
        true = Counter((thing.name, thing.place) for thing in scene.things)
        said = drawing_tasks.named_in(text)
        assert [PLACES.index(place) for _, place in said] == sorted({PLACES.index(place) for _, place in said})
        [(old, _)], [(new, _)] = (true - Counter(said)).items(), (Counter(said) - true).items()
        assert (old[0] == new[0]) != (old[1] == new[1])
        changed["name" if old[1] == new[1] else "place"] += 1
    assert min(changed.values()) > 60
