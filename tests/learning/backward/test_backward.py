"""Every function of the learning room against central differences of its forward partner, in random directions."""
import inspect
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from helpers import (
    TOLERANCES,
    assert_close,
    flat_params,
    paligemma_configs,
    random_batch,
    random_pixels,
    seeds,
    siglip_configs,
    valid_positions,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from minipali.checkpoint.tensors import flatten, unflatten
from minipali.learning import backward
from minipali.learning.backward import gemma, losses, ops, paligemma, siglip
from minipali.model import gemma as model_gemma
from minipali.model import losses as model_losses
from minipali.model import ops as model_ops
from minipali.model import paligemma as model_paligemma
from minipali.model import siglip as model_siglip
from minipali.model.gemma import prefix_lm_mask


@dataclass
class Case:
    """Arrays with a gradient (`inputs` in the order in which pull returns theirs, `params` by name), and two ways to
    call: `forward(inputs, params)` -> y and `backward(inputs, params)` -> (y, pull)."""
    inputs: dict
    params: dict
    forward: Callable
    backward: Callable

    def gradients(self, pull, dy):
        """What pull returns, by the names of the arrays."""
        result, named = pull(dy), {}
        arrays = iter(self.inputs)
        for part in result if isinstance(result, tuple) else (result,):
            named.update(flatten(part) if isinstance(part, dict) else {next(arrays): part})
        return named


CASES = {}


def case(*names):
    """Register the builder of a case, once for each of the functions that it serves."""
    def register(build):
        CASES.update(dict.fromkeys(names, build))
        return build
    return register


def both(name, inputs, params, call):
    """A case whose two partners take the same arguments: call(function, inputs, params)."""
    room, function = name.split(".")
    rooms = {"ops": (ops, model_ops), "siglip": (siglip, model_siglip), "gemma": (gemma, model_gemma),
             "paligemma": (paligemma, model_paligemma), "losses": (losses, model_losses)}
    ours, model = (getattr(module, function) for module in rooms[room])
    return Case(inputs, params, lambda i, p: call(model, i, p), lambda i, p: call(ours, i, p))


def shape(draw, dims):
    return tuple(draw(st.integers(1, 5)) for _ in range(dims))


@case("ops.softmax", "ops.log_softmax", "ops.log_sum_exp", "ops.log_sigmoid", "ops.sigmoid", "ops.gelu")
def elementwise(name, draw, rng):
    x = 2 * rng.standard_normal(shape(draw, draw(st.integers(1, 3))))
    return both(name, {"x": x}, {}, lambda f, i, p: f(i["x"]))


@case("ops.linear")
def linear(name, draw, rng):
    x = rng.standard_normal(shape(draw, draw(st.integers(2, 3))))
    params = {"weight": rng.standard_normal((4, x.shape[-1]))}
    if draw(st.booleans()):
        params["bias"] = rng.standard_normal(4)
    return both(name, {"x": x}, params, lambda f, i, p: f(i["x"], **p))


@case("ops.layer_norm", "ops.rms_norm")
def norm(name, draw, rng):
    x = rng.standard_normal((*shape(draw, draw(st.integers(1, 2))), draw(st.integers(2, 6))))
    params = {"weight": rng.standard_normal(x.shape[-1])}
    if name == "ops.layer_norm":
        params["bias"] = rng.standard_normal(x.shape[-1])
    return both(name, {"x": x}, params, lambda f, i, p: f(i["x"], **p, eps=0.01))


@case("ops.embed")
def embed(name, draw, rng):
    ids = rng.integers(0, 4, shape(draw, 2))
    return both(name, {}, {"weight": rng.standard_normal((4, 3))}, lambda f, i, p: f(ids, **p))


@case("ops.rope")
def rope(name, draw, rng):
    batch, tokens, heads, half = shape(draw, 4)
    x, positions = rng.standard_normal((batch, tokens, heads, 2 * half)), rng.integers(0, 99, (batch, tokens))
    return both(name, {"x": x}, {}, lambda f, i, p: f(i["x"], positions, 1e4))


@case("ops.attention", "ops.attention_weights", "ops.weighted_values")
def attention(name, draw, rng):
    B, T, S, K, H = shape(draw, 5)
    N = K * draw(st.integers(1, 3))
    q, k, v = (rng.standard_normal(s) for s in [(B, T, N, H), (B, S, K, H), (B, S, K, H)])
    mask, softcap = (rng.random((B, T, S)) < 0.7) if draw(st.booleans()) else None, draw(st.sampled_from([None, 1.3]))
    if name == "ops.attention":
        return both(name, {"q": q, "k": k, "v": v}, {}, lambda f, i, p: f(*i.values(), mask, 0.8, softcap))
    if name == "ops.attention_weights":
        return both(name, {"q": q, "k": k}, {}, lambda f, i, p: f(*i.values(), mask, 0.8, softcap))
    return both(name, {"weights": rng.random((B, N, T, S)), "v": v}, {}, lambda f, i, p: f(*i.values()))


@case("siglip.patchify")
def patchify(name, draw, rng):
    size = draw(st.integers(1, 3))
    pixels = rng.standard_normal((2, 3, *(size * n + draw(st.integers(0, size - 1)) for n in (1, 2))))
    return both(name, {"pixels": pixels}, {}, lambda f, i, p: f(i["pixels"], size))


def below(params, prefix):
    """The part of a flat tree that lies below a name."""
    return {name.removeprefix(prefix): x for name, x in params.items() if name.startswith(prefix)}


@case("siglip.self_attention", "siglip.mlp", "siglip.encoder_layer", "siglip.encoder", "siglip.attention_pool")
def vision_part(name, draw, rng):
    cfg = draw(siglip_configs())
    layer = "encoder.layers.0."
    prefix = {"self_attention": layer + "self_attn.", "mlp": layer + "mlp.", "encoder_layer": layer,
              "encoder": "encoder.", "attention_pool": "head."}[name.removeprefix("siglip.")]
    params = below(flat_params(cfg, rng), "vision_model." + prefix)
    x = rng.standard_normal((*shape(draw, 2), cfg.vision_config.hidden_size))
    rest = () if name == "siglip.mlp" else (cfg.vision_config,)
    return both(name, {"x": x}, params, lambda f, i, p: f(i["x"], unflatten(p), *rest))


@case("siglip.patch_embeddings", "siglip.vision_tower")
def vision_tower(name, draw, rng):
    cfg = draw(siglip_configs())
    params = below(flat_params(cfg, rng), "vision_model.")
    params = below(params, "embeddings.") if name == "siglip.patch_embeddings" else {
        key: x for key, x in params.items() if not key.startswith("head.")}
    return both(name, {"pixels": random_pixels(cfg, 2, rng)}, params,
                lambda f, i, p: f(i["pixels"], unflatten(p), cfg.vision_config))


@case("siglip.encode_image")
def encode_image(name, draw, rng):
    cfg = draw(siglip_configs())
    params = {key: x for key, x in flat_params(cfg, rng).items() if key.startswith("vision_model.")}
    return both(name, {"pixels": random_pixels(cfg, 2, rng)}, params, lambda f, i, p: f(i["pixels"], unflatten(p), cfg))


@case("siglip.encode_text")
def encode_text(name, draw, rng):
    cfg = draw(siglip_configs())
    params = {key: x for key, x in flat_params(cfg, rng).items() if key.startswith("text_model.")}
    ids = rng.integers(0, cfg.text_config.vocab_size, (3, cfg.text_config.max_position_embeddings))
    return both(name, {}, params, lambda f, i, p: f(ids, unflatten(p), cfg))


@case("gemma.self_attention", "gemma.mlp", "gemma.decoder_layer", "gemma.decoder", "gemma.embed_tokens",
      "gemma.output_logits")
def gemma_part(name, draw, rng):
    cfg = draw(paligemma_configs())
    params, cfg = below(flat_params(cfg, rng), "language_model.model."), cfg.text_config
    batch, tokens = shape(draw, 2)
    x = rng.standard_normal((batch, tokens, cfg.hidden_size))
    positions = np.where(np.arange(tokens) < rng.integers(1, tokens + 1, (batch, 1)), np.arange(tokens), -1)
    prefix_len = rng.integers(0, tokens + 1, batch)
    mask = prefix_lm_mask(positions, positions, prefix_len, cfg.sliding_windows[0])
    if name == "gemma.embed_tokens":
        ids = rng.integers(0, cfg.vocab_size, (batch, tokens))
        table = {"embed_tokens.weight": params["embed_tokens.weight"]}
        return both(name, {}, table, lambda f, i, p: f(ids, unflatten(p), cfg))
    if name == "gemma.output_logits":
        table = {"weight": params["embed_tokens.weight"]}
        return both(name, {"x": x}, table, lambda f, i, p: f(i["x"], p["weight"], cfg))
    if name == "gemma.decoder":
        del params["embed_tokens.weight"]
        return both(name, {"x": x}, params, lambda f, i, p: f(i["x"], unflatten(p), cfg, positions, prefix_len))
    if name == "gemma.mlp":
        return both(name, {"x": x}, below(params, "layers.0.mlp."), lambda f, i, p: f(i["x"], unflatten(p)))
    params = below(params, "layers.0.self_attn." if name == "gemma.self_attention" else "layers.0.")
    ours, model = getattr(gemma, name.split(".")[1]), getattr(model_gemma, name.split(".")[1])
    return Case({"x": x}, params, lambda i, p: model(i["x"], unflatten(p), cfg, positions, mask, 0),
                lambda i, p: ours(i["x"], unflatten(p), cfg, positions, mask, 0))


@case("paligemma.image_features")
def image_features(name, draw, rng):
    cfg = draw(paligemma_configs())
    params = {key: x for key, x in flat_params(cfg, rng).items() if not key.startswith("language_model.")}
    return both(name, {"pixels": random_pixels(cfg, 2, rng)}, params, lambda f, i, p: f(i["pixels"], unflatten(p), cfg))


@case("paligemma.join", "paligemma.forward", "paligemma.suffix_loss")
def whole(name, draw, rng):
    cfg = draw(paligemma_configs())
    params = {key: x for key, x in flat_params(cfg, rng).items() if key.startswith("language_model.")}
    features = rng.standard_normal((2, cfg.vision_config.num_patches, cfg.text_config.hidden_size))
    ids, lengths, prompt_lengths = random_batch(cfg, 2, rng)
    prefix_len = prompt_lengths + features.shape[1]
    if name == "paligemma.join":
        params = {key: x for key, x in params.items() if "embed_tokens" in key}

        def pull_of_x(i, p):
            (x, _), pull = paligemma.join(i["features"], ids, lengths, unflatten(p), cfg)
            return x, pull
        return Case({"features": features}, params,
                    lambda i, p: model_paligemma.join(i["features"], ids, lengths, unflatten(p), cfg)[0], pull_of_x)
    if name == "paligemma.forward":
        params = {key: x for key, x in params.items() if "lm_head" not in key}
        return both(name, {"features": features}, params,
                    lambda f, i, p: f(i["features"], ids, lengths, prefix_len, unflatten(p), cfg))
    suffix = valid_positions(lengths, ids.shape[1]) & ~valid_positions(prompt_lengths, ids.shape[1])
    weights = suffix * rng.random(ids.shape)

    def loss(i, p):
        """The sum as one reads it: the output at t scores the token at t + 1."""
        p = unflatten(p)
        x = model_paligemma.forward(i["features"], ids, lengths, prefix_len, p, cfg)
        logits = model_gemma.output_logits(x, model_paligemma.output_head(p, cfg), cfg.text_config)
        terms = model_losses.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), ids[:, 1:].ravel())
        return (terms.reshape(len(ids), -1) * weights[:, 1:].astype(terms.dtype)).sum()
    return Case({"features": features}, params, loss, lambda i, p: paligemma.suffix_loss(
        i["features"], ids, lengths, prefix_len, unflatten(p), cfg, weights.astype(i["features"].dtype)))


@case("losses.cross_entropy")
def cross_entropy(name, draw, rng):
    logits = rng.standard_normal(shape(draw, 2))
    targets = rng.integers(0, logits.shape[1], len(logits))
    return both(name, {"logits": logits}, {}, lambda f, i, p: f(i["logits"], targets))


@case("losses.l2_normalize")
def l2_normalize(name, draw, rng):
    x = rng.standard_normal((draw(st.integers(1, 4)), draw(st.integers(2, 4))))
    return both(name, {"x": x}, {}, lambda f, i, p: f(i["x"]))


@case("losses.similarity", "losses.clip_loss", "losses.siglip_loss", "losses.siglip_loss_chunked")
def contrastive(name, draw, rng):
    images, texts = rng.standard_normal((2, draw(st.integers(1, 5)), draw(st.integers(2, 4))))
    inputs = {"images": images, "texts": texts, "log_scale": rng.standard_normal(1)}
    if "siglip" in name:
        inputs["bias"] = rng.standard_normal(1)
    rest = (draw(st.integers(1, 6)),) if "chunked" in name else ()
    return both(name, inputs, {}, lambda f, i, p: f(*i.values(), *rest))


def draw_case(name, data):
    return CASES[name](name, data.draw, np.random.default_rng(data.draw(seeds)))


# What is the same at every size needs fewer examples than a gradient does.
half_as_often = settings(max_examples=settings().max_examples // 2)


def slope(f, h):
    """f'(0) from central differences at h and 2h, combined so that the error falls with h⁴."""
    return (8 * (f(h) - f(-h)) - (f(2 * h) - f(-2 * h))) / (12 * h)


def along(group, key, u):
    """step -> the group of arrays with the one called `key`, if it is among them, moved by step · u."""
    return lambda step: {name: x + step * u if name == key else x for name, x in group.items()}


def test_every_backward_function_has_a_case():
    rooms = {"ops": (ops, model_ops), "siglip": (siglip, model_siglip), "gemma": (gemma, model_gemma),
             "paligemma": (paligemma, model_paligemma), "losses": (losses, model_losses)}
    partners = {f"{room}.{name}" for room, (ours, model) in rooms.items() for name, f in vars(ours).items()
                if inspect.isfunction(f) and f.__module__ == f"{backward.__name__}.{room}" and hasattr(model, name)}
    assert partners | {"paligemma.suffix_loss"} == set(CASES)


@pytest.mark.parametrize("name", CASES)
@given(st.data())
def test_gradients_are_central_differences(name, data):
    """For a random cotangent dy and, array by array, a random direction u: <pull(dy), u> = <dy, dy/du>. In a case of
    many arrays each example tries some of them.

    y is the forward's to the last bit, and there is a gradient of each array's shape for each array, and no other.
    """
    case = draw_case(name, data)
    rng = np.random.default_rng(data.draw(seeds))
    y, pull = case.backward(case.inputs, case.params)
    if name == "paligemma.suffix_loss":
        assert_close("y", y, case.forward(case.inputs, case.params), "formula")
    else:
        assert np.array_equal(y, case.forward(case.inputs, case.params))
    dy = rng.standard_normal(np.shape(y))
    gradients = case.gradients(pull, dy)
    arrays = case.inputs | case.params
    assert {key: g.shape for key, g in gradients.items()} == {key: x.shape for key, x in arrays.items()}
    for key in rng.permutation(list(arrays))[:6]:
        u = rng.standard_normal(arrays[key].shape)
        expected = (gradients[key] * u).sum()
        inputs, params = along(case.inputs, key, u), along(case.params, key, u)
        # Steep places want a small step and flat ones a large one. A wrong gradient agrees with none. A sum of large
        # terms may be small by accident: the terms are the measure.
        for h in (2e-4, 1e-5, 1e-6, 1e-7):
            terms = dy * slope(lambda step, i=inputs, p=params: case.forward(i(step), p(step)), h)
            measure = np.abs(terms).sum() + 0.1
            if abs(terms.sum() - expected) <= TOLERANCES["gradient"]["float64"] * measure:
                break
        assert_close(f"{name}: {key}", expected, terms.sum(), "gradient", measure)


@pytest.mark.parametrize("name", CASES)
@half_as_often
@given(st.data())
def test_pull_is_linear_and_can_be_repeated(name, data):
    case = draw_case(name, data)
    rng = np.random.default_rng(data.draw(seeds))
    y, pull = case.backward(case.inputs, case.params)
    a, b = rng.standard_normal((2, *np.shape(y)))
    ga, gb, both = (case.gradients(pull, dy) for dy in (a, b, 2 * a + b))
    scale = 1 + max(np.abs(g).max() for g in [*ga.values(), *gb.values()])
    for key in both:
        assert_close(key, both[key], 2 * ga[key] + gb[key], "formula", scale)
    again = case.gradients(pull, a)
    assert all(np.array_equal(ga[key], again[key]) for key in ga)


@pytest.mark.parametrize("name", CASES)
@half_as_often
@given(st.data())
def test_dtype_is_kept_and_nothing_is_touched(name, data):
    """Neither the arguments nor dy nor y, which the forward may share with them."""
    case = draw_case(name, data)
    for dtype in (np.float32, np.float64):
        inputs, params = ({key: x.astype(dtype) for key, x in group.items()} for group in (case.inputs, case.params))
        y, pull = case.backward(inputs, params)
        dy = np.random.default_rng(0).standard_normal(np.shape(y)).astype(dtype)
        watched = [*inputs.values(), *params.values(), dy, np.asarray(y)]
        copies = [x.copy() for x in watched]
        gradients = case.gradients(pull, dy)
        assert {x.dtype for x in [y, *gradients.values()]} == {np.dtype(dtype)}
        assert all(np.array_equal(x, copy) for x, copy in zip(watched, copies))
