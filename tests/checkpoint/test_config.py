"""config.json as it is really published: fields left out, stale, renamed, or wrong."""
import dataclasses
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import with_field, without_field

from minipali.checkpoint.config import config_json, parse_config, read_config
from minipali.checkpoint.tensors import count_parameters, family, param_shapes
from minipali.errors import InputError

VISION = {"hidden_size": 1152, "intermediate_size": 4304, "model_type": "siglip_vision_model",
          "num_attention_heads": 16, "num_hidden_layers": 27, "num_image_tokens": 256, "patch_size": 14,
          "projection_dim": 2048, "projector_hidden_act": "gelu_fast", "vision_use_head": False}

# google/paligemma-3b-pt-224: no head_dim, no image_size, no eps, no rope_theta.
PALIGEMMA = {
    "architectures": ["PaliGemmaForConditionalGeneration"], "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
    "hidden_size": 2048, "ignore_index": -100, "image_token_index": 257152, "model_type": "paligemma",
    "projection_dim": 2048, "vocab_size": 257216, "torch_dtype": "float32", "vision_config": VISION,
    "text_config": {"hidden_size": 2048, "intermediate_size": 16384, "model_type": "gemma", "num_attention_heads": 8,
                    "num_hidden_layers": 18, "num_image_tokens": 256, "num_key_value_heads": 1, "vocab_size": 257216}}

# google/paligemma2-3b-pt-224: the outer hidden_size is PaliGemma 1's, the number of heads is left out as well.
PALIGEMMA_2 = {
    "_vocab_size": 257152, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "hidden_size": 2048,
    "image_token_index": 257152, "model_type": "paligemma", "num_hidden_layers": 26, "projection_dim": 2304,
    "vision_config": VISION | {"num_positions": 256, "projection_dim": 2304},
    "text_config": {"attn_logit_softcapping": 50.0, "cache_implementation": "hybrid", "eos_token_id": [1, 107],
                    "final_logit_softcapping": 30.0, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304,
                    "intermediate_size": 9216, "model_type": "gemma2", "num_hidden_layers": 26,
                    "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "sliding_window": 4096,
                    "vocab_size": 257216}}

SIZES_10B = {"hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42, "num_attention_heads": 16,
             "num_key_value_heads": 8}
SIZES_28B = {"hidden_size": 4608, "intermediate_size": 36864, "num_hidden_layers": 46, "num_attention_heads": 32,
             "num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 144}


def test_published_paligemma():
    """What the file leaves out is what its model was trained with."""
    cfg = parse_config(PALIGEMMA)
    text, vision = cfg.text_config, cfg.vision_config
    assert (text.head_dim, text.num_attention_heads, text.num_key_value_heads) == (256, 8, 1)
    assert (text.rms_norm_eps, text.rope_thetas, text.max_position_embeddings) == (1e-6, (1e4,) * 18, 8192)
    assert text.rope_factors == (1,) * 18 and text.prefix_lm and not text.qk_norms
    assert text.query_pre_attn_scalar == 256 and not text.post_norms
    assert text.attn_logit_softcapping is None and text.final_logit_softcapping is None
    assert text.sliding_windows == (None,) * 18
    assert (vision.image_size, vision.num_patches, vision.layer_norm_eps) == (224, 256, 1e-6)
    assert not vision.vision_use_head
    assert (cfg.image_token_index, cfg.bos_token_id, cfg.eos_token_ids, cfg.pad_token_id) == (257152, 2, (1,), 0)
    assert cfg.tie_word_embeddings


def test_published_paligemma_2():
    """The stale outer width is not believed, the outer stop token is; the window lies on the even layers."""
    cfg = parse_config(PALIGEMMA_2)
    text = cfg.text_config
    assert (text.hidden_size, text.num_attention_heads, text.num_key_value_heads, text.head_dim) == (2304, 8, 4, 256)
    assert (text.attn_logit_softcapping, text.final_logit_softcapping) == (50, 30)
    assert text.query_pre_attn_scalar == 256 and text.post_norms
    assert text.sliding_windows == (4096, None) * 13
    assert cfg.eos_token_ids == (1,)  # as transformers reads it: the outer one, if generation_config.json has none
    shapes = param_shapes(cfg)
    assert shapes["multi_modal_projector.linear.weight"] == (2304, 1152)
    assert shapes["vision_tower.vision_model.embeddings.position_embedding.weight"] == (256, 1152)


@pytest.mark.parametrize(("values", "sizes", "counts", "tensors"), [
    (PALIGEMMA, {}, (2_923_466_480, 2_924_351_216, 2_927_890_160), 603),
    (PALIGEMMA_2, {}, (3_032_094_960, 3_032_979_696, 3_036_518_640), 727),
    (PALIGEMMA_2, SIZES_10B, (9_662_409_456, 9_663_294_192, 9_666_833_136), 903),
    (PALIGEMMA_2, SIZES_28B, (27_650_192_112, 27_651_076_848, 27_654_615_792), 947),
], ids=["3B", "2-3B", "2-10B", "2-28B"])
def test_parameter_counts(values, sizes, counts, tensors):
    """The published numbers of parameters, plus the 64 rows that the hub's PaliGemma 2 tables have more than those."""
    values = with_field(values, "text_config", values["text_config"] | sizes)
    for size, count in zip((224, 448, 896), counts):
        cfg = parse_config(with_field(values, "vision_config.image_size", size))
        extra = 64 * cfg.text_config.hidden_size if cfg.text_config.post_norms else 0  # PaliGemma 1's counts have them
        assert count_parameters(cfg) == count + extra
        assert len(param_shapes(cfg)) == tensors


def test_query_scale():
    """PaliGemma 2 28B scales its queries by the width per head, 4608/32, not by the head size."""
    cfg = parse_config(with_field(PALIGEMMA_2, "text_config", PALIGEMMA_2["text_config"] | SIZES_28B)).text_config
    assert (cfg.head_dim, cfg.query_pre_attn_scalar) == (128, 144)


@pytest.mark.parametrize("values", [PALIGEMMA, PALIGEMMA_2], ids=["1", "2"])
def test_newer_fields(values):
    """Today's transformers spells fields out, renames some and moves others; the model stays the same."""
    text = values["text_config"] | {
        "head_dim": 256, "num_attention_heads": 8, "bos_token_id": 2, "pad_token_id": 0,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}, "attention_bias": False,
        "tie_word_embeddings": True, "use_bidirectional_attention": True, "rope_scaling": None}
    text.setdefault("eos_token_id", 1)
    if values is PALIGEMMA_2:
        text["layer_types"] = ["sliding_attention", "full_attention"] * 13
    newer = {"model_type": "paligemma", "image_token_id": 257152, "vocab_size": 257152, "dtype": "bfloat16",
             "bos_token_id": None, "eos_token_id": 1, "text_config": text,
             "vision_config": VISION | {"image_size": 224, "num_channels": 3, "layer_norm_eps": 1e-6}}
    assert parse_config(newer) == parse_config(values)


def test_fields_are_read():
    """Nothing is taken from the defaults where the file says otherwise."""
    values = PALIGEMMA_2
    for path, value in [("text_config.rope_parameters", {"rope_theta": 500.0}), ("text_config.rms_norm_eps", 1e-5),
                        ("text_config.head_dim", 32), ("text_config.attn_logit_softcapping", None),
                        ("text_config.final_logit_softcapping", 7), ("text_config.sliding_window", 5),
                        ("text_config.layer_types", ["full_attention"] * 25 + ["sliding_attention"]),
                        ("vision_config.layer_norm_eps", 1e-4), ("vision_config.image_size", 28),
                        ("image_token_id", 9), ("tie_word_embeddings", False)]:
        values = with_field(values, path, value)
    cfg = parse_config(values)
    text = cfg.text_config
    assert (text.rope_thetas, text.rms_norm_eps, text.head_dim) == ((500,) * 26, 1e-5, 32)
    assert (text.attn_logit_softcapping, text.final_logit_softcapping) == (None, 7)
    assert text.sliding_windows == (None,) * 25 + (5,)
    assert (cfg.vision_config.layer_norm_eps, cfg.vision_config.num_patches) == (1e-4, 4)
    assert cfg.image_token_index == 9
    assert param_shapes(cfg)["language_model.lm_head.weight"] == (257216, 2304)


def test_gemma_defaults():
    """A save leaves out what equals a default of Gemma's own class: 16 heads in Gemma 1, a width of 2304 in Gemma 2."""
    first = without_field(PALIGEMMA, "text_config.num_attention_heads")
    first = without_field(first, "text_config.num_key_value_heads")
    assert parse_config(first).text_config.num_attention_heads == 16
    assert parse_config(first).text_config.num_key_value_heads == 16
    for name in ["hidden_size", "num_hidden_layers", "intermediate_size", "num_key_value_heads"]:
        assert parse_config(without_field(PALIGEMMA_2, f"text_config.{name}")) == parse_config(PALIGEMMA_2)


def test_shapes_settle_what_is_left_out(tmp_path):
    """A head size or picture size that the file does not give is read off the tensors; one that it gives stands."""
    (tmp_path / "config.json").write_text(json.dumps(PALIGEMMA))
    shapes = {"language_model.model.layers.0.self_attn.q_proj.weight": (8 * 64, 2048),
              "vision_tower.vision_model.embeddings.position_embedding.weight": (1024, 1152)}
    cfg = read_config(tmp_path, shapes)
    assert (cfg.text_config.head_dim, cfg.text_config.query_pre_attn_scalar) == (64, 64)
    assert cfg.vision_config.image_size == 448
    stated = with_field(with_field(PALIGEMMA, "text_config.head_dim", 256), "vision_config.image_size", 224)
    (tmp_path / "config.json").write_text(json.dumps(stated))
    assert read_config(tmp_path, shapes) == parse_config(stated) == parse_config(PALIGEMMA)
    (tmp_path / "config.json").write_text(json.dumps(PALIGEMMA))
    for rows in [(), (0, 5), (7, 7)]:
        assert read_config(tmp_path, dict.fromkeys(shapes, rows)) == parse_config(PALIGEMMA)


def test_siglip():
    """The two-tower model's config may say nothing at all: it is then the base model."""
    cfg = parse_config({"model_type": "siglip"})
    assert (cfg.vision_config.hidden_size, cfg.vision_config.num_patches) == (768, 196)
    assert (cfg.text_config.vocab_size, cfg.text_config.max_position_embeddings) == (32000, 64)
    assert count_parameters(cfg) == 203_155_970
    wider = parse_config({"model_type": "siglip", "vision_config": {"hidden_size": 1152, "num_attention_heads": 16},
                          "text_config": {"projection_size": 1152}})
    assert param_shapes(wider)["text_model.head.weight"] == (1152, 768)


@pytest.mark.parametrize(("path", "value"), [
    ("model_type", "llava"), ("model_type", ["paligemma"]), ("vision_config", []), ("text_config", "gemma"),
    ("text_config", None), ("text_config.model_type", "gemma3_text"), ("text_config.hidden_size", "2048"),
    ("text_config.hidden_size", 2048.0), ("text_config.hidden_size", True), ("text_config.hidden_size", 0),
    ("text_config.hidden_size", 10**400), ("text_config.num_hidden_layers", 2**31 - 1),
    ("text_config.num_key_value_heads", 3), ("text_config.head_dim", 7), ("text_config.rms_norm_eps", -1e-6),
    ("text_config.rms_norm_eps", float("nan")), ("text_config.rope_theta", 10**400), ("text_config.rope_theta", "1e4"),
    ("text_config.rope_parameters", []), ("text_config.rope_parameters", {"rope_type": "yarn", "factor": 2.0}),
    ("text_config.rope_scaling", {"type": "dynamic", "factor": 2.0}), ("text_config.attention_bias", True),
    ("text_config.rope_scaling", {"rope_type": "linear"}),
    ("text_config.rope_scaling", {"type": "linear", "factor": 0}),
    ("text_config.hidden_act", "silu"), ("text_config.hidden_activation", "relu"),
    ("text_config.layer_types", [{}] * 18), ("text_config.layer_types", "full"),
    ("text_config.eos_token_id", []), ("eos_token_id", [1, "2"]), ("bos_token_id", -1), ("image_token_index", "256"),
    ("tie_word_embeddings", 1), ("vision_config.model_type", "clip_vision_model"),
    ("vision_config.hidden_act", "quick_gelu"), ("vision_config.num_attention_heads", 7),
    ("vision_config.num_channels", 1), ("vision_config.image_size", 8), ("vision_config.vision_use_head", "no")])
def test_wrong_fields(path, value):
    """Every field is checked, and the one line names it."""
    with pytest.raises(InputError) as error:
        parse_config(with_field(PALIGEMMA, path, value), "config.json")
    message = str(error.value)
    assert message.startswith("config.json: ") and len(message.splitlines()) == 1 and len(message) < 300
    assert path.split(".")[-1] in message


@pytest.mark.parametrize("values", [
    {"vision_config": {"vision_use_head": False}}, {"text_config": {"projection_size": 512}},
    {"text_config": {"model_type": "clip_text_model"}}, {"text_config": {"num_attention_heads": 5}}])
def test_wrong_siglip(values):
    with pytest.raises(InputError):
        parse_config({"model_type": "siglip"} | values)


@pytest.mark.parametrize("section", ["", "text_config."])
@pytest.mark.parametrize("name", ["pad_token_id", "bos_token_id", "eos_token_id"])
@pytest.mark.parametrize("wrap", [lambda i: i, lambda i: [0, i]], ids=["one", "list"])
def test_ids_beyond_the_vocabulary(section, name, wrap):
    """The last row of the table is one that can be named, the one behind it is not."""
    values = without_field(PALIGEMMA, name)
    assert parse_config(with_field(values, section + name, wrap(257215)))
    with pytest.raises(InputError, match=f"{name} is .*257216.*, expected ids of the vocabulary, 0 to 257215"):
        parse_config(with_field(values, section + name, wrap(257216)))
    assert parse_config(with_field(with_field(values, "text_config." + name, 10**6), name, 3)), "the outer one counts"


@pytest.mark.parametrize("name", ["image_token_index", "image_token_id"])
def test_image_id(tmp_path, name):
    """A picture's tokens are never looked up, and the original files' <image> is the id behind the table's end."""
    values = without_field(PALIGEMMA, "image_token_index")
    (tmp_path / "config.json").write_text(json.dumps(values | {name: 257216}))
    assert read_config(tmp_path).image_token_index == 257216
    (tmp_path / "config.json").write_text(json.dumps(values | {name: 257217}))
    with pytest.raises(InputError, match=f"config.json: {name} is 257217, expected an id of the vocabulary"):
        read_config(tmp_path)
    # What a save of transformers leaves out is this default of its class.
    assert parse_config(without_field(PALIGEMMA, "image_token_index")).image_token_index == 256000


def test_siglip_pad_id():
    last = parse_config({"model_type": "siglip", "text_config": {"pad_token_id": 31999}})
    assert last.text_config.pad_token_id == 31999
    with pytest.raises(InputError, match="pad_token_id is 32000"):
        parse_config({"model_type": "siglip", "text_config": {"pad_token_id": 32000}})


@pytest.mark.parametrize(("content", "stops"), [
    ({"eos_token_id": 107}, (107,)), ({"eos_token_id": [1, 106]}, (1, 106)), ({"eos_token_id": None}, (9,)),
    ({}, (9,))])
def test_generation_config(tmp_path, content, stops):
    """generation_config.json says where a text ends, before config.json does; null says nothing."""
    (tmp_path / "config.json").write_text(json.dumps(PALIGEMMA | {"eos_token_id": 9}))
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert read_config(tmp_path).eos_token_ids == stops


@pytest.mark.parametrize(("content", "message"), [
    ('{"eos_token_id": "<eos>"}', "eos_token_id is '<eos>', expected a token id or a list of them"),
    ('{"eos_token_id": []}', "eos_token_id is \\[\\], expected"), ('{"eos_token_id": 257216}', "ids of the vocabulary"),
    ('{"eos_token_id": [[1]]}', "expected a token id"), ("[1]", "expected an object of fields"),
    ("{", "not valid JSON")])
def test_wrong_generation_config(tmp_path, content, message):
    (tmp_path / "config.json").write_text(json.dumps(PALIGEMMA))
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(InputError, match=f"generation_config.json: .*{message}"):
        read_config(tmp_path)


@pytest.mark.parametrize("name", ["quantization_config", "quantization"])
def test_quantized(name):
    with pytest.raises(InputError, match=f"config.json: {name} is there, expected weights that are not quantized"):
        parse_config(PALIGEMMA | {name: {"quant_method": "bitsandbytes", "load_in_4bit": True}})


@pytest.mark.parametrize("content", [
    b"", b"{", b'{"model_type": "paligemma",}', b"[1, 2]", b"null", b"\xff\xfe{",
    b"[" * 100_000, b'{"model_type": ' + b"9" * 5000 + b"}", b"{}"])
def test_broken_file(tmp_path, content):
    """Bytes that are no config are answered in one line with the file's name."""
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=r"config\.json: ") as error:
        read_config(tmp_path)
    assert len(str(error.value).splitlines()) == 1


def test_no_file(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_config(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        read_config(tmp_path)


def test_messages_are_one_printable_line():
    """Line breaks and terminal codes in a hostile name arrive escaped."""
    assert str(InputError("a\nb\x1b[2J\u2028\ud800")) == r"a\nb\x1b[2J\u2028\ud800"


def test_configs_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse_config(PALIGEMMA).image_token_index = 3


names = st.sampled_from([
    "model_type", "text_config", "vision_config", "hidden_size", "num_hidden_layers", "head_dim", "image_size",
    "rope_parameters", "rope_scaling", "rope_theta", "layer_types", "sliding_window", "eos_token_id",
    "hidden_activation",
    "final_logit_softcapping", "tie_word_embeddings", "image_token_id", "quantization_config", "vision_use_head"])
leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9), st.sampled_from(
    [10**400, 2**63, "gelu", "linear", "full_attention", "siglip", "gemma3_text", "\ud800", "\x1b[2J"]))
values = st.recursive(leaves, lambda node: st.lists(node, max_size=3) | st.dictionaries(names | st.sampled_from(
    ["full_attention", "sliding_attention", "rope_type", "type", "factor"]), node, max_size=3), max_leaves=6)


@settings(max_examples=60)
@given(st.sampled_from([PALIGEMMA, PALIGEMMA_2, {"model_type": "siglip"}, {"model_type": "gemma3_text"}]),
       st.lists(st.tuples(st.sampled_from(["", "text_config.", "vision_config."]), names, values), max_size=3))
def test_any_value_in_any_field(config, changes):
    """A config or one printable line, whatever stands where; and a config can be asked what it calls for."""
    for section, name, value in changes:
        if isinstance(config.get(section[:-1]), dict) or not section:
            config = with_field(config, section + name, value)
    try:
        cfg = parse_config(config)
    except InputError as error:
        assert str(error).isprintable() and len(str(error)) < 1000
    else:
        assert count_parameters(cfg) > 0 and family(cfg)


def test_config_json_has_the_types_that_transformers_wants(tmp_path):
    """Its classes refuse 256.0 where they expect 256, and a window of null; found by loading what this one wrote."""
    text = config_json(parse_config(with_field(PALIGEMMA_2, "text_config.sliding_window", None)))["text_config"]
    assert isinstance(text["query_pre_attn_scalar"], int) and text["sliding_window"] == 4096
    assert text["layer_types"] == ["full_attention"] * 26
    again = parse_config(config_json(parse_config(with_field(PALIGEMMA_2, "eos_token_id", [1, 107]))))
    assert again.eos_token_ids == (1, 107)


def test_byte_order_mark(tmp_path):
    """Editors of Windows put one in front of UTF-8."""
    (tmp_path / "config.json").write_text(json.dumps(PALIGEMMA), encoding="utf-8-sig")
    assert read_config(tmp_path) == parse_config(PALIGEMMA)
