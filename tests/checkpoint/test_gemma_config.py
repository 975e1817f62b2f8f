"""Fields that may stand in one of several places: what transformers makes of each file, or a refusal."""
import json
import lzma
import math

import numpy as np
import pytest
from helpers import GOLDEN_FILES

from minipali.checkpoint.config import read_config
from minipali.errors import InputError
from minipali.model.ops import gelu

GOLDEN = json.loads(lzma.decompress((GOLDEN_FILES / "configs.json.xz").read_bytes()))


def name_of(case):
    return json.dumps({key: value for key, value in case.items() if value and key != "differs"})


CASES = {name_of(case): case for case in GOLDEN["cases"]}


def case_folder(folder, case):
    """The files of a case."""
    config = json.loads(json.dumps(GOLDEN["bases"][case["base"]]["config"]))
    config.get("text_config", config).update(case["text"])
    config = {name: value for name, value in (config | case["outer"]).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    if case["generation"] is not None:
        (folder / "generation_config.json").write_text(json.dumps(case["generation"]))
    return folder


def refused_on_purpose(case):
    """What transformers computes and this program does not, or passes over and this program takes for a mistake."""
    text, third = case["text"], case["base"].startswith("gemma 3")
    rope, older = text.get("rope_parameters") or {}, text.get("rope_scaling") or {}
    nested = "full_attention" in rope or "sliding_attention" in rope
    return any([
        older.get("rope_type") == "dynamic", "partial_rotary_factor" in text, "partial_rotary_factor" in rope,
        rope and not nested and third,                                         # passed over there
        nested and not third,                                                  # passed over in Gemma 1
        third and "type" in older and "rope_type" not in older,                # passed over there
        text.get("hidden_act") == "silu", text.get("hidden_activation") == "relu",  # passed over in some families
        text.get("hidden_activation") == "gelu" and case["base"] not in ("gemma", "paligemma"),  # the exact GELU
        text.get("attention_bias"), case["outer"].get("vision_config", {}).get("hidden_act") == "gelu",
        text.get("use_bidirectional_attention") and not case["base"].startswith("paligemma")])


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_as_transformers_reads_it(tmp_path, case):
    """The same frequencies, windows, scales, caps, activation, stop tokens and sizes, of each layer."""
    folder = case_folder(tmp_path, case)
    if case["differs"] is None:  # transformers cannot use it
        if case["base"] in ("gemma", "paligemma") and {"layer_types", "sliding_window"} & set(case["text"]):
            return  # a field of another family's; its class takes it in and then fails on it
        with pytest.raises(InputError, match="config.json"):
            read_config(folder)
        return
    if refused_on_purpose(case):
        with pytest.raises(InputError, match="config.json"):
            read_config(folder)
        return
    seen = GOLDEN["bases"][case["base"]]["seen"] | case["differs"]
    cfg = read_config(folder)
    text, L = cfg.text_config, cfg.text_config.num_hidden_layers
    assert len(seen["frequencies"]) == L
    pairs = np.arange(0, text.head_dim, 2) / text.head_dim
    for i in range(L):
        frequencies = 1 / text.rope_thetas[i] ** pairs / text.rope_factors[i]
        np.testing.assert_allclose(frequencies, seen["frequencies"][i], rtol=1e-6, atol=1e-9)
        assert seen["activation"][i] == pytest.approx(float(gelu(np.float64(1.5))), abs=1e-6)
        assert seen["scale"][i] == pytest.approx(1 / math.sqrt(text.query_pre_attn_scalar))
        assert seen["eps"][i] == text.rms_norm_eps
        # Gemma 1's class passes attn_logit_softcapping over, as its code does.
        assert seen["attention_cap"][i] == text.attn_logit_softcapping
        assert seen["window"][i] == text.sliding_windows[i]
    assert seen["cap"] == text.final_logit_softcapping
    assert seen["tied"] == cfg.tie_word_embeddings
    stops = 1 if seen["eos"] is None else seen["eos"]  # with none at all transformers never stops
    assert cfg.eos_token_ids == tuple(stops if isinstance(stops, list) else [stops])
    if "image" in seen:
        assert cfg.image_token_index == seen["image"]
        assert cfg.vision_config.num_patches == seen["tower"]["positions"]
        assert cfg.vision_config.layer_norm_eps == seen["tower"]["eps"]


def test_golden_cases_are_not_all_alike():
    """Each thing that is compared differs somewhere, and is refused somewhere."""
    changed = {name for case in GOLDEN["cases"] for name in case["differs"] or ()}
    assert changed >= {"frequencies", "activation", "scale", "eps", "attention_cap", "window", "cap", "tied", "eos",
                       "image", "tower"}
    kept = [case for case in GOLDEN["cases"] if case["differs"] is not None and not refused_on_purpose(case)]
    assert len(kept) > 250
