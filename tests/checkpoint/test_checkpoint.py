"""The way in: a folder or an .npz, by the same functions; and the way out, a folder that answers alike."""
import json

import numpy as np
import pytest
from helpers import flat_params, refused
from npz_models import to_big_vision, write_npz
from PIL import Image
from small_models import (
    CONFIG,
    EMBED,
    LM_HEAD,
    PALIGEMMA_2,
    PROMPTS,
    SIGLIP_CONFIG,
    assert_same,
    random_arrays,
    with_text,
    write_folder,
    write_model,
)

from minipali.checkpoint import folder_of, load_any, open_any, stored_dtype, write_like
from minipali.checkpoint.config import parse_config
from minipali.checkpoint.tensors import flatten
from minipali.commands import train
from minipali.decoding.loaded_model import load_model
from minipali.model.gemma import KVCache
from minipali.model.paligemma import prefill


@pytest.mark.parametrize("config", [PALIGEMMA_2 | {"image_token_index": 30}, SIGLIP_CONFIG], ids=["one", "pair"])
@pytest.mark.parametrize("name", ["x.npz", "X.NPZ"])
def test_either_kind(tmp_path, config, name):
    """Both hold the same parameters, and are told apart by the ending alone, whatever its case."""
    cfg, arrays = parse_config(config), random_arrays(config)
    folder = write_folder(tmp_path / "folder.1", arrays, config)
    write_npz(tmp_path / "x.npz", to_big_vision(arrays, cfg)).rename(tmp_path / name)
    for path, beside in [(folder, folder), (str(folder), folder), (tmp_path / name, tmp_path)]:
        assert folder_of(path) == beside
        assert stored_dtype(path) == "float32"
        for dtype in [np.float32, np.float64]:
            found, params = load_any(path, dtype)
            assert type(found) is type(cfg) and found.vision_config == cfg.vision_config
            assert_same(params, {key: x.astype(dtype) for key, x in arrays.items()})
    assert len(open_any(folder)[1]) == len(arrays)


def test_neither_kind(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"")
    for path, message in [("none.npz", "none.npz: no such file"), ("none", "none: no such folder"),
                          ("model.bin", "model.bin: expected a folder")]:
        for function in [open_any, load_any, stored_dtype]:
            assert message in refused(function, tmp_path / path)


@pytest.fixture(params=["paligemma", "gemma 2"])
def merged(tmp_path, request):
    """A folder whose config ties the output head, and whose head has been trained by itself; and the same untied."""
    config = CONFIG if request.param == "paligemma" else with_text(CONFIG, model_type="gemma2")
    arrays = flat_params(parse_config(config), np.random.default_rng(0), np.float32)
    arrays[LM_HEAD] = arrays[EMBED] + np.random.default_rng(1).standard_normal(arrays[EMBED].shape, np.float32)
    for name, tied in [("merged", True), ("untied", False)]:
        write_model(tmp_path / name, config | {"tie_word_embeddings": tied}, arrays)
    return tmp_path


def next_token_scores(model):
    pixels = np.random.default_rng(2).uniform(-1, 1, (1, 3, 8, 8)).astype(np.float32)
    features, ids = model.features_of(pixels), np.array([PROMPTS[0]])
    cache = KVCache(features, 1, features.shape[1] + ids.shape[1], model.cfg.text_config)
    return prefill(features, ids, [ids.shape[1]], model.params, model.cfg, cache)


def test_a_trained_output_head_answers(merged):
    """As if config.json said untied; and not as the table would."""
    ours, untied = (load_model(merged / name) for name in ("merged", "untied"))
    assert ours.cfg == untied.cfg
    np.testing.assert_array_equal(next_token_scores(ours), next_token_scores(untied))
    (merged / "tied").mkdir()
    arrays = {name: x for name, x in flatten(ours.params).items() if name != LM_HEAD}
    write_model(merged / "tied", json.loads((merged / "merged" / "config.json").read_text()), arrays)
    assert np.abs(next_token_scores(load_model(merged / "tied")) - next_token_scores(ours)).max() > 1


@pytest.mark.parametrize("options", [["--lora", "*.q_proj"], ["--freeze", "*embed_tokens*"]], ids=["lora", "weights"])
def test_a_trained_output_head_is_fine_tuned_and_saved(merged, options):
    """One step of either way; the new config.json unties the two, for old versions of transformers as for new ones."""
    Image.new("RGB", (8, 8), "red").save(merged / "a.png")
    (merged / "data.jsonl").write_text(json.dumps({"image": "a.png", "prefix": "what", "suffix": "red"}))
    for name in ("merged", "untied"):
        train.main(["--from", str(merged / name), "--data", str(merged / "data.jsonl"), "--steps", "2", "--rate", "0.1",
                    "--runs", str(merged / name / "runs"), "--out", str(merged / f"{name} new"), *options])
    assert ((merged / "merged new" / "model.safetensors").read_bytes()
            == (merged / "untied new" / "model.safetensors").read_bytes())
    config = json.loads((merged / "merged new" / "config.json").read_text())
    assert config["tie_word_embeddings"] is config["text_config"]["tie_word_embeddings"] is False
    before, after = load_any(merged / "merged"), load_any(merged / "merged new")
    assert before[0] == after[0] and not after[0].tie_word_embeddings
    head_before, head_after = (flatten(params)[LM_HEAD] for _, params in (before, after))
    assert np.array_equal(head_before, head_after) == (options[0] == "--lora"), "a weight of its own, trained as one"
    table_before, table_after = (flatten(params)[EMBED] for _, params in (before, after))
    np.testing.assert_array_equal(table_before, table_after)


def test_generation_config_goes_along(tmp_path):
    """What ends a text is copied with the model; from beside an .npz, of which it says nothing, it is not."""
    write_model(tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text('{"eos_token_id": [1, 7]}')
    model = load_model(tmp_path / "model")
    assert model.cfg.eos_token_ids == (1, 7)
    write_like(model, tmp_path / "new", flatten(model.params))
    assert load_model(tmp_path / "new").cfg == model.cfg
    arrays = to_big_vision(flatten(model.params), model.cfg)
    npz = load_model(write_npz(tmp_path / "model" / "model.npz", arrays))
    assert npz.cfg.eos_token_ids == (1,)
    write_like(npz, tmp_path / "of npz", flatten(npz.params))
    again = load_model(tmp_path / "of npz")
    assert again.cfg == npz.cfg and again.tokenizer
    np.testing.assert_array_equal(next_token_scores(again), next_token_scores(npz))


@pytest.mark.parametrize("config", [CONFIG, CONFIG["text_config"]], ids=["paligemma", "gemma"])
@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_config_json_says_the_new_dtype(tmp_path, config, name):
    """transformers 5 loads weights in the dtype that config.json names, so float32 would come out rounded."""
    config = json.loads(json.dumps(config | {name: "bfloat16"}))
    for section in {"text_config", "vision_config"} & set(config):
        config[section][name] = "bfloat16"
    model = load_model(write_model(tmp_path / "model", config, dtype="bfloat16"))
    for dtype in [None, "float32"]:
        write_like(model, tmp_path / "new", flatten(model.params), dtype)
        again = json.loads((tmp_path / "new" / "config.json").read_text())
        assert again == json.loads(json.dumps(config).replace("bfloat16", dtype or "bfloat16"))
        assert stored_dtype(tmp_path / "new") == (dtype or "bfloat16")
