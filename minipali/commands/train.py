"""Train the default model from nothing, with this repository's own NumPy code:

    python -m minipali train --out trained

Two stages: the vision tower with a text tower on pictures and captions (SigLIP) and on what lies on each patch, then
the whole PaliGemma on prompts and answers; before them, where `vae-oid.npz` does not exist yet, the mask codec. The
drawings come from a cache that `python -m minipali.small_world.artwork` makes. A step's gradient is the mean of two
batches', computed side by side. Ctrl-C stops after the current step with everything saved; the same command continues.
With --data, see learning/fine_tune.py.
"""
import argparse
import os
import sys
from pathlib import Path

from minipali.backend import BACKENDS
from minipali.checkpoint import load_any
from minipali.checkpoint.config import parse_config
from minipali.checkpoint.safetensors_file import SAVED_AS
from minipali.decoding.loaded_model import is_text_model
from minipali.errors import InputError, Parser, integer, named_options, path_name, positive
from minipali.files import check_folder
from minipali.inputs.tokenizer import Tokenizer
from minipali.learning.fine_tune import fine_tune
from minipali.learning.loop import Schedule, train
from minipali.small_world import artwork, drawings, easy_vqa
from minipali.small_world.recipe import (
    CONTRASTIVE_STEPS,
    LATE_STEPS,
    MUON,
    PALIGEMMA,
    SIGLIP,
    SOURCES,
    STEPS,
    first_stage,
    second_start,
    write_model,
)
from minipali.small_world.stages import MaskCodes, PrefixLM, WordTokenizer
from minipali.small_world.train_masks import make as make_masks
from minipali.small_world.vocabulary import write as write_tokenizer


def path(text):
    """The type of an option that names a file or a folder."""
    return Path(path_name(text))


def patterns(text):
    """The type of an option that names weights. An unset shell variable would let everything train."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise argparse.ArgumentTypeError(f"{text!r}: expected names or patterns of names")
    return names


def options(argv):
    """The command's options, checked. Where None is the default, it matters whether an option was given."""
    cores = min(os.cpu_count() or 1, Schedule.shards)
    parser = Parser("minipali train", "Train the default model from nothing, or with --data fine-tune any PaliGemma. "
                    "Ctrl-C stops after the\ncurrent step with everything saved; the same command goes on.",
                    "  python -m minipali train --out trained\n"
                    "  python -m minipali train --from weights --data mine.jsonl --out mine\n"
                    "  python -m minipali train --from paligemma-3b-pt-224 --data mine.jsonl --out mine "
                    '--lora "language_model.*.q_proj"')
    add = parser.add_argument
    add("--out", type=path, required=True, metavar="DIR", help="where the trained model goes")
    add("--runs", type=path, default=Path("runs"), metavar="DIR", help="where unfinished runs are kept (default runs/)")
    add("--from", dest="start", type=path, metavar="DIR",
        help="go on from the PaliGemma in this folder, or from the contrastive pair of a first stage: the second "
        "stage alone; with --data any PaliGemma")
    add("--seed", type=integer(0), default=0, metavar="S",
        help="of the first weights and of every picture, or of the order of --data (default 0)")
    add("--contrastive-steps", type=integer(0), metavar="N",
        help=f"of the first stage, {Schedule.shards} x 64 pictures each (default {CONTRASTIVE_STEPS}; may be changed "
        "while the stage is in its first three quarters)")
    add("--steps", type=integer(0), metavar="N", help=f"of the second stage, {Schedule.shards} x 24 pictures each "
        f"(default {STEPS}; may be changed in its first two fifths); with --data of fine-tuning (default: three times "
        "through the file)")
    add("--workers", type=integer(0), metavar="N", help="processes beside this one, which change no result: "
        f"they compute a step's {Schedule.shards} gradients, or draw pictures ahead for a GPU (default {cores}: one "
        f"for each core, at most {Schedule.shards}; with --data 0)")
    add("--all-artists", action="store_true",
        help=f"train also on {artwork.VALIDATION}, the validation artist (never on {artwork.TEST}, the test artist)")
    add("--backend", choices=BACKENDS, default="numpy", help="where to compute (default numpy)")
    add = parser.add_argument_group("fine-tuning the model of --from (a folder or a big_vision .npz)").add_argument
    add("--data", type=path, metavar="FILE",
        help='a picture, prompt and answer a line: {"image", "prefix", "suffix"}')
    add("--batch", type=integer(1), metavar="N", help="pictures a step (default 8)")
    add("--rate", type=positive, metavar="X", help="the highest learning rate (default 1e-5, with --lora 1e-4)")
    add("--freeze", type=patterns, action="extend", metavar="NAMES", help='weights that stay, such as "vision_tower.*"')
    add("--lora", type=patterns, action="extend", metavar="NAMES",
        help='learn only low-rank matrices beside those of these modules, such as "language_model.*.q_proj"')
    add("--rank", type=integer(1), metavar="N", help="of the low-rank matrices (default 8)")
    add("--alpha", type=positive, metavar="X", help="their product counts alpha/rank times (default 16)")
    add("--dtype", choices=SAVED_AS, help="of the weights that are written (default: that of --from)")
    args = parser.parse_args(argv)
    check_combination(args)
    if args.start and is_text_model(args.start):
        raise InputError(f"--from: {args.start} is a text model, which sees no pictures; expected a PaliGemma")
    check_folder(args.out)  # both are better refused now than after the training
    check_folder(args.runs)
    if args.workers is None:
        args.workers = 0 if args.data else cores
    return args


def check_combination(args):
    """Raise InputError for options that exclude one another, and for one that would be ignored in silence."""
    tuning = ("batch", "rate", "freeze", "lora", "rank", "alpha", "dtype")
    if names := args.data is None and named_options({f"--{name}": getattr(args, name) for name in tuning}):
        raise InputError(f"{names}: only for fine-tuning, with --data FILE.jsonl")
    if args.data is not None and args.start is None:
        raise InputError("--data: expected the model that is to learn it as well, --from DIR")
    if args.lora and args.freeze:
        raise InputError("--lora and --freeze: expected one of the two, since LoRA leaves all weights as they are")
    if names := not args.lora and named_options({"--rank": args.rank, "--alpha": args.alpha}):
        raise InputError(f"{names}: only with --lora")
    if args.data and args.all_artists:
        raise InputError("--all-artists: not with --data, which has pictures of its own")
    if args.start and args.contrastive_steps is not None:
        raise InputError("--contrastive-steps: not with --from, whose model has the first stage behind it")


def main(argv):
    args = options(argv)
    if args.data:
        return fine_tune(args)
    args.steps = STEPS if args.steps is None else args.steps
    args.contrastive_steps = CONTRASTIVE_STEPS if args.contrastive_steps is None else args.contrastive_steps

    artists = (*drawings.TRAINED_ON, artwork.VALIDATION) if args.all_artists else drawings.TRAINED_ON
    drawings.gallery(artists)  # a missing cache is better reported now than by a worker
    cfg, pair_cfg = parse_config(PALIGEMMA), parse_config(SIGLIP)
    if args.start:
        start_cfg, params = load_any(args.start)
        if start_cfg not in (cfg, pair_cfg):
            raise InputError(f"{args.start}: another model than the default's, which alone is trained "
                             "without --data")
    if args.steps:
        easy_vqa.load("test")  # a missing package is better reported now than after the first stage
    write_tokenizer(args.out)
    tokenizer = WordTokenizer(Tokenizer.from_file(args.out / "tokenizer.json"))
    make_masks(args.out / "vae-oid.npz", args.runs, sys.stderr)
    codes_of = MaskCodes(args.out / "vae-oid.npz")
    how = {"workers": args.workers, "backend": args.backend}
    if not args.start:
        start_cfg, params = pair_cfg, first_stage(tokenizer, args, artists, codes_of, how)
    is_new = start_cfg == pair_cfg
    if is_new:
        params = second_start(cfg, params, tokenizer, args.seed)
    stage = PrefixLM(cfg, tokenizer, args.seed, 24, SOURCES, codes_of, artists)
    # A language model that knows nothing yet sends the tower useless gradients: as in the paper, the tower's rate then
    # rises slowly.
    slow = {"late": "vision_tower.", "late_steps": min(LATE_STEPS, args.steps // 5)} if is_new else {}
    # Most of what is learned is learned while the rate falls (weights/README.md), so it falls for most of the way.
    schedule = Schedule(args.steps, rate=1e-3, warmup=100, fall=args.steps * 3 // 5, **slow, **MUON)
    trained = train(stage, params, schedule, args.runs / "prefix-lm.safetensors", **how)
    write_model(args.out, trained)
    return 0
