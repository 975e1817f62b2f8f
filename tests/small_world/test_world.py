"""The small world: its pictures are what they are said to be, and every answer is right."""

import hashlib
import os
import pickle
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, TESTS
from PIL import Image

from minipali.errors import InputError
from minipali.outputs.boxes import parse
from minipali.small_world import easy_vqa, tasks, world

SEEDS = range(200)
SIDE, CELL = world.SIDE, world.SIDE / 3
LIMIT = world.SIZES["small"][1] + world.SIZES["large"][0]  # halfway between twice the one and twice the other


@pytest.fixture(scope="module")
def scenes():
    return [world.draw(seed, "test") for seed in SEEDS]


def codes_of(crop):
    """Stand in for the mask's encoder: how full each cell of the 4x4 grid is."""
    return np.rint(crop.reshape(4, 16, 4, 16).mean((1, 3)) * 127).astype(int).ravel().tolist()


def facts(scene):
    """(size, color, shape, row, column) of each thing, read off the picture wherever a picture can tell."""
    found = []
    for thing in scene.things:
        x0, y0, x1, y1 = thing.box
        shade = np.median(scene.image[thing.mask], axis=0)
        color = min(world.COLORS, key=lambda name: np.abs(np.mean(world.COLORS[name], 0) - shade).max())
        size = "large" if max(x1 - x0, y1 - y0) > LIMIT else "small"
        found.append((size, color, thing.shape, int((y0 + y1) / 2 / CELL), int((x0 + x1) / 2 / CELL)))
    return found


def fits(phrase, fact):
    """Whether a phrase such as "small red stars on the left" describes a fact."""
    size, color, shape, row, column = fact
    noun, _, place = re.fullmatch(r"((?:\w+ )*?\w+?)( ((?:at|on|in) the .*))?", phrase).groups()
    if place and place != world.PLACES[3 * row + column]:
        return False
    known = {size, color, shape, shape + "s", shape + "es", "shape", "shapes", "a", "the"}
    return known.issuperset(noun.split())


def oracle(prefix, things):
    """The answer to a question about the facts, derived from its words alone."""
    question = prefix.removeprefix("answer en ")

    def only(phrase):
        [fact] = [fact for fact in things if fits(phrase, fact)]
        return fact

    if prefix == "caption en":
        parts = [
            f"a {' '.join(fact[:3])} {world.PLACES[3 * fact[3] + fact[4]]}"
            for fact in sorted(things, key=lambda f: f[3:])
        ]
        return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
    if m := re.fullmatch(r"how many (.*) are there\?", question):
        return str(sum(fits(m[1], fact) for fact in things))
    if m := re.fullmatch(r"what color is the (.*)\?", question):
        return only(m[1])[1]
    if m := re.fullmatch(r"what shape is (\w+)\?", question):
        return only(f"{m[1]} shape")[2]
    if m := re.fullmatch(r"what is (.*)\?", question):
        return next((f"a {' '.join(fact[:3])}" for fact in things if fits(f"shape {m[1]}", fact)), "nothing")
    if m := re.fullmatch(r"where is the (.*)\?", question):
        return world.PLACES[3 * only(m[1])[3] + only(m[1])[4]]
    if m := re.fullmatch(r"is there a (.*)\?", question):
        return "yes" if any(fits(m[1], fact) for fact in things) else "no"
    if m := re.fullmatch(r"is the (.*) (left or right of|above or below) the (.*)\?", question):
        (*_, row, column), (*_, other_row, other_column) = only(m[1]), only(m[3])
        vertical = m[2] == "above or below"
        before, ahead, behind = ("above", row, other_row) if vertical else ("left", column, other_column)
        assert ahead != behind
        return before if ahead < behind else {"above": "below", "left": "right"}[before]
    if m := re.fullmatch(r"is the (.*) (left of|right of|above|below) the (.*)\?", question):
        (*_, row, column), (*_, other_row, other_column) = only(m[1]), only(m[3])
        ahead, behind = (row, other_row) if m[2] in ("above", "below") else (column, other_column)
        assert ahead != behind
        return "yes" if (ahead < behind) == (m[2] in ("above", "left of")) else "no"
    if m := re.fullmatch(r"is the (.*) (large|small)\?", question):
        return "yes" if only(m[1])[0] == m[2] else "no"
    raise AssertionError(f"no such question: {prefix}")


def iou(a, b):
    """Intersection over union of two boxes."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(width, 0) * max(height, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def digest():
    """A fingerprint of one picture of each kind."""
    pictures = world.draw((3, 4)).image, world.draw_text(5)[0], easy_vqa.synthetic(6, "train", 112, 1)[0]
    return hashlib.sha256(b"".join(picture.tobytes() for picture in pictures)).hexdigest()


def test_seed_decides():
    """A seed gives the same pictures again, in another process too."""
    code = "import test_world; print(test_world.digest())"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [ROOT, TESTS, Path(__file__).parent]))}
    other = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert other.stdout.strip() == digest() == digest()


def test_held_out_pictures_are_never_training_pictures(scenes):
    pictures = [scene.image.tobytes() for scene in scenes] + [
        world.draw(seed, "train").image.tobytes() for seed in SEEDS[:60]
    ]
    assert len(set(pictures)) == len(pictures)
    texts = [world.draw_text(seed, split)[0].tobytes() for seed in range(20) for split in ("train", "test")]
    assert len(set(texts)) == len(texts)


def test_colors_keep_apart():
    names = list(world.COLORS)
    for i, a in enumerate(names):
        for b in names[:i]:
            (low_a, high_a), (low_b, high_b) = np.array(world.COLORS[a]), np.array(world.COLORS[b])
            gap = np.maximum(np.maximum(low_a - high_b, low_b - high_a), 0)
            assert np.sqrt((gap**2).sum()) >= 45, (a, b)


def test_things_keep_their_margins(scenes):
    """Inside the picture, far from the borders of the nine places, in reading order, clearly large or small."""
    assert world.SIZES["small"][1] * 1.25 < world.SIZES["large"][0]
    for scene in scenes:
        assert scene.image.shape == (SIDE, SIDE, 3) and scene.image.dtype == np.uint8
        assert 1 <= len(scene.things) <= 4
        cells = [world.PLACES.index(thing.place) for thing in scene.things]
        assert cells == sorted(set(cells))
        for thing, cell in zip(scene.things, cells):
            x0, y0, x1, y1 = thing.box
            assert 0 <= x0 < x1 <= SIDE and 0 <= y0 < y1 <= SIDE
            for center, k in zip(thing.center, (cell % 3, cell // 3)):
                assert 7 <= center - k * CELL <= CELL - 7
            low, high = world.SIZES[thing.size]
            assert 2 * low - 0.5 <= max(x1 - x0, y1 - y0) <= 2 * high + 0.5


def test_things_are_in_sight(scenes):
    """Masks lie inside their boxes, never meet, and differ in color from what is around."""
    for scene in scenes:
        assert np.sum([thing.mask for thing in scene.things], 0).max() == 1
        anything = np.any([thing.mask for thing in scene.things], 0)
        for thing in scene.things:
            ys, xs = np.nonzero(thing.mask)
            x0, y0, x1, y1 = thing.box
            assert x0 <= xs.min() + 0.5 and xs.max() + 0.5 <= x1 and y0 <= ys.min() + 0.5 and ys.max() + 0.5 <= y1
            near = np.zeros_like(anything)
            near[max(int(y0) - 3, 0):int(y1) + 4, max(int(x0) - 3, 0):int(x1) + 4] = True
            around = np.median(scene.image[near & ~anything].astype(float), axis=0)
            assert np.linalg.norm(np.median(scene.image[thing.mask], axis=0) - around) > 70


def test_things_hide_little_of_one_another(scenes):
    """Some overlap, none fills much less of its box than its like that stand alone, no two of a color meet."""
    alone, crowded = defaultdict(list), defaultdict(list)
    for scene in scenes:
        for thing in scene.things:
            x0, y0, x1, y1 = thing.box
            meeting = [other for other in scene.things if other is not thing and iou(thing.box, other.box) > 0]
            assert thing.color not in [other.color for other in meeting]
            fill = thing.mask.sum() / ((x1 - x0) * (y1 - y0))
            (crowded if meeting else alone)[thing.shape].append(fill)
    for shape, fills in crowded.items():
        assert min(fills) > 0.78 * min(alone[shape])
    assert sum(map(len, crowded.values())) > 10


def test_pictures_are_varied(scenes):
    """Every word occurs, nearly evenly, with every number of things."""
    things = [thing for scene in scenes for thing in scene.things]
    for word, values in [
        ("shape", world.SHAPES),
        ("color", world.COLORS),
        ("size", world.SIZES),
        ("place", world.PLACES),
    ]:
        counts = Counter(getattr(thing, word) for thing in things)
        assert set(counts) == set(values)
        assert min(counts.values()) > 0.5 * len(things) / len(values)
    assert min(Counter(len(scene.things) for scene in scenes).values()) > 30


def test_every_answer_is_right(scenes):
    """An oracle that reads color, size and place off the picture, and the question off its words, agrees."""
    rng = np.random.default_rng(0)
    asked = Counter()
    for scene in scenes:
        things = facts(scene)
        for task, prefix, suffix in tasks.examples(scene, rng):
            if task != "detect":
                assert suffix == oracle(prefix, things), prefix
                asked[task] += 1
    assert set(asked) == set(tasks.TASKS) - {"detect", "segment"}
    assert min(asked.values()) > 100


def test_detect_boxes_every_object_of_the_class(scenes):
    """Class by class in reading order, each box the true one in whole pixels, and nothing for an absent class."""
    rng = np.random.default_rng(1)
    absent, several = 0, 0
    for scene in scenes:
        seen = list(zip(facts(scene), scene.things))
        for _ in range(4):
            prefix, suffix = tasks.ask("detect", scene, rng)
            classes = prefix.removeprefix("detect ").split(" ; ")
            expected = [(label, thing.box) for label in classes for fact, thing in seen if fits(label, fact)]
            found = parse(suffix, SIDE, SIDE)
            assert [detection.label for detection in found] == [label for label, _ in expected]
            for detection, (_, box) in zip(found, expected):
                assert np.abs(np.subtract(detection.box, np.rint(box))).max() < 0.05  # half a location
                assert iou(detection.box, box) > 0.85
            absent += suffix == ""
            several += len(found) > 1
    assert 0.05 < absent / 800 < 0.15 and several > 100


def test_segment_describes_one_object(scenes):
    """The codes are those of the mask inside the box that the reader will paste them into."""
    rng = np.random.default_rng(2)
    for scene in scenes[:50]:
        if (example := tasks.ask("segment", scene, rng, codes_of)) is None:
            continue
        [detection] = parse(example[1], SIDE, SIDE)
        assert example[0] == f"segment {detection.label}"
        [thing] = [thing for fact, thing in zip(facts(scene), scene.things) if fits(detection.label, fact)]
        assert iou(detection.box, thing.box) > 0.85
        x0, y0, x1, y1 = (int(v) for v in detection.box)
        crop = tasks.mask_crop(thing.mask, thing.box)
        assert crop.shape == (64, 64) and crop.dtype == np.float32 and crop.min() == 0 and crop.max() == 1
        assert list(detection.codes) == codes_of(crop)
        pasted = np.asarray(Image.fromarray(crop).resize((x1 - x0, y1 - y0), Image.BILINEAR)) > 0.5
        assert (pasted == thing.mask[y0:y1, x0:x1]).mean() > 0.97


def test_blind_guesses_fail(scenes):
    """Answers are balanced: yes and no within 40 to 60 % for each kind of question, and no answer rules the others."""
    rng = np.random.default_rng(3)
    answers = defaultdict(Counter)
    for scene in scenes:
        for task in sorted(set(tasks.TASKS) - {"caption", "detect", "segment"}):
            for _ in range(16 if task == "relation" else 4):  # it is counted in four parts
                if (example := tasks.ask(task, scene, rng)) is not None:
                    answers[task][example[1]] += 1
                    if task == "relation":
                        answers[re.search("left|right|above|below", example[0])[0]][example[1]] += 1
    for task in ("exists", "relation", "size", "left", "right", "above", "below"):
        assert 0.4 < answers[task]["yes"] / answers[task].total() < 0.6, task
    for task, most in [("count", 0.4), ("color", 0.2), ("shape", 0.25), ("what", 0.3), ("where", 0.2), ("side", 0.35)]:
        assert max(answers[task].values()) < most * answers[task].total(), task
    assert answers["what"]["nothing"] > 0.2 * answers["what"].total()


def test_sample_follows_the_weights(scenes):
    rng = np.random.default_rng(4)
    firsts = Counter(tasks.sample(scenes[i % 200], rng, codes_of)[0].split()[0] for i in range(2000))
    total = sum(tasks.WEIGHTS.values())
    for task in ("detect", "segment"):
        assert abs(firsts[task] / 2000 - tasks.WEIGHTS[task] / total) < 0.05
    assert all(tasks.sample(scene, rng)[0].split()[0] != "segment" for scene in scenes)


def test_texts_are_plain(scenes):
    """Lower-case ASCII, and what is read is three to six characters that cannot be confused."""
    rng = np.random.default_rng(5)
    for i, scene in enumerate(scenes):
        text = "".join(tasks.sample(scene, rng, codes_of))
        assert text.isascii() and text == text.lower()
        image, text = world.draw_text(i)
        assert image.shape == (SIDE, SIDE, 3) and image.dtype == np.uint8
        assert re.fullmatch("[A-HJ-NP-Z2-9]{3,6}", text)
        assert tasks.ocr(text) == ("ocr", text)


def test_work_can_be_sent_to_other_processes():
    for function in (world.draw, world.draw_text, tasks.sample, easy_vqa.synthetic):
        assert pickle.loads(pickle.dumps(function)) is function


def test_easy_vqa_answers_are_right():
    """For each shape and color every answer follows from the words; of those sampled, "yes" is about half."""
    for shape in easy_vqa.SHAPES:
        for color in easy_vqa.COLORS:
            for question, answer in easy_vqa.questions(shape, color):
                words = re.sub(r"[?]", "", question).split()
                if words[0] == "what":
                    assert answer == (color if "color" in words else shape)
                else:
                    there = color in words if set(easy_vqa.COLORS) & set(words) else shape in words
                    assert answer == ("yes" if there != bool({"no", "not"} & set(words)) else "no")
    rng = np.random.default_rng(0)
    answers = Counter(answer for _, answer in easy_vqa.ask("circle", "red", rng, 3000))
    assert 0.4 < answers["yes"] / (answers["yes"] + answers["no"]) < 0.6
    kinds = [re.search(r"(?:a|no) (circle|rectangle|triangle|\w+ shape)", question)[1]
             for question, answer in easy_vqa.ask("circle", "red", rng, 3000) if answer in ("yes", "no")]
    absent = sum(kind not in ("circle", "red shape") for kind in kinds) / len(kinds)
    assert 0.4 < absent < 0.6, "half are after what is not there"
    assert set(kinds) == set(easy_vqa.KINDS)


@pytest.mark.parametrize("seed", range(20))
def test_easy_vqa_pictures_of_our_own(seed):
    """The shape named is the shape seen: its color, its outline and the pastel behind it."""
    picture, asked = easy_vqa.synthetic(seed, "train", 64, 2000)
    answers = dict(asked)
    shape, color = answers["answer en what shape is present?"], answers["answer en what color is the shape?"]
    behind = np.median(picture.reshape(-1, 3), axis=0)
    assert behind.min() >= easy_vqa.DARKEST
    solid = (picture == easy_vqa.COLORS[color]).all(-1)
    ys, xs = np.nonzero(solid)
    filled = solid.sum() / ((np.ptp(ys) + 1) * (np.ptp(xs) + 1))
    assert {"rectangle": 0.99, "circle": 0.6, "triangle": 0.35}[shape] <= filled
    assert filled <= {"rectangle": 1, "circle": 0.9, "triangle": 0.65}[shape]
    assert (np.abs(picture - behind).sum(-1) > 0).sum() < 1300


def test_easy_vqa_augmentation_keeps_the_shape():
    """Mirrored and moved on another pastel, a triangle keeps its color, its area and its tip on top."""
    rng = np.random.default_rng(0)
    before = easy_vqa.paint("triangle", "teal", (250, 240, 231), (20, 30, 60, 65))
    area = (before == easy_vqa.COLORS["teal"]).all(-1).sum()
    places = set()
    for _ in range(20):
        after = easy_vqa.augment(before, rng)
        solid = (np.abs(after.astype(int) - easy_vqa.COLORS["teal"]) <= 1).all(-1)
        assert solid.sum() == area
        widths = [row.sum() for row in solid if row.any()]
        assert widths == sorted(widths)
        assert np.median(after.reshape(-1, 3), axis=0).min() >= easy_vqa.DARKEST
        places.add(tuple(np.argwhere(solid).min(0)))
    assert len(places) > 10
    assert (before == easy_vqa.paint("triangle", "teal", (250, 240, 231), (20, 30, 60, 65))).all()


def test_easy_vqa_questions_are_those_of_the_set():
    """All 107 questions of the published set, with its answers where the picture's shape and color are known."""
    pytest.importorskip("easy_vqa")
    pictures, asked = easy_vqa.load("test")
    assert pictures.shape == (1000, 64, 64, 3) and sum(map(len, asked)) == 9673
    published = {prefix for pairs in asked for prefix, _ in pairs}
    ours = {
        easy_vqa.example(*pair)[0]
        for s in easy_vqa.SHAPES
        for c in easy_vqa.COLORS
        for pair in easy_vqa.questions(s, c)
    }
    assert published == ours and len(ours) == 107
    for pairs in asked:
        answers = {answer for _, answer in pairs}
        for shape in answers & set(easy_vqa.SHAPES):
            for color in answers & set(easy_vqa.COLORS):
                assert set(pairs) <= {easy_vqa.example(*pair) for pair in easy_vqa.questions(shape, color)}


def test_easy_vqa_training_example(monkeypatch):
    """A picture of the set comes augmented and enlarged, with the questions that were asked about it."""
    pictures = np.stack([easy_vqa.paint(s, "blue", (240, 240, 240), (9, 9, 40, 40)) for s in easy_vqa.SHAPES])
    monkeypatch.setattr(easy_vqa, "load", {"train": (pictures, ["about 0", "about 1", "about 2"])}.get)
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(30):
        picture, asked = easy_vqa.train_example(rng, 112)
        assert picture.shape == (112, 112, 3) and picture.dtype == np.uint8
        ys, xs = np.nonzero(np.abs(picture - np.array([0.0, 0.0, 255.0])).sum(-1) < 60)
        filled = len(ys) / ((np.ptp(ys) + 1) * (np.ptp(xs) + 1))
        assert asked == f"about {0 if 0.7 < filled < 0.9 else 1 if filled > 0.9 else 2}"
        seen.add(asked)
    assert len(seen) == 3


def test_easy_vqa_is_asked_for_by_name(monkeypatch):
    """Without the package the message says what to install."""
    monkeypatch.setitem(sys.modules, "easy_vqa", None)
    with pytest.raises(InputError, match="pip install easy-vqa"):
        easy_vqa.load.__wrapped__("train")
