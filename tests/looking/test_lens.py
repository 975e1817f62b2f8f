"""The terminal's lens: what it prints and draws, and that the numbers are those of the model."""
import numpy as np
import pytest
from helpers import assert_close, random_params, random_pixels
from PIL import Image
from small_models import TEXT_CONFIG, model_config, write_model, write_script

from minipali.__main__ import main
from minipali.checkpoint.config import PaliGemmaConfig
from minipali.decoding.generate import Answer, generate
from minipali.decoding.loaded_model import Model, load_model
from minipali.decoding.sampling import Decoding
from minipali.inputs.image import Preprocessor, open_image
from minipali.looking.gather import (
    decoder_attention,
    observe,
    residual_stream,
    token_texts,
    vision_attention,
)
from minipali.looking.lens import grids, map_lines, printable, shares, tinted
from minipali.looking.logit_lens import logit_lens, picture_lens, row_names
from minipali.model.ops import softmax
from minipali.trace import record


def small_model(kind="gemma", dtype=np.float64):
    """A random model of nine patches that needs no folder."""
    cfg: PaliGemmaConfig = model_config(kind)
    params = random_params(cfg, np.random.default_rng(1), dtype)
    return Model("nowhere", cfg, None, Preprocessor(cfg.vision_config.image_size), "numpy", params)


def seen_by(model, pictures=1, most=9, prompt=(2, 7, 5)):
    """What was seen of a greedy answer."""
    pixels = random_pixels(model.cfg, pictures, np.random.default_rng(2))
    features = model.features_of(pixels).reshape(1, -1, model.cfg.text_config.hidden_size)
    [answer] = generate(model, features, [list(prompt)], Decoding(max_new_tokens=most))
    return observe(model, pixels, list(prompt), answer), answer


@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
@pytest.mark.parametrize("pictures", [1, 2])
def test_one_pass_sees_what_prefill_and_decoding_saw(kind, pictures):
    """Attention and scores of the whole answer, against every step recorded while it was written."""
    model = small_model(kind)
    with record(attention=True, steps=True) as steps:
        seen, answer = seen_by(model, pictures)
    assert seen.steps[:len(answer.ids)] == answer.ids and seen.patches == 9 * pictures
    attention, S = decoder_attention(seen), seen.patches + len(seen.text)
    assert attention.shape == (2, 12, len(seen.steps), S)
    assert_close("each step shares out one", attention.sum(-1), np.ones(attention.shape[:-1]), "formula")
    for layer in range(2):
        recorded = steps[f"language_model.model.layers.{layer}.self_attn.attn_weights"]
        assert_close("the first", attention[layer, :, 0, :seen.patches + 3], recorded[0][0, :, -1], "reordered")
        for step in range(1, len(seen.steps)):
            until = recorded[step].shape[-1]
            assert_close(f"step {step}", attention[layer, :, step, :until], recorded[step][0, :, 0], "reordered")
            assert not attention[layer, :, step, until:].any()
    logits = [x.reshape(-1) for x in steps["logits"]][:len(seen.steps)]
    assert_close("scores", seen.logits, np.stack(logits), "reordered")
    assert vision_attention(seen).shape == (1, 8, 9, 9)


@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
def test_the_last_row_of_the_lens_is_the_model(kind):
    seen, _ = seen_by(small_model(kind))
    lens, steps = logit_lens(seen), slice(seen.first, seen.first + len(seen.steps))
    assert lens.top.shape == (5, len(seen.text)) == (len(row_names(2)), len(seen.text))
    assert lens.top[-1, steps].tolist() == seen.logits.argmax(-1).tolist()
    assert_close("probability", lens.probability[-1, steps], softmax(seen.logits).max(-1), "reordered")
    assert not lens.rank[-1].any() and (lens.final[-1] == lens.probability[-1]).all()
    assert ((lens.rank == 0) == (lens.top == lens.top[-1])).all()
    assert len(picture_lens(seen)) == seen.patches


def test_the_stream_is_what_the_layers_give():
    """After each MLP the layer's own output; in between, the sum with what attention added."""
    seen, _ = seen_by(small_model("gemma2"))
    stream = residual_stream(seen)
    assert (stream[2] == seen.layer(0)[9:]).all() and (stream[4] == seen.layer(1)[9:]).all()
    added = seen.layer(1, "post_attention_layernorm")[9:]
    assert_close("after attention", stream[3], stream[2] + added, "formula")


def test_the_tied_table_names_its_own_input():
    """With matrices as good as orthogonal the embedding row of the lens is the token that was read."""
    model = small_model()
    table = np.linalg.qr(np.random.default_rng(0).standard_normal((31, 31)))[0][:, :20]
    model.params["language_model"]["model"]["embed_tokens"]["weight"] = table / np.linalg.norm(table, axis=1)[:, None]
    model.params["language_model"]["model"]["norm"]["weight"] = np.zeros(20)
    seen, _ = seen_by(model)
    assert logit_lens(seen).top[0].tolist() == seen.text


@pytest.mark.parametrize(("stopped", "count", "most", "steps"), [
    ("eos", 3, 64, 4), ("length", 3, 64, 3), ("eos", 3, 3, 4), ("eos", 3, 2, 2), ("eos", 0, 64, 1)])
def test_steps_and_the_stop_token(stopped, count, most, steps):
    model = small_model()
    answer = Answer(ids=[4, 9, 6][:count], stopped_by=stopped)
    seen = observe(model, random_pixels(model.cfg, 1, np.random.default_rng(0)), [2, 5], answer, most)
    assert len(seen.steps) == steps == len(seen.logits) and seen.steps[:min(count, most)] == answer.ids[:most]
    assert (seen.steps[-1] == 1) == (steps > min(count, most))


def test_shares_add_up_to_one():
    seen, _ = seen_by(small_model())
    attention = decoder_attention(seen).mean((0, 1))
    parts = shares(seen, attention)
    assert_close("sum", parts.sum(-1), np.ones(len(parts)), "formula")
    assert_close("BOS", parts[:, 1], attention[:, 9], "formula")
    assert_close("picture", parts[:, 0], grids(seen, attention).sum((1, 2, 3)), "formula")
    assert parts[0, 3] == 0


def test_map_and_tint():
    grid = np.array([[0.0, 0.25], [0.04, 1.0]])
    assert list(map_lines(grid)) == ["    ++", "  ::@@"]
    picture = np.asarray(tinted(Image.new("RGB", (20, 10), "white"), grid, 1.0))
    assert picture.shape == (210, 210, 3) and (picture[0, 0] == 255).all()
    assert picture[0, 0, 2] > picture[-1, 0, 2] > picture[0, -1, 2] > picture[-1, -1, 2]


@pytest.mark.parametrize(("text", "shown"), [
    (" a", "_a"), ("\n", "\\n"), ("\x1b[2J", "\\x1b[2J"), ("\u202e", "\\u202e"), ("é", "é")])
def test_a_token_cannot_move_the_terminal(text, shown):
    assert printable(text) == shown


def test_tokens_as_text(tmp_path):
    model = load_model(write_model(tmp_path))
    names = {name: model.tokenizer.id_of(name) for name in ["▁", "a", "<0xC3>", "<eos>", "<loc0005>", "<image>"]}
    assert token_texts(model, names.values()) == [" ", "a", "<0xC3>", "<eos>", "<loc0005>", "<image>"]
    assert token_texts(model, [10**6]) == ["#1000000"] and token_texts(small_model(), [3, 4]) == ["#3", "#4"]


def test_what_it_prints(tmp_path, capsys, picture):
    folder = write_script(tmp_path, [270, 280, 1])
    assert main(["lens", str(picture), "abc", "--model", str(folder), "--out", str(tmp_path / "lens.png")]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "all layers and all heads" in out and "layer 0" in out and "<eos>" in out
    assert open_image(tmp_path / "lens.png").width > 600
    options = ["--layer", "1", "--head", "3", "--step", "3"]
    assert main(["lens", str(picture), "abc", "--model", str(folder), *options]) == 0
    assert "layer 1 and head 3" in (out := capsys.readouterr().out) and "Step 3, <eos>, over the picture" in out


@pytest.mark.parametrize(("options", "problem"), [
    (["--layer", "2"], "--layer: 2 is out of range, expected a number from 0 to 1"),
    (["--head", "4"], "--head: 4 is out of range, expected a number from 0 to 3"),
    (["--step", "9"], "--step: 9 is out of range, expected a number from 1 to 2"),
    (["--step", "0"], "--step: 0: expected"),
    (["--max-new-tokens", "0"], "--max-new-tokens: 0"), (["--out", "x.nothing"], "x.nothing: not a picture format")])
def test_refusals(tmp_path, capsys, picture, options, problem):
    folder = write_script(tmp_path, [270, 1])
    assert main(["lens", str(picture), "abc", "--model", str(folder), *options]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("minipali lens: error: ") and problem in err and err.count("\n") == 1


def test_a_text_model_has_no_picture_to_look_at(tmp_path, capsys, picture):
    folder = write_model(tmp_path, TEXT_CONFIG)
    assert main(["lens", str(picture), "abc", "--model", str(folder)]) == 2
    assert "a text model, expected one that sees pictures" in capsys.readouterr().err
