"""`python -m minipali train`: every option is checked before anything is computed or written."""
import os

import pytest
from helpers import ROOT
from small_models import TEXT_CONFIG, write_model

from minipali.__main__ import main
from minipali.commands import train as command
from minipali.errors import InputError

WEIGHTS = str(ROOT / "weights")
TUNE = ["--from", WEIGHTS, "--data", "data.jsonl"]
REFUSED = [
    (["--batch", "4"], "--batch: only for fine-tuning, with --data FILE.jsonl"),
    (["--dtype", "float16", "--freeze", "x"], "--freeze and --dtype: only for fine-tuning"),
    (["--data", "data.jsonl"], "--data: expected the model that is to learn it as well, --from DIR"),
    ([*TUNE, "--rank", "4"], "--rank: only with --lora"),
    ([*TUNE, "--freeze", "*", "--alpha", "4"], "--alpha: only with --lora"),
    ([*TUNE, "--lora", "*", "--freeze", "*"], "--lora and --freeze: expected one of the two"),
    ([*TUNE, "--all-artists"], "--all-artists: not with --data"),
    ([*TUNE, "--contrastive-steps", "3"], "--contrastive-steps: not with --from"),
    (["--from", WEIGHTS, "--contrastive-steps", "3"], "--contrastive-steps: not with --from"),
    (["--freeze", ""], "--freeze: '': expected names or patterns of names"),
    (["--lora", " , "], "--lora: ' , ': expected names or patterns of names"),
    (["--seed", "-1"], "--seed: -1: expected an integer of at least 0"),
    (["--steps", "1.5"], "--steps: 1.5: expected an integer of at least 0"),
    (["--workers", "-1"], "--workers: -1: expected an integer of at least 0"),
    (["--rate", "0"], "--rate: 0: expected a number above 0"),
    (["--backend", "torch"], "--backend: invalid choice: 'torch'"),
    (["--from", ""], "--from: expected"),
    (["--from", "text"], "--from: text is a text model, which sees no pictures; expected a PaliGemma"),
    (["--from", "nowhere", "--data", "data.jsonl"], "nowhere: no such folder"),
    (["--out", "file"], "file: "),
    (["--runs", "file/below"], "file/below: "),
]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder with a file and a text model in it, and nothing that could be trained."""
    (tmp_path / "file").write_text("")
    (tmp_path / "text").mkdir()
    write_model(tmp_path / "text", TEXT_CONFIG)
    monkeypatch.chdir(tmp_path)

    def begin(*_):
        raise AssertionError("the training begins")
    for name in ("first_stage", "make_masks", "write_tokenizer"):
        monkeypatch.setattr(command, name, begin)
    return tmp_path


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_refused(here, capsys, options, message):
    """In one line, at once, with nothing written."""
    before = sorted(here.rglob("*"))
    assert main(["train", "--out", "out", *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.removeprefix("minipali train: error: ").removeprefix("argument ").startswith(message)
    assert sorted(here.rglob("*")) == before


def test_the_model_of_another_size_is_not_trained_further(here, monkeypatch):
    """Without --data only the default model is trained; a PaliGemma of other sizes would meet the wrong pictures."""
    (here / "other").mkdir()
    write_model(here / "other")
    monkeypatch.setattr(command.drawings, "gallery", lambda *_: None)
    with pytest.raises(InputError, match="other: another model than the default's"):
        command.main(["--out", "out", "--from", "other"])


def test_a_process_for_each_core(here):
    """At most as many as there are batches to a step; fine-tuning computes in this process."""
    cores = min(os.cpu_count() or 1, 2)
    assert command.options(["--out", "out"]).workers == cores
    assert command.options(["--out", "out", "--workers", "5"]).workers == 5
    assert command.options(["--out", "out", *TUNE]).workers == 0
