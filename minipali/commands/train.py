"""Train the default model from nothing, with this repository's own NumPy code:

    python -m minipali train --out weights

Two stages, as in the papers: a vision tower against a text tower on pictures and captions (SigLIP), every patch also
asked what lies on it, then the whole PaliGemma on prompts and answers. A step's gradient is the mean of two batches', computed side by side. Ctrl-C stops
after the current step with everything saved; the same command goes on. With --data, see learning/fine_tune.py.
"""
import argparse
import os
from pathlib import Path

from minipali.backend import BACKENDS
from minipali.checkpoint.config import parse_config
from minipali.checkpoint.hub import load
from minipali.errors import InputError
from minipali.inputs.tokenizer import Tokenizer
from minipali.learning.fine_tune import add_options, check_options, fine_tune
from minipali.learning.loop import Schedule, train
from minipali.small_world import easy_vqa
from minipali.small_world.recipe import (
    AUTOENCODER,
    MUON,
    PALIGEMMA,
    SOURCES,
    STEPS,
    first_stage,
    write_model,
)
from minipali.small_world.stages import MaskCodes, PrefixLM, WordTokenizer
from minipali.small_world.vocabulary import write as write_tokenizer


def whole(text):
    """The type of an option that counts: 0, 1, 2, ..."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return value


def main(argv):
    parser = argparse.ArgumentParser(prog="minipali train", description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR", help="where the trained model goes")
    add("--runs", type=Path, default=Path("runs"), metavar="DIR", help="where unfinished runs are kept (default runs/)")
    add("--from", dest="start", type=Path, metavar="DIR",
        help="go on from the PaliGemma in this folder: the second stage alone; with --data any PaliGemma")
    add("--seed", type=whole, default=0, metavar="S", help="of the first weights and of every picture (default 0)")
    add("--contrastive-steps", type=whole, default=2500, metavar="N",
        help=f"of the first stage, {Schedule.shards} x 48 pictures each (default 2500)")
    add("--steps", type=whole, metavar="N", help=f"of the second stage, {Schedule.shards} x 24 pictures each (default "
        f"{STEPS}); with --data of fine-tuning (default: three times through the file)")
    cores = min(os.cpu_count() or 1, Schedule.shards)
    add("--workers", type=whole, metavar="N", help="processes beside this one, which change no result: "
        f"they compute a step's {Schedule.shards} gradients, or draw pictures ahead for a GPU (default {cores}: one for "
        f"each core, at most {Schedule.shards}; with --data 0)")
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
        raise InputError(f"{args.out}: cannot be written ({error.strerror})") from None
    tokenizer = WordTokenizer(Tokenizer.from_file(args.out / "tokenizer.json"))
    how = {"workers": args.workers, "backend": args.backend}

    cfg = parse_config(PALIGEMMA)
    if args.start:
        found, params = load(args.start)
        if found != cfg:
            raise InputError(f"{args.start / 'config.json'}: another model than the default's, which alone is trained here")
    else:
        params = first_stage(cfg, tokenizer, args, how)
    stage = PrefixLM(cfg, tokenizer, args.seed, 24, SOURCES, MaskCodes(AUTOENCODER))
    # Where the language model knows nothing yet, what it first asks of the tower is wrong: as in the paper, the tower then
    # comes up to its rate slowly.
    slow = {} if args.start else {"late": "vision_tower.", "late_steps": args.steps // 5}
    course = Schedule(args.steps, rate=1e-3, warmup=100, **slow, **MUON)
    trained = train(stage, params, course, args.runs / "prefix-lm.safetensors", **how)
    write_model(args.out, trained)
