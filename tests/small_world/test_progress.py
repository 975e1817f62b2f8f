"""What a first stage is said to know: its patches vote, and the right answer is looked for where it stands."""
import numpy as np
import pytest
from galleries import NAMES, PICTURES

from minipali.checkpoint.config import SiglipConfig, SiglipTextConfig, VisionConfig
from minipali.checkpoint.tensors import flatten
from minipali.errors import InputError
from minipali.inputs.tokenizer import Tokenizer
from minipali.learning.initialize import random_params
from minipali.learning.optimizer import pack
from minipali.learning.state import read_state, save_state
from minipali.small_world import artwork, drawings, patch_labels, progress, vocabulary, world
from minipali.small_world.drawings import Gallery, draw
from minipali.small_world.recipe import patch_head
from minipali.small_world.stages import WordTokenizer

GALLERY = Gallery(PICTURES, dict(zip(NAMES, artwork.names().values())), ("light", "dark"))
CONFIG = SiglipConfig(
    vision_config=VisionConfig(hidden_size=6, intermediate_size=7, num_hidden_layers=1, num_attention_heads=2,
                               image_size=world.SIDE, patch_size=14, num_channels=3, layer_norm_eps=0.01,
                               vision_use_head=True),
    text_config=SiglipTextConfig(vocab_size=vocabulary.ROWS, hidden_size=4, intermediate_size=5, num_hidden_layers=1,
                                 num_attention_heads=2, max_position_embeddings=40, layer_norm_eps=0.01,
                                 projection_size=6, pad_token_id=0))


def test_a_thing_has_the_name_that_its_patches_find_likeliest_together():
    [scene] = [scene for scene in (draw(seed, GALLERY, "test") for seed in range(20)) if len(scene.things) == 3][:1]
    labels = patch_labels.labels(scene.things)[:, 0]
    scores = np.full((49, len(patch_labels.KINDS)), -9.0)
    scores[:, :progress.FIRST_NAME] = 0  # shapes and nothing are likelier on every patch, and do not count
    scores[np.arange(49), labels] += 5
    assert progress.name_ranks(scores, scene) == [0] * 3
    first = labels == patch_labels.KINDS.index(scene.things[0].name)
    scores[np.flatnonzero(first)[0], -3:] = 3  # one patch alone finds three other names likelier: outvoted
    assert np.count_nonzero(first) > 3
    assert progress.name_ranks(scores, scene)[0] == 0
    scores[first, -3:] = 3
    names = {thing.name for thing in scene.things}
    expected = [3 if thing.name == scene.things[0].name else 0 for thing in scene.things]
    assert progress.name_ranks(scores, scene) == expected
    assert len(names) >= 1


def test_the_table_of_a_state(tmp_path, monkeypatch, capsys):
    """From a run's file to two lines; a tower that knows nothing finds its caption about as often as chance."""
    rng = np.random.default_rng(0)
    params = {**random_params(CONFIG, rng), "patch_head": patch_head(6, rng)}
    flat = {name: list(array.shape) for name, array in flatten(params).items()}
    save_state(tmp_path / "state", {"weights": pack(params)[0]}, {"shapes": flat, "step": 12})
    monkeypatch.setattr(progress, "parse_config", lambda _: CONFIG)
    monkeypatch.setattr(drawings, "gallery", lambda artists: GALLERY)
    monkeypatch.setattr(progress, "CANDIDATES", 8)
    vocabulary.main([str(tmp_path)])
    capsys.readouterr()
    progress.main([str(tmp_path / "state"), str(tmp_path / "tokenizer.json")])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["step", "12"]] * 2
    assert "trained on" in lines[0] and artwork.VALIDATION in lines[1]
    assert read_state(tmp_path / "state")[1]["step"] == 12
    tokenizer = WordTokenizer(Tokenizer.from_file(tmp_path / "tokenizer.json"))
    shares = progress.measure(params, CONFIG, tokenizer, GALLERY, 4)
    assert list(shares) == ["one drawing", "in five", "several", "in 5", "caption", "picture"]
    assert all(0 <= share < 60 for share in shares.values())
    assert shares["one drawing"] <= shares["in five"] and shares["several"] <= shares["in 5"]


@pytest.mark.parametrize("content", [b"", b"nonsense"])
def test_what_is_no_state_is_refused(tmp_path, content):
    (tmp_path / "state").write_bytes(content)
    with pytest.raises(InputError, match="not a training state"):
        progress.main([str(tmp_path / "state"), str(tmp_path / "tokenizer.json")])
