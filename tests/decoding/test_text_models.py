"""A Gemma by itself, without a picture: what its files say, how it reads, and `run.py --no-image`."""
import json

import numpy as np
import pytest
from helpers import assert_close, flat_params
from safetensors.numpy import load_file, save_file
from small_models import (
    BOS,
    EOS,
    IDS,
    IMAGE,
    NEWLINE,
    tokenizer_spec,
    with_field,
    without_field,
)
from small_models import CONFIG as PALIGEMMA
from small_models import write_model as write_any

import run
from minipali.checkpoint.config import parse_config, read_config
from minipali.checkpoint.hub import load, save
from minipali.checkpoint.tensors import (
    count_parameters,
    family,
    flatten,
    param_shapes,
    unflatten,
)
from minipali.commands import evaluate
from minipali.commands.inspect import summary
from minipali.decoding import pair
from minipali.decoding.generate import generate
from minipali.decoding.loaded_model import (
    check_ids,
    encode_prompt,
    is_text_model,
    load_model,
)
from minipali.decoding.sampling import Decoding
from minipali.errors import InputError
from minipali.model import paligemma
from minipali.model.gemma import KVCache, output_logits
from minipali.trace import record

# --- config.json ------------------------------------------------------------------------------------------------------

# As the hub has them, less what does not matter to a model.
GEMMA_2B = {"model_type": "gemma", "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "head_dim": 256,
            "hidden_act": "gelu", "hidden_size": 2048, "intermediate_size": 16384, "max_position_embeddings": 8192,
            "num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 1, "rms_norm_eps": 1e-06,
            "rope_scaling": None, "rope_theta": 10000.0, "vocab_size": 256000}
GEMMA_2_2B = {"model_type": "gemma2", "attn_logit_softcapping": 50.0, "bos_token_id": 2, "eos_token_id": [1, 107],
              "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_size": 2304, "intermediate_size": 9216,
              "num_attention_heads": 8, "num_hidden_layers": 26, "num_key_value_heads": 4, "query_pre_attn_scalar": 256,
              "sliding_window": 4096, "vocab_size": 256000}
GEMMA_3_270M = {"model_type": "gemma3_text", "_sliding_window_pattern": 6, "attn_logit_softcapping": None,
                "final_logit_softcapping": None, "head_dim": 256, "hidden_size": 640, "intermediate_size": 2048,
                "layer_types": ([*["sliding_attention"] * 5, "full_attention"]) * 3, "max_position_embeddings": 32768,
                "num_attention_heads": 4, "num_hidden_layers": 18, "num_key_value_heads": 1,
                "query_pre_attn_scalar": 256, "rope_local_base_freq": 10000.0, "rope_scaling": None,
                "rope_theta": 1000000.0, "sliding_window": 512, "use_bidirectional_attention": False,
                "vocab_size": 262144}
# The larger ones see: the decoder is a section, and most of it is left out.
GEMMA_3_4B = {"model_type": "gemma3", "eos_token_id": [1, 106], "image_token_index": 262144,
              "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152},
              "text_config": {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240,
                              "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                              "sliding_window": 1024}}


def test_published_gemma():
    cfg = parse_config(GEMMA_2B)
    assert cfg.vision_config is None and cfg.image_token_index is None and family(cfg) == "Gemma"
    assert not cfg.text_config.prefix_lm and not cfg.text_config.post_norms
    assert cfg.text_config.sliding_windows == (None,) * 18 and cfg.text_config.rope_thetas == (1e4,) * 18
    assert count_parameters(cfg) == 2_506_172_416 and len(param_shapes(cfg)) == 164


def test_published_gemma_2():
    cfg = parse_config(GEMMA_2_2B)
    text = cfg.text_config
    assert text.sliding_windows == (4096, None) * 13 and text.post_norms and not text.qk_norms and not text.prefix_lm
    assert (text.attn_logit_softcapping, text.final_logit_softcapping, cfg.eos_token_ids) == (50, 30, (1, 107))
    assert family(cfg) == "Gemma 2" and count_parameters(cfg) == 2_614_341_888 and len(param_shapes(cfg)) == 288


def test_published_gemma_3():
    """Five local layers and a global one; each kind turns at its own speed."""
    cfg = parse_config(GEMMA_3_270M)
    text = cfg.text_config
    assert text.sliding_windows == (*(512,) * 5, None) * 3 and text.rope_thetas == (*(1e4,) * 5, 1e6) * 3
    assert text.rope_factors == (1,) * 18 and text.post_norms and text.qk_norms and not text.prefix_lm
    assert (text.attn_logit_softcapping, text.final_logit_softcapping) == (None, None)
    assert family(cfg) == "Gemma 3" and count_parameters(cfg) == 268_098_176 and len(param_shapes(cfg)) == 236


def test_published_gemma_3_with_pictures():
    """Its decoder; the global layers' positions are stretched, the local ones' are not."""
    cfg = parse_config(GEMMA_3_4B)
    text = cfg.text_config
    assert cfg.vision_config is None and cfg.eos_token_ids == (1, 106)
    assert (text.num_attention_heads, text.num_key_value_heads, text.head_dim, text.vocab_size) == (8, 4, 256, 262208)
    assert text.rope_factors == (*(1,) * 5, 8) * 5 + (1,) * 4 and text.max_position_embeddings == 131072
    assert text.rope_thetas == (*(1e4,) * 5, 1e6) * 5 + (1e4,) * 4 and text.query_pre_attn_scalar == 256
    assert parse_config(without_field(GEMMA_3_4B, "text_config.model_type")) == cfg


def test_both_spellings():
    """transformers 5 keeps a rotary base for each type of layer in one object. Nothing else changes."""
    old = {key: value for key, value in GEMMA_3_270M.items() if key not in ("layer_types", "rope_scaling")}
    assert parse_config(old) == parse_config(GEMMA_3_270M)
    new = without_field(without_field(old, "rope_theta"), "rope_local_base_freq")
    assert parse_config(new) == parse_config(old), "these are the defaults"
    new["rope_parameters"] = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
                              "sliding_attention": {"rope_type": "default", "rope_theta": 2e4}}
    old |= {"rope_theta": 5e5, "rope_local_base_freq": 2e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    text = parse_config(new).text_config
    assert parse_config(new) == parse_config(old) != parse_config(GEMMA_3_270M)
    assert text.rope_thetas[4:6] == (2e4, 5e5) and text.rope_factors[4:6] == (1, 8)
    flat = GEMMA_2B | {"rope_parameters": {"rope_theta": 77.0, "rope_type": "linear", "factor": 2.0}}
    text = parse_config(flat).text_config
    assert text.rope_thetas == (77,) * 18 and text.rope_factors == (2,) * 18


def test_layers_of_gemma_3():
    """`sliding_window_pattern` is the distance between global layers; without a window the local ones stay local."""
    text = parse_config(GEMMA_3_270M | {"layer_types": None, "sliding_window_pattern": 2}).text_config
    assert text.sliding_windows == (512, None) * 9 and text.rope_thetas == (1e4, 1e6) * 9
    text = parse_config(GEMMA_3_270M | {"sliding_window": None}).text_config
    assert text.sliding_windows == (None,) * 18 and text.rope_thetas == (*(1e4,) * 5, 1e6) * 3
    assert parse_config(without_field(GEMMA_3_270M, "sliding_window")).text_config.sliding_windows[0] == 4096
    capped = parse_config(GEMMA_3_270M | {"final_logit_softcapping": 30.0}).text_config
    assert (capped.attn_logit_softcapping, capped.final_logit_softcapping) == (None, 30)
    silent = parse_config({name: x for name, x in GEMMA_3_270M.items() if "softcap" not in name}).text_config
    assert (silent.attn_logit_softcapping, silent.final_logit_softcapping) == (None, None)


@pytest.mark.parametrize(("path", "value"), [
    ("use_bidirectional_attention", True), ("sliding_window_pattern", 0), ("rope_local_base_freq", -1),
    ("rope_parameters", {"rope_theta": 1e4, "rope_type": "default"}), ("rope_parameters", {"full_attention": 3}),
    ("rope_scaling", {"rope_type": "yarn", "factor": 2.0}), ("layer_types", ["full_attention"])])
def test_wrong_fields(path, value):
    with pytest.raises(InputError, match=path) as error:
        parse_config(with_field(GEMMA_3_270M, path, value))
    assert len(str(error.value).splitlines()) == 1


# --- files ------------------------------------------------------------------------------------------------------------

SIZES = {"vocab_size": IMAGE, "hidden_size": 32, "intermediate_size": 24, "num_attention_heads": 4,
         "num_key_value_heads": 2, "head_dim": 6, "max_position_embeddings": 64, "bos_token_id": BOS,
         "eos_token_id": EOS, "pad_token_id": 0, "sliding_window": 3}
FAMILIES = {"gemma": SIZES | {"model_type": "gemma", "num_hidden_layers": 2},
            "gemma2": SIZES | {"model_type": "gemma2", "num_hidden_layers": 2},
            "gemma3": SIZES | {"model_type": "gemma3_text", "num_hidden_layers": 3, "sliding_window_pattern": 2}}


def write_model(folder, config, dtype="float32"):
    """A folder with random weights; its tokenizer has no <image>, which a Gemma has not either."""
    write_any(folder, config, dtype=dtype)
    spec = tokenizer_spec()
    spec["added_tokens"] = [entry for entry in spec["added_tokens"] if entry["content"] != "<image>"]
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, tmp_path_factory):
    return write_model(tmp_path_factory.mktemp(request.param), FAMILIES[request.param])


def test_names_on_the_hub(tmp_path):
    """Written as the hub has it, `model.layers…`, and read so, with or without that prefix and a stored tied head."""
    config = FAMILIES["gemma3"]
    arrays = flat_params(parse_config(config), np.random.default_rng(0), np.float32)
    save(tmp_path, config, unflatten(arrays), "float32")
    stored = load_file(tmp_path / "model.safetensors")
    assert {"model.embed_tokens.weight", "model.norm.weight", "model.layers.2.self_attn.q_norm.weight"} <= set(stored)
    assert len(stored) == len(arrays) and all(name.startswith("model.") for name in stored)
    bare = {name.removeprefix("model."): x for name, x in stored.items()}
    for tensors in [stored, bare, stored | {"lm_head.weight": stored["model.embed_tokens.weight"].copy()}]:
        save_file(tensors, tmp_path / "model.safetensors")
        found = flatten(load(tmp_path)[1])
        assert found.keys() == arrays.keys() and all((found[name] == arrays[name]).all() for name in arrays)
    stored.pop("model.layers.1.self_attn.k_norm.weight")
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"1 missing \(language_model.model.layers.1.self_attn.k_norm.weight\)"):
        load(tmp_path)


def test_untied_head(tmp_path):
    config = FAMILIES["gemma"] | {"tie_word_embeddings": False}
    write_model(tmp_path, config)
    assert "lm_head.weight" in load_file(tmp_path / "model.safetensors")
    cfg, params = load(tmp_path)
    assert paligemma.output_head(params, cfg) is params["language_model"]["lm_head"]["weight"]


def test_decoder_of_a_model_with_pictures(tmp_path):
    """What belongs to Gemma 3's tower is passed over, whatever the names; a stray tensor is not."""
    text = FAMILIES["gemma3"]
    arrays = flat_params(parse_config(text), np.random.default_rng(0), np.float32)
    config = {"model_type": "gemma3", "vision_config": {}, "text_config": text}
    seeing = arrays | {"multi_modal_projector.mm_soft_emb_norm.weight": np.ones(3, np.float32),
                       "vision_tower.vision_model.post_layernorm.bias": np.ones(3, np.float32)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for prefix in ["", "model."]:
        save_file({prefix + name: x for name, x in seeing.items()}, tmp_path / "model.safetensors")
        assert flatten(load(tmp_path)[1]).keys() == arrays.keys()
    save_file(seeing | {"adapter.weight": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"1 unexpected \(adapter.weight\)"):
        load(tmp_path)


def test_head_size_from_the_tensors(tmp_path, folder):
    """As for PaliGemma, a head size that the file leaves out is that of the tensors."""
    values = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(without_field(values, "head_dim")))
    shapes = {"language_model.model.layers.0.self_attn.q_proj.weight": (4 * 6, 32)}
    assert read_config(tmp_path, shapes).text_config.head_dim == 6
    assert read_config(tmp_path).text_config.head_dim == 256


def test_summary(folder):
    lines = list(summary(folder))
    assert lines[0].startswith("Gemma") and lines[1].startswith("text: ") and not any("picture" in s for s in lines)


def test_is_text_model(folder, tmp_path):
    assert is_text_model(folder) and not is_text_model(tmp_path) and not is_text_model(folder / "config.json")
    (tmp_path / "config.json").write_text(json.dumps(PALIGEMMA))
    assert not is_text_model(tmp_path)


# --- reading ----------------------------------------------------------------------------------------------------------

PROMPTS = [[BOS, 270, 271], [BOS, 261, 262, 263, 264, 265, 266], [BOS], [BOS, 280, 261]]


def test_prompts(folder):
    """BOS and the text, with no newline to end a question; every position is for text; no id stands for a picture."""
    model = load_model(folder)
    assert encode_prompt("ab", model) == [BOS, IDS["a"], IDS["b"]] and encode_prompt("", model) == [BOS]
    check_ids([IMAGE - 1] * 63, model.cfg, 0)
    with pytest.raises(InputError, match=r"prompt: 64 tokens, expected fewer"):
        check_ids([5] * 64, model.cfg, 0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_cached_and_padded_as_alone(folder, dtype):
    """A padded batch, token by token, against each text alone, whole, with each token seeing only what came before."""
    model = load_model(folder, dtype)
    p, cfg, lengths = model.params, model.cfg, np.array([len(prompt) for prompt in PROMPTS])
    ids = np.zeros((len(PROMPTS), lengths.max()), int)
    for row, prompt in zip(ids, PROMPTS):
        row[:len(prompt)] = prompt
    suffix = np.random.default_rng(0).integers(4, IMAGE, (len(PROMPTS), 9))
    cache = KVCache(model.no_picture(1), len(PROMPTS), 20, cfg.text_config)
    cached = [paligemma.prefill(model.no_picture(len(PROMPTS)), ids, lengths, p, cfg, cache)]
    cached += [paligemma.decode(token[:, None], p, cfg, cache)[:, 0] for token in suffix.T]
    cached = np.stack(cached, 1)
    for i, prompt in enumerate(PROMPTS):
        whole = np.array([[*prompt, *suffix[i]]])
        alone = []
        for length in range(len(prompt), whole.shape[1] + 1):
            x = paligemma.forward(model.no_picture(1), whole[:, :length], [length], [length], p, cfg)
            alone.append(output_logits(x[0, -1], paligemma.output_head(p, cfg), cfg.text_config))
        assert cached.dtype == dtype
        assert_close(f"row {i}", cached[i], np.stack(alone), "reordered")


def test_together_as_alone(folder):
    model, decoding = load_model(folder, "float64"), Decoding(max_new_tokens=8)
    together = generate(model, model.no_picture(4), PROMPTS, decoding)
    alone = [generate(model, model.no_picture(1), [prompt], decoding)[0] for prompt in PROMPTS]
    assert [answer.ids for answer in together] == [answer.ids for answer in alone]
    assert len({tuple(answer.ids) for answer in together}) > 1


# --- run.py --no-image ------------------------------------------------------------------------------------------------

def test_no_image(folder, ask):  # noqa: F811
    """The contract's keys; what is printed without --json is the text."""
    arguments = "--no-image", "ab cd", "--model", folder, "--max-new-tokens", 5
    found = ask(*arguments, "--json")
    assert found["prompt_ids"] == [BOS, *(IDS[c] for c in "ab▁cd")] and found["prompt"] == "ab cd"
    assert found["boxes"] == [] and list(found["seconds"]) == ["load", "vision", "prefill", "decode"]
    model = load_model(folder)
    [answer] = generate(model, model.no_picture(1), [found["prompt_ids"]], Decoding(max_new_tokens=5))
    assert found["output_ids"] == answer.ids and found["stopped_by"] == answer.stopped_by
    assert ask(*arguments) == found["text"] == model.tokenizer.decode(answer.ids)
    assert ask("ab cd", "--no-image", *arguments[2:]) == found["text"]
    ids = ",".join(map(str, found["prompt_ids"]))
    assert ask("--no-image", "--prompt-ids", ids, *arguments[2:]) == found["text"]


def test_no_image_dump(folder, tmp_path, ask):  # noqa: F811
    path = tmp_path / "taps.safetensors"
    found = ask("--no-image", "ab", "--model", folder, "--max-new-tokens", 2, "--json", "--dump", path)
    dumped = load_file(path)
    assert dumped.pop("input_ids").tolist() == [found["prompt_ids"]] and "pixel_values" not in dumped
    assert int(dumped["logits"].argmax()) == found["output_ids"][0]
    assert dumped["language_model.model.layers.0.self_attn"].shape == (1, 3, 32)
    assert all(name == "logits" or name.startswith("language_model.model.") for name in dumped)


def test_no_image_with_paligemma(tmp_path, ask):  # noqa: F811
    """Its decoder, with its newline and the prompt that sees all of itself; the tower is not run."""
    folder = write_any(tmp_path, PALIGEMMA)
    found = ask("--no-image", "ab", "--model", folder, "--max-new-tokens", 4, "--json", "--dump", tmp_path / "taps")
    assert found["prompt_ids"] == [BOS, IDS["a"], IDS["b"], NEWLINE] and found["boxes"] == []
    assert not any("vision" in name for name in load_file(tmp_path / "taps"))
    model = load_model(folder)
    [answer] = generate(model, model.no_picture(1), [found["prompt_ids"]], Decoding(max_new_tokens=4))
    assert found["output_ids"] == answer.ids
    rooms = []
    for last in [IDS["b"], IDS["c"]]:
        ids = np.array([[BOS, IDS["a"], last]])
        with record() as activations:
            paligemma.forward(model.no_picture(1), ids, [3], [3], model.params, model.cfg)
        rooms.append(activations["language_model.model.layers.0"][0, 0])
    assert (rooms[0] != rooms[1]).any()


def test_no_image_verbose(folder, call):  # noqa: F811
    status, _, err = call("--no-image", "ab", "--model", folder, "--max-new-tokens", 2, "--verbose")
    assert status == 0 and err.startswith("no picture: read by ")


def test_positionals_of_no_image(folder, picture, refusal):  # noqa: F811
    model = "--model", folder
    assert "--no-image: expected PROMPT alone" in refusal(picture, "ab", "--no-image", *model)
    assert "expected a PROMPT" in refusal("--no-image", *model)
    assert "expected one of the two" in refusal("--no-image", "ab", "--prompt-ids", "2,5", *model)
    assert "--save-image" in refusal("--no-image", "ab", "--save-image", "boxes.png", *model)


@pytest.mark.parametrize("arguments", [(), ("a prompt",), ("absent.png", "a prompt")])
def test_text_models_see_nothing(folder, refusal, arguments):  # noqa: F811
    """Whatever stands where the picture should be, the answer is what to do about it."""
    line = refusal(*arguments, "--model", folder)
    assert "a text model" in line and "--no-image" in line


def test_other_commands(folder):
    with pytest.raises(InputError, match="text model"):
        evaluate.main(["--model", str(folder)])
    with pytest.raises(InputError, match="a text model's, expected siglip"):
        pair.load_pair(folder)


def test_help_says_it(capsys):
    assert run.main(["--help"]) == 0
    assert "--no-image" in capsys.readouterr().out
