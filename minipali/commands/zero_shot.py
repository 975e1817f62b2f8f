"""Which of these captions fits the picture? The contrastive pair answers, for any list of captions.

    python -m minipali zero-shot photo.png "a large red circle" "a small blue star"
    python -m minipali zero-shot --matrix similarity.png         held-out pictures against one another's captions
"""
import numpy as np

from minipali.decoding.pair import PAIR, load_pair
from minipali.errors import InputError, Parser, path_name
from minipali.inputs.image import open_image
from minipali.model.ops import sigmoid
from minipali.outputs.picture_file import check_picture_file, save_picture
from minipali.outputs.sheets import similarity_picture
from minipali.small_world.scores import held_out


def draw_matrix(pair, path, count=8):
    """Write a picture of how likely the pair finds each of `count` captions for each of their pictures."""
    pictures, captions = held_out((0,), count)
    save_picture(similarity_picture(sigmoid(pair.logits(pictures, captions)), pictures, captions), path)


def main(argv):
    parser = Parser("minipali zero-shot", "Which of these captions fits the picture? The contrastive pair answers, for "
                    "any list of captions.",
                    '  python -m minipali zero-shot weights/examples/cross.png "a large red cross at the top left" '
                    '"a small red star"\n'
                    "  python -m minipali zero-shot --matrix similarity.png")
    parser.add_argument("image", nargs="?", metavar="IMAGE", help="a picture file")
    parser.add_argument("captions", nargs="*", metavar="CAPTION",
                        help="a text that may fit; each gets a probability of its own, the likeliest first")
    parser.add_argument("--model", type=path_name, default=PAIR, metavar="PATH",
                        help="a SigLIP folder, or a big_vision .npz with its tokenizer beside it (default: "
                        "weights/siglip)")
    parser.add_argument("--matrix", type=path_name, metavar="FILE",
                        help="in place of IMAGE and CAPTION: draw the probabilities of 8 held-out pictures and "
                        "captions")
    args = parser.parse_intermixed_args(argv)
    if bool(args.matrix) == bool(args.captions) or args.matrix and args.image:
        raise InputError("expected a picture and at least one caption, or --matrix FILE and neither")
    if args.matrix:
        check_picture_file(args.matrix)
        return draw_matrix(load_pair(args.model), args.matrix)
    picture = open_image(args.image)
    [logits] = load_pair(args.model).logits([picture], args.captions)
    for i in np.argsort(-logits, kind="stable"):
        # Each probability is a yes/no of its own: several captions may fit, or none, and they need not sum to 1.
        print(f"{sigmoid(logits[i]):7.2%}  {args.captions[i]}")
