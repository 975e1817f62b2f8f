"""bench: its figures add up and its options are checked. Nothing here depends on how long anything takes."""
import json
import os
import sys

import numpy as np
import pytest
from PIL import Image
from small_models import CONFIG, write_model

from minipali.checkpoint.config import parse_config
from minipali.checkpoint.tensors import param_shapes
from minipali.commands import bench
from minipali.commands.bench_picture import bench_picture
from minipali.errors import CommandError, InputError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"), dtype="bfloat16")


@pytest.fixture
def small(monkeypatch):
    """Limits of a small matrix, and no new processes."""
    monkeypatch.setattr(bench, "LIMIT", (64, 32))
    monkeypatch.setattr(bench, "in_own_process", bench.measure)


def test_the_table(small, folder, capsys, tmp_path):
    bench.main([str(folder), "--tokens", "3", "--batch", "2", "--picture", str(tmp_path / "bars.png")])
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("machine: ") and "weights: " in out[5]
    assert out[6].split()[0] == "weights" and out[6].endswith("tokens/s of 2")
    assert [line.split()[0] for line in out[7:]] == ["float32", "bfloat16", "int8"]
    assert all(len(line.split()) == 13 for line in out[7:])
    with Image.open(tmp_path / "bars.png") as picture:
        assert picture.size[0] == 860


def test_the_json(small, folder, capsys):
    bench.main([str(folder), "--weights", "int8", "--tokens", "4", "--rounds", "2", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert list(found["rounds"]) == ["int8"] and len(found["rounds"]["int8"]) == 2 and found["ratios"] == {}
    for row in found["rounds"]["int8"]:
        assert row["first"] == pytest.approx(row["vision"] + row["prefill"]) and row["answer"] > row["first"]
        assert row["ready"] > row["opens"] and "together" not in row
    assert set(found["machine"]["limits"]) == {"plain", "float32", "bfloat16", "int8"}


def test_a_row_is_made_of_the_second_answers_times(folder, monkeypatch):
    """Opening and the first answer count for `ready` alone; a token's speed is the median's."""
    monkeypatch.setattr(bench, "answer", lambda model, batch, steps: (1.0, 2.0, [0.5, 0.1, 0.25, 0.25][:steps]))
    row = bench.measure(folder, "bfloat16", 5, 2)
    assert (row["vision"], row["prefill"], row["first"], row["answer"]) == (1, 2, 3, pytest.approx(4.1))
    assert (row["speed"], row["together"]) == (4, 8) and 3 < row["ready"] < 4


def test_the_picture_has_bars_and_limits():
    """By hand: a bar that is half of its limit ends in the middle between its beginning and the black line."""
    needed, limits = {"vision": 50, "prefill": 50, "decode": 10, "head": 6}, {"plain": (100, 100)}
    limits |= {"int8": (100, 80), "bfloat16": (100, 120)}  # 4 numbers of the layers, 6 of the head: 0.1 s a token
    rows = [{"form": "int8", "first": 2.0, "speed": 5.0, "peak": 1e9}]
    pixels = np.asarray(bench_picture(rows, needed, limits))
    bar = (pixels == np.array([196, 78, 82])).all(-1)
    first = bar[:bar.shape[0] // 2].any(0).nonzero()[0]
    assert first[0] == 190 and first[-1] == 770  # the largest, 2 s; its limit of 1 s is in the middle
    assert (pixels[:, 480] == 0).all(-1).sum() >= 22
    rows_with_bar = bar.any(1).nonzero()[0]
    groups = np.split(rows_with_bar, np.flatnonzero(np.diff(rows_with_bar) > 1) + 1)
    assert len(groups) == 3
    speed = bar[groups[1]].any(0).nonzero()[0]
    assert speed[-1] == 480  # 5 of at most 10 tokens a second


def test_a_process_of_its_own(folder):
    found = bench.in_own_process(folder, "bfloat16", 2, 1)
    assert found["form"] == "bfloat16" and found["speed"] > 0


def test_a_process_that_dies_is_one_line(monkeypatch):
    """As when the system kills it because memory runs out."""
    monkeypatch.setattr(bench, "measure", os._exit)
    with pytest.raises(CommandError, match="the measuring process died, perhaps for lack of memory"):
        bench.in_own_process(9)


def test_the_work_is_counted_from_the_shapes():
    """By hand for one small model: every multiplication and addition of the matrices, and attention's two products."""
    cfg = parse_config(CONFIG)
    needed, shapes = bench.work(cfg, 10), param_shapes(cfg)

    def numbers(*words):
        return sum(int(np.prod(shape)) for name, shape in shapes.items() if all(word in name for word in words)
                   and len(shape) == 2)

    layers, head = numbers("language_model.model.layers."), numbers("embed_tokens")
    assert (needed["decode"], needed["head"]) == (layers + head, head)
    assert needed["prefill"] == 2 * (10 * layers + head) + 2 * 4 * 10 * 10 * 4 * 6
    seen = numbers("vision_tower", ".layers.") + numbers("multi_modal_projector") + 12 * 3 * 4 * 4
    assert needed["vision"] == 2 * 4 * seen + 2 * 4 * 4 * 4 * 12


def fake_python(path, words):
    path.write_text(f"#!{sys.executable}\n{words}\n")
    path.chmod(0o755)
    return str(path)


def test_ratios_are_those_of_the_medians(small, folder, tmp_path, capsys):
    """Against a stand-in for transformers that takes a thousand seconds for everything."""
    figures = {"load_seconds": 1000, "first_token_seconds": 1000, "tokens_per_second": 0.001, "answer_seconds": 1000,
               "peak_rss_bytes": 1000}
    python = fake_python(tmp_path / "python", f"print('''warning\\n{json.dumps(figures)}''')")
    bench.main([str(folder), "--weights", "float32", "--rounds", "3", "--against", python])
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("float32 over transformers float32: first token 0.00 (0.00 to 0.00), answer 0.00")
    ours, theirs = [{"first": x} for x in [1, 2, 9]], [{"first": x} for x in [4, 4, 3]]
    assert bench.ratio(ours, theirs, "first") == "0.50 (0.25 to 3.00)"


def test_what_cannot_be_measured(small, folder, tmp_path):
    with pytest.raises(InputError, match="--against /no/python: cannot be run"):
        bench.main([str(folder), "--weights", "int8", "--against", "/no/python"])
    python = fake_python(tmp_path / "python", "raise SystemExit('no torch here')")
    with pytest.raises(CommandError, match="transformers gave no figures .no torch here"):
        bench.main([str(folder), "--weights", "int8", "--against", python])
    with pytest.raises(InputError, match="--against: expected a path, found an empty text"):
        bench.main([str(folder), "--against", ""])
    with pytest.raises(InputError, match="no such folder"):
        bench.main([str(tmp_path / "nothing")])
