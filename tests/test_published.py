"""Real weights, where somebody has them: MINIPALI_GEMMA3 names a folder that tests/golden/convert_gemma3.py wrote."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_close
from safetensors.numpy import load_file

from minipali.decoding.generate import generate
from minipali.decoding.loaded_model import encode_prompt, load_model
from minipali.decoding.sampling import Decoding
from minipali.model import paligemma
from minipali.model.gemma import output_logits

FOLDER = os.environ.get("MINIPALI_GEMMA3", "")
pytestmark = pytest.mark.skipif(
    not FOLDER, reason="needs real weights: python tests/golden/convert_gemma3.py FOLDER, then MINIPALI_GEMMA3=FOLDER")


@pytest.fixture(scope="module")
def model():
    return load_model(FOLDER)


@pytest.fixture(scope="module")
def cases():
    """What transformers gave: for each prompt its text, ids, the last logits, and for some how it went on."""
    cases = {}
    for key, x in load_file(Path(FOLDER) / "expected.safetensors").items():
        number, what = key.split("/")
        cases.setdefault(int(number), {})[what] = x
    return [case | {"prompt": bytes(case["prompt"]).decode()} for _, case in sorted(cases.items())]


def test_logits(model, cases):
    """Those of the last tokens of each prompt, one of which is longer than the window of the local layers."""
    windows = model.cfg.text_config.sliding_windows
    assert max(len(case["ids"]) for case in cases) > windows[0]
    for case in cases:
        ids = case["ids"][None]
        assert encode_prompt(case["prompt"], model) == ids[0].tolist()
        x = paligemma.forward(model.no_picture(1), ids, [ids.size], [0], model.params, model.cfg)
        last = x[0, -len(case["logits"]):]
        logits = output_logits(last, paligemma.output_head(model.params, model.cfg), model.cfg.text_config)
        assert_close(f"logits after {case['prompt']!r:.30}", logits, case["logits"], "real weights")


def test_int8_costs_little(model, cases):
    """The logits with matrices in 8 bits beside those in float32, after every token of the prompts."""
    rounded, near, same, tokens = load_model(FOLDER, weights="int8"), [], 0, 0
    for case in cases:
        one, other = (
            output_logits(paligemma.forward(m.no_picture(1), case["ids"][None], [case["ids"].size], [0], m.params,
                                            m.cfg)[0, -64:],
                          paligemma.output_head(m.params, m.cfg), m.cfg.text_config) for m in (model, rounded))
        near += [np.corrcoef(a, b)[0, 1] for a, b in zip(one, other)]
        same += np.count_nonzero(one.argmax(-1) == other.argmax(-1))
        tokens += len(one)
    print(f"correlation {np.mean(near):.4f}, the same best token after {same} of {tokens}")
    assert np.mean(near) >= 0.999 and same / tokens > 0.98


def test_greedy_text(model, cases):
    """The same continuation as generate() of transformers, together in one batch, and it is English."""
    asked = [case for case in cases if "greedy" in case]
    answers = generate(model, model.no_picture(len(asked)), [case["ids"].tolist() for case in asked],
                       Decoding(max_new_tokens=len(asked[0]["greedy"])))
    for case, answer in zip(asked, answers):
        print(case["prompt"] + model.tokenizer.decode(answer.ids))
        stop = [i for i, token in enumerate(case["greedy"]) if token in model.cfg.eos_token_ids]
        assert answer.ids == case["greedy"][:stop[0] if stop else None].tolist()


def test_run(cases):
    """The same text through run.py, with the tokenizer that came with the weights: English words and nothing else."""
    run, case = Path(__file__).resolve().parents[1] / "run.py", cases[0]
    done = subprocess.run([sys.executable, run, "--no-image", case["prompt"], "--model", FOLDER, "--max-new-tokens",
                           "8",
                           "--json"], capture_output=True, check=True)
    found = json.loads(done.stdout)
    assert found["output_ids"] == case["greedy"][:8].tolist()
    assert re.fullmatch(r"( [A-Za-z]+[.,]?)+", found["text"]) and "France" in found["text"]
