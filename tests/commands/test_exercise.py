"""`python -m minipali exercise`: the list, the stub, the check, hints, the place of the solution."""
import pytest

from minipali.commands import exercise as command
from minipali.errors import InputError
from minipali.looking import exercise as work
from minipali.looking.exercise_list import EXERCISES, named


@pytest.fixture
def run(tmp_path, capsys):
    """The command on a folder of its own: (status, what it prints)."""
    def run(*argv):
        status = command.main([*argv, "--folder", str(tmp_path)])
        return status, capsys.readouterr().out
    return run


def test_the_list_tells_what_is_solved(run, tmp_path):
    status, out = run()
    assert status == 0 and out.count("[ ]") == len(EXERCISES) and f"0 of {len(EXERCISES)} solved" in out
    (tmp_path / "gelu.py").write_text("x")
    work.write_progress(tmp_path, "gelu", solved=work.fingerprint(tmp_path / "gelu.py"))
    assert "[x] gelu" in run()[1]
    (tmp_path / "gelu.py").write_text("y")
    assert "[x]" not in run()[1], "a file that was edited is open again"


def test_from_the_stub_to_the_solution(run, tmp_path, monkeypatch):
    """Stub, unwritten, classic mistake, solution: with the running model's sentence at the end."""
    monkeypatch.setattr(work, "run_tests", lambda exercise, path: (True, ""))
    status, out = run("rms-norm")
    path = tmp_path / "rms-norm.py"
    assert status == 0 and path.exists() and named("rms-norm").trap in out
    status, out = run("rms-norm")
    assert status == 1 and "not written yet" in out
    path.write_text(work.solution(named("rms-norm"), *named("rms-norm").near_miss))
    status, out = run("rms-norm")
    assert status == 1 and "1 + weight" in out
    path.write_text(work.solution(named("rms-norm")))
    status, out = run("rms-norm")
    assert status == 0 and "with it the bundled model answers: a small red heart" in out
    assert named("rms-norm").where() in out and "[x] rms-norm" in run()[1]


def test_a_failing_test_is_shown(run, tmp_path, monkeypatch):
    monkeypatch.setattr(work, "run_tests", lambda exercise,
                        path: (False, "noise\nE   assert 1 == 2\nFAILED tests/x.py"))
    (tmp_path / "gelu.py").write_text(work.solution(named("gelu")))
    status, out = run("gelu")
    assert status == 1 and "assert 1 == 2" in out and "noise" not in out


def test_hints_come_one_by_one(run):
    hints = named("softmax").hints
    for count in [1, 2, 3, 3]:
        assert run("softmax", "--hint")[1].splitlines() == [
            f"hint {i} of {len(hints)}: {text}" for i, text in enumerate(hints[:count], 1)]
    assert run("softmax", "--solution")[1].strip() == named("softmax").where()


@pytest.mark.parametrize("argv, message", [
    (["nonsense"], "no such exercise"), (["--folder", ""], "--folder: expected a path"),
    (["--hint"], "expected the name"),
    (["softmax", "--hint", "--solution"], "expected one of the two")])
def test_what_is_refused(argv, message):
    with pytest.raises(InputError, match=message):
        command.main(argv)
