"""Train the mask VQ-VAE on the shapes and the drawings of the small world; some ten minutes on one core.

    python -m minipali.small_world.train_masks --drawings --steps 4000 --out wide.npz
    python -m minipali.small_world.train_masks --drawings --start wide.npz --codes 16 --steps 700 --out vae-oid.npz

The graph is that of the published `vae-oid.npz`, with every layer a quarter as wide. The first command trains with a
code book of 64 rows; the second shrinks the book to 16, which costs half a point of IoU. A language model has to
predict sixteen codes for a mask, and it confuses fewer of them when there are fewer to choose from.
"""

import math
import os
import sys
import time

import numpy as np

from minipali.checkpoint import vae_oid
from minipali.checkpoint.tensors import flatten
from minipali.errors import InputError, Parser, integer, path_name, prepare_process, run_command
from minipali.files import check_writable, make_folder, replacing
from minipali.learning.backward.vq_vae import vq_vae_loss
from minipali.learning.optimizer import adamw, learning_rate
from minipali.model import vq_vae
from minipali.small_world import artwork, drawings
from minipali.small_world.tasks import mask_crop
from minipali.small_world.world import draw

CODE_SIZE = 32
DOWN_CHANNELS, UP_CHANNELS = (4, 8, 16, 32), (32, 32, 16, 8, 4)
COMMITMENT = 0.25  # arXiv 1711.00937, section 3.2
BATCH, PEAK_RATE, WARMUP = 64, 2e-3, 100
RESEED_EVERY, RESEED_UNTIL = 50, 0.7  # steps; the share of training in which unused rows are moved
LLOYD_ROUNDS = 15
SCENES = {"train": 8000, "test": 400}
WIDE, SHIPPED = (64, 4000), (16, 700)  # rows of the book and steps, of the first command and of the second


def masks(split, scenes, draw=draw):
    """The cropped masks of all things in `scenes` pictures, as bytes to save memory."""  # -> (n,64,64) uint8
    things = (thing for seed in range(scenes) for thing in draw(seed, split).things)
    return np.stack([np.rint(255 * mask_crop(thing.mask, thing.box)).astype(np.uint8) for thing in things])


def unit(pixels):
    """Bytes to float32 in [0,1]."""
    return pixels.astype(np.float32) / 255


def initial_params(codes, rng):
    """Random weights that keep the variance through a ReLU (He et al., arXiv 1502.01852), zero biases."""

    def layer(shape, inputs, outputs):
        weight = rng.normal(0, math.sqrt(2 / inputs), shape).astype(np.float32)
        return {"weight": weight, "bias": np.zeros(outputs, np.float32)}

    def conv(inputs, outputs, kernel):
        return layer((outputs, inputs, kernel, kernel), inputs * kernel * kernel, outputs)

    def residual(channels):
        return {"net": {name: conv(channels, channels, kernel) for name, kernel in (("0", 3), ("2", 3), ("4", 1))}}

    wide = DOWN_CHANNELS[-1]
    encoder = {name: conv(i, o, 4) for name, i, o in zip(vq_vae.DOWN, (1, *DOWN_CHANNELS), DOWN_CHANNELS)}
    encoder |= {"8": residual(wide), "9": residual(wide), "10": conv(wide, CODE_SIZE, 1)}
    wide = UP_CHANNELS[0]
    decoder = {"0": conv(CODE_SIZE, wide, 1), "2": residual(wide), "3": residual(wide)}
    # With stride 2 only a quarter of a 4x4 kernel's taps fall on any one output pixel.
    decoder |= {name: layer((i, o, 4, 4), i * 4, o) for name, i, o in zip(vq_vae.UP, UP_CHANNELS, UP_CHANNELS[1:])}
    decoder["12"] = conv(UP_CHANNELS[-1], 1, 1)
    book = rng.normal(0, 1, (codes, CODE_SIZE)).astype(np.float32)
    return {"_vq_vae": {"_embedding": book}, "encoder": encoder, "decoder": decoder}


def cells_of(params, pixels):
    """The encoder's output for every grid cell of the masks."""  # (n,64,64) uint8 -> (16n,D)
    z = vq_vae.encoder(2 * unit(pixels)[:, None] - 1, params["encoder"])
    return z.transpose(0, 2, 3, 1).reshape(-1, z.shape[1])


def squared_distances(cells, book):
    """From every cell to every row of the book."""  # (n,D), (V,D) -> (n,V)
    return (cells * cells).sum(1)[:, None] - 2 * cells @ book.T + (book * book).sum(1)


def fit_book(cells, codes, rng):
    """k-means (Lloyd 1982), with initial rows far apart (k-means++, Arthur & Vassilvitskii 2007).

    Most cells lie entirely inside or outside a mask: rows chosen uniformly would nearly all start as one of these two.
    """  # (n,D) -> (codes,D)
    book = cells[rng.integers(len(cells), size=1)]
    for _ in range(codes - 1):
        distance = np.maximum(squared_distances(cells, book).min(axis=1), 0).astype(np.float64)
        book = np.concatenate([book, cells[rng.choice(len(cells), size=1, p=distance / distance.sum())]])
    for _ in range(LLOYD_ROUNDS):
        owner = squared_distances(cells, book).argmin(axis=1)
        for row in range(codes):
            if (owner == row).any():
                book[row] = cells[owner == row].mean(axis=0)
    return book


def measure(params, pixels):
    """Mean and 5 % quantile of the IoU after encoding and decoding, and the perplexity of the codes."""
    truth = unit(pixels)
    codes = vq_vae.encode(truth, params)
    decoded, truth = vq_vae.decode(codes, params) > 0, truth > 0.5
    iou = (decoded & truth).sum((1, 2)) / (decoded | truth).sum((1, 2))
    share = np.bincount(codes.ravel(), minlength=len(params["_vq_vae"]["_embedding"])) / codes.size
    entropy = -(share * np.log(np.maximum(share, 1e-12))).sum()
    return iou.mean(), np.quantile(iou, 0.05), np.exp(entropy)


def save(path, params):
    """Write the arrays in float16; the file appears complete or not at all."""
    with replacing(path) as file:
        np.savez_compressed(file, **{name: array.astype(np.float16) for name, array in flatten(params).items()})


def drawn_masks(split, artists):
    """The cropped masks of all drawings in SCENES[split] pictures of drawings by these artists."""
    gallery = drawings.gallery(artists)
    return masks(split, SCENES[split], lambda seed, split: drawings.draw(seed, gallery, split))


def train(start, codes, steps, out, log, with_drawings=False):
    """Train from the file `start`, or from random weights, and write `out`; results on held-out masks go to `log`."""
    rng, began = np.random.default_rng(0), time.perf_counter()
    pixels, held_out = masks("train", SCENES["train"]), {"shapes": masks("test", SCENES["test"])}
    if with_drawings:
        pixels = np.concatenate([pixels, drawn_masks("train", drawings.TRAINED_ON)])
        held_out["drawings"] = drawn_masks("test", (artwork.VALIDATION,))
    params = vae_oid.read(start) if start else initial_params(codes, rng)
    book = params["_vq_vae"]
    if not start or codes != len(book["_embedding"]):
        book["_embedding"] = fit_book(cells_of(params, pixels[:2000]), codes, rng)
    averages = {name: {"first": 0 * x, "second": 0 * x} for name, x in flatten(params).items()}
    times_used = np.zeros(codes, np.int64)
    for step in range(1, steps + 1):
        batch = pixels[rng.integers(len(pixels), size=BATCH)]
        (loss, used), pull = vq_vae_loss(unit(batch), params, COMMITMENT)
        grads, rate = flatten(pull()), learning_rate(step - 1, steps, PEAK_RATE, WARMUP)
        for name, x in flatten(params).items():
            adamw(x, grads[name], averages[name], step, rate, beta1=0.9, beta2=0.99, eps=1e-8, decay=0)
        times_used += np.bincount(used.ravel(), minlength=codes)
        if step % RESEED_EVERY == 0:
            unused = np.flatnonzero(times_used == 0)
            if step < RESEED_UNTIL * steps:
                # A row that no cell uses gets no gradient and would stay unused: replace it by some cell's vector.
                book["_embedding"][unused] = rng.permutation(cells_of(params, batch))[:len(unused)]
            times_used[:] = 0
        if step % 500 == 0 or step == steps:
            save(out, params)
            line = f"step {step} loss {loss:.4f}"
            for what, truth in held_out.items():
                iou, worst, perplexity = measure(params, truth)
                line += f" held-out {what} IoU {iou:.4f} (5 % below {worst:.3f}) perplexity {perplexity:.1f}"
            print(f"{line} after {time.perf_counter() - began:.0f} s", file=log, flush=True)


def make(out, runs, log):
    """Write `out`, the mask codec that the small model is trained with, unless it exists: the two commands above.

    The first one's result is kept in the folder `runs`, so that an interrupted run does not repeat it.
    """
    # The process's number: two runs in one folder would otherwise take each other's half-trained codec for their own.
    wide, unfinished = runs / "masks.npz", runs / f"masks-unfinished-{os.getpid()}.npz"
    if out.exists():
        return
    make_folder(runs)
    try:
        if not wide.exists():
            train(None, *WIDE, unfinished, log, True)
            unfinished.replace(wide)
        train(wide, *SHIPPED, unfinished, log, True)
        with replacing(out) as file:
            file.write(unfinished.read_bytes())
    finally:
        unfinished.unlink(missing_ok=True)


def main(argv):
    parser = Parser("minipali.small_world.train_masks", "Train the mask VQ-VAE on the small world's shapes.",
                    "  python -m minipali.small_world.train_masks --out wide.npz\n"
                    "  python -m minipali.small_world.train_masks --start wide.npz --codes 16 --steps 500 "
                    "--out masks.npz")
    add = parser.add_argument
    add("--out", type=path_name, required=True, metavar="FILE", help="the .npz file to write")
    add("--start", type=path_name, metavar="FILE",
        help="the .npz file to start from; a code book of another size is fitted anew")
    add("--codes", type=integer(1), default=64, metavar="N", help="rows of the code book, at most 128 (default 64)")
    add("--steps", type=integer(1), default=3000, metavar="N", help="training steps (default 3000)")
    add("--drawings", action="store_true", help="train also on drawings, from the cache that artwork.py makes")
    args = parser.parse_args(argv)
    if args.codes > 128:
        raise InputError(f"--codes: {args.codes}: expected at most 128, one for each <seg> token")
    check_writable(args.out)  # better refused now than after the training
    train(args.start, args.codes, args.steps, args.out, sys.stderr, args.drawings)


if __name__ == "__main__":
    prepare_process()
    sys.exit(run_command("minipali.small_world.train_masks", main, sys.argv[1:]))
