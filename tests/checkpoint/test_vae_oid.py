"""The mask codec's file: read as it is, or refused in one line."""
import zipfile

import numpy as np
import pytest
from helpers import GOLDEN_FILES
from hypothesis import given
from hypothesis import strategies as st
from npz_models import described, npy

from minipali.checkpoint import vae_oid
from minipali.checkpoint.tensors import flatten
from minipali.errors import InputError


def stored(prefix):
    """The arrays of the golden file whose names start with the prefix, in float32."""
    with np.load(GOLDEN_FILES / "segmentation.npz") as file:
        return {name.removeprefix(prefix): file[name].astype(np.float32)
                for name in file.files if name.startswith(prefix)}


@pytest.fixture
def arrays():
    """The tensors of a valid file, to be spoiled."""
    return stored("kernel4/params/")


def written(path, arrays):
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_file_and_back(tmp_path, arrays, dtype):
    arrays = {name: array.astype(dtype) for name, array in arrays.items()}
    found = flatten(vae_oid.read(written(tmp_path / "vae.npz", arrays)))
    assert set(found) == set(arrays)
    for name, array in found.items():
        assert array.dtype == np.float32
        assert (array == arrays[name].astype(np.float32)).all()


def test_running_averages_of_the_code_book_are_passed_over(tmp_path, arrays):
    arrays |= {"_vq_vae._ema_cluster_size": np.ones(11), "_vq_vae._ema_w": np.ones((11, 6))}
    assert "_ema_w" not in vae_oid.read(written(tmp_path / "vae.npz", arrays))["_vq_vae"]


def spoiled(name, array):
    """A change to one tensor, or its removal for None."""
    return lambda arrays: arrays.pop(name) if array is None else arrays.update({name: array(arrays.get(name))})


@pytest.mark.parametrize(("change", "message"), [
    (spoiled("decoder.12.bias", None), "lacks decoder.12.bias"),
    (lambda arrays: [arrays.pop(n) for n in list(arrays) if "encoder" in n], "lacks encoder.0.bias, .* and 19 more"),
    (spoiled("decoder.14.bias", lambda _: np.ones(3)), "has unexpected decoder.14.bias"),
    (spoiled("a\nb" + 300 * "c", lambda _: np.ones(3)), r"has unexpected a\\nbc{97}$"),
    (spoiled("encoder.2.weight", lambda x: x[:, :1]), r"encoder.2.weight has shape \(3, 1, 4, 4\), expected \(3, 2, "),
    (spoiled("encoder.2.weight", lambda x: x[0]), r"encoder.2.weight has shape \(2, 4, 4\), expected four axes"),
    (spoiled("encoder.2.weight", lambda x: x[:, :, :0]), r"shape \(3, 2, 0, 4\), expected four axes, none empty"),
    (spoiled("encoder.10.weight", lambda x: x[:4]), r"encoder.10.weight .* expected \(6, 5, 1, 1\)"),
    (spoiled("encoder.8.net.4.weight", lambda x: x[:4]), r"encoder.8.net.4.weight .* expected \(5, 5, 1, 1\)"),
    (spoiled("encoder.4.bias", lambda x: x[:-1]), r"encoder.4.bias has shape \(3,\), expected \(4,\)"),
    (spoiled("decoder.4.weight", lambda x: x[:, :, :3, :3]), r"decoder.4.weight .* expected \(7, 6, 4, 4\)"),
    (spoiled("decoder.6.weight", lambda x: x.swapaxes(0, 1)), r"decoder.6.weight has shape \(5, 6, 4, 4\), expected"),
    (spoiled("decoder.12.weight", lambda x: np.concatenate([x, x])), r"decoder.12.weight .* expected \(1, 3, 1, 1\)"),
    (spoiled("_vq_vae._embedding", lambda x: x[0]), r"_embedding has shape \(6,\), expected \(codes, code size\)"),
    (spoiled("_vq_vae._embedding", lambda x: x[:0]), r"_embedding has shape \(0, 6\), expected"),
    (spoiled("decoder.0.bias", lambda x: x.astype(np.int32)), "decoder.0.bias has dtype int32, expected a floating"),
    (spoiled("decoder.0.bias", lambda x: x.astype(object)), "decoder.0.bias.npy: it holds pickled"),
])  # fmt: skip
def test_files_that_do_not_fit(tmp_path, arrays, change, message):
    change(arrays)
    path = written(tmp_path / "vae.npz", arrays)
    with pytest.raises(InputError, match=message) as caught:
        vae_oid.read(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_files_that_are_no_npz(tmp_path, arrays):
    with pytest.raises(InputError, match="no such file"):
        vae_oid.read(tmp_path / "none.npz")
    np.save(tmp_path / "one.npy", np.ones(3))
    (tmp_path / "empty.npz").write_bytes(b"")
    whole = written(tmp_path / "vae.npz", arrays).read_bytes()
    (tmp_path / "half.npz").write_bytes(whole[:len(whole) // 2])
    for name in ("one.npy", "empty.npz", "half.npz"):
        with pytest.raises(InputError, match="not a readable .npz file"):
            vae_oid.read(tmp_path / name)
    with pytest.raises(InputError, match="cannot be read"):
        vae_oid.read(tmp_path)


def test_a_decompression_bomb_is_not_opened(tmp_path, monkeypatch, arrays):
    monkeypatch.setattr(vae_oid, "MOST_BYTES", 10_000)
    with pytest.raises(InputError, match="bytes, where a mask VQ-VAE has 10000 at the most"):
        vae_oid.read(written(tmp_path / "vae.npz", arrays))


@given(st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=4),
       st.sampled_from(["first header", "directory", "anywhere"]), st.booleans())
def test_damaged_bytes_never_give_a_traceback(tmp_path_factory, damage, place, packed):
    """Whatever byte of a whole file changes, it is either read, with the tensors that it should have, or refused."""
    path = tmp_path_factory.mktemp("damaged") / "vae.npz"
    arrays = stored("kernel4/params/")
    (np.savez_compressed if packed else np.savez)(path, **arrays)
    content = bytearray(path.read_bytes())
    start, end = {"first header": (0, 200), "directory": (content.index(b"PK\1\2"), len(content) - 1),
                  "anywhere": (0, len(content) - 1)}[place]
    for where, byte in damage:
        content[start + int(where * (end - start))] = byte
    path.write_bytes(content)
    try:
        params = flatten(vae_oid.read(path))
    except InputError as error:
        assert str(error).startswith(f"{path}: ") and str(error).isprintable()
    else:
        assert {name: x.shape for name, x in params.items()} == {name: x.shape for name, x in arrays.items()}


def rewritten(path, changes):
    """The file with some members' bytes replaced."""
    with zipfile.ZipFile(path) as members:
        content = {name: members.read(name) for name in members.namelist()}
    with zipfile.ZipFile(path, "w") as members:
        for name, data in (content | changes).items():
            members.writestr(name, data)
    return path


@pytest.mark.parametrize(("member", "message"), [
    (npy(described((2**63,))),
     r"decoder.12.bias.npy: the shape \[9223372036854775808\] of float32 takes 36893488147419103232 bytes"),
    (npy(described((2**63, 0))),
     r"decoder.12.bias has shape \(9223372036854775808, 0\), expected \(1,\)"),
    (npy(described((2**62, 4))), "takes 73786976294838206464 bytes"),
    (b"no array at all", "decoder.12.bias.npy: the magic string is not correct"), (b"", "decoder.12.bias.npy: ")])
def test_a_member_that_is_no_such_array(tmp_path, arrays, member, message):
    path = rewritten(written(tmp_path / "vae.npz", arrays), {"decoder.12.bias.npy": member})
    with pytest.raises(InputError, match=message):
        vae_oid.read(path)


def test_a_member_of_another_kind(tmp_path, arrays):
    path = rewritten(written(tmp_path / "vae.npz", arrays), {"readme.txt": b"hello"})
    with pytest.raises(InputError, match="vae.npz: readme.txt: it is no array"):
        vae_oid.read(path)


def test_a_header_that_claims_more_than_there_is(tmp_path, arrays):
    """The shape in a NumPy header is only a claim: a terabyte must not be waited for."""
    path = written(tmp_path / "vae.npz", arrays)
    with zipfile.ZipFile(path) as members:
        content = {name: members.read(name) for name in members.namelist()}
    lie = content["decoder.12.bias.npy"].replace(b"(1,), }" + b" " * 11, b"(274877906944,), }")
    assert lie != content["decoder.12.bias.npy"]
    with zipfile.ZipFile(path, "w") as members:
        for name, data in (content | {"decoder.12.bias.npy": lie}).items():
            members.writestr(name, data)
    with pytest.raises(InputError, match="decoder.12.bias.npy: the shape .274877906944. of float32 takes"):
        vae_oid.read(path)
