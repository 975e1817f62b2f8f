"""What `--json` says about a result: exactly the keys of the contract, and a memory that never ends a run."""
import builtins
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT

from minipali.commands import report
from minipali.commands.ask import Request, Result
from minipali.commands.report import in_one_line, peak_rss_bytes, to_json, tokens_per_second
from minipali.decoding.generate import Answer
from minipali.outputs.boxes import Detection

ANSWER = Answer([7, 8, 9], "eos", [-0.5, -1.0, -1.5], -0.25, 0.3, 2.0)
CONTRACT = ["model", "image", "prompt", "prompt_ids", "output_ids", "text", "boxes", "seconds", "tokens_per_second",
            "peak_rss_bytes", "stopped_by"]


def result(several=(), masks=(None,), image="a.png"):
    return Result(image, "ab", [2, 5], ANSWER, "cat", [Detection("cat", (1.0, 2.0, 3.0, 4.0))], list(masks), 0.1, 0.2,
                  several)


def test_the_contract():
    found = to_json(Request("m"), result())
    assert list(found) == [*CONTRACT, "logprobs", "stop_logprob"]
    assert json.loads(json.dumps(found)) == found
    del found["peak_rss_bytes"]
    assert found == {
        "model": "m", "image": "a.png", "prompt": "ab", "prompt_ids": [2, 5], "output_ids": [7, 8, 9], "text": "cat",
        "boxes": [{"label": "cat", "box": [1.0, 2.0, 3.0, 4.0]}],
        "seconds": {"load": 0.1, "vision": 0.2, "prefill": 0.3, "decode": 2.0}, "tokens_per_second": 1.5,
        "stopped_by": "eos", "logprobs": [-0.5, -1.0, -1.5], "stop_logprob": -0.25}
    assert to_json(Request("m"), result(image=None))["image"] is None


def test_several_answers():
    several = (("cat", ANSWER), ("dog", ANSWER))
    one = {"text": "dog", "ids": [7, 8, 9], "stopped_by": "eos", "logprob": -3.25, "logprobs": [-0.5, -1.0, -1.5],
           "stop_logprob": -0.25}
    assert to_json(Request("m", beams=2), result(several))["beams"] == [one | {"text": "cat"}, one]
    assert to_json(Request("m", best_of=2), result(several))["samples"] == [one | {"text": "cat"}, one]
    scored = to_json(Request("m", scored=("cat", "dog")), result(several))
    assert list(scored) == ["model", "image", "prompt", "prompt_ids", "scores", "seconds", "peak_rss_bytes"]
    assert scored["scores"] == [one | {"text": "cat"}, one]


def test_masks_are_wide_before_they_are_high():
    mask = np.zeros((2, 3), bool)
    mask[1, :2] = True
    [box] = to_json(Request("m"), result(masks=[mask]))["boxes"]
    assert box["mask"] == {"width": 3, "height": 2, "counts": [3, 2, 1]}


def test_speed():
    """The first token comes with the prefill; the stop token costs a step, too."""
    assert tokens_per_second(ANSWER) == 1.5
    assert tokens_per_second(Answer([7, 8, 9], "length", [0.0] * 3, None, 0.3, 2.0)) == 1.0
    assert tokens_per_second(Answer([7], "length", [0.0], None, 0.3, 2.0)) == 0.0
    assert tokens_per_second(Answer([], "eos", [], -0.1, 0.3, 0.0)) == 0.0


def test_in_one_line():
    assert in_one_line("a\tb\r\nc\u2028d") == "a b c d" and in_one_line("a\udcffé") == "a\\udcffé"


# --- memory -----------------------------------------------------------------------------------------------------------

def test_the_peak_and_not_the_present(tmp_path):
    (tmp_path / "status").write_text("VmPeak:\t 900 kB\nVmHWM:\t     300 kB\nVmRSS:\t     200 kB\n")
    assert peak_rss_bytes(tmp_path / "status") == 300 * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="it is Linux that tells both")
def test_memory_that_was_given_back_counts():
    code = ("from minipali.commands.report import peak_rss_bytes\nimport numpy as np\nbefore = peak_rss_bytes()\n"
            "np.ones(20_000_000)\nprint(before, peak_rss_bytes())")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60, check=True)
    before, after = map(int, done.stdout.split())
    assert after - before > 150e6


@pytest.mark.parametrize("content", ["VmRSS: 7 kB\n", "", "VmHWM: many kB\n", None])
def test_other_systems(tmp_path, monkeypatch, content):
    """Without /proc the `resource` module is asked; where there is none either, as on Windows, nothing is known."""
    if content is not None:
        (tmp_path / "status").write_text(content)
    if sys.platform != "win32":
        assert 10e6 < peak_rss_bytes(tmp_path / "status") < 1e12
    original = builtins.__import__

    def without(name, *rest):
        if name == "resource":
            raise ImportError(name)
        return original(name, *rest)
    monkeypatch.setattr(builtins, "__import__", without)
    assert peak_rss_bytes(tmp_path / "status") is None


def test_a_system_that_does_not_say(ask, monkeypatch):
    """The answer comes all the same."""
    monkeypatch.setattr(report, "Path", lambda name: Path("none", name.lstrip("/")))
    monkeypatch.setitem(sys.modules, "resource", None)
    assert ask("--json", "--max-new-tokens", 1)["peak_rss_bytes"] is None
