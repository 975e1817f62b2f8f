"""Threads of our own: every piece once, the same bits, errors raised, and OpenBLAS afterwards as it was before."""
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from helpers import ROOT, DeviceArray, seeds
from hypothesis import given
from hypothesis import strategies as st

from minipali import parallel
from minipali.model import ops

BY_ROWS = {"softmax": (), "gelu": (), "layer_norm": ("weight", "bias", 1e-3), "rms_norm": ("weight", 1e-3)}


@pytest.fixture
def threads(monkeypatch):
    """Three threads, however many cores there are, and pieces so small that every test has many."""
    monkeypatch.setattr(parallel, "thread_count", lambda: 3)
    monkeypatch.setattr(parallel, "PIECE", 40)
    monkeypatch.setattr(parallel, "LARGE", 2)


@pytest.mark.parametrize("products", [True, False])
def test_each_piece_is_done_once_and_on_several_threads(threads, products):
    seen, where = [], set()

    def piece(number):
        time.sleep(0.001)
        seen.append(number)
        where.add(threading.get_ident())

    parallel.each(piece, range(50), products)
    assert sorted(seen) == list(range(50))
    assert len(where) == (1 if products and parallel.open_blas() is None else 3)
    parallel.each(piece, [])
    assert len(seen) == 50


def test_a_piece_that_is_cut_up_itself_stays_on_its_thread(threads):
    """Or three threads would each wait for three more, in a pool that has no more."""
    where = []

    def inner(owner):
        where.append(owner == threading.get_ident())

    parallel.each(lambda _: parallel.each(inner, [threading.get_ident()] * 4), range(6))
    assert where == [True] * 24


@pytest.mark.parametrize("thread", ["the caller's", "another"])
def test_the_first_error_is_raised_and_the_rest_is_left(threads, thread):
    caller, done = threading.get_ident(), []

    def piece(number):
        time.sleep(0.002)
        if (threading.get_ident() == caller) == (thread == "the caller's"):
            raise ValueError("this one")
        done.append(number)

    with pytest.raises(ValueError, match="this one"):
        parallel.each(piece, range(10_000), products=False)
    assert len(done) < 100
    parallel.each(done.append, range(3))  # and the pool still works


@pytest.mark.skipif(parallel.open_blas() is None, reason="NumPy has another BLAS here")
def test_openblas_has_one_thread_inside_and_its_own_number_afterwards(threads):
    get, set_to = parallel.open_blas()
    before = get()
    set_to(2)
    try:
        inside = []
        parallel.each(lambda _: inside.append(get()), range(8))
        assert inside == [1] * 8 and get() == 2
        with pytest.raises(ZeroDivisionError):
            parallel.each(lambda number: 1 / number, range(8))
        assert get() == 2
    finally:
        set_to(before)


@pytest.mark.skipif(parallel.open_blas() is None, reason="NumPy has another BLAS here")
def test_as_many_threads_as_openblas_may_use(monkeypatch):
    get, set_to = parallel.open_blas()
    before = get()
    monkeypatch.setattr(parallel, "cores", lambda: 4)
    try:
        for count in [1, 2]:
            set_to(count)
            assert parallel.thread_count() == count
            with parallel._OneBlasThread():  # another thread's `each` must not make this one slow
                assert parallel.thread_count() == count
    finally:
        set_to(before)


def test_without_openblas_products_go_one_after_another(threads, monkeypatch):
    monkeypatch.setattr(parallel, "open_blas", lambda: None)
    where = set()
    parallel.each(lambda _: (time.sleep(0.002), where.add(threading.get_ident())), range(20))
    assert where == {threading.get_ident()}


def test_errstate_reaches_the_threads(threads):
    """`generate` silences overflow for its caller's context; a thread that knew nothing of it would print warnings."""
    x = np.full((9, 40), 1e38, np.float32)
    caller, elsewhere = threading.get_ident(), []

    def overflow(x):
        time.sleep(0.002)
        elsewhere.append(threading.get_ident() != caller)
        return x * 10

    with np.errstate(all="ignore"):
        assert np.isinf(parallel.by_rows(overflow)(x)).all()  # a warning would fail the test
    assert any(elsewhere)


def test_a_forked_process_has_threads_of_its_own(threads):
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    parallel.each(lambda _: None, range(9))
    code = ("import os, signal, sys\n"
            "from minipali import parallel\n"
            "parallel.thread_count = lambda: 3\n"
            "parallel.each(lambda _: None, range(9))\n"
            "if os.fork() == 0:\n"
            "    signal.alarm(10)\n"
            "    parallel.each(lambda _: None, range(9))\n"
            "    os._exit(7)\n"
            "sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))\n")
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, timeout=30).returncode == 7


@given(seeds, st.integers(1, 60), st.integers(1, 60), st.sampled_from(["float32", "float64"]),
       st.sampled_from(sorted(BY_ROWS)))
def test_by_rows_gives_the_same_bits(seed, rows, width, dtype, name):
    rng = np.random.default_rng(seed)
    x, w, b = (rng.standard_normal(size).astype(dtype) for size in [(2, rows, width), width, width])
    rest = [{"weight": w, "bias": b}.get(argument, argument) for argument in BY_ROWS[name]]
    function, kept = getattr(ops, name), x.copy()
    saved = parallel.thread_count, parallel.PIECE, parallel.LARGE
    parallel.thread_count, parallel.PIECE, parallel.LARGE = lambda: 3, 50, 2
    try:
        y = function(x, *rest)
        turned = function(x.swapaxes(0, 1), *rest)
    finally:
        parallel.thread_count, parallel.PIECE, parallel.LARGE = saved
    expected = function.__wrapped__(x, *rest)
    assert y.dtype == expected.dtype and y.shape == x.shape and np.array_equal(y, expected)
    assert np.array_equal(turned, function.__wrapped__(x.swapaxes(0, 1), *rest))
    assert np.array_equal(x, kept)


def test_by_rows_cuts_large_arrays_and_nothing_else(threads):
    sizes = []

    @parallel.by_rows
    def double(x):
        sizes.append(x.shape)
        return x + x

    assert double(np.ones((4, 7, 10), np.float32)).shape == (4, 7, 10)
    assert sizes == [(4, 10)] * 7
    sizes.clear()
    double(np.ones(100, np.float32))                # one row
    double(np.ones((100, 10), np.float32)[:, ::2])  # not in one piece in memory
    double(DeviceArray(np.ones((100, 10))))
    assert sizes == [(100,), (100, 5), (100, 10)]


def test_the_pieces_of_a_real_size():
    """The limits as they are: GELU of a prefill is cut up, a decoded token is not; both are the plain formula."""
    rng = np.random.default_rng(0)
    for rows in [1, 70]:
        x = rng.standard_normal((rows, 16384), np.float32)
        assert np.array_equal(ops.gelu(x), ops.gelu.__wrapped__(x))


@given(seeds, st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 5), st.integers(1, 5))
def test_by_heads_is_a_matrix_product(seed, batch, heads, rows, inner, columns):
    """Cut up or not, and whatever lies between the numbers: keys come transposed."""
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((batch, heads, rows, inner))
    b = rng.standard_normal((batch, columns, heads, inner)).transpose(0, 2, 3, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "thread_count", lambda: 3)
        for large in 1, 1 << 40:
            patch.setattr(parallel, "LARGE_PRODUCT", large)
            assert np.abs(parallel.by_heads(a, b) - a @ b).max() < 1e-12


@pytest.mark.skipif(parallel.open_blas() is None, reason="NumPy has another BLAS here")
def test_heads_never_wake_openblas_threads(threads, monkeypatch):
    """They would go on waiting on a core that the next pieces need. A single head is cut up by its rows."""
    get, set_to = parallel.open_blas()
    before, seen, multiply = get(), [], np.matmul

    def noted(*args, **kwargs):
        seen.append((get(), args[0].shape[-2]))
        return multiply(*args, **kwargs)

    class Noted(type(np)):
        def __getattr__(self, name):
            return noted if name == "matmul" else getattr(np, name)

    set_to(2)
    try:
        monkeypatch.setattr(parallel, "np", Noted("noted"))
        monkeypatch.setattr(parallel, "LARGE_PRODUCT", 8)
        parallel.by_heads(np.ones((1, 1, 8, 4)), np.ones((1, 1, 4, 3)))
        assert len(seen) > 1 and all(count == 1 and rows < 8 for count, rows in seen) and get() == 2
    finally:
        set_to(before)


@pytest.mark.skipif(parallel.open_blas() is None, reason="NumPy has another BLAS here")
def test_small_heads_keep_openblas_to_one_thread(threads, monkeypatch):
    get, set_to = parallel.open_blas()
    before, held = get(), []

    class Noted(parallel._OneBlasThread):
        def __enter__(self):
            super().__enter__()
            held.append(get())

    monkeypatch.setattr(parallel, "_OneBlasThread", Noted)
    set_to(2)
    try:
        parallel.by_heads(np.ones((1, 1, 2, 4)), np.ones((1, 1, 4, 3)))
        assert held == [1] and get() == 2
    finally:
        set_to(before)
