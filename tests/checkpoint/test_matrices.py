"""Matrices that stay compact, beside the plain arrays that they stand for: products, rows, whole models."""
import numpy as np
import pytest
from helpers import assert_close, random_batch, random_params, random_pixels, seeds
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from small_models import CONFIG, PROMPTS, model_config, write_model

from minipali import parallel
from minipali.checkpoint import matrices, read_matrices
from minipali.checkpoint.choice import SMALL, choose_weights
from minipali.checkpoint.hub import load, open_checkpoint
from minipali.checkpoint.matrices import BFloat16, Float32, Int8
from minipali.checkpoint.read_matrices import held_as, matrix_of, round_to_int8, stays_matrix
from minipali.checkpoint.safetensors_file import Stored, from_bfloat16, to_bfloat16
from minipali.checkpoint.tensors import flatten, unflatten
from minipali.commands import inspect
from minipali.decoding.generate import generate
from minipali.decoding.loaded_model import load_model
from minipali.decoding.sampling import Decoding
from minipali.errors import InputError
from minipali.model import ops, paligemma
from minipali.model.gemma import KVCache

FORMS = ["float32", "bfloat16", "int8"]


def held(array, form):
    """The array as a matrix, and the plain array that it stands for by the definition of the form."""
    matrix = matrix_of(array.shape, lambda start, stop: array[start:stop], form)
    if form == "bfloat16" and array.shape[1] % 2 == 0:
        return matrix, from_bfloat16(to_bfloat16(array))
    if form == "int8":
        scale = np.abs(array).max(axis=1, keepdims=True) / np.float32(127)
        return matrix, np.rint(array / np.where(scale == 0, 1, scale)).astype(np.float32) * scale
    return matrix, array


@pytest.fixture
def small_tiles(monkeypatch):
    """Three threads and tiles so small that every product has several, along both sides."""
    monkeypatch.setattr(parallel, "thread_count", lambda: 3)
    monkeypatch.setattr(matrices, "thread_count", lambda: 3)
    monkeypatch.setattr(matrices, "TILE", 24)
    monkeypatch.setattr(read_matrices, "TILE", 24)
    monkeypatch.setattr(matrices, "TILE_COLUMNS", 4)
    monkeypatch.setattr(matrices, "FEW", 2)
    monkeypatch.setattr(matrices, "SMALL_PRODUCT", 20)


@given(seeds, st.integers(1, 9), st.integers(1, 40), st.integers(1, 12), st.sampled_from(FORMS),
       st.sampled_from(["float32", "float64"]), st.booleans())
def test_products_are_those_of_the_upcast_matrix(seed, n, height, half_width, form, dtype, small):
    rng, width = np.random.default_rng(seed), 2 * half_width
    matrix, plain = held(rng.standard_normal((height, width), np.float32), form)
    x = rng.standard_normal((n, width)).astype(dtype)
    kept = x.copy()
    saved = matrices.TILE, matrices.TILE_COLUMNS, matrices.FEW, matrices.SMALL_PRODUCT
    if small:
        matrices.TILE, matrices.TILE_COLUMNS, matrices.FEW, matrices.SMALL_PRODUCT = 24, 4, 4, 20
    try:
        y = x @ matrix.T
        with_bias = ops.linear(x[None], matrix, x[0, :1])
    finally:
        matrices.TILE, matrices.TILE_COLUMNS, matrices.FEW, matrices.SMALL_PRODUCT = saved
    expected = x.astype(np.float64) @ plain.T.astype(np.float64)
    scale = (np.abs(x).astype(np.float64) @ np.abs(plain).T.astype(np.float64)).max()
    assert y.dtype == dtype and with_bias.shape == (1, n, height)
    if form == "int8":  # the upcast matrix has been rounded to float32, the product with the scales at its end has not
        y, with_bias = y.astype(np.float32), with_bias.astype(np.float32)
    assert_close("product", y, expected, "formula", scale)
    assert_close("linear", with_bias[0], expected + x[0, 0], "formula", scale + abs(x[0, 0]))
    assert np.array_equal(x, kept)


@given(seeds, st.integers(1, 9), st.integers(1, 6), st.sampled_from(FORMS))
def test_rows_are_those_of_the_upcast_matrix(seed, height, half_width, form):
    rng = np.random.default_rng(seed)
    matrix, plain = held(rng.standard_normal((height, 2 * half_width), np.float32), form)
    ids = rng.integers(0, height, (2, 3))
    assert np.array_equal(ops.embed(ids, matrix), plain[ids])
    assert np.array_equal(np.asarray(matrix), plain) and np.asarray(matrix, np.float64).dtype == np.float64
    assert matrix.shape == plain.shape and matrix.T.shape == plain.shape[::-1] and matrix.T.T is matrix
    assert matrix.dtype == np.float32 and np.empty_like(matrix, shape=(3, 0)).shape == (3, 0)
    ops.embed(ids, matrix)[:] = 0  # what comes out is the caller's, and no view of the file
    assert np.array_equal(matrix[ids], plain[ids])


def test_products_on_several_threads(small_tiles):
    rng = np.random.default_rng(0)
    for form in FORMS:
        for shape in [(50, 22), (1, 2), (7, 30)]:
            matrix, plain = held(rng.standard_normal(shape, np.float32), form)
            for n in [1, 2, 3, 40]:
                x = rng.standard_normal((n, shape[1]), np.float32)
                assert_close(form, x @ matrix.T, x.astype(np.float64) @ plain.T.astype(np.float64), "formula",
                             scale=4 * np.sqrt(shape[1]))


def test_a_wrong_size_is_an_error():
    matrix, _ = held(np.ones((3, 4), np.float32), "bfloat16")
    with pytest.raises(ValueError, match="5 and 4 differ"):
        np.ones((2, 5), np.float32) @ matrix.T


def test_int8_is_off_by_half_a_step_at_most():
    """Of its own row: one large row must not make the others coarse. Zeros stay zeros, damage stays visible."""
    rows = np.random.default_rng(0).standard_normal((20, 30), np.float32)
    rows *= np.logspace(-10, 9, 20, dtype=np.float32)[:, None]
    rows[3] = 0
    whole, scale = round_to_int8(rows)
    assert whole.dtype == np.int8 and np.abs(whole).max(axis=1).tolist() == [127, 127, 127, 0] + [127] * 16
    assert (np.abs(whole * scale.astype(np.float64) - rows) <= 0.5001 * scale).all()
    rows[5, 2], rows[6, 2] = np.nan, np.inf
    with np.errstate(invalid="ignore"):
        damaged = Int8(*round_to_int8(rows))
        y = np.ones((1, 30), np.float32) @ damaged.T
    assert not np.isfinite(y[0, 5:7]).any() and np.isfinite(np.delete(y, [5, 6])).all()


def test_an_odd_width_has_no_pairs():
    matrix = matrix_of((2, 3), lambda start, stop: np.ones((stop - start, 3), np.float32), "bfloat16")
    assert isinstance(matrix, Float32)


# --- whole models -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
def test_a_whole_model(kind, form, small_tiles):
    """Picture, prefill and decoding with matrices, beside the same with the arrays that they stand for."""
    cfg, rng = model_config(kind), np.random.default_rng(0)
    arrays = flatten(random_params(cfg, rng, "float32"))
    pairs = {name: held(x, form) if stays_matrix(name, x.shape) else (x, x) for name, x in arrays.items()}
    assert sum(isinstance(matrix, matrices.Matrix) for matrix, _ in pairs.values()) > 20
    compact, plain = (unflatten({name: pair[i] for name, pair in pairs.items()}) for i in (0, 1))
    pixels = random_pixels(cfg, 2, rng, "float32")
    ids, _, lengths = random_batch(cfg, 2, rng)
    ids = ids[:, :lengths.max()]
    found = []
    for params in [compact, plain]:
        features = paligemma.image_features(pixels, params, cfg)
        cache = KVCache(features, 2, 40, cfg.text_config)
        first = paligemma.prefill(features, ids, lengths, params, cfg, cache)
        found.append((features, first, paligemma.decode(np.array([[3], [4]]), params, cfg, cache)))
    for name, ours, ref in zip(["features", "prefill", "decode"], *found):
        assert ours.dtype == np.float32
        assert_close(name, ours, ref, "golden")


def answers(model):
    """The ids that the model says about an empty picture, greedy."""
    features = model.features_of(np.zeros((len(PROMPTS), 3, 8, 8)))
    return [answer.ids for answer in generate(model, features, PROMPTS, Decoding(max_new_tokens=12))]


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_the_same_text_in_every_exact_form(stored, tmp_path):
    folder = write_model(tmp_path, dtype=stored)
    expected = answers(load_model(folder))
    forms = ["float32", *(["bfloat16"] if stored == "bfloat16" else [])]
    for form in forms:
        model = load_model(folder, weights=form)
        assert model.weights.startswith("weights: ") and form in model.weights
        assert answers(model) == expected


def test_as_it_lies_in_the_file(tmp_path):
    """bfloat16 and float32 matrices of such a file are views of it; asked for otherwise, they are converted."""
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    for stored, kind in [("bfloat16", BFloat16), ("float32", Float32)]:
        folder = write_model(tmp_path / stored, dtype=stored)
        array = flatten(load(folder)[1])[name]
        matrix = flatten(load(folder, weights=stored)[1])[name]
        assert isinstance(matrix, kind) and not matrix.stored.flags.owndata and not matrix.stored.flags.writeable
        assert np.array_equal(np.asarray(matrix), array)
        assert isinstance(flatten(load(folder, weights="int8")[1])[name], Int8)
        assert type(array) is np.ndarray  # who trains or saves gets arrays


def test_float64_computes_with_arrays(tmp_path):
    folder = write_model(tmp_path, dtype="bfloat16")
    model = load_model(folder, "float64", weights="float32")
    assert all(type(x) is np.ndarray and x.dtype == np.float64 for x in flatten(model.params).values())
    with pytest.raises(InputError, match="--weights int8: expected float32 with --dtype float64"):
        load_model(folder, "float64", weights="int8")


# --- int8 in a file ---------------------------------------------------------------------------------------------------

def write_int8(folder, change=lambda tensors: tensors):
    """The model of `write_model` with its matrices in int8; returns the arrays that they stand for."""
    write_model(folder)
    plain, tensors = {}, {}  # the table in int8 too: other programs write it so
    for name, x in flatten(load(folder)[1]).items():
        plain[name] = tensors[name] = np.array(x)
        if stays_matrix(name, x.shape):
            tensors[name], tensors[name + "_scale"] = round_to_int8(plain[name])
            plain[name] = tensors[name] * tensors[name + "_scale"]
    save_file(change(tensors), folder / "model.safetensors")
    return plain


def test_an_int8_file_is_used_as_it_lies(tmp_path):
    plain = write_int8(tmp_path)
    arrays = flatten(load(tmp_path)[1])
    assert arrays.keys() == plain.keys()
    assert all(type(x) is np.ndarray and np.array_equal(x, plain[name]) for name, x in arrays.items())
    assert all(x.dtype == np.float64 for x in flatten(load(tmp_path, np.float64)[1]).values())
    model = load_model(tmp_path)
    assert "int8, as they lie in the file" in model.weights
    matrix = model.params["language_model"]["model"]["layers"][0]["mlp"]["up_proj"]["weight"]
    assert isinstance(matrix, Int8) and not matrix.stored.flags.writeable
    assert answers(model) == answers(load_model(tmp_path, weights="float32"))


NAME = "language_model.model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize("change, words", [
    (lambda t: t | {NAME + "_scale": t[NAME + "_scale"][:-1]}, "weight_scale is F32 .23, 1., expected F32 .24, 1."),
    (lambda t: t | {NAME + "_scale": t[NAME + "_scale"].astype(np.float16)}, "up_proj.weight_scale is F16"),
    (lambda t: {name: x for name, x in t.items() if name != NAME + "_scale"}, "1 of a dtype .*up_proj.weight I8"),
    (lambda t: t | {NAME: t[NAME].astype(np.float32)}, "1 unexpected .*up_proj.weight_scale"),
    (lambda t: t | {NAME: t[NAME][:, :-1]}, "1 misshapen .*up_proj.weight")])
def test_int8_files_that_are_refused(change, words, tmp_path):
    write_int8(tmp_path, change)
    with pytest.raises(InputError, match=words):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16", "int8"])
def test_save_int8(stored, tmp_path, capsys):
    """inspect --save-int8: what it writes answers as the int8 made at load does, and holds the rest as it was."""
    source, out = tmp_path / "source", tmp_path / "new" / "out"
    if stored == "int8":
        source.mkdir()
        write_int8(source)
    else:
        write_model(source, dtype=stored)
    inspect.main([str(source), "--save-int8", str(out)])
    assert f"I8   [24, 32]             {NAME.replace('.0.', '.*.')}" in capsys.readouterr().out
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    written, made = flatten(load(out, weights="int8")[1]), flatten(load(source, weights="int8")[1])
    assert written.keys() == made.keys()
    for name, x in made.items():
        assert np.array_equal(np.asarray(written[name]), np.asarray(x)), name
    assert answers(load_model(out)) == answers(load_model(source, weights="int8"))
    assert "int8, as they lie in the file" in load_model(out).weights
    table = "language_model.model.embed_tokens.weight"
    assert isinstance(written[table], Int8 if stored == "int8" else BFloat16)


@pytest.mark.parametrize("tied", [True, False])
def test_the_table_stays_in_16_bits(tied, tmp_path):
    """With int8, also in what is written: a rounded row of the table or of a head of its own moves its logit."""
    config = CONFIG | {"tie_word_embeddings": tied}
    write_model(tmp_path / "a", config)
    inspect.main([str(tmp_path / "a"), "--save-int8", str(tmp_path / "b")])
    for folder in "ab":
        flat = flatten(load(tmp_path / folder, weights="int8")[1])
        tables = [x for name, x in flat.items() if name.endswith(("embed_tokens.weight", "lm_head.weight"))]
        assert [type(x) for x in tables] == [BFloat16] * (2 - tied)
        assert np.array_equal(tables[0].stored, to_bfloat16(flatten(load(tmp_path / "a")[1])[
            "language_model.model.embed_tokens.weight"]))


def test_a_table_of_odd_width(tmp_path):
    """bfloat16 is held in pairs of columns: such a table is float32 in memory, and has 16 bits in a file."""
    name, width = "language_model.model.embed_tokens.weight", CONFIG["text_config"]["hidden_size"] + 1
    config = CONFIG | {"hidden_size": width, "projection_dim": width,
                       "text_config": CONFIG["text_config"] | {"hidden_size": width},
                       "vision_config": CONFIG["vision_config"] | {"projection_dim": width}}
    source = write_model(tmp_path / "a", config)
    inspect.main([str(source), "--save-int8", str(tmp_path / "b")])
    table = flatten(load(source)[1])[name]
    matrix = flatten(load(tmp_path / "b", weights="int8")[1])[name]
    assert table.shape[1] % 2 and isinstance(matrix, Float32)
    assert np.array_equal(matrix.stored, from_bfloat16(to_bfloat16(table)))
    assert isinstance(held_as({name: table}, "int8")[name], Float32)


def test_save_int8_refuses(tmp_path):
    write_model(tmp_path / "a")
    with pytest.raises(InputError, match="the folder that is read, expected another"):
        inspect.main([str(tmp_path / "a"), "--save-int8", str(tmp_path / "a")])
    with pytest.raises(InputError, match="is an .npz file, expected a folder"):
        inspect.main([str(tmp_path / "a.npz"), "--save-int8", str(tmp_path / "b")])
    with pytest.raises(InputError, match="no such folder"):
        inspect.main([str(tmp_path / "c"), "--save-int8", str(tmp_path / "b")])
    assert not (tmp_path / "b").exists()


# --- the choice -------------------------------------------------------------------------------------------------------

def tensor(dtype, numbers):
    return {"a.weight": Stored("file", "a.weight", dtype, (2, numbers // 2), 0)}


@pytest.mark.parametrize("dtype, gigabytes, asked, free, form, words", [
    ("BF16", 6, None, 20, "bfloat16", "12.0 GB of bfloat16, as they lie in the file"),
    ("BF16", 6, None, 10, "int8", "6.0 GB of int8, since 12.0 GB of bfloat16 do not fit into 10.0 GB of free memory"),
    ("BF16", 6, None, 5, "bfloat16", "as they lie"),  # nothing fits, so nothing is gained by losing exactness
    ("BF16", 6, "float32", 5, "float32", "24.0 GB of float32, made from the file's BF16"),
    ("BF16", 6, "int8", 50, "int8", "made from the file's BF16"),
    ("F32", 6, None, 30, "float32", "24.0 GB of float32, as they lie in the file"),
    ("F32", 6, None, 20, "int8", "since 24.0 GB"),
    ("F32", 6, "bfloat16", 20, "bfloat16", "made from the file's F32"),
    ("F16", 6, None, 30, "float32", "24.0 GB of float32, made from the file's F16"),
    ("F64", 6, None, 30, "float32", "made from the file's F64"),
    ("I8", 6, None, 30, "int8", "as they lie in the file"),
    ("BF16", 1e-3, None, 30, None, "4 MB of float32")])
def test_the_choice_follows_file_and_memory(dtype, gigabytes, asked, free, form, words):
    chosen, line = choose_weights(tensor(dtype, int(gigabytes * 1e9)), asked, free * 1e9)
    assert chosen == form and words in line and line.startswith("weights: ") and "\n" not in line


def test_small_matrices_are_arrays(tmp_path):
    assert choose_weights(tensor("BF16", SMALL // 2))[0] is None
    assert choose_weights(tensor("BF16", SMALL // 2 + 2))[0] == "bfloat16"
    model = load_model(write_model(tmp_path, dtype="bfloat16"))
    assert all(type(x) is np.ndarray for x in flatten(model.params).values())


@pytest.mark.parametrize("form", [None, *FORMS])
def test_the_option(form, ask, tmp_path, picture):
    """--weights of run.py: the same answer to token ids, and the line that says how they are held."""
    folder = write_model(tmp_path, CONFIG, dtype="bfloat16")
    words = [picture, "--model", folder, "--prompt-ids", "2,270,14", "--max-new-tokens", "5", "--json"]
    expected = ask(*words)["output_ids"]
    if form in (None, "float32", "bfloat16"):
        assert ask(*words, *(["--weights", form] if form else []))["output_ids"] == expected
    else:
        assert len(ask(*words, "--weights", form)["output_ids"]) <= 5
