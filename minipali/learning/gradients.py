"""A step's gradient: the mean over a few batches, its shards, which as many processes can compute at the same time.

How many do changes no bit of what comes out: see `mean`. (Several BLAS threads might; learners therefore have one.)
"""
import contextlib
import itertools
import multiprocessing

import numpy as np

from minipali.backend import keep_freed_memory, to_device
from minipali.checkpoint.tensors import flatten
from minipali.learning.optimizer import views
from minipali.learning.processes import received, spawned


def mean(shards):
    """Of (loss, {name: gradient}, number of examples), one after the other: mean loss, mean gradients, all examples.

    They are added in the order of the shards and not in that of their arrival: (a + b) + c is not a + (b + c) in
    floating point, and a run that continued with another number of processes would give other results. Only the sum and
    one shard's gradients are in memory at any time, and none of the given arrays changes.
    """
    count, loss, examples, total = 0, 0, 0, {}
    for shard_loss, gradients, shard_examples in shards:
        count, loss, examples = count + 1, loss + shard_loss, examples + shard_examples
        if count == 1:
            total, gradients = gradients, {}
        for name in list(gradients):
            total[name] = total[name] + gradients.pop(name)
    if count > 1:
        for name in total:
            total[name] = total[name] / count
    return loss / count, total, examples


def _draw_batches(stage, numbers, pipe):
    """What a worker does: batch after batch into the pipe, each kept until the loop has taken the one before."""
    try:
        for number in numbers:
            pipe.send(stage.batch(number))
    except ConnectionError:  # the loop has ended: nobody needs the rest
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
    with spawned(_draw_batches, [(stage, numbers[worker::workers]) for worker in range(workers)]) as pipes:
        yield (received(pipes[i % workers], number) for i, number in enumerate(numbers))


def _shard(stage, params, batch):
    """One batch -> loss, {name: gradient}, number of examples."""
    loss, gradients = stage.loss_and_gradient(params, batch)
    return loss, flatten(gradients), stage.examples(batch)


def _computed_here(stage, params, source, shards, backend):
    """The mean of each step, for as long as `source` has batches."""
    while drawn := list(itertools.islice(source, shards)):
        yield mean(_shard(stage, params, to_device(batch, backend)) for batch in drawn)


def _learn(stage, shapes, dtype, weights, gradients, shards, own, steps, pipe):
    """What a learner does: draw its own shards of a step while the loop updates the weights, wait until it has, put
    their gradients where the loop sees them, and their losses into the pipe."""
    keep_freed_memory()
    params = views(np.frombuffer(weights, dtype), shapes)
    vectors = np.frombuffer(gradients, dtype).reshape(shards, -1)
    places = {shard: flatten(views(vectors[shard], shapes)) for shard in own}
    try:
        for step in steps:
            drawn = {shard: stage.batch(step * shards + shard) for shard in own}
            pipe.recv()
            answers = []
            for shard, batch in drawn.items():
                loss, computed, examples = _shard(stage, params, batch)
                for name, place in places[shard].items():
                    place[...] = computed.pop(name)
                answers.append((loss, examples))
            pipe.send(answers)
    except (EOFError, ConnectionError):  # the loop has ended
        pass
    except Exception as error:  # noqa: BLE001 - the loop raises it
        pipe.send(error)


def _learned(pipes, vectors, shapes, steps):
    """The mean of each step, from what the learners computed. It takes the first shard's place in the shared memory."""
    answers, total = [None] * len(vectors), vectors[0]
    for step in steps:
        for pipe in pipes:
            with contextlib.suppress(ConnectionError):  # what became of the learner is said below
                pipe.send(step)
        for worker, pipe in enumerate(pipes):
            answers[worker::len(pipes)] = received(pipe, step)
        for vector in vectors[1:]:
            total += vector
        total /= len(vectors)
        loss = sum(loss for loss, _ in answers) / len(answers)
        yield loss, flatten(views(total, shapes)), sum(examples for _, examples in answers)


@contextlib.contextmanager
def gradients_of(stage, weights, shapes, steps, shards, workers, backend):
    """The weights, where the loop is to change them in place, and an iterator of (loss, {name: gradient}, examples) of
    each step: taking the next one computes it from the weights as they are then.

    NumPy: `workers` learners share the weights, each with every workers-th shard of a step (0: all here). A GPU is
    itself many workers, so there the processes draw batches ahead.
    """
    if backend == "numpy" and workers:
        workers = min(workers, shards)
        memory = [multiprocessing.RawArray("b", weights.nbytes * size) for size in (1, shards)]
        shared, gradients = (np.frombuffer(raw, weights.dtype) for raw in memory)
        shared[:] = weights
        common = stage, shapes, weights.dtype, *memory, shards
        del weights  # from here on the shared ones are the only ones
        with spawned(_learn, [(*common, range(i, shards, workers), steps) for i in range(workers)]) as pipes:
            yield shared, _learned(pipes, gradients.reshape(shards, -1), shapes, steps)
        return
    weights = to_device(weights, backend)
    numbers = range(steps.start * shards, steps.stop * shards)
    with batches(stage, numbers, workers) as source:
        yield weights, _computed_here(stage, views(weights, shapes), source, shards, backend)
