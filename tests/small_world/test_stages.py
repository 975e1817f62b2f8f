"""What the stages' batches hold, and their gradients."""
import math

import numpy as np
import pytest
from galleries import NAMES, small_gallery
from helpers import assert_close, seeds
from hypothesis import given
from hypothesis import strategies as st
from small_stages import config, prefix_lm, tokenizer

from minipali.checkpoint.tensors import flatten, unflatten
from minipali.errors import InputError
from minipali.inputs.image import Preprocessor
from minipali.learning.initialize import (
    random_params,
)
from minipali.learning.loop import Schedule, train
from minipali.small_world import drawing_tasks, drawings, easy_vqa, stages, tasks, world
from minipali.small_world.stages import PrefixLM, WordTokenizer, scaled


@given(seeds, st.integers(1, 5))
def test_batches_ask_for_the_answers_alone(seed, pictures):
    """Weights sum to 1 over all groups, lie on suffix and EOS, never on prompt, padding or picture; texts come back."""
    stage = prefix_lm(pictures, seed=seed)
    batch = stage.batch(seed % 97)
    t, total, asked = tokenizer(), 0.0, 0
    newline = t.id_of("\n")
    assert batch["pixels"].shape == (pictures, world.SIDE, world.SIDE, 3)
    assert batch["pixels"].dtype == np.uint8
    for group in batch["groups"]:
        total += group["weights"].sum(dtype=np.float64)
        asked += len(group["ids"])
        assert group["lengths"].max() == group["ids"].shape[1]
        assert group["weights"].shape == group["ids"].shape
        for ids, weights, length, prefix_len, picture in zip(*(group[name] for name in (
                "ids", "weights", "lengths", "prefix_len", "picture"))):
            start = prefix_len - stage.cfg.vision_config.num_patches
            assert ids[0] == t.bos_id
            assert ids[start - 1] == newline
            assert ids[length - 1] == t.eos_id
            assert (ids[length:] == t.pad_id).all()
            assert np.count_nonzero(ids[:length] == t.eos_id) == 1
            assert (weights[:start] == 0).all()
            assert (weights[length:] == 0).all()
            assert (weights[start:length] == weights[start]).all()
            # n words share a weight that grows as √n.
            assert weights[start] * math.sqrt(length - start) == pytest.approx(group["weights"].max() * math.sqrt(
                min(n for n, w in zip(group["lengths"] - group["prefix_len"] + 4, group["weights"].max(1))
                    if w == group["weights"].max())), rel=1e-5)
            assert 0 <= picture < pictures
            prompt = t.decode(ids[1:start - 1].tolist())
            assert prompt == "ocr" or prompt.split()[0] in ("caption", "answer", "detect"), prompt
    assert total == pytest.approx(1, abs=1e-6)
    assert asked == stage.examples(batch)


def test_batches_follow_from_seed_and_step():
    a, b, c = (flatten({"groups": prefix_lm(seed=1).batch(step)["groups"]}) for step in (5, 5, 6))
    assert all(np.array_equal(x, b[name]) for name, x in a.items())
    assert any(x.shape != c[name].shape or not np.array_equal(x, c[name]) for name, x in a.items())


def test_what_is_drawn_from_follows_from_the_seed(monkeypatch):
    """The order of the sources, as often as their shares say; another one for each seed and each batch."""
    asked = []

    def example(self, source, rng, name):
        asked.append(source)
        return np.zeros((2, 2, 3), np.uint8), [("ocr", "A")]
    monkeypatch.setattr(PrefixLM, "example", example)

    def order(seed, number):
        asked.clear()
        prefix_lm(200, {"world": (0.75, 1), "text": (0.25, 1)}, seed).batch(number)
        return tuple(asked)
    orders = {(seed, number): order(seed, number) for seed in (1, 2) for number in (3, 4)}
    assert len(set(orders.values())) == 4
    assert orders[1, 3] == order(1, 3)
    assert all(120 < found.count("world") < 180 for found in orders.values())


def test_sources_give_as_many_prompts_as_they_should():
    """A scene is always asked for its caption; the picture that goes with the prompts is the one they were made for."""
    stage = prefix_lm(sources={"world": (1.0, 3)})
    picture, pairs = stage.example("world", np.random.default_rng(0), (0, 2, 5, 1))
    scene = world.draw((0, 2, 5, 1))
    assert np.array_equal(picture, scene.image)
    assert len(pairs) == 3
    assert pairs[0] == tasks.caption(scene, None)
    picture, [(prefix, suffix)] = prefix_lm().example("text", np.random.default_rng(0), (0, 1))
    assert (prefix, suffix) == ("ocr", world.draw_text((0, 1))[1])
    picture, pairs = prefix_lm().example("easy_vqa_like", np.random.default_rng(0), (0, 1))
    assert picture.shape == (world.SIDE, world.SIDE, 3)
    assert len(pairs) == 2


def test_drawings_are_asked_about_what_they_show(monkeypatch):
    """The caption first; the picture is that of the prompts, by the artists that the stage is given."""
    monkeypatch.setattr(drawings, "gallery", lambda artists, cache: {("noto", "firefox"): small_gallery()}[artists])
    stage = PrefixLM(config(), WordTokenizer(tokenizer()), 0, 3, {"drawings": (1.0, 3)}, codes_of=lambda mask: [0] * 16,
                     artists=("noto", "firefox"))
    assert stage.identity()["artists"] == ("noto", "firefox")
    for number in range(5):
        scene = drawings.draw((0, number), small_gallery())
        picture, pairs = stage.example("drawings", np.random.default_rng(number), (0, number))
        assert np.array_equal(picture, scene.image)
        assert pairs[0] == drawing_tasks.caption(scene)
        assert len(pairs) == 3
    batch = stage.batch(0)
    assert batch["pixels"].shape == (3, world.SIDE, world.SIDE, 3)
    assert stage.examples(batch) == 9


@given(seeds)
def test_word_tokenizer_is_the_tokenizer(seed):
    """For whatever the tasks say, and again from memory."""
    words, rng = WordTokenizer(tokenizer()), np.random.default_rng(seed)
    texts = ["a  b ", " ", "", "\n"]
    for number in range(2):
        scene = world.draw((seed, number))
        for _, prefix, suffix in tasks.examples(scene, rng, lambda mask: rng.integers(0, 128, 16).tolist()):
            texts += [prefix + "\n", suffix]
        drawn = drawings.draw((seed, number), small_gallery())
        for _ in range(9):
            prefix, suffix = drawing_tasks.sample(drawn, rng, list(NAMES.values()), lambda mask: [7] * 16)
            texts += [prefix + "\n", suffix]
        for prefix, suffix in [tasks.ocr(world.draw_text((seed, number))[1]),
                               *easy_vqa.synthetic((seed, number), "train", 64, 3)[1]]:
            texts += [prefix + "\n", suffix]
    for text in texts * 2:
        assert words.encode(text) == tokenizer().encode(text), text
    assert words.eos_id == tokenizer().eos_id


def test_pixels_are_those_of_inference():
    """A picture of the model's size, scaled for training, is what the preprocessor makes of it, bit for bit."""
    from PIL import Image
    noise = np.random.default_rng(0).integers(0, 256, (2, world.SIDE, world.SIDE, 3), dtype=np.uint8)
    noise[1].flat[:256] = np.arange(256)
    expected = [Preprocessor(world.SIDE)(Image.fromarray(picture)) for picture in noise]
    ours = scaled(noise)
    assert ours.dtype == np.float32
    assert np.array_equal(ours, np.stack(expected))


def derivative(loss, params, grads, rng):
    """Along a direction that the gradient does not ignore: (from the gradient, from central differences)."""
    grads, params = flatten(grads), flatten(params)
    assert set(grads) == set(params)
    norm = math.sqrt(sum((g * g).sum() for g in grads.values()))
    random = {name: rng.standard_normal(x.shape) / math.sqrt(x.size * len(params)) for name, x in params.items()}
    direction = {name: g / norm + random[name] for name, g in grads.items()}
    h = 1e-6
    ends = [loss(unflatten({name: x + side * direction[name] for name, x in params.items()})) for side in (h, -h)]
    return np.array(sum((grads[name] * direction[name]).sum() for name in grads)), (ends[0] - ends[1]) / (2 * h)


def test_prefix_lm_gradient_is_the_slope():
    rng = np.random.default_rng(0)
    stage = prefix_lm(2, {"world": (1.0, 2)})
    params, batch = random_params(stage.cfg, rng, np.float64), stage.batch(0)
    _, grads = stage.loss_and_gradient(params, batch)
    ours, slope = derivative(lambda p: stage.loss_and_gradient(p, batch)[0], params, grads, rng)
    assert_close("slope", ours, slope, "gradient")


def test_groups_change_nothing():
    """Rows in two groups around one pass of the tower: loss and gradients of each row with a picture of its own."""
    stage = prefix_lm(3)
    params, batch = random_params(stage.cfg, np.random.default_rng(1), np.float64), stage.batch(2)
    loss, grads = stage.loss_and_gradient(params, batch)
    assert loss.dtype == np.float64
    total, expected = 0.0, None
    for group in batch["groups"]:
        for i, picture in enumerate(group["picture"]):
            n = group["lengths"][i]
            alone = {"pixels": batch["pixels"][picture:picture + 1],
                     "groups": [{name: x[i:i + 1, :n] if x.ndim > 1 else x[i:i + 1] for name, x in group.items()}]}
            alone["groups"][0]["picture"] = np.array([0])
            part, more = stage.loss_and_gradient(params, alone)
            total, expected = total + part, more if expected is None else stages.add_trees(expected, more)
    assert_close("loss", loss, total, "reordered")
    expected = flatten(expected)
    for name, x in flatten(grads).items():
        scale = np.abs(expected[name.replace("k_proj.bias", "k_proj.weight")]).max()  # a key's bias has no effect
        assert_close(name, x, expected[name], "reordered", scale)


def test_a_prefix_lm_run_goes_on(tmp_path):
    """Its sources are tuples, and lists once they have been in a file: still the same run."""
    stage = prefix_lm(2, {"world": (1.0, 1)})
    params = random_params(stage.cfg, np.random.default_rng(0))
    schedule, how = Schedule(1, rate=0.01, warmup=1), {"workers": 0, "report": lambda *_: None}
    first, again = (flatten(train(stage, params, schedule, tmp_path / "state", **how)) for _ in range(2))
    assert all(np.array_equal(x, again[name]) for name, x in first.items())
    assert all(x.dtype == np.float32 for x in first.values())
    other = prefix_lm(2, {"world": (1.0, 2)})
    with pytest.raises(InputError, match="another sources"):
        train(other, params, schedule, tmp_path / "state", **how)
