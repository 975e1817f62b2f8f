"""The training loop: draw, learn, show, save; stop at any moment and go on bit for bit.

What a run needs to go on is one file: the weights, the optimizer's two averages and the number of steps done. It is
written under another name and then renamed, so that no moment exists at which the only copy is half written. Batches
and learning rates follow from the step's number alone.
"""
import contextlib
import math
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from minipali.backend import to_device, to_host
from minipali.checkpoint.tensors import flatten
from minipali.errors import InputError, Interrupted
from minipali.learning.gradients import gradients_of
from minipali.learning.optimizer import (
    adamw,
    clip,
    hidden_matrices,
    learning_rate,
    muon,
    pack,
    views,
)
from minipali.learning.processes import keep_freed_memory
from minipali.learning.state import load_state, save_state


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
