"""What several test files share: one table of tolerances, one comparison, random small models, a stand-in device."""
import contextlib
import lzma
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st
from numpy.lib.mixins import NDArrayOperatorsMixin

from minipali.checkpoint.config import (
    GemmaConfig,
    PaliGemmaConfig,
    SiglipConfig,
    SiglipTextConfig,
    VisionConfig,
)
from minipali.checkpoint.tensors import param_shapes, unflatten
from minipali.errors import InputError

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
GOLDEN_FILES = TESTS / "golden"


@contextlib.contextmanager
def unpacked(name):
    """The path of the golden file NAME, which is packed as NAME.xz, for as long as the block runs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(lzma.decompress((GOLDEN_FILES / f"{name}.xz").read_bytes()))
        yield path


def one_line(err):
    assert re.fullmatch(r"run\.py: error: \S[^\n]{10,600}\n", err), err
    return err.removeprefix("run.py: error: ").strip()


def refused(call, *arguments):
    """The message of the InputError that a call ends in: one printable line."""
    with pytest.raises(InputError) as error:
        call(*arguments)
    message = str(error.value)
    assert message.isprintable() and len(message) < 1000
    return message


# --- tolerances -------------------------------------------------------------------------------------------------------

# Largest difference allowed, as a fraction of the reference's largest absolute value. Beside each the worst that was
# measured. No test has a tolerance of its own.
TOLERANCES = {
    "formula": {"float64": 1e-12, "float32": 4e-6},     # one function against another way to write it: 1e-15, 5e-8
    "golden": {"float64": 1e-9, "float32": 4e-6},       # a whole model against transformers: 4e-15, 1.2e-6
    "golden gradient": {"float64": 1e-9, "float32": 2e-5},  # the same for gradients: 1e-14, 4e-6
    "real weights": {"float32": 1e-4},                  # 18 layers of Gemma 3 270M against transformers
    "reordered": {"float64": 1e-12, "float32": 1e-5},   # cache or none, batch or single, in pieces: 1e-15, 2e-7
    "gradient": {"float64": 1e-7},                      # against central differences: 2e-10
}


def assert_close(name, ours, ref, kind, scale=None):
    """Compare at the table's tolerance; `scale` replaces the reference's largest value where that is no measure."""
    ours, ref = np.asarray(ours), np.asarray(ref, dtype=np.float64)
    assert ours.shape == ref.shape, f"{name}: shape {ours.shape}, expected {ref.shape}"
    if not ours.size:
        return
    allowed = TOLERANCES[kind][ours.dtype.name] * (np.abs(ref).max() if scale is None else scale)
    difference = np.abs(ours.astype(np.float64) - ref)
    at = tuple(map(int, np.unravel_index(np.argmax(difference), ref.shape)))
    used = 100 * difference[at] / allowed if allowed else (0 if difference[at] == 0 else np.inf)
    report = (f"{name} ({ours.dtype}, {kind}): max|Δ| {difference[at]:.3g} at {at}: {ours[at]:.9g}, "
              f"expected {ref[at]:.9g}; {used:.3g} % of the tolerance used")
    print(report)
    assert np.isfinite(ours).all(), f"{name}: not finite; {report}"
    assert used <= 100, report


# --- random small models ----------------------------------------------------------------------------------------------

seeds = st.integers(0, 2**32 - 1)


@st.composite
def vision_configs(draw, use_head=False):
    """Small towers. The norms' eps is large, so that a change in it is seen and widths of 2 have no steep places."""
    heads, patch = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    return VisionConfig(
        hidden_size=heads * draw(st.integers(2, 4)), intermediate_size=draw(st.integers(1, 9)),
        num_hidden_layers=draw(st.integers(1, 2)), num_attention_heads=heads,
        image_size=patch * draw(st.integers(1, 3)) + draw(st.integers(0, patch - 1)), patch_size=patch, num_channels=3,
        layer_norm_eps=0.01, vision_use_head=use_head)


@st.composite
def gemma_configs(draw):
    """Gemma 1, 2 and 3 with any sharing of heads; caps, windows and rotary bases are small enough to matter."""
    family, kv_heads, layers = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    head_dim = 2 * draw(st.integers(1, 3))
    second, third, window = family == 2, family == 3, draw(st.integers(1, 5)) if family > 1 else None
    return GemmaConfig(
        vocab_size=draw(st.integers(6, 20)), hidden_size=draw(st.integers(2, 9)),
        intermediate_size=draw(st.integers(1, 9)), num_hidden_layers=layers,
        num_attention_heads=kv_heads * draw(st.integers(1, 3)), num_key_value_heads=kv_heads, head_dim=head_dim,
        rms_norm_eps=0.01, rope_thetas=tuple(200.0 if third and i % 2 else 10.0 for i in range(layers)),
        rope_factors=tuple(3.0 if third and i % 2 else 1.0 for i in range(layers)), max_position_embeddings=64,
        query_pre_attn_scalar=head_dim if family == 1 else draw(st.integers(1, 9)),
        attn_logit_softcapping=2.0 if second else None, final_logit_softcapping=3.0 if second else None,
        sliding_windows=tuple(None if i % 2 else window for i in range(layers)), post_norms=family > 1, qk_norms=third,
        prefix_lm=draw(st.booleans()))


@st.composite
def paligemma_configs(draw):
    text = draw(gemma_configs())
    return PaliGemmaConfig(
        vision_config=draw(vision_configs()), text_config=text, image_token_index=text.vocab_size - 1, bos_token_id=2,
        eos_token_ids=(1,), pad_token_id=0, tie_word_embeddings=draw(st.booleans()))


@st.composite
def siglip_configs(draw):
    vision, heads = draw(vision_configs(use_head=True)), draw(st.integers(1, 2))
    text = SiglipTextConfig(
        vocab_size=draw(st.integers(2, 12)), hidden_size=heads * draw(st.integers(2, 4)),
        intermediate_size=draw(st.integers(1, 9)), num_hidden_layers=draw(st.integers(1, 2)), num_attention_heads=heads,
        max_position_embeddings=draw(st.integers(1, 5)), layer_norm_eps=0.01, projection_size=vision.hidden_size,
        pad_token_id=0)
    return SiglipConfig(vision_config=vision, text_config=text)


def flat_params(cfg, rng, dtype=np.float64):
    """Random values for every tensor of the checkpoint; norm weights stay away from 0 and from 1."""
    params = {}
    for name, shape in param_shapes(cfg).items():
        if len(shape) > 1:
            x = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        elif "norm" in name and name.endswith("weight"):
            x = rng.choice([-1, 1], shape) * rng.uniform(0.3, 0.7, shape)
        else:
            x = 0.4 * rng.standard_normal(shape)
        params[name] = x.astype(dtype)
    return params


def random_params(cfg, rng, dtype=np.float64):
    """The same as the tree that the model reads."""
    return unflatten(flat_params(cfg, rng, dtype))


def random_pixels(cfg, batch, rng, dtype=np.float64):
    size = cfg.vision_config.image_size
    return rng.uniform(-1, 1, (batch, 3, size, size)).astype(dtype)


def random_batch(cfg, batch, rng):
    """Rows of unequal length -> ids (B,T) padded on the right, lengths (B,), prompt_lengths (B,)."""
    prompt_lengths = rng.integers(1, 5, batch)
    lengths = prompt_lengths + rng.integers(1, 7, batch)
    ids = rng.integers(2, cfg.text_config.vocab_size - 1, (batch, lengths.max()))
    return np.where(np.arange(lengths.max()) < lengths[:, None], ids, 0), lengths, prompt_lengths


def valid_positions(lengths, width):
    """(B,) -> (B,width) of bool: True up to each row's length."""
    return np.arange(width) < np.asarray(lengths)[:, None]


# --- a device without a device ----------------------------------------------------------------------------------------

class DeviceArray(NDArrayOperatorsMixin):
    """An array that behaves as CuPy's does where that matters: NumPy's functions are handed to it, its results stay "on
    the device", it never becomes a NumPy array by itself, and a NumPy array among its operands is an error."""

    def __init__(self, host):
        self._host = np.asarray(host)

    def __array__(self, *args, **kwargs):
        raise TypeError("implicit conversion of a device array to a NumPy array")

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **kwargs):
        if out is not None:
            kwargs["out"] = tuple(_to_host(x) for x in out)
        return _to_device(getattr(ufunc, method)(*map(_to_host, inputs), **kwargs))

    def __array_function__(self, function, types, args, kwargs):
        if function in (np.asarray, np.array):  # the one way in, np.asarray(host, like=device)
            args = [x._host if isinstance(x, DeviceArray) else x for x in args]
            return _to_device(function(*args, **kwargs))
        return _to_device(function(*map(_to_host, args), **{key: _to_host(x) for key, x in kwargs.items()}))

    def __getitem__(self, key):
        return _to_device(self._host[_to_host(key)])

    def __setitem__(self, key, value):
        self._host[_to_host(key)] = _to_host(value)

    def get(self):
        """The explicit way out, CuPy's name for it."""
        return self._host.copy()

    def __len__(self):
        return len(self._host)

    shape = property(lambda self: self._host.shape)
    dtype = property(lambda self: self._host.dtype)
    ndim = property(lambda self: self._host.ndim)
    size = property(lambda self: self._host.size)
    T = property(lambda self: _to_device(self._host.T))


def _method(name):
    def call(self, *args, **kwargs):
        return _to_device(getattr(self._host, name)(*args, **kwargs))
    return call


for _name in ["reshape", "transpose", "astype", "sum", "mean", "max", "min", "argmax", "copy", "all", "any"]:
    setattr(DeviceArray, _name, _method(_name))


def _to_host(x):
    if isinstance(x, DeviceArray):
        return x._host
    if isinstance(x, (list, tuple)):
        return type(x)(map(_to_host, x))
    if isinstance(x, (np.ndarray, np.generic)):
        raise TypeError(f"a host array of shape {x.shape} among device arrays")
    return x


def _to_device(x):
    if isinstance(x, (np.ndarray, np.generic)):
        return DeviceArray(x)
    return type(x)(map(_to_device, x)) if isinstance(x, (list, tuple)) else x
