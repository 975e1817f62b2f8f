"""Checkpoint files: exact conversion, strict checking, every naming scheme, and hostile bytes."""
import json
import re
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from small_models import SIGLIP_CONFIG, VISION_CONFIG, random_arrays

from minipali.checkpoint import safetensors_file as weights
from minipali.checkpoint.config import parse_config
from minipali.checkpoint.hub import inventory, load, open_checkpoint, save
from minipali.checkpoint.safetensors_file import from_bfloat16, read_header, to_bfloat16
from minipali.checkpoint.tensors import (
    canonical,
    count_parameters,
    flatten,
    param_shapes,
    unflatten,
)
from minipali.commands import inspect
from minipali.errors import InputError, run_command
from minipali.learning.initialize import random_params

CONFIG = {"model_type": "paligemma", "vision_config": VISION_CONFIG, "text_config": {
    "model_type": "gemma2", "vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}}
EMBED, LM_HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
HEAD_PROBE = "vision_tower.vision_model.head.probe"


def write_folder(folder, arrays, config=CONFIG):
    """A folder in the hub's layout, written by the safetensors package."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(arrays, folder / "model.safetensors")
    return folder


def write_shards(folder, shards, weight_map, config=CONFIG):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for file, arrays in shards.items():
        save_file(arrays, folder / file)
    return folder


def assert_same(params, arrays):
    flat = flatten(params)
    assert flat.keys() == arrays.keys()
    for name, x in arrays.items():
        np.testing.assert_array_equal(flat[name], x, err_msg=name, strict=True)


def refusal(call, *arguments):
    """The message of the InputError that a call ends in: one printable line."""
    with pytest.raises(InputError) as error:
        call(*arguments)
    message = str(error.value)
    assert message.isprintable() and len(message) < 1000
    return message


keys = st.sampled_from(["weight", "bias", "layers", "q_proj", "norm1", "2d", "a_b"])
trees = st.recursive(st.integers(), lambda node: st.lists(node, min_size=1, max_size=12)
                     | st.dictionaries(keys, node, min_size=1, max_size=4), max_leaves=12)


@given(st.dictionaries(keys, trees, min_size=1))
def test_flatten_unflatten(tree):
    """Trees of dicts and lists are what their dotted names say, in both directions."""
    flat = flatten(tree)
    assert unflatten(flat) == tree
    assert flatten(unflatten(flat)) == flat


def test_layer_numbers_become_indices():
    """Ten comes after nine: layers are ordered as numbers, however the file orders its names."""
    flat = {f"layers.{i}.weight": i for i in [10, 3, 0, 1, 2, 4, 5, 6, 7, 8, 9]}
    assert unflatten(flat) == {"layers": [{"weight": i} for i in range(11)]}


def test_bfloat16_all_patterns():
    """All 65536: a sign, 8 bits of exponent, 7 of fraction, by the definition; and back to the same bits."""
    bits = np.arange(65536, dtype=np.uint16)
    values = from_bfloat16(bits)
    sign, exponent, fraction = 1 - 2 * (bits >> 15).astype(float), (bits >> 7 & 255).astype(int), bits & 127
    finite = exponent < 255
    expected = sign * np.where(exponent == 0, np.ldexp(fraction / 128, -126),
                               np.ldexp(1 + fraction / 128, exponent - 127))
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values[finite].astype(float), expected[finite])
    np.testing.assert_array_equal(np.isnan(values), ~finite & (fraction > 0))
    np.testing.assert_array_equal(values[~finite & (fraction == 0)], [np.inf, -np.inf])
    nan = np.isnan(values)
    np.testing.assert_array_equal(to_bfloat16(values)[~nan], bits[~nan])
    assert np.isnan(from_bfloat16(to_bfloat16(values[nan]))).all()


def test_to_bfloat16_literal():
    """Nearest, and even where two are equally near; a NaN in the lower half alone is no infinity."""
    bits = np.array([0x3F800000, 0x3F808000, 0x3F808001, 0x3F818000, 0x3F817FFF, 0x7F7FFFFF, 0x7F800001, 0xFF800001,
                     0x00000001, 0x80008001], np.uint32)
    assert [hex(b) for b in to_bfloat16(bits.view(np.float32))] == [
        "0x3f80", "0x3f80", "0x3f81", "0x3f82", "0x3f81", "0x7f80", "0x7fc0", "0xffc0", "0x0", "0x8001"]


@given(st.integers(0, 2**32 - 1))
def test_to_bfloat16_is_nearest(seed):
    """No neighboring bfloat16 is nearer than the one that rounding chose."""
    x = np.random.default_rng(seed).standard_normal(50, np.float32)
    bits = to_bfloat16(x)
    error = np.abs(from_bfloat16(bits) - x)
    assert (error <= np.abs(from_bfloat16(bits + np.uint16(1)) - x)).all()
    assert (error <= np.abs(from_bfloat16(bits - np.uint16(1)) - x)).all()


def test_load_is_bitwise_and_in_place(tmp_path):
    """float32 asked for as float32 is the file itself: no copy, and nobody can write to it."""
    arrays = random_arrays(CONFIG)
    folder = write_folder(tmp_path, arrays)
    cfg, params = load(folder)
    assert cfg == parse_config(CONFIG)
    assert_same(params, arrays)
    for name, x in flatten(params).items():
        base = x
        while isinstance(base.base, np.ndarray):
            base = base.base
        assert isinstance(base, np.memmap), name
        assert not x.flags.writeable and x.flags.aligned, name
    changed = arrays[EMBED] + 1
    stored = read_header(folder / "model.safetensors")[EMBED]
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(stored.start)
        file.write(changed.tobytes())
    np.testing.assert_array_equal(flatten(params)[EMBED], changed)


def test_load_float64(tmp_path):
    """float64 is the same numbers, as copies."""
    arrays = random_arrays(CONFIG)
    _, params = load(write_folder(tmp_path, arrays), np.float64)
    assert_same(params, {name: x.astype(np.float64) for name, x in arrays.items()})


@pytest.mark.parametrize("config", [CONFIG, SIGLIP_CONFIG], ids=["paligemma", "siglip"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_save_load(tmp_path, monkeypatch, config, dtype):
    """What is saved comes back rounded to the file's dtype and no further; the safetensors package reads it too."""
    monkeypatch.setattr(weights, "CHUNK", 7)  # so that these small tensors are read in several pieces
    arrays = random_arrays(config)
    rounded = {name: from_bfloat16(to_bfloat16(x)) if dtype == "bfloat16" else x.astype(dtype).astype(np.float32)
               for name, x in arrays.items()}
    save(tmp_path / "new" / "folder", config, unflatten(arrays), dtype)
    cfg, params = load(tmp_path / "new" / "folder")
    assert cfg == parse_config(config)
    assert_same(params, rounded)
    tensors = read_header(tmp_path / "new" / "folder" / "model.safetensors").values()
    assert min(stored.start for stored in tensors) % 8 == 0  # so that float32 can be used where it lies
    with safe_open(tmp_path / "new" / "folder" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"} and set(file.keys()) == set(arrays)
    if dtype != "bfloat16":
        for name, x in load_file(tmp_path / "new" / "folder" / "model.safetensors").items():
            np.testing.assert_array_equal(x, arrays[name].astype(dtype), strict=True)


def test_save_is_all_or_nothing(tmp_path):
    """A save that fails half-way leaves the folder as it was."""
    params = unflatten(random_arrays(CONFIG))
    save(tmp_path, CONFIG, params, "float32")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(TypeError):
        save(tmp_path, CONFIG | {"unserializable": object()}, params, "bfloat16")
    with pytest.raises(ValueError):
        save(tmp_path, CONFIG, params | {"last": np.array("text")}, "float32")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert "cannot be written" in refusal(save, tmp_path / "config.json" / "x", CONFIG, params, "float32")


def renamed(pattern, replacement):
    return lambda name: re.sub(pattern, replacement, name)


SCHEMES = {
    "published": lambda name: name,
    "flattened tower": renamed(r"vision_tower\.vision_model\.", "vision_tower."),
    "model first": lambda name: "model." + name.replace("language_model.model.", "language_model."),
    "model first, flattened": lambda name: "model." + name.replace("language_model.model.", "language_model.").replace(
        "vision_tower.vision_model.", "vision_tower."),
    "robotics": lambda name: "paligemma_with_expert.paligemma.model." + name.replace(
        "language_model.model.", "language_model."),
    "robotics, old": lambda name: "paligemma_with_expert.paligemma." + name,
    "robotics in a policy": lambda name: "model.paligemma_with_expert.paligemma.model." + name.replace(
        "language_model.model.", "language_model.").replace("vision_tower.vision_model.", "vision_tower."),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_naming_schemes(tmp_path, scheme):
    """Whatever a version of the libraries calls the tensors, they become the same tree."""
    arrays = random_arrays(CONFIG)
    folder = write_folder(tmp_path, {SCHEMES[scheme](name): x for name, x in arrays.items()})
    assert_same(load(folder)[1], arrays)
    assert inventory(folder) == {name: ("F32", x.shape) for name, x in arrays.items()}


@pytest.mark.parametrize("prefix", ["", "model."])
def test_naming_siglip(tmp_path, prefix):
    arrays = random_arrays(SIGLIP_CONFIG)
    folder = write_folder(tmp_path, {prefix + name: x for name, x in arrays.items()}, SIGLIP_CONFIG)
    assert_same(load(folder)[1], arrays)


@pytest.mark.parametrize(("name", "expected"), [
    ("lm_head.weight", LM_HEAD), ("model.lm_head.weight", LM_HEAD), (LM_HEAD, LM_HEAD),
    ("paligemma_with_expert.paligemma.lm_head.weight", LM_HEAD), ("model.logit_scale", "logit_scale"),
    ("model.language_model.norm.weight", "language_model.model.norm.weight"),
    ("model.embed_tokens.weight", EMBED), ("norm.weight", "language_model.model.norm.weight"),
    ("model.layers.0.x", "language_model.model.layers.0.x"),
    ("layers.0.x", "language_model.model.layers.0.x"), ("model.head.weight", "model.head.weight"),
    ("paligemma_with_expert.gemma_expert.model.norm.weight", "paligemma_with_expert.gemma_expert.model.norm.weight")])
def test_canonical_literal(name, expected):
    """Single names; those of other models are left as they are, to be refused under their own name."""
    assert canonical(name) == expected


def test_buffers_are_ignored(tmp_path):
    """Old files store what is computed: position numbers and rotary frequencies."""
    arrays = random_arrays(CONFIG)
    buffers = {"vision_tower.vision_model.embeddings.position_ids": np.arange(4)[None],
               "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    folder = write_folder(tmp_path, arrays | buffers)
    assert_same(load(folder)[1], arrays)
    assert inventory(folder).keys() == arrays.keys()


def test_output_head(tmp_path):
    """Stored beside the table that it is tied to it is left out; untied it is a parameter of its own."""
    arrays = random_arrays(CONFIG)
    with_head = arrays | {LM_HEAD: arrays[EMBED]}
    assert_same(load(write_folder(tmp_path, with_head))[1], arrays)
    assert_same(load(write_folder(tmp_path, with_head, CONFIG | {"tie_word_embeddings": False}))[1], with_head)
    assert "1 unexpected" in refusal(load, write_folder(tmp_path, arrays | {LM_HEAD: arrays[EMBED][:3]}))
    assert "1 missing" in refusal(load, write_folder(tmp_path, arrays, CONFIG | {"tie_word_embeddings": False}))


def test_pooling_head(tmp_path):
    """PaliGemma never pools: a head that the config allows is left out, one that it denies is refused."""
    arrays = random_arrays(CONFIG)
    with_head = arrays | {HEAD_PROBE: np.zeros((1, 1, 12), np.float32)}
    allowed = CONFIG | {"vision_config": VISION_CONFIG | {"vision_use_head": True}}
    assert_same(load(write_folder(tmp_path, with_head, allowed))[1], arrays)
    assert f"1 unexpected ({HEAD_PROBE})" in refusal(load, write_folder(tmp_path, with_head))


def test_strict(tmp_path):
    """Everything that is wrong is counted, and the first of it named, in one line."""
    arrays = random_arrays(CONFIG)
    wrong = {name: x for name, x in arrays.items() if ".mlp.fc1." not in name}
    wrong["language_model.model.norm.weight"] = np.zeros((4, 4), np.float32)
    wrong["multi_modal_projector.linear.bias"] = np.zeros(16, np.int32)
    wrong["extra\n.tensor"] = np.zeros(1, np.float32)
    message = refusal(load, write_folder(tmp_path, wrong))
    assert str(tmp_path) in message
    assert "4 missing (vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight, " in message and "…" in message
    assert r"1 unexpected (extra\n.tensor)" in message
    assert "1 misshapen (language_model.model.norm.weight [4, 4] where [16] belongs)" in message
    assert "(multi_modal_projector.linear.bias I32)" in message


def test_other_family(tmp_path):
    """PaliGemma 2's extra norms under a PaliGemma config are refused, not dropped: the text would be nonsense."""
    first = CONFIG | {"text_config": CONFIG["text_config"] | {"model_type": "gemma"}}
    assert "6 unexpected" in refusal(load, write_folder(tmp_path, random_arrays(CONFIG), first))
    assert "6 missing" in refusal(load, write_folder(tmp_path, random_arrays(first), CONFIG))


def test_same_parameter_twice(tmp_path):
    arrays = random_arrays(CONFIG)
    twice = arrays | {"model.language_model.embed_tokens.weight": arrays[EMBED]}
    message = refusal(load, write_folder(tmp_path, twice))
    assert EMBED in message and "model.language_model.embed_tokens.weight" in message


def in_two(arrays):
    """Two shards, and the index that describes them."""
    names = list(arrays)
    shards = {"a.safetensors": {name: arrays[name] for name in names[:20]},
              "b.safetensors": {name: arrays[name] for name in names[20:]}}
    return shards, {name: file for file, tensors in shards.items() for name in tensors}


def test_shards(tmp_path):
    """Shards with their index, and the same files without one, are the single file."""
    arrays = random_arrays(CONFIG)
    folder = write_shards(tmp_path, *in_two(arrays))
    assert_same(load(folder)[1], arrays)
    (folder / "model.safetensors.index.json").unlink()
    assert_same(load(folder)[1], arrays)


def test_broken_shards(tmp_path):
    """What an index says is checked tensor by tensor, and it can name nothing outside its folder."""
    arrays = random_arrays(CONFIG)
    shards, where = in_two(arrays)
    first, *_, last = arrays

    def fails(weight_map):
        return refusal(load, write_shards(tmp_path / "model", shards, weight_map))

    assert "c.safetensors: no such file" in fails(where | {first: "c.safetensors"})
    assert f"a.safetensors: holds {first}, which model.safetensors.index.json places in b" in fails(
        where | {first: "b.safetensors"})
    assert "does not name" in fails({name: file for name, file in where.items() if name != last})
    assert "b.safetensors: lost.weight is missing" in fails(where | {"lost.weight": "b.safetensors"})
    assert "weight_map" in fails([])
    assert "weight_map" in fails({first: 3})
    save_file(shards["a.safetensors"], tmp_path / "a.safetensors")
    for outside in ["../a.safetensors", str(tmp_path / "a.safetensors"), r"..\a.safetensors", "", "..", "model.bin",
                    "x" * 5000 + ".safetensors", "a\0.safetensors", "\ud800.safetensors"]:
        fails(where | {first: outside})
    (tmp_path / "model" / "model.safetensors.index.json").write_text("{")
    assert "not valid JSON" in refusal(load, tmp_path / "model")


def test_unusable_folders(tmp_path):
    """No such folder, a file, an empty folder, a folder where the file should be, no config."""
    assert "no such folder" in refusal(load, tmp_path / "nothing")
    assert "no such folder" in refusal(load, tmp_path / ("x" * 300))
    (tmp_path / "file").write_text("")
    assert "this is a file" in refusal(load, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "found neither" in refusal(load, tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").mkdir()
    assert "cannot be read" in refusal(load, tmp_path / "empty")
    folder = write_folder(tmp_path / "model", random_arrays(CONFIG))
    (folder / "config.json").unlink()
    assert "config.json: no such file" in refusal(load, folder)


def raw_file(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def entry(begin, end, dtype="F32", shape=(2,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


EIGHT = bytes(8)


@pytest.mark.parametrize(("content", "expected"), [
    (b"", "0 bytes are too few"), (b"1234567", "7 bytes are too few"),
    (struct.pack("<Q", 2**64 - 1) + b"{}", "header claims 18446744073709551615 bytes"),
    (struct.pack("<Q", 3) + b"{}", "header claims 3 bytes"),
    (b"<!DOCTYPE html><html>", "header claims"), (b"version https://git-lfs.github.com/spec/v1", "header claims"),
    (raw_file(b""), "not valid JSON"), (raw_file(b"{"), "not valid JSON"), (raw_file(b'{"\xff": 1}'), "not valid JSON"),
    (raw_file(b"[" * 100_000), "not valid JSON"), (raw_file(b'{"a": ' + b"1" * 5000 + b"}"), "not valid JSON"),
    (raw_file(b"[]"), "no JSON object"), (raw_file(b"3"), "no JSON object"),
    (raw_file(b'{"a": {}, "a": {}}'), "a comes 2 times"),
    (raw_file(b'{"a": {"dtype": "F32", "dtype": "F16", "shape": [2], "data_offsets": [0, 8]}}', EIGHT),
     "dtype comes 2"),
    (raw_file({"a": 3}), "a: expected dtype"), (raw_file({"a": {"dtype": "F32", "shape": [2]}}, EIGHT), "a: expected"),
    (raw_file({"a": entry(0, 8, "F31")}, EIGHT), "a: dtype 'F31' is unknown"),
    (raw_file({"a": entry(0, 8, ["F32"])}, EIGHT), "a: dtype ['F32'] is unknown"),
    (raw_file({"a": entry(0, 8) | {"shape": 2}}, EIGHT), "a: shape 2"),
    (raw_file({"a": entry(0, 8, shape=(-1, -2))}, EIGHT), "a: shape [-1, -2]"),
    (raw_file({"a": entry(0, 8, shape=(2.0,))}, EIGHT), "a: shape [2.0]"),
    (raw_file({"a": entry(0, 8, shape=(2, True))}, EIGHT), "a: shape [2, True]"),
    (raw_file({"a": entry(0, 8, shape=(2**63,))}, EIGHT), "a: shape [9223372036854775808]"),
    (raw_file({"a": entry(0, 8, shape=(1,) * 5000)}, EIGHT), "a: shape [1, 1, 1, 1, 1, 1, ...] is no list"),
    (raw_file({"a": entry(0, 8, shape=(2**62, 4))}, EIGHT), "takes 73786976294838206464 bytes"),
    (raw_file({"a": entry(0, 8, shape=(3,))}, EIGHT), "a: shape [3] in F32 takes 12 bytes, data_offsets give it 8"),
    (raw_file({"a": entry(0, 8, "F64")}, EIGHT), "a: shape [2] in F64 takes 16 bytes"),
    (raw_file({"a": entry(8, 0)}, EIGHT), "a: data_offsets [8, 0]"),
    (raw_file({"a": entry(-8, 0)}, EIGHT), "a: data_offsets [-8, 0]"),
    (raw_file({"a": entry(0, 8) | {"data_offsets": [0, 8, 8]}}, EIGHT), "a: data_offsets [0, 8, 8]"),
    (raw_file({"a": entry(0, 8) | {"data_offsets": [0, "8"]}}, EIGHT), "a: data_offsets"),
    (raw_file({"a": entry(0, 8)}), "describes 8 bytes of tensors and the file has 0: it is cut short"),
    (raw_file({"a": entry(0, 8)}, EIGHT + b"1"), "describes 8 bytes of tensors and the file has 9"),
    (raw_file({"a": entry(4, 12)}, EIGHT + EIGHT), "a leaves a hole after the header"),
    (raw_file({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20)), "b leaves a hole after a"),
    (raw_file({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12)), "b overlaps a"),
    (raw_file({"a": entry(0, 8), "b": entry(0, 8)}, EIGHT), "b overlaps a"),
    (raw_file({"a\n\x1b" + "b" * 5000: entry(0, 8, "X")}, EIGHT), r"a\n\x1bbbb"),
])
def test_hostile_files(tmp_path, content, expected):
    """Each way to break a file is told in one line that names the file and the tensor, before a tensor is read."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    message = refusal(read_header, path)
    assert message.startswith(f"{path}: ") and expected in message
    assert refusal(load, tmp_path) == message


def test_header_limit(tmp_path):
    """A header longer than the format allows is not read, although the file is long enough for it."""
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(100_000_100)  # a sparse file
    assert "header claims 100000001 bytes" in refusal(load, tmp_path)


def test_odd_but_valid_files(tmp_path):
    """Spaces after the header, metadata, tensors out of order, empty ones, and words that begin anywhere."""
    header = json.dumps({"__metadata__": {"format": "pt"}, "b": entry(1, 9), "none": entry(1, 1, shape=(0, 5)),
                         "a": entry(0, 1, "U8", (1,)), "scalar": entry(9, 13, shape=())}).encode()
    (tmp_path / "x.safetensors").write_bytes(raw_file(header + b"   ", bytes(13)))
    start = 8 + len(header) + 3
    tensors = read_header(tmp_path / "x.safetensors")
    assert {name: stored[2:] for name, stored in tensors.items()} == {
        "b": ("F32", (2,), start + 1), "none": ("F32", (0, 5), start + 1), "a": ("U8", (1,), start),
        "scalar": ("F32", (), start + 9)}


def test_unaligned_tensors(tmp_path):
    """A header of odd length shifts every word of the file; the arrays are then aligned copies."""
    arrays = random_arrays(CONFIG)
    folder = write_folder(tmp_path, arrays)
    content = (folder / "model.safetensors").read_bytes()
    length, = struct.unpack("<Q", content[:8])
    (folder / "model.safetensors").write_bytes(raw_file(content[8:8 + length] + b" ", content[8 + length:]))
    _, params = load(folder)
    assert_same(params, arrays)
    assert all(x.flags.aligned for x in flatten(params).values())


@pytest.fixture(scope="module")
def valid_file(tmp_path_factory):
    """A small model's folder, stored as bfloat16 so that loading converts, and its file's bytes."""
    folder = tmp_path_factory.mktemp("valid")
    save(folder, CONFIG, unflatten(random_arrays(CONFIG)), "bfloat16")
    return folder, (folder / "model.safetensors").read_bytes()


@settings(max_examples=40)
@given(data=st.data())
def test_mutated_files(valid_file, data):
    """A file with bytes changed, cut off or put in either loads whole or is refused in one line; nothing else."""
    folder, content = valid_file
    header_end = 8 + struct.unpack("<Q", content[:8])[0]
    mutated = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, min(header_end + 8, len(mutated) - 1)))
        mutated[at:at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    mutated = mutated[:data.draw(st.sampled_from([None, header_end - 5, len(content) - 3, at]))]
    (folder / "model.safetensors").write_bytes(mutated)
    try:
        cfg, params = load(folder)
    except InputError as error:
        assert str(error).isprintable()
    else:
        assert {name: x.shape for name, x in flatten(params).items()} == param_shapes(cfg)


@pytest.mark.parametrize("config", [CONFIG, SIGLIP_CONFIG], ids=["paligemma", "siglip"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_random_params(config, dtype):
    """Matrices keep the size of what goes through them; norms, biases and SigLIP's scalars start where they should."""
    cfg = parse_config(config)
    params = flatten(random_params(cfg, np.random.default_rng(3), dtype))
    assert {name: x.shape for name, x in params.items()} == param_shapes(cfg)
    assert all(x.dtype == dtype for x in params.values())
    readers = [x.ravel() * np.sqrt(x.shape[1]) for name, x in params.items()
               if name.endswith(("q_proj.weight", "fc1.weight", "gate_proj.weight"))]
    assert abs(np.concatenate(readers).std() - 1) < 0.1
    for name, x in params.items():
        if name.startswith("logit"):
            assert x == pytest.approx(np.log(10) if name == "logit_scale" else -10)
        elif x.ndim == 1:
            vision_norm = "norm" in name and not name.startswith("language_model") and name.endswith(".weight")
            assert (x == (1 if vision_norm else 0)).all(), name
    again = flatten(random_params(cfg, np.random.default_rng(3), dtype))
    assert all((again[name] == x).all() for name, x in params.items())


def test_summary(tmp_path, capsys):
    """The command prints a checkpoint's sizes and condensed shapes, and one line of error for what it cannot read."""
    folder = write_folder(tmp_path, random_arrays(CONFIG))
    cfg, _ = open_checkpoint(folder)
    inspect.main([str(folder)])
    out = capsys.readouterr().out
    count, tensors = count_parameters(cfg), len(param_shapes(cfg))
    assert out.startswith(f"PaliGemma 2: {count:,} parameters in {tensors} tensors")
    assert "   3 x F32  [24, 16]             language_model.model.layers.*.self_attn.q_proj.weight\n" in out
    assert run_command("minipali inspect", inspect.main, [str(tmp_path / "nothing")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.endswith("nothing: no such folder\n") and captured.err.count("\n") == 1


def test_inspecting_reads_no_tensor(tmp_path):
    """A file whose tensors are a hole on the disk, larger than memory, is described all the same."""
    header, end = {}, 0
    config = CONFIG | {"text_config": CONFIG["text_config"] | {"vocab_size": 2**25, "hidden_size": 1024}}
    for name, shape in param_shapes(parse_config(config)).items():
        size = 4 * int(np.prod(shape, dtype=object))
        header[name] = entry(end, end + size, shape=shape)
        end += size
    (tmp_path / "config.json").write_text(json.dumps(config))
    with open(tmp_path / "model.safetensors", "wb") as file:
        head = json.dumps(header).encode()
        file.write(raw_file(head + b" " * (-len(head) % 8)))
        file.truncate(file.tell() + end)
    assert inventory(tmp_path)[EMBED] == ("F32", (2**25, 1024))
    assert next(inspect.summary(tmp_path)).startswith("PaliGemma 2: 34,3")
    assert load(tmp_path)[1]["language_model"]["model"]["embed_tokens"]["weight"][2**24, :3].tolist() == [0, 0, 0]
