"""The safetensors format: exact conversion, and hostile bytes."""
import json
import struct

import numpy as np
import pytest
from helpers import refused
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import EMBED, PALIGEMMA_2, assert_same, entry, random_arrays, raw_file, write_folder

from minipali.checkpoint import safetensors_file as weights
from minipali.checkpoint.hub import load, save
from minipali.checkpoint.safetensors_file import from_bfloat16, read_header, to_bfloat16
from minipali.checkpoint.tensors import flatten, param_shapes, unflatten
from minipali.errors import InputError


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


EIGHT = bytes(8)


@pytest.mark.parametrize(("content", "expected"), [
    (b"", "0 bytes are too few"), (b"1234567", "7 bytes are too few"),
    (struct.pack("<Q", 2**64 - 1) + b"{}", "header claims 18446744073709551615 bytes"),
    (struct.pack("<Q", 3) + b"{}", "header claims 3 bytes"),
    (b"<!DOCTYPE html><html>", "header claims"),
    (b"version https://git-lfs.github.com/spec/v1", "a pointer of Git LFS"),
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
    (raw_file({"a": entry(0, 8, shape=(1,))}, EIGHT), "a: shape [1] in F32 takes 4 bytes, data_offsets give it 8"),
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
    message = refused(read_header, path)
    assert message.startswith(f"{path}: ") and expected in message
    assert refused(load, tmp_path) == message


def test_header_limit(tmp_path):
    """A header longer than the format allows is not read, although the file is long enough for it."""
    with open(tmp_path / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", 100_000_001))
        file.truncate(100_000_100)  # a sparse file
    assert "header claims 100000001 bytes" in refused(load, tmp_path)


def test_odd_but_valid_files(tmp_path):
    """Spaces after the header, metadata, tensors out of order, empty ones, and words that begin anywhere."""
    header = json.dumps({"__metadata__": {"format": "pt"}, "b": entry(1, 9), "none": entry(1, 1, shape=(0, 5)),
                         "a": entry(0, 1, "U8", (1,)), "scalar": entry(9, 13, shape=())}).encode()
    (tmp_path / "x.safetensors").write_bytes(raw_file(header + b"   ", bytes(13)))
    start = 8 + len(header) + 3
    tensors = read_header(tmp_path / "x.safetensors")
    assert {name: stored[2:5] for name, stored in tensors.items()} == {
        "b": ("F32", (2,), start + 1), "none": ("F32", (0, 5), start + 1), "a": ("U8", (1,), start),
        "scalar": ("F32", (), start + 9)}


def test_unaligned_tensors(tmp_path):
    """A header of odd length shifts every word of the file; the arrays are then aligned copies."""
    arrays = random_arrays(PALIGEMMA_2)
    folder = write_folder(tmp_path, arrays)
    content = (folder / "model.safetensors").read_bytes()
    length, = struct.unpack("<Q", content[:8])
    (folder / "model.safetensors").write_bytes(raw_file(content[8:8 + length] + b" ", content[8 + length:]))
    _, params = load(folder)
    assert_same(params, arrays)
    assert all(x.flags.aligned for x in flatten(params).values())


@pytest.mark.parametrize(("dtype", "value", "largest", "wider"), [
    ("float16", 70000.0, 65504.0, "float32"), ("float16", -65520.0, -65504.0, "float32"),
    ("bfloat16", 3.4e38, 3.3895314e38, "float32"), ("float32", 1e39, 3.4028235e38, "float64")])
def test_numbers_too_large_for_a_dtype(tmp_path, monkeypatch, dtype, value, largest, wider):
    """A finite number that would become infinite in the file's dtype is named with its tensor; infinity stays."""
    monkeypatch.setattr(weights, "CHUNK", 7)
    arrays = {name: x.astype(np.float64) for name, x in random_arrays(PALIGEMMA_2).items()}
    arrays[EMBED][3, 5] = largest
    arrays[EMBED][0, 0] = np.inf
    save(tmp_path, PALIGEMMA_2, unflatten(arrays), dtype)
    table = flatten(load(tmp_path)[1])[EMBED]
    assert table[3, 5] == np.float32(largest) and table[0, 0] == np.inf
    before = (tmp_path / "model.safetensors").read_bytes()
    arrays[EMBED][3, 5] = value
    message = refused(save, tmp_path, PALIGEMMA_2, unflatten(arrays), dtype)
    assert message.startswith(f"{EMBED}: {value:g} is too large for {dtype}, expected") and message.endswith(wider)
    assert (tmp_path / "model.safetensors").read_bytes() == before


@pytest.fixture(scope="module")
def valid_file(tmp_path_factory):
    """A small model's folder, stored as bfloat16 so that loading converts, and its file's bytes."""
    folder = tmp_path_factory.mktemp("valid")
    save(folder, PALIGEMMA_2, unflatten(random_arrays(PALIGEMMA_2)), "bfloat16")
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
