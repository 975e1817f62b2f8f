"""What the first stage asks of every patch: the labels against the pictures, the loss against its formula."""
import math

import numpy as np
from galleries import NAMES, PICTURES
from helpers import ROOT, assert_close, seeds
from hypothesis import given
from hypothesis import strategies as st

from minipali.checkpoint import vae_oid
from minipali.model import vq_vae as segmentation
from minipali.small_world import artwork, easy_vqa, tasks, world
from minipali.small_world import patch_labels as patches
from minipali.small_world.drawings import Gallery, PlacedDrawing, draw
from minipali.small_world.stages import MaskCodes

WEIGHTS = ROOT / "weights"
AT = {question: i for i, question in enumerate(patches.QUESTIONS)}


def pieces(picture, rows=7, columns=7):
    """The patches of a picture one by one, in the order of the tower's tokens."""
    height, width = world.SIDE // rows, world.SIDE // columns
    return [picture[y * height:(y + 1) * height, x * width:(x + 1) * width]
            for y in range(rows) for x in range(columns)]


def test_a_patch_belongs_to_what_covers_most_of_it():
    """Two things on every patch: the first covers 4 of its 14 rows, the second the other 10."""
    rows = np.arange(world.SIDE) % 14
    first, second = (np.repeat(on[:, None], world.SIDE, axis=1) for on in (rows < 4, rows >= 4))
    names = list(artwork.names().values())[:2]
    things = [PlacedDrawing(name, "", (0, 0, 98, 98), mask) for name, mask in zip(names, (first, second))]
    for order in (things, things[::-1]):
        assert (patches.labels(order)[:, AT["kind"]] == patches.KINDS.index(names[1])).all()


@given(seeds)
def test_labels_say_what_lies_on_a_patch(seed):
    scene = world.draw(seed)
    found = patches.labels(scene.things)
    assert found.shape == (49, len(patches.QUESTIONS))
    cut = [pieces(thing.mask) for thing in scene.things]
    for patch, row in enumerate(found):
        covered = [np.count_nonzero(mask[patch]) for mask in cut]
        if max(covered) < patches.THING_PIXELS:
            assert row[AT["kind"]] == 0
            assert (row[1:] == patches.UNKNOWN).all()
            continue
        thing = scene.things[int(np.argmax(covered))]
        assert patches.KINDS[row[AT["kind"]]] == thing.shape
        assert list(world.COLORS)[row[AT["color"]]] == thing.color
        assert list(world.SIZES)[row[AT["size"]]] == thing.size
        assert np.abs(row[[AT["x0"], AT["y0"], AT["x1"], AT["y1"]]] - thing.box).max() <= 0.5
        assert (row[AT["code 0"]:] == patches.UNKNOWN).all()


def test_codes_are_those_of_segment():
    """Together as one by one, for each thing its own, and unpickled in another process the file is read again."""
    book = vae_oid.read(WEIGHTS / "vae-oid.npz")
    scenes = [world.draw(number) for number in range(5)]
    for scene, (picture, found) in zip(scenes, patches.scene_examples(scenes, MaskCodes(WEIGHTS / "vae-oid.npz"))):
        assert picture is scene.image
        plain = patches.labels(scene.things)
        codes = slice(AT["code 0"], AT["code 15"] + 1)
        assert np.array_equal(np.delete(found, codes, axis=1), np.delete(plain, codes, axis=1))
        for thing in scene.things:
            expected = segmentation.encode(tasks.mask_crop(thing.mask, thing.box)[None], book)[0]
            assert tasks.rounded(thing.box) != thing.box
            of_thing = (found[:, AT["x0"]:AT["y1"] + 1] == tasks.rounded(thing.box)).all(1)
            assert of_thing.any()
            assert (found[of_thing, codes] == expected).all()
        assert (found[found[:, 0] == 0, codes] == patches.UNKNOWN).all()


@given(seeds)
def test_labels_name_drawings(seed):
    """A drawing has a name and a box, but neither color nor size, and its name is not a shape's."""
    gallery = Gallery(PICTURES, dict(zip(NAMES, artwork.names().values())), ("light", "dark"))
    scene = draw(seed, gallery)
    found = patches.labels(scene.things)
    for thing in scene.things:
        of_thing = found[:, AT["kind"]] == patches.KINDS.index(thing.name)
        assert of_thing.any()
        assert patches.KINDS.index(thing.name) >= 8
        assert (found[of_thing][:, [AT["color"], AT["size"]]] == patches.UNKNOWN).all()
        boxes = [tasks.rounded(other.box) for other in scene.things if other.name == thing.name]
        assert {tuple(row) for row in found[of_thing][:, AT["x0"]:AT["y1"] + 1]} <= set(boxes)
    named = {patches.KINDS[kind] for kind in found[:, AT["kind"]] if kind > 0}
    assert named == {thing.name for thing in scene.things}


@given(seeds)
def test_letters_lie_where_they_are_written(seed):
    """The picture and text of `draw_text`; letters from left to right in the order of the text, on pixels of ink."""
    picture, text, written = world.lettering(seed)
    again, same = world.draw_text(seed)
    assert text == same
    assert np.array_equal(picture, again)
    numbers = [1 + world.LETTERS.index(letter) for letter in text]
    assert set(np.unique(written)) == {0, *numbers}
    middles = [np.nonzero(written == number)[1].mean() for number in numbers if numbers.count(number) == 1]
    assert middles == sorted(middles)
    found = patches.letter_labels(written)
    assert (found[:, :AT["letter on the left"]] == patches.UNKNOWN).all()
    for half, label in zip(pieces(written, 7, 14), found[:, -2:].reshape(-1)):
        counts = np.bincount(half.reshape(-1), minlength=len(world.LETTERS) + 1)
        counts[0] = patches.INK_PIXELS - 1
        assert counts[label] == counts.max()


@given(seeds)
def test_easy_pictures_show_their_thing(seed):
    """The picture that comes with the questions, and a mask that differs from the rest of the picture in color."""
    picture, thing = easy_vqa.scene(seed, "train", world.SIDE)
    assert np.array_equal(picture, easy_vqa.synthetic(seed, "train", world.SIDE, 2)[0])
    color = np.median(picture[thing.mask], axis=0)
    assert np.abs(color - easy_vqa.COLORS[thing.color]).max() < 40
    ys, xs = np.nonzero(thing.mask)
    assert np.abs(np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) - thing.box).max() < 2.5
    _, found = patches.easy_example(seed)
    of_thing = found[:, 0] > 0
    assert of_thing.any()
    assert {patches.KINDS[i] for i in found[of_thing, 0]} == {thing.shape}
    assert (found[:, AT["size"]] == patches.UNKNOWN).all()


@given(seeds, st.integers(1, 3))
def test_loss_is_the_weighted_mean_of_its_questions(seed, pictures):
    """Question by question and patch by patch, from the formula."""
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((pictures, 5, 4))
    p = {"weight": rng.standard_normal((patches.ANSWERS, 4)), "bias": rng.standard_normal(patches.ANSWERS)}
    wanted = np.stack([rng.integers(-1, answers, (pictures, 5)) for answers, _ in patches.QUESTIONS.values()], axis=-1)
    wanted[..., 3] = patches.UNKNOWN  # a question that nobody asks
    wanted[:, :2, 0] = 0, 5  # of the many kinds, chance hardly ever draws "nothing"
    logits, expected, start = features @ p["weight"].T + p["bias"], 0.0, 0
    for question, (answers, share) in enumerate(patches.QUESTIONS.values()):
        total = weight = 0.0
        for i in np.ndindex(pictures, 5):
            if (truth := wanted[i][question]) >= 0:
                counts = 1 / 3 if (question, truth) == (0, 0) else 1
                scores = logits[i][start:start + answers]
                total += counts * (math.log(np.exp(scores).sum()) - scores[truth])
                weight += counts
        expected += share * total / weight if weight else 0
        start += answers
    assert_close("loss", np.array(patches.loss_of(features, wanted, p)[0]), np.array(expected), "formula")
