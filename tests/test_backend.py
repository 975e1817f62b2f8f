"""The same lines run where the arrays are: on a stand-in for a GPU's arrays they give the same bits as NumPy."""
import numpy as np
import pytest
from helpers import (
    DeviceArray,
    random_batch,
    random_params,
    random_pixels,
    valid_positions,
)
from small_models import model_config, pair_config

from minipali.backend import mapped, to_device, to_host
from minipali.errors import InputError
from minipali.learning.backward import losses as backward_losses
from minipali.learning.backward import paligemma as backward_paligemma
from minipali.learning.backward import siglip as backward_siglip
from minipali.model import losses, paligemma, siglip
from minipali.model.gemma import KVCache
from minipali.trace import record


def same(move, function):
    """Run with arrays on the host and with `move`d ones: all results stay on the device and have the same bits."""
    on_host, on_device = function(lambda x: x), function(move)
    assert on_host.keys() == on_device.keys()
    for name, x in on_device.items():
        assert isinstance(x, DeviceArray), f"{name} is {type(x)}"
        assert x.dtype == on_host[name].dtype and np.array_equal(x.get(), on_host[name]), name


def flat(tree, path=""):
    """All arrays of trees and tuples, by their place."""
    if isinstance(tree, (dict, list, tuple)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {name: x for key, child in items for name, x in flat(child, f"{path}.{key}").items()}
    return {path: tree}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
def test_paligemma_on_a_device(kind, dtype):
    """Picture, prefill, decoding, and the loss with all gradients; token ids and lengths come from the host."""
    cfg = model_config(kind)

    def run(move):
        rng = np.random.default_rng(0)
        p, pixels = mapped(random_params(cfg, rng, dtype), move), move(random_pixels(cfg, 2, rng, dtype))
        ids, lengths, prompt_lengths = random_batch(cfg, 2, rng)
        with record() as activations:
            features = paligemma.image_features(pixels, p, cfg)
            cache = KVCache(features, 2, 40, cfg.text_config)
            first = paligemma.prefill(features, ids[:, :prompt_lengths.max()], prompt_lengths, p, cfg, cache)
            second = paligemma.decode(move(np.array([[3, 4], [5, 6]])), p, cfg, cache)
            third = paligemma.decode(np.array([[3], [4]]), p, cfg, cache)
        weights = valid_positions(lengths, ids.shape[1]) & ~valid_positions(prompt_lengths, ids.shape[1])
        features, pull_features = backward_paligemma.image_features(pixels, p, cfg)
        loss, pull = backward_paligemma.suffix_loss(features, ids, lengths, prompt_lengths + features.shape[1], p, cfg,
                                                    weights.astype(dtype))
        dfeatures, grads = pull(1.0)
        return flat({"logits": [first, second, third], "activations": activations, "loss": loss, "gradients": grads,
                     "towers": pull_features(dfeatures)})

    same(DeviceArray, run)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_siglip_on_a_device(dtype):
    """Both towers, both losses, all gradients."""
    cfg = pair_config()

    def run(move):
        rng = np.random.default_rng(0)
        p, pixels = mapped(random_params(cfg, rng, dtype), move), move(random_pixels(cfg, 3, rng, dtype))
        ids = rng.integers(0, 29, (3, 7))
        scale, bias = p["logit_scale"], p["logit_bias"]
        images, texts = siglip.encode_image(pixels, p, cfg), siglip.encode_text(ids, p, cfg)
        pair = images, texts, scale
        forward = [*pair, losses.clip_loss(*pair), losses.siglip_loss(*pair, bias),
                   losses.siglip_loss_chunked(*pair, bias, 2)]
        images, pull_images = backward_siglip.encode_image(pixels, p, cfg)
        texts, pull_texts = backward_siglip.encode_text(ids, p, cfg)
        gradients = []
        for loss, *rest in [("clip_loss",), ("siglip_loss", bias), ("siglip_loss_chunked", bias, 2)]:
            y, pull = getattr(backward_losses, loss)(images, texts, scale, *rest)
            d = pull(1.0)
            gradients.append([y, *d, pull_images(d[0]), pull_texts(d[1])])
        return flat({"forward": forward, "gradients": gradients})

    same(DeviceArray, run)


def test_the_stand_in_is_strict():
    """It refuses what CuPy refuses: to become a NumPy array by itself, and to meet one."""
    device, host = DeviceArray(np.ones(3)), np.ones(3)
    for mix in [lambda: np.asarray(device), lambda: device + host, lambda: host * device, lambda: np.add(host, device),
                lambda: host @ device, lambda: np.concatenate([device, host]), lambda: device[host.astype(int)],
                lambda: np.where(device > 0, device, host), lambda: device.__setitem__(0, host[0]),
                lambda: host.__setitem__(0, device)]:
        with pytest.raises((TypeError, ValueError)):
            mix()
    assert isinstance(np.asarray(host, like=device), DeviceArray) and isinstance(2 * device + 1, DeviceArray)


def test_trees_are_moved_whole():
    tree = {"layers": [{"weight": np.ones(2)}, {"weight": np.zeros(3)}], "norm": np.arange(2)}
    back = to_host(mapped(tree, DeviceArray))
    assert flat(back).keys() == flat(tree).keys()
    assert all(type(x) is np.ndarray and np.array_equal(x, flat(tree)[name]) for name, x in flat(back).items())


def test_a_device_that_is_not_there():
    with pytest.raises(InputError, match="--backend torch: expected numpy or cupy"):
        to_device({"weight": np.zeros(2)}, "torch")
