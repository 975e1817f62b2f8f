"""Train the default model from nothing, with this repository's own NumPy code:

    python -m minipali.commands.train --out weights

Two stages, as in the papers: a vision tower against a text tower on pictures and captions (SigLIP), every patch also
asked what lies on it, then the whole PaliGemma on prompts and answers. A step's gradient is the mean of two batches', computed side by side. Ctrl-C stops
after the current step with everything saved; the same command goes on. With --data, see learning/fine_tune.py.
"""
import argparse
import os
import sys
from pathlib import Path

import numpy as np

from minipali.backend import BACKENDS
from minipali.checkpoint.config import Unusable, parse_config, read_json
from minipali.inputs.tokenizer import Tokenizer
from minipali.checkpoint.safetensors_file import load, save
from minipali.small_world import easy_vqa, patch_labels as patches
from minipali.learning.fine_tune import add_options, check_options, fine_tune
from minipali.learning.initialize import order_locations, random_params
from minipali.learning.loop import Course, Stopped, train
from minipali.small_world.stages import Contrastive, MaskCodes, PrefixLM, WordTokenizer
from minipali.small_world.vocabulary import write as write_tokenizer
from minipali.small_world.vocabulary import write_json
from minipali.small_world.world import SIDE

VISION = {"model_type": "siglip_vision_model", "hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4,
          "num_attention_heads": 4, "image_size": SIDE, "patch_size": 14}
SIGLIP = {
    "architectures": ["SiglipModel"], "model_type": "siglip", "vision_config": VISION,
    "text_config": {"model_type": "siglip_text_model", "hidden_size": 96, "intermediate_size": 384,
                    "num_hidden_layers": 3, "num_attention_heads": 3, "vocab_size": 2048, "projection_size": 128,
                    "max_position_embeddings": 48, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}}
PALIGEMMA = {
    "architectures": ["PaliGemmaForConditionalGeneration"], "model_type": "paligemma", "image_token_index": 2047,
    "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "hidden_size": 128, "projection_dim": 128,
    "vision_config": {**VISION, "vision_use_head": False, "projection_dim": 128},
    "text_config": {"model_type": "gemma", "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 3,
                    "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 2048,
                    "max_position_embeddings": 512, "hidden_activation": "gelu_pytorch_tanh", "pad_token_id": 0,
                    "bos_token_id": 2, "eos_token_id": 1, "num_image_tokens": (SIDE // 14) ** 2}}
PREPROCESSOR = {
    "image_processor_type": "SiglipImageProcessor", "processor_class": "PaliGemmaProcessor", "do_convert_rgb": True,
    "do_resize": True, "size": {"height": SIDE, "width": SIDE}, "resample": 3, "do_rescale": True,
    "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
    "image_seq_length": (SIDE // 14) ** 2}

AUTOENCODER = Path(__file__).resolve().parents[2] / "weights" / "vae-oid.npz"
STEPS = 12000  # of the second stage
MUON = {"muon": 6.0, "beta1": 0.95, "decay": 0.1}

# Share of the pictures, and how many prompts about each.
SOURCES = {"world": (0.64, 4), "text": (0.28, 1), "easy_vqa": (0.04, 3), "easy_vqa_like": (0.04, 3)}


def write_model(folder, params):
    """PaliGemma in the hub's layout, beside its tokenizer, which is there already; weights in bfloat16."""
    save(folder, PALIGEMMA, params, "bfloat16")
    write_json(folder / "preprocessor_config.json", PREPROCESSOR)


def write_pair(folder, params, tokenizer_folder):
    """The SigLIP pair likewise, with the tokenizer as captions need it: EOS behind, no BOS, padding on the right.

    The hub's SiglipProcessor then makes what we make of a caption that is `canonical`.
    """
    save(folder, SIGLIP, params, "bfloat16")
    siglip = {"processor_class": "SiglipProcessor"}
    fields = {name: value for name, value in PREPROCESSOR.items() if name != "image_seq_length"}
    write_json(folder / "preprocessor_config.json", fields | siglip)
    spec, about = (read_json(tokenizer_folder / name) for name in ("tokenizer.json", "tokenizer_config.json"))
    a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    end = {"SpecialToken": {"id": "<eos>", "type_id": 0}}
    spec["post_processor"] = {"type": "TemplateProcessing", "single": [a, end], "pair": [a, b, end],
                              "special_tokens": {"<eos>": {"id": "<eos>", "ids": [1], "tokens": ["<eos>"]}}}
    write_json(folder / "tokenizer.json", spec)
    # GemmaTokenizer would put BOS in front and pad on the left, whatever the files say.
    write_json(folder / "tokenizer_config.json", about | siglip | {
        "add_bos_token": False, "add_eos_token": True, "padding_side": "right",
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": SIGLIP["text_config"]["max_position_embeddings"]})


def patch_head(width, rng):
    """The layer that answers for each patch what lies on it; only the first stage has it."""
    weight = rng.standard_normal((patches.ANSWERS, width)) * 0.05
    return {"weight": weight.astype(np.float32), "bias": np.zeros(patches.ANSWERS, np.float32)}


def first_stage(cfg, tokenizer, args, how):
    """Trains the pair and writes it; returns what the second stage starts from: its tower, the rest at random."""
    rng, pair_cfg, codes_of = np.random.default_rng(args.seed), parse_config(SIGLIP), MaskCodes(AUTOENCODER)
    start = {**random_params(pair_cfg, rng), "patch_head": patch_head(VISION["hidden_size"], rng)}
    pair = train(Contrastive(pair_cfg, tokenizer, args.seed, 32, 4, 12, codes_of), start,
                 Course(args.contrastive_steps, rate=1e-3, warmup=100, **MUON),
                 args.runs / "contrastive.safetensors", **how)
    del pair["patch_head"]
    write_pair(args.out / "siglip", pair, args.out)
    params = random_params(cfg, rng)
    order_locations(params, tokenizer)
    tower = pair["vision_model"]
    params["vision_tower"]["vision_model"] = {name: tower[name] for name in params["vision_tower"]["vision_model"]}
    return params


def whole(text):
    """The type of an option that counts: 0, 1, 2, ..."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def main(argv):
    parser = argparse.ArgumentParser(prog="minipali.commands.train", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="where the trained model goes")
    add("--runs", type=Path, default=Path("runs"), metavar="DIR", help="where unfinished runs are kept (default runs/)")
    add("--from", dest="start", type=Path, metavar="DIR",
        help="go on from the PaliGemma in this folder: the second stage alone; with --data any PaliGemma")
    add("--seed", type=whole, default=0, metavar="S", help="of the first weights and of every picture (default 0)")
    add("--contrastive-steps", type=whole, default=2500, metavar="N",
        help=f"of the first stage, {Course.shards} x 48 pictures each (default 2500)")
    add("--steps", type=whole, metavar="N", help=f"of the second stage, {Course.shards} x 24 pictures each (default "
        f"{STEPS}); with --data of fine-tuning (default: three times through the file)")
    cores = min(os.cpu_count() or 1, Course.shards)
    add("--workers", type=whole, metavar="N", help="processes beside this one, which change no result: "
        f"they compute a step's {Course.shards} gradients, or draw pictures ahead for a GPU (default {cores}: one for "
        f"each core, at most {Course.shards}; with --data 0)")
    add("--backend", choices=BACKENDS, default="numpy", help="where to compute (default numpy)")
    add_options(parser)
    args = parser.parse_args(argv)
    check_options(args)
    if args.workers is None:
        args.workers = 0 if args.data else cores
    if args.data:
        return fine_tune(args)
    args.steps = STEPS if args.steps is None else args.steps

    if args.steps:
        easy_vqa.load("test")  # if the package is missing, that is better said now than after the first stage
    try:
        write_tokenizer(args.out)
    except OSError as error:
        raise Unusable(f"{args.out}: cannot be written ({error.strerror})") from None
    tokenizer = WordTokenizer(Tokenizer.from_file(args.out / "tokenizer.json"))
    how = {"workers": args.workers, "backend": args.backend}

    cfg = parse_config(PALIGEMMA)
    if args.start:
        found, params = load(args.start)
        if found != cfg:
            raise Unusable(f"{args.start / 'config.json'}: another model than the default's, which alone is trained here")
    else:
        params = first_stage(cfg, tokenizer, args, how)
    stage = PrefixLM(cfg, tokenizer, args.seed, 24, SOURCES, MaskCodes(AUTOENCODER))
    # Where the language model knows nothing yet, what it first asks of the tower is wrong: as in the paper, the tower then
    # comes up to its rate slowly.
    slow = {} if args.start else {"late": "vision_tower.", "late_steps": args.steps // 5}
    course = Course(args.steps, rate=1e-3, warmup=100, **slow, **MUON)
    trained = train(stage, params, course, args.runs / "prefix-lm.safetensors", **how)
    write_model(args.out, trained)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Unusable as error:
        print(f"minipali.commands.train: error: {error}", file=sys.stderr)
        sys.exit(2)
    except (Stopped, KeyboardInterrupt):
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
