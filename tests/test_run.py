"""`python run.py` as people outside rely on it: what it prints and where, and one line for whatever is wrong."""
import errno
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_close, one_line
from PIL import Image
from safetensors.numpy import load_file, save_file
from small_models import (
    BOS,
    CONFIG,
    EOS,
    IDS,
    IMAGE,
    NEWLINE,
    PATCHES,
    SIGLIP_CONFIG,
    random_arrays,
    with_text,
    write_model,
    write_script,
)

import run
from minipali.checkpoint import vae_oid
from minipali.checkpoint.hub import save
from minipali.checkpoint.tensors import unflatten
from minipali.commands import ask as asking
from minipali.decoding import generate as generating
from minipali.decoding import loaded_model
from minipali.decoding.loaded_model import load_model
from minipali.decoding.sampling import Decoding
from minipali.model import vq_vae as segmentation
from minipali.model.gemma import KVCache, output_logits
from minipali.model.ops import log_softmax
from minipali.model.paligemma import forward, output_head, prefill
from minipali.outputs.boxes import Detection, to_text
from minipali.outputs.masks import from_run_lengths, paste
from minipali.small_world import tasks, world
from minipali.trace import record

HERE = Path(run.__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model; it never says a stop token within a test's few words."""
    return write_model(tmp_path_factory.mktemp("model"))


def command(*argv):
    return [sys.executable, HERE / "run.py", *argv]


def shell(*argv, **options):
    """run.py as a process of its own, in bytes."""
    return subprocess.run(command(*argv), capture_output=True, timeout=60, check=False, **options)


# --- the answer -------------------------------------------------------------------------------------------------------

KEYS = {"model": str, "image": str, "prompt": str, "prompt_ids": list, "output_ids": list, "text": str, "boxes": list,
        "seconds": dict, "tokens_per_second": float, "peak_rss_bytes": int, "stopped_by": str, "logprobs": list,
        "stop_logprob": type(None)}


def test_json(folder, picture, ask):
    """Exactly the promised keys and types; what is printed without --json is the text and nothing else."""
    arguments = picture, "ab cd", "--model", folder, "--max-new-tokens", 5
    found = ask(*arguments, "--json")
    assert {key: type(value) for key, value in found.items()} == KEYS
    assert found["model"] == str(folder) and found["prompt"] == "ab cd" and found["stopped_by"] == "length"
    assert found["prompt_ids"] == [BOS, *(IDS[c] for c in "ab▁cd"), NEWLINE]
    assert len(found["output_ids"]) == 5 and all(type(i) is int for i in found["output_ids"])
    assert list(found["seconds"]) == ["load", "vision", "prefill", "decode"]
    assert all(type(value) is float and value > 0 for value in found["seconds"].values())
    assert found["tokens_per_second"] == pytest.approx(4 / found["seconds"]["decode"]), "one came with the prefill"
    assert found["text"] == load_model(folder).tokenizer.decode(found["output_ids"]) == ask(*arguments)


def test_answer_is_that_of_the_model(folder, picture, ask):
    """The tokens are the likeliest ones of a pass over picture and prompt without any of this program."""
    found = ask(picture, "ab", "--model", folder, "--max-new-tokens", 3, "--json")
    model = load_model(folder)
    with Image.open(picture) as image:
        features = model.features([image])
    ids = found["prompt_ids"]
    for token in found["output_ids"]:
        cache = KVCache(features, 1, 64, model.cfg.text_config)
        prefix = PATCHES + len(found["prompt_ids"])
        first = found["prompt_ids"]
        logits = prefill(features, np.array([first]), np.array([len(first)]), model.params, model.cfg, cache)
        if len(ids) > len(first):
            logits = generating.decode(np.array([ids[len(first):]]), model.params, model.cfg, cache)[:, -1]
        assert cache.length == prefix + len(ids) - len(first)
        assert token == int(logits.argmax())
        ids = [*ids, token]


def test_stops_at_eos(tmp_path, picture, ask):
    """The stop token is nobody's output; each token cost one step, the stop token's included."""
    script = [IDS[c] for c in "cat"]
    model = write_script(tmp_path, [*script, EOS])
    found = ask(picture, "what", "--model", model, "--json")
    assert found["output_ids"] == script and found["text"] == "cat" and found["stopped_by"] == "eos"
    assert found["tokens_per_second"] == pytest.approx(3 / found["seconds"]["decode"])
    assert ask(picture, "what", "--model", model, "--json", "--max-new-tokens", 3)["stopped_by"] == "length"
    assert ask(picture, "what", "--model", model) == "cat"


def test_silent_answer(tmp_path, picture, ask):
    """A model may stop at once."""
    found = ask(picture, "", "--model", write_script(tmp_path, [EOS]), "--json")
    assert found["prompt_ids"] == [BOS, NEWLINE] and found["tokens_per_second"] == 0.0
    assert (found["output_ids"], found["text"], found["boxes"], found["stopped_by"]) == ([], "", [], "eos")


def test_boxes_in_pixels(tmp_path, picture, ask):
    """y first in the text, x first in the list, and the picture is 40 wide and 30 high, whatever the model saw."""
    words = ["<loc0100>", "<loc0200>", "<loc0800>", "<loc1023>", "▁", *"cat", ";", "<loc0000>"]
    model = write_script(tmp_path / "model", [*(IDS[word] for word in words), EOS])
    found = ask(picture, "detect cat", "--model", model, "--json", "--save-image", tmp_path / "boxes.png")
    assert found["text"] == "".join(words).replace("▁", " ")
    [box] = found["boxes"]
    assert box["label"] == "cat"
    assert box["box"] == pytest.approx([200 / 1023 * 40, 100 / 1023 * 30, 40, 800 / 1023 * 30])
    with Image.open(tmp_path / "boxes.png") as drawn:
        assert drawn.format == "PNG" and drawn.width * 3 == drawn.height * 4
    assert sorted(os.listdir(tmp_path)) == ["boxes.png", "model"]


@pytest.mark.parametrize("name", ["boxes.jpg", "boxes.WEBP", "boxes.gif"])
def test_save_image_formats(tmp_path, picture, folder, ask, name):
    ask(picture, "a", "--model", folder, "--max-new-tokens", 1, "--save-image", tmp_path / name)
    with Image.open(tmp_path / name) as drawn:
        drawn.load()


def test_peak_memory_is_our_own(folder, picture):
    """A large process that starts a small one does not make it large (Linux counts it so in ru_maxrss)."""
    ballast = np.ones(15_000_000)
    found = json.loads(shell(picture, "a", "--model", folder, "--json").stdout)
    assert 10e6 < found["peak_rss_bytes"] < ballast.nbytes


def test_prompt_ids(folder, picture, tmp_path, ask):
    """Used exactly as given, after the picture's tokens: BOS and newline are not added. No tokenizer is needed."""
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    for model in [folder, bare]:
        found = ask(picture, "--model", model, "--prompt-ids", "300, 5 ,2", "--max-new-tokens", 3, "--json")
        assert found["prompt_ids"] == [300, 5, 2] and found["prompt"] is None and len(found["output_ids"]) == 3
    assert found["text"] == "" and found["boxes"] == []
    numbers = ask(picture, "--model", bare, "--prompt-ids", "300,5,2", "--max-new-tokens", 3)
    assert numbers.split() == [str(i) for i in found["output_ids"]]


def test_prompt_ids_are_the_prompt(folder, picture, ask):
    """The ids of a prompt in place of the prompt: the same answer."""
    one = ask(picture, "ab", "--model", folder, "--max-new-tokens", 4, "--json")
    ids = ",".join(map(str, one["prompt_ids"]))
    assert ask(picture, "--prompt-ids", ids, "--model", folder, "--max-new-tokens", 4, "--json")["output_ids"] == \
        one["output_ids"]


@pytest.mark.parametrize("name", ["<image>", "<bos>", "<eos>", "<pad>", "<unk>"])
def test_control_names_are_text(folder, picture, ask, name):
    found = ask(picture, f"a{name}b", "--model", folder, "--max-new-tokens", 1, "--json")
    ids = found["prompt_ids"]
    assert ids[0] == BOS and not {0, 1, 2, 3, IMAGE} & set(ids[1:])
    assert load_model(folder).tokenizer.decode(ids) == f"a{name}b\n"


def test_a_prompt_may_begin_as_the_hubs_processor_wants_it(folder, picture, ask, call):
    """<image> for each picture, and BOS: left out of the ids, by --ask and --score too, and --verbose says so."""
    options = "--model", folder, "--max-new-tokens", 1, "--json"
    plain = ask(picture, "ab", *options)
    for leading in ["<image>", "<image><bos>", "<bos>"]:
        assert ask(picture, f"{leading}ab", *options)["prompt_ids"] == plain["prompt_ids"]
    two = ask(picture, "<image><image>ab", "--with", picture, *options)
    assert two["prompt_ids"] == plain["prompt_ids"]
    status, out, err = call(picture, "ab", "--ask", "<image>ab", *options, "--verbose")
    assert status == 0 and [json.loads(line)["prompt_ids"] for line in out.splitlines()] == [plain["prompt_ids"]] * 2
    assert err.count("prompt: <image> at the beginning is left out") == 1
    scored = [call(picture, prompt, "--score", "c", "--model", folder)[1] for prompt in ("ab", "<image><bos>ab")]
    assert scored[0] == scored[1] != ""


def test_another_number_of_image_tokens_is_refused(folder, picture, refusal):
    assert "2 <image>, expected one for each picture (1)" in refusal(picture, "<image><image>ab", "--model", folder)
    assert "1 <image>, expected one for each picture (2)" in refusal(picture, "<image>ab", "--with", picture,
                                                                     "--model", folder)
    assert "1 <image>, expected one for each picture (0)" in refusal("--no-image", "<image>ab", "--model", folder)


def test_places_in_a_prompt_are_tokens(folder, picture, ask):
    found = ask(picture, "<loc0007>", "--model", folder, "--max-new-tokens", 1, "--json")
    assert found["prompt_ids"] == [BOS, IDS["<loc0007>"], NEWLINE]


def test_seeds(folder, picture, ask):
    """The same seed draws the same, another one another; greedy, and the only candidate, need none."""
    arguments = picture, "ab", "--model", folder, "--max-new-tokens", 8, "--json"

    def drawn(*options):
        return ask(*arguments, *options)["output_ids"]
    hot = drawn("--temperature", 3, "--seed", 1)
    assert drawn("--temperature", 3, "--seed", 1) == hot != drawn("--temperature", 3, "--seed", 2)
    assert drawn("--temperature", 3) == drawn("--temperature", 3, "--seed", 0)
    greedy = drawn("--seed", 7)
    assert greedy == drawn() == drawn("--temperature", 3, "--top-k", 1) == drawn("--temperature", 3, "--top-p", 1e-9)
    assert greedy != hot


def test_length_of_the_answer(folder, picture, ask):
    """128 tokens if nothing else is said, and never more than the model has positions for."""
    found = ask(picture, "ab", "--model", folder, "--json")
    assert len(found["output_ids"]) == 64 - PATCHES - 4 and found["stopped_by"] == "length"


# --- other ways to decode ---------------------------------------------------------------------------------------------

def uncached(folder, picture, prompt_ids, answer):
    """The log-probability of each id of an answer, from one pass without a cache."""
    model = load_model(folder)
    with Image.open(picture) as image:
        features = model.features([image])
    ids, prefix = [*prompt_ids, *answer], PATCHES + len(prompt_ids)
    x = forward(features, np.array([ids]), np.array([len(ids)]), np.array([prefix]), model.params, model.cfg)
    logits = output_logits(x[0], output_head(model.params, model.cfg), model.cfg.text_config)
    return log_softmax(logits)[np.arange(len(prompt_ids) - 1, len(ids) - 1), answer]


@pytest.mark.parametrize("options", [[], ["--temperature", 3, "--top-k", 5], ["--beams", 3],
                                     ["--temperature", 2, "--best-of", 3]])
def test_logprobs(folder, picture, ask, options):
    """One for each token, that of the model before anything was cut off, however the answer was found."""
    found = ask(picture, "ab", "--model", folder, "--max-new-tokens", 4, "--json", *options)
    assert len(found["logprobs"]) == len(found["output_ids"]) == 4 and found["stop_logprob"] is None
    expected = uncached(folder, picture, found["prompt_ids"], found["output_ids"])
    assert_close("logprobs", np.array(found["logprobs"], np.float32), expected, "reordered")


def test_stop_logprob(tmp_path, picture, ask):
    """That of the stop token stands apart, since the stop token is no part of the output."""
    model = write_script(tmp_path, [IDS["c"], EOS])
    found = ask(picture, "a", "--model", model, "--json")
    assert found["output_ids"] == [IDS["c"]] and len(found["logprobs"]) == 1
    expected = uncached(model, picture, found["prompt_ids"], [IDS["c"], EOS])
    assert [*found["logprobs"], found["stop_logprob"]] == pytest.approx(expected.tolist(), rel=1e-5)


@pytest.mark.parametrize("options, name", [
    (["--beams", 3], "beams"), (["--best-of", 3, "--temperature", 2], "samples")])
def test_several_answers(folder, picture, call, ask, options, name):
    """The likeliest of them is the answer, and stdout holds that alone; the sums of all are told on the side."""
    arguments = picture, "ab", "--model", folder, "--max-new-tokens", 5, *options
    found = ask(*arguments, "--json")
    assert {key: type(value) for key, value in found.items()} == KEYS | {name: list}
    several = found[name]
    assert [list(one) for one in several] == [["text", "ids", "stopped_by", "logprob", "logprobs", "stop_logprob"]] * 3
    assert all(one["logprob"] == pytest.approx(sum(one["logprobs"])) for one in several)
    assert several == sorted(several, key=lambda one: -one["logprob"])
    assert (found["output_ids"], found["text"], found["logprobs"]) == tuple(several[0][key] for key in [
        "ids", "text", "logprobs"])
    status, out, err = call(*arguments, "--verbose")
    assert (status, out) == (0, found["text"] + "\n")
    for one in several:
        assert f"log-probability {one['logprob']:.3f} {one['text']!r}\n" in err
    assert err.count("beams: ") == (5 if name == "beams" else 0), "after each token the sums of all that go on"


def test_beams_find_what_greed_misses(tmp_path, picture, ask):
    """The likeliest first word leads nowhere: each of many words after it is unlikely."""
    config = CONFIG | {"tie_word_embeddings": False}
    arrays = load_file(write_script(tmp_path / "script", []) / "model.safetensors")
    embed, head = (arrays[f"language_model.{name}.weight"] for name in ["model.embed_tokens", "lm_head"])
    a, b = IDS["a"], IDS["b"]
    embed[NEWLINE, 0] = embed[a, 1] = embed[b, 2] = 1
    head[:, 0], head[a, 0], head[b, 0] = -2, 1.2, 1  # √32 times as much before the softmax
    head[b, 2], head[:b, 2] = 0, -2
    head[EOS, 2] = 3                                 # after "b" the end is certain, after "a" everything is equal
    model = write_model(tmp_path / "model", config, arrays)
    arguments = picture, "x", "--model", model, "--max-new-tokens", 2
    assert ask(*arguments)[0] == "a" and ask(*arguments, "--beams", 2) == "b"


def test_no_tokenizer_for_beams(folder, picture, tmp_path, ask):
    """Ids in, ids out; nothing else is asked of a tokenizer."""
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    arguments = picture, "--prompt-ids", "2,9", "--model", bare, "--max-new-tokens", 3, "--beams", 2
    found = ask(*arguments, "--json")
    assert found["output_ids"] == found["beams"][0]["ids"] != found["beams"][1]["ids"]
    assert ask(*arguments).split() == [str(i) for i in found["output_ids"]]


def test_constrain(folder, picture, ask):
    """A random model answers with boxes of what was asked for, by ids too, and without the option it does not."""
    arguments = picture, "detect cat ; dog", "--model", folder, "--json", "--max-new-tokens", 30
    assert ask(*arguments)["boxes"] == []
    for options in [[], ["--temperature", 2], ["--beams", 2], ["--temperature", 2, "--best-of", 2]]:
        found = ask(*arguments, "--constrain", *options)
        assert found["boxes"] and {box["label"] for box in found["boxes"]} <= {"cat", "dog"}
        assert found["stopped_by"] == "eos" and len(found["boxes"]) == found["text"].count(";") + 1
    ids = ",".join(map(str, found["prompt_ids"]))
    same = ask(picture, "--prompt-ids", ids, *arguments[2:], "--constrain", *options)
    assert same["output_ids"] == found["output_ids"]


def test_score(folder, picture, call, ask):
    """Each given answer with its end, in the order given; the text has a line for each and nothing else."""
    arguments = picture, "ab", "--model", folder, "--score", "no", "--score", "yes it is", "--score", ""
    found = ask(*arguments, "--json")
    assert list(found) == ["model", "image", "prompt", "prompt_ids", "scores", "seconds", "peak_rss_bytes"]
    assert list(found["seconds"]) == ["load", "vision", "prefill", "decode"]
    assert [one["text"] for one in found["scores"]] == ["no", "yes it is", ""]
    for one in found["scores"]:
        assert one["ids"] == load_model(folder).tokenizer.encode(one["text"])
        expected = uncached(folder, picture, found["prompt_ids"], [*one["ids"], EOS])
        assert_close("score", np.array([*one["logprobs"], one["stop_logprob"]], np.float32), expected, "reordered")
        assert one["logprob"] == pytest.approx(expected.sum(), rel=1e-5)
    lines = [f"{one['logprob']:.4f} {one['text']}" for one in found["scores"]]
    assert ask(*arguments).split("\n") == lines
    status, out, err = call(*arguments, "--verbose")
    assert (status, out.splitlines()) == (0, lines) and len(err.splitlines()) == 2


def test_score_with_dump(tmp_path, folder, picture, ask):
    """The prefill that all answers share is dumped as it is for one that is written."""
    paths = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    ask(picture, "ab", "--model", folder, "--max-new-tokens", 1, "--dump", paths[0])
    ask(picture, "ab", "--model", folder, "--score", "a", "--score", "bb", "--dump", paths[1])
    written, scored = map(load_file, paths)
    assert written.keys() == scored.keys()
    for name, x in scored.items():
        np.testing.assert_array_equal(x, written[name])


# --- pictures of all kinds --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode, name", [("L", "a.png"), ("1", "a.png"), ("P", "a.gif"), ("RGBA", "a.png"),
                                        ("LA", "a.png"), ("I;16", "a.png"), ("CMYK", "a.jpg"), ("RGB", "a.bmp"),
                                        ("RGB", "a.webp"), ("F", "a.tif"), ("RGB", "no_ending")])
def test_pictures_of_all_kinds(tmp_path, folder, ask, mode, name):
    """Any mode and format, one pixel high and longer than wide, with blanks in the name."""
    Image.new(mode, (17, 1)).save(tmp_path / f"my {name}", format=None if "." in name else "PNG")
    found = ask(tmp_path / f"my {name}", "a", "--model", folder, "--max-new-tokens", 1, "--json")
    assert len(found["output_ids"]) == 1


# --- --dump -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dump(tmp_path, folder, picture, ask, dtype):
    """All of the prefill under the tracer's names and nothing of the decoding, in the dtype that was asked for."""
    path = tmp_path / "taps.safetensors"
    path.write_text("an older file")
    found = ask(picture, "ab", "--model", folder, "--max-new-tokens", 3, "--dump", path, "--dtype", dtype, "--json")
    dumped, model = load_file(path), load_model(folder, dtype)
    ids = dumped.pop("input_ids")
    assert ids.dtype == np.int64 and ids.tolist() == [[IMAGE] * PATCHES + found["prompt_ids"]]
    pixels = dumped.pop("pixel_values")
    with Image.open(picture) as image:
        np.testing.assert_array_equal(pixels, model.preprocessor(image)[None])
    with record() as activations:
        features = model.features_of(pixels)
        text = ids[:, PATCHES:]
        cache = KVCache(features, 1, 64, model.cfg.text_config)
        logits = prefill(features, text, np.array([text.shape[1]]), model.params, model.cfg, cache)
    assert dumped.keys() == activations.keys() >= {
        "vision_tower.vision_model.encoder.layers.0.self_attn", "language_model.model.layers.1.mlp", "logits"}
    assert pixels.dtype == dtype and {x.dtype.name for x in dumped.values()} == {dtype}
    for name, x in dumped.items():
        assert_close(name, x, activations[name], "formula")
    assert dumped["logits"].shape == (1, IMAGE + 1) == logits.shape
    assert dumped["language_model.model.layers.0.self_attn"].shape[1] == PATCHES + len(found["prompt_ids"])
    assert int(dumped["logits"].argmax()) == found["output_ids"][0]
    assert os.listdir(tmp_path) == ["taps.safetensors"]


def test_dump_is_whole_or_absent(tmp_path, folder, picture, call, monkeypatch):
    """If writing fails half-way the old file is there and nothing else."""
    path = tmp_path / "taps.safetensors"
    path.write_text("an older file")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    status, _, err = call(picture, "ab", "--model", folder, "--max-new-tokens", 1, "--dump", path)
    assert status == 2 and "taps.safetensors: cannot be written (No space left" in one_line(err)
    assert path.read_text() == "an older file" and os.listdir(tmp_path) == ["taps.safetensors"]


# --- stdout and stderr ------------------------------------------------------------------------------------------------

def test_text_streams(tmp_path, picture, monkeypatch):
    """Each word is out before the next is computed, and a character of four bytes never comes in pieces."""
    words = ["c", *(f"<0x{byte:02X}>" for byte in "🦉".encode()), "a", "t"]
    model, log = write_script(tmp_path, [*(IDS[word] for word in words), EOS]), []
    original = generating.decode
    monkeypatch.setattr(generating, "decode", lambda *args: (log.append(None), original(*args))[1])
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    monkeypatch.setattr(sys.stdout, "flush", lambda: log.append(sys.stdout.getvalue()))
    assert run.main([str(picture), "a", "--model", str(model)]) == 0
    seen = [log[i - 1] for i, entry in enumerate(log) if entry is None]
    assert seen == ["c"] * 5 + ["c🦉a", "c🦉at"] and log[-1] == "c🦉at\n"


@pytest.mark.parametrize("options, text", [([], "é\n"), (["--max-new-tokens", "1"], "\ufffd\n")])
def test_utf8_whatever_the_locale(tmp_path, picture, options, text):
    """An ASCII terminal gets UTF-8 all the same, and of half a character a mark that it was one."""
    model = write_script(tmp_path, [IDS["<0xC3>"], IDS["<0xA9>"], EOS])
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment.pop("PYTHONIOENCODING", None)
    done = shell(picture, "a", "--model", model, *options, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, text.encode("utf-8"), b"")


def test_verbose(folder, picture, call):
    """Timings go to stderr, and the text is what it was without them."""
    arguments = picture, "ab", "--model", folder, "--max-new-tokens", 2
    status, out, err = call(*arguments, "--verbose")
    assert status == 0 and len(err.splitlines()) == 2 and " s" in err
    assert call(*arguments) == (0, out, "")


def test_terminal(folder, picture):
    """On a terminal the timings come without being asked for; a pipe gets the text alone."""
    pty = pytest.importorskip("pty", reason="terminals of this kind are Unix's")
    ours, theirs = pty.openpty()
    try:
        done = subprocess.run(command(picture, "a", "--model", folder, "--max-new-tokens", "2"), stdout=subprocess.PIPE,
                              stderr=theirs, timeout=60, check=False)
        said = os.read(ours, 10_000).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 0 and done.stdout.count(b"\n") == 1 and " s" in said and "Traceback" not in said


def test_overflow_is_not_for_the_terminal(tmp_path, picture, ask):
    """Weights so large that exponents overflow inside give no RuntimeWarning, as long as the scores are numbers."""
    arrays = random_arrays(CONFIG)
    arrays["language_model.model.layers.0.mlp.gate_proj.weight"] *= np.float32(1e16)
    model = write_model(tmp_path, CONFIG, arrays)
    assert len(ask(picture, "a", "--model", model, "--max-new-tokens", 2, "--json")["output_ids"]) == 2


def test_closed_pipe(folder, picture):
    """`run.py … | head -c 1`: the reader has seen enough, and that is no error."""
    process = subprocess.Popen(command(picture, "a", "--model", folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) == 0 and err == b""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")
def test_full_disk(folder, picture):
    """Said once, though Python tries to write again what is left when it ends (and then leaves with status 120)."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command(picture, "a", "--model", folder, "--json"), stdout=full,
                              stderr=subprocess.PIPE, timeout=60, check=False, env=environment)
    assert done.returncode == 2 and "No space left" in one_line(done.stderr.decode())


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------

@pytest.mark.skipif(sys.platform == "win32", reason="signals are Unix's")
def test_interrupted_while_decoding(tmp_path, picture):
    """Status 130, not a word on stderr, and nothing half-written."""
    model = write_model(tmp_path / "model", with_text(CONFIG, max_position_embeddings=100_000))
    process = subprocess.Popen(
        command(picture, "--prompt-ids", "2,9", "--model", model, "--max-new-tokens", "90000",
                "--dump", tmp_path / "d"),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err == b"" and os.listdir(tmp_path) == ["model"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals are Unix's")
def test_interrupted_while_starting(tmp_path):
    """Also in the tenth of a second in which nothing but imports has happened."""
    (tmp_path / "PIL.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(30)\n")
    done = shell(env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


# --- several questions, several pictures ------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """A folder of three pictures and a note."""
    folder, rng = tmp_path_factory.mktemp("album"), np.random.default_rng(2)
    for name, size in [("b.png", (30, 40)), ("a.png", (25, 20)), ("c d.png", (9, 70))]:
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


def objects(lines):
    return [json.loads(line) for line in lines.splitlines()]


def test_several_questions(folder, picture, ask, monkeypatch):
    """The answers of each question alone, in order, a line each; the picture goes through the vision tower once."""
    options = "--model", folder, "--max-new-tokens", 4
    alone = [ask(picture, prompt, *options) for prompt in ["ab", "c", "what is it"]]
    assert len(set(alone)) > 1
    encoded, original = [], loaded_model.image_features
    monkeypatch.setattr(loaded_model, "image_features",
                        lambda *args: (encoded.append(len(args[0])), original(*args))[1])
    assert ask(picture, "ab", "--ask", "c", "--ask", "what is it", *options) == "\n".join(alone)
    assert encoded == [1]
    assert ask(picture, "--ask", "ab", *options, "--ask", "c").splitlines() == alone[:2], "--ask in place of PROMPT"
    assert ask(picture, "--ask", "c", *options) == alone[1]


def test_several_questions_as_json(folder, picture, call):
    """An object on each line: that of the question alone, and which picture it is about."""
    options = "--model", folder, "--max-new-tokens", 4, "--json"
    status, out, err = call(picture, "ab", "--ask", "c", *options)
    assert (status, err) == (0, "")
    for found, prompt in zip(objects(out), ["ab", "c"], strict=True):
        assert {key: type(value) for key, value in found.items()} == KEYS
        [alone] = objects(call(picture, prompt, *options)[1])
        # In a batch the sums run in another order: the last digits of a log-probability may differ.
        assert found["logprobs"] == pytest.approx(alone["logprobs"], abs=1e-5)
        timings = "seconds", "tokens_per_second", "peak_rss_bytes", "logprobs", "stop_logprob"
        assert {key: value for key, value in found.items() if key not in timings} == {
            key: value for key, value in alone.items() if key not in timings}
        assert found["seconds"].keys() == alone["seconds"].keys() and all(v > 0 for v in found["seconds"].values())


def test_prompt_ids_and_more_questions(folder, picture, call):
    status, out, _ = call(picture, "--prompt-ids", "2,5", "--ask", "ab", "--model", folder, "--json")
    first, second = objects(out)
    assert status == 0 and (first["prompt"], first["prompt_ids"], second["prompt"]) == (None, [2, 5], "ab")


def test_an_answer_is_one_line(tmp_path, picture, ask):
    """Of several, also where the model breaks lines; alone it is printed as it is said."""
    model = write_script(tmp_path, [IDS["a"], IDS["<0x0D>"], IDS["b"], IDS["<0x09>"], IDS["c"], EOS])
    assert ask(picture, "x", "--model", model) == "a\rb\tc"
    assert ask(picture, "x", "--ask", "y", "--model", model) == "a b c\na b c"


def test_answers_without_a_tokenizer(folder, picture, tmp_path, ask):
    bare = shutil.copytree(folder, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    options = "--prompt-ids", "300,5", "--model", bare, "--max-new-tokens", 3
    alone = ask(picture, *options).strip()
    assert ask("--each", picture, picture, *options) == f"{picture}\t{alone}\n{picture}\t{alone}"


def test_a_folder(folder, album, ask, monkeypatch):
    """name, tab, answer: those of each picture alone, by name, whatever else lies there."""
    options = "ab", "--model", folder, "--max-new-tokens", 4
    names = [f"{album}/{name}" for name in ["a.png", "b.png", "c d.png"]]
    alone = {name: ask(name, *options) for name in names}
    assert ask(album, *options).splitlines() == [f"{name}\t{alone[name]}" for name in names]
    again = ask(names[2], *options, "--each", names[1], album).splitlines()
    assert again == [f"{name}\t{alone[name]}" for name in [names[2], names[1], *names]]
    assert ask("--each", names[1], "--ask", "ab", *options[1:]) == f"{names[1]}\t{alone[names[1]]}"


def test_a_folder_as_json(folder, album, call):
    """Pictures by name, within each the questions in order, boxes in the pixels of each."""
    status, out, _ = call(album, "ab", "--ask", "c", "--model", folder, "--max-new-tokens", 2, "--json")
    assert status == 0
    assert [(found["image"], found["prompt"]) for found in objects(out)] == [
        (f"{album}/{name}", prompt) for name in ["a.png", "b.png", "c d.png"] for prompt in ["ab", "c"]]


def test_boxes_of_several_pictures(tmp_path, album, call):
    """Each in its own pixels, and drawn into pictures of its own in a folder that is made for them."""
    words = ["<loc0100>", "<loc0200>", "<loc0800>", "<loc1023>", "▁", *"cat"]
    model = write_script(tmp_path / "model", [*(IDS[word] for word in words), EOS])
    to = tmp_path / "boxes"
    for _ in range(2):  # the second time the folder is there
        status, out, err = call(album, "detect cat", "--model", model, "--json", "--save-image", to)
        assert (status, err) == (0, "")
    for found, (width, height) in zip(objects(out), [(20, 25), (40, 30), (70, 9)], strict=True):
        [box] = found["boxes"]
        assert box["box"] == pytest.approx([200 / 1023 * width, 100 / 1023 * height, width, 800 / 1023 * height])
        with Image.open(to / (Path(found["image"]).name + ".boxes.png")) as drawn:
            assert drawn.width * height == drawn.height * width
    assert len(os.listdir(to)) == 3


def test_boxes_of_several_questions(tmp_path, picture, ask, monkeypatch):
    """One picture shows what all the questions found."""
    model = write_script(tmp_path / "model", [*(IDS[f"<loc{i:04}>"] for i in [1, 2, 800, 900]), EOS])
    drawn = []
    monkeypatch.setattr(asking, "draw_detections", lambda image, *what: (drawn.append(what), image)[1])
    ask(picture, "detect a", "--ask", "detect b", "--model", model, "--save-image", tmp_path / "boxes.png")
    [(detections, masks)] = drawn
    assert len(detections) == len(masks) == 2 and (tmp_path / "boxes.png").exists()


def test_unreadable_among_pictures(folder, album, tmp_path, call):
    """A line for it on stderr and status 2 at the end; no other answer is lost."""
    mixed = shutil.copytree(album, tmp_path / "mixed")
    (mixed / "b.png").write_bytes((mixed / "b.png").read_bytes()[:300])
    options = "--model", folder, "--max-new-tokens", 3
    status, out, err = call(mixed, "ab", *options)
    assert status == 2 and one_line(err).startswith(f"{mixed}/b.png: ")
    assert [line.split("\t")[0] for line in out.splitlines()] == [f"{mixed}/a.png", f"{mixed}/c d.png"]
    status, out, err = call("--each", mixed / "a.png", tmp_path / "none.png", "--ask", "ab", *options)
    assert status == 2 and "none.png: no such file" in one_line(err) and len(out.splitlines()) == 1


def test_unreadable_alone(folder, tmp_path, refusal, monkeypatch):
    """With several questions about it the model need not be looked at."""
    monkeypatch.setattr(asking, "open_model", no_work)
    assert "no such file" in refusal(tmp_path / "none.png", "ab", "--ask", "c", "--model", folder)
    assert "without pictures" in refusal(tmp_path, "ab", "--model", folder)


@pytest.mark.parametrize("several", [[], ["--ask", "c"]])
def test_pictures_in_one_prompt(tmp_path, folder, album, picture, call, several):
    """They stand before the prompt in the order given, and the answer is that of the model about all of them."""
    others = [album / "a.png", album / "b.png"]
    options = "--with", others[0], "--with", others[1], "ab", "--model", folder, "--max-new-tokens", 3, "--json"
    [found, *_] = objects(call(picture, *options, *several)[1])
    model = load_model(folder)
    features = model.features([Image.open(path) for path in [picture, *others]])
    [answer] = generating.generate(model, features.reshape(1, 3 * PATCHES, -1), [found["prompt_ids"]],
                                   Decoding(max_new_tokens=3))
    assert found["output_ids"] == answer.ids and len(answer.ids) == 3
    if not several:
        call(picture, *options, "--dump", tmp_path / "taps")
        dumped = load_file(tmp_path / "taps")
        assert dumped["input_ids"].tolist() == [[IMAGE] * PATCHES * 3 + found["prompt_ids"]]
        assert dumped["pixel_values"].shape[0] == 3
        assert dumped["language_model.model.layers.0.self_attn"].shape[1] == 3 * PATCHES + len(found["prompt_ids"])


def test_too_much_with_other_pictures(folder, picture, refusal, ask):
    """Their tokens count: with two more there is room for so many letters and no more."""
    others = "--with", picture, "--with", picture, "--model", folder
    room = 64 - 3 * PATCHES - 3
    assert "64 positions" in refusal(picture, "a" * (room + 1), *others)
    assert len(ask(picture, "a" * room, *others, "--json")["output_ids"]) == 1
    assert "no such file" in refusal(picture, "a", "--with", "none.png", "--model", folder)


@pytest.mark.parametrize("options, reason", [
    (["--ask", "b", "--dump", "taps"], "--dump: expected one question"),
    (["--each", "x.png", "--dump", "taps"], "--dump: expected one question"),
    (["--each"], "--each"), (["--ask"], "--ask"), (["--with"], "--with"),
    (["--ask", "a" * 60], "64 positions"), (["--ask", "b", "--save-image", "a.xyz"], "picture format"),
    (["--each", "PICTURE", "--save-image", "boxes"], "two pictures are called noise.png"),
    (["--each", "ALBUM", "--save-image", "none/boxes"], "none/boxes: cannot be made"),
    (["--each", "ALBUM", "--save-image", "PICTURE"], "noise.png: cannot be made")])
def test_wrong_options_for_several(tmp_path, folder, album, picture, refusal, monkeypatch, options, reason):
    """Refused before the weights are read, and no file or folder is left behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(loaded_model, "load_any", no_work)
    places = {"PICTURE": picture, "ALBUM": album}
    assert reason in refusal(picture, "a", "--model", folder, *(places.get(word, word) for word in options))
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such names")
def test_names_of_any_kind(tmp_path, folder, picture):
    """A tab, a line break or bytes that are no UTF-8 in a name neither break the line nor the program."""
    name = os.fsencode(tmp_path) + b"/a\tb\nc\xff.png"
    shutil.copy(picture, name)
    done = shell(tmp_path, "a", "--model", folder, "--max-new-tokens", "1")
    assert done.returncode == 0 and done.stderr == b""
    assert done.stdout.startswith(os.fsencode(tmp_path) + b"/a b c\\udcff.png\t") and done.stdout.count(b"\n") == 1
    done = shell(tmp_path, "a", "--model", folder, "--json")
    assert json.loads(done.stdout)["image"] == os.fsdecode(name)


def test_progress(folder, album, call):
    """With --verbose one line of progress that is written over and wiped away; without it not a word."""
    arguments = album, "ab", "--model", folder, "--max-new-tokens", 2
    status, out, err = call(*arguments, "--verbose")
    first, last, _ = err.split("\n")
    assert status == 0 and "3 pictures" in first and "1 other file" in first and call(*arguments) == (0, out, "")
    shown = last.split("\r")
    assert [part.split(",")[0] for part in shown if " of 3" in part] == [f"{i} of 3 pictures" for i in (1, 2, 3)]
    # Each is wiped away with as many blanks before the next, or an answer, takes its place.
    for before, wiped in pairwise(shown):
        assert " of 3" not in before or wiped == " " * len(before)


def test_progress_on_a_terminal(folder, album, tmp_path):
    """Answers, errors and progress meet on a terminal, and each line comes out whole."""
    pty = pytest.importorskip("pty", reason="terminals of this kind are Unix's")
    mixed = shutil.copytree(album, tmp_path / "mixed")
    (mixed / "c d.png").write_bytes(b"broken")
    ours, theirs = pty.openpty()
    done = subprocess.run(command(mixed, "ab", "--model", folder, "--max-new-tokens", "2"), stdout=theirs,
                          stderr=theirs, timeout=60, check=False)
    os.close(theirs)
    content = b""
    with suppress(OSError):  # so Linux tells that there is no more
        while piece := os.read(ours, 10_000):
            content += piece
    os.close(ours)
    lines = [line.rsplit("\r")[-1] for line in content.decode().replace("\r\n", "\n").split("\n")[:-1]]
    assert done.returncode == 2 and " of 3 pictures" in content.decode()
    assert sum(line.startswith(f"{mixed}/") for line in lines) == 2
    assert sum(line.startswith("run.py: error: ") for line in lines) == 1 and len(lines) == 5


# --- masks ------------------------------------------------------------------------------------------------------------

SHAPE = [f"<seg{i:03}>" for i in range(16)]
CAT = ["<loc0100>", "<loc0200>", "<loc0800>", "<loc1023>", *SHAPE, "▁", *"cat"]


@pytest.fixture
def segmenter(tmp_path):
    """A model that answers with a box, sixteen codes and a name, and has the shipped mask codec beside it."""
    folder = write_script(tmp_path / "model", [*(IDS[word] for word in CAT), EOS])
    shutil.copy(HERE / "weights" / "vae-oid.npz", folder)
    return folder


@pytest.mark.parametrize("several", [[], ["--ask", "segment dog"]])
def test_masks(tmp_path, segmenter, picture, call, monkeypatch, several):
    """Runs over the whole picture, row by row, the first of them outside; the same mask tints the picture."""
    drawn, original = [], asking.draw_detections
    monkeypatch.setattr(asking, "draw_detections", lambda *args: (drawn.append(args), original(*args))[1])
    status, out, err = call(picture, "segment cat", "--model", segmenter, "--json", "--save-image",
                            tmp_path / "masks.png", *several)
    assert (status, err) == (0, "")
    codec = vae_oid.read(segmenter / "vae-oid.npz")
    for found in objects(out):
        [box] = found["boxes"]
        assert box.keys() == {"label", "box", "mask"} and box["label"] == "cat"
        assert (box["mask"]["width"], box["mask"]["height"]) == (40, 30)
        mask = from_run_lengths(box["mask"]["counts"], 30, 40)
        shape = segmentation.decode(np.arange(16)[None], codec)[0]
        np.testing.assert_array_equal(mask, paste(shape, box["box"], 30, 40))
        assert 20 < mask.sum() < mask.size and not mask[:2].any() and not mask[:, :7].any()
    [(_, detections, masks)] = drawn
    assert len(detections) == len(masks) == 1 + len(several) // 2
    assert all((one == mask).all() for one in masks)


def test_masks_of_several_pictures(tmp_path, segmenter, album, call):
    """Each as large as its own picture."""
    status, out, _ = call(album, "segment cat", "--model", segmenter, "--json")
    masks = [found["boxes"][0]["mask"] for found in objects(out)]
    assert status == 0 and [(mask["width"], mask["height"]) for mask in masks] == [(20, 25), (40, 30), (70, 9)]
    assert [sum(mask["counts"]) for mask in masks] == [500, 1200, 630]


def test_masks_of_a_drawn_scene(tmp_path, call, monkeypatch):
    """The right answer to `segment`, which the shipped tokenizer writes: the masks are those of the things."""
    codec = vae_oid.read(HERE / "weights" / "vae-oid.npz")
    scene = next(scene for scene in map(world.draw, range(99)) if len(scene.things) == 3)
    things = [Detection(thing.shape, thing.box, tuple(segmentation.encode(
        tasks.mask_crop(thing.mask, thing.box)[None], codec)[0])) for thing in scene.things]
    ids = loaded_model.open_model(HERE / "weights").tokenizer.encode(to_text(things, world.SIDE, world.SIDE))
    monkeypatch.setattr(asking, "generate",
                        lambda *_: [generating.Answer(ids, "eos", prefill_seconds=1.0, decode_seconds=1.0)])
    Image.fromarray(scene.image).save(tmp_path / "scene.png")
    [found] = objects(call(tmp_path / "scene.png", "segment star", "--json")[1])
    for box, thing in zip(found["boxes"], scene.things, strict=True):
        mask = from_run_lengths(box["mask"]["counts"], world.SIDE, world.SIDE)
        assert box["label"] == thing.shape and (mask & thing.mask).sum() > 0.7 * (mask | thing.mask).sum()


def test_no_codec_beside_the_model(segmenter, picture, call):
    """The box is there without a mask; with --verbose a line says what is missing. The text needs no masks at all."""
    (segmenter / "vae-oid.npz").unlink()
    arguments = picture, "segment cat", "--model", segmenter, "--json"
    status, out, err = call(*arguments)
    assert (status, err) == (0, "") and objects(out)[0]["boxes"][0].keys() == {"label", "box"}
    status, _, err = call(*arguments, "--verbose")
    [line] = [line for line in err.splitlines() if "vae-oid.npz" in line]
    assert status == 0 and line.startswith(f"{segmenter / 'vae-oid.npz'}: no such file")
    assert "vae-oid" not in call(picture, "segment cat", "--model", segmenter, "--verbose")[2]


def test_damaged_codec(segmenter, picture, call):
    (segmenter / "vae-oid.npz").write_bytes(b"damaged")
    status, out, err = call(picture, "segment cat", "--model", segmenter, "--json")
    assert status == 2 and out == "" and "vae-oid.npz: not a readable" in one_line(err)
    assert call(picture, "segment cat", "--model", segmenter)[0] == 0, "the text needs no masks"


def test_codes_that_are_not_in_the_book(tmp_path, picture, ask):
    """The box is kept."""
    words = [*CAT[:4], *SHAPE[:15], "<seg127>", "▁", *"cat"]
    model = write_script(tmp_path / "model", [*(IDS[word] for word in words), EOS])
    shutil.copy(HERE / "weights" / "vae-oid.npz", model)
    [box] = ask(picture, "segment cat", "--model", model, "--json")["boxes"]
    assert box.keys() == {"label", "box"} and box["label"] == "cat"


def test_shapes_cost_nothing_at_the_start():
    """What only masks need is imported when the first codes come."""
    done = subprocess.run([sys.executable, "-c", "import run, sys; print('minipali.model.vq_vae' in sys.modules)"],
                          cwd=HERE, capture_output=True, timeout=60, check=True)
    assert done.stdout == b"False\n"


# --- wrong arguments --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("options, reason", [
    (["--bogus"], "--bogus"), (["one more"], "one more"),
                                             (["--top-k", "many"], "--top-k: many: expected an integer of at least 1"),
    (["--max-new-tokens"], "--max-new-tokens"), (["--max-new-tokens", "0"], "--max-new-tokens: 0"),
    (["--max-new-tokens", "1.5"], "--max-new-tokens"), (["--max-new-tokens", "9" * 5000], "--max-new-tokens"),
    (["--temperature", "nan"], "--temperature: nan"), (["--temperature", "inf"], "--temperature: inf"),
    (["--temperature", "-1"], "--temperature: -1"), (["--temperature", "warm"], "--temperature"),
    (["--top-k", "0"], "--top-k: 0"), (["--top-k", "-3"], "--top-k: -3"),
    (["--top-p", "0"], "--top-p: 0"), (["--top-p", "1.01"], "--top-p: 1.01"), (["--top-p", "nan"], "--top-p: nan"),
    (["--seed", "-1"], "--seed: -1"), (["--dtype", "float16"], "--dtype.*float32"), (["--backend", "jax"], "--backend"),
    (["--beams", "0"], "--beams: 0"), (["--beams", "two"], "--beams: two"), (["--best-of", "-1"], "--best-of: -1"),
    (["--best-of", "1.5"], "--best-of: 1.5"), (["--beams", "9" * 5000], "--beams: 99"),
    (["--beams", "2", "--temperature", "1"], "--beams: .*--temperature"), (["--best-of", "2"], "--best-of: .*--temp"),
    (["--best-of", "2", "--beams", "2"], "--beams: .*--best-of"),
    (["--score", "a", "--beams", "2"], "--score: .*with --beams$"),
    (["--score", "a", "--constrain"], "--score: .*with --constrain$"),
    (["--score", "a", "--temperature", "1", "--best-of", "2"], "--score: .*with --best-of and --temperature"),
    (["--score", "a", "--save-image", "a.png"], "--score: .*with --save-image"), (["--score"], "--score"),
    (["--score", "a" * 60], "--score: 68 tokens.*64 positions"), (["--score", "a\udcffb"], "half a surrogate pair"),
    (["--constrain"], "--constrain: expected a prompt such as .* found 'a'"),
    (["--top-k", "5"], "^run.py: error: --top-k: expected a --temperature above 0"),
    (["--top-p", "0.5"], "^run.py: error: --top-p: expected a --temperature above 0"),
    (["--temperature", "0", "--top-k", "5", "--top-p", "1"], "--top-k and --top-p: expected a --temperature"),
    (["--beams", "2", "--top-k", "5"], "--top-k: expected a --temperature"),
    (["--beams", "2", "--seed", "1"], "--beams: .*not with --seed$"),
    (["--score", "a", "--seed", "0"], "--score: .*not with --seed$"),
    (["--score", "a", "--max-new-tokens", "128"], "--score: .*not with --max-new-tokens$"),
    (["--score", "a", "--top-k", "2", "--top-p", "1"], "--score: .*not with --top-k and --top-p$"),
    (["--model", ""], "--model: expected a path, found an empty text"),
                                             (["--save-image", ""], "--save-image: expected a path"),
    (["--js"], "--js"),
    (["--prompt-ids", "2,3"], "PROMPT and --prompt-ids"), (["--bo\ngus\x1b[31m\u2028"], "bo.*gus")])
def test_wrong_options(folder, picture, call, options, reason):
    status, out, err = call(picture, "a", "--model", folder, *options)
    assert status == 2 and out == "" and re.search(reason, err)
    assert err.startswith("run.py: error: ") and err[:-1].isprintable() and err.endswith("\n")


@pytest.mark.parametrize("options, names", [
    (["--with", "a.png"], "--with"), (["--each", "a.png"], "--each"), (["--ask", "b"], "--ask"),
    (["--save-image", "a.png", "--with", "b.png"], "--save-image and --with")])
def test_no_image_and_options_of_pictures(folder, refusal, options, names):
    """A picture that is given and not looked at would be an answer about something else."""
    line = refusal("a", "--no-image", "--model", folder, *options)
    assert line == f"--no-image: the language model alone goes on from one PROMPT, so not with {names}"


def test_no_image_and_prompts(folder, refusal):
    assert "without an IMAGE before it" in refusal("a.png", "a", "--no-image", "--model", folder)
    assert "expected a PROMPT" in refusal("--no-image", "--model", folder)
    assert "PROMPT and --prompt-ids" in refusal("a", "--no-image", "--prompt-ids", "2", "--model", folder)


@pytest.mark.parametrize("ids, reason", [
    ("", "not a list of ids"), (" ", "not a list of ids"), ("2,", "not a list of ids"), ("2;3", "not a list of ids"),
    ("two", "not a list of ids"), ("2.0", "not a list of ids"), ("2,99999999999999999999999", "outside the vocabulary"),
    (f"2,{IMAGE + 1}", f"id {IMAGE + 1} is outside the vocabulary"), (f"2,{IMAGE}", "piece of the picture"),
    (",".join("5" * 60), "64 positions")])
def test_wrong_prompt_ids(folder, picture, refusal, ids, reason):
    assert reason in refusal(picture, "--model", folder, "--prompt-ids", ids)


def test_negative_prompt_ids(folder, picture, refusal):
    assert "outside the vocabulary" in refusal(picture, "--model", folder, "--prompt-ids=-1,2")


@pytest.mark.parametrize("prompt, reason", [("a" * 60, "64 positions"), ("a" * 10**5, "64 positions"),
                                            ("a\udcffb", "half a surrogate pair")])
def test_wrong_prompts(folder, picture, refusal, prompt, reason):
    assert reason in refusal(picture, prompt, "--model", folder)


def test_longest_prompt(folder, picture, ask):
    """One token fewer, and there is room for one of the answer."""
    found = ask(picture, "a" * 57, "--model", folder, "--json")
    assert len(found["prompt_ids"]) == 59 and len(found["output_ids"]) == 1


def test_arguments_that_are_not_text(folder, picture, tmp_path):
    """Bytes that are no UTF-8, as Linux lets them through: in a prompt, and in the name of a picture."""
    done = shell(picture, b"a\xff", "--model", folder)
    assert done.returncode == 2 and "surrogate" in one_line(done.stderr.decode())
    done = shell(os.fsencode(tmp_path) + b"/\xff.png", "a", "--model", folder)
    assert done.returncode == 2 and "no such file" in one_line(done.stderr.decode())


def test_cupy_absent(folder, picture, refusal, monkeypatch):
    """Said before the weights are read."""
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(loaded_model, "load_any", None)
    assert "CuPy is not installed" in refusal(picture, "a", "--model", folder, "--backend", "cupy")


def test_out_of_memory(folder, picture, refusal, monkeypatch):
    def full(*_):
        raise MemoryError
    monkeypatch.setattr(loaded_model, "load_any", full)
    assert "not enough memory" in refusal(picture, "a", "--model", folder)


@pytest.mark.parametrize("error, reason", [
    (OSError(errno.ENOMEM, "Cannot allocate memory"),
     "model.safetensors: cannot be mapped into memory .Cannot allocate"),
    (OSError(errno.ENODEV, "No such device"), "model.safetensors: cannot be mapped into memory .No such device"),
    (ValueError("mmap length is greater than file size"), "model.safetensors: cannot be mapped.*greater than file")])
def test_a_file_that_cannot_be_mapped(folder, picture, refusal, monkeypatch, error, reason):
    """The file is blamed, or memory, and never stdout."""
    def fail(*_):
        raise error
    monkeypatch.setattr(np, "memmap", fail)
    assert re.search(reason, refusal(picture, "a", "--model", folder))


def no_work(*_):
    raise AssertionError("refused too late")


@pytest.mark.parametrize("option, name, reason", [
    ("--dump", "none/a.safetensors", "cannot be written"), ("--dump", "", "expected a path"),
    ("--dump", ".", "not a regular file"), ("--dump", "a" * 300, "cannot be written"),
                                                  ("--save-image", "none/a.png", "cannot be"),
    ("--save-image", "folder.png", "not a regular file"), ("--save-image", "a.xyz", "picture format"),
    ("--save-image", "a", "picture format"), ("--save-image", "a.psd", "picture format"),
    ("--save-image", "a.xbm", "picture format"), ("--save-image", "a.hdf", "picture format")])
def test_unwritable(tmp_path, folder, picture, call, monkeypatch, option, name, reason):
    """Refused before any work, if the folder shows it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    if len(name) < 300:
        monkeypatch.setattr(asking, "open_image", no_work)
    status, _, err = call(picture, "a", "--model", folder, "--max-new-tokens", 1, option, name)
    assert status == 2 and reason in one_line(err) and os.listdir(tmp_path) == ["folder.png"]


@pytest.mark.skipif(sys.platform == "win32", reason="pipes with names are Unix's")
def test_devices_stay_what_they_are(tmp_path, folder, picture, refusal):
    """A file that takes the place of /dev/null would be a surprise; a pipe with a name stands for it here."""
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refusal(picture, "a", "--model", folder, "--dump", tmp_path / "pipe")


# --- wrong pictures ---------------------------------------------------------------------------------------------------

def png(*chunks):
    """A PNG of the given chunks, each with its checksum."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(data)) + kind + data +
                                           struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks)


def bomb():
    """A few bytes that claim to be 60000 x 60000 pixels."""
    return png((b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)), (b"IDAT", b""), (b"IEND", b""))


PICTURES = {"empty.png": b"", "text.png": b"not a picture", "bomb.png": bomb(), "zeros.jpg": bytes(1000)}


@pytest.mark.parametrize("name", [*PICTURES, "absent.png", "folder", "short.png", ""])
def test_wrong_pictures(tmp_path, folder, picture, refusal, monkeypatch, name):
    """One line that names the file, before the model is looked at."""
    monkeypatch.setattr(asking, "open_model", no_work)
    (tmp_path / "folder").mkdir()
    (tmp_path / "short.png").write_bytes(picture.read_bytes()[:1000])
    for other, content in PICTURES.items():
        (tmp_path / other).write_bytes(content)
    path = f"{tmp_path}/{name}" if name else ""
    assert refusal(path, "a", "--model", folder).startswith(f"{path}: ")


# --- wrong models -----------------------------------------------------------------------------------------------------

def edit_json(name, change):
    """A fault: other content in one of the folder's JSON files."""
    def fault(folder):
        values = json.loads((folder / name).read_text())
        change(values)
        (folder / name).write_text(json.dumps(values))
    return fault


def edit_tensors(change):
    """A fault: other tensors in model.safetensors."""
    def fault(folder):
        arrays = {name: x.copy() for name, x in load_file(folder / "model.safetensors").items()}
        change(arrays)
        save_file(arrays, folder / "model.safetensors")
    return fault


def edit_header(change):
    """A fault: another header before the same bytes."""
    def fault(folder):
        path = folder / "model.safetensors"
        content = path.read_bytes()
        length, = struct.unpack("<Q", content[:8])
        header = json.loads(content[8:8 + length])
        change(header)
        head = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(head)) + head + content[8 + length:])
    return fault


def edit_bytes(name, change):
    def fault(folder):
        (folder / name).write_bytes(change((folder / name).read_bytes()))
    return fault


def absent(name):
    return lambda folder: (folder / name).unlink()


def sharded(folder):
    """An index that names two shards, of which one is there."""
    arrays = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(arrays)
    files = {name: f"model-0000{1 + (i > 5)}-of-00002.safetensors" for i, name in enumerate(names)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    save_file({name: arrays[name] for name in names[:6]}, folder / "model-00001-of-00002.safetensors")


NORM, PROJECTOR = "language_model.model.norm.weight", "multi_modal_projector.linear.bias"
FAULTS = {
    "no config": (absent("config.json"), "config.json: no such file"),
    "no weights": (absent("model.safetensors"), "expected model.safetensors"),
    "config no JSON": (edit_bytes("config.json", lambda b: b[:-9]), "config.json: not valid JSON"),
    "config no text": (edit_bytes("config.json", lambda b: b"\xff\xfe"), "config.json: not valid JSON"),
    "config a list": (edit_bytes("config.json", lambda b: b"[]"), "config.json: expected an object"),
    "config a nest": (edit_bytes("config.json", lambda b: b"[" * 10**5), "config.json: not valid JSON"),
    "config lacks a section": (edit_json("config.json", lambda c: c.pop("vision_config")), "vision_config is missing"),
    "model_type": (edit_json("config.json", lambda c: c.update(model_type="llava")), "model_type is 'llava'"),
    "config of another size": (edit_json("config.json", lambda c: c["text_config"].update(hidden_size=33)),
                               "misshapen"),
    "config with more layers": (edit_json("config.json", lambda c: c["text_config"].update(num_hidden_layers=9)),
                                "missing"),
    "config with a string": (edit_json("config.json", lambda c: c["text_config"].update(vocab_size="many")),
                             "vocab_size is 'many'"),
    "weights empty": (edit_bytes("model.safetensors", lambda b: b""), "too few"),
    "weights cut short": (edit_bytes("model.safetensors", lambda b: b[:-10]), "cut short"),
    "header cut short": (edit_bytes("model.safetensors", lambda b: b[:100]), "cut short"),
    "header of absurd length": (edit_bytes("model.safetensors", lambda b: b"\xff" * 8 + b[8:]), "header claims"),
    "header no JSON": (edit_bytes("model.safetensors", lambda b: b[:8] + b"?" + b[9:]), "not valid JSON"),
    "overlap": (edit_header(lambda h: h[NORM].update(data_offsets=h[PROJECTOR]["data_offsets"])), "overlaps"),
    "offsets": (edit_header(lambda h: h[NORM].update(data_offsets=[-1, 4])), "data_offsets"),
    "shape times dtype": (edit_header(lambda h: h[NORM].update(shape=[31])), "takes 124 bytes"),
    "unknown dtype": (edit_header(lambda h: h[NORM].update(dtype="F4")), "dtype 'F4' is unknown"),
    "unsupported dtype": (edit_tensors(lambda a: a.update({NORM: a[NORM].astype(np.int32)})), f"{NORM} I32"),
    "missing": (edit_tensors(lambda a: a.pop(NORM)), f"1 missing \\({NORM}"),
    "unexpected": (edit_tensors(lambda a: a.update({"adapter.weight": a[NORM]})), "1 unexpected \\(adapter.weight"),
    "misshapen": (edit_tensors(lambda a: a.update({NORM: a[NORM][1:].copy()})), f"1 misshapen \\({NORM}"),
    "not numbers": (edit_tensors(lambda a: a[NORM].fill(np.nan)), "not all finite"),
    "shard": (sharded, "model-00002-of-00002.safetensors: no such file"),
    "tokenizer no JSON": (edit_bytes("tokenizer.json", lambda b: b[:-9]), "tokenizer.json: not valid JSON"),
    "tokenizer of another kind": (edit_json("tokenizer.json", lambda t: t["model"].update(type="WordPiece")),
                                  "tokenizer.json: model: expected type BPE"),
    "tokenizer larger than the model": (edit_json("tokenizer.json", lambda t: (
        t["model"]["vocab"].pop("a"), t["model"]["vocab"].update(a=IMAGE + 7))), "outside the vocabulary|added_tokens"),
    "no tokenizer": (absent("tokenizer.json"), "no tokenizer.json"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_wrong_models(tmp_path, folder, picture, refusal, name):
    fault, reason = FAULTS[name]
    broken = shutil.copytree(folder, tmp_path / "model")
    fault(broken)
    line = refusal(picture, "a", "--model", broken)
    assert re.search(reason, line) and (str(broken) in line or line.startswith(("prompt: ", "PROMPT: ")))


def test_wrong_kinds_of_model(tmp_path, picture, refusal):
    """A name that leads nowhere, a file, and a folder with the two towers of contrastive learning."""
    assert "no such folder" in refusal(picture, "a", "--model", tmp_path / "none")
    assert "expected a folder" in refusal(picture, "a", "--model", picture)
    np.savez(tmp_path / "model.npz", a=np.zeros(1))
    assert "model.npz: " in refusal(picture, "a", "--model", tmp_path / "model.npz")
    save(tmp_path / "siglip", SIGLIP_CONFIG, unflatten(random_arrays(SIGLIP_CONFIG)), "float32")
    assert "model_type is siglip" in refusal(picture, "a", "--model", tmp_path / "siglip")


def test_wrong_preprocessor(tmp_path, folder, picture, refusal):
    broken = shutil.copytree(folder, tmp_path / "model")
    (broken / "preprocessor_config.json").write_text('{"do_center_crop": true}')
    assert "do_center_crop" in refusal(picture, "a", "--model", broken)


def test_refusals_as_a_process(folder, picture):
    """The one line and the status are those of the process, too."""
    done = shell(picture, "a", "--model", folder, "--top-k", "0")
    assert done.returncode == 2 and done.stdout == b"" and "--top-k" in one_line(done.stderr.decode())


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_checkpoints_of_every_dtype(tmp_path, picture, ask, dtype):
    """What it is stored in changes what is computed by its rounding only, and it is computed in float32."""
    model = write_script(tmp_path, [IDS[c] for c in "cat"] + [EOS])
    arrays = load_file(model / "model.safetensors")
    save(model, json.loads((model / "config.json").read_text()), unflatten(arrays), dtype)
    assert ask(picture, "a", "--model", model) == "cat"


def test_help(capsys):
    """Every option of the contract is explained."""
    assert run.main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.endswith("a line for each answer\n")
    for option in ["IMAGE", "PROMPT", "--ask", "--each", "--with", "--model", "--max-new-tokens", "--temperature",
                   "--top-k", "--top-p", "--seed", "--beams", "--best-of", "--score", "--constrain", "--no-image",
                   "--prompt-ids", "--dtype", "--backend", "--dump", "--save-image",
                   "--json", "--verbose"]:
        assert option in out


# --- the model that ships ---------------------------------------------------------------------------------------------

shipped = pytest.mark.skipif(not (HERE / "weights" / "config.json").exists(), reason="weights/ holds no model yet")


@shipped
def test_without_arguments(tmp_path):
    """From any folder, and nothing but one line."""
    done = shell(cwd=tmp_path)
    assert done.returncode == 0 and done.stderr == b""
    assert re.fullmatch(r"[^\n]+\n", done.stdout.decode())


@shipped
def test_starting_loads_no_more_than_an_answer_needs():
    """`python run.py` is a matter of half a second, most of it imports: what only other options need stays out."""
    code = "import run, sys; run.main([]); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, timeout=60, check=True)
    loaded = set(done.stdout.decode().splitlines()[-1].split())
    assert {"numpy", "PIL", "minipali.model.gemma"} <= loaded
    assert not {"safetensors", "multiprocessing", "minipali.model.vq_vae", "minipali.decoding.search",
                "minipali.decoding.grammar"} & loaded
    assert not [name for name in loaded if name.startswith(("minipali.learning", "minipali.looking",
                                                            "minipali.small_world"))]


@shipped
def test_default_prompt_and_picture(ask):
    found = ask("--json")
    assert found["prompt"] == "caption en" and found["stopped_by"] == "eos" and found["model"] == str(HERE / "weights")


def test_own_tokenizer_is_sound():
    """The tests' tokenizer numbers its tokens without a hole, or the scripts above say something else."""
    assert sorted(IDS.values()) == list(range(IMAGE + 1))
