"""Train the default model from nothing, with this repository's own NumPy code:

    OPENBLAS_NUM_THREADS=1 python -m minipali.train --out weights

(One BLAS thread: matrices of this size gain little from two, and lose nearly everything when another program wants the
other core.) Two stages, as in the papers: a vision tower against a text tower on pictures and captions (SigLIP), then the whole
PaliGemma on prompts and answers. Ctrl-C stops after the current step with everything saved; the same command goes on.
"""
import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np

from minipali.io.backend import BACKENDS
from minipali.io.config import Unusable, parse_config
from minipali.io.tokenizer import Tokenizer
from minipali.io.weights import save
from minipali.learning.initialize import order_locations, random_params
from minipali.learning.loop import Course, Stopped, train
from minipali.learning.stages import Contrastive, PrefixLM, WordTokenizer
from minipali.learning.vocabulary import write as write_tokenizer
from minipali.learning.world import SIDE

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

# Share of the pictures, and how many prompts about each.
SOURCES = {"world": (0.66, 3), "easy_vqa": (0.14, 3), "easy_vqa_like": (0.20, 3)}


def write_model(folder, config, params, tokenizer_folder):
    """A hub-layout folder: weights in bfloat16, config, preprocessor and tokenizer."""
    save(folder, config, params, "bfloat16")
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")
    for file in tokenizer_folder.glob("tokenizer*.json"):
        if folder != tokenizer_folder:
            shutil.copyfile(file, folder / file.name)


def main(argv):
    parser = argparse.ArgumentParser(prog="minipali.train", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="where the trained model goes")
    add("--runs", type=Path, default=Path("runs"), metavar="DIR", help="where unfinished runs are kept (default runs/)")
    add("--seed", type=int, default=0, metavar="S", help="of the first weights and of every picture (default 0)")
    add("--contrastive-steps", type=int, default=2000, metavar="N", help="of 64 pictures each (default 2000)")
    add("--pair-steps", type=int, default=1500, metavar="N", help="more of these for the pair alone (default 1500)")
    add("--steps", type=int, default=10500, metavar="N", help="of the second stage, 16 pictures each (default 10500)")
    add("--workers", type=int, default=1, metavar="N", help="processes that draw pictures ahead (default 1)")
    add("--backend", choices=BACKENDS, default="numpy", help="where to compute (default numpy)")
    args = parser.parse_args(argv)

    write_tokenizer(args.out)
    tokenizer = WordTokenizer(Tokenizer.from_file(args.out / "tokenizer.json"))
    how = {"workers": args.workers, "backend": args.backend}
    rng = np.random.default_rng(args.seed)

    pair_cfg, cfg = parse_config(SIGLIP), parse_config(PALIGEMMA)
    pair = train(Contrastive(pair_cfg, tokenizer, args.seed, 64), random_params(pair_cfg, rng),
                 Course(args.contrastive_steps, rate=1.5e-3, warmup=150), args.runs / "contrastive.safetensors", **how)
    # The pair that ships goes on alone; the whole model starts from the tower as it is here.
    longer = train(Contrastive(pair_cfg, tokenizer, args.seed + 1, 64), pair,
                   Course(args.pair_steps, rate=8e-4, warmup=50), args.runs / "pair.safetensors", **how)
    write_model(args.out / "siglip", SIGLIP, longer, args.out)

    params = random_params(cfg, rng)
    order_locations(params, tokenizer)
    tower = pair["vision_model"]
    params["vision_tower"]["vision_model"] = {name: tower[name] for name in params["vision_tower"]["vision_model"]}
    trained = train(PrefixLM(cfg, tokenizer, args.seed, 16, SOURCES), params,
                    Course(args.steps, rate=1.5e-3, warmup=300), args.runs / "prefix-lm.safetensors", **how)
    write_model(args.out, PALIGEMMA, trained, args.out)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Unusable as error:
        sys.exit(f"minipali.train: error: {error}")
    except Stopped:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)
