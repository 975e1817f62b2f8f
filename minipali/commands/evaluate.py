"""What the committed weights know, measured on pictures that no training ever saw:

    python -m minipali evaluate

prints one table: captions and questions answered exactly right, objects found, masks, texts read, retrieval with the
contrastive pair, and last the easy-VQA test split (which needs the package easy-vqa).
"""
import argparse
import itertools
import sys
import time
from pathlib import Path

from PIL import Image

from minipali.decoding.loaded_model import load_model
from minipali.decoding.pair import load_pair
from minipali.errors import InputError
from minipali.outputs.picture_file import save_picture
from minipali.outputs.sheets import contact_sheet
from minipali.small_world.scores import (
    answers,
    easy_vqa_test,
    retrieval,
    scenes_of,
    small_world,
)


def main(argv):
    parser = argparse.ArgumentParser(prog="minipali evaluate", description=__doc__.split("\n")[0])
    weights = Path(__file__).resolve().parents[2] / "weights"
    parser.add_argument("--model", type=Path, default=weights, metavar="PATH", help="default: weights/")
    parser.add_argument("--pictures", type=int, default=1000, metavar="N", help="held-out scenes (default 1000)")
    parser.add_argument("--easy-vqa", type=int, default=1000, metavar="N", help="its test pictures (default 1000, all)")
    parser.add_argument("--sheet", metavar="FILE", help="measure nothing, and draw twelve held-out pictures with what the "
                        "model says of them, right or wrong")
    args = parser.parse_args(argv)
    if min(args.pictures, args.easy_vqa) < 0:
        raise InputError("--pictures and --easy-vqa: expected numbers from 0")
    started, shows_progress = time.monotonic(), sys.stderr.isatty()

    def note(done, of):
        if shows_progress:
            line = f"{done}/{of} prompts, {time.monotonic() - started:.0f} s"
            print(f"\r{line:<40}", end="\r" if done == of else "", file=sys.stderr, flush=True)

    model = load_model(args.model)
    if model.preprocessor is None:
        raise InputError(f"{args.model}: a text model, expected one that sees pictures")
    if args.sheet:
        pictures = [Image.fromarray(scene.image) for scene in scenes_of(12)]
        captions = answers(model, pictures, [(number, "caption en") for number in range(12)])
        return save_picture(contact_sheet(pictures, captions, columns=4), args.sheet)
    rows = [small_world(model, args.pictures, note)] if args.pictures else []
    if args.pictures and (args.model / "siglip").is_dir():
        rows.append(retrieval(load_pair(args.model / "siglip"), -(-args.pictures // 64)))
    if args.easy_vqa:
        rows.append(easy_vqa_test(model, args.easy_vqa, note))
    for what, right, of in itertools.chain(*rows):
        print(f"{what:34} {right:6.0f} of {of:6}  {100 * right / max(of, 1):6.2f} %", flush=True)
