"""The mask VQ-VAE: its layers against plain definitions and PyTorch, its gradients, what it is used for."""
import os
import re

import numpy as np
import pytest
from galleries import small_gallery
from helpers import GOLDEN_FILES, ROOT, TOLERANCES, DeviceArray, assert_close, seeds
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from minipali.checkpoint import vae_oid
from minipali.checkpoint.tensors import flatten
from minipali.errors import run_command
from minipali.learning.backward import vq_vae as backward
from minipali.model import vq_vae as segmentation
from minipali.outputs.masks import from_run_lengths, paste, run_lengths
from minipali.small_world import artwork, drawings
from minipali.small_world import train_masks as train_segmentation
from minipali.small_world.train_masks import masks, measure, unit

GOLDEN = GOLDEN_FILES / "segmentation.npz"
SHIPPED = ROOT / "weights" / "vae-oid.npz"
DTYPES = ["float32", "float64"]

sizes = st.integers(1, 7)
small = st.integers(1, 4)


def nested(arrays, prefix):
    """Dotted names that start with the prefix, as a tree of dicts."""
    tree = {}
    for name in arrays:
        if name.startswith(prefix):
            *parents, leaf = name.removeprefix(prefix).split(".")
            node = tree
            for key in parents:
                node = node.setdefault(key, {})
            node[leaf] = arrays[name]
    return tree


def golden(kernel, dtype):
    """One case of the golden file: its masks, its parameters in the dtype, and the rest by name."""
    with np.load(GOLDEN) as file:
        arrays = {name: file[name] for name in file.files}
    prefix = f"kernel{kernel}/"
    params = nested({name: array.astype(dtype) for name, array in arrays.items()}, prefix + "params/")
    pixels = arrays[prefix + "pixels"].astype(dtype)
    return pixels / 256, params, lambda name: arrays[prefix + name]


def convolve(x, weight, bias, stride, padding):
    """A convolution as its definition has it, one output number at a time."""
    x = np.pad(x, ((0, 0), (0, 0), *padding))
    height, width = weight.shape[2:]
    rows, cols = (x.shape[2] - height) // stride + 1, (x.shape[3] - width) // stride + 1
    y = np.empty((len(x), len(weight), rows, cols))
    for b, o, i, j in np.ndindex(y.shape):
        window = x[b, :, stride * i:stride * i + height, stride * j:stride * j + width]
        y[b, o, i, j] = (window * weight[o]).sum() + bias[o]
    return y


@st.composite
def convolutions(draw):
    """Input, kernel, bias, stride and padding of a convolution, all axes of their own length."""
    rng = np.random.default_rng(draw(seeds))
    batch, inputs, outputs, stride = draw(small), draw(small), draw(small), draw(st.integers(1, 3))
    kernel = draw(small), draw(small)
    padding = tuple((draw(st.integers(0, 2)), draw(st.integers(0, 2))) for _ in kernel)
    height, width = (k + draw(sizes) for k in kernel)
    x = rng.standard_normal((batch, inputs, height, width))
    return x, rng.standard_normal((outputs, inputs, *kernel)), rng.standard_normal(outputs), stride, padding


@given(convolutions())
def test_convolution_is_its_definition(case):
    assert_close("y", segmentation.conv2d(*case), convolve(*case), "formula")


@given(seeds, small, small, sizes, sizes, st.integers(1, 4), st.integers(1, 3), st.integers(0, 1))
def test_transposed_convolution_as_zeros_and_a_flipped_kernel(seed, i, o, height, width, kernel, stride, padding):
    """The two ways to write it agree; without the flip they do not."""
    rng = np.random.default_rng(seed)
    x, weight = rng.standard_normal((2, i, height, width)), rng.standard_normal((i, o, kernel, kernel))
    bias = rng.standard_normal(o)
    if min(height, width) * stride - stride + kernel <= 2 * padding:
        return  # everything would be cropped away
    spread = np.zeros((2, i, stride * (height - 1) + 1, stride * (width - 1) + 1))
    spread[:, :, ::stride, ::stride] = x
    spread = np.pad(spread, ((0, 0), (0, 0), (kernel - 1,) * 2, (kernel - 1,) * 2))
    expected = convolve(spread, weight.swapaxes(0, 1)[:, :, ::-1, ::-1], bias, 1, ((0, 0), (0, 0)))
    expected = expected[:, :, padding:expected.shape[2] - padding, padding:expected.shape[3] - padding]
    assert_close("y", segmentation.conv_transpose2d(x, weight, bias, stride, padding), expected, "formula")


@given(st.integers(1, 100), st.integers(1, 9), st.integers(1, 4))
def test_same_padding_gives_one_output_per_stride(size, kernel, stride):
    before, after = segmentation.same_padding(size, kernel, stride)
    assert 0 <= after - before <= 1
    assert (size + before + after - kernel) // stride + 1 >= -(-size // stride)
    assert before == 0 or (size + before + after - 1 - kernel) // stride + 1 < -(-size // stride)


def test_same_padding_is_lopsided_for_odd_kernels():
    assert segmentation.same_padding(64, 3, 2) == (0, 1)
    assert segmentation.same_padding(64, 4, 2) == (1, 1)
    assert segmentation.same_padding(4, 3, 1) == (1, 1)


@given(seeds, st.integers(1, 9), small)
def test_nearest_row_of_the_code_book(seed, rows, code):
    """By squared distance, cells in row-major order; looking the codes up lays the rows out in the same order."""
    rng = np.random.default_rng(seed)
    z, book = rng.standard_normal((3, code, 4, 4)), rng.standard_normal((rows, code))
    codes = segmentation.nearest(z, book)
    distances = ((z.transpose(0, 2, 3, 1).reshape(3, 16, 1, code) - book) ** 2).sum(axis=-1)
    assert (codes == distances.argmin(axis=-1)).all()
    assert (segmentation.lookup(codes, book)[1, :, 2, 3] == book[codes[1, 11]]).all()
    assert (segmentation.nearest(segmentation.lookup(codes, book), book) == codes).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kernel", [3, 4])
def test_encoder_as_in_pytorch(kernel, dtype):
    pixels, params, expected = golden(kernel, dtype)
    z = segmentation.encoder(2 * pixels[:, None] - 1, params["encoder"])
    assert z.dtype == dtype
    assert_close("z", z, expected("z"), "golden")
    assert (segmentation.encode(pixels, params) == expected("codes")).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_decoder_as_in_pytorch(dtype):
    _, params, expected = golden(4, dtype)
    decoded = segmentation.decode(expected("codes"), params)
    assert decoded.dtype == dtype
    assert_close("decoded", decoded, expected("decoded"), "golden")


@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_and_gradients_as_in_pytorch(dtype):
    pixels, params, expected = golden(4, dtype)
    (loss, codes), pull = backward.vq_vae_loss(pixels, params, float(expected("commitment")))
    assert_close("loss", loss, expected("loss"), "golden")
    assert (codes == expected("codes")).all()
    grads = flatten(pull())
    assert set(grads) == set(flatten(params))
    for name, grad in grads.items():
        assert grad.dtype == dtype
        assert_close(name, grad, expected(f"grads/{name}"), "golden gradient")


def assert_gradients(forward, partner, arguments, rng, step=1e-6):
    """<v, J u> of central differences is <pull(v), u>, over all of the arguments (trees of arrays) at once."""
    y, pull = partner(*arguments)
    assert (y == forward(*arguments)).all()
    v = rng.standard_normal(y.shape)
    grads = pull(v)
    grads = flatten(dict(enumerate(grads if isinstance(grads, tuple) else (grads,))))
    flat = flatten(dict(enumerate(arguments)))
    assert {name: grad.shape for name, grad in grads.items()} == {name: x.shape for name, x in flat.items()}
    u = {name: rng.standard_normal(x.shape) for name, x in flat.items()}

    def moved(by):
        tree = nested({f"x{name}": x + by * u[name] for name, x in flat.items()}, "x")
        return (v * forward(*tree.values())).sum()

    expected = (moved(step) - moved(-step)) / (2 * step)
    found = sum((grads[name] * u[name]).sum() for name in flat)
    assert abs(found - expected) <= TOLERANCES["gradient"]["float64"] * max(abs(expected), np.sqrt(y.size))


@given(convolutions(), seeds)
def test_gradients_of_a_convolution(case, seed):
    *_, stride, padding = case
    assert_gradients(
        lambda x, p: segmentation.conv2d(x, **p, stride=stride, padding=padding),
        lambda x, p: backward.conv2d(x, **p, stride=stride, padding=padding),
        (case[0], {"weight": case[1], "bias": case[2]}), np.random.default_rng(seed))  # fmt: skip


@given(seeds, small, small, sizes, sizes, st.integers(2, 4), st.integers(1, 3), st.integers(0, 1))
def test_gradients_of_a_transposed_convolution(seed, i, o, height, width, kernel, stride, padding):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((2, i, 1 + height, 1 + width))
    p = {"weight": rng.standard_normal((i, o, kernel, kernel)), "bias": rng.standard_normal(o)}
    assert_gradients(
        lambda x, p: segmentation.conv_transpose2d(x, **p, stride=stride, padding=padding),
        lambda x, p: backward.conv_transpose2d(x, **p, stride=stride, padding=padding), (x, p), rng)  # fmt: skip


@given(seeds, sizes, st.integers(1, 5))
def test_gradient_of_the_code_book(seed, rows, code):
    """Rows that are read often, once or never."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(rows, size=(2, 16))
    assert_gradients(
        lambda book: segmentation.lookup(codes, book), lambda book: backward.lookup(codes, book),
        (rng.standard_normal((rows, code)),), rng)  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_gradients_of_the_networks(seed):
    """Small steps, so that next to no ReLU switches in between."""
    rng = np.random.default_rng(seed)
    pixels, params, expected = golden(4, np.float64)
    x, z = 2 * pixels[:, None] - 1, expected("z")
    assert_gradients(segmentation.encoder, backward.encoder, (x, params["encoder"]), rng, step=1e-8)
    assert_gradients(segmentation.decoder, backward.decoder, (z / z.std(), params["decoder"]), rng, step=1e-8)
    block = params["decoder"]["3"]["net"]
    x = rng.standard_normal((2, len(block["0"]["bias"]), 5, 6))
    assert_gradients(segmentation.residual_block, backward.residual_block, (x, block), rng, step=1e-8)


def test_on_a_device():
    """The same lines run where the arrays are and give the same bits: codes, masks, loss and gradients."""

    def run(move):
        pixels, params, _ = golden(4, np.float32)
        host_codes = segmentation.encode(pixels, params)
        pixels, params = move(pixels), nested({name: move(x) for name, x in flatten(params).items()}, "")
        (loss, codes), pull = backward.vq_vae_loss(pixels, params, 0.25)
        return [loss, codes, segmentation.decode(host_codes, params), *flatten(pull()).values()]

    for ours, host in zip(run(DeviceArray), run(lambda x: x), strict=True):
        assert isinstance(ours, DeviceArray)
        assert (ours.get() == host).all()


def test_encode_and_decode_treat_each_mask_alone():
    pixels, params, _ = golden(4, np.float64)
    codes = segmentation.encode(pixels, params)
    kept = codes.copy()
    for b in range(len(pixels)):
        assert (segmentation.encode(pixels[b:b + 1], params) == codes[b]).all()
        alone, together = segmentation.decode(codes[b:b + 1], params)[0], segmentation.decode(codes, params)[b]
        assert_close("decoded", alone, together, "reordered")
    assert (codes == kept).all()
    assert segmentation.encode(pixels[:0], params).shape == (0, 16)
    assert segmentation.decode(codes[:0], params).shape == (0, 64, 64)


@pytest.mark.parametrize("codes", [np.full((1, 16), -1), np.full((2, 16), 11), np.zeros((1, 15)), np.zeros(16)])
def test_codes_that_are_not_in_the_book(codes):
    """A negative code would silently count from the end."""
    with pytest.raises(ValueError, match="16 codes from 0 to 10"):
        segmentation.decode(codes, golden(4, np.float32)[1])


@given(seeds, st.integers(1, 40), st.integers(1, 40), st.data())
def test_paste_stretches_over_the_cut_box(seed, height, width, data):
    """Coordinates lose their fractions; the mask is resized as floats and only then compared with 0."""
    mask = np.random.default_rng(seed).standard_normal((64, 64)).astype(np.float32)
    x0, x1 = sorted(data.draw(st.floats(0, width)) for _ in range(2))
    y0, y1 = sorted(data.draw(st.floats(0, height)) for _ in range(2))
    found = paste(mask, (x0, y0, x1, y1), height, width)
    assert found.shape == (height, width)
    assert found.dtype == bool
    x0, y0, x1, y1 = int(x0), int(y0), int(x1), int(y1)
    if x1 > x0 and y1 > y0:
        inside = np.asarray(Image.fromarray(mask).resize((x1 - x0, y1 - y0), Image.BILINEAR))
        assert (found[y0:y1, x0:x1] == (inside > 0)).all()
        found[y0:y1, x0:x1] = False
    assert not found.any()


def test_paste_puts_y_into_rows():
    mask = np.full((64, 64), -1.0)
    mask[:, 32:] = 1.0  # the right half
    found = paste(mask, (1, 2, 5.9, 4), 6, 8)
    assert [(y, x) for y, x in np.argwhere(found)] == [(2, 3), (2, 4), (3, 3), (3, 4)]


@pytest.mark.parametrize("box", [(-1, 0, 5, 5), (0, -1, 5, 5), (0, 0, 9, 5), (0, 0, 5, 7)])
def test_paste_stays_in_the_picture(box):
    with pytest.raises(ValueError, match="leaves the picture of 8x6 pixels"):
        paste(np.ones((64, 64)), box, 6, 8)


@given(seeds, st.integers(1, 12), st.integers(1, 12), st.floats(0, 1))
def test_run_lengths_and_back(seed, height, width, share):
    mask = np.random.default_rng(seed).random((height, width)) < share
    runs = run_lengths(mask)
    assert sum(runs) == mask.size
    assert all(runs[1:])
    assert (from_run_lengths(runs, height, width) == mask).all()


def test_run_lengths_go_along_rows_and_start_outside():
    mask = np.array([[1, 1, 0], [0, 1, 0]], bool)
    assert run_lengths(mask) == [0, 2, 2, 1, 1]
    assert run_lengths(~mask) == [2, 2, 1, 1]


def test_shipped_weights_keep_the_shapes_of_unseen_things():
    params = vae_oid.read(SHIPPED)
    iou, worst, perplexity = measure(params, masks("test", 40))
    assert iou > 0.93
    assert worst > 0.85
    assert perplexity > 8  # more than a few codes carry the shapes
    assert SHIPPED.stat().st_size < 400_000


def test_shipped_codes_survive_pasting():
    """Mask to codes to mask in the picture, through every function that a user's answer passes."""
    params, overlaps = vae_oid.read(SHIPPED), []
    for seed in range(20):
        for thing in train_segmentation.draw(seed, "test").things:
            codes = segmentation.encode(train_segmentation.mask_crop(thing.mask, thing.box)[None], params)
            found = paste(segmentation.decode(codes, params)[0], thing.box, *thing.mask.shape)
            overlaps.append((found & thing.mask).sum() / (found | thing.mask).sum())
    # The least are small stars, 19 pixels wide; Pillow's versions resize them differently.
    assert np.mean(overlaps) > 0.87 and min(overlaps) > 0.6


def test_training_lowers_the_loss_and_writes_a_whole_file(tmp_path, monkeypatch):
    """From nothing, in a few steps; and nothing but the finished file is left."""
    monkeypatch.setattr(train_segmentation, "SCENES", {"train": 6, "test": 3})
    monkeypatch.setattr(train_segmentation, "BATCH", 4)
    monkeypatch.setattr(train_segmentation, "WARMUP", 5)
    out, log = tmp_path / "vae.npz", tmp_path / "log"
    losses = []
    for steps in (1, 30):
        with open(log, "w") as file:
            train_segmentation.train(None, 12, steps, out, file)
        pixels = unit(masks("train", 6))
        losses.append(backward.vq_vae_loss(pixels, vae_oid.read(out), 0.25)[0][0])
        assert log.read_text().startswith(f"step {steps} loss ")
    assert losses[1] < 0.9 * losses[0]
    assert {path.name for path in tmp_path.iterdir()} == {"vae.npz", "log"}


def test_training_goes_on_from_a_file_with_a_shorter_book(tmp_path, monkeypatch):
    monkeypatch.setattr(train_segmentation, "SCENES", {"train": 6, "test": 3})
    monkeypatch.setattr(train_segmentation, "PEAK_RATE", 0)
    out, before = tmp_path / "vae.npz", vae_oid.read(SHIPPED)
    train_segmentation.main(["--start", str(SHIPPED), "--codes", "5", "--steps", "1", "--out", str(out)])
    after = vae_oid.read(out)
    assert after["_vq_vae"]["_embedding"].shape == (5, before["_vq_vae"]["_embedding"].shape[1])
    assert (after["encoder"]["10"]["weight"] == before["encoder"]["10"]["weight"]).all()
    assert measure(after, masks("test", 3))[0] > 0.7


def test_mask_codes_are_made_once_and_go_on_from_what_is_finished(tmp_path, monkeypatch):
    """The wide book, then the shipped one from it; shapes and drawings both; nothing where the file exists."""
    asked = []

    def train(start, codes, steps, out, log, with_drawings):
        asked.append((start and start.name, codes, steps, with_drawings))
        if fails:
            raise KeyboardInterrupt
        assert str(os.getpid()) in out.name  # another run in the same folder has another number
        out.write_text(f"{codes}")
    monkeypatch.setattr(train_segmentation, "train", train)
    out, runs, fails = tmp_path / "vae-oid.npz", tmp_path / "runs", True
    with pytest.raises(KeyboardInterrupt):
        train_segmentation.make(out, runs, None)
    fails = False
    train_segmentation.make(out, runs, None)
    assert out.read_text() == "16" and sorted(path.name for path in runs.iterdir()) == ["masks.npz"]
    assert asked == [(None, 64, 4000, True), (None, 64, 4000, True), ("masks.npz", 16, 700, True)]
    train_segmentation.make(out, runs, None)
    out.unlink()
    train_segmentation.make(out, runs, None)
    assert asked[3:] == [("masks.npz", 16, 700, True)]


def test_masks_are_learned_from_drawings_too(tmp_path, monkeypatch):
    """By the artists of the training sets; what is held out is by another."""
    monkeypatch.setattr(train_segmentation, "SCENES", {"train": 4, "test": 2})
    monkeypatch.setattr(train_segmentation, "BATCH", 4)
    shown = []
    monkeypatch.setattr(drawings, "gallery", lambda artists: shown.append(artists) or small_gallery())
    with open(tmp_path / "log", "w") as log:
        train_segmentation.train(None, 6, 2, tmp_path / "vae.npz", log, True)
    assert shown == [drawings.TRAINED_ON, (artwork.VALIDATION,)]
    assert re.search(r"held-out shapes IoU .* held-out drawings IoU ", (tmp_path / "log").read_text())
    first = next(iter(drawings.draw(0, small_gallery(), "test").things))
    found = train_segmentation.drawn_masks("test", ("noto",))[0]
    assert np.array_equal(found, np.rint(255 * train_segmentation.mask_crop(first.mask, first.box)).astype(np.uint8))


def test_training_from_a_bad_file_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_segmentation, "SCENES", {"train": 1, "test": 1})
    name, argv = "minipali.small_world.train_masks", ["--start", str(tmp_path / "none.npz"), "--out"]
    assert run_command(name, train_segmentation.main, [*argv, str(tmp_path / "vae.npz")]) == 2
    assert capsys.readouterr().err == f"{name}: error: {tmp_path / 'none.npz'}: no such file\n"
    assert not list(tmp_path.iterdir())
    assert run_command(name, train_segmentation.main, [*argv, str(tmp_path / "none" / "vae.npz")]) == 2
    assert "none/vae.npz: cannot be written" in capsys.readouterr().err, "before the training"


@given(seeds, st.integers(2, 6))
def test_book_is_fitted_to_clusters(seed, clusters):
    """One row settles on the mean of every cluster, even of two cells; rows drawn at random would miss such."""
    rng = np.random.default_rng(seed)
    centers = 100 * rng.permutation(np.eye(8))[:clusters]
    owner = np.concatenate([np.arange(clusters), np.arange(clusters), np.zeros(500, int)])
    cells = centers[owner] + rng.standard_normal((len(owner), 8)) * 1e-3
    book = train_segmentation.fit_book(cells, clusters, rng)
    means = np.stack([cells[owner == cluster].mean(axis=0) for cluster in range(clusters)])
    distances = train_segmentation.squared_distances(means, book)
    assert sorted(distances.argmin(axis=1)) == list(range(clusters))
    assert distances.min(axis=1).max() < 1e-6


def test_idle_rows_come_back(tmp_path, monkeypatch):
    """Rows that start far from every cell would stay idle for good."""
    monkeypatch.setattr(train_segmentation, "SCENES", {"train": 3, "test": 1})
    monkeypatch.setattr(train_segmentation, "fit_book", lambda cells, codes, rng: np.full((codes, 32), 1e3, np.float32))
    monkeypatch.setattr(train_segmentation, "RESEED_EVERY", 1)
    monkeypatch.setattr(train_segmentation, "BATCH", 4)
    with open(tmp_path / "log", "w") as log:
        train_segmentation.train(None, 6, 4, tmp_path / "vae.npz", log)
    assert np.abs(vae_oid.read(tmp_path / "vae.npz")["_vq_vae"]["_embedding"]).max(axis=1).min() < 100
