"""The contrastive pair and the yardsticks: captions, batches, zero-shot answers, and how the results are counted."""
import itertools
import json
import math
import re
import subprocess
import sys
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
from galleries import NAMES, small_gallery
from helpers import ROOT, assert_close, seeds
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from minipali.checkpoint.config import (
    SiglipConfig,
    SiglipTextConfig,
    VisionConfig,
    parse_config,
)
from minipali.checkpoint.hub import save
from minipali.checkpoint.tensors import flatten, unflatten
from minipali.commands import evaluate, zero_shot
from minipali.decoding.generate import Answer
from minipali.decoding.pair import Pair, load_pair
from minipali.errors import InputError
from minipali.inputs.captions import canonical, caption_ids
from minipali.inputs.tokenizer import Tokenizer
from minipali.learning.initialize import random_params
from minipali.model import losses, siglip
from minipali.outputs.boxes import Detection, parse, to_text
from minipali.outputs.masks import Shapes
from minipali.outputs.sheets import similarity_picture
from minipali.small_world import artwork, drawings, scores, tasks, vocabulary, world
from minipali.small_world import patch_labels as patches
from minipali.small_world.drawing_tasks import article, sentence
from minipali.small_world.drawing_tasks import caption as drawing_caption
from minipali.small_world.recipe import PREPROCESSOR, SIGLIP, patch_head, write_pair
from minipali.small_world.stages import Contrastive, MaskCodes, WordTokenizer, scaled


@cache
def tokenizer():
    return Tokenizer.from_file(ROOT / "weights" / "tokenizer.json")


@cache
def new_tokenizer():
    """With the names of the drawings; the one that ships may be older."""
    return Tokenizer(vocabulary.train())


CONFIG = SiglipConfig(
    vision_config=VisionConfig(hidden_size=6, intermediate_size=7, num_hidden_layers=1, num_attention_heads=2,
                               image_size=world.SIDE, patch_size=14, num_channels=3, layer_norm_eps=0.01,
                               vision_use_head=True),
    text_config=SiglipTextConfig(vocab_size=2048, hidden_size=4, intermediate_size=5, num_hidden_layers=1,
                                 num_attention_heads=2, max_position_embeddings=40, layer_norm_eps=0.01,
                                 projection_size=6, pad_token_id=0))


def stage(pictures=6, seed=0):
    return Contrastive(CONFIG, WordTokenizer(tokenizer()), seed, pictures)


# --- captions and batches ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, expected", [
    ("A Red,  circle!", "a red circle"), ("a red circle", "a red circle"), (" It's\n30% - off\t", "its 30 off"),
    ("...", ""), ("", ""), ("Über (straße)", "über straße")])
def test_canonical(text, expected):
    assert canonical(text) == expected
    assert canonical(expected) == expected


def test_captions_are_padded_to_the_full_length():
    """Tokens, EOS, padding; a long caption is cut so that EOS is still its end."""
    t, cfg = tokenizer(), SimpleNamespace(max_position_embeddings=9, pad_token_id=7)
    ids = caption_ids(["A red circle.", "", "circle " * 50], t, cfg)
    assert ids.shape == (3, 9)
    words = t.encode("a red circle")
    assert ids[0].tolist() == [*words, t.eos_id, *[7] * (8 - len(words))]
    assert ids[1].tolist() == [t.eos_id, *[7] * 8]
    assert ids[2].tolist() == [*t.encode("circle " * 50)[:8], t.eos_id]
    assert t.bos_id not in ids


@given(seeds)
def test_no_two_captions_of_a_batch_are_alike(seed):
    """As the ids that the tower sees; and each belongs to the picture in its row."""
    batch = stage(6, seed).batch(seed % 91)
    assert len(np.unique(batch["ids"], axis=0)) == len(batch["pixels"]) == 6
    scenes = tasks.distinct(lambda number: world.draw((seed, 1, seed % 91, number)), 6)
    for picture, row, (caption, scene) in zip(batch["pixels"], batch["ids"], scenes.items()):
        assert np.array_equal(picture, scene.image)
        assert tokenizer().decode(row[:row.tolist().index(1)].tolist()) == canonical(caption)


def test_the_longest_caption_fits():
    """Four things of the most tokens: a cut caption would leave pictures that cannot be told apart.

    With the drawings' names and the vocabulary that is learned with them.
    """
    words = WordTokenizer(tokenizer())
    thing = max((SimpleNamespace(size=size, color=color, shape=shape, place=place) for size, color, shape, place in
                 itertools.product(world.SIZES, world.COLORS, world.SHAPES, world.PLACES)),
                key=lambda thing: len(words.encode(" ".join(vars(thing).values()))))
    _, text = tasks.caption(SimpleNamespace(things=[thing] * 4), None)
    length = SIGLIP["text_config"]["max_position_embeddings"]
    assert len(tokenizer().encode(canonical(text))) < length
    assert CONFIG.text_config.max_position_embeddings == length
    new = new_tokenizer()
    longest = max(artwork.names().values(), key=lambda name: len(new.encode(article(name))))
    text = sentence([(longest, place) for place in ("at the bottom left",) * 4])
    assert len(new.encode(canonical(text))) < length


def test_distinct_keeps_the_first_of_each_caption():
    star = {"size": "small", "shape": "star", "place": "at the top"}
    drawn = [SimpleNamespace(number=i, things=[SimpleNamespace(color=color, **star)])
             for i, color in enumerate(["red", "red", "teal", "red"])]
    scenes = tasks.distinct(drawn.__getitem__, 2)
    assert [scene.number for scene in scenes.values()] == [0, 2]
    assert list(scenes) == ["a small red star at the top", "a small teal star at the top"]


@pytest.mark.parametrize("drawn", [{}, {"drawn": 3, "captioned": 2, "wrong": 1}])
def test_contrastive_gradient_is_the_slope(drawn, monkeypatch):
    """All of it: both towers, the pooling head, temperature and bias; captions for some pictures, patches for all; and
    captions that belong to no picture."""
    monkeypatch.setattr(drawings, "gallery", lambda artists, cache: small_gallery())
    monkeypatch.setattr(patches, "KINDS", (*patches.KINDS[:8], *NAMES.values()))
    rng, paired = np.random.default_rng(0), 5 if drawn else 3
    one = Contrastive(CONFIG, WordTokenizer(tokenizer()), 0, 3, **drawn, easy=1, text=1,
                      codes_of=MaskCodes(ROOT / "weights" / "vae-oid.npz"))
    head = {name: x.astype(np.float64) for name, x in patch_head(6, rng).items()}
    params, batch = {**random_params(CONFIG, rng, np.float64), "patch_head": head}, one.batch(0)
    loss, grads = one.loss_and_gradient(params, batch)
    flat, grads = flatten(params), flatten(grads)
    assert set(grads) == set(flat)
    assert one.examples(batch) == (8 if drawn else 5)
    assert len(batch["ids"]) == (6 if drawn else 3)

    def value(flat):
        p = unflatten(flat)
        pixels = scaled(batch["pixels"]).astype(np.float64)
        images = siglip.encode_image(pixels[:paired], p, CONFIG)
        texts = siglip.encode_text(batch["ids"], p, CONFIG)
        tokens = siglip.vision_tower(pixels, p["vision_model"], CONFIG.vision_config)
        return losses.siglip_loss(images, texts, p["logit_scale"], p["logit_bias"]) + patches.loss_of(
            tokens, batch["labels"], p["patch_head"])[0]
    assert_close("loss", loss, value(flat), "formula")
    for part in ("vision_model", "text_model", "logit", "patch_head"):
        names = [name for name in flat if name.startswith(part)]
        norm = math.sqrt(sum((grads[name] ** 2).sum() for name in names))
        h, ends = 1e-6, []
        direction = {name: grads[name] / norm + rng.standard_normal(flat[name].shape) / math.sqrt(
            flat[name].size * len(names)) for name in names}
        for side in (h, -h):
            ends.append(value({**flat, **{name: flat[name] + side * direction[name] for name in names}}))
        ours = np.array(sum((grads[name] * direction[name]).sum() for name in names))
        assert_close(part, ours, (ends[0] - ends[1]) / (2 * h), "gradient")


def test_batches_with_drawings_have_their_captions_and_wrong_ones(monkeypatch):
    """Shapes, then drawings, then the wrong captions: row by row those of the pictures, no two alike."""
    monkeypatch.setattr(drawings, "gallery", lambda artists, cache: {("noto",): small_gallery()}[artists])
    monkeypatch.setattr(patches, "KINDS", (*patches.KINDS[:8], *NAMES.values()))
    one = Contrastive(CONFIG, WordTokenizer(new_tokenizer()), 0, 2, drawn=4, captioned=3, wrong=3, easy=1, text=1,
                      artists=("noto",))
    for number in range(5):
        batch = one.batch(number)
        scenes = list(tasks.distinct(lambda i: drawings.draw((0, 1, number, i), small_gallery()), 4,  # noqa: B023
                                     drawing_caption).items())
        assert len(batch["pixels"]) == len(batch["labels"]) == one.examples(batch) == 8
        texts = [new_tokenizer().decode(row[:row.tolist().index(1)].tolist()) for row in batch["ids"]]
        assert len(set(texts)) == len(texts) > 5
        for (_, scene), picture, labels in zip(scenes, batch["pixels"][2:], batch["labels"][2:]):
            assert np.array_equal(picture, scene.image)
            assert np.array_equal(labels, patches.labels(scene.things))
        assert texts[2:5] == [canonical(caption) for caption, _ in scenes[:3]]


# --- zero-shot --------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pair as the training writes it, of the shipped sizes, with the first weights."""
    folder = tmp_path_factory.mktemp("pair")
    write_pair(folder, random_params(parse_config(SIGLIP), np.random.default_rng(0)), ROOT / "weights")
    return folder


def test_pair_answers_with_cosines_and_bias(folder):
    """Row i, column j: picture i, caption j; captions are cleaned before they are read."""
    pair = load_pair(folder)
    pictures, captions = scores.held_out((3,), 3)
    table = pair.logits(pictures, [*captions, "RED!"])
    assert table.shape == (3, 4)
    images, texts = pair.images(pictures), pair.texts([*captions, "red"])
    cosine = images @ texts.T / np.linalg.norm(images, axis=1)[:, None] / np.linalg.norm(texts, axis=1)
    assert_close("table", table, np.exp(pair.params["logit_scale"]) * cosine + pair.params["logit_bias"], "formula")


def test_held_out_pictures_are_no_training_pictures():
    pictures, captions = scores.held_out((0,), 12)
    again, _ = scores.held_out((0,), 12)
    others, _ = scores.held_out((1,), 12)
    trained = {world.draw((0, number)).image.tobytes() for number in range(12)}
    assert len(set(captions)) == len(captions) == len(pictures) == 12
    assert [p.tobytes() for p in pictures] == [p.tobytes() for p in again]
    assert not {p.tobytes() for p in pictures} & (trained | {p.tobytes() for p in others})


def test_zero_shot_prints_the_best_first(folder, tmp_path, monkeypatch, capsys):
    """Each caption with a yes/no probability of its own."""
    Image.new("RGB", (30, 20)).save(tmp_path / "p.png")
    monkeypatch.setattr(Pair, "logits", lambda self, pictures, captions: np.array([[-9.0, 2.0, 0.0]]))
    zero_shot.main([str(tmp_path / "p.png"), "a", "b", "c", "--model", str(folder)])
    assert capsys.readouterr().out == " 88.08%  b\n 50.00%  c\n  0.01%  a\n"


def test_matrix_is_drawn(folder, tmp_path):
    path = tmp_path / "matrix.png"
    zero_shot.main(["--matrix", str(path), "--model", str(folder)])
    with Image.open(path) as picture:
        assert picture.width > 8 * 96
        assert picture.height > 8 * 56


def test_matrix_has_a_dark_cell_where_picture_and_caption_agree():
    """A table that differs from its transpose: pictures are columns, captions are rows."""
    table = np.zeros((2, 2))
    table[0, 1] = 1.0  # picture 0, caption 1: left column, lower row
    sheet = similarity_picture(table, [Image.new("RGB", (9, 9))] * 2, ["x", "y"]).convert("L")
    dark = np.argwhere(np.asarray(sheet.crop((0, 130, sheet.width, 250))) < 60)
    light = np.argwhere(np.asarray(sheet.crop((sheet.width - 124, 130, sheet.width - 24, 250))) < 25)
    assert len(dark) > 2000
    assert dark[:, 0].mean() > 60
    assert not len(light) or light[:, 0].mean() < 70


def test_unusable_input_is_said_in_one_line(folder, tmp_path):
    """No such picture, no captions, no such folder, the other kind of model, a file that cannot be written."""
    Image.new("RGB", (3, 3)).save(tmp_path / "p.png")
    picture, model = str(tmp_path / "p.png"), ["--model", str(folder)]
    empty, other = tmp_path / "empty", tmp_path / "other"
    empty.mkdir()
    tiny = {"model_type": "paligemma", "image_token_index": 9, "vision_config": {
        "hidden_size": 2, "intermediate_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 2,
        "patch_size": 2}, "text_config": {"model_type": "gemma", "hidden_size": 2, "intermediate_size": 2,
        "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2, "vocab_size": 10}}
    save(other, tiny, random_params(parse_config(tiny), np.random.default_rng(0)), "float32")
    for argv, what in [
            ([str(tmp_path / "no.png"), "x", *model], "no.png: no such file"),
            ([picture, *model], "at least one caption"),
            ([*model], "at least one caption"),
            ([picture, "x", "--matrix", "m.png", *model], "--matrix FILE"),
            ([picture, "x", "--model", str(tmp_path / "none")], "no such folder"),
            ([picture, "x", "--model", str(empty)], "found neither"),
            ([picture, "x", "--model", str(other)], "model_type is paligemma, expected siglip"),
            (["--matrix", str(tmp_path / "m.nonsense"), *model], "m.nonsense: not a picture format"),
            (["--matrix", str(tmp_path / "none" / "m.png"), *model], "m.png: cannot be written")]:
        with pytest.raises(InputError, match=what) as error:
            zero_shot.main(argv)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="model_type is siglip, expected paligemma"):
        evaluate.main(model)
    with pytest.raises(InputError, match="at least 0"):
        evaluate.main(["--pictures", "-1"])
    with pytest.raises(InputError, match="s.nonsense: not a picture format"):
        evaluate.main(["--sheet", str(tmp_path / "s.nonsense")])


def test_the_program_exits_with_status_2_and_one_line():
    done = subprocess.run([sys.executable, "-m", "minipali", "zero-shot", "no such picture.png", "x"], cwd=ROOT,
                          capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "minipali zero-shot: error: no such picture.png: no such file\n"


def test_the_pairs_folder_tells_the_hub_how_captions_are_made(folder):
    """EOS behind and no BOS in front, padding on the right: what SiglipProcessor needs to give our ids."""
    spec, about, picture = (json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in (
        "tokenizer", "tokenizer_config", "preprocessor_config"))
    pieces = spec["post_processor"]["single"]
    assert [next(iter(piece)) for piece in pieces] == ["Sequence", "SpecialToken"]
    assert pieces[1]["SpecialToken"]["id"] == about["eos_token"] == "<eos>"
    assert (about["padding_side"], about["model_max_length"]) == ("right", 40)
    assert about["processor_class"] == picture["processor_class"] == "SiglipProcessor"
    assert picture["size"] == PREPROCESSOR["size"]
    assert "image_seq_length" not in picture
    captions = ["a large red circle on the left", "HELLO 42"]
    ours = Tokenizer.from_file(folder / "tokenizer.json")
    assert [ours.encode(text) for text in captions] == [tokenizer().encode(text) for text in captions]


# --- how results are counted ------------------------------------------------------------------------------------------

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
    a, b = (to_text([Detection("", tasks.whole(thing.box), tuple(codes_of(tasks.mask_crop(thing.mask, thing.box))))],
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
