"""A request to results, without a word printed."""
import dataclasses

import numpy as np
import pytest
from helpers import assert_close
from PIL import Image
from safetensors.numpy import load_file
from small_models import CONFIG, EOS, IDS, IMAGE, PATCHES, TEXT_CONFIG, random_arrays, write_model, write_script

from minipali.commands.ask import Request, ask
from minipali.decoding.batch import in_one_prompt
from minipali.decoding.generate import generate
from minipali.decoding.loaded_model import encode_prompt, load_model
from minipali.decoding.sampling import Decoding
from minipali.errors import InputError, Progress

THREE = Decoding(max_new_tokens=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Three pictures of unlike sizes in a folder."""
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(5)
    for name, size in [("a.png", (30, 40)), ("b.png", (25, 20)), ("c.png", (9, 70))]:
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    return [str(folder / name) for name in ("a.png", "b.png", "c.png")]


class Heard(Progress):
    """What would be said on stderr."""

    def __init__(self):
        super().__init__("test", wanted=True)
        self.lines, self.refused = [], []

    def __call__(self, text):
        self.lines.append(text)

    def complain(self, problem):
        self.refused.append(str(problem))

    def update(self, text):
        self.lines.append(text)


def expected(folder, paths, prompt, others=()):
    """The model's own answer, from generate alone."""
    model = load_model(folder)
    features = model.features([Image.open(path) for path in paths])
    if others:
        features = in_one_prompt(features, model.features([Image.open(path) for path in others]))
    [answer] = generate(model, features, [encode_prompt(prompt, model)], THREE)
    return answer.ids


def test_nothing_is_printed(folder, pictures, capsys):
    [result] = ask(Request(folder, (pictures[0],), ("ab",), decoding=THREE))
    assert capsys.readouterr() == ("", "")
    assert result.answer.ids == expected(folder, pictures[:1], "ab")
    assert (result.image, result.prompt, result.several, result.ids_only) == (pictures[0], "ab", (), False)
    assert result.prompt_ids == encode_prompt("ab", load_model(folder)) and result.load_seconds > 0


def test_a_request_does_not_change(folder):
    request = Request(folder)
    with pytest.raises(dataclasses.FrozenInstanceError):
        request.beams = 2
    assert hash(request) == hash(Request(folder)) and request == Request(folder)


def test_the_text_is_heard_as_it_is_written(tmp_path, pictures):
    """In pieces that make the text; a character of four bytes comes as one."""
    words = ["c", *(f"<0x{byte:02X}>" for byte in "🦉".encode()), "t"]
    model, heard = write_script(tmp_path, [*(IDS[word] for word in words), EOS]), []
    for beams in 1, 2:
        heard.clear()
        [result] = ask(Request(model, (pictures[0],), ("x",), beams=beams), on_text=heard.append)
        assert "".join(heard) == result.text == "c🦉t" and "🦉" in [piece.strip("ct") for piece in heard]


def test_ids_in_place_of_a_prompt(folder, pictures):
    [result] = ask(Request(folder, (pictures[0],), ((300, 5),), decoding=THREE))
    assert result.prompt is None and result.prompt_ids == [300, 5] and len(result.answer.ids) == 3


def test_a_question_asked_twice(folder, pictures):
    """Each gets an answer of its own, in its place."""
    results = list(ask(Request(folder, tuple(pictures[:2]), ("ab", "c", "ab"), several=True, decoding=THREE)))
    assert [(result.image, result.prompt) for result in results] == [
        (path, prompt) for path in pictures[:2] for prompt in ("ab", "c", "ab")]
    assert [result.answer.ids for result in results] == [
        expected(folder, [path], prompt) for path in pictures[:2] for prompt in ("ab", "c", "ab")]


def test_pictures_beside(folder, pictures):
    """They follow each picture in the same prompt, in order, and their tokens count."""
    both = tuple(pictures[1:])
    [alone] = ask(Request(folder, (pictures[0],), ("ab",), beside=both, decoding=THREE))
    assert alone.answer.ids == expected(folder, pictures[:1], "ab", both)
    several = list(ask(Request(folder, tuple(pictures), ("ab",), beside=both, several=True, decoding=THREE)))
    assert [result.answer.ids for result in several] == [
        expected(folder, [path], "ab", both) for path in pictures]
    for prompts in [("a" * 60,), ("a", "a" * 50)]:
        with pytest.raises(InputError, match="64 positions"):
            list(ask(Request(folder, (pictures[0],), prompts, beside=both)))


def test_without_a_picture(folder):
    [result] = ask(Request(folder, (), ("ab",), decoding=THREE, masks=True))
    assert result.image is None and len(result.answer.ids) == 3 and result.detections == result.masks == []


def test_scores(folder, pictures):
    """In the order given, whichever is likelier, and no answer is written."""
    request = Request(folder, (pictures[0],), ("ab",), scored=("no", "yes", "no"))
    [result] = ask(request, on_text=lambda piece: pytest.fail("nothing is written"))
    assert [text for text, _ in result.several] == ["no", "yes", "no"] and result.text == ""
    first, second, third = (answer.logprob for _, answer in result.several)
    assert first == pytest.approx(third) and first != pytest.approx(second)


@pytest.mark.parametrize("options", [{"beams": 3}, {"best_of": 3, "decoding": Decoding(2.0, seed=0, max_new_tokens=3)}])
def test_several_answers_are_told(folder, pictures, options):
    """The likeliest is the answer; `progress` hears the sums of all of them."""
    progress = Heard()
    [result] = ask(Request(folder, (pictures[0],), ("ab",), **{"decoding": THREE} | options), progress)
    logprobs = [answer.logprob for _, answer in result.several]
    assert len(logprobs) == 3 and logprobs == sorted(logprobs, reverse=True)
    assert (result.text, result.answer) == result.several[0]
    lines = [line for line in progress.lines if line.startswith("log-probability")]
    assert lines == [f"log-probability {answer.logprob:.3f} {text!r}" + " (ended)" * (answer.stopped_by == "eos")
                     for text, answer in result.several]
    assert not [line for line in progress.lines if line.startswith("beams")]
    list(ask(Request(folder, (pictures[0],), ("ab",), beams=2, decoding=THREE, every_step=True), progress))
    assert len([line for line in progress.lines if line.startswith("beams")]) == 3


def test_an_end_counts(tmp_path, pictures):
    """The sum that is told holds the stop token's part."""
    progress = Heard()
    [result] = ask(Request(write_script(tmp_path, [IDS["a"], EOS]), (pictures[0],), ("x",), beams=2), progress)
    answer = result.answer
    assert answer.stopped_by == "eos" and answer.logprob == sum(answer.logprobs) + answer.stop_logprob
    assert f"log-probability {answer.logprob:.3f} 'a' (ended)" in progress.lines


def test_unreadable_pictures(folder, pictures, tmp_path):
    """Among several it is told and skipped; the only one ends it, before the model is looked at."""
    (tmp_path / "bad.png").write_text("no picture")
    bad, progress = str(tmp_path / "bad.png"), Heard()
    paths = (bad, pictures[0], str(tmp_path / "none.png"), pictures[1])
    results = list(ask(Request(folder, paths, ("ab",), several=True, decoding=THREE), progress))
    assert [result.image for result in results] == pictures[:2]
    assert [line.split(":")[0] for line in progress.refused] == [bad, paths[2]]
    assert "4 of 4 pictures" in progress.lines[-2] and progress.lines[-1].startswith("2 pictures answered")
    for prompts in [("ab",), ("ab", "c")]:
        with pytest.raises(InputError, match="bad.png"):
            list(ask(Request(tmp_path / "no model", (bad,), prompts)))


def test_two_pictures_of_one_name(folder, pictures, tmp_path):
    request = Request(folder, (pictures[0], pictures[0]), ("ab",), several=True, save_image=tmp_path / "boxes")
    with pytest.raises(InputError, match="two pictures are called a.png"):
        list(ask(request))
    assert list(tmp_path.iterdir()) == []


def test_dump(folder, pictures, tmp_path):
    path = tmp_path / "taps.safetensors"
    [result] = ask(Request(folder, (pictures[0],), ("ab",), decoding=THREE, dump=path))
    dumped = load_file(path)
    assert dumped["input_ids"].tolist() == [[IMAGE] * PATCHES + result.prompt_ids]
    assert dumped["pixel_values"].shape[:2] == (1, 3)
    assert int(dumped["logits"].argmax()) == result.answer.ids[0]
    [result] = ask(Request(folder, (), ("ab",), decoding=THREE, dump=path))
    assert "pixel_values" not in load_file(path)


def test_numbers_that_overflow_are_no_news(tmp_path, pictures):
    """Warnings are failures here. What the caller has set for his own numbers stays."""
    arrays = random_arrays(CONFIG)
    arrays["language_model.model.layers.0.mlp.gate_proj.weight"] *= np.float32(1e16)
    model = write_model(tmp_path, CONFIG, arrays)
    with np.errstate(over="raise"):
        for _ in ask(Request(model, tuple(pictures), ("a", "b"), several=True, decoding=THREE)):
            assert np.geterr()["over"] == "raise"
    [result] = ask(Request(model, (pictures[0],), ("a",), decoding=THREE))
    assert len(result.answer.ids) == 3


def test_one_at_a_time_and_together(folder, pictures):
    """A picture's answer does not depend on which others are asked about, up to the order of sums."""
    together = list(ask(Request(folder, tuple(pictures), ("ab",), several=True, decoding=THREE)))
    for path, result in zip(pictures, together):
        [alone] = ask(Request(folder, (path,), ("ab",), decoding=THREE))
        assert alone.answer.ids == result.answer.ids
        assert_close("logprobs", np.array(result.answer.logprobs, np.float32), alone.answer.logprobs, "reordered")


def test_a_text_model_sees_nothing(tmp_path, pictures):
    folder = write_model(tmp_path, TEXT_CONFIG)
    with pytest.raises(InputError, match="a text model, which sees no picture; give --no-image"):
        list(ask(Request(folder, (pictures[0],), ("a",))))
