"""Gradients of the mask VQ-VAE, by hand: the partners of the functions in `minipali.model.vq_vae`.

Each function takes its partner's arguments and returns `(y, pull)`; `pull(dy)` gives the gradient with respect to `x`,
then to the parameters, in the tree in which they came.
"""

import numpy as np

from minipali.model import vq_vae as forward
from minipali.model.vq_vae import DOWN, UP, col2im, im2col, same_padding


def relu(x):
    """dx = dy where x > 0."""
    y = forward.relu(x)
    return y, lambda dy: dy * (y > 0)


def conv2d(x, weight, bias, stride, padding):
    """A convolution is y = W im2col(x) + b, so dW = dy im2col(x)^T and dx = col2im(W^T dy)."""
    # (B,in,height,width), (out,in,k,k), (out,) -> (B,out,rows,columns)
    y = forward.conv2d(x, weight, bias, stride, padding)

    def pull(dy):
        padded = np.pad(x, ((0, 0), (0, 0), *padding))
        kernel, (height, width) = weight.shape[2:], padded.shape[2:]
        taps, rows, columns = im2col(padded, kernel, stride)
        dflat = dy.reshape(*dy.shape[:2], rows * columns)
        dweight = (dflat @ taps.transpose(0, 2, 1)).sum(axis=0).reshape(weight.shape)
        dtaps = weight.reshape(len(weight), -1).T @ dflat
        dpadded = col2im(dtaps, kernel, stride, rows, columns, height, width)
        # The zeros around x were not its own, so what flows back to them is dropped.
        (top, bottom), (left, right) = padding
        dx = dpadded[:, :, top:height - bottom, left:width - right]
        return dx, {"weight": dweight, "bias": dy.sum(axis=(0, 2, 3))}

    return y, pull


def conv2d_same(x, weight, bias, stride):
    """The convolution's gradient with the padding that "SAME" stands for."""
    # (B,in,height,width), (out,in,k,k), (out,) -> (B,out,rows,columns)
    padding = [same_padding(size, kernel, stride) for size, kernel in zip(x.shape[2:], weight.shape[2:])]
    return conv2d(x, weight, bias, stride, padding)


def conv_transpose2d(x, weight, bias, stride, padding):
    """Its forward is col2im(W^T x), so its backward uses im2col: dx = W im2col(dy) and dW = x im2col(dy)^T."""
    # (B,in,rows,columns), (in,out,k,k), (out,) -> (B,out,height,width)
    y = forward.conv_transpose2d(x, weight, bias, stride, padding)

    def pull(dy):
        # The pixels that the forward cropped away had no say in y: their gradient is zero.
        border = (padding, padding)
        dtaps, _, _ = im2col(np.pad(dy, ((0, 0), (0, 0), border, border)), weight.shape[2:], stride)
        dx = (weight.reshape(len(weight), -1) @ dtaps).reshape(x.shape)
        dweight = (x.reshape(*x.shape[:2], -1) @ dtaps.transpose(0, 2, 1)).sum(axis=0).reshape(weight.shape)
        return dx, {"weight": dweight, "bias": dy.sum(axis=(0, 2, 3))}

    return y, pull


def residual_block(x, net):
    """The sum hands dy to both of its terms: once straight back, once through the three convolutions."""
    # (B,C,height,width) -> (B,C,height,width)
    a, pull_0 = conv2d_same(x, **net["0"], stride=1)
    b, pull_1 = relu(a)
    c, pull_2 = conv2d_same(b, **net["2"], stride=1)
    d, pull_3 = relu(c)
    e, pull_4 = conv2d_same(d, **net["4"], stride=1)

    def pull(dy):
        dd, dnet_4 = pull_4(dy)
        db, dnet_2 = pull_2(pull_3(dd))
        dx, dnet_0 = pull_0(pull_1(db))
        return dy + dx, {"0": dnet_0, "2": dnet_2, "4": dnet_4}

    return x + e, pull


def encoder(x, p):
    """The encoder's layers, then their pulls from last to first."""  # (B,1,64,64) -> (B,D,4,4)
    pulls = []
    for name in DOWN:
        x, pull_conv = conv2d_same(x, **p[name], stride=2)
        x, pull_relu = relu(x)
        pulls.append((name, pull_conv, pull_relu))
    x, pull_8 = residual_block(x, p["8"]["net"])
    x, pull_9 = residual_block(x, p["9"]["net"])
    z, pull_10 = conv2d_same(x, **p["10"], stride=1)

    def pull(dz):
        dp = {}
        dx, dp["10"] = pull_10(dz)
        dx, dnet_9 = pull_9(dx)
        dx, dnet_8 = pull_8(dx)
        dp |= {"9": {"net": dnet_9}, "8": {"net": dnet_8}}
        for name, pull_conv, pull_relu in reversed(pulls):
            dx, dp[name] = pull_conv(pull_relu(dx))
        return dx, dp

    return z, pull


def lookup(codes, embedding):
    """Every cell adds its gradient to the row that it read: a row read twice gets the sum, one never read gets zero."""
    # (B,16), (V,D) -> (B,D,4,4)
    z = forward.lookup(codes, embedding)

    def pull(dz):
        dcells = dz.transpose(0, 2, 3, 1).reshape(*codes.shape, -1)
        picked = np.asarray(codes, like=dz)[..., None] == np.arange(len(embedding), like=dz)
        return picked.astype(dz.dtype).reshape(-1, len(embedding)).T @ dcells.reshape(-1, dcells.shape[-1])

    return z, pull


def decoder(z, p):
    """The decoder's layers, then their pulls from last to first."""  # (B,D,4,4) -> (B,1,64,64)
    a, pull_0 = conv2d_same(z, **p["0"], stride=1)
    x, pull_1 = relu(a)
    x, pull_2 = residual_block(x, p["2"]["net"])
    x, pull_3 = residual_block(x, p["3"]["net"])
    pulls = []
    for name in UP:
        x, pull_conv = conv_transpose2d(x, **p[name], stride=2, padding=1)
        x, pull_relu = relu(x)
        pulls.append((name, pull_conv, pull_relu))
    y, pull_12 = conv2d_same(x, **p["12"], stride=1)

    def pull(dy):
        dp = {}
        dx, dp["12"] = pull_12(dy)
        for name, pull_conv, pull_relu in reversed(pulls):
            dx, dp[name] = pull_conv(pull_relu(dx))
        dx, dnet_3 = pull_3(dx)
        dx, dnet_2 = pull_2(dx)
        dp |= {"3": {"net": dnet_3}, "2": {"net": dnet_2}}
        dz, dp["0"] = pull_0(pull_1(dx))
        return dz, dp

    return y, pull


def vq_vae_loss(masks, params, commitment):
    """The loss of "Neural discrete representation learning" (arXiv 1711.00937, equation 3) over masks in [0,1].

    With sg(.) for "stop gradient", and the mean of each square:
    (decoder(z + sg(e - z)) - x)^2 + (e - sg(z))^2 + commitment * (sg(e) - z)^2.
    Returns `((loss, codes), pull)`; `pull()` gives the gradient of every parameter.
    """  # (B,64,64) -> (), (B,16)
    x = 2 * masks[:, None] - 1
    embedding = params["_vq_vae"]["_embedding"]
    z, pull_encoder = encoder(x, params["encoder"])
    codes = forward.nearest(z, embedding)
    e, pull_lookup = lookup(codes, embedding)
    # The decoder sees e. Which row is nearest has no useful gradient (zero, or a jump), so the straight-through
    # estimator writes e as z + sg(e - z): the decoder's gradient goes to z as it is, and none of it to the code book.
    y, pull_decoder = decoder(e, params["decoder"])
    miss, gap = y - x, e - z
    loss = (miss * miss).mean() + (1 + commitment) * (gap * gap).mean()

    def pull():
        dz, ddecoder = pull_decoder(2 / miss.size * miss)
        dgap = 2 / gap.size * gap
        _, dencoder = pull_encoder(dz - commitment * dgap)
        return {"_vq_vae": {"_embedding": pull_lookup(dgap)}, "encoder": dencoder, "decoder": ddecoder}

    return (loss, codes), pull
