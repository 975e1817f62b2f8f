"""The recipe of the shipped model: its sizes, its two stages, and how often each kind of picture occurs."""
import string

import numpy as np

from minipali.checkpoint.config import parse_config
from minipali.checkpoint.hub import save
from minipali.files import read_json, write_json
from minipali.learning.initialize import order_locations, random_params
from minipali.learning.loop import Schedule, train
from minipali.small_world import patch_labels
from minipali.small_world.stages import Contrastive
from minipali.small_world.vocabulary import ROWS
from minipali.small_world.world import SIDE

VISION = {"model_type": "siglip_vision_model", "hidden_size": 192, "intermediate_size": 416, "num_hidden_layers": 6,
          "num_attention_heads": 6, "image_size": SIDE, "patch_size": 14}
SIGLIP = {
    "architectures": ["SiglipModel"], "model_type": "siglip", "vision_config": VISION,
    "text_config": {"model_type": "siglip_text_model", "hidden_size": 96, "intermediate_size": 384,
                    "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": ROWS, "projection_size": 192,
                    "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}}
PALIGEMMA = {
    "architectures": ["PaliGemmaForConditionalGeneration"], "model_type": "paligemma", "image_token_index": ROWS - 1,
    "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "hidden_size": 128, "projection_dim": 128,
    "vision_config": {**VISION, "vision_use_head": False, "projection_dim": 128},
    "text_config": {"model_type": "gemma", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3,
                    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": ROWS,
                    "max_position_embeddings": 512, "hidden_activation": "gelu_pytorch_tanh", "pad_token_id": 0,
                    "bos_token_id": 2, "eos_token_id": 1, "num_image_tokens": (SIDE // 14) ** 2}}
PREPROCESSOR = {
    "image_processor_type": "SiglipImageProcessor", "processor_class": "PaliGemmaProcessor", "do_convert_rgb": True,
    "do_resize": True, "size": {"height": SIDE, "width": SIDE}, "resample": 3, "do_rescale": True,
    "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    "image_seq_length": (SIDE // 14) ** 2}
# `captions.canonical_text` as steps of a tokenizer.json.
PUNCTUATION = "[" + "".join(f"\\{character}" for character in string.punctuation) + "]"
CLEANING = [{"type": "Replace", "pattern": {"String": "_"}, "content": " "}, {"type": "Lowercase"},
            {"type": "Replace", "pattern": {"Regex": PUNCTUATION}, "content": ""},
            {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
            {"type": "Strip", "strip_left": True, "strip_right": True}]
CONTRASTIVE_STEPS, STEPS = 3600, 12000  # of the first stage and of the second
LATE_STEPS = 600  # of the second stage, in which the tower's rate rises
MUON = {"muon": 6.0, "beta1": 0.95, "decay": 0.1}
PICTURES = {"shapes": 9, "drawn": 44, "captioned": 28, "wrong": 12, "easy": 4, "text": 7}  # of a batch of stage 1
# Of stage 2: the share of the pictures, and how many prompts about each.
SOURCES = {"drawings": (0.46, 4), "world": (0.19, 4), "text": (0.29, 1), "easy_vqa": (0.03, 3),
           "easy_vqa_like": (0.03, 3)}


def write_model(folder, params):
    """PaliGemma in the hub's layout, beside its tokenizer, which is there already; weights in bfloat16."""
    save(folder, PALIGEMMA, params, "bfloat16")
    write_json(folder / "preprocessor_config.json", PREPROCESSOR, indent=1)


def write_pair(folder, params, tokenizer_folder):
    """The SigLIP pair likewise, with a tokenizer that cleans captions, appends EOS, adds no BOS and pads on the right.

    The hub's SiglipProcessor then encodes a caption to the same ids as this package.
    """
    save(folder, SIGLIP, params, "bfloat16")
    siglip = {"processor_class": "SiglipProcessor"}
    fields = {name: value for name, value in PREPROCESSOR.items() if name != "image_seq_length"}
    write_json(folder / "preprocessor_config.json", fields | siglip, indent=1)
    spec, about = (read_json(tokenizer_folder / name) for name in ("tokenizer.json", "tokenizer_config.json"))
    spec["normalizer"] = {"type": "Sequence", "normalizers": [*CLEANING, spec["normalizer"]]}
    a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    end = {"SpecialToken": {"id": "<eos>", "type_id": 0}}
    spec["post_processor"] = {"type": "TemplateProcessing", "single": [a, end], "pair": [a, b, end],
                              "special_tokens": {"<eos>": {"id": "<eos>", "ids": [1], "tokens": ["<eos>"]}}}
    write_json(folder / "tokenizer.json", spec, indent=1)
    # GemmaTokenizer would put BOS in front and pad on the left, whatever the files say.
    write_json(folder / "tokenizer_config.json", about | siglip | {
        "add_bos_token": False, "add_eos_token": True, "padding_side": "right",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": SIGLIP["text_config"]["max_position_embeddings"]}, indent=1)


def patch_head(width, rng):
    """The layer that predicts what lies on each patch; only the first stage has it."""
    weight = rng.standard_normal((patch_labels.ANSWERS, width)) * 0.05
    return {"weight": weight.astype(np.float32), "bias": np.zeros(patch_labels.ANSWERS, np.float32)}


def first_stage(tokenizer, args, artists, codes_of, how):
    """Train the pair, write it and return its weights."""
    rng, pair_cfg = np.random.default_rng(args.seed), parse_config(SIGLIP)
    start = {**random_params(pair_cfg, rng), "patch_head": patch_head(VISION["hidden_size"], rng)}
    stage = Contrastive(pair_cfg, tokenizer, args.seed, **PICTURES, artists=artists, codes_of=codes_of)
    pair = train(stage, start,
                 Schedule(args.contrastive_steps, rate=1e-3, warmup=200, fall=args.contrastive_steps // 4, **MUON),
                 args.runs / "contrastive.safetensors", **how)
    del pair["patch_head"]
    write_pair(args.out / "siglip", pair, args.out)
    return pair


def second_start(cfg, pair, tokenizer, seed):
    """What the second stage starts from: the pair's tower, all other weights random."""
    params = random_params(cfg, np.random.default_rng(seed))
    order_locations(params, tokenizer)
    tower = pair["vision_model"]
    params["vision_tower"]["vision_model"] = {name: tower[name] for name in params["vision_tower"]["vision_model"]}
    return params
