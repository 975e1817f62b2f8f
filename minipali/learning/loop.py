"""The training loop: compute a gradient, update, report, save. A run can stop at any step and go on bit for bit.

What a run needs to continue is one file: the weights, the optimizer's two averages and the number of steps done. It is
written under another name and then renamed, so that a complete copy exists at every moment. Batches and learning rates
follow from the step's number alone.
"""
import contextlib
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from minipali.backend import keep_freed_memory, to_device, to_host
from minipali.checkpoint.tensors import flatten
from minipali.errors import InputError, Interrupted
from minipali.learning.gradients import gradients_of
from minipali.learning.optimizer import (
    adamw,
    clip_factor,
    gradient_norm,
    hidden_matrices,
    learning_rate,
    muon,
    pack,
    piece_size,
    spans,
    views,
)
from minipali.learning.stage import Stage
from minipali.learning.state import load_state, save_state


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: the optimizer's settings, the learning rate's schedule, and how many batches make a step.

    `muon` is how many times AdamW's rate the hidden matrices get, from Muon; at 0 AdamW moves them like all others.
    With `fall` the rate stays at its peak until so many steps before the end; until then `steps` may still be changed.
    The rate of weights whose names begin with `late` rises in a straight line over `late_steps` steps.
    """
    steps: int
    rate: float
    warmup: int
    muon: float = 0.0
    fall: int | None = None
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


def progress(step, steps, loss, norm, done, started, stream=sys.stderr):
    """One line: step, loss, the gradient's norm, examples a second, time left."""
    here, seconds = done["steps"], time.monotonic() - started
    left = int(seconds / max(here, 1) * (steps - step))
    line = (f"step {step}/{steps}  loss {loss:.4f}  gradient {norm:.2f}  {done['examples'] / seconds:.0f} examples/s"
            f"  {left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left")
    again = stream.isatty() and step < steps  # the next line overwrites this one
    print(f"\r{line:<90}" if stream.isatty() else line, end="" if again else "\n", file=stream, flush=True)


def update(schedule, step, weights, gradients, norm, averages, shapes):
    """Step number `step`, counted from 0: weights and averages, in place, from {name: gradient} of this norm.

    Weight decay is for matrices: there is no reason to pull a norm's scale or a bias toward 0.
    """
    number, factor = weights.dtype.type, clip_factor(norm, schedule.clip)
    rate = learning_rate(step, schedule.steps, schedule.rate, schedule.warmup, schedule.fall)
    missing = max(0.0, 1 - (step + 1) / schedule.late_steps) if schedule.late_steps else 0.0
    matrices = hidden_matrices(shapes) if schedule.muon else {}
    for name, span in spans(shapes).items():
        late, decay = name.startswith(schedule.late), schedule.decay * (len(shapes[name]) > 1)
        # Muon's matrices have their averages from AdamW as well, and at rate 0 nothing else.
        adam_rate = number(rate) * (1 - number(missing) * late) * (name not in matrices)
        gradient, size = gradients[name].reshape(-1), piece_size(weights)
        for start in range(0, span.stop - span.start, size):
            part = slice(span.start + start, min(span.start + start + size, span.stop))
            adamw(weights[part], gradient[start:start + size] * factor, {key: x[part] for key, x in averages.items()},
                  step + 1, adam_rate, schedule.beta1, schedule.beta2, schedule.eps, decay)
        if name in matrices:
            matrix, first = (vector[span].reshape(matrices[name]) for vector in (weights, averages["first"]))
            muon(matrix, gradient.reshape(matrices[name]) * factor, first, schedule.muon * rate * (1 - missing * late),
                 schedule.beta1, schedule.decay)


def train(stage: Stage, params: dict | Callable[[], dict], schedule: Schedule, state_path: Path,
          workers: int = 1, backend: str = "numpy", every: int = 20, save_every: int = 200,
          report: Callable = progress) -> dict:
    """Train `params`, a tree on the host, on a stage's batches; returns the trained tree, on the host.

    `params` may be a function that gives the tree, which then is nowhere in memory beside the weights in training.
    Goes on from `state_path` if that file exists. Raises Interrupted after Ctrl-C, with the state saved, and InputError
    at a gradient that is not finite, with the last saved state untouched: such a step would turn every weight into NaN.
    """
    keep_freed_memory()
    weights, params = pack(params() if callable(params) else params)
    shapes, step = {name: array.shape for name, array in flatten(params).items()}, 0
    about = {**stage.identity(), **asdict(schedule), "shapes": {name: list(shape) for name, shape in shapes.items()}}
    averages = {"first": np.zeros_like(weights), "second": np.zeros_like(weights)}
    del params  # views: they would keep the vector when the weights move
    if Path(state_path).exists():
        averages, step = load_state(state_path, about)
        weights = averages.pop("weights")
    averages = to_device(averages, backend)
    done, started = {"steps": 0, "examples": 0}, time.monotonic()
    with interrupts() as pressed, gradients_of(stage, weights, shapes, range(step, schedule.steps), schedule.shards,
                                               workers, backend) as (weights, source):
        for loss, gradients, examples in source:
            with np.errstate(over="ignore", invalid="ignore"):  # reported below
                norm = gradient_norm([gradients[name] for name in shapes])
            if not np.isfinite(norm):
                raise InputError(f"{state_path}: the gradient of step {step + 1} is not finite; the state saved before "
                                 "it stays as it was")
            update(schedule, step, weights, gradients, norm, averages, shapes)
            del gradients  # before the next ones are made
            step += 1
            done["steps"], done["examples"] = done["steps"] + 1, done["examples"] + examples
            last = step == schedule.steps
            if step % every == 0 or last:
                report(step, schedule.steps, float(loss), float(norm), done, started)
            if step % save_every == 0 or last or pressed:
                save_state(state_path, to_host({"weights": weights, **averages}), {**about, "step": step})
            if pressed:
                raise Interrupted("stopped; the same command goes on from here")
    return to_host(views(weights, shapes))
