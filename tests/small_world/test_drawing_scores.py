"""The table about drawings: a model that is always right has everything, others what they earn."""
from types import SimpleNamespace

import numpy as np
import pytest
from galleries import small_gallery

from minipali.errors import InputError
from minipali.small_world import artwork, drawing_scores, drawing_tasks
from minipali.small_world.drawings import draw

GALLERY = small_gallery()


class Model:
    """Nothing but a name that `answers`, replaced below, can be asked with."""


@pytest.mark.parametrize("things", [(1,), (2, 3, 4), (3,)])
def test_scenes_have_the_wanted_number_of_things(things):
    scenes = drawing_scores.drawn_scenes(GALLERY, 12, things)
    assert len(scenes) == 12
    assert {len(scene.things) for scene in scenes} == set(things)
    first = next(number for number in range(100) if np.array_equal(
        draw(number, GALLERY, "test", most=max(things)).image, scenes[0].image))
    assert all(len(draw(number, GALLERY, "test", most=max(things)).things) not in things for number in range(first))


def test_common_counts_repetitions():
    assert drawing_scores.common(["a", "a", "b"], ["a", "a", "a", "c"]) == 2
    assert drawing_scores.common(["a", "a", "a", "c"], ["a", "a", "b"]) == 2
    assert drawing_scores.common([], ["a"]) == 0


def test_names_and_places_are_counted_separately():
    [scene] = [scene for scene in drawing_scores.drawn_scenes(GALLERY, 30, (2,))
               if len({t.name for t in scene.things}) == 2][:1]
    one, two = [(thing.name, thing.place) for thing in scene.things]
    right, swapped = drawing_tasks.sentence([one, two]), drawing_tasks.sentence([(two[0], one[1]), (one[0], two[1])])
    assert drawing_scores.count_named([right], [scene]) == (2, 2, 2)
    assert drawing_scores.count_named([swapped], [scene]) == (2, 0, 2)
    assert drawing_scores.count_named([drawing_tasks.sentence([one])], [scene]) == (1, 1, 2)
    assert drawing_scores.count_named(["", right, "nothing"], [scene] * 3) == (2, 2, 6)


def rows(monkeypatch, answer):
    """The table for a model that answers a prompt about a scene with answer(scene, task, right answer)."""
    known, asked = [], {}
    original_scenes, original_examples = drawing_scores.drawn_scenes, drawing_scores.drawn_examples

    def drawn_scenes(*given):
        known.append(original_scenes(*given))
        return known[-1]

    def drawn_examples(scenes, names):
        found = original_examples(scenes, names)
        asked.update({(number, prompt): (task, truth) for number, task, prompt, truth in found})
        return found

    def answers(model, pictures, prompts, note=None):
        scenes = next(scenes for scenes in known if np.array_equal(np.asarray(pictures[0]), scenes[0].image))
        captions = [("caption", drawing_tasks.caption(scene)[1]) for scene in scenes]
        return [answer(scenes[number], *asked.get((number, prompt), captions[number])) for number, prompt in prompts]

    class NoCodec:
        codec = None

        def __init__(self, model):
            pass
    monkeypatch.setattr(drawing_scores, "drawn_scenes", drawn_scenes)
    monkeypatch.setattr(drawing_scores, "drawn_examples", drawn_examples)
    monkeypatch.setattr(drawing_scores, "answers", answers)
    monkeypatch.setattr(drawing_scores, "Shapes", NoCodec)
    return {what: (right, of) for what, right, of in drawing_scores.drawing_rows(Model(), GALLERY, "us", 25)}


def test_who_is_always_right_has_everything(monkeypatch):
    found = rows(monkeypatch, lambda scene, task, truth: truth)
    assert list(found) == ["us, one drawing: names", "us, two to four: names", "us, two to four: names and places",
                           "us: found, IoU >= 0.5", "us: questions"]
    assert all(right == of > 0 for right, of in found.values())
    assert found["us, one drawing: names"] == (25, 25)
    things = sum(len(scene.things) for scene in drawing_scores.drawn_scenes(GALLERY, 25, (2, 3, 4)))
    assert found["us, two to four: names"][1] == found["us: found, IoU >= 0.5"][1] == things


def test_who_says_nothing_has_nothing(monkeypatch):
    assert all(right == 0 < of for right, of in rows(monkeypatch, lambda scene, task, truth: "").values())


def test_who_is_always_one_place_off_has_the_names(monkeypatch):
    def answer(scene, task, truth):
        if task != "caption":
            return ""
        places = [thing.place for thing in scene.things]
        return drawing_tasks.sentence(list(zip([t.name for t in scene.things], [*places[1:], "in the center"])))
    found = rows(monkeypatch, answer)
    assert found["us, two to four: names"][0] == found["us, two to four: names"][1]
    right, of = found["us, two to four: names and places"]
    assert right < of / 2  # some things of one name stand next to one another


def test_failures_are_the_pictures_with_a_wrong_caption(monkeypatch):
    """In order, as many as asked for, over as many batches as it takes; and a line if there are none."""
    wrong, seen = {3, 7, 9, 12, 30}, []

    def answers(model, pictures, prompts, note=None):
        first = len(seen)
        seen.extend(pictures)
        truths = [drawing_tasks.caption(draw(first + number, GALLERY, "test"))[1] for number, _ in prompts]
        return ["a dog" if first + number in wrong else truth for number, truth in enumerate(truths)]
    monkeypatch.setattr(drawing_scores, "answers", answers)
    found = drawing_scores.failures(Model(), GALLERY, 4, tried=8)
    assert len(found) == 4
    for (picture, text), number in zip(found, (3, 7, 9, 12)):
        scene = draw(number, GALLERY, "test")
        assert np.array_equal(np.asarray(picture), scene.image)
        assert text == f"a dog ({drawing_tasks.caption(scene)[1]})"
    wrong.clear()
    seen.clear()
    with pytest.raises(InputError, match="none of 20 captions is wrong"):
        drawing_scores.failures(Model(), GALLERY, 4, tried=1)


def test_retrieval_finds_each_its_own():
    class Pair:
        def logits(self, pictures, captions):
            assert len(set(captions)) == 8 == len(pictures)
            return np.roll(np.eye(8), self.shift, axis=1)
    pair = Pair()
    for pair.shift, right in (0, 16), (1, 0):
        found = list(drawing_scores.drawing_retrieval(pair, GALLERY, "us", 2, 8))
        assert [row[1:] for row in found] == [(right, 16)] * 2


def test_a_vocabulary_that_was_made_for_drawings():
    """Every word of every name has to be one token; with one word less the model is not asked about drawings."""
    words = {word for name in artwork.names().values() for word in name.split()} | {"a"}

    def knowing(words):
        return SimpleNamespace(encode=lambda text: [7 for word in text.split() for _ in range(1 + (word not in words))])
    assert drawing_scores.knows_names(knowing(words))
    assert not drawing_scores.knows_names(knowing(words - {max(words)}))
