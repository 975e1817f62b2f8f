"""Small random checkpoints and the folders that hold them, for the tests of several rooms."""
import copy
import json
import struct

import numpy as np
from helpers import flat_params
from safetensors.numpy import save_file

from minipali.checkpoint.config import parse_config
from minipali.checkpoint.hub import save
from minipali.checkpoint.tensors import flatten, param_shapes, unflatten

BOS, EOS, PAD, NEWLINE = 2, 1, 0, 10 + 4  # the byte tokens begin at 4


def tokenizer_spec(letters="abcdefghijklmnopqrstuvwxyz;▁"):
    """A tokenizer.json without merges: control tokens, the 256 bytes, letters, places, and <image> last."""
    vocab = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    controls = ["<pad>", "<eos>", "<bos>", "<unk>"]
    places = [f"<loc{i:04}>" for i in range(1024)] + [f"<seg{i:03}>" for i in range(128)]
    ids = {token: i for i, token in enumerate([*vocab, *places, "<image>"])}
    added = [{"id": ids[name], "content": name, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": name not in places} for name in [*controls, *places, "<image>"]]
    return {
        "added_tokens": added, "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}]},
        "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True,
                  "vocab": {token: ids[token] for token in vocab}, "merges": []}}


IDS = {entry["content"]: entry["id"] for entry in tokenizer_spec()["added_tokens"]}


IDS |= tokenizer_spec()["model"]["vocab"]


IMAGE = IDS["<image>"]


CONFIG = {
    "model_type": "paligemma", "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD,
    "image_token_index": IMAGE,
    "vision_config": {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3,
                      "image_size": 8, "patch_size": 4, "vision_use_head": False},
    "text_config": {"model_type": "gemma", "vocab_size": IMAGE + 1, "hidden_size": 32, "intermediate_size": 24,
                    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
                    "max_position_embeddings": 64}}


# A Gemma by itself: what a PaliGemma says of its language model, and the special tokens that stand beside it there.
TEXT_CONFIG = CONFIG["text_config"] | {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}


PATCHES = 4


def with_text(config, **text):
    """The config with other fields in text_config."""
    return config | {"text_config": config["text_config"] | text}


def write_model(folder, config=CONFIG, arrays=None, dtype="float32"):
    """A whole folder in the hub's layout with random weights, or those given."""
    arrays = arrays or flat_params(parse_config(config), np.random.default_rng(0), np.float32)
    save(folder, config, unflatten(arrays), dtype)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_spec()))
    return folder


def write_script(folder, tokens, config=CONFIG):
    """A checkpoint that says `tokens`, all different, after any prompt that ends in a newline.

    No layer adds anything, so what reaches the output head is the last token's embedding. Each token of the script has
    a direction of its own there, and the head answers to it with the next.
    """
    config = config | {"tie_word_embeddings": False}
    arrays = flat_params(parse_config(config), np.random.default_rng(0), np.float32)
    for name, x in arrays.items():
        if name.startswith("language_model"):
            x[:] = 0
    for direction, (token, following) in enumerate(zip([NEWLINE, *tokens], tokens)):
        arrays["language_model.model.embed_tokens.weight"][token, direction] = 1
        arrays["language_model.lm_head.weight"][following, direction] = 1
    return write_model(folder, config, arrays)


PROMPTS = [[BOS, 270, NEWLINE], [BOS, 261, 262, 263, 264, 265, 266, NEWLINE], [NEWLINE], [BOS, 280, 261, NEWLINE]]


VISION_CONFIG = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3,
          "image_size": 8, "patch_size": 4, "vision_use_head": False}


SIGLIP_CONFIG = {"model_type": "siglip", "vision_config": VISION_CONFIG | {"vision_use_head": True}, "text_config": {
    "vocab_size": 11, "hidden_size": 12, "intermediate_size": 18, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 5}}


def random_arrays(config, seed=0):
    """{published name: float32 array} with norms and biases away from their starting values."""
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape, np.float32) for name, shape in param_shapes(parse_config(config)).items()}


def with_field(values, path, value):
    """A copy of a config with one field set, path as "text_config.head_dim"."""
    values = copy.deepcopy(values)
    *sections, last = path.split(".")
    node = values
    for section in sections:
        node = node[section]
    node[last] = value
    return values


def without_field(values, path):
    values = with_field(values, path, None)
    *sections, last = path.split(".")
    node = values
    for section in sections:
        node = node[section]
    del node[last]
    return values


TOWER = {"hidden_size": 24, "intermediate_size": 17, "num_hidden_layers": 1, "num_attention_heads": 8}
PICTURE = {"image_size": 10, "patch_size": 3}


def model_config(kind):
    """Sizes that all differ, also from those of the picture and of the text in the tests below."""
    text = {"model_type": kind, "hidden_size": 20, "intermediate_size": 44, "num_hidden_layers": 2, "vocab_size": 31,
            "num_attention_heads": 12, "num_key_value_heads": 4, "head_dim": 6, "sliding_window": 3}
    return parse_config({"model_type": "paligemma", "text_config": text, "vision_config": TOWER | PICTURE,
                         "image_token_index": 30})


def pair_config():
    """The two towers, of the same width."""
    return parse_config({"model_type": "siglip", "vision_config": TOWER | PICTURE,
                         "text_config": TOWER | {"vocab_size": 29, "max_position_embeddings": 7}})


# A PaliGemma 2 whose sizes all differ, and two of its names.
PALIGEMMA_2 = {"model_type": "paligemma", "vision_config": VISION_CONFIG, "text_config": {
    "model_type": "gemma2", "vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6}}
EMBED, LM_HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"


def write_folder(folder, arrays, config=PALIGEMMA_2):
    """A folder in the hub's layout, written by the safetensors package."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(arrays, folder / "model.safetensors")
    return folder


def write_shards(folder, shards, weight_map, config=PALIGEMMA_2):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for file, arrays in shards.items():
        save_file(arrays, folder / file)
    return folder


def assert_same(params, arrays):
    flat = flatten(params)
    assert flat.keys() == arrays.keys()
    for name, x in arrays.items():
        np.testing.assert_array_equal(flat[name], x, err_msg=name, strict=True)


def raw_file(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def entry(begin, end, dtype="F32", shape=(2,)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
