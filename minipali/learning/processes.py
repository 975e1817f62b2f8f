"""Processes that compute beside the loop: how they start, how they end, and what they send."""
import contextlib
import multiprocessing
import os
import signal

from minipali.errors import CommandError


@contextlib.contextmanager
def spawned(target, arguments):
    """Start target(*arguments[i], pipe) in a process for each i; gives our ends of the pipes, ends the processes."""
    spawn, pipes, processes = multiprocessing.get_context("spawn"), [], []
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # children ignore Ctrl-C, the parent handles it
    threads = os.environ.get("OMP_NUM_THREADS")
    # One BLAS thread each, unless the environment says otherwise: more would wait for cores that the others use.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        for own in arguments:
            here, there = spawn.Pipe()
            process = spawn.Process(target=target, args=(*own, there), daemon=True)
            process.start()
            there.close()  # the process's copy is then the last one: when it dies, recv raises an error
            pipes.append(here)
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
    """What a process sends, or the error that it ran into. Raises CommandError if it is no longer there."""
    try:
        message = pipe.recv()
    except (EOFError, ConnectionError):
        raise CommandError(f"a worker process died at step {step}, perhaps for lack of memory; with fewer "
                           "--workers the same command goes on from the last saved state") from None
    if isinstance(message, Exception):
        raise message
    return message
