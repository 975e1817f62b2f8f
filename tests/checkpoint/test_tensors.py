"""Names of tensors: trees and dotted names, every naming scheme, and what is strict."""
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_models import EMBED, LM_HEAD, PALIGEMMA_2, SIGLIP_CONFIG, assert_same, random_arrays, write_folder

from minipali.checkpoint.hub import inventory, load
from minipali.checkpoint.tensors import canonical, flatten, unflatten

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
    arrays = random_arrays(PALIGEMMA_2)
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
    ("_orig_mod.model.lm_head.weight", LM_HEAD), ("module.language_model.lm_head.weight", LM_HEAD),
    ("model.layers.0.x", "language_model.model.layers.0.x"),
    ("layers.0.x", "language_model.model.layers.0.x"), ("model.head.weight", "model.head.weight"),
    ("paligemma_with_expert.gemma_expert.model.norm.weight", "paligemma_with_expert.gemma_expert.model.norm.weight")])
def test_canonical_literal(name, expected):
    """Single names; those of other models are left as they are, to be refused under their own name."""
    assert canonical(name) == expected
