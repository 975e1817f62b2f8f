"""What the committed weights know, measured on pictures that no training ever saw:

    python -m minipali evaluate

prints one table: captions and questions answered exactly right, objects found, masks, texts read, retrieval with the
contrastive pair, then the same of drawings, by artists of the training sets and by one that was kept out of them (which
needs the cache that `python -m minipali.small_world.artwork` makes), and last the easy-VQA test split (which needs
the package easy-vqa).
"""
import itertools
import sys
import time
from pathlib import Path

from PIL import Image

from minipali.checkpoint import choice
from minipali.decoding.loaded_model import open_model
from minipali.decoding.pair import load_pair
from minipali.errors import InputError, Parser, Progress, integer, named_options, path_name
from minipali.outputs.picture_file import check_picture_file, save_picture
from minipali.outputs.sheets import contact_sheet
from minipali.small_world import easy_vqa
from minipali.small_world.artwork import VALIDATION
from minipali.small_world.drawing_scores import ARTISTS, drawing_retrieval, drawing_rows, failures, knows_names
from minipali.small_world.drawings import draw, gallery
from minipali.small_world.scores import answers, easy_vqa_test, retrieval, scenes_of, small_world

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"
PICTURES = 1000  # held-out scenes, and pictures of the easy-VQA test split


def options(argv):
    """The command's options, checked."""
    parser = Parser("minipali evaluate", "Measure what a model knows of the small world, on pictures that no training "
                    "ever saw.",
                    "  python -m minipali evaluate\n"
                    "  python -m minipali evaluate --pictures 100 --easy-vqa 0\n"
                    "  python -m minipali evaluate --sheet captions.png")
    add = parser.add_argument
    add("--model", type=path_name, default=WEIGHTS, metavar="PATH", help="default: weights/")
    add("--pictures", type=integer(0), metavar="N", help=f"held-out scenes (default {PICTURES}; 0: none)")
    add("--drawings", type=integer(0), metavar="N",
        help="held-out scenes of drawings, of each of four kinds: one drawing or several, by artists seen or new, for "
        f"which the cache of drawings is needed (default {PICTURES} for a model that learned drawings; 0: none)")
    add("--easy-vqa", type=integer(0), metavar="N",
        help=f"pictures of the easy-VQA test split, for which the package easy-vqa is needed (default {PICTURES}, all "
        "of them; 0: none)")
    add("--weights", choices=choice.WEIGHTS, help="how the model's matrices are held (default: as in run.py)")
    add("--sheet", type=path_name, metavar="FILE",
        help="measure nothing, and draw twelve held-out pictures with what the model says of them, right or wrong")
    add("--failures", type=path_name, metavar="FILE",
        help="measure nothing, and draw twelve held-out pictures by the new artist whose caption by the model is wrong")
    args = parser.parse_args(argv)
    counts = {"--pictures": args.pictures, "--drawings": args.drawings, "--easy-vqa": args.easy_vqa}
    names = named_options({name: count is not None for name, count in counts.items()})
    for option, path in ("--sheet", args.sheet), ("--failures", args.failures):
        if path and names:
            raise InputError(f"{option}: nothing is measured, so not with {names}")
        if path:
            check_picture_file(path)
    if args.sheet and args.failures:
        raise InputError("--sheet and --failures: expected one of the two")
    args.pictures, args.easy_vqa = (PICTURES if n is None else n for n in (args.pictures, args.easy_vqa))
    return args


def drawings_for(tokenizer, wanted):
    """How many scenes of drawings to show: as many as are wanted, by default none if the names are unknown."""
    if wanted is not None:
        return wanted
    return PICTURES if knows_names(tokenizer) else 0


def draw_sheet(model, path):
    """Write twelve held-out pictures with the model's captions as one picture; eight of them are drawings by the
    validation artist, if the model learned drawings."""
    shown = gallery((VALIDATION,)) if knows_names(model.tokenizer) else None
    drawn = [draw(number, shown, "test") for number in range(8)] if shown else []
    pictures = [Image.fromarray(scene.image) for scene in [*drawn, *scenes_of(12 - len(drawn))]]
    captions = answers(model, pictures, [(number, "caption en") for number in range(12)])
    save_picture(contact_sheet(pictures, captions, columns=4), path)


def main(argv):
    args, started = options(argv), time.monotonic()
    measures = not (args.sheet or args.failures)
    model = open_model(args.model)
    if model.preprocessor is None:
        raise InputError(f"{args.model}: a text model, expected one that sees pictures")
    if model.tokenizer is None:
        raise InputError(f"{args.model}: neither tokenizer.json nor tokenizer.model is there")
    if args.easy_vqa and measures:
        easy_vqa.load("test")  # a missing package is better reported now than at the end
    model = model.with_weights("float32", args.weights)
    if args.sheet:
        draw_sheet(model, args.sheet)
        return
    folder = Path(args.model) / "siglip"
    pair = load_pair(folder) if measures and folder.is_dir() else None
    asked, judged = (drawings_for(one.tokenizer, args.drawings) if one and measures else 0 for one in (model, pair))
    galleries = {whose: gallery(artists) for whose, artists in ARTISTS.items()} if asked or judged else {}
    with Progress("minipali evaluate", sys.stderr.isatty()) as progress:

        def note(done, of):
            progress.update(f"{done}/{of} prompts, {time.monotonic() - started:.0f} s")

        if args.failures:
            wrong = failures(model, gallery(ARTISTS["new artist"]), 12, note)
            save_picture(contact_sheet(*zip(*wrong), columns=4), args.failures)
            return
        rows = [small_world(model, args.pictures, note)] if args.pictures else []
        if args.pictures and pair:
            rows.append(retrieval(pair, -(-args.pictures // 64)))
        for whose, shown in galleries.items():
            if asked:
                rows.append(drawing_rows(model, shown, whose, asked, note))
            if judged:
                rows.append(drawing_retrieval(pair, shown, whose, -(-judged // 64)))
        if args.easy_vqa:
            rows.append(easy_vqa_test(model, args.easy_vqa, note))
        for what, right, of in itertools.chain(*rows):
            progress.clear()
            width = 44 if galleries else 34
            print(f"{what:{width}} {right:6.0f} of {of:6}  {100 * right / max(of, 1):6.2f} %", flush=True)
