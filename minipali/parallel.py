"""One small pool of threads, so that large arrays keep every core busy. NumPy lets other threads run while it computes.

OpenBLAS, which multiplies NumPy's matrices, has threads of its own. They wait for one another after every product, so
that two of them can be slower than one as soon as another program wants a core. Work that goes through `each` is
therefore cut into many pieces, a thread takes the next piece when it is free, and OpenBLAS itself uses one thread until
the work is done. Afterwards it is as it was: importing this file, or computing with it, changes nothing that lasts.
"""
import contextvars
import ctypes
import functools
import glob
import os
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np

PIECE = 1 << 16     # numbers in a piece of rows: with the arrays in between it stays in a core's own cache
LARGE = 1 << 20     # numbers from which an array is cut up: below, handing out pieces costs more than it saves
LARGE_PRODUCT = 1 << 24  # multiplications from which the product of two stacks is cut up

_inside = threading.local()     # .piece is True in a thread that works on a piece of `each`
_lock = threading.Lock()
_pool = None                    # (id of the process, ThreadPoolExecutor): a forked process has none of the threads
_users, _before = 0, 1          # how many calls hold OpenBLAS to one thread, and how many threads it had before


@functools.cache
def open_blas():
    """The functions (threads now, use so many threads) of the OpenBLAS that NumPy loaded, or None.

    NumPy's wheels bring one in a folder beside the package, where each version has put other marks on the names. Other
    libraries (MKL, Accelerate) are left alone: they share out the cores themselves.
    """
    folder = os.path.dirname(np.__file__)
    places = [f"{folder}.libs/*openblas*", f"{folder}/.dylibs/*openblas*", f"{folder}/../../../libopenblas*"]
    try:  # where the system's package manager put it, the process itself knows which
        with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
            loaded = {line.split(maxsplit=5)[-1].strip() for line in maps if "openblas" in line}
    except OSError:
        loaded = set()
    for path in sorted(loaded) or sorted(path for place in places for path in glob.glob(place)):
        try:
            library = ctypes.CDLL(path)
        except OSError:
            continue
        for before in ["scipy_", ""]:
            for after in ["64_", "_64_", "_64", "", "_"]:
                names = f"{before}openblas_get_num_threads{after}", f"{before}openblas_set_num_threads{after}"
                if all(hasattr(library, name) for name in names):
                    return tuple(getattr(library, name) for name in names)
    return None


def cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def thread_count():
    """How many threads work on the pieces: as many as OpenBLAS may use, so OPENBLAS_NUM_THREADS counts here, too."""
    if open_blas() is None:
        return cores()
    with _lock:
        return max(1, min(cores(), _before if _users else open_blas()[0]()))


class _OneBlasThread:
    """`with _OneBlasThread():` products are computed by the thread that asks for them. Calls may overlap."""

    def __enter__(self):
        global _users, _before
        if open_blas():
            get, set_to = open_blas()
            with _lock:
                if not _users:
                    _before = get()
                    set_to(1)
                _users += 1

    def __exit__(self, *_):
        global _users
        if open_blas():
            with _lock:
                _users -= 1
                if not _users:
                    open_blas()[1](_before)


def _workers(count):
    """The pool of this process, made when it is first needed."""
    global _pool
    with _lock:
        if _pool is None or _pool[0] != os.getpid() or _pool[1]._max_workers < count:
            _pool = os.getpid(), ThreadPoolExecutor(count, "minipali")
        return _pool[1]


def each(function, pieces, products=True):
    """Call function(piece) for every piece, on all threads; it returns when all are done. Results go into arrays that
    `function` writes to, each piece to a place of its own.

    `products`: the function multiplies matrices; without an OpenBLAS that can be held to one thread such pieces then go
    one after another, since the library spreads each by itself. The first exception stops the rest and is raised here.
    """
    work = deque(pieces)
    count = min(thread_count(), len(work))
    if count < 2 or getattr(_inside, "piece", False) or products and open_blas() is None:
        for piece in work:
            function(piece)
        return

    def take():
        _inside.piece = True
        try:
            while True:
                try:
                    piece = work.popleft()
                except IndexError:
                    return
                function(piece)
        except BaseException:
            work.clear()
            raise
        finally:
            _inside.piece = False

    with _OneBlasThread():
        # np.errstate belongs to the context that it was entered in, so each thread gets a copy of the caller's.
        others = [_workers(count - 1).submit(contextvars.copy_context().run, take) for _ in range(count - 1)]
        try:
            take()
        finally:
            failed = [other.exception() for other in others]
    for error in failed:
        if error is not None:
            raise error


def by_rows(function):
    """For a function f(x, …) of ops.py whose rows (…, D) do not see each other: a large x goes through in pieces that
    fit the cache, on all threads. Small ones and arrays of a device go straight through. The bits are the same."""
    @functools.wraps(function)
    def in_pieces(x, *args, **kwargs):
        if type(x) is not np.ndarray or x.size < LARGE or x.ndim < 2 or not x.flags.c_contiguous:
            return function(x, *args, **kwargs)
        rows = x.reshape(-1, x.shape[-1])
        y = np.empty_like(rows)
        step = max(1, PIECE // rows.shape[1])

        def piece(start):
            y[start:start + step] = function(rows[start:start + step], *args, **kwargs)

        each(piece, range(0, len(rows), step), products=False)
        return y.reshape(x.shape)
    return in_pieces


def by_heads(a, b):
    """a @ b of two stacks of matrices, as attention multiplies head by head: large ones piece by piece, on all threads.

    OpenBLAS's own threads would keep a core busy with waiting for a while after such a product, and the pieces that
    come next want that core: with them, a 3B model's picture takes nearly twice as long. So a small product is computed
    by the thread that asks for it.
    """  # (..., rows, inner), (..., inner, columns) -> (..., rows, columns)
    if type(a) is not np.ndarray or type(b) is not np.ndarray or open_blas() is None or thread_count() == 1:
        return a @ b
    if a.size * b.shape[-1] < LARGE_PRODUCT:
        with _OneBlasThread():
            return a @ b
    y = np.empty((*a.shape[:-1], b.shape[-1]), np.result_type(a, b))
    step = max(1, -(-a.shape[-2] // thread_count()))  # enough pieces for all threads where there is a single head

    def piece(place):
        index, start = place
        np.matmul(a[index][start:start + step], b[index], out=y[index][start:start + step])

    each(piece, [(index, start) for index in np.ndindex(a.shape[:-2]) for start in range(0, a.shape[-2], step)])
    return y
