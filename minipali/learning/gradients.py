"""A step's gradient: the mean over a few batches, its shards, which as many processes can compute at the same time.

How many do changes no bit of what comes out: see `average`. (Several BLAS threads might; learners therefore have one.)
"""
import contextlib
import itertools
import multiprocessing

import numpy as np

from minipali.backend import to_device
from minipali.learning.optimizer import gather, views
from minipali.learning.processes import keep_freed_memory, received, spawned


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
