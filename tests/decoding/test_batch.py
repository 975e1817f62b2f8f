"""Many questions about many pictures are answered as each alone is, and each picture is encoded once."""
import os
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, DeviceArray, seeds
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from small_models import PATCHES, PROMPTS, write_model

from minipali.checkpoint import vae_oid
from minipali.decoding import batch as answering
from minipali.decoding.batch import answer_all, in_one_prompt
from minipali.decoding.generate import generate
from minipali.decoding.loaded_model import Model, load_model
from minipali.decoding.sampling import Decoding
from minipali.errors import InputError
from minipali.inputs.folder import picture_files
from minipali.inputs.image import open_image
from minipali.model import vq_vae as segmentation
from minipali.outputs import masks
from minipali.outputs.boxes import Detection
from minipali.outputs.masks import Shapes

CODEC = ROOT / "weights" / "vae-oid.npz"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return load_model(write_model(tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Five pictures, each of another size."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(3)
    names = [str(folder / f"{i}.png") for i in range(5)]
    for i, name in enumerate(names):
        Image.fromarray(rng.integers(0, 256, (20 + i, 30 - i, 3), dtype=np.uint8)).save(name)
    return names


# --- which files ------------------------------------------------------------------------------------------------------

def test_picture_files(tmp_path):
    """Files in the order given, whatever they are; of a folder what is named like a picture, a damaged one too."""
    for name in ["b.png", "a.JPG", "c.webp", ".hidden.png", "notes.txt", "report.pdf", "no_ending"]:
        (tmp_path / name).write_bytes(b"not a picture")
    (tmp_path / "folder.png").mkdir()
    inside = [str(tmp_path / name) for name in ["a.JPG", "b.png", "c.webp"]]
    assert picture_files([tmp_path]) == (inside, 3)
    assert picture_files(["z", tmp_path, "a"]) == (["z", *inside, "a"], 3)


def test_folders_without_pictures(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=f"{tmp_path}: a folder without pictures"):
        picture_files([tmp_path])

    def denied(_):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(InputError, match="cannot be read as a folder .Permission denied"):
        picture_files([tmp_path])


# --- several pictures in one prompt -----------------------------------------------------------------------------------

@given(seeds, st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3))
def test_in_one_prompt(seed, rows, tokens, width, count):
    """Row by row: the row's own picture, then the others in their order, token by token."""
    rng = np.random.default_rng(seed)
    features, others = rng.standard_normal((rows, tokens, width)), rng.standard_normal((count, tokens, width))
    found = in_one_prompt(features, others)
    assert found.shape == (rows, (1 + count) * tokens, width)
    for row in range(rows):
        np.testing.assert_array_equal(found[row], np.concatenate([features[row], *others]))
    device = in_one_prompt(DeviceArray(features), DeviceArray(others))
    np.testing.assert_array_equal(device.get(), found)


# --- batches ----------------------------------------------------------------------------------------------------------

def alone(model, path, prompt, others, decoding):
    """One question about one picture, without any of this module's batches."""
    images = [open_image(path), *others]
    features = model.features(images)
    return generate(model, features.reshape(1, -1, features.shape[2]), [prompt], decoding)[0].ids


@pytest.mark.parametrize("other_count", [0, 2])
@pytest.mark.parametrize("tokens", [1, 40, 70, 10**6])
def test_batches_answer_as_single_questions_do(model, paths, monkeypatch, tokens, other_count):
    """However many go through together: the same tokens, in the order of pictures and prompts, each picture read and
    encoded once, and never more tokens at a time than the limit, one prompt excepted."""
    monkeypatch.setattr(answering, "BATCH_TOKENS", tokens)
    prompts, decoding = PROMPTS[:3], Decoding(max_new_tokens=4)
    others = [Image.new("RGB", (9, 9), color) for color in ["red", "green"]][:other_count]
    encoded, batches, original = [], [], Model.features_of
    extra = model.features(others) if others else None
    monkeypatch.setattr(Model, "features_of", lambda *args: (encoded.append(len(args[1])), original(*args))[1])
    monkeypatch.setattr(answering, "generate", lambda *args, **how: (batches.append(args), generate(*args, **how))[1])
    found = list(answer_all(model, paths, prompts, extra, decoding, pytest.fail))
    monkeypatch.undo()

    assert [path for path, *_ in found] == paths and sum(encoded) == len(paths)
    assert [size for _, size, *_ in found] == [(30 - i, 20 + i) for i in range(len(paths))]
    assert all(seconds > 0 for _, _, seconds, _ in found)
    for path, _, _, answers in found:
        assert [answer.ids for answer in answers] == [alone(model, path, ids, others, decoding) for ids in prompts]
    longest = PATCHES * (1 + other_count) + max(map(len, prompts))
    rows = [len(prompts) for _, _, prompts, _ in batches]
    assert all(count == 1 or count * longest <= tokens for count in rows)
    assert sum(rows) == len(paths) * len(prompts)
    assert len(rows) == 1 if tokens > 1000 else len(rows) > 3


def test_only_one_batch_is_read_ahead(model, paths, monkeypatch):
    """The first answers come before the last picture is opened, so a folder may be of any length."""
    monkeypatch.setattr(answering, "BATCH_TOKENS", 2 * (PATCHES + len(PROMPTS[0])))
    opened = []
    monkeypatch.setattr(answering, "open_image", lambda path: (opened.append(path), open_image(path))[1])
    answers = answer_all(model, paths, PROMPTS[:1], None, Decoding(max_new_tokens=1), pytest.fail)
    next(answers)
    answers.close()  # waits for the picture that is being read
    assert opened == paths[:4]


def test_the_next_batch_is_read_while_the_model_works(model, paths, monkeypatch):
    """The model waits here until a picture of the next batch has been opened."""
    monkeypatch.setattr(answering, "BATCH_TOKENS", PATCHES + len(PROMPTS[0]))
    opened, begun = [], []

    def noted(path):
        opened.append(path)
        if path == paths[1]:
            second.set()
        return open_image(path)

    def waiting(*arguments, **options):
        begun.append(second.wait(60))
        return generate(*arguments, **options)
    second = threading.Event()
    monkeypatch.setattr(answering, "open_image", noted)
    monkeypatch.setattr(answering, "generate", waiting)
    found = list(answer_all(model, paths[:3], PROMPTS[:1], None, Decoding(max_new_tokens=1), pytest.fail))
    assert begun == [True] * 3 and opened == paths[:3] == [path for path, *_ in found]


@pytest.mark.parametrize("tokens", [1, 10**6])
def test_what_is_no_picture_is_left_out(model, paths, tmp_path, monkeypatch, tokens):
    """It is told of, and the answers about all the others are the right ones."""
    monkeypatch.setattr(answering, "BATCH_TOKENS", tokens)
    (tmp_path / "broken.png").write_bytes(Path(paths[0]).read_bytes()[:200])
    mixed = [str(tmp_path / "none.png"), paths[3], str(tmp_path / "broken.png"), paths[1]]
    problems, decoding = [], Decoding(max_new_tokens=3)
    found = list(answer_all(model, mixed, PROMPTS[:1], None, decoding, problems.append))
    assert [(path, answers[0].ids) for path, _, _, answers in found] == [
        (path, alone(model, path, PROMPTS[0], [], decoding)) for path in [paths[3], paths[1]]]
    assert [str(problem).split(": ")[0] for problem in problems] == [mixed[0], mixed[2]]
    assert list(answer_all(model, mixed[:1], PROMPTS[:1], None, decoding, problems.append)) == []


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS, PROMPTS[:1] * 2])
def test_draws_follow_from_the_seed_and_the_number(model, paths, tmp_path, monkeypatch, prompts):
    """The same picture over and over: every answer is a draw of its own, no two seeds share one, and the batches have
    no part in it; a file that is no picture keeps its numbers, so the others draw as they did."""
    (tmp_path / "broken.png").write_bytes(b"")

    def drawn(seed, tokens, files):
        monkeypatch.setattr(answering, "BATCH_TOKENS", tokens)
        decoding = Decoding(temperature=9.0, seed=seed, max_new_tokens=6)
        found = answer_all(model, files, prompts, None, decoding, lambda _: None)
        return [tuple(answer.ids) for *_, answers in found for answer in answers]
    same = paths[:1] * 4
    first, next_seed = drawn(0, 1, same), drawn(1, 1, same)
    assert len({*first, *next_seed}) == 8 * len(prompts)
    for tokens in [2 * (PATCHES + 8), 10**6]:
        assert drawn(0, tokens, same) == first
    broken = drawn(0, 10**6, [*same[:1], str(tmp_path / "broken.png"), *same[:2]])
    assert broken == first[:len(prompts)] + first[2 * len(prompts):]
    features = model.features([open_image(paths[0])])
    [alone] = generate(model, features, prompts[:1], Decoding(9.0, seed=0, max_new_tokens=6))
    assert tuple(alone.ids) == first[0]
    assert drawn(None, 1, same) != drawn(None, 1, same)


# --- shapes -----------------------------------------------------------------------------------------------------------

CODES = tuple(range(16))


def found(*boxes, codes=CODES):
    return [Detection("cat", box, codes) for box in boxes]


@pytest.fixture
def beside(tmp_path):
    """A model's folder with the mask VQ-VAE in it; nothing else of it is looked at."""
    shutil.copy(CODEC, tmp_path / "vae-oid.npz")
    return Model(tmp_path, None, None, None, "numpy")


@given(st.tuples(st.integers(0, 39), st.integers(0, 29)), st.integers(1, 40), st.integers(1, 30))
def test_masks_lie_in_their_boxes(corner, width, height):
    """Over the whole picture, 40 wide and 30 high; what the codes say inside the box, and nothing outside."""
    x, y = corner
    box = (x, y, min(40, x + width), min(30, y + height))
    say = []
    whole = (0, 0, 40, 30)
    first, second = Shapes(Model(CODEC.parent, None, None, None, "numpy"), say.append).masks(found(box, whole), 30, 40)
    expected = segmentation.decode(np.array([CODES]), vae_oid.read(CODEC))[0]
    np.testing.assert_array_equal(first, masks.paste(expected, box, 30, 40))
    assert first.shape == (30, 40) and first.dtype == bool and second.any() and not second.all()
    first[box[1]:box[3], box[0]:box[2]] = False
    assert not first.any() and say == []


def test_codes_that_are_not_in_the_book(beside):
    """128 codes can be said and this book has 16: such a box stays without a mask, and so do boxes without codes."""
    beyond = Detection("dog", (1, 2, 3, 4), (*CODES[:15], 127))
    masks = Shapes(beside, pytest.fail).masks([beyond, *found((0, 0, 9, 9)), Detection("owl", (1, 2, 3, 4))], 10, 10)
    assert masks[0] is None and masks[1].any() and masks[2] is None


def test_no_codec_beside_the_model(tmp_path):
    """Said once and only when it is missed; the shipped one would draw another model's codes as other shapes."""
    said = []
    shapes = Shapes(Model(tmp_path, None, None, None, "numpy"), said.append)
    assert shapes.masks([Detection("cat", (0, 0, 5, 5))], 10, 10) == [None] and said == []
    assert shapes.masks(found((0, 0, 5, 5), (1, 1, 5, 5)), 10, 10) == [None, None]
    assert shapes.masks(found((0, 0, 5, 5)), 10, 10) == [None]
    [line] = said
    assert line.startswith(f"{tmp_path / 'vae-oid.npz'}: no such file")


def test_the_codec_is_read_once_and_only_for_codes(beside, monkeypatch):
    """Beside an .npz it lies in the same folder. A damaged one is refused, but not before there are codes."""
    reads, original = [], vae_oid.read
    monkeypatch.setattr(vae_oid, "read", lambda path: (reads.append(path), original(path))[1])
    shapes = Shapes(replace(beside, path=beside.path / "model.npz"), pytest.fail)
    assert shapes.masks([Detection("cat", (0, 0, 5, 5))], 10, 10) == [None] and reads == []
    for _ in range(2):
        assert all(mask.any() for mask in shapes.masks(found((0, 0, 5, 5), (0, 0, 9, 9)), 10, 10))
    assert reads == [beside.path / "vae-oid.npz"]
    (beside.path / "vae-oid.npz").write_bytes(b"damaged")
    with pytest.raises(InputError, match="vae-oid.npz: not a readable"):
        Shapes(beside, pytest.fail).masks(found((0, 0, 5, 5)), 10, 10)
