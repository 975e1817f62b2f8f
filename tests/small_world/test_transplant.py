"""A language model that gets a new tower: the fitted projector, and the rows of the tokens that both models know."""
import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from minipali.checkpoint import load_any
from minipali.checkpoint.config import parse_config
from minipali.errors import InputError
from minipali.inputs.tokenizer import Tokenizer
from minipali.learning.initialize import random_params
from minipali.model.paligemma import image_features
from minipali.small_world import transplant, vocabulary
from minipali.small_world.recipe import PALIGEMMA, write_model

FEW = {"shapes": 8, "letters": 4, "easy-VQA": 2}


@pytest.fixture(scope="module")
def cfg():
    return parse_config(PALIGEMMA)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabulary")
    vocabulary.write(folder)
    return Tokenizer.from_file(folder / "tokenizer.json")


def test_a_linear_map_is_found_again():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 5, 6)) + 3
    weight, bias = rng.standard_normal((4, 6)), rng.standard_normal(4)
    found, shift, explained = transplant.linear_map(x, x @ weight.T + bias)
    assert np.abs(found - weight).max() < 1e-3 and np.abs(shift - bias).max() < 1e-3 and explained > 0.999999
    *_, explained = transplant.linear_map(x, rng.standard_normal((40, 5, 4)))
    assert explained < 0.2


def test_the_language_model_sees_what_it_is_used_to(cfg, tokenizer):
    """The new tower here is the old one with its last features turned and moved: the map has to turn them back."""
    old = random_params(cfg, np.random.default_rng(1))
    new = copy.deepcopy(random_params(cfg, np.random.default_rng(2)))
    new["vision_tower"] = copy.deepcopy(old["vision_tower"])
    norm = new["vision_tower"]["vision_model"]["post_layernorm"]
    norm["weight"] = norm["weight"] * np.float32(-2)
    norm["bias"] = norm["bias"] + np.float32(0.5)
    params, explained = transplant.transplant((cfg, old, tokenizer), (cfg, new, tokenizer), FEW)
    pixels = transplant.pictures({"shapes": 2, "letters": 1, "easy-VQA": 1})
    wanted, seen = image_features(pixels, old, cfg), image_features(pixels, params, cfg)
    assert explained > 0.999999 and np.abs(seen - wanted).max() < 5e-4 * np.abs(wanted).max()
    one, other = (tree["language_model"]["model"] for tree in (old, params))
    assert np.array_equal(one["embed_tokens"]["weight"], other["embed_tokens"]["weight"])
    assert one["layers"] is other["layers"]
    assert not np.array_equal(new["language_model"]["model"]["embed_tokens"]["weight"],
                              other["embed_tokens"]["weight"])


class Words:
    """A vocabulary of whole words."""

    def __init__(self, words):
        self.words, self.vocab_size = words.split(), len(words.split())

    def token_of(self, token_id):
        return self.words[token_id]


def test_rows_go_with_their_tokens():
    old_table = np.arange(12, dtype=np.float32).reshape(4, 3)
    table = transplant.table_for(Words("dog red new"), Words("<pad> red blue dog"), old_table, 5,
                                 np.random.default_rng(0))
    assert table.shape == (5, 3) and table.dtype == np.float32
    assert np.array_equal(table[:2], old_table[[3, 1]])
    assert not any(np.array_equal(table[2], row) for row in old_table)


def test_the_command(cfg, tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(transplant, "PICTURES", FEW)
    for name, seed in ("old", 1), ("new", 2):
        vocabulary.write(tmp_path / name)
        write_model(tmp_path / name, random_params(cfg, np.random.default_rng(seed)))
    transplant.main([str(tmp_path / name) for name in ("old", "new", "out")])
    assert "% of the old soft tokens" in capsys.readouterr().out
    made, old, new = (load_any(tmp_path / name)[1] for name in ("out", "old", "new"))
    layers = [tree["language_model"]["model"]["layers"][0]["mlp"]["up_proj"]["weight"] for tree in (made, old)]
    assert np.array_equal(*layers)
    towers = [tree["vision_tower"]["vision_model"]["embeddings"]["patch_embedding"]["weight"] for tree in (made, new)]
    assert np.array_equal(*towers)
    for name in "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "config.json":
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "new" / name).read_bytes()


@pytest.mark.parametrize("old, new, what", [
    ("default", "other", "other: another model than the default"),
    ("other", "default", "other: a language model of other sizes"),
    ("patches", "default", "patches: a tower of other pictures or patches"),
    ("text", "default", "text: a tower of other pictures or patches than the default's, or none"),
    ("default", "mute", "mute: no tokenizer"),
])
def test_what_is_refused(old, new, what, cfg, tmp_path, monkeypatch):
    configs = {"default": cfg, "mute": cfg,
               "other": replace(cfg, text_config=replace(cfg.text_config, num_hidden_layers=2)),
               "patches": replace(cfg, vision_config=replace(cfg.vision_config, patch_size=7)),
               "text": replace(cfg, vision_config=None)}
    monkeypatch.setattr(transplant, "open_model", lambda path: SimpleNamespace(
        path=path, cfg=configs[Path(path).name], tokenizer=None if path.endswith("mute") else Words("a")))
    with pytest.raises(InputError, match=what):
        transplant.main([str(tmp_path / name) for name in (old, new, "out")])
    assert not (tmp_path / "out").exists()
