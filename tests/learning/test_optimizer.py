"""The optimizer against PyTorch's, and each of its parts against its formula."""
import itertools
import json
import math
from functools import cache

import numpy as np
import pytest
from helpers import GOLDEN_FILES, assert_close, seeds
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from small_stages import Given

from minipali.checkpoint.config import (
    parse_config,
)
from minipali.checkpoint.tensors import flatten, unflatten
from minipali.learning import optimizer
from minipali.learning.backward import paligemma
from minipali.learning.loop import Schedule, train
from minipali.learning.optimizer import (
    adamw,
    clip_factor,
    gradient_norm,
    learning_rate,
    orthogonal,
    pack,
    views,
)


@cache
def golden():
    """adamw.safetensors: its settings, and its tensors by name."""
    with safe_open(GOLDEN_FILES / "adamw.safetensors", "np") as file:
        metadata = file.metadata()
        assert (metadata["format"], metadata["version"]) == ("minipali golden", "1")
        names = file.keys()
        return json.loads(metadata["settings"]), {name: file.get_tensor(name) for name in names}


def test_steps_are_pytorchs(tmp_path):
    """Clipping, warm-up and cosine, decay of matrices alone, AdamW: the weights after each of 20 steps."""
    settings, tensors = golden()
    gradients, weights = ({name.removeprefix(f"steps/{kind}/"): x for name, x in tensors.items()
                           if name.startswith(f"steps/{kind}/")} for kind in ("gradients", "weights"))
    stage = Given(gradients)
    trained = train(stage, unflatten({name: x[0] for name, x in weights.items()}), Schedule(20, shards=1, **settings),
                    tmp_path / "state", workers=0, report=lambda *_: None)
    for name, x in weights.items():
        ours = np.stack([*(seen[name] for seen in stage.seen), flatten(trained)[name]])
        assert_close(name, ours, x, "formula")


class Curve:
    """The golden batches, with the mean over all words of the answers as loss."""
    def __init__(self, cfg, tensors):
        self.cfg, self.tensors = cfg, tensors

    def batch(self, step):
        pixels, ids, lengths, prompts = (self.tensors[f"curve/{name}"][step] for name in (
            "pixels", "ids", "lengths", "prompt_lengths"))
        places = np.arange(ids.shape[1])
        answer = (places >= prompts[:, None]) & (places < lengths[:, None])
        return pixels.astype(np.float64), ids.astype(np.int64), lengths, prompts, answer / answer.sum()

    def examples(self, batch):
        return 2

    def identity(self):
        return {"stage": "curve"}

    def loss_and_gradient(self, p, batch):
        pixels, ids, lengths, prompts, weights = batch
        features, pull_features = paligemma.image_features(pixels, p, self.cfg)
        loss, pull = paligemma.suffix_loss(features, ids, lengths, features.shape[1] + prompts, p, self.cfg, weights)
        dfeatures, grads = pull(1.0)
        return loss, {**pull_features(dfeatures)[1], **grads}


def test_training_curve_is_pytorchs(tmp_path):
    """Ten steps of a small PaliGemma, the same weights and batches: every loss, every gradient's norm."""
    settings, tensors = golden()
    with safe_open(GOLDEN_FILES / "paligemma1.safetensors", "np") as file:
        names = file.keys()
        cfg = parse_config(json.loads(file.metadata()["config"]))
        params = unflatten({name.removeprefix("weights/"): file.get_tensor(name).astype(np.float64)
                            for name in names if name.startswith("weights/")})
    curve = []
    train(Curve(cfg, tensors), params, Schedule(10, shards=1, **settings), tmp_path / "state", workers=0, every=1,
          report=lambda step, steps, loss, norm, *_: curve.append((loss, norm)))
    losses, lengths = np.array(curve).T
    assert_close("losses", losses, tensors["curve/loss"], "golden")
    assert_close("lengths", lengths, tensors["curve/length"], "golden")


@given(seeds, st.integers(1, 30))
def test_adamw_is_the_papers_algorithm(seed, steps):
    """Step by step from the formulas, with the averages as sums over all gradients so far; nothing is replaced."""
    rng = np.random.default_rng(seed)
    gradients, start, decay = rng.standard_normal((steps, 3)), rng.standard_normal(3), np.array([0.3, 0.0, 0.1])
    weights, state = start.copy(), {"first": np.zeros(3), "second": np.zeros(3)}
    view, expected = weights[1:], start.copy()
    for t in range(1, steps + 1):
        adamw(weights, gradients[t - 1], state, t, 0.1, 0.7, 0.8, 1e-3, decay)
        age = t - np.arange(1, t + 1)[:, None]
        mean, square = ((1 - beta) * (beta**age * gradients[:t]**power).sum(0) / (1 - beta**t)
                        for beta, power in ((0.7, 1), (0.8, 2)))
        expected = expected - 0.1 * (mean / (np.sqrt(square) + 1e-3) + decay * expected)
    assert_close("weights", weights, expected, "formula", scale=1 + np.abs(start).max())
    assert np.array_equal(view, weights[1:])


@given(seeds, st.floats(0.01, 100))
def test_clip_shortens_what_is_longer(seed, limit):
    gradient = np.random.default_rng(seed).standard_normal(9)
    norm = gradient_norm([gradient])
    clipped = gradient * clip_factor(norm, limit)
    assert_close("norm", norm, np.linalg.norm(gradient), "formula")
    assert_close("clipped", np.linalg.norm(clipped), min(limit, norm), "formula")
    assert_close("direction", clipped / np.linalg.norm(clipped), gradient / norm, "formula")
    assert clip_factor(gradient_norm([np.zeros(3)]), limit) == 1


@given(seeds, st.lists(st.integers(0, 400), max_size=6).filter(any), st.sampled_from([128, 130, 1000]),
       st.sampled_from([np.float32, np.float64]))
def test_the_norm_is_that_of_one_vector(seed, sizes, piece, dtype):
    """To the last bit, for tensors of any sizes, however many pieces they are added up in; transposed ones too."""
    rng = np.random.default_rng(seed)
    arrays = [rng.standard_normal((2, size)).astype(dtype) for size in sizes]
    vector = np.concatenate([array.reshape(-1) for array in arrays])
    arrays[0] = np.ascontiguousarray(arrays[0].T).T
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "PIECE", piece)
        norm = gradient_norm(arrays)
    assert norm.dtype == dtype
    assert norm.tobytes() == np.sqrt((vector * vector).sum()).tobytes()


def test_long_vectors_are_added_up_as_numpy_does():
    vector = np.random.default_rng(0).standard_normal(3_000_001, np.float32)
    for size in (3_000_001, 2**21, 1_000_003):
        part = vector[:size]
        # Not to the last bit: NumPy 2.0 adds up millions of numbers in another order than later versions.
        assert_close("norm", gradient_norm(np.split(part, [7, 500_000])), np.sqrt((part * part).sum()), "formula")


def test_the_tree_is_views_of_one_vector():
    """What changes the vector changes the tree, and not the tree that it was made from."""
    rng = np.random.default_rng(0)
    params = {"b": {"weight": rng.standard_normal((2, 3)), "bias": rng.standard_normal(2)},
              "a": [{"k": rng.standard_normal(1)}, {"k": rng.standard_normal((1, 2, 2))}]}
    before = {name: x.copy() for name, x in flatten(params).items()}
    vector, tree = pack(params)
    shapes = {name: x.shape for name, x in before.items()}
    assert vector.size == 13
    assert all(np.array_equal(x, before[name]) for name, x in flatten(tree).items())
    assert all(np.shares_memory(x, vector) for x in flatten(tree).values())
    vector *= 2
    assert all(np.array_equal(x, 2 * before[name]) for name, x in flatten(tree).items())
    assert all(np.array_equal(x, before[name]) for name, x in flatten(params).items()), "the input is a copy's source"
    assert list(flatten(views(vector, shapes))) == list(shapes)


@given(seeds, st.integers(1, 9), st.integers(1, 9), st.floats(0.01, 100))
def test_orthogonal_keeps_directions_and_evens_out_sizes(seed, rows, columns, size):
    """The singular vectors stay, each with its sign; all singular values but the smallest come to lie around 1."""
    rng = np.random.default_rng(seed)
    n = min(rows, columns)
    u, v = (np.linalg.qr(rng.standard_normal((k, n)))[0] for k in (rows, columns))
    values = rng.uniform(0.05, 1, n)
    matrix = (u * values * size) @ v.T
    before, found = matrix.copy(), u.T @ orthogonal(matrix) @ v
    assert np.array_equal(matrix, before)
    assert orthogonal(matrix).dtype == matrix.dtype
    assert_close("off the diagonal", found - np.diag(np.diag(found)), 0 * found, "formula", scale=1)
    assert (np.diag(found) > 0.5).all(), np.diag(found)
    assert (np.diag(found) < 1.3).all(), np.diag(found)


def test_muon_moves_hidden_matrices_and_adamw_the_rest(tmp_path):
    """One step of the loop from known gradients, against each rule by itself."""
    rng = np.random.default_rng(4)
    start = {"embed_tokens": {"weight": rng.standard_normal((3, 2))}, "q_proj": {"weight": rng.standard_normal((2, 3))},
             "patch_embedding": {"weight": rng.standard_normal((2, 1, 2, 2)), "bias": rng.standard_normal(2)}}
    gradients = {name: rng.standard_normal((1, *x.shape)) for name, x in flatten(start).items()}
    schedule = {"rate": 0.1, "warmup": 0, "shards": 1, "clip": 1e9, "decay": 0.3, "beta1": 0.6}

    def one_step(**more):
        return flatten(train(Given(gradients), start, Schedule(1, **schedule, **more), tmp_path / str(len(more)),
                             workers=0, report=lambda *_: None))
    both, adam = one_step(muon=2.0), one_step()
    for name, x in flatten(start).items():
        if "proj" in name or name == "patch_embedding.weight":
            # The mean of one gradient from 0 is 0.4 of it, of which Nesterov's look ahead takes 0.6 and adds 0.4.
            flat = gradients[name][0].reshape(2, -1)
            step = 0.2 * math.sqrt(flat.shape[1]) * orthogonal((0.6 * 0.4 + 0.4) * flat)
            assert_close(name, both[name], x - 0.2 * (step.reshape(x.shape) + 0.3 * x), "formula")
            assert not np.allclose(both[name], adam[name])
        else:
            assert np.array_equal(both[name], adam[name])


@pytest.mark.parametrize("muon", [0.0, 3.0])
def test_late_weights_come_up_slowly(tmp_path, muon):
    """Of a constant rate, those named `late` get 1/4, 2/4, 3/4, all and all; the others all of it from the start."""
    rng = np.random.default_rng(5)
    start = {"tower": {"weight": rng.standard_normal((2, 3)), "bias": np.ones(2)}, "rest": {"weight": np.ones((2, 3))}}
    gradients = {name: np.repeat(rng.standard_normal((1, *x.shape)), 5, axis=0) for name, x in flatten(start).items()}

    def steps(late):
        stage = Given(gradients)
        schedule = Schedule(5, rate=0.1, warmup=0, shards=1, clip=1e9, decay=0.0, muon=muon, late=late, late_steps=4)
        last = train(stage, start, schedule, tmp_path / late, workers=0, report=lambda *_: None)
        seen = [*stage.seen, flatten(last)]
        return {name: np.stack([b[name] - a[name] for a, b in itertools.pairwise(seen)]) for name in seen[0]}
    slow, fast = steps("tower."), steps("nobody")
    share = np.array([0.25, 0.5, 0.75, 1, 1])
    for name, moves in fast.items():
        expected = moves * (share.reshape(5, *[1] * (moves.ndim - 1)) if name.startswith("tower") else 1)
        assert_close(name, slow[name], expected, "formula", scale=1)


def test_learning_rate_goes_up_and_down():
    rates = [learning_rate(step, 100, 0.5, 10) for step in range(101)]
    assert rates[0] == 0.05
    assert rates[9] == rates[10] == max(rates) == 0.5
    assert rates[55] == pytest.approx(0.25)
    assert 0 < rates[99] < 0.001
    assert rates[100] == 0
    assert all(a < b for a, b in itertools.pairwise(rates[:10]))
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert learning_rate(0, 1, 0.5, 0) == 0.5


def test_learning_rate_stays_up_until_it_falls():
    """Where the run ends decides nothing before the fall; then it goes down by the same amount each step."""
    rates = [learning_rate(step, 100, 0.5, 10, fall=20) for step in range(101)]
    assert rates[:10] == [learning_rate(step, 100, 0.5, 10) for step in range(10)]
    assert rates[10:81] == [0.5] * 71
    assert np.allclose(np.diff(rates[80:]), -0.5 / 20)
    assert rates[100] == 0
    assert rates[:81] == [learning_rate(step, 999, 0.5, 10, fall=9) for step in range(81)]
    assert learning_rate(5, 6, 0.5, 0, fall=0) == 0.5
