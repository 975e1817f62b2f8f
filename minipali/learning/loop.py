"""The training loop: draw, learn, show, save; stop at any moment and go on bit for bit.

What a run needs to go on is one file: the weights, the optimizer's two averages and the number of steps done. It is
written under another name and then renamed, so that no moment exists at which the only copy is half written. Batches
and learning rates follow from the step's number alone.

A step's gradient is the mean over a few batches, its shards, which as many processes can compute at the same time. How
many do changes no bit of what comes out: see `average`. (Several BLAS threads might; learners therefore have one.)
"""
import contextlib
import ctypes
import itertools
import json
import math
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from minipali.backend import to_device, to_host
from minipali.checkpoint.tensors import flatten
from minipali.errors import InputError, Interrupted
from minipali.learning.optimizer import (
    adamw,
    clip,
    gather,
    hidden_matrices,
    learning_rate,
    muon,
    pack,
    views,
)


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: the optimizer's settings, the learning rate's course, and how many batches make a step.

    `muon` is how many times AdamW's rate the hidden matrices get, from Muon; at 0 AdamW moves them like all others.
    Weights whose names begin with `late` come up to their rate in a straight line over `late_steps` steps.
    """
    steps: int
    rate: float
    warmup: int
    muon: float = 0.0
    late: str = ""
    late_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    decay: float = 0.02
    clip: float = 1.0
    shards: int = 2


def keep_freed_memory():
    """Tell glibc to keep what is freed. By default it gives every large array back to the system at once and clears
    its pages anew for the next: a third of a training step. Elsewhere there is nothing to tell."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


# --- processes --------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def spawned(target, arguments):
    """Start target(*arguments[i], pipe) in a process for each i; gives our ends of the pipes, ends the processes."""
    spawn, pipes, processes = multiprocessing.get_context("spawn"), [], []
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # they are born deaf to Ctrl-C: the loop answers it
    threads = os.environ.get("OMP_NUM_THREADS")
    # One BLAS thread each, unless the user says otherwise: more would wait for the cores that the others use.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        for given in arguments:
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=target, args=(*given, theirs), daemon=True)
            process.start()
            theirs.close()  # the process's copy is then the last one: if it dies, recv says so
            pipes.append(ours)
            processes.append(process)
    finally:
        signal.signal(signal.SIGINT, before)
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]
    try:
        yield pipes
    finally:
        for process in processes:
            process.terminate()
            process.join()


def received(pipe, step):
    """What a process sends, or the error that it ran into."""
    try:
        answer = pipe.recv()
    except (EOFError, ConnectionError):
        raise RuntimeError(f"a worker has died over step {step}") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


# --- gradients --------------------------------------------------------------------------------------------------------

def average(shards):
    """The mean, added up in the order of the shards and not in that of their arrival: (a + b) + c is not a + (b + c) in
    floating point, and a run that went on with another number of processes would drift away from itself."""
    total = shards[0]
    for shard in shards[1:]:
        total = total + shard
    return total / len(shards)


def _draw(stage, numbers, pipe):
    """A worker's life: batch after batch into the pipe, each kept until the loop has taken the one before."""
    try:
        for number in numbers:
            pipe.send(stage.batch(number))
    except ConnectionError:  # the loop has gone: nobody needs the rest
        pass
    except Exception as error:  # noqa: BLE001 - the loop raises it
        pipe.send(error)


@contextlib.contextmanager
def batches(stage, numbers, workers):
    """An iterator of the batches of these numbers in order, drawn ahead in so many processes (0: here, when asked).

    The workers take turns, each with a pipe of its own, so how many there are changes no batch and no order.
    """
    if not workers:
        yield map(stage.batch, numbers)
        return
    with spawned(_draw, [(stage, numbers[worker::workers]) for worker in range(workers)]) as pipes:
        yield (received(pipes[i % workers], number) for i, number in enumerate(numbers))


def computed_here(stage, params, shapes, source, shards, backend):
    """A step's mean loss, mean gradient and number of examples, for as long as `source` has batches."""
    while drawn := list(itertools.islice(source, shards)):
        pairs = [stage.loss_and_gradient(params, to_device(batch, backend)) for batch in drawn]
        yield (average([loss for loss, _ in pairs]), average([gather(grads, shapes) for _, grads in pairs]),
               sum(stage.examples(batch) for batch in drawn))


def _learn(stage, shapes, dtype, weights, gradients, shards, mine, steps, pipe):
    """A learner's life: draw its shards of a step while the loop updates the weights, and wait until it has; then put
    their gradients where the loop sees them, and their losses into the pipe."""
    keep_freed_memory()
    params = views(np.frombuffer(weights, dtype), shapes)
    gradients = np.frombuffer(gradients, dtype).reshape(shards, -1)
    try:
        for step in steps:
            drawn = {shard: stage.batch(step * shards + shard) for shard in mine}
            pipe.recv()
            answers = []
            for shard, batch in drawn.items():
                loss, grads = stage.loss_and_gradient(params, batch)
                gradients[shard] = gather(grads, shapes)
                answers.append((loss, stage.examples(batch)))
            pipe.send(answers)
    except (EOFError, ConnectionError):  # the loop has gone
        pass
    except Exception as error:  # noqa: BLE001 - the loop raises it
        pipe.send(error)


def _learned(pipes, gradients, steps):
    answers = [None] * len(gradients)
    for step in steps:
        for pipe in pipes:
            with contextlib.suppress(ConnectionError):  # what became of the learner is said below
                pipe.send(step)
        for worker, pipe in enumerate(pipes):
            answers[worker::len(pipes)] = received(pipe, step)
        yield average([loss for loss, _ in answers]), average(gradients), sum(examples for _, examples in answers)


@contextlib.contextmanager
def gradients_of(stage, weights, shapes, steps, shards, workers, backend):
    """The weights, where the loop is to change them in place, and an iterator of (loss, gradient, examples) of each
    step: taking the next one computes it from the weights as they are then.

    NumPy: `workers` learners share the weights, each with every workers-th shard of a step (0: all here). A GPU is
    itself many workers, so there the processes draw batches ahead.
    """
    if backend == "numpy" and workers:
        workers = min(workers, shards)
        memory = [multiprocessing.RawArray("b", weights.nbytes * size) for size in (1, shards)]
        ours, gradients = (np.frombuffer(raw, weights.dtype) for raw in memory)
        ours[:] = weights
        common = stage, shapes, weights.dtype, *memory, shards
        with spawned(_learn, [(*common, range(i, shards, workers), steps) for i in range(workers)]) as pipes:
            yield ours, _learned(pipes, gradients.reshape(shards, -1), steps)
        return
    weights = to_device(weights, backend)
    numbers = range(steps.start * shards, steps.stop * shards)
    with batches(stage, numbers, workers) as source:
        yield weights, computed_here(stage, views(weights, shapes), shapes, source, shards, backend)


# --- saving and going on ------------------------------------------------------------------------------------------------

def save_state(path, arrays, about):
    """Weights and averages as one safetensors file; `about` says what they belong to. Raises InputError if it cannot."""
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays, temporary, metadata={"about": json.dumps(about)})
        os.replace(temporary, path)
    except (SafetensorError, OSError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise InputError(f"{path}: the training state cannot be written ({error})") from None


def load_state(path, about):
    """The arrays and the number of steps done; raises InputError if the file belongs to another run than `about`."""
    try:
        with safe_open(path, framework="np") as file:
            found = json.loads(file.metadata()["about"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        step = found.pop("step")
    except (SafetensorError, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a training state ({error})") from None
    about = json.loads(json.dumps(about))  # as the file tells it, where a tuple is a list
    differing = sorted(key for key in {*found, *about} if found.get(key) != about.get(key))
    if differing:
        raise InputError(f"{path}: belongs to a run with another {', '.join(differing)}; give another folder or delete it")
    return arrays, step


# --- the loop -----------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def interrupts():
    """Ctrl-C sets a flag that the loop looks at between two steps; a second one stops at once."""
    pressed = []

    def note(*_):
        if pressed:
            raise KeyboardInterrupt
        pressed.append(True)
    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def progress(step, steps, loss, length, done, started, stream=sys.stderr):
    """One line: step, loss, length of the gradient, examples a second, time left."""
    here, seconds = done["steps"], time.monotonic() - started
    left = int(seconds / max(here, 1) * (steps - step))
    line = (f"step {step}/{steps}  loss {loss:.4f}  gradient {length:.2f}  {done['examples'] / seconds:.0f} examples/s  "
            f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left")
    again = stream.isatty() and step < steps  # the next line goes over this one
    print(f"\r{line:<90}" if stream.isatty() else line, end="" if again else "\n", file=stream, flush=True)


def train(stage, params, course, state_path, workers=1, backend="numpy", every=20, save_every=200, report=progress):
    """Train `params` (a tree on the host) on a stage's batches; returns the trained tree, on the host.

    Goes on from `state_path` if that file exists. Raises Interrupted after Ctrl-C, with the state saved, and InputError at a
    gradient that is not finite, with the last saved state untouched: such a step would turn every weight into NaN.
    """
    keep_freed_memory()
    shapes = {name: array.shape for name, array in flatten(params).items()}
    about = {**stage.identity(), **asdict(course), "shapes": {name: list(shape) for name, shape in shapes.items()}}
    weights, step = pack(params)[0], 0
    state = {"first": np.zeros_like(weights), "second": np.zeros_like(weights)}
    if Path(state_path).exists():
        state, step = load_state(state_path, about)
        weights = state.pop("weights")
    # Weight decay is for matrices: pulling a norm's scale or a bias towards 0 has no reason behind it.
    decay = np.concatenate([np.full(math.prod(shape), course.decay * (len(shape) > 1), weights.dtype)
                            for shape in shapes.values()])
    matrices = hidden_matrices(shapes) if course.muon else {}
    adams, late = (np.concatenate([np.full(math.prod(shape), chosen(name), weights.dtype) for name, shape in shapes.items()])
                   for chosen in (lambda name: name not in matrices, lambda name: name.startswith(course.late)))
    state, decay, adams, late = (to_device(tree, backend) for tree in (state, decay, adams, late))
    done, started = {"steps": 0, "examples": 0}, time.monotonic()
    with interrupts() as pressed, gradients_of(stage, weights, shapes, range(step, course.steps), course.shards,
                                               workers, backend) as (weights, source):
        for loss, gradient, examples in source:
            with np.errstate(over="ignore", invalid="ignore"):  # said below, in words
                gradient, length = clip(gradient, course.clip)
            if not np.isfinite(length):
                raise InputError(f"{state_path}: the gradient of step {step + 1} is not finite; the state saved before it "
                               "stays as it was")
            rate = learning_rate(step, course.steps, course.rate, course.warmup)
            missing = max(0.0, 1 - (step + 1) / course.late_steps) if course.late_steps else 0.0
            rates = rate * adams * (1 - missing * late)
            adamw(weights, gradient, state, step + 1, rates, course.beta1, course.beta2, course.eps, decay)
            for name, (part, shape) in matrices.items():
                matrix, slope, first = (vector[part].reshape(shape) for vector in (weights, gradient, state["first"]))
                mine = course.muon * rate * (1 - missing * name.startswith(course.late))
                muon(matrix, slope, first, mine, course.beta1, course.decay)
            step += 1
            done["steps"], done["examples"] = done["steps"] + 1, done["examples"] + examples
            last = step == course.steps
            if step % every == 0 or last:
                report(step, course.steps, float(loss), float(length), done, started)
            if step % save_every == 0 or last or pressed:
                save_state(state_path, to_host({"weights": weights, **state}), {**about, "step": step})
            if pressed:
                raise Interrupted("stopped; the same command goes on from here")
    return to_host(views(weights, shapes))
