"""One answer, looked at from all sides: a page for the browser, in one file, which needs nothing else.

    python -m minipali xray photo.png "caption en"
    python -m minipali xray photo.png "detect cat" --model paligemma-3b-mix-224 --out cat.html

`python run.py … --xray page.html` writes the same page beside its answer.
"""
import sys
from pathlib import Path

from minipali.commands.ask import Request, ask
from minipali.decoding.sampling import Decoding
from minipali.errors import Parser, Progress, integer, path_name
from minipali.files import check_writable

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"


def main(argv):
    parser = Parser("minipali xray", "One answer, looked at from all sides: a page for the browser, in one file.",
                    '  python -m minipali xray weights/examples/shapes.png "caption en"\n'
                    '  python -m minipali xray photo.png "detect cat" --model paligemma-3b-mix-224 --out cat.html')
    parser.add_argument("image", metavar="IMAGE", help="a picture file")
    parser.add_argument("prompt", nargs="?", default="caption en", metavar="PROMPT", help='default: "caption en"')
    parser.add_argument("--model", type=path_name, default=WEIGHTS, metavar="PATH", help="default: weights/")
    parser.add_argument("--out", type=path_name, default="xray.html", metavar="FILE", help="default: xray.html")
    parser.add_argument("--thorough", action="store_true",
                        help="compute gradients and erasing of a large model too, which may take hours")
    parser.add_argument("--max-new-tokens", type=integer(1), default=64, metavar="N",
                        help="stop after N tokens (default 64, the most that the page shows)")
    args = parser.parse_intermixed_args(argv)
    check_writable(args.out)
    request = Request(model=args.model, images=(args.image,), prompts=(args.prompt,),
                      decoding=Decoding(max_new_tokens=args.max_new_tokens), xray=args.out, thorough=args.thorough)
    with Progress("minipali xray", sys.stderr.isatty()) as progress:
        [result] = ask(request, progress)
    print(" ".join(map(str, result.answer.ids)) if result.ids_only else result.text)
    print(f"{args.out}: {Path(args.out).stat().st_size:,} bytes; open it in a browser")
