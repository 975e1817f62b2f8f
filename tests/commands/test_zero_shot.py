"""`python -m minipali zero-shot`: what it prints, draws and refuses."""
import subprocess
import sys

import numpy as np
import pytest
from helpers import ROOT
from PIL import Image

from minipali.checkpoint.config import (
    parse_config,
)
from minipali.checkpoint.hub import save
from minipali.commands import evaluate, zero_shot
from minipali.decoding.pair import Pair
from minipali.errors import InputError
from minipali.learning.initialize import random_params


def test_zero_shot_prints_the_best_first(pair_folder, tmp_path, monkeypatch, capsys):
    """Each caption with a yes/no probability of its own."""
    Image.new("RGB", (30, 20)).save(tmp_path / "p.png")
    monkeypatch.setattr(Pair, "logits", lambda self, pictures, captions: np.array([[-9.0, 2.0, 0.0]]))
    zero_shot.main([str(tmp_path / "p.png"), "a", "b", "c", "--model", str(pair_folder)])
    assert capsys.readouterr().out == " 88.08%  b\n 50.00%  c\n  0.01%  a\n"


def test_matrix_is_drawn(pair_folder, tmp_path):
    path = tmp_path / "matrix.png"
    zero_shot.main(["--matrix", str(path), "--model", str(pair_folder)])
    with Image.open(path) as picture:
        assert picture.width > 8 * 96
        assert picture.height > 8 * 56


def test_unusable_input_is_said_in_one_line(pair_folder, tmp_path):
    """No such picture, no captions, no such folder, the other kind of model, a file that cannot be written."""
    Image.new("RGB", (3, 3)).save(tmp_path / "p.png")
    picture, model = str(tmp_path / "p.png"), ["--model", str(pair_folder)]
    empty, other = tmp_path / "empty", tmp_path / "other"
    empty.mkdir()
    tiny = {"model_type": "paligemma", "image_token_index": 9, "vision_config": {
        "hidden_size": 2, "intermediate_size": 2, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 2,
        "patch_size": 2}, "text_config": {"model_type": "gemma", "hidden_size": 2, "intermediate_size": 2,
        "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2, "vocab_size": 10}}
    save(other, tiny, random_params(parse_config(tiny), np.random.default_rng(0)), "float32")
    for argv, what in [
            ([str(tmp_path / "no.png"), "x", *model], "no.png: no such file"),
            ([picture, *model], "at least one caption"),
            ([*model], "at least one caption"),
            ([picture, "x", "--matrix", "m.png", *model], "--matrix FILE"),
            ([picture, "--matrix", "m.png", *model], "--matrix FILE"),
            ([picture, "x", "--model", str(tmp_path / "none")], "no such folder"),
            ([picture, "x", "--model", str(empty)], "found neither"),
            ([picture, "x", "--model", str(other)], "model_type is paligemma, expected siglip"),
            (["--matrix", str(tmp_path / "m.nonsense"), *model], "m.nonsense: not a picture format"),
            (["--matrix", str(tmp_path / "none" / "m.png"), *model], "m.png: cannot be written")]:
        with pytest.raises(InputError, match=what) as error:
            zero_shot.main(argv)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="model_type is siglip, expected paligemma"):
        evaluate.main(model)
    with pytest.raises(InputError, match="at least 0"):
        evaluate.main(["--pictures", "-1"])
    with pytest.raises(InputError, match="s.nonsense: not a picture format"):
        evaluate.main(["--sheet", str(tmp_path / "s.nonsense")])


def test_the_program_exits_with_status_2_and_one_line():
    done = subprocess.run([sys.executable, "-m", "minipali", "zero-shot", "no such picture.png", "x"], cwd=ROOT,
                          capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "minipali zero-shot: error: no such picture.png: no such file\n"
