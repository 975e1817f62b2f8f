"""The exercises: a stub fails, the solution passes, the classic mistake fails with a message that helps."""
import ast
import re

import numpy as np
import pytest
from helpers import ROOT

from minipali.errors import InputError
from minipali.looking import exercise as work
from minipali.looking.exercise_list import EXERCISES, named
from minipali.model import ops, siglip

NAMES = [exercise.name for exercise in EXERCISES]


def written(folder, exercise, text):
    """The reader's function out of a file with that text."""
    path = folder / f"{exercise.name}.py"
    path.write_text(text, encoding="utf-8")
    return work.load(path, exercise)


def test_there_are_at_least_twenty():
    assert len(set(NAMES)) == len(NAMES) >= 20 and [named(name) for name in NAMES] == EXERCISES and named("x") is None


@pytest.mark.parametrize("exercise", EXERCISES, ids=NAMES)
def test_a_stub_is_not_solved(exercise, tmp_path):
    text = work.stub(exercise)
    with pytest.raises(work.Mistake, match="not written yet"):
        work.check(exercise, written(tmp_path, exercise, text))
    function = ast.parse(text).body[-1]
    assert function.name == exercise.function.split(".")[-1] and ast.get_docstring(function)
    assert len(function.body) == 2, "the docstring and the line to replace"


@pytest.mark.parametrize("exercise", EXERCISES, ids=NAMES)
def test_the_solution_passes(exercise, tmp_path):
    work.check(exercise, written(tmp_path, exercise, work.solution(exercise)))


@pytest.mark.parametrize("exercise", EXERCISES, ids=NAMES)
def test_the_classic_mistake_is_explained(exercise, tmp_path):
    """The message ends in the sentence of a case, and not in an error of Python's."""
    function = written(tmp_path, exercise, work.solution(exercise, *exercise.near_miss))
    with pytest.raises(work.Mistake) as error:
        work.check(exercise, function)
    assert any(str(error.value).endswith(case.says) for case in exercise.cases)
    assert not re.match(r"\w+Error", str(error.value))


@pytest.mark.parametrize("exercise", EXERCISES, ids=NAMES)
def test_its_own_tests_exist(exercise):
    """Every word of -k stands in the file, be it in a test's name or among its parameters."""
    file, words = exercise.tests
    text = (ROOT / file).read_text(encoding="utf-8")
    for word in re.split(" or | and ", words):
        assert word in text, word
    path, line = exercise.where().rsplit(":", 1)
    assert (ROOT / path).exists() and int(line) > 0


@pytest.mark.parametrize("lines, message", [
    ("    x -= x.max(-1, keepdims=True)\n    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)",
     "changes its inputs"),
    ("    return np.float64(softmax_of(x))", "NameError in line 5: name 'softmax_of'"),
    ("    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)", "holds nan or infinity where numbers are expected"),
    ("    return x[0]", "has the shape"), ("    return [1.0]", "should be an array"),
    ("    e = np.exp(x - x.max())\n    return e / e.sum()", "Each row sums to 1"),
    ("    e = np.exp((x - x.max(-1, keepdims=True)).astype(float))\n    return e / e.sum(-1, keepdims=True)",
     "float64, expected float32"),
])
def test_other_mistakes(lines, message, tmp_path):
    exercise = named("softmax")
    with pytest.raises(work.Mistake, match=re.escape(message)):
        work.check(exercise, written(tmp_path, exercise, f"import numpy as np\n\n\ndef softmax(x):\n{lines}\n"))


@pytest.mark.parametrize("text, message", [
    ("def softmax(x)\n", "line 1: expected ':'"), ("x = 1\n", "expected a function softmax"),
    ("import no_such_module\n", "ModuleNotFoundError while it is read")])
def test_files_that_cannot_be_used(text, message, tmp_path):
    with pytest.raises(InputError, match=message):
        written(tmp_path, named("softmax"), text)


def test_installed_reaches_every_module_and_leaves_again():
    """`linear` is used by the towers, the decoder and the projector; a method is exchanged in its class."""
    before = ops.linear

    def other(x, weight, bias=None):
        return np.zeros((*x.shape[:-1], len(weight)))

    with work.installed(named("linear"), other):
        assert ops.linear is siglip.linear is other
    assert ops.linear is siglip.linear is before
    cache = named("kv-cache")
    original = cache.original()
    with work.installed(cache, other):
        assert cache.original() is other
    assert cache.original() is original


def test_its_own_tests_run_with_the_reader_s_function(tmp_path):
    """The tests of softmax pass with the solution and fail with the classic mistake."""
    exercise = named("softmax")
    for text, expected in [(work.solution(exercise), True), (work.solution(exercise, *exercise.near_miss), False)]:
        written(tmp_path, exercise, text)
        passed, output = work.run_tests(exercise, tmp_path / "softmax.py")
        assert passed is expected, output
        assert (" failed" in output) is not expected


def test_progress_belongs_to_a_file_s_content(tmp_path):
    path = tmp_path / "softmax.py"
    path.write_text("a")
    work.write_progress(tmp_path, "softmax", solved=work.fingerprint(path))
    work.write_progress(tmp_path, "softmax", hints=2)
    assert work.read_progress(tmp_path) == {"softmax": {"solved": work.fingerprint(path), "hints": 2}}
    path.write_text("b")
    assert work.read_progress(tmp_path)["softmax"]["solved"] != work.fingerprint(path)
