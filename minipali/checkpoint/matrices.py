"""Matrices that stay compact: they lie in the file's 16 bits, or in 8, and are multiplied in float32.

Such a matrix has `.shape`, `.dtype` (that of its results), `.T`, rows by index and `x @ w.T`, so `linear`, `embed` and
the output head take it as they take an array, and the model's code does not know which of the two it has.

A product goes tile by tile. A thread turns a tile of the matrix into float32, in a piece of memory of its own that fits
the cache, and multiplies it there. So the main memory gives 2 bytes a number, or 1, in place of 4: it is what decoding
waits for, since each token reads all weights once. The sums are those of the upcast matrix, in another order.
"""
import math
import threading

import numpy as np

from minipali.checkpoint.safetensors_file import from_bfloat16
from minipali.parallel import each, thread_count

TILE = 1 << 19          # numbers of a tile: 2 MB in float32
TILE_COLUMNS = 2048     # its width where several rows of x meet it; then it is 256 high
FEW = 32                # so many rows of x are few: decoding several answers together
SMALL_PRODUCT = 900_000

_memory = threading.local()


def _own_memory(use, dtype, *shape):
    """Memory of the running thread for one `use`: new memory would be cleared by the system each time."""
    size, memory = math.prod(shape) * np.dtype(dtype).itemsize, getattr(_memory, use, None)
    if memory is None or memory.size < size:
        memory = np.empty(size, np.uint8)
        setattr(_memory, use, memory)
    return memory[:size].view(dtype).reshape(shape)


def multiply(tile, x, out):
    """tile (..., rows, k) times x (..., k, n) for few columns n, written to out (..., rows, n).

    For a few columns, OpenBLAS would spend most of its time on bringing the tile into another order first. Where it has
    kernels that do without, it uses them for products of up to a million multiplications: four times as fast.
    """
    k, n = x.shape[-2:]
    rows, there = max(1, SMALL_PRODUCT // (k * n)), tile.shape[-2]
    if n == 1 or rows >= there:
        np.matmul(tile, x, out=out)
        return
    whole = there // rows * rows  # as many small products as fit, in one call; then what is left
    parts = [array[..., :whole, :].reshape(*array.shape[:-2], -1, rows, array.shape[-1]) for array in (tile, out)]
    np.matmul(parts[0], x[..., None, :, :], out=parts[1])
    if whole < there:
        np.matmul(tile[..., whole:, :], x, out=out[..., whole:, :])


class Matrix:
    """A matrix (out, in) of weights. `stored`: its numbers as they are kept.

    `__array_ufunc__ = None` is NumPy's way to say: leave `x @ w.T` to the right side.
    """
    __array_ufunc__ = None
    dtype = np.dtype(np.float32)
    ndim = 2
    halves = 1  # 2 where even and odd columns are multiplied apart

    def __init__(self, stored):
        self.stored = stored

    shape = property(lambda self: self.stored.shape)
    size = property(lambda self: self.stored.size)
    T = property(lambda self: Transposed(self))

    def upcast(self, index):
        """The part of the matrix that `index` chooses, exactly, in float32."""
        return self.stored[index].astype(np.float32)

    def __getitem__(self, index):
        return self.upcast(index)

    def __array__(self, dtype=None, copy=None):
        """The whole as an array, for what needs one."""
        return self.upcast(slice(None)).astype(dtype or np.float32, copy=False)

    def __array_function__(self, function, types, args, kwargs):
        """Arrays made `like` this matrix are NumPy's."""
        if function is np.empty_like:
            return np.empty(kwargs["shape"], kwargs.get("dtype") or self.dtype)
        return function(*args, **kwargs) if function in (np.asarray, np.array) else NotImplemented

    def tile(self, part):
        """A part of `stored` in float32: (halves, rows, columns / halves)."""
        tile = _own_memory("tile", np.float32, 1, *part.shape)
        np.copyto(tile[0], part)
        return tile

    def times(self, x):
        """x (n, in) times the transposed matrix -> (n, out)."""
        # With two halves, column 2i goes with half 0 and column 2i + 1 with half 1, in the matrix and here.
        x = np.ascontiguousarray(x.reshape(len(x), -1, self.halves).transpose(2, 0, 1))
        return self._times_few(x.transpose(0, 2, 1)) if x.shape[1] <= FEW else self._times_many(x)

    def _times_few(self, x):
        """The product for one row, as decoding needs it, or for a few, as decoding several answers does.

        Between two calls of NumPy only one thread at a time may run, and a tile takes but 0.1 ms. So a thread takes
        several tiles at once and does little else between them: with more Python here, two threads are hardly faster
        than one.
        """  # (halves, in / halves, n) -> (n, out)
        (height, width), n = self.shape, x.shape[2]
        columns = width if n == 1 else TILE_COLUMNS  # for one row, tiles of whole rows, which lie in one piece
        starts, rows = cut(height, max(1, TILE // columns))
        shares = min(len(starts), 4 * thread_count())
        y = np.empty((self.halves, height, n), np.result_type(x, np.float32))

        def share(first):
            for start in starts[first::shares]:
                own = y[:, start:start + rows]
                for left in range(0, width, columns):
                    tile = self.tile(self.stored[start:start + rows, left:left + columns])
                    out = own if left == 0 else _own_memory("product", y.dtype, *own.shape)
                    multiply(tile, x[:, left // self.halves:left // self.halves + tile.shape[2]], out)
                    if left:
                        own += out

        each(share, range(shares))
        return y.sum(0).T

    def _times_many(self, x):
        """The same for many rows, as a prefill needs it."""  # (halves, n, in / halves) -> (n, out)
        height, width = self.shape
        starts, rows = cut(height, max(1, TILE // TILE_COLUMNS))
        y = np.empty((x.shape[1], height), np.result_type(x, np.float32))

        def piece(start):
            own = slice(start, min(start + rows, height))
            for left in range(0, width, TILE_COLUMNS):
                tile = self.tile(self.stored[own, left:left + TILE_COLUMNS])
                across = slice(left // self.halves, left // self.halves + tile.shape[2])
                for half in range(self.halves):
                    if left == half == 0:
                        np.matmul(x[0, :, across], tile[0].T, out=y[:, own])
                    else:
                        product = _own_memory("product", y.dtype, x.shape[1], own.stop - own.start)
                        np.matmul(x[half, :, across], tile[half].T, out=product)
                        y[:, own] += product

        each(piece, starts)
        return y


class Transposed:
    """What `w.T` gives: `x @ w.T` is its only use."""
    __array_ufunc__ = None

    def __init__(self, matrix):
        self.matrix = matrix

    T = property(lambda self: self.matrix)
    shape = property(lambda self: self.matrix.shape[::-1])
    dtype = property(lambda self: self.matrix.dtype)

    def __rmatmul__(self, x):
        if x.shape[-1] != self.shape[0]:
            raise ValueError(f"{x.shape} @ {self.shape}: the sizes {x.shape[-1]} and {self.shape[0]} differ")
        return self.matrix.times(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


def cut(height, rows):
    """Starts and size of pieces of about `rows` rows, as many for each thread, since the last one must not wait."""
    threads = thread_count()
    pieces = -(-height // rows)
    pieces = min(-(-pieces // threads) * threads, height)
    rows = -(-height // pieces)
    rows = min(-(-rows // 16) * 16, height) if rows > 16 else rows  # whole blocks of the product's innermost loop
    return range(0, height, rows), rows


class Float32(Matrix):
    """As it lies in the file. Nothing is converted, and OpenBLAS's own threads are the faster ones then, save for a few
    rows (see `multiply`)."""

    def upcast(self, index):
        return np.array(self.stored[index])

    def tile(self, part):
        return part[None]

    def times(self, x):
        return super().times(x) if 1 < len(x) <= FEW else x @ self.stored.T


class BFloat16(Matrix):
    """`stored`: bits (out, in) of uint16, `in` even, at an even place.

    A bfloat16 is the upper half of a float32. Two neighbors are one uint32: shifted up, it is the even one (on this,
    little-endian, side), and with its lower half masked, the odd one. Each takes one pass over the tile.
    """
    halves = 2

    def upcast(self, index):
        return from_bfloat16(self.stored[index])

    def tile(self, part):
        pairs = part.view(np.uint32)
        tile = _own_memory("tile", np.uint32, 2, *pairs.shape)
        np.left_shift(pairs, 16, out=tile[0])
        np.bitwise_and(pairs, np.uint32(0xFFFF0000), out=tile[1])
        return tile.view(np.float32)


class Int8(Matrix):
    """`stored` (out, in) of int8 times `scale` (out, 1) of float32: a number is off by half a scale at most."""

    def __init__(self, stored, scale):
        super().__init__(stored)
        self.scale = scale

    def upcast(self, index):
        rows = index[0] if isinstance(index, tuple) else index
        return self.stored[index].astype(np.float32) * self.scale[rows]

    def times(self, x):
        y = super().times(x)
        y *= self.scale[:, 0]
        return y
