"""The laboratory: every classic bug goes in, changes what the model says, and comes out again."""
import inspect

import numpy as np
import pytest
from helpers import ROOT

from minipali.decoding.loaded_model import load_model
from minipali.looking import lab
from minipali.looking.classic_bugs import BUGS, ClassicBug
from minipali.model import ops

NAMES = [bug.name for bug in BUGS]


@pytest.fixture(scope="module")
def model():
    return load_model(ROOT / "weights")


@pytest.fixture(scope="module")
def asked(model):
    """Twelve held-out pictures, the questions about them in the order in which most bugs show, and the right run."""
    pictures, questions = lab.questions_of(12)
    questions.sort(key=lambda one: one.task not in ("caption", "detect"))
    return pictures, questions, lab.trial(model, pictures, questions)


def test_there_are_at_least_twenty_each_with_a_public_source():
    assert len(set(NAMES)) == len(NAMES) >= 20
    for bug in BUGS:
        assert bug.source.startswith("https://github.com/") and bug.source.split("/")[-2] in ("issues",
                                                                                              "pull"), bug.name


@pytest.mark.parametrize("bug", BUGS, ids=NAMES)
def test_a_bug_is_one_line_of_one_function(bug):
    right, wrong = lab.lines_of(bug)
    assert right != wrong
    assert inspect.getsource(lab.function_of(bug)).count(bug.old) == 1


def test_a_bug_reaches_every_module_and_leaves_again():
    """The function object stays the same, so a module that imported it has the bug as well."""
    bug = lab.bug_named("norm-without-one")
    before, x = ops.rms_norm, np.ones((1, 4))
    with lab.broken(bug):
        assert ops.rms_norm is before
        np.testing.assert_array_equal(before(x, np.zeros(4), 0.0), 0 * x)
    np.testing.assert_array_equal(before(x, np.zeros(4), 0.0), x)


def test_a_bug_leaves_after_an_error():
    bug, code = lab.bug_named("silu"), lab.function_of(lab.bug_named("silu")).__code__
    with pytest.raises(KeyError), lab.broken(bug):
        assert lab.function_of(bug).__code__ is not code
        raise KeyError
    assert lab.function_of(bug).__code__ is code


def test_a_text_that_is_not_there_is_refused():
    bug = ClassicBug("x", "minipali.model.ops", "softmax", "", "no such text", "", "")
    with pytest.raises(ValueError, match="0 times in softmax"), lab.broken(bug):
        pass


@pytest.mark.parametrize("bug", BUGS, ids=NAMES)
def test_every_bug_changes_what_the_model_says(bug, model, asked):
    """The captions and boxes show most bugs; who survives them meets the questions, too."""
    pictures, questions, before = asked
    first = sum(one.task in ("caption", "detect") for one in questions)
    for part in (slice(0, first), slice(0, None)):
        if lab.trial(model, pictures, questions[part], bug).texts != before.texts[part]:
            return
    pytest.fail(f"{bug.name} changes no answer")


def test_without_a_bug_nothing_differs(model):
    image = lab.questions_of(1)[0][0]
    answer = lab.caption_of(model, image)[:2]
    runs = [lab.activations(model, image, "caption en", answer) for _ in range(2)]
    assert lab.first_difference(*runs, 0.0) is None
    assert list(runs[0])[:2] == ["pixel_values", "input_ids"] and list(runs[0])[-1] == "step 2: logits"


def test_first_difference_is_the_first_in_order():
    right = {"a": np.ones(2), "b": np.ones(2), "c": np.ones(2)}
    assert lab.first_difference(right, right | {"b": np.array([1, 1.5]), "c": np.zeros(2)}, 0.1) == ("b", 0.5)
    assert lab.first_difference(right, right | {"c": np.array([1, np.nan])}, 0.1)[0] == "c"
    assert lab.first_difference(right, right | {"a": np.ones(3)}, 0.1) == ("a", np.inf)
    assert lab.first_difference(right, right | {"a": np.array([1, 1.05])}, 0.1) is None
