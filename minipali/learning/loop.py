"""The training loop: draw, learn, show, save; stop at any moment and go on bit for bit.

What a run needs to go on is one file: the weights, the optimizer's two averages and the number of steps done. It is
written under another name and then renamed, so that no moment exists at which the only copy is half written. Batches
and learning rates follow from the step's number alone.
"""
import contextlib
import ctypes
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

from minipali.io.backend import to_device, to_host
from minipali.io.config import Unusable
from minipali.io.weights import flatten
from minipali.learning.optimizer import adamw, clip, gather, learning_rate, pack, views


@dataclass(frozen=True)
class Course:
    """How long and how fast: AdamW's settings and the learning rate's course."""
    steps: int
    rate: float
    warmup: int
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    decay: float = 0.02
    clip: float = 1.0


class Stopped(Exception):
    """The run was interrupted, after it had saved where it is."""


def keep_freed_memory():
    """Tell glibc to keep what is freed. By default it gives every large array back to the system at once and clears
    its pages anew for the next: a third of a training step. Elsewhere there is nothing to tell."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


# --- batches, drawn ahead -----------------------------------------------------------------------------------------------

def _draw(stage, steps, pipe):
    """A worker's life: batch after batch into the pipe, each kept until the loop has taken the one before."""
    try:
        for step in steps:
            pipe.send(stage.batch(step))
    except BrokenPipeError:  # the loop has gone: nobody needs the rest
        pass
    except Exception as error:  # noqa: BLE001 - the loop raises it
        pipe.send(error)


def _received(pipes, steps):
    for i, step in enumerate(steps):
        try:
            batch = pipes[i % len(pipes)].recv()
        except EOFError:
            raise RuntimeError(f"the worker that drew the batch of step {step} has died") from None
        if isinstance(batch, Exception):
            raise batch
        yield batch


@contextlib.contextmanager
def batches(stage, steps, workers):
    """An iterator of the batches of `steps` in order, drawn ahead in so many processes (0: here, when asked).

    The workers take turns, each with a pipe of its own, so their number changes no batch and no order.
    """
    if not workers:
        yield map(stage.batch, steps)
        return
    spawn, pipes, processes = multiprocessing.get_context("spawn"), [], []
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # workers are born deaf to Ctrl-C: the loop answers it
    try:
        for worker in range(workers):
            ours, theirs = spawn.Pipe(duplex=False)
            process = spawn.Process(target=_draw, args=(stage, steps[worker::workers], theirs), daemon=True)
            process.start()
            theirs.close()  # the worker's copy is then the last one: if it dies, recv says so
            pipes.append(ours)
            processes.append(process)
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        yield _received(pipes, steps)
    finally:
        for process in processes:
            process.terminate()
            process.join()


# --- saving and going on ------------------------------------------------------------------------------------------------

def save_state(path, arrays, about):
    """Weights and averages as one safetensors file; `about` says what they belong to. Raises Unusable if it cannot."""
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays, temporary, metadata={"about": json.dumps(about)})
        os.replace(temporary, path)
    except (SafetensorError, OSError) as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise Unusable(f"{path}: the training state cannot be written ({error})") from None


def load_state(path, about):
    """The arrays and the number of steps done; raises Unusable if the file belongs to another run than `about`."""
    try:
        with safe_open(path, framework="np") as file:
            found = json.loads(file.metadata()["about"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        step = found.pop("step")
    except (SafetensorError, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise Unusable(f"{path}: not a training state ({error})") from None
    about = json.loads(json.dumps(about))  # as the file tells it, where a tuple is a list
    differing = sorted(key for key in {*found, *about} if found.get(key) != about.get(key))
    if differing:
        raise Unusable(f"{path}: belongs to a run with another {', '.join(differing)}; give another folder or delete it")
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

    Goes on from `state_path` if that file exists. Raises Stopped after Ctrl-C, with the state saved.
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
    weights, state, decay = (to_device(tree, backend) for tree in (weights, state, decay))
    params, done, started = views(weights, shapes), {"steps": 0, "examples": 0}, time.monotonic()
    with interrupts() as pressed, batches(stage, range(step, course.steps), workers) as source:
        for batch in source:
            loss, grads = stage.loss_and_gradient(params, to_device(batch, backend))
            gradient, length = clip(gather(grads, shapes), course.clip)
            rate = learning_rate(step, course.steps, course.rate, course.warmup)
            adamw(weights, gradient, state, step + 1, rate, course.beta1, course.beta2, course.eps, decay)
            step += 1
            done["steps"], done["examples"] = done["steps"] + 1, done["examples"] + stage.examples(batch)
            last = step == course.steps
            if step % every == 0 or last:
                report(step, course.steps, float(loss), float(length), done, started)
            if step % save_every == 0 or last or pressed:
                save_state(state_path, to_host({"weights": weights, **state}), {**about, "step": step})
            if pressed:
                raise Stopped
    return to_host(params)
