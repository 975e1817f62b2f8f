"""`python -m minipali lab`: the list, one bug's report, the table."""
import pytest

from minipali.commands import lab as command
from minipali.errors import InputError
from minipali.looking.classic_bugs import BUGS


def test_the_list(capsys):
    command.main([])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [bug.name for bug in BUGS]
    assert all(line.split(maxsplit=1)[1] == bug.what for line, bug in zip(lines, BUGS, strict=True))


def test_a_report_names_the_line_and_the_first_activation(capsys):
    command.main(["position-too-far", "--pictures", "2"])
    out = capsys.readouterr().out
    assert "+ x = language_model(x, p, cfg, cache.prefix_len[:, None] + steps + 1, cache.prefix_len, cache)" in out
    name = "language_model.model.layers.0.self_attn.attn_weights"
    assert f"first activation that differs: {name} of written token 1" in out
    assert "rotary positions" in out
    assert "https://github.com/microsoft/onnxruntime-genai/pull/2354" in out
    assert out.count("\n  = ") == 2, "both captions survive"


def test_a_bug_that_one_prompt_does_not_show(capsys):
    """Padding exists only in a batch."""
    command.main(["padding-attended", "--pictures", "1"])
    assert "no activation of this caption differs" in capsys.readouterr().out


def test_the_table_has_a_row_for_each(capsys, monkeypatch):
    monkeypatch.setattr(command, "BUGS", BUGS[:2])
    command.main(["--all", "--pictures", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines[2:]] == ["no bug", BUGS[0].name, BUGS[1].name]
    assert lines[2].split()[2] == "0"


def test_the_table_is_of_the_broken_model(capsys, monkeypatch):
    """Without the 1 in Gemma's norms nothing is right any more."""
    monkeypatch.setattr(command, "BUGS", [bug for bug in BUGS if bug.name == "norm-without-one"])
    command.main(["--all", "--pictures", "1"])
    head, _, whole, broken = capsys.readouterr().out.splitlines()
    asked = int(head.split()[0])
    assert int(whole.split()[2]) == 0 and int(broken.split()[1]) == asked and " 1 of 1" in whole
    assert " 0 of 1" in broken and " 1 of 1" not in broken


@pytest.mark.parametrize("argv, message", [
    (["nonsense"], "no such bug"), (["silu", "--all"], "expected one of the two"),
    (["--pictures", "5"], "--pictures: expected the name of a bug or --all"),
    (["--model", "nowhere", "--pictures", "1"], "--pictures and --model: expected"), (["silu", "--model", ""], "empty"),
    (["--pictures", "0"], "an integer of at least 1"), (["silu", "--model", "nowhere"], "nowhere")])
def test_what_is_refused(argv, message):
    with pytest.raises(InputError, match=message):
        command.main(argv)
