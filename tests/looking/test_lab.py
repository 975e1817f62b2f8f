"""The laboratory: every classic bug goes in, changes what the model says, and comes out again."""
import inspect

import numpy as np
import pytest
from helpers import ROOT

from minipali.decoding.loaded_model import encode_prompt, load_model
from minipali.looking import lab
from minipali.looking.classic_bugs import BUGS, ClassicBug
from minipali.model import ops, paligemma
from minipali.model.gemma import output_logits

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
    # A bug may spare all these answers: the model's norms hardly notice a mean that is near 0. Then the scores show it.
    features, ids = model.features(pictures[:1]), np.array([encode_prompt("caption en", model)])

    def scores():
        length = [ids.shape[1]]
        x = paligemma.forward(features, ids, length, [0], model.params, model.cfg)[:, -1]
        return output_logits(x, paligemma.output_head(model.params, model.cfg), model.cfg.text_config)
    right = scores()
    with lab.broken(bug):
        assert np.abs(scores() - right).max() > 0.01, f"{bug.name} changes neither an answer nor a score"


# Where `compare` must find each bug: what is wrong stands between this activation and the one before it.
VISION, TEXT = "vision_tower.vision_model.", "language_model.model.layers.0."
FIRST = {
    "bgr": "pixel_values", "pixels-from-zero": "pixel_values", "imagenet-colors": "pixel_values",
    "no-bos": "input_ids", "no-newline": "input_ids", "patches-by-reshape": f"{VISION}embeddings",
    "patches-by-column": f"{VISION}embeddings", "channels-last": f"{VISION}embeddings",
    "no-patch-positions": f"{VISION}embeddings", "scale-by-width": f"{VISION}encoder.layers.0.self_attn.attn_weights",
    "one-layer-short": f"{VISION}post_layernorm", "no-post-layernorm": "multi_modal_projector",
    "no-scale": f"{VISION}encoder.layers.0.self_attn.attn_weights",
    "heads-not-transposed": f"{VISION}encoder.layers.0.self_attn.out_proj",
    "norm-without-one": f"{TEXT}input_layernorm", "norm-with-two": f"{TEXT}input_layernorm",
    "norm-by-deviation": f"{TEXT}input_layernorm", "silu": f"{TEXT}mlp.down_proj",
    "interleaved-rope": f"{TEXT}self_attn.attn_weights", "position-zero": f"{TEXT}self_attn.attn_weights",
    "position-too-far": f"{TEXT}self_attn.attn_weights", "causal-prefix": f"{TEXT}self_attn.attn_weights",
    "padding-attended": None, "text-not-scaled": "language_model.model.embed_tokens",
    # A norm takes the scale out again: the picture's size shows only where it meets the attention's output.
    "picture-scaled": f"{TEXT}post_attention_layernorm",
}
IN_DECODING = {"position-zero", "position-too-far"}


@pytest.fixture(scope="module")
def caption(model):
    """A held-out picture, two tokens of its caption, and the right model's recordings of both."""
    image = lab.questions_of(1)[0][0]
    answer = lab.caption_of(model, image)[:2]
    return image, answer, lab.activations(model, image, "caption en", answer)


@pytest.mark.parametrize("bug", BUGS, ids=NAMES)
def test_the_comparer_names_the_right_activation(bug, model, caption):
    """One prompt alone has no padding, so the bug about padding shows in no activation of it."""
    image, answer, right = caption
    found = lab.first_difference(right, lab.activations(model, image, "caption en", answer, bug))
    assert (found and found[1].name) == FIRST[bug.name]
    assert not found or (found[0] > 0) == (bug.name in IN_DECODING)


def test_without_a_bug_nothing_differs(model, caption):
    image, answer, right = caption
    assert len(right) == 3 and lab.first_difference(right, lab.activations(model, image, "caption en", answer)) is None
    assert list(right[0])[:2] == ["pixel_values", "input_ids"] and list(right[2])[-1] == "logits"


def test_the_first_difference_is_the_first_in_order():
    right = [{"logits": np.ones(2), "multi_modal_projector": np.ones(2)}, {"logits": np.ones(2)}]
    wrong = [{"logits": np.zeros(2), "multi_modal_projector": np.zeros(2)}, {"logits": np.ones(2)}]
    step, row = lab.first_difference(right, wrong)
    assert (step, row.name) == (0, "multi_modal_projector")
    step, row = lab.first_difference(right, [right[0], {"logits": np.array([1, np.nan])}])
    assert (step, row.name) == (1, "logits")
