"""The recipe: what one stage hands to the next, and how fast what learns."""
import json

import numpy as np
import pytest

from minipali.checkpoint.config import parse_config
from minipali.checkpoint.hub import load, open_checkpoint
from minipali.checkpoint.tensors import flatten
from minipali.commands import train as command
from minipali.inputs.image import Preprocessor
from minipali.inputs.tokenizer import Tokenizer
from minipali.learning.initialize import line_waves
from minipali.small_world import artwork, drawings, easy_vqa, recipe
from minipali.small_world.recipe import PALIGEMMA, SIGLIP, patch_head
from minipali.small_world.vocabulary import write as write_tokenizer


@pytest.fixture
def trained(monkeypatch):
    """Every stage's (stage, parameters, Schedule), in the order of training, which adds 1 to each weight."""
    calls = []

    def train(stage, params, schedule, state_path, **how):
        calls.append((stage, params, schedule))
        return {name: {key: x + 1 for key, x in part.items()} if name == "patch_head" else _plus_one(part)
                for name, part in params.items()}

    def _plus_one(tree):
        if isinstance(tree, dict):
            return {key: _plus_one(x) for key, x in tree.items()}
        return [_plus_one(x) for x in tree] if isinstance(tree, list) else tree + 1
    monkeypatch.setattr(recipe, "train", train)
    monkeypatch.setattr(command, "train", train)
    monkeypatch.setattr(command, "make_masks", lambda *_: None)
    monkeypatch.setattr(easy_vqa, "load", lambda split: None)
    monkeypatch.setattr(drawings, "gallery", lambda *_: None)
    return calls


def test_the_tower_goes_from_the_first_stage_to_the_second(tmp_path, trained):
    """As it was trained, every tensor; the rest of the second stage's model starts at random, <loc> in order."""
    command.main(["--out", str(tmp_path / "out"), "--runs", str(tmp_path), "--contrastive-steps", "3", "--steps", "50"])
    (first, start, _), (second, params, _) = trained
    assert (first.identity()["stage"], second.identity()["stage"]) == ("contrastive", "prefix-lm")
    assert start["patch_head"]["weight"].shape[1] == SIGLIP["vision_config"]["hidden_size"]
    tower = flatten(params["vision_tower"]["vision_model"])
    pair = flatten(start["vision_model"])
    assert set(pair) - set(tower) == {name for name in pair if name.startswith("head.")}
    for name, x in tower.items():
        assert np.array_equal(x, pair[name] + 1), name
    cfg, written = load(tmp_path / "out" / "siglip")
    assert cfg == parse_config(SIGLIP)
    assert "patch_head" not in written
    assert np.allclose(flatten(written)["vision_model.post_layernorm.bias"], 1)
    table = params["language_model"]["model"]["embed_tokens"]["weight"]
    row = Tokenizer.from_file(tmp_path / "out" / "tokenizer.json").id_of("<loc0500>")
    line = line_waves(1024, table.shape[1], 2048)
    likeness = line @ table[row] / np.linalg.norm(table[row])
    assert abs(int(likeness.argmax()) - 500) < 30


def test_the_tower_comes_up_slowly_in_the_second_stage(tmp_path, trained):
    """Where the language model is new; a run that goes on from a whole model has no reason to hold the tower back."""
    options = ["--out", str(tmp_path / "out"), "--runs", str(tmp_path), "--steps", "50"]
    command.main([*options, "--contrastive-steps", "3"])
    first, second = (schedule for *_, schedule in trained)
    assert (second.late, second.late_steps, second.steps) == ("vision_tower.", 10, 50)
    assert (first.late_steps, first.steps) == (0, 3)
    assert (first.fall, second.fall) == (0, 30)
    assert all((schedule.muon, schedule.beta1, schedule.decay, schedule.rate) == (6.0, 0.95, 0.1, 1e-3)
               for schedule in (first, second))
    trained.clear()
    again = ["--out", str(tmp_path / "more"), "--runs", str(tmp_path), "--steps", "50", "--from", str(tmp_path / "out")]
    command.main(again)
    [(stage, _, schedule)] = trained
    assert (schedule.late, schedule.late_steps) == ("", 0)
    assert stage.identity()["stage"] == "prefix-lm"


def test_the_second_stage_alone_goes_on_from_a_pair(tmp_path, trained):
    """With its tower and a language model that is new, exactly as right after the first stage."""
    options = ["--out", str(tmp_path / "out"), "--runs", str(tmp_path), "--steps", "50"]
    command.main([*options, "--contrastive-steps", "3"])
    _, (_, params, schedule) = trained
    trained.clear()
    command.main([*options, "--from", str(tmp_path / "out" / "siglip")])
    [(stage, again, same)] = trained
    assert stage.identity()["stage"] == "prefix-lm" and same == schedule
    for name, x in flatten(params).items():
        y = flatten(again)[name]
        assert np.array_equal(x, y) or "vision_tower" in name and np.allclose(x, y, rtol=1 / 128), name  # bfloat16


def test_the_folders_are_what_they_say(tmp_path):
    """The config opens, pictures have the tower's size, a caption's tokenizer ends with <eos> and pads on the right."""
    write_tokenizer(tmp_path)
    rng = np.random.default_rng(0)
    from minipali.learning.initialize import random_params
    recipe.write_model(tmp_path, random_params(parse_config(PALIGEMMA), rng))
    recipe.write_pair(tmp_path / "siglip", random_params(parse_config(SIGLIP), rng), tmp_path)
    for folder, config in [(tmp_path, PALIGEMMA), (tmp_path / "siglip", SIGLIP)]:
        cfg, stored = open_checkpoint(folder)
        assert cfg == parse_config(config)
        assert {one.dtype for one in stored.values()} == {"BF16"}
        size = cfg.vision_config.image_size
        assert Preprocessor.from_folder(folder, size) == Preprocessor(size)
    about = json.loads((tmp_path / "siglip" / "tokenizer_config.json").read_text())
    assert (about["add_bos_token"], about["add_eos_token"], about["padding_side"]) == (False, True, "right")
    spec = json.loads((tmp_path / "siglip" / "tokenizer.json").read_text())
    assert [list(part)[0] for part in spec["post_processor"]["single"]] == ["Sequence", "SpecialToken"]
    assert spec["post_processor"]["special_tokens"]["<eos>"]["ids"] == [1]
    assert "image_seq_length" not in json.loads((tmp_path / "siglip" / "preprocessor_config.json").read_text())


def test_patch_head():
    """Small random weights, so that no answer is certain at first, and biases of zero."""
    head = patch_head(64, np.random.default_rng(0))
    assert head["weight"].std() == pytest.approx(0.05, rel=0.1)
    assert head["weight"].dtype == head["bias"].dtype == np.float32
    assert not head["bias"].any()


def test_whose_drawings_are_trained_on(tmp_path, trained):
    """The validation artist's on request; the test artist's never."""
    options = ["--out", str(tmp_path / "out"), "--runs", str(tmp_path), "--contrastive-steps", "3", "--steps", "4"]
    command.main(options)
    command.main([*options, "--all-artists"])
    artists = [stage.artists for stage, *_ in trained]
    assert artists[0] == artists[1] == drawings.TRAINED_ON and artwork.VALIDATION not in artists[0]
    assert artists[2] == artists[3] == (*drawings.TRAINED_ON, artwork.VALIDATION)
    assert artwork.TEST not in artists[2]
