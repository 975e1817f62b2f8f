"""Masks as tokens: the VQ-VAE that turns a 64x64 mask into 16 codes `<seg000>` ... `<seg127>` and back.

A segmentation answer is four `<loc>` tokens (the box) and sixteen `<seg>` tokens (the mask inside the box, on a 4x4
grid, row by row). The code book and both networks come from "All in Tokens" (arXiv 2301.02229); the published file
is `vae-oid.npz`. Images are laid out (B,C,height,width), as in that file. Every size is read off the arrays; in the
shape lines, k is the side of a kernel and V the number of codes in the book, each a vector of width D.
"""

import numpy as np

GRID = 4  # codes along a side of the mask: 64 pixels halved four times
DOWN = ["0", "2", "4", "6"]  # the gaps in the numbering are the ReLUs of the original nn.Sequential
UP = ["4", "6", "8", "10"]


def im2col(x, kernel, stride):
    """Collect the pixels that the kernel covers at every output position; return the rows and columns of these as well.

    Each tap of the kernel sees one strided slice of the picture.
    """  # (B,C,height,width) -> (B,C*k*k,rows*columns), (), ()
    batch, channels, height, width = x.shape
    rows, columns = (height - kernel[0]) // stride + 1, (width - kernel[1]) // stride + 1
    taps = [
        x[:, :, i:i + stride * (rows - 1) + 1:stride, j:j + stride * (columns - 1) + 1:stride]
        for i in range(kernel[0])
        for j in range(kernel[1])
    ]
    return np.stack(taps, axis=2).reshape(batch, channels * kernel[0] * kernel[1], rows * columns), rows, columns


def col2im(taps, kernel, stride, rows, columns, height, width):
    """Add every tap to the pixel that `im2col` would take it from: the transpose of `im2col` as a matrix."""
    # (B,C*k*k,rows*columns) -> (B,C,height,width)
    batch, channels = len(taps), taps.shape[1] // (kernel[0] * kernel[1])
    taps = taps.reshape(batch, channels, *kernel, rows, columns)
    x = np.zeros_like(taps, shape=(batch, channels, height, width))
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            last_row, last_column = i + stride * (rows - 1), j + stride * (columns - 1)
            x[:, :, i:last_row + 1:stride, j:last_column + 1:stride] += taps[:, :, i, j]
    return x


def conv2d(x, weight, bias, stride, padding):
    """Correlate `x` with each kernel; `padding` is ((top, bottom), (left, right)) rows and columns of zeros."""
    # (B,in,height,width), (out,in,k,k), (out,) -> (B,out,rows,columns)
    taps, rows, columns = im2col(np.pad(x, ((0, 0), (0, 0), *padding)), weight.shape[2:], stride)
    y = weight.reshape(len(weight), -1) @ taps
    return y.reshape(len(x), len(weight), rows, columns) + bias[:, None, None]


def same_padding(size, kernel, stride):
    """Zeros before and after an axis so that the output has ceil(size / stride) positions (TensorFlow's "SAME").

    When the total is odd the extra zero comes after: kernel 3 and stride 2 on an even size pad (0, 1), where PyTorch's
    padding=1 would pad (1, 1) and shift the picture by a pixel. Kernel 4 and stride 2 pad (1, 1) in both.
    """
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def conv2d_same(x, weight, bias, stride):
    """A convolution with "SAME" padding: ceil(height / stride) rows come out, and ceil(width / stride) columns."""
    # (B,in,height,width), (out,in,k,k), (out,) -> (B,out,rows,columns)
    padding = [same_padding(size, kernel, stride) for size, kernel in zip(x.shape[2:], weight.shape[2:])]
    return conv2d(x, weight, bias, stride, padding)


def conv_transpose2d(x, weight, bias, stride, padding):
    """Add the kernel, times each input pixel, to the output, `stride` pixels apart, then crop `padding` all round.

    This is `conv2d` with `im2col` replaced by its transpose, hence the name and the swapped weight axes (in,out,k,k).
    The other way to write it, inserting stride-1 zeros between pixels, padding by k-1-padding and correlating, needs
    the kernel flipped in both directions: what the input paints right of itself, the output finds by looking left.
    """  # (B,in,rows,columns), (in,out,k,k), (out,) -> (B,out,height,width)
    kernel, (rows, columns) = weight.shape[2:], x.shape[2:]
    taps = weight.reshape(len(weight), -1).T @ x.reshape(*x.shape[:2], rows * columns)
    height, width = stride * (rows - 1) + kernel[0], stride * (columns - 1) + kernel[1]
    y = col2im(taps, kernel, stride, rows, columns, height, width)
    return y[:, :, padding:height - padding, padding:width - padding] + bias[:, None, None]


def relu(x):
    """max(x, 0)."""
    return np.maximum(x, 0)


def residual_block(x, net):
    """x + conv(relu(conv(relu(conv(x))))); no ReLU after the sum, unlike a ResNet's block."""
    # (B,C,height,width) -> (B,C,height,width)
    y = relu(conv2d_same(x, **net["0"], stride=1))
    y = relu(conv2d_same(y, **net["2"], stride=1))
    return x + conv2d_same(y, **net["4"], stride=1)


def encoder(x, p):
    """From a mask in [-1,1] to a vector per cell: four halvings, two residual blocks."""  # (B,1,64,64) -> (B,D,4,4)
    for name in DOWN:
        x = relu(conv2d_same(x, **p[name], stride=2))
    x = residual_block(x, p["8"]["net"])
    x = residual_block(x, p["9"]["net"])
    return conv2d_same(x, **p["10"], stride=1)


def nearest(z, embedding):
    """The row of the code book closest to each cell, cells in row-major order."""  # (B,D,4,4), (V,D) -> (B,16)
    cells = z.reshape(*z.shape[:2], GRID * GRID).transpose(0, 2, 1)
    # |z - e|^2 = |z|^2 - 2 z.e + |e|^2, and |z|^2 does not change which e is closest.
    return np.argmin((embedding * embedding).sum(axis=1) - 2 * (cells @ embedding.T), axis=-1)


def lookup(codes, embedding):
    """The code book's rows, laid out on the grid row by row."""  # (B,16), (V,D) -> (B,D,4,4)
    rows = embedding[np.asarray(codes, like=embedding)]
    return rows.reshape(len(codes), GRID, GRID, embedding.shape[1]).transpose(0, 3, 1, 2)


def decoder(z, p):
    """From a vector per cell to a mask in about [-1,1], with no last activation."""  # (B,D,4,4) -> (B,1,64,64)
    x = relu(conv2d_same(z, **p["0"], stride=1))
    x = residual_block(x, p["2"]["net"])
    x = residual_block(x, p["3"]["net"])
    for name in UP:
        x = relu(conv_transpose2d(x, **p[name], stride=2, padding=1))
    return conv2d_same(x, **p["12"], stride=1)


def encode(masks, params):
    """Masks in [0,1], cut to their boxes and resized to 64x64, as 16 codes each."""  # (B,64,64) -> (B,16)
    return nearest(encoder(2 * masks[:, None] - 1, params["encoder"]), params["_vq_vae"]["_embedding"])


def decode(codes, params):
    """16 codes each as masks, about -1 outside and 1 inside; the codes come from the host, for they come from a text.

    Raises ValueError for a code that is not in the book: a negative one would silently count from its end.
    """  # (B,16) -> (B,64,64)
    embedding = params["_vq_vae"]["_embedding"]
    if codes.shape[1:] != (GRID * GRID,) or ((codes < 0) | (codes >= len(embedding))).any():
        raise ValueError(f"expected {GRID * GRID} codes from 0 to {len(embedding) - 1} a mask, got {codes.tolist()}")
    return decoder(lookup(codes, embedding), params["decoder"])[:, 0]
