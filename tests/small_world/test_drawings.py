"""Scenes of drawings: what is in them is where they say it is, and looks as it was drawn."""
import itertools
import math

import numpy as np
import pytest
from galleries import COLORS, NAMES, PICTURES, painted, small_gallery
from helpers import seeds
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from minipali.errors import InputError
from minipali.small_world import artwork, drawings
from minipali.small_world.drawings import Drawing, Gallery, draw
from minipali.small_world.world import CELL, PLACES, SIDE, VISIBLE

GALLERY = small_gallery()


@pytest.fixture(scope="module")
def scenes():
    return [draw(seed, GALLERY, "test") for seed in range(150)]


def test_nobody_trains_on_the_test(scenes):
    assert artwork.TEST not in drawings.TRAINED_ON
    assert artwork.VALIDATION not in drawings.TRAINED_ON
    assert set(drawings.TRAINED_ON) < set(artwork.ARTISTS)


def test_a_gallery_has_the_drawings_of_its_artists():
    gallery = Gallery(PICTURES | {("light", "7"): PICTURES["light", "1"]}, NAMES, ("light",))
    assert gallery.names == list(NAMES.values())
    assert all(len(versions) == 1 for _, versions in gallery.by_name)
    assert all(len(versions) == 2 for _, versions in GALLERY.by_name)
    some = Gallery({key: picture for key, picture in PICTURES.items() if key != ("light", "2")}, NAMES, ("light",))
    assert some.names == [name for point, name in NAMES.items() if point != "2"]


@given(seeds)
def test_seed_decides(seed):
    one, same, other = draw(seed, GALLERY), draw(seed, GALLERY), draw(seed, GALLERY, "test")
    assert np.array_equal(one.image, same.image)
    assert [(t.name, t.place, t.box) for t in one.things] == [(t.name, t.place, t.box) for t in same.things]
    assert not np.array_equal(one.image, other.image)


def test_held_out_pictures_are_never_training_pictures(monkeypatch):
    """Not even where nothing else tells the splits apart."""
    for changes in drawings.STRETCH, drawings.HUE, drawings.SATURATION:
        monkeypatch.setitem(changes, "test", changes["train"])
    for seed in range(20):
        assert not np.array_equal(draw(seed, GALLERY).image, draw(seed, GALLERY, "test").image)


@pytest.mark.parametrize("scale", [1.3, 0.8, 0.45])
def test_a_stamp_is_the_drawing_in_its_size(scale):
    """Where it lies, how large it is, and its colors times how opaque it is, half transparent ones too."""
    pixels = painted("wide box", (200, 120, 40))
    pixels[:, 24:, 3] //= 2
    drawing, at, plain = Drawing.of(pixels), np.array([7.3, 20.6]), (np.eye(3, dtype=np.float32), np.float32(0))
    full = Drawing.of(painted("wide box", (0, 0, 0))).corners  # those of the half that can hardly be seen, too
    corner, paint, alpha = drawings._stamp(Drawing(drawing.sizes, full), np.eye(2), full.min(0), scale, at, plain)
    there = np.argwhere(alpha[:, :, 0] > 0.2)[:, ::-1] + corner
    assert np.abs(there.min(0) - at).max() <= 1.1
    assert np.abs(there.max(0) + 1 - (at + (full.max(0) - full.min(0)) * scale)).max() <= 1.1
    middle = alpha.shape[0] // 2
    row, colors = alpha[middle, :, 0], paint[middle]
    assert row[5] == 1 and abs(row[-6] - 0.5) < 0.01
    assert np.abs(colors[5] - (200, 120, 40)).max() <= 1
    assert np.abs(colors[-6] - np.array((200, 120, 40)) * row[-6]).max() <= 1.5


def test_outline_is_that_of_the_drawing():
    """The corners reach exactly as far as what can be seen, and turned they still enclose it."""
    for pixels in PICTURES.values():
        ys, xs = np.nonzero(pixels[:, :, 3] > 127)
        corners = Drawing.of(pixels).corners
        assert corners.min(0).tolist() == [xs.min(), ys.min()]
        assert corners.max(0).tolist() == [xs.max() + 1, ys.max() + 1]
        turn = np.array([(0.8, -0.6), (0.6, 0.8)])
        everything = np.stack([xs + 0.5, ys + 0.5], 1) @ turn.T
        assert ((corners @ turn.T).min(0) < everything.min(0)).all()
        assert ((corners @ turn.T).max(0) > everything.max(0)).all()


def test_boxes_fit_the_masks(scenes):
    for scene in scenes:
        for thing in scene.things:
            ys, xs = np.nonzero(thing.mask)
            x0, y0, x1, y1 = thing.box
            assert x0 <= xs.min() and y0 <= ys.min() and x1 > xs.max() and y1 > ys.max()
            assert 0 <= x0 < x1 <= SIDE and 0 <= y0 < y1 <= SIDE
            assert max(x1 - x0, y1 - y0) >= SIDE / 3
    alone = [scene.things[0] for scene in scenes if len(scene.things) == 1]
    assert len(alone) > 10
    for thing in alone:
        ys, xs = np.nonzero(thing.mask)
        assert thing.box == (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)


def test_places_are_where_the_middles_lie_and_no_place_is_in_doubt(scenes):
    for scene in scenes:
        cells = [PLACES.index(thing.place) for thing in scene.things]
        assert cells == sorted(set(cells))  # reading order, none twice
        for cell, thing in zip(cells, scene.things):
            x0, y0, x1, y1 = thing.box
            x, y = (x0 + x1) / 2 / CELL - cell % 3, (y0 + y1) / 2 / CELL - cell // 3
            assert 0.2 < x < 0.8 and 0.2 < y < 0.8


def test_masks_do_not_overlap_and_show_most_of_each_thing(scenes):
    for scene in scenes:
        assert 1 <= len(scene.things) <= 4
        assert sum(thing.mask.astype(int) for thing in scene.things).max() == 1
        for a, b in itertools.combinations([thing.box for thing in scene.things], 2):
            across, down = (max(0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
            smaller = min((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in (a, b))
            assert across * down <= 0.17 * smaller
        for thing in scene.things:
            x0, y0, x1, y1 = thing.box
            if thing.name == "disc":  # the only one whose area a turn does not change
                assert np.count_nonzero(thing.mask) > 0.9 * VISIBLE * math.pi / 4 * (x1 - x0) * (y1 - y0)


def test_things_have_their_artist_s_colors(scenes):
    """Light and colors change a little: the nearer of two artists' colors is always the one that was used."""
    for scene in scenes:
        for thing in scene.things:
            shade = np.median(scene.image[thing.mask], axis=0)
            assert min(np.abs(np.array(color) - shade).max() for color in COLORS.values()) < 90
    shades = [np.median(scene.image[thing.mask], axis=0) for scene in scenes for thing in scene.things]
    assert 0.3 < np.mean([shade[0] > shade[2] for shade in shades]) < 0.7


def test_what_is_transparent_shows_the_background():
    """A drawing all of whose colors are white, on nothing: where it is not, the picture is as without it."""
    pixels = painted("disc", (255, 255, 255))
    pixels[:, :, :3][pixels[:, :, 3] == 0] = 0  # black, but nobody may see it
    gallery = Gallery({("a", "1"): pixels}, NAMES, ("a",))
    for seed in range(20):
        scene = draw(seed, gallery, "test", most=1)
        ring = np.zeros((SIDE, SIDE), bool)
        x0, y0, x1, y1 = map(int, scene.things[0].box)
        ring[y0:y1, x0:x1] = True
        corner = scene.image[:8, :8].astype(int).mean((0, 1))
        edge = ring & ~scene.things[0].mask
        darkest = min(corner.min(), int(scene.image[~ring].min()), 190)
        assert scene.image[edge].min() >= darkest - 40


@pytest.mark.parametrize("name, mirrors", [("flag", True), ("taxi", False)])
def test_mirrored_only_where_the_thing_allows_it(name, mirrors):
    """The pole of the flag lies on the left, unless the drawing is mirrored."""
    gallery, left = Gallery({("a", "1"): painted("flag", (9, 9, 9))}, {"1": name}, ("a",)), 0
    for seed in range(40):
        [thing] = draw(seed, gallery, "test", most=1).things
        x0, y0, x1, y1 = map(int, thing.box)
        low = thing.mask[(y0 + 2 * y1) // 3:y1]  # below the cloth there is the pole alone
        left += np.nonzero(low)[1].mean() < (x0 + x1) / 2
    assert (8 < left < 32) if mirrors else left == 40


@given(seeds, st.integers(1, 4))
def test_no_more_than_asked_for(seed, most):
    assert len(draw(seed, GALLERY, most=most).things) <= most


def test_pictures_are_varied(scenes):
    numbers = np.bincount([len(scene.things) for scene in scenes], minlength=5)[1:]
    assert (numbers > 20).all()
    assert {thing.place for scene in scenes for thing in scene.things} == set(PLACES)
    assert {thing.name for scene in scenes for thing in scene.things} == set(NAMES.values())
    sides = [max(t.box[2] - t.box[0], t.box[3] - t.box[1]) for scene in scenes for t in scene.things]
    assert min(sides) < 0.38 * SIDE and max(sides) > 0.75 * SIDE
    several = [[thing.name for thing in scene.things] for scene in scenes if len(scene.things) > 1]
    twice = [len(set(named)) < len(named) for named in several]
    assert 0.3 < np.mean(twice) < 0.95


def test_training_pictures_change_more():
    """Held-out drawings keep their proportions up to the turn; those of training are stretched too."""
    gallery = Gallery({("a", "1"): painted("disc", (200, 30, 30))}, NAMES, ("a",))
    shapes = {split: [] for split in ("train", "test")}
    for split, found in shapes.items():
        for seed in range(60):
            [thing] = draw(seed, gallery, split, most=1).things
            x0, y0, x1, y1 = thing.box
            found.append((x1 - x0) / (y1 - y0))
    assert 0.95 < min(shapes["test"]) and max(shapes["test"]) < 1.05
    assert min(shapes["train"]) < 0.9 and max(shapes["train"]) > 1.1


def test_the_command_draws_the_sheet_or_says_why_not(tmp_path, monkeypatch):
    monkeypatch.setattr(drawings, "gallery", lambda artists: GALLERY)
    monkeypatch.setattr(drawings, "held_out_sheet", lambda count, columns, gallery: Image.new("RGB", (count, columns)))
    drawings.main([str(tmp_path / "sheet.png")])
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (36, 6)
    for name, problem in (("sheet.nothing", "not a picture format"), ("no/sheet.png", "cannot be written"),
                          ("", "empty text")):
        with pytest.raises(InputError, match=problem):
            drawings.main([name and str(tmp_path / name)])
