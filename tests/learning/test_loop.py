"""Learning: the optimizer against PyTorch's, runs that stop and go on, what the second stage's batches hold."""
import io
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from helpers import GOLDEN_FILES, ROOT, assert_close, seeds
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from minipali.checkpoint.config import (
    GemmaConfig,
    PaliGemmaConfig,
    VisionConfig,
    parse_config,
)
from minipali.checkpoint.tensors import flatten, unflatten
from minipali.errors import InputError, Interrupted
from minipali.inputs.image import Preprocessor
from minipali.inputs.tokenizer import Tokenizer
from minipali.learning import loop
from minipali.learning.backward import paligemma
from minipali.learning.gradients import batches
from minipali.learning.initialize import (
    line_waves,
    order_locations,
    random_params,
    waves,
)
from minipali.learning.loop import Schedule, progress, train
from minipali.learning.optimizer import (
    adamw,
    clip,
    gather,
    learning_rate,
    orthogonal,
    pack,
    views,
)
from minipali.learning.state import load_state, save_state
from minipali.model.paligemma import forward, image_features
from minipali.small_world import easy_vqa, stages, tasks, world
from minipali.small_world.stages import PrefixLM, WordTokenizer, scaled
from minipali.trace import record


@cache
def tokenizer():
    return Tokenizer.from_file(ROOT / "weights" / "tokenizer.json")


@cache
def golden():
    """adamw.safetensors: its settings, and its tensors by name."""
    with safe_open(GOLDEN_FILES / "adamw.safetensors", "np") as file:
        metadata = file.metadata()
        assert (metadata["format"], metadata["version"]) == ("minipali golden", "1")
        names = file.keys()
        return json.loads(metadata["settings"]), {name: file.get_tensor(name) for name in names}


def config(image_size=world.SIDE):
    """A PaliGemma with four patches and the shipped vocabulary, otherwise as small as can be."""
    vision = VisionConfig(hidden_size=6, intermediate_size=7, num_hidden_layers=1, num_attention_heads=2,
                          image_size=image_size, patch_size=image_size // 2, num_channels=3, layer_norm_eps=0.01,
                          vision_use_head=False)
    text = GemmaConfig(vocab_size=2048, hidden_size=5, intermediate_size=7, num_hidden_layers=1, num_attention_heads=2,
                       num_key_value_heads=1, head_dim=4, rms_norm_eps=0.01, rope_thetas=(1e4,), rope_factors=(1.0,),
                       max_position_embeddings=256, query_pre_attn_scalar=4, attn_logit_softcapping=None,
                       final_logit_softcapping=None, sliding_windows=(None,), post_norms=False, qk_norms=False,
                       prefix_lm=True)
    return PaliGemmaConfig(vision_config=vision, text_config=text, image_token_index=2047, bos_token_id=2,
                           eos_token_ids=(1,), pad_token_id=0, tie_word_embeddings=True)


def prefix_lm(pictures=3, sources=None, seed=0):
    sources = sources or {"world": (0.5, 3), "easy_vqa_like": (0.3, 2), "text": (0.2, 1)}
    return PrefixLM(config(), WordTokenizer(tokenizer()), seed, pictures, sources)


# --- optimizer --------------------------------------------------------------------------------------------------------

class Given:
    """A stage whose gradients are given; it notes the weights that it is shown."""
    def __init__(self, gradients):
        self.gradients, self.seen = gradients, []

    def batch(self, step):
        return {name: x[step] for name, x in self.gradients.items()}

    def examples(self, batch):
        return 1

    def identity(self):
        return {"stage": "given"}

    def loss_and_gradient(self, p, batch):
        self.seen.append({name: x.copy() for name, x in flatten(p).items()})
        return 0.0, unflatten(batch)


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
    """Ten steps of a small PaliGemma, the same weights and batches: every loss, every gradient's length."""
    settings, tensors = golden()
    with safe_open(GOLDEN_FILES / "paligemma1.safetensors", "np") as file:
        names = file.keys()
        cfg = parse_config(json.loads(file.metadata()["config"]))
        params = unflatten({name.removeprefix("weights/"): file.get_tensor(name).astype(np.float64)
                            for name in names if name.startswith("weights/")})
    curve = []
    train(Curve(cfg, tensors), params, Schedule(10, shards=1, **settings), tmp_path / "state", workers=0, every=1,
          report=lambda step, steps, loss, length, *_: curve.append((loss, length)))
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
    clipped, length = clip(gradient, limit)
    assert_close("length", length, np.linalg.norm(gradient), "formula")
    assert_close("clipped", np.linalg.norm(clipped), min(limit, length), "formula")
    assert_close("direction", clipped / np.linalg.norm(clipped), gradient / length, "formula")
    assert clip(np.zeros(3), limit)[0].tolist() == [0, 0, 0]


def test_the_tree_is_views_of_one_vector():
    """What changes the vector changes the tree, and gather brings gradients into the vector's order, not their own."""
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
    backwards = unflatten(dict(reversed(flatten(tree).items())))
    assert np.array_equal(gather({"a": backwards["a"], "b": backwards["b"]}, shapes), vector)
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
    course = {"rate": 0.1, "warmup": 0, "shards": 1, "clip": 1e9, "decay": 0.3, "beta1": 0.6}

    def one_step(**more):
        return flatten(train(Given(gradients), start, Schedule(1, **course, **more), tmp_path / str(len(more)), workers=0,
                             report=lambda *_: None))
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
        course = Schedule(5, rate=0.1, warmup=0, shards=1, clip=1e9, decay=0.0, muon=muon, late=late, late_steps=4)
        last = train(stage, start, course, tmp_path / late, workers=0, report=lambda *_: None)
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


# --- the loop ---------------------------------------------------------------------------------------------------------

class Toy:
    """Pulls a small tree towards random ones; `events` happen as batches of these numbers are drawn."""
    def __init__(self, events=None, seed=3):
        self.events, self.seed, self.drawn = events or {}, seed, []

    def batch(self, number):
        self.drawn.append(number)
        self.events.get(number, lambda: None)()
        return np.random.default_rng((self.seed, number)).standard_normal(8).astype(np.float32)

    def examples(self, batch):
        return 4

    def identity(self):
        return {"stage": "toy", "seed": self.seed, "sources": {"a": (0.5, 3)}}

    def loss_and_gradient(self, p, batch):
        off = p["w"] - batch[:6].reshape(2, 3), p["b"] - batch[6:]
        return (off[0] ** 2).sum() + (off[1] ** 2).sum(), {"b": 2 * off[1], "w": 2 * off[0]}


def run(stage, path, steps=9, shards=2, **how):
    params = {"w": np.ones((2, 3), np.float32), "b": np.zeros(2, np.float32)}
    course = Schedule(steps, rate=0.1, warmup=3, shards=shards)
    return train(stage, params, course, path, **{"workers": 0, "report": lambda *_: None, **how})


def state_of(path):
    with safe_open(path, "np") as file:
        names = file.keys()
        return json.loads(file.metadata()["about"])["step"], {name: file.get_tensor(name) for name in names}


def press():
    signal.raise_signal(signal.SIGINT)


def fail():
    raise ZeroDivisionError("a batch that cannot be drawn")


@given(st.dictionaries(st.integers(0, 8), st.integers(0, 1)), st.integers(1, 4), st.sampled_from([press, fail]))
def test_a_run_in_pieces_is_the_whole_run(stops, save_every, event):
    """Ctrl-C in the first or second batch of any steps, or crashes: weights and both averages end as the same bits."""
    with tempfile.TemporaryDirectory() as folder:
        whole, pieces = Path(folder, "whole"), Path(folder, "new", "pieces")
        expected = run(Toy(), whole)
        left = dict.fromkeys((2 * step + shard for step, shard in stops.items()), event)

        def once(number):
            return lambda: left.pop(number)()
        while True:
            stage = Toy({number: once(number) for number in left})
            try:
                trained = run(stage, pieces, save_every=save_every)
                break
            except Interrupted:
                assert state_of(pieces)[0] == stage.drawn[-1] // 2 + 1, "Ctrl-C's step is finished and kept"
            except ZeroDivisionError:
                assert not pieces.exists() or state_of(pieces)[0] == stage.drawn[-1] // 2 // save_every * save_every
        (step_a, a), (step_b, b) = state_of(whole), state_of(pieces)
        assert step_a == step_b == 9
        assert {name: x.tobytes() for name, x in a.items()} == {name: x.tobytes() for name, x in b.items()}
        assert set(a) == {"weights", "first", "second"}
        assert all(np.array_equal(trained[name], expected[name]) for name in "wb")
        done = Toy()
        assert np.array_equal(run(done, pieces)["w"], expected["w"])
        assert done.drawn == [], "a finished run has nothing left to do"
        assert os.listdir(Path(folder, "new")) == ["pieces"]


def test_second_ctrl_c_stops_at_once_and_handlers_come_back(tmp_path):
    def twice():
        press()
        press()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(Toy({2: twice}), tmp_path / "state")
    assert signal.getsignal(signal.SIGINT) is before
    assert not (tmp_path / "state").exists()


def test_a_run_starts_from_its_parameters_and_leaves_them_alone(tmp_path):
    """No step: what comes out is what went in; and steps change only the copy."""
    params = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float32)}
    trained = train(Toy(), params, Schedule(0, rate=0.1, warmup=3), tmp_path / "none", workers=0)
    assert np.array_equal(trained["w"], params["w"])
    train(Toy(), params, Schedule(2, rate=0.1, warmup=3), tmp_path / "two", workers=0, report=lambda *_: None)
    assert np.array_equal(params["w"], np.arange(6).reshape(2, 3))


def test_other_runs_and_broken_files_are_refused(tmp_path):
    """One line that says what is wrong; a broken or foreign file is never written over."""
    path = tmp_path / "state"
    run(Toy(), path)
    whole = path.read_bytes()
    for stage, steps, what in [(Toy(seed=4), 9, "another seed;"), (Toy(), 10, "another steps;")]:
        with pytest.raises(InputError, match=what):
            run(stage, path, steps)
    with pytest.raises(InputError, match="another shapes"):
        train(Toy(), {"w": np.ones((2, 4), np.float32)}, Schedule(9, rate=0.1, warmup=3), path, workers=0)
    save_state(tmp_path / "list", {"weights": np.zeros(1)}, [])
    broken = [b"", b"garbage" * 99, whole[:-1], whole[:40], whole + b"1", whole.replace(b"about", b"above"),
              (tmp_path / "list").read_bytes()]
    for content in broken:
        path.write_bytes(content)
        with pytest.raises(InputError, match="not a training state") as error:
            run(Toy(), path)
        assert "\n" not in str(error.value)
        assert path.read_bytes() == content
    with pytest.raises(InputError, match="not a training state"):
        run(Toy(), tmp_path)


def test_a_state_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    """Killed between writing and renaming, the old state is what the next start finds."""
    path, arrays = tmp_path / "state", {"weights": np.arange(5.0)}
    save_state(path, arrays, {"stage": "toy", "step": 1})

    def killed(*_):
        raise SystemExit
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(SystemExit):
            save_state(path, {"weights": np.zeros(5)}, {"stage": "toy", "step": 2})
    found, step = load_state(path, {"stage": "toy"})
    assert step == 1
    assert np.array_equal(found["weights"], arrays["weights"])
    save_state(path, {"weights": np.zeros(5)}, {"stage": "toy", "step": 2})
    assert load_state(path, {"stage": "toy"})[1] == 2
    assert os.listdir(tmp_path) == ["state"], "what the killed run left lay under the name that the next one takes"


def test_a_state_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "state", tmp_path / "folder"):
        with pytest.raises(InputError, match="cannot be written"):
            save_state(path, {"weights": np.zeros(1)}, {"step": 0})
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]


def test_a_step_is_the_mean_of_its_shards(tmp_path):
    """Step by step by hand: batches 3i, 3i+1 and 3i+2, added in this order; loss and length are those of the mean."""
    stage, reported = Toy(), []
    shapes = {"w": (2, 3), "b": (2,)}
    weights = np.array([1] * 6 + [0] * 2, np.float32)
    state = {"first": np.zeros(8, np.float32), "second": np.zeros(8, np.float32)}
    decay = np.array([0.02] * 6 + [0] * 2, np.float32)
    run(stage, tmp_path / "state", steps=2, shards=3, every=1,
        report=lambda step, steps, loss, length, *_: reported.append((loss, length)))
    assert stage.drawn == [0, 1, 2, 3, 4, 5]
    for step in range(2):
        pairs = [stage.loss_and_gradient(views(weights, shapes), stage.batch(3 * step + shard)) for shard in range(3)]
        a, b, c = (gather(grads, shapes) for _, grads in pairs)
        gradient, length = clip((a + b + c) / 3, 1)
        assert reported[step] == (pytest.approx(np.mean([loss for loss, _ in pairs])), float(length))
        adamw(weights, gradient, state, step + 1, learning_rate(step, 2, 0.1, 3), 0.9, 0.98, 1e-8, decay)
    assert np.array_equal(state_of(tmp_path / "state")[1]["weights"], weights)


@pytest.mark.parametrize("size", [np.nan, np.inf, 1e30])
def test_a_gradient_that_is_not_finite_stops_the_run(tmp_path, size):
    """Also one of which only the length is too large; what was saved before stays."""
    class Exploding(Toy):
        def loss_and_gradient(self, p, batch):
            loss, grads = super().loss_and_gradient(p, batch)
            return loss, {**grads, "b": grads["b"] * np.float32(size if self.drawn[-1] == 9 else 1)}
    with pytest.raises(InputError, match=r"state: the gradient of step 5 is not finite"):
        run(Exploding(), tmp_path / "state", save_every=2)
    assert state_of(tmp_path / "state")[0] == 4
    run(Toy(), tmp_path / "state")
    run(Toy(), tmp_path / "whole")
    assert (tmp_path / "state").read_bytes() == (tmp_path / "whole").read_bytes()


@pytest.fixture
def light(monkeypatch):
    """Processes import the main module anew: here they are spared pytest."""
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))


def test_learners_change_no_bit(tmp_path, light):
    """The real second stage, here; and with two learners, stopped by Ctrl-C, and gone on with one."""
    stage = prefix_lm(2, {"world": (1.0, 2)})
    params = random_params(stage.cfg, np.random.default_rng(0))
    before, paths, seen = dict(os.environ), (tmp_path / "here", tmp_path / "there"), {path: [] for path in "ht"}

    def learn(path, workers, stop=None):
        def note(step, steps, loss, length, done, started):
            seen[path.name[0]].append((step, loss, length))
            if step == stop:
                press()
        return train(stage, params, Schedule(4, rate=0.01, warmup=2), path, workers, every=1, report=note)
    expected = learn(paths[0], 0)
    with pytest.raises(Interrupted):
        learn(paths[1], 2, stop=2)
    assert state_of(paths[1])[0] == 2
    trained = learn(paths[1], 1)
    assert seen["h"] == seen["t"]
    assert paths[0].read_bytes() == paths[1].read_bytes()
    expected = flatten(expected)
    assert all(np.array_equal(x, expected[name]) for name, x in flatten(trained).items())
    assert dict(os.environ) == before


def test_what_goes_wrong_in_a_process_reaches_the_loop(tmp_path, light):
    """An error as itself, after the batches before it; a dead process as an error too, where waiting would not end."""
    got = []
    with batches(SimpleNamespace(batch=math.sqrt), range(4, -3, -1), 2) as source, pytest.raises(ValueError):
        got.extend(source)
    assert got == [math.sqrt(number) for number in (4, 3, 2, 1, 0)], "the same order as without processes"
    stage = {"examples": len, "identity": dict, "loss_and_gradient": math.sqrt}
    for batch, error, what in [(os._exit, RuntimeError, "a worker has died over step 0"),
                               (str, TypeError, "takes exactly one argument")]:
        with pytest.raises(error, match=what):
            run(SimpleNamespace(**stage, batch=batch), tmp_path / "state", workers=1)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_line(monkeypatch, terminal):
    """What it says; on a terminal each goes over the one before, and the last stays."""
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal)
    monkeypatch.setattr(loop.time, "monotonic", lambda: 150.0)
    line = "step 40/4000  loss 1.2346  gradient 0.50  26 examples/s  2:45:00 left"
    progress(40, 4000, 1.23456, 0.5, {"steps": 20, "examples": 1280}, 100.0, stream)
    assert stream.getvalue() == (f"\r{line:<90}" if terminal else line + "\n")
    progress(4000, 4000, 1.0, 0.5, {"steps": 20, "examples": 1280}, 100.0, stream)
    assert stream.getvalue().endswith("\n")
    assert "0:00:00 left" in stream.getvalue()


def test_reports_and_saves_come_when_they_should(tmp_path, monkeypatch):
    reported, saved = [], []
    monkeypatch.setattr(loop, "save_state", lambda path, arrays, about: saved.append(about["step"]))
    run(Toy(), tmp_path / "state", steps=7, every=3, save_every=2,
        report=lambda step, steps, loss, length, done, started: reported.append((step, steps, dict(done))))
    assert [step for step, _, _ in reported] == [3, 6, 7]
    assert reported[1] == (6, 7, {"steps": 6, "examples": 48})
    assert saved == [2, 4, 6, 7]


# `python -m minipali train` with two pictures a batch in place of 64, which waits for a line in its first step, and the
# tokenizer that ships in place of learning it anew.
DRIVER = """
import runpy, shutil, sys
from minipali.small_world import stages, vocabulary
class Few(stages.Contrastive):
    def __init__(self, cfg, tokenizer, seed, *_):
        super().__init__(cfg, tokenizer, seed, 2)
    def batch(self, number):
        print(number, flush=True)
        if number == 1:
            sys.stdin.readline()
        return super().batch(number)
stages.Contrastive = Few
vocabulary.write = lambda out: shutil.copytree("weights", out, ignore=lambda _, names: {
    name for name in names if not name.startswith("tokenizer")}, dirs_exist_ok=True)
sys.argv[1:1] = ["train"]
runpy.run_module("minipali", run_name="__main__", alter_sys=True)
"""


def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path):
    """The real program and a real SIGINT: status 130, no traceback; then the rest of the steps and the model."""
    options = f"--out {tmp_path / 'out'} --runs {tmp_path} --contrastive-steps 2 --steps 0 --workers 0"
    command = [sys.executable, "-c", DRIVER, *options.split()]
    how = {**dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE), "text": True, "cwd": ROOT,
           "env": {**os.environ, "OPENBLAS_NUM_THREADS": "1"}}
    with subprocess.Popen(command, **how) as process:
        assert [process.stdout.readline() for _ in range(2)] == ["0\n", "1\n"]
        process.send_signal(signal.SIGINT)
        out, err = process.communicate("\n", timeout=300)
    assert (process.returncode, out) == (130, ""), err
    assert err == "\nstopped; the same command goes on from here\n"
    assert state_of(tmp_path / "contrastive.safetensors")[0] == 1
    with subprocess.Popen(command, **how) as process:
        out, err = process.communicate(timeout=300)
    assert (process.returncode, out) == (0, "2\n3\n"), err
    assert err.startswith("step 2/2  loss ")
    assert (tmp_path / "out" / "siglip" / "model.safetensors").exists()
    assert (tmp_path / "out" / "config.json").exists()


# --- the second stage -------------------------------------------------------------------------------------------------

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


def test_sources_give_as_many_prompts_as_they_should():
    """A scene is always asked for its caption; the picture that goes with the prompts is the one they were made for."""
    stage = prefix_lm(sources={"world": (1.0, 3)})
    picture, pairs = stage.draw("world", np.random.default_rng(0), (0, 2, 5, 1))
    scene = world.draw((0, 2, 5, 1))
    assert np.array_equal(picture, scene.image)
    assert len(pairs) == 3
    assert pairs[0] == tasks.caption(scene, None)
    picture, [(prefix, suffix)] = prefix_lm().draw("text", np.random.default_rng(0), (0, 1))
    assert (prefix, suffix) == ("ocr", world.draw_text((0, 1))[1])
    picture, pairs = prefix_lm().draw("easy_vqa_like", np.random.default_rng(0), (0, 1))
    assert picture.shape == (world.SIDE, world.SIDE, 3)
    assert len(pairs) == 2


@given(seeds)
def test_word_tokenizer_is_the_tokenizer(seed):
    """For whatever the tasks say, and again from memory."""
    words, rng = WordTokenizer(tokenizer()), np.random.default_rng(seed)
    texts = ["a  b ", " ", "", "\n"]
    for number in range(2):
        scene = world.draw((seed, number))
        for _, prefix, suffix in tasks.examples(scene, rng, lambda mask: rng.integers(0, 128, 16).tolist()):
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
            total, expected = total + part, more if expected is None else stages.added(expected, more)
    assert_close("loss", loss, total, "reordered")
    expected = flatten(expected)
    for name, x in flatten(grads).items():
        scale = np.abs(expected[name.replace("k_proj.bias", "k_proj.weight")]).max()  # a key's bias has no effect
        assert_close(name, x, expected[name], "reordered", scale)


def test_a_prefix_lm_run_goes_on(tmp_path):
    """Its sources are tuples, and lists once they have been in a file: still the same run."""
    stage = prefix_lm(2, {"world": (1.0, 1)})
    params = random_params(stage.cfg, np.random.default_rng(0))
    course, how = Schedule(1, rate=0.01, warmup=1), {"workers": 0, "report": lambda *_: None}
    first, again = (flatten(train(stage, params, course, tmp_path / "state", **how)) for _ in range(2))
    assert all(np.array_equal(x, again[name]) for name, x in first.items())
    assert all(x.dtype == np.float32 for x in first.values())
    other = prefix_lm(2, {"world": (1.0, 2)})
    with pytest.raises(InputError, match="another sources"):
        train(other, params, course, tmp_path / "state", **how)


# --- the first weights ------------------------------------------------------------------------------------------------

def deep_config():
    base = {"vision_config": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 6,
                              "num_attention_heads": 4, "image_size": 28, "patch_size": 7, "vision_use_head": False},
            "text_config": {"model_type": "gemma", "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 6,
                            "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 300}}
    return parse_config({"model_type": "paligemma", "image_token_index": 299, **base})


def test_signals_keep_their_size_through_depth():
    """Every activation between layers has a spread of the order of 1, in both towers, before any training."""
    cfg, rng = deep_config(), np.random.default_rng(0)
    params = random_params(cfg, rng)
    pixels = rng.uniform(-1, 1, (4, 3, 28, 28)).astype(np.float32)
    ids = rng.integers(0, 290, (4, 9))
    with record() as activations:
        features = image_features(pixels, params, cfg)
        out = forward(features, ids, np.full(4, 9), np.full(4, 20), params, cfg)
    spreads = {name: float(x.std()) for name, x in activations.items()
               if name.rpartition(".")[0].endswith("layers") or name == "multi_modal_projector"}
    assert len(spreads) == 13
    assert all(0.3 < spread < 3 for spread in spreads.values()), spreads
    assert 0.3 < out.std() < 3
    assert all(x.dtype == np.float32 for x in flatten(params).values())


def test_norms_start_as_the_identity():
    """LayerNorm's scale is stored as it is, Gemma's as what is added to 1."""
    flat = flatten(random_params(deep_config(), np.random.default_rng(0)))
    for name, x in flat.items():
        if name.endswith("bias"):
            assert not x.any(), name
        elif "norm" in name:
            assert (x == (0 if name.startswith("language_model") else 1)).all(), name
        else:
            assert x.std() > 0, name


def cosines(table):
    unit = table / np.linalg.norm(table, axis=1, keepdims=True)
    return unit @ unit.T


def test_waves_make_neighbors_alike():
    """In the table of patches, those beside and below are nearer than those further off, and no two are the same."""
    table = waves(49, 32)
    assert table.shape == (49, 32)
    near = cosines(table)
    for patch in (0, 24, 30):
        row, column = divmod(patch, 7)
        order = np.argsort(-near[patch], kind="stable")[1:4] if patch else np.argsort(-near[patch], kind="stable")[1:3]
        assert all(abs(other // 7 - row) + abs(other % 7 - column) == 1 for other in order), (patch, order)
    assert (near - np.eye(49)).max() < 0.999
    assert np.allclose(near, near.T)
    assert waves(7, 10).shape == (7, 10), "sizes that do not divide leave zeros"


def test_line_waves_make_close_numbers_alike():
    table = line_waves(1024, 64, 2048)
    near = cosines(table)
    assert np.allclose(np.linalg.norm(table, axis=1), 1)
    assert (np.diff(near[500, 500:506]) < 0).all(), "likeness falls at once, and on the whole goes on falling"
    means = [near[500, 500 + d:500 + 2 * d].mean() for d in (1, 2, 4, 8, 16, 32, 64, 128, 256)]
    assert all(a > b for a, b in itertools.pairwise(means))
    assert line_waves(3, 5, 8).shape == (3, 5)
    assert not line_waves(3, 5, 8)[:, 4].any()


def test_locations_start_in_order():
    """Rows of <loc> turn into points along a line, and no other row changes."""
    table = np.random.default_rng(0).standard_normal((2048, 128)) / math.sqrt(128)
    params = {"language_model": {"model": {"embed_tokens": {"weight": table.copy()}}}}
    order_locations(params, tokenizer())
    ordered = params["language_model"]["model"]["embed_tokens"]["weight"]
    first = tokenizer().id_of("<loc0000>")
    others = np.r_[0:first, first + 1024:2048]
    assert np.array_equal(ordered[others], table[others])
    near = cosines(ordered[first:first + 1024])
    assert np.diagonal(near, 5).mean() > np.diagonal(near, 200).mean() + 0.1
    spread = np.linalg.norm(ordered[first:first + 1024], axis=1).mean() / np.linalg.norm(table, axis=1).mean()
    assert 0.8 < spread < 1.2, "they are neither louder nor quieter than the other words"
    assert abs(np.diagonal(cosines(table[first:first + 1024]), 5).mean()) < 0.05
