"""The loop: runs that stop and go on, processes, reports, the state file."""
import contextlib
import io
import math
import os
import signal
import subprocess
import sys
import tempfile
import tracemalloc
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st
from small_stages import Toy, fail, prefix_lm, press, run, state_of

from minipali.checkpoint.tensors import flatten, unflatten
from minipali.errors import CommandError, InputError, Interrupted
from minipali.learning import loop, optimizer
from minipali.learning.gradients import batches
from minipali.learning.initialize import random_params
from minipali.learning.loop import Schedule, progress, train
from minipali.learning.optimizer import adamw, learning_rate, muon, views
from minipali.learning.state import load_state, save_state


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


def test_the_end_of_a_run_can_be_decided_before_its_fall(tmp_path):
    """Stopped at a rate that is still at its peak, it goes on to another end as if it had been so from the start;
    once the rate falls, or is to fall before where the run is, the end stays what it was."""
    def fall(path, steps, fall, events=None):
        params = {"w": np.ones((2, 3), np.float32), "b": np.zeros(2, np.float32)}
        schedule = Schedule(steps, rate=0.1, warmup=3, shards=2, fall=fall)
        return train(Toy(events), params, schedule, path, workers=0, report=lambda *_: None)

    whole, path = fall(tmp_path / "whole", 12, 4), tmp_path / "state"
    with pytest.raises(Interrupted):
        fall(path, 99, 9, {2 * 5: press})  # in the sixth step
    assert state_of(path)[0] == 6
    with pytest.raises(InputError, match="another fall, steps;"):
        fall(path, 9, 4)
    ended = fall(path, 12, 4)
    assert all(np.array_equal(ended[name], whole[name]) for name in whole)
    assert state_of(path)[0] == 12
    with pytest.raises(InputError, match="another steps;"):
        fall(path, 14, 4)


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


class Many:
    """Tensors of many sizes, some of them Muon's, with random gradients; a batch is the seed of its gradients."""
    SHAPES = {"tower.0.weight": (7, 19), "tower.0.bias": (19,), "tower.1.weight": (3, 2, 5, 5), "norm": (1,),
              "embed_tokens.weight": (40, 6), "empty": (0, 4), "out.weight": (130, 3), "scale": ()}

    def start(self, dtype):
        rng = np.random.default_rng(8)
        return {name: np.asarray(rng.standard_normal(shape), dtype) for name, shape in self.SHAPES.items()}

    def batch(self, number):
        return number

    def examples(self, batch):
        return batch

    def identity(self):
        return {"stage": "many"}

    def loss_and_gradient(self, p, batch):
        rng = np.random.default_rng((7, batch))
        gradients = {name: np.asarray(rng.standard_normal(x.shape) - x, x.dtype)
                     for name, x in reversed(flatten(p).items())}
        for x in gradients.values():
            x.flags.writeable = False  # the loop may not change what a stage gives it
        return gradients["norm"].sum(), unflatten(gradients)


def one_long_vector(stage, start, schedule):
    """The same run from the formulas, with everything as one vector: decay, rates, the gradient and its norm.

    -> weights, first, second, [(loss, norm)].
    """
    def packed(tensors):
        return np.concatenate([tensors[name].reshape(-1) for name in start])

    def for_each(value):
        return np.concatenate([np.full(x.size, value(name, x), x.dtype) for name, x in start.items()])
    weights, shapes = packed(start), {name: x.shape for name, x in start.items()}
    averages, seen = {"first": np.zeros_like(weights), "second": np.zeros_like(weights)}, []
    matrices = [name for name in ("tower.0.weight", "tower.1.weight", "out.weight") if schedule.muon]
    decay = for_each(lambda name, x: schedule.decay * (x.ndim > 1))
    adams = for_each(lambda name, x: name not in matrices)
    late = for_each(lambda name, x: name.startswith(schedule.late))
    for step in range(schedule.steps):
        numbers = range(step * schedule.shards, (step + 1) * schedule.shards)
        losses, gradients = zip(*(stage.loss_and_gradient(views(weights, shapes), number) for number in numbers))
        loss, gradient = losses[0], packed(flatten(gradients[0]))
        for more_loss, more in zip(losses[1:], gradients[1:]):
            loss, gradient = loss + more_loss, gradient + packed(flatten(more))
        gradient, loss = gradient / schedule.shards, loss / schedule.shards
        norm = np.sqrt((gradient * gradient).sum())
        seen.append((float(loss), float(norm)))
        gradient = gradient * np.minimum(1, schedule.clip / (norm + 1e-12))
        rate = learning_rate(step, schedule.steps, schedule.rate, schedule.warmup)
        missing = max(0.0, 1 - (step + 1) / schedule.late_steps) if schedule.late_steps else 0.0
        adamw(weights, gradient, averages, step + 1, rate * adams * (1 - missing * late), schedule.beta1,
              schedule.beta2, schedule.eps, decay)
        for name in matrices:
            tensors = (flatten(views(x, shapes))[name] for x in (weights, gradient, averages["first"]))
            matrix, slope, first = (x.reshape(len(x), -1) for x in tensors)
            own = schedule.muon * rate * (1 - missing * name.startswith(schedule.late))
            muon(matrix, slope, first, own, schedule.beta1, schedule.decay)
    return weights, averages["first"], averages["second"], seen


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("piece", [128, 200, 1 << 16])
@pytest.mark.parametrize("settings", [
    {}, {"shards": 1}, {"shards": 3, "clip": 1e9}, {"muon": 3.0, "decay": 0.1},
    {"muon": 3.0, "late": "tower.", "late_steps": 4}, {"late": "out", "late_steps": 2}])
def test_tensor_by_tensor_is_one_long_vector(tmp_path, monkeypatch, settings, piece, dtype):
    """To the last bit: weights, both averages, every loss and norm, wherever the pieces begin and end."""
    monkeypatch.setattr(optimizer, "PIECE", piece)
    schedule, stage, seen = Schedule(5, rate=0.1, warmup=2, **settings), Many(), []
    weights, first, second, expected = one_long_vector(stage, stage.start(dtype), schedule)
    train(stage, unflatten(stage.start(dtype)), schedule, tmp_path / "state", workers=0, every=1,
          report=lambda step, steps, loss, norm, *_: seen.append((loss, norm)))
    state = state_of(tmp_path / "state")[1]
    assert seen == expected
    for name, vector in [("weights", weights), ("first", first), ("second", second)]:
        assert state[name].tobytes() == vector.tobytes(), name


def test_a_step_is_the_mean_of_its_shards(tmp_path):
    """Batches 3i, 3i+1 and 3i+2, drawn in this order, and all of their examples."""
    stage, reported = Toy(), []
    run(stage, tmp_path / "state", steps=2, shards=3, report=lambda *line: reported.append(line[4]["examples"]))
    assert stage.drawn == [0, 1, 2, 3, 4, 5]
    assert stage.examples(None) == 4
    assert reported == [24]


def test_a_step_needs_no_copy_of_the_weights(tmp_path):
    """Weights, two averages and a gradient are 4 times the weights, with another shard's gradient 5; a step adds
    little to that, and saving nothing. NumPy tells tracemalloc of its arrays."""
    size = 400_000

    class Large(Toy):
        def loss_and_gradient(self, p, batch):
            return 0.0, {name: np.ones_like(x) for name, x in p.items()}
    rng = np.random.default_rng(0)
    for shards, allowed in [(1, 4.5), (3, 5.5)]:
        tracemalloc.start()
        train(Large(), lambda: {f"w{i}": rng.standard_normal((1000, 20), np.float32) for i in range(20)},
              Schedule(3, rate=0.1, warmup=0, shards=shards), tmp_path / str(shards), workers=0, report=lambda *_: None)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < allowed * 4 * size, f"{peak / 4 / size:.2f} times the weights"


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
    """The real second stage, three batches a step: here; with two learners, stopped by Ctrl-C, and gone on with one."""
    stage = prefix_lm(2, {"world": (1.0, 2)})
    params = random_params(stage.cfg, np.random.default_rng(0))
    before, paths, seen = dict(os.environ), (tmp_path / "here", tmp_path / "there"), {path: [] for path in "ht"}

    def learn(path, workers, stop=None):
        def note(step, steps, loss, norm, done, started):
            seen[path.name[0]].append((step, loss, norm))
            if step == stop:
                press()
        return train(stage, params, Schedule(4, rate=0.01, warmup=2, shards=3), path, workers, every=1,
                     report=note)
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


def out_of_memory(number):
    np.empty(1 << 62, np.int8)


# A run of two learners in a process group of its own, which waits for Ctrl-C once it has saved.
RUN = """
import sys, time
from small_stages import Toy, run
from minipali.errors import run_command

def report(step, steps, loss, norm, done, started):
    print(step, flush=True)
    time.sleep(0.2)

def main(argv):
    run(Toy(), argv[0], steps=10**6, workers=2, every=1, report=report)

if __name__ == "__main__":
    sys.exit(run_command("toy", main, sys.argv[1:]))
"""


@pytest.mark.skipif(os.name != "posix", reason="process groups")
def test_ctrl_c_reaches_workers_too_and_they_stay_silent(tmp_path):
    """A terminal sends SIGINT to every process: the loop saves and says so, and nobody else says anything."""
    (tmp_path / "toy.py").write_text(RUN)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    with subprocess.Popen([sys.executable, tmp_path / "toy.py", tmp_path / "state"], stdout=subprocess.PIPE, text=True,
                          stderr=subprocess.PIPE, start_new_session=True, env=environment) as process:
        try:
            assert process.stdout.readline() == "1\n"
            os.killpg(process.pid, signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode, err) == (130, "\nstopped; the same command goes on from here\n")
    assert state_of(tmp_path / "state")[0] == 1 + len(out.split())


@pytest.mark.skipif(os.name != "posix", reason="kill")
def test_a_killed_worker_is_one_line(tmp_path):
    """As the system does when memory runs out."""
    (tmp_path / "toy.py").write_text(RUN.replace("time.sleep(0.2)", "[os.kill(p.pid, 9) for p in active_children()]")
                                     .replace("import sys, time", "import os, sys\n"
                                              "from multiprocessing import active_children"))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    process = subprocess.run([sys.executable, tmp_path / "toy.py", tmp_path / "state"], capture_output=True, text=True,
                             check=False, env=environment, timeout=60)
    assert (process.returncode, process.stdout) == (2, "1\n")
    assert process.stderr.startswith("toy: error: a worker process died at step 1, ")
    assert process.stderr.count("\n") == 1


def test_what_goes_wrong_in_a_process_reaches_the_loop(tmp_path, light):
    """An error as itself, after the batches before it; a dead process as an error too, where waiting would not end."""
    got = []
    with batches(SimpleNamespace(batch=math.sqrt), range(4, -3, -1), 2) as source, pytest.raises(ValueError):
        got.extend(source)
    assert got == [math.sqrt(number) for number in (4, 3, 2, 1, 0)], "the same order as without processes"
    stage = {"examples": len, "identity": dict, "loss_and_gradient": math.sqrt}
    for batch, error, what in [(os._exit, CommandError, "a worker process died at step 0"),
                               (out_of_memory, MemoryError, "Unable to allocate"),
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
        report=lambda step, steps, loss, norm, done, started: reported.append((step, steps, dict(done))))
    assert [step for step, _, _ in reported] == [3, 6, 7]
    assert reported[1] == (6, 7, {"steps": 6, "examples": 48})
    assert saved == [2, 4, 6, 7]


# `python -m minipali train` with two pictures a batch in place of 64, which waits for a line in its first step, and the
# tokenizer that ships in place of learning it anew.
DRIVER = """
import runpy, shutil, sys
from minipali.small_world import drawings, stages, vocabulary
drawings.gallery = lambda artists: None
class Few(stages.Contrastive):
    def __init__(self, cfg, tokenizer, seed, **_):
        super().__init__(cfg, tokenizer, seed, 2)
    def batch(self, number):
        print(number, flush=True)
        if number == 1:
            sys.stdin.readline()
        return super().batch(number)
stages.Contrastive = Few
vocabulary.write = lambda out: shutil.copytree("weights", out, ignore=lambda _, names: {
    name for name in names if not name.startswith(("tokenizer", "vae-oid"))}, dirs_exist_ok=True)
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
