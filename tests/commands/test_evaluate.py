"""`python -m minipali evaluate`: it measures what was asked for, and every option is checked before it begins."""
import re

import numpy as np
import pytest
from galleries import small_gallery
from small_models import CONFIG, TEXT_CONFIG, write_model

from minipali.__main__ import main
from minipali.checkpoint.matrices import Int8
from minipali.commands import evaluate
from minipali.inputs.image import open_image
from minipali.small_world.drawings import draw
from minipali.small_world.scores import scenes_of

REFUSED = [
    (["--sheet", "a.png", "--failures", "b.png"], "--sheet and --failures: expected one of the two"),
    (["--sheet", "a.png", "--pictures", "5"], "--sheet: nothing is measured, so not with --pictures"),
    (["--failures", "a.png", "--drawings", "5", "--easy-vqa", "1"],
     "--failures: nothing is measured, so not with --drawings and --easy-vqa"),
    (["--sheet", "a.nothing"], "a.nothing: not a picture format"),
    (["--failures", "no/a.png"], "no/a.png: cannot be written"),
    (["--pictures", "-1"], "--pictures: -1: expected an integer of at least 0"),
    (["--model", "nowhere"], "nowhere: no such folder"),
    (["--model", "text"], "text: a text model, expected one that sees pictures"),
    (["--model", "mute"], "mute: neither tokenizer.json nor tokenizer.model is there"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_refused(tmp_path, monkeypatch, capsys, options, message):
    for name, config in (("text", TEXT_CONFIG), ("mute", CONFIG)):
        (tmp_path / name).mkdir()
        write_model(tmp_path / name, config)
    (tmp_path / "mute" / "tokenizer.json").unlink()
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.removeprefix("minipali evaluate: error: ").removeprefix("argument ").startswith(message)


@pytest.mark.parametrize(("options", "kind"), [([], np.ndarray), (["--weights", "int8"], Int8)])
def test_the_weights_are_held_as_asked(options, kind, monkeypatch):
    seen = []
    monkeypatch.setattr(evaluate, "small_world", lambda model, count, note: seen.append(model) or [])
    monkeypatch.setattr(evaluate, "load_pair", lambda folder: None)
    assert main(["evaluate", "--pictures", "1", "--drawings", "0", "--easy-vqa", "0", *options]) == 0
    assert type(seen[0].params["language_model"]["model"]["layers"][0]["mlp"]["up_proj"]["weight"]) is kind


def test_the_table(capsys):
    """One row for each kind of question, with the share that is right; the pair's rows need 64 pictures at least."""
    assert main(["evaluate", "--pictures", "3", "--drawings", "0", "--easy-vqa", "0"]) == 0
    out, err = capsys.readouterr()
    rows = [re.fullmatch(r"(.{34}) +(\d+) of +(\d+) +(\d+\.\d\d) %", line).groups() for line in out.splitlines()]
    assert err == "" and rows[0][0].strip() == "captions exactly right" and rows[0][2] == "3"
    # A row's number is a sum of shares where it is about masks: rounded here, not in the percentage.
    assert all(float(share) == pytest.approx(100 * int(right) / max(int(of), 1), abs=50 / max(int(of), 1) + 0.01)
               for _, right, of, share in rows)
    assert [(name.strip(), of) for name, _, of, _ in rows[-2:]] == [
        ("caption of a picture, of 64", "64"), ("picture of a caption, of 64", "64")]


def test_nothing_is_measured_that_was_not_asked_for(capsys, monkeypatch):
    """--pictures 0 leaves out the pair as well, and the drawings of a model that never learned them."""
    monkeypatch.setattr(evaluate, "knows_names", lambda tokenizer: False)
    assert main(["evaluate", "--pictures", "0", "--easy-vqa", "0"]) == 0
    assert capsys.readouterr().out == ""


def test_the_sheet(tmp_path, monkeypatch):
    """Twelve pictures, four in a row, each with what the model says of it."""
    shown = []
    monkeypatch.setattr(evaluate, "answers", lambda model, pictures, asked: [f"{n}: {word}" for n, word in asked])
    monkeypatch.setattr(evaluate, "contact_sheet", lambda pictures, texts, columns: shown.append(
        (pictures, texts, columns)) or pictures[0])
    monkeypatch.setattr(evaluate, "gallery", lambda artists: small_gallery())
    for knows in False, True:
        monkeypatch.setattr(evaluate, "knows_names", lambda tokenizer, knows=knows: knows)
        evaluate.main(["--sheet", str(tmp_path / "sheet.png")])
        assert open_image(tmp_path / "sheet.png").width > 90
    shapes = [scene.image for scene in scenes_of(12)]
    drawings = [draw(number, small_gallery(), "test").image for number in range(8)]
    for (pictures, texts, columns), expected in zip(shown, (shapes, drawings + shapes[:4]), strict=True):
        assert texts == [f"{number}: caption en" for number in range(12)] and columns == 4
        assert all(np.array_equal(picture, scene) for picture, scene in zip(pictures, expected, strict=True))
