"""Where each token of an answer looked, and what the model would have said after each layer:

    python -m minipali lens photo.png "caption en"
    python -m minipali lens photo.png "detect cat" --layer 1 --head 0 --step 5 --out lens.png

prints both as tables, the attention of one step as a map, and writes the maps of all steps as one picture.
"""
import shutil
from pathlib import Path

import numpy as np

from minipali.decoding.generate import generate
from minipali.decoding.loaded_model import check_ids, encode_prompt, open_model
from minipali.decoding.sampling import Decoding
from minipali.errors import InputError, Parser, integer, path_name
from minipali.inputs.image import open_image
from minipali.looking.gather import observe, token_texts
from minipali.looking.lens import (
    attention_lines,
    chosen_attention,
    grids,
    lens_lines,
    map_lines,
    printable,
    sheet,
)
from minipali.outputs.picture_file import check_picture_file, save_picture

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"


def _within(option, value, count, least=0):
    """Raise InputError for a number that is none of `count`."""
    if value is not None and not least <= value < count:
        raise InputError(f"{option}: {value} is out of range, expected a number from {least} to {count - 1}")


def main(argv):
    parser = Parser("minipali lens", "Where each token of an answer looked, and what the model would have said after "
                    "each layer.",
                    '  python -m minipali lens weights/examples/shapes.png "caption en"\n'
                    '  python -m minipali lens photo.png "detect cat" --layer 1 --head 0 --step 5 --out lens.png')
    parser.add_argument("image", metavar="IMAGE", help="a picture file")
    parser.add_argument("prompt", nargs="?", default="caption en", metavar="PROMPT", help='default: "caption en"')
    parser.add_argument("--model", type=path_name, default=WEIGHTS, metavar="PATH", help="default: weights/")
    parser.add_argument("--layer", type=integer(0), metavar="L",
                        help="attention of this layer (default: the mean of all)")
    parser.add_argument("--head", type=integer(0), metavar="N",
                        help="attention of this head (default: the mean of all)")
    parser.add_argument("--step", type=integer(1), metavar="T",
                        help="the token of the answer whose map is drawn, counted from 1 (default: the one that "
                             "looked at one place most)")
    parser.add_argument("--max-new-tokens", type=integer(1), default=64, metavar="N",
                        help="stop after N tokens (default 64)")
    parser.add_argument("--out", type=path_name, metavar="FILE", help="write the maps of all steps as a picture")
    args = parser.parse_intermixed_args(argv)
    if args.out is not None:
        check_picture_file(args.out)
    decoding = Decoding(max_new_tokens=args.max_new_tokens)
    picture, model = open_image(args.image), open_model(args.model)
    if model.preprocessor is None:
        raise InputError(f"{args.model}: a text model, expected one that sees pictures")
    ids = encode_prompt(args.prompt, model)
    check_ids(ids, model.cfg)
    _within("--layer", args.layer, model.cfg.text_config.num_hidden_layers)
    _within("--head", args.head, model.cfg.text_config.num_attention_heads)
    model = model.with_weights(np.float32)
    pixels = model.preprocessor(picture)[None]
    [answer] = generate(model, model.features_of(pixels), [ids], decoding)
    seen = observe(model, pixels, ids, answer, args.max_new_tokens)
    _within("--step", args.step, len(seen.steps) + 1, 1)
    attention = chosen_attention(seen, args.layer, args.head)
    step = int(grids(seen, attention).max((1, 2, 3)).argmax()) if args.step is None else args.step - 1
    which = [f"layer {args.layer}" if args.layer is not None else "all layers",
             f"head {args.head}" if args.head is not None else "all heads"]
    print(f"Attention of the answer's tokens, {' and '.join(which)} (where they looked, and not why)\n")
    print("\n".join(attention_lines(seen, attention)))
    token = printable(token_texts(model, seen.steps)[step])
    print(f"\nStep {step + 1}, {token}, over the picture\n")
    print("\n".join(map_lines(grids(seen, attention)[step, 0])))
    print("\nLogit lens: the likeliest next token if the model ended after a layer (the last norm applied)\n")
    print("\n".join(lens_lines(seen, shutil.get_terminal_size((110, 24)).columns)).rstrip())
    if args.out is not None:
        save_picture(sheet(seen, [picture], attention), args.out)
        print(f"\n{args.out}: where each token looked, as a picture")
