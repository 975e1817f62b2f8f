"""big_vision's .npz files: the same parameters and the same answers as from the hub's layout, and hostile bytes."""
import struct
import tracemalloc
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import flat_params, random_pixels, siglip_configs
from hypothesis import given, settings
from hypothesis import strategies as st
from npz_models import ATTENTION, described, npy, to_big_vision, write_npz

from minipali.checkpoint import safetensors_file as weights
from minipali.checkpoint.big_vision import find_model, load_npz, open_npz
from minipali.checkpoint.config import parse_config
from minipali.checkpoint.hub import load, save
from minipali.checkpoint.safetensors_file import to_bfloat16
from minipali.checkpoint.tensors import (
    count_parameters,
    flatten,
    param_shapes,
    unflatten,
)
from minipali.commands import inspect
from minipali.decoding.loaded_model import check_ids
from minipali.errors import InputError, run_command
from minipali.model.gemma import KVCache
from minipali.model.paligemma import decode, image_features, prefill
from minipali.model.siglip import encode_image, encode_text

# --- the oracle: each number of each array, by the formula that says where the hub has it -----------------------------

VISION = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3,
          "image_size": 12, "patch_size": 4, "vision_use_head": False}
GEMMA1 = {"model_type": "paligemma", "image_token_index": 30, "vision_config": VISION, "text_config": {
    "model_type": "gemma", "vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 6}}
GEMMA2 = GEMMA1 | {"text_config": GEMMA1["text_config"] | {
    "model_type": "gemma2", "num_key_value_heads": 2, "query_pre_attn_scalar": 6,
    "layer_types": ["full_attention"] * 3}}  # big_vision's has no sliding window
NO_SHARING = GEMMA1 | {"text_config": GEMMA1["text_config"] | {"num_key_value_heads": 4}}
SIGLIP = {"model_type": "siglip", "vision_config": VISION | {"vision_use_head": True}, "text_config": {
    "vocab_size": 11, "hidden_size": 10, "intermediate_size": 18, "num_hidden_layers": 3, "num_attention_heads": 2,
    "max_position_embeddings": 5, "projection_size": 12}}
FAMILIES = {"one": GEMMA1, "two": GEMMA2, "no sharing": NO_SHARING, "siglip": SIGLIP}


def random_model(config, seed=0):
    """cfg, the hub's parameters by name, big_vision's arrays by name."""
    cfg = parse_config(config)
    flat = flat_params(cfg, np.random.default_rng(seed), np.float32)
    return cfg, flat, {name: np.ascontiguousarray(x) for name, x in to_big_vision(flat, cfg).items()}


def assert_same(params, flat):
    """Bit by bit, and as the model wants it: rows of numbers that follow one another."""
    ours = flatten(params)
    assert ours.keys() == flat.keys()
    for name, x in flat.items():
        np.testing.assert_array_equal(ours[name], x, err_msg=name, strict=True)
        assert ours[name].flags.c_contiguous, name


def refusal(call, *arguments):
    """The message of the InputError that a call ends in: one printable line."""
    with pytest.raises(InputError) as error:
        call(*arguments)
    message = str(error.value)
    assert message.isprintable() and len(message) < 1000
    return message


# --- what is read -----------------------------------------------------------------------------------------------------

def answers(cfg, params):
    """What a model makes of a fixed picture and fixed text."""
    rng = np.random.default_rng(9)
    pixels = random_pixels(cfg, 2, rng, np.float32)
    if not hasattr(cfg, "image_token_index"):
        ids = rng.integers(0, cfg.text_config.vocab_size, (2, cfg.text_config.max_position_embeddings))
        return encode_image(pixels, params, cfg), encode_text(ids, params, cfg)
    features, ids = image_features(pixels, params, cfg), rng.integers(0, cfg.text_config.vocab_size, (2, 5))
    cache = KVCache(features, 2, features.shape[1] + 7, cfg.text_config)
    return prefill(features, ids, [5, 3], params, cfg, cache), decode(ids[:, :2], params, cfg, cache)


@pytest.mark.parametrize("prefix", ["", "params/"])
@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_same_as_the_hub_s_folder(tmp_path, config, prefix):
    """One model in both layouts: the same config, the same tree, the same answers, each to the last bit."""
    cfg, flat, arrays = random_model(config)
    save(tmp_path, config, unflatten(flat), "float32")
    write_npz(tmp_path / "model.npz", arrays, prefix)
    hub_cfg, hub_params = load(tmp_path)
    our_cfg, our_params = load_npz(tmp_path / "model.npz")
    assert our_cfg == hub_cfg == cfg
    assert_same(our_params, flat)
    for ours, theirs in zip(answers(our_cfg, our_params), answers(hub_cfg, hub_params)):
        np.testing.assert_array_equal(ours, theirs, strict=True)


def test_no_sliding_window(tmp_path):
    """What is decoded from an .npz sees all of the picture, however far behind; in the hub's copy it forgets it."""
    _, flat, arrays = random_model(GEMMA2)
    hub = GEMMA2 | {"text_config": {name: value for name, value in GEMMA2["text_config"].items()
                                    if name != "layer_types"} | {"sliding_window": 3}}
    save(tmp_path, hub, unflatten(flat), "float32")
    ours, theirs = load_npz(write_npz(tmp_path / "model.npz", arrays)), load(tmp_path)
    assert (ours[0].text_config.sliding_windows, theirs[0].text_config.sliding_windows) == ((None,) * 3, (3, None, 3))
    (prefix, decoded), (hub_prefix, hub_decoded) = answers(*ours), answers(*theirs)
    np.testing.assert_array_equal(prefix, hub_prefix, "a prefix sees all of itself in either")
    assert np.abs(decoded - hub_decoded).max() > 1e-3


@pytest.mark.parametrize("scanned", [(False, False), (True, False), (False, True)])
def test_a_layer_in_each_array(tmp_path, scanned):
    """The older layout, for both towers or for one; and more than ten layers, whose names do not sort as numbers."""
    config = SIGLIP | {"text_config": SIGLIP["text_config"] | {"num_hidden_layers": 11}}
    cfg, flat, _ = random_model(config)
    ours, params = load_npz(write_npz(tmp_path / "x.npz", to_big_vision(flat, cfg, scanned)))
    assert ours == cfg
    assert_same(params, flat)


@given(siglip_configs(), st.integers(0, 99), st.tuples(st.booleans(), st.booleans()))
def test_any_sizes(tmp_path_factory, cfg, seed, scanned):
    """SigLIPs of drawn sizes, equal ones among them: no size is taken for another."""
    flat = flat_params(cfg, np.random.default_rng(seed), np.float32)
    path = write_npz(tmp_path_factory.mktemp("any") / "x.npz", to_big_vision(flat, cfg, scanned))
    assert_same(load_npz(path)[1], flat)


@pytest.mark.parametrize("config", [GEMMA2, SIGLIP], ids=["two", "siglip"])
def test_dtypes(tmp_path, monkeypatch, config):
    """bfloat16 comes as two raw bytes. Each dtype of a file, in each asked for, is what the hub's loader has."""
    monkeypatch.setattr("minipali.checkpoint.npz_file.CHUNK", 7)  # small arrays in several pieces
    _, flat, arrays = random_model(config)
    for file_dtype, stored in [("float64", lambda x: x.astype(float)), ("float32", lambda x: x),
                               ("float16", lambda x: x.astype(np.float16)),
                               ("bfloat16", lambda x: to_bfloat16(x).view("V2"))]:
        save(tmp_path, config, unflatten(flat), file_dtype)
        path = write_npz(tmp_path / "x.npz", {name: stored(x) for name, x in arrays.items()})
        assert {member.dtype for member in open_npz(path)[1].values()} == {weights.SAVED_AS[file_dtype]}
        for dtype in [np.float32, np.float64]:
            assert_same(load_npz(path, dtype)[1], flatten(load(tmp_path, dtype)[1]))


@pytest.mark.parametrize("config", [GEMMA2, SIGLIP], ids=["two", "siglip"])
def test_column_major_and_compressed(tmp_path, config):
    """NumPy writes a transposed array column by column, and compresses when asked; both are other bytes only."""
    _, flat, arrays = random_model(config)
    columns = {name: np.asfortranarray(x) for name, x in arrays.items()}
    assert_same(load_npz(write_npz(tmp_path / "columns.npz", columns))[1], flat)
    assert_same(load_npz(write_npz(tmp_path / "packed.npz", arrays, save_arrays=np.savez_compressed))[1], flat)


def test_memory(tmp_path):
    """Beside the parameters there is about one layer in memory, never a stack of layers."""
    text = {"model_type": "gemma", "vocab_size": 500, "hidden_size": 64, "intermediate_size": 256,
            "num_hidden_layers": 24, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 20}
    cfg, _, arrays = random_model(GEMMA1 | {"text_config": text, "image_token_index": 500})
    path = write_npz(tmp_path / "x.npz", arrays)
    total, stack = 4 * count_parameters(cfg), arrays["llm/layers/mlp/linear"].nbytes
    del arrays
    tracemalloc.start()
    load_npz(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert total < peak < total + stack / 2


# --- sizes of the published files -------------------------------------------------------------------------------------

PUBLISHED = [  # D, L, F, N, K, H, scale, norms of Gemma 2, parameters at 224 pixels
    (2048, 18, 16384, 8, 1, 256, 256, False, 2_923_335_408), (2304, 26, 9216, 8, 4, 256, 256, True, 3_032_094_960),
    (3584, 42, 14336, 16, 8, 256, 256, True, 9_662_409_456), (4608, 46, 36864, 32, 16, 128, 144, True, 27_650_192_112)]


def paper(shapes):
    """Arrays of which only name and shape exist."""
    return {name: SimpleNamespace(name=name, shape=shape, dtype="BF16") for name, shape in shapes.items()}


def tower_shapes(root, L, D, N, F):
    layer = {f"LayerNorm_{i}/{kind}": (L, D) for i in "01" for kind in ["scale", "bias"]}
    layer |= {f"{ATTENTION}/{one}/kernel": (L, D, N, D // N) for one in ["query", "key", "value"]}
    layer |= {f"{ATTENTION}/{one}/bias": (L, N, D // N) for one in ["query", "key", "value"]}
    layer |= {f"{ATTENTION}/out/kernel": (L, N, D // N, D), f"{ATTENTION}/out/bias": (L, D)}
    layer |= {"MlpBlock_0/Dense_0/kernel": (L, D, F), "MlpBlock_0/Dense_0/bias": (L, F),
              "MlpBlock_0/Dense_1/kernel": (L, F, D), "MlpBlock_0/Dense_1/bias": (L, D)}
    return {f"{root}/encoder_norm/{kind}": (D,) for kind in ["scale", "bias"]} | {
        f"{root}/encoderblock/{name}": shape for name, shape in layer.items()}


def published_shapes(D, L, F, N, K, H, second, patches, rows=257152):
    """The shapes of a published PaliGemma, as its file lists them."""
    norms = ["pre_attention_norm", "pre_ffw_norm"] + ["post_attention_norm", "post_ffw_norm"] * second
    return tower_shapes("img/Transformer", 27, 1152, 16, 4304) | {
        "img/embedding/kernel": (14, 14, 3, 1152), "img/embedding/bias": (1152,),
        "img/pos_embedding": (1, patches, 1152), "img/head/kernel": (1152, D), "img/head/bias": (D,),
        "llm/embedder/input_embedding": (rows, D), "llm/final_norm/scale": (D,),
        "llm/layers/attn/q_einsum/w": (L, N, D, H), "llm/layers/attn/kv_einsum/w": (L, 2, K, D, H),
        "llm/layers/attn/attn_vec_einsum/w": (L, N, H, D), "llm/layers/mlp/gating_einsum": (L, 2, D, F),
        "llm/layers/mlp/linear": (L, F, D)} | {f"llm/layers/{norm}/scale": (L, D) for norm in norms}


@pytest.mark.parametrize(("patches", "image_size"), [(256, 224), (1024, 448), (4096, 896)])
@pytest.mark.parametrize("sizes", PUBLISHED, ids=["1-3B", "2-3B", "2-10B", "2-28B"])
def test_published_sizes(sizes, patches, image_size):
    """Every published PaliGemma is known by its shapes, down to what no shape says, and has as many parameters.

    None has a sliding window: big_vision's own Gemma 2 knows none. In the hub's copies every other layer has one.
    """
    D, L, F, N, K, H, scale, second, count = sizes
    cfg, _ = find_model(paper(published_shapes(D, L, F, N, K, H, second, patches)))
    text, vision = cfg.text_config, cfg.vision_config
    assert count_parameters(cfg) == count + (patches - 256) * 1152
    assert (text.query_pre_attn_scalar, text.head_dim, text.num_key_value_heads) == (scale, H, K)
    assert (text.attn_logit_softcapping, text.final_logit_softcapping) == ((50, 30) if second else (None, None))
    assert text.sliding_windows == (None,) * L
    assert (set(text.rope_thetas), text.rms_norm_eps, text.max_position_embeddings) == ({10000}, 1e-6, 8192)
    assert (vision.image_size, vision.patch_size, vision.num_patches) == (image_size, 14, patches)
    assert (vision.num_attention_heads, vision.layer_norm_eps) == (16, 1e-6)
    assert (cfg.image_token_index, cfg.bos_token_id, cfg.eos_token_ids, cfg.pad_token_id) == (257152, 2, (1,), 0)
    assert cfg.tie_word_embeddings


def test_the_image_token_is_beyond_the_table():
    """257152 rows and <image> is 257152: no prompt can name it. In a file with the hub's 257216 rows it is refused."""
    sizes = 2048, 18, 16384, 8, 1, 256, False, 256
    original, _ = find_model(paper(published_shapes(*sizes)))
    check_ids([257151], original)
    assert "outside the vocabulary" in refusal(check_ids, [257152], original)
    padded, _ = find_model(paper(published_shapes(*sizes, rows=257216)))
    assert padded.image_token_index == 257152
    assert "piece of the picture" in refusal(check_ids, [257152], padded)


def test_so400m_at_384(tmp_path):
    """27 patches of 14 cover 378 of the 384 pixels that this SigLIP was trained with: the picture is still 384."""
    config = SIGLIP | {"vision_config": SIGLIP["vision_config"] | {"image_size": 384, "patch_size": 14}}
    cfg, _, arrays = random_model(config)
    assert load_npz(write_npz(tmp_path / "x.npz", arrays))[0] == cfg


def test_multilingual_siglip_has_no_text_head(tmp_path):
    """Its head is the identity; for any other vocabulary a head that is not there is missing."""
    text = SIGLIP["text_config"] | {"vocab_size": 250_000, "hidden_size": 4, "projection_size": 4}
    config = SIGLIP | {"text_config": text, "vision_config": SIGLIP["vision_config"] | {
        "hidden_size": 4, "num_attention_heads": 2}}
    cfg, flat, arrays = random_model(config)
    arrays = {name: x for name, x in arrays.items() if not name.startswith("txt/head/")}
    ours, params = load_npz(write_npz(tmp_path / "x.npz", arrays))
    assert ours == cfg
    assert_same(params, flat | {"text_model.head.weight": np.eye(4, dtype=np.float32),
                                "text_model.head.bias": np.zeros(4, np.float32)})
    arrays["txt/Embed_0/embedding"] = arrays["txt/Embed_0/embedding"][:9]
    assert "there is no array txt/head/kernel" in refusal(load_npz, write_npz(tmp_path / "x.npz", arrays))


def test_summary(tmp_path, capsys):
    """The command that lists a folder lists a file."""
    cfg, flat, arrays = random_model(GEMMA2)
    inspect.main([str(write_npz(tmp_path / "x.npz", arrays))])
    out = capsys.readouterr().out
    assert out.startswith(f"PaliGemma 2: {count_parameters(cfg):,} parameters in {len(arrays)} tensors, ")
    assert "   1 x F32  [3, 2, 2, 16, 6]     llm/layers/attn/kv_einsum/w\n" in out
    cfg, flat, _ = random_model(SIGLIP)
    inspect.main([str(write_npz(tmp_path / "x.npz", to_big_vision(flat, cfg, (False, False))))])
    assert "   2 x F32  [12, 20]             img/Transformer/encoderblock_*/MlpBlock_0/Dense_0/kernel\n" in (
        capsys.readouterr().out)
    assert run_command("minipali inspect", inspect.main, [str(tmp_path / "no.npz")]) == 2
    assert capsys.readouterr().err == (
        f"minipali inspect: error: {tmp_path}/no.npz: no such file\n")


# --- what is refused --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("config", FAMILIES.values(), ids=FAMILIES)
def test_every_array_counts(config):
    """Each array left out, misshapen, or of integers is refused by name."""
    cfg, _, arrays = random_model(config)
    shapes = {name: x.shape for name, x in arrays.items()}
    assert find_model(paper(shapes))[0] == cfg
    renamed = {"llm/layers/post_attention_norm/scale": "1 unexpected (llm/layers/post_ffw_norm/scale)",
               "llm/layers/attn/qkv_einsum/w": "no array llm/layers/attn/q_einsum/w"}  # without one, it is another kind
    for name, shape in shapes.items():
        rest = {other: shape for other, shape in shapes.items() if other != name}
        assert renamed.get(name, name) in refusal(find_model, paper(rest))
        for wrong in [shape + (1,), (1,) + shape, shape[:-1]]:
            assert name in refusal(find_model, paper(shapes | {name: wrong}))
        integers = paper(shapes)
        integers[name].dtype = "int32"
        assert f"{name} int32" in refusal(find_model, integers)


def test_what_the_line_says(tmp_path):
    """Everything that is wrong is counted, the first of it named, and the family with it."""
    _, _, arrays = random_model(GEMMA2)

    def fails(change=(), without=()):
        changed = {name: x for name, x in (arrays | dict(change)).items() if name not in without}
        path = write_npz(tmp_path / "x.npz", changed)
        message = refusal(load_npz, path)
        assert message.startswith(f"{path}: ")
        return message

    assert "of the 34 arrays that a PaliGemma 2 of its sizes has: 1 missing (llm/layers/post_ffw_norm/scale)" in fails(
        without=["llm/layers/post_ffw_norm/scale"])
    assert "a PaliGemma of its sizes has: 1 unexpected (params/llm/layers/post_ffw_norm/scale)" in fails(
        without=["llm/layers/post_attention_norm/scale"])
    message = fails({"opt/0/count": np.zeros(3), "llm/final_norm/scale": np.zeros(5)})
    assert "1 unexpected (params/opt/0/count); 1 misshapen (llm/final_norm/scale [5] where [16] belongs)" in message
    assert "(img/embedding/bias int64)" in fails({"img/embedding/bias": np.zeros(12, int)})
    assert "(img/embedding/bias >f4)" in fails({"img/embedding/bias": np.zeros(12, ">f4")})
    assert "img/pos_embedding [1, 8, 12] where [1, 4, 12] belongs" in fails({"img/pos_embedding": np.zeros((1, 8, 12))})
    assert "image_size" in fails({"img/pos_embedding": np.zeros((1, 0, 12))})
    assert "num_channels" in fails({"img/embedding/kernel": np.zeros((4, 4, 1, 12))})
    assert "num_attention_heads" in fails({"llm/layers/attn/kv_einsum/w": np.zeros((3, 2, 3, 16, 6))})
    assert "num_hidden_layers" in fails({"llm/layers/attn/kv_einsum/w": np.zeros((2000, 2, 2, 16, 6), "f2")})
    assert "there is no array img/embedding/kernel" in fails(without=["img/embedding/kernel"])
    assert "img/embedding/kernel has the shape [48, 12], expected 4 axes" in fails(
        {"img/embedding/kernel": np.zeros((48, 12))})
    others = {"decoder.0.bias": np.zeros(3), "b\n" * 100: np.zeros(3)}
    assert "expected the arrays of a PaliGemma (llm/…) or a SigLIP (txt/…), found decoder.0.bias, b" in refusal(
        load_npz, write_npz(tmp_path / "x.npz", others))
    assert "found nothing" in refusal(load_npz, write_npz(tmp_path / "x.npz", {}))


@pytest.mark.parametrize(("content", "expected"), [
    (b"", "magic"), (b"\x93NUMPY\x01\x00\xff\xff{", "EOF"), (npy(described((2,)), bytes(8), (3, 0)), "version (3, 0)"),
    (npy(described((2,)), bytes(8), (9, 9)), "version (9, 9)"), (npy("{"), ""), (npy("[]"), "dictionary"),
    (npy("-" * 9000), ""), (npy("(" * 9000), ""), (npy("1" * 9000), ""), (npy(" " * 20000), "large"),
    (npy(described((2,), "O"), bytes(8)), "never read"), (npy(described((2,), "|O"), b"cos\nsystem\n."), "never read"),
    (npy(described((2,), [("a", "O")]), bytes(8)), "never read"),
    (npy(described((3,)), bytes(8)), "shape [3] of float32 takes 12 bytes, the file has 8"),
    (npy(described((2,)), bytes(9)), "takes 8 bytes, the file has 9"),
    (npy(described((-1, -2)), bytes(8)), "shape [-1, -2]"), (npy(described((2**62, 4)), bytes(8)), "takes"),
    (npy(described((2.0,)), bytes(8)), "shape"), (npy(described("x"), bytes(8)), "shape"),
    (npy(described((2,), "<f5"), bytes(8)), "descr"), (npy(described((2,), {}), bytes(8)), ""),
    (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2L,)}", bytes(9)), "takes 8 bytes"),
])
def test_hostile_headers(tmp_path, content, expected):
    """Each way to break the header of one array is told in one line that names it, before a number is read."""
    path = tmp_path / "x.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("params/t.npy", content)
    message = refusal(load_npz, path)
    assert message.startswith(f"{path}: params/t.npy: ") and expected in message


def test_pickles_stay_shut(tmp_path):
    """An array of objects, as NumPy itself writes it, is refused unread: unpickling would run what it says."""
    class Trap:
        def __reduce__(self):
            return pytest.fail, ("unpickled",)

    _, _, arrays = random_model(GEMMA1)
    path = write_npz(tmp_path / "x.npz", arrays | {"img/embedding/bias": np.array([Trap()] * 12, object)})
    assert "pickled" in refusal(load_npz, path)


def test_hostile_zips(tmp_path):
    """Not a zip, cut short, packed out of proportion or in another way, encrypted, two arrays of one name."""
    path = tmp_path / "x.npz"
    assert "no such file" in refusal(load_npz, path)
    assert "Is a directory" in refusal(load_npz, tmp_path)
    assert "null" in refusal(load_npz, "a\0.npz")
    _, _, arrays = random_model(GEMMA1)
    content = write_npz(path, arrays).read_bytes()
    for broken in [b"", b"PK\x05\x06", b"<!DOCTYPE html>", content[:len(content) // 2], content[:-1]]:
        path.write_bytes(broken)
        assert "not a readable .npz file" in refusal(load_npz, path)

    def zipped(entries, method=zipfile.ZIP_STORED):
        with zipfile.ZipFile(path, "w", method) as archive:
            for name, data in entries:
                archive.writestr(name, data)
        return refusal(load_npz, path)

    array = npy(described((2,)), bytes(8))
    assert "params/readme.txt: it is no array" in zipped([("params/readme.txt", b"")])
    assert "params/t.npy: there are two arrays" in zipped([("t.npy", array), ("params/t.npy", array)])
    for method in [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]:
        assert "packed in a way" in zipped([("t.npy", array)], method)
    zeros = 20 * 2**20
    assert "no weights shrink that far" in zipped([("t.npy", npy(described((zeros // 4,)), bytes(zeros)))],
                                                  zipfile.ZIP_DEFLATED)
    zipped([("t.npy", array)])
    encrypted = path.read_bytes().replace(b"PK\x03\x04\x14\0\0\0", b"PK\x03\x04\x14\0\1\0").replace(
        b"PK\x01\x02\x14\x03\x14\0\0\0", b"PK\x01\x02\x14\x03\x14\0\1\0")
    path.write_bytes(encrypted)
    assert "encrypted" in refusal(load_npz, path)


@pytest.mark.parametrize("save_arrays", [np.savez, np.savez_compressed])
def test_a_changed_number(tmp_path, save_arrays):
    """The zip's checksum tells when a number has changed; the array is named."""
    _, _, arrays = random_model(GEMMA1)
    path = write_npz(tmp_path / "x.npz", arrays, save_arrays=save_arrays)
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo("params/llm/layers/mlp/linear.npy")
    content = bytearray(path.read_bytes())
    content[entry.header_offset + 30 + len(entry.filename) + entry.compress_size // 2] ^= 4
    path.write_bytes(content)
    assert open_npz(path)
    message = refusal(load_npz, path)
    assert message.startswith(f"{path}: params/llm/layers/mlp/linear: cannot be read, damaged")


def test_an_array_that_ends_early(tmp_path):
    """A packed array of fewer numbers than the zip's directory promises, its checksum in order."""
    _, _, arrays = random_model(GEMMA1)
    del arrays["img/embedding/bias"]
    path = write_npz(tmp_path / "x.npz", arrays)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("params/img/embedding/bias.npy", npy(described((12,)), bytes(44)))
    content = bytearray(path.read_bytes())
    size_at = content.rindex(b"params/img/embedding/bias.npy") - 46 + 24
    content[size_at:size_at + 4] = struct.pack("<I", struct.unpack_from("<I", content, size_at)[0] + 4)
    path.write_bytes(content)
    assert "img/embedding/bias: cannot be read, damaged or cut short (it ends too early)" in refusal(load_npz, path)


@pytest.fixture(scope="module")
def valid_file(tmp_path_factory):
    """A small model's file, compressed so that there are more ways to break it; its bytes; where its directory is."""
    _, _, arrays = random_model(GEMMA2)
    path = write_npz(tmp_path_factory.mktemp("valid") / "x.npz", arrays, save_arrays=np.savez_compressed)
    with zipfile.ZipFile(path) as archive:
        return path, path.read_bytes(), archive.start_dir


@settings(max_examples=30)
@given(data=st.data())
def test_mutated_files(valid_file, data):
    """A file with bytes changed, cut off or put in either loads whole or is refused in one line; nothing else."""
    path, content, directory = valid_file
    mutated = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.sampled_from([0, directory]))
        where = data.draw(st.integers(start, len(mutated) - 1))
        mutated[where:where + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    path.write_bytes(mutated)
    try:
        cfg, params = load_npz(path)
    except InputError as error:
        assert str(error).isprintable()
    else:
        assert {name: x.shape for name, x in flatten(params).items()} == param_shapes(cfg)
