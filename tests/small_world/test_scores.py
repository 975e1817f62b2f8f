"""How results are counted: overlap, objects found, answers in order, retrieval, the table of tasks."""
import itertools
import re
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT, seeds
from hypothesis import given
from hypothesis import strategies as st

from minipali.decoding.generate import Answer
from minipali.decoding.pair import Pair
from minipali.outputs.boxes import Detection, parse, to_text
from minipali.outputs.masks import Shapes
from minipali.small_world import scores, tasks, world
from minipali.small_world.stages import MaskCodes


def test_held_out_pictures_are_no_training_pictures():
    pictures, captions = scores.held_out((0,), 12)
    again, _ = scores.held_out((0,), 12)
    others, _ = scores.held_out((1,), 12)
    trained = {world.draw((0, number)).image.tobytes() for number in range(12)}
    assert len(set(captions)) == len(captions) == len(pictures) == 12
    assert [p.tobytes() for p in pictures] == [p.tobytes() for p in again]
    assert not {p.tobytes() for p in pictures} & (trained | {p.tobytes() for p in others})


boxes = st.tuples(*[st.integers(0, 7)] * 4).map(lambda b: (min(b[0], b[2]), min(b[1], b[3]), max(b[0], b[2]) + 1,
                                                          max(b[1], b[3]) + 1))


@given(boxes, boxes)
def test_overlap_is_shared_area_over_joint_area(a, b):
    """Counted square by square."""
    def squares(box):
        return set(itertools.product(range(box[0], box[2]), range(box[1], box[3])))
    expected = len(squares(a) & squares(b)) / len(squares(a) | squares(b))
    assert scores.overlap(a, b) == expected == scores.overlap(b, a)
    assert scores.overlap(a, a) == 1


def said(*objects):
    return to_text([Detection(label, box) for label, box in objects], world.SIDE, world.SIDE)


@pytest.mark.parametrize("answer, truth, expected", [
    ("", "", (0, 0, 0)),
    ("", said(("star", (10, 10, 40, 40))), (0, 1, 0)),
    (said(("star", (10, 10, 40, 40))), "", (0, 0, 1)),
    (said(("star", (10, 10, 40, 40))), said(("star", (12, 9, 41, 42))), (1, 1, 1)),
    (said(("star", (10, 10, 40, 40))), said(("circle", (10, 10, 40, 40))), (0, 1, 1)),
    (said(("star", (10, 10, 40, 40))), said(("star", (26, 10, 56, 40))), (0, 1, 1)),
    # Said twice, found once; two of them, found once.
    (said(("star", (10, 10, 40, 40)), ("star", (10, 10, 40, 40))), said(("star", (10, 10, 40, 40))), (1, 1, 2)),
    (said(("star", (10, 10, 40, 40))), said(("star", (10, 10, 40, 40)), ("star", (11, 10, 41, 40))), (1, 2, 1)),
    # In another order.
    (said(("star", (10, 10, 40, 40)), ("heart", (60, 60, 90, 90)), ("star", (50, 0, 70, 20))),
     said(("heart", (60, 60, 90, 90)), ("star", (50, 0, 70, 20)), ("star", (10, 10, 40, 40))), (3, 3, 3)),
    # The closest pairs go first: were the second box given the first object, which it also fits, two would be alone.
    (said(("star", (6, 10, 36, 40)), ("star", (19, 10, 49, 40))),
     said(("star", (10, 10, 40, 40)), ("star", (23, 10, 53, 40))), (2, 2, 2)),
    ("no boxes <loc0001>", said(("star", (10, 10, 40, 40))), (0, 1, 0))])
def test_found_objects(answer, truth, expected):
    assert scores.found_objects(answer, truth) == expected


@given(seeds, st.integers(0, 4), st.integers(0, 4))
def test_found_objects_against_all_ways_to_match(seed, first, second):
    """Never more than the best of all ways to pair boxes, never less than half of it, and all of it where every box
    has at most one partner."""
    rng = np.random.default_rng(seed)

    def some(count):
        corners = rng.integers(0, 30, (count, 2))
        return [(rng.choice(["star", "heart"]), (x, y, x + rng.integers(20, 40), y + rng.integers(20, 40)))
                for x, y in corners.tolist()]
    a, b = some(first), some(second)
    hits, there, boxes_said = scores.found_objects(said(*a), said(*b))
    read_a, read_b = (parse(said(*objects), world.SIDE, world.SIDE) for objects in (a, b))
    fits = np.array([[x.label == y.label and scores.overlap(x.box, y.box) >= 0.5 for y in read_b] for x in read_a])
    fits = fits.reshape(first, second)
    small, large = fits if first <= second else fits.T, max(first, second)
    ways = itertools.permutations(range(large), len(small))
    best = max(sum(small[i, j] for i, j in enumerate(way)) for way in ways)
    assert (there, boxes_said) == (second, first)
    assert best / 2 <= hits <= best
    if fits.size and fits.sum(0).max() <= 1 and fits.sum(1).max() <= 1:
        assert hits == fits.sum()


@given(seeds, st.integers(1, 5), st.integers(0, 12), st.integers(1, 5))
def test_answers_come_in_the_order_asked(seed, count, prompts, rows):
    """Each about its own picture, however they were put together; each picture is encoded once."""
    rng, encoded, sizes = np.random.default_rng(seed), [], []

    class Model:
        tokenizer = SimpleNamespace(decode=lambda ids: f"{ids[0]} {ids[1]}")

        def features(self, pictures):
            encoded.extend(pictures)
            return np.array(pictures, np.float64).reshape(-1, 1, 1)

    def fake_generate(model, features, prompts, decoding, logprobs):
        sizes.append(len(prompts))
        return [Answer(ids=[int(x[0, 0]), prompt[0]]) for x, prompt in zip(features, prompts, strict=True)]
    pictures = [100 + i for i in range(count)]
    asked = [(int(rng.integers(count)), f"prompt {rng.integers(4)}") for _ in range(prompts)]
    noted = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "generate", fake_generate)
        patch.setattr(scores, "encode_prompt", lambda text, model: [int(text.split()[1])])
        texts = scores.answers(Model(), pictures, asked, rows, lambda *done: noted.append(done))
    assert texts == [f"{100 + picture} {prompt.split()[1]}" for picture, prompt in asked]
    assert sorted(encoded) == pictures
    assert max(sizes, default=0) <= rows
    assert noted[-1:] == ([(prompts, prompts)] if prompts else [])


def rows(table, monkeypatch, batches=2):
    """What retrieval says about a table of 64 by 64."""
    monkeypatch.setattr(scores, "held_out", lambda seed, count: (seed, count))
    pair = SimpleNamespace(logits=lambda seed, size: table)
    return [(right, of) for _, right, of in scores.retrieval(pair, batches)]


def test_retrieval_counts_rows_and_columns(monkeypatch):
    """All right, all wrong, chance, and a caption that all pictures like best."""
    same = np.eye(64)
    assert rows(same, monkeypatch) == [(128, 128), (128, 128)]
    assert rows(np.roll(same, 1, 0), monkeypatch) == [(0, 128), (0, 128)]
    order = np.random.default_rng(0).permuted(np.arange(64))
    shuffled = sum(order == np.arange(64))
    assert rows(same[order], monkeypatch, 1) == [(shuffled, 64), (shuffled, 64)]
    loved = same.copy()
    loved[:, 0] += 5
    assert rows(loved, monkeypatch) == [(2, 128), (128, 128)]


def test_retrieval_of_a_pair_that_knows_and_of_one_that_guesses():
    """Vectors that are the same for a picture and its caption find one another; random ones do by chance."""
    class Knowing(Pair):
        def images(self, pictures):
            return np.stack([vectors[picture.tobytes()] for picture in pictures])

        def texts(self, captions):
            return np.stack([vectors[caption] for caption in captions])
    rng, vectors = np.random.default_rng(0), {}
    for picture, caption in zip(*scores.held_out((1, 0), 64)):
        vectors[picture.tobytes()] = vectors[caption] = rng.standard_normal(32)
    pair = Knowing(None, {"logit_scale": np.ones(1), "logit_bias": np.ones(1)}, None, None)
    assert [(right, of) for _, right, of in scores.retrieval(pair, 1)] == [(64, 64), (64, 64)]
    vectors.update({name: rng.standard_normal(32) for name in vectors})
    assert all(right <= 6 for _, right, _ in scores.retrieval(pair, 1))


def test_table_of_the_small_world(monkeypatch):
    """A model that is always right scores 100 % in every line (a mask nearly so: codes have no more to say); one that
    says nothing scores 0 of as many."""
    examples, model = {}, SimpleNamespace(path=ROOT / "weights")
    codes_of = MaskCodes(ROOT / "weights" / "vae-oid.npz")
    scenes, texts = scores.scenes_of(4), [world.draw_text(number, "test") for number in range(4)]
    for number, scene in enumerate(scenes):
        for _, prefix, suffix in tasks.examples(scene, np.random.default_rng((7, number)), codes_of):
            examples[number, prefix] = suffix
        examples[number, "ocr"] = texts[number][1]

    def knowing(model, pictures, asked, note):
        shown = [picture for picture, _ in texts] if asked[0][1] == "ocr" else [scene.image for scene in scenes]
        assert all(np.array_equal(picture, image) for picture, image in zip(pictures, shown, strict=True))
        return [examples[question] for question in asked]
    monkeypatch.setattr(scores, "answers", knowing)
    table = list(scores.small_world(model, 4, None))
    asked = {what.strip(): of for what, _, of in table}
    masks = [right for what, right, _ in table if what.startswith("masks")]
    assert table[0] == ("captions exactly right", 4, 4)
    assert [right for what, right, _ in table if not what.startswith("masks")] == [
        of for what, _, of in table if not what.startswith("masks")]
    assert 0.85 * asked["masks, mean IoU"] < masks[0] < asked["masks, mean IoU"]
    assert asked["own questions right"] == sum(asked[task] for task in tasks.QUESTIONS) > 16
    assert asked["texts read exactly right"] == 4
    monkeypatch.setattr(scores, "answers", lambda model, pictures, asked, note: [""] * len(asked))
    silent = list(scores.small_world(model, 4, None))
    assert [of for _, _, of in silent] == [0 if "boxes" in what else of for what, _, of in table]
    assert all(right == 0 for what, right, _ in silent if "detect" not in what)
    assert len(list(scores.small_world(model, 1, None))) == len(table), "tasks that no scene allows have a line too"


def test_mask_overlap_is_that_of_the_thing_named():
    """A full square over its own box, over another's, with codes that are in no book, and nothing."""
    codes_of, shapes = MaskCodes(ROOT / "weights" / "vae-oid.npz"), Shapes(SimpleNamespace(path=ROOT / "weights"))
    scene = next(scene for scene in map(world.draw, range(99)) if len(scene.things) > 1)
    a, b = (to_text([Detection("", tasks.rounded(thing.box), tuple(codes_of(tasks.mask_crop(thing.mask, thing.box))))],
                    world.SIDE, world.SIDE) for thing in scene.things[:2])
    assert scores.mask_overlap(a, a, scene, shapes) > 0.8
    assert scores.mask_overlap(b, b, scene, shapes) > 0.8
    assert scores.mask_overlap(a, b, scene, shapes) < 0.3
    everything = to_text([Detection("", (0, 0, 98, 98), tuple(codes_of(np.ones((64, 64), np.float32))))], 98, 98)
    share = scene.things[0].mask.mean()
    assert share < 0.2
    assert share <= scores.mask_overlap(everything, a, scene, shapes) < 1.3 * share
    assert scores.mask_overlap(re.sub("<seg...>", "<seg099>", a), a, scene, shapes) == 0
    assert scores.mask_overlap(re.sub("<seg...>", "", a), a, scene, shapes) == 0
    assert scores.mask_overlap("", a, scene, shapes) == 0
