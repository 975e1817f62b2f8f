"""Two recordings side by side: the order of execution, the first array that differs, names in other schemes."""
import json
import math

import numpy as np
import pytest
from helpers import random_batch, random_params, random_pixels
from safetensors.numpy import save_file
from small_models import model_config, pair_config

from minipali.__main__ import main
from minipali.looking import compare as module
from minipali.looking.compare import compare, first_divergence
from minipali.looking.taps import place, standard_name, usual_cause
from minipali.model import gemma, ops, paligemma, siglip
from minipali.model.gemma import KVCache
from minipali.trace import record

LAYER = "language_model.model.layers.0"


def prefill_of(kind="gemma", dtype=np.float64, attention=False):
    """The recording of one prefill of a random model."""
    cfg, rng = model_config(kind), np.random.default_rng(0)
    p, pixels = random_params(cfg, rng, dtype), random_pixels(cfg, 1, rng, dtype)
    ids, _, _ = random_batch(cfg, 1, rng)
    with record(attention) as activations:
        features = paligemma.image_features(pixels, p, cfg)
        cache = KVCache(features, 1, 60, cfg.text_config)
        paligemma.prefill(features, ids[:, :4], np.array([4]), p, cfg, cache)
    return activations


@pytest.fixture
def run_compare(capsys, tmp_path):
    """`minipali compare` on two dicts of arrays: (status, stdout, stderr)."""
    def run_compare(a, b, *options):
        for name, arrays in [("a", a), ("b", b)]:
            save_file({key: np.ascontiguousarray(x) for key, x in arrays.items()}, tmp_path / name)
        status = main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), *options])
        return status, *capsys.readouterr()
    return run_compare


@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
@pytest.mark.parametrize("attention", [False, True])
def test_rows_come_in_the_order_of_execution(kind, attention):
    """Whatever the order of the file; and every tap of the model has its place and its usual cause."""
    activations = prefill_of(kind, attention=attention)
    rows, *others = compare(activations, dict(sorted(activations.items())))
    assert [row.name for row in rows] == list(activations) and others == [[], []]
    assert all((row.difference, row.used) == (0, 0) for row in rows) and first_divergence(rows) is None
    assert all(usual_cause(name) for name in activations)


def test_the_pair_has_its_places_too():
    cfg, rng = pair_config(), np.random.default_rng(0)
    p = random_params(cfg, rng)
    with record(attention=True) as activations:
        siglip.encode_image(random_pixels(cfg, 2, rng), p, cfg)
        siglip.encode_text(rng.integers(0, 29, (2, 7)), p, cfg)
    rows, *others = compare(activations, activations)
    assert [row.name for row in rows] == list(activations) and others == [[], []]
    assert all(usual_cause(name) for name in activations)


def interleaved(x, positions, theta):
    """The other layout of rotary pairs."""
    order = np.arange(x.shape[-1]).reshape(2, -1).T.reshape(-1)
    return ops.rope(x[..., np.argsort(order)], positions, theta)[..., order]


BUGS = [
    ("rope", gemma, interleaved, f"{LAYER}.self_attn.attn_weights", "2i and 2i + 1"),
    ("prefix_lm_mask", gemma, lambda q, k, prefix, window=None: (k <= q[..., None])[:, None][:, 0],
     f"{LAYER}.self_attn.attn_weights", "the prefix sees all of itself"),
    ("rms_norm", gemma, lambda x, weight, eps: x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight,
     f"{LAYER}.input_layernorm", "(1 + weight)"),
    ("embed_tokens", paligemma, lambda ids, p, cfg: ops.embed(ids, **p["embed_tokens"]),
     "language_model.model.embed_tokens", "sqrt(D)"),
    ("gelu", gemma, lambda x: x / (1 + np.exp(-1.702 * x)), f"{LAYER}.mlp.down_proj", "tanh form"),
    ("gelu", siglip, lambda x: np.vectorize(lambda v: v * 0.5 * (1 + math.erf(v / math.sqrt(2))))(x),
     "vision_tower.vision_model.encoder.layers.0.mlp.fc2", "tanh form"),
    ("patchify", siglip, lambda pixels, size: paligemma_patches(pixels, size)[..., ::-1],
     "vision_tower.vision_model.embeddings", "channel, row, column"),
]
paligemma_patches = siglip.patchify


@pytest.mark.parametrize(("name", "where", "wrong", "first", "words"), BUGS,
                         ids=[f"{bug[0]}-{bug[1].__name__}" for bug in BUGS])
def test_the_first_to_differ_is_named(run_compare, monkeypatch, name, where, wrong, first, words):
    """The mistakes of ports, each seeded into one run of two."""
    right = prefill_of(attention=True)
    monkeypatch.setattr(where, name, wrong)
    status, out, err = run_compare(right, prefill_of(attention=True))
    assert (status, err) == (1, "")
    marked = [line for line in out.splitlines() if line.endswith("<- the first to differ")]
    assert len(marked) == 1 and marked[0].split()[0] == first
    verdict = out[out.index("The first to differ"):]
    assert f"The first to differ: {first}\n" in verdict and words in " ".join(verdict.split())


def in_their_scheme(activations):
    """As the modules of newer transformers are called, where the output head gives all positions."""
    theirs = {}
    for name, x in activations.items():
        name = name.replace("vision_tower.vision_model.", "vision_tower.")
        name = name.replace("language_model.model.", "language_model.")
        theirs[f"model.{name}"] = x
    logits = theirs.pop("model.logits")
    theirs["lm_head"] = np.concatenate([np.zeros((1, 6, logits.shape[-1]), logits.dtype), logits[:, None]], 1)
    text = theirs["model.language_model.embed_tokens"]
    theirs["model.language_model.embed_tokens"] = np.concatenate([np.ones((1, 9, text.shape[2]), text.dtype), text], 1)
    theirs["model.language_model.rotary_emb"] = np.zeros(3, logits.dtype)
    return theirs


def test_their_names_are_ours(run_compare):
    activations = prefill_of("gemma2")
    status, out, err = run_compare(activations, in_their_scheme(activations))
    assert (status, err) == (0, "") and f"All {len(activations)} agree." in out
    assert "only in B, or of no known module: 1 (language_model.model.rotary_emb)" in out


@pytest.mark.parametrize(("theirs", "ours"), [
    ("model.language_model.layers.3.mlp", "language_model.model.layers.3.mlp"),
    ("model.layers.0", "language_model.model.layers.0"), ("lm_head", "logits"), ("language_model.lm_head", "logits"),
    ("model.multi_modal_projector", "multi_modal_projector"), ("vision_model.head", "vision_model.head"),
    ("model.vision_tower.encoder.layers.1", "vision_tower.vision_model.encoder.layers.1"),
    ("norm", "language_model.model.norm"), ("pixel_values", "pixel_values")])
def test_standard_names(theirs, ours):
    assert standard_name(theirs) == ours and place(ours) is not None


def test_names_of_no_module_have_no_place():
    for name in ["", "layers", "layers.0", "vision_model.layers.0.mlp", "language_model.model.layers.0.fc1",
                 "language_model.model.layers.x.mlp", "language_model.model.embed_tokens.weight", "logits.0"]:
        assert place(name) is None and usual_cause(name) == ""


def test_shares_and_tolerances():
    """The difference is measured by the array's largest value, the tolerance by the coarser dtype of the two."""
    def used(difference, a_type, b_type, tolerance=None):
        a, b = (np.array([[0.5, -100.0]], kind) for kind in (a_type, b_type))
        b[0, 0] += difference
        [row], _, _ = compare({"logits": a}, {"logits": b}, tolerance)
        return row.used

    assert used(5e-8, np.float64, np.float64) == pytest.approx(0.5)
    assert used(1e-3, np.float64, np.float32) == pytest.approx(0.5, rel=1e-3)
    assert used(1.5, np.float16, np.float64) == pytest.approx(0.5)
    assert used(5, np.float64, np.float64, 0.1) == pytest.approx(0.5)
    [row], _, _ = compare({"input_ids": np.array([[1, 2, 3]])}, {"input_ids": np.array([[1, 5, 3]])})
    assert row.used == math.inf and row.note == "1 of 3 differ"


@pytest.mark.parametrize(("name", "a", "b", "note"), [
    ("logits", (1, 5), (1, 4, 5), "the last position"), ("logits", (5,), (1, 4, 5), "the last position"),
    ("logits", (2, 5), (2, 4, 5), "the last position"), ("multi_modal_projector", (4, 5), (1, 4, 5), ""),
    ("language_model.model.embed_tokens", (2, 3, 5), (2, 7, 5), "the last places, those of the text"),
    (f"{LAYER}.self_attn.q_norm", (2, 3, 4, 6), (2, 4, 3, 6), "tokens and heads exchanged")])
def test_layouts_that_are_understood(name, a, b, note):
    """And the right part is taken: the same numbers agree, others do not."""
    big = np.random.default_rng(0).standard_normal(b)
    small = np.swapaxes(big, 1, 2) if "norm" in name else big[..., -1, :] if name == "logits" else big[..., -a[-2]:, :]
    small = small.reshape(a)
    for x, y in [(small, big), (big, small)]:
        [row], _, _ = compare({name: x}, {name: y})
        assert (row.used, row.note) == (0, note)
    [row], _, _ = compare({name: small + 1}, {name: big})
    assert row.used > 1


@pytest.mark.parametrize(("b", "note"), [
    (np.zeros((1, 3, 4)), "shape [1, 2, 4] in A, [1, 3, 4] in B"), (np.full((1, 2, 4), np.nan), "not all finite in B")])
def test_what_cannot_be_compared_differs(run_compare, b, note):
    status, out, _ = run_compare({"multi_modal_projector": np.zeros((1, 2, 4))}, {"multi_modal_projector": b})
    assert status == 1 and f"({note})" in out and f"What is usually wrong there: {note}." in out


def test_slow_growth_may_be_rounding(run_compare):
    a = {f"language_model.model.layers.{i}": np.ones((1, 2, 4)) for i in range(3)}
    b = {name: x + 6e-10 * (i + 1) for i, (name, x) in enumerate(a.items())}
    status, out, _ = run_compare(a, b)
    assert status == 1 and "rounding" in out
    assert "The one before it, language_model.model.layers.0, still agrees." in out
    b["language_model.model.layers.1"] += 1
    assert "rounding" not in run_compare(a, b)[1]


@pytest.mark.parametrize(("a", "b", "options", "problem"), [
    ({"logits": np.ones(2)}, {"other": np.ones(2)}, [], "no name in common"),
    ({"logits": np.ones(2), "lm_head": np.ones(2)}, {"logits": np.ones(2)}, [], "are both logits, expected one"),
    ({"logits": np.ones(2)}, {"logits": np.ones(2)}, ["--tolerance", "x"], "argument --tolerance: x: expected"),
    ({"logits": np.ones(2)}, {"logits": np.ones(2)}, ["--tolerance", "0"], "argument --tolerance: 0: expected")])
def test_refusals(run_compare, a, b, options, problem):
    status, out, err = run_compare(a, b, *options)
    assert status == 2 and out == "" and err.startswith("minipali compare: error: ") and problem in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("content", [None, b"", b"\xff" * 40, b"{}", "8-bit"])
def test_files_that_are_none(tmp_path, capsys, content):
    path = tmp_path / "a"
    if content == "8-bit":
        header = json.dumps({"logits": {"dtype": "F8_E4M3", "shape": [2], "data_offsets": [0, 2]}}).encode()
        content = len(header).to_bytes(8, "little") + header + b"\0\0"
    if content is not None:
        path.write_bytes(content)
    assert main(["compare", str(path), str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"minipali compare: error: {path}: ") and err.count("\n") == 1


def test_every_dtype_of_a_file_is_read(tmp_path):
    """bfloat16 too, which NumPy does not know; and integers."""
    x = np.array([1.5, -2.0, 0.25])
    path = tmp_path / "x"
    for dtype, raw in [("BF16", (x.astype(np.float32).view(np.uint32) >> 16).astype("<u2")), ("F16", x.astype("<f2")),
                       ("F32", x.astype("<f4")), ("F64", x), ("I64", np.array([1, -2, 0])),
                       ("BOOL", np.array([True, False, True]))]:
        header = json.dumps({"norm": {"dtype": dtype, "shape": [3], "data_offsets": [0, raw.nbytes]}}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + raw.tobytes())
        read = module.Recording(path)["language_model.model.norm"]
        assert read.tolist() == (x.tolist() if dtype[0] in "FB" and dtype != "BOOL" else raw.tolist())
