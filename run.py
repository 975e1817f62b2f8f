"""Ask PaliGemma about a picture.

    python run.py                                              the model in weights/ says what is in a bundled picture
    python run.py photo.jpg "answer en how many stars are there?"
    python run.py photo.jpg "detect red circle" --save-image boxes.png
    python run.py photo.jpg "detect cat ; dog" --constrain --beams 4 --verbose
    python run.py photo.jpg "answer en is it raining?" --score yes --score no
    python run.py photo.jpg "caption en" --model paligemma-3b-mix-224
    python run.py --no-image "The capital of France is" --model gemma-3-270m
    python run.py photo.jpg "caption en" --ask "detect cat"    two questions, and the picture is encoded once
    python run.py photos/ "caption en" --json                  each picture of a folder, a line for each answer
"""
import argparse
import json
import os
import sys
from pathlib import Path

from minipali.errors import (
    FAILED,
    InputError,
    Parser,
    Progress,
    integer,
    named_options,
    path_name,
    prepare_process,
    run_command,
)

HERE = Path(__file__).resolve().parent


def token_ids(text):
    """The type of --prompt-ids."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of ids such as 2,15678,108") from None


def options():
    """The parser of all options. Where None is the default, it matters whether an option was given."""
    from minipali.backend import BACKENDS
    from minipali.checkpoint.choice import WEIGHTS
    head, _, examples = __doc__.partition("\n\n")
    parser = Parser("run.py", head, examples)
    add = parser.add_argument
    add("image", nargs="?", metavar="IMAGE", help="a picture file, or a folder of them (default: a bundled example)")
    add("prompt", nargs="?", metavar="PROMPT", help='what to ask (default: "caption en")')
    add("--model", type=path_name, default=HERE / "weights", metavar="PATH",
        help="a folder in the hub's layout, or a big_vision .npz (default: weights/)")
    add("--ask", action="append", default=[], metavar="PROMPT", help="another question; can be given several times")
    add("--each", nargs="+", action="extend", default=[], metavar="FILE",
        help="more pictures, or folders of them; each is answered on its own")
    add("--with", action="append", default=[], dest="beside", metavar="FILE",
        help="a picture that stands beside IMAGE in the same prompt; can be given several times")
    add("--max-new-tokens", type=integer(1), metavar="N", help="stop after N tokens (default 128)")
    add("--temperature", type=float, default=0.0, metavar="X",
        help="0, the default, always takes the likeliest token; above 0 tokens are drawn")
    add("--top-k", type=integer(1), metavar="K", help="draw from the K likeliest tokens; needs --temperature")
    add("--top-p", type=float, metavar="P",
        help="draw from the likeliest tokens that hold probability P; needs --temperature")
    add("--beams", type=integer(1), default=1, metavar="N",
        help="beam search that keeps the N likeliest beginnings (default 1: greedy)")
    add("--best-of", type=integer(1), default=1, metavar="N",
        help="draw N answers and give the likeliest; needs --temperature")
    add("--constrain", action="store_true",
        help='let the answer to "detect cat ; dog" or "segment cat" hold nothing but such objects')
    add("--score", action="append", default=[], metavar="TEXT",
        help="in place of an answer, the log-probability of this one; can be given several times")
    add("--seed", type=integer(0), metavar="S", help="of the random draws (default 0)")
    add("--no-image", action="store_true", help="no IMAGE: the language model alone goes on from PROMPT")
    add("--prompt-ids", type=token_ids, metavar="IDS", help="token ids in place of PROMPT, such as 2,15678,108")
    add("--dtype", choices=["float32", "float64"], default="float32", help="what to compute in (default float32)")
    add("--backend", choices=BACKENDS, default="numpy", help="where to compute (default numpy)")
    add("--weights", choices=WEIGHTS,
        help="how to hold the matrices of a large model (default: as its file does, in int8 if that does not fit)")
    add("--dump", type=path_name, metavar="FILE", help="write the prefill's activations to a .safetensors file")
    add("--xray", type=path_name, metavar="FILE",
        help="write a page for the browser (.html) that shows how this answer came about")
    add("--save-image", type=path_name, metavar="FILE",
        help="write the picture with the boxes and shapes that were found; for several pictures: the folder for these")
    add("--json", action="store_true", help="print one JSON object in place of the text; of several, one on each line")
    add("--verbose", action="store_true", help="print progress and timings to stderr")
    return parser


def check_combination(args, several):
    """Raise InputError for options that exclude one another, and for one that would be ignored in silence.

    --seed alone is not refused: greedy decoding keeps its promise, the same answer again, and a script that varies
    --temperature, 0 included, can keep its seed. --beams and --score are other procedures, in which nothing is drawn.
    """
    drawn, searched, sampled = args.temperature > 0, args.beams > 1, args.best_of > 1
    top_k, top_p, seed = args.top_k is not None, args.top_p is not None, args.seed is not None
    if names := args.no_image and named_options({
            "--save-image": args.save_image, "--with": args.beside, "--each": args.each, "--ask": args.ask}):
        raise InputError(f"--no-image: the language model alone goes on from one PROMPT, so not with {names}")
    if names := args.score and named_options({
            "--beams": searched, "--best-of": sampled, "--temperature": drawn, "--top-k": top_k, "--top-p": top_p,
            "--seed": seed, "--max-new-tokens": args.max_new_tokens is not None, "--constrain": args.constrain,
            "--save-image": args.save_image, "--xray": args.xray}):
        raise InputError(f"--score: a given answer is looked at and none is written, so not with {names}")
    if names := searched and named_options({"--temperature": drawn, "--best-of": sampled, "--seed": seed}):
        raise InputError(f"--beams: a search draws nothing, so not with {names}")
    if names := not drawn and named_options({"--best-of": sampled, "--top-k": top_k, "--top-p": top_p}):
        raise InputError(f"{names}: expected a --temperature above 0 as well, since without it no token is drawn")
    if names := (several or args.ask) and named_options({
            "--dump": args.dump, "--xray": args.xray, "--beams": searched, "--best-of": sampled, "--score": args.score,
            "--constrain": args.constrain}):
        raise InputError(f"{names}: expected one question about one picture")


def request_of(args):
    """The options as a Request; raises InputError for what can be refused before any work."""
    from minipali.commands.ask import Request
    from minipali.decoding.sampling import Decoding
    from minipali.files import check_writable
    from minipali.outputs.picture_file import check_picture_file
    image, prompt = (None, args.image) if args.no_image else (args.image, args.prompt)
    if args.no_image and args.prompt is not None:
        raise InputError("--no-image: expected PROMPT alone, without an IMAGE before it")
    if prompt is not None and args.prompt_ids is not None:
        raise InputError("PROMPT and --prompt-ids: expected one of the two")
    if args.no_image and prompt is None and args.prompt_ids is None:
        raise InputError("--no-image: expected a PROMPT or --prompt-ids to go on from")
    decoding = Decoding(args.temperature, args.top_k, 1.0 if args.top_p is None else args.top_p, args.seed or 0,
                        args.max_new_tokens or 128)
    several = bool(args.each) or image is not None and os.path.isdir(image)
    check_combination(args, several)
    if image is None and not args.each and not args.no_image:
        image = str(HERE / "weights" / "examples" / "drawings" / "house.png")
    first = args.prompt_ids if prompt is None else prompt
    prompts = [*([] if first is None else [first]), *args.ask] or ["caption en"]
    for path in filter(None, [args.dump, args.xray]):
        check_writable(path)
    if args.save_image and not several:
        check_picture_file(args.save_image)
    return Request(
        model=args.model, images=tuple(path for path in [image, *args.each] if path is not None),
        prompts=tuple(prompts), beside=tuple(args.beside), several=several, decoding=decoding, beams=args.beams,
        best_of=args.best_of, constrain=args.constrain, scored=tuple(args.score), dtype=args.dtype,
        backend=args.backend, weights=args.weights, masks=args.json or bool(args.save_image),
        save_image=Path(args.save_image) if args.save_image else None, dump=args.dump, xray=args.xray,
        logprobs=args.json, every_step=args.verbose)


def print_result(request, result):
    """A Result as text: of several pictures with the name before it; a single answer is on the screen already."""
    from minipali.commands.report import in_one_line
    if request.scored:
        for text, answer in result.several:
            print(f"{answer.logprob:.4f} {' '.join(text.split())}", flush=True)
    elif not request.several and len(request.prompts) == 1:
        print(flush=True)
    else:
        text = " ".join(map(str, result.answer.ids)) if result.ids_only else in_one_line(result.text)
        print(f"{in_one_line(result.image)}\t{text}" if request.several else text, flush=True)


def answer(argv):
    """Ask, print, and return the exit status: not 0 if a picture among several could not be read."""
    # Imported here, so that an error while the packages load is one line as well.
    from minipali.backend import keep_freed_memory
    from minipali.commands.ask import ask
    from minipali.commands.report import seconds, to_json, tokens_per_second
    keep_freed_memory()
    args = options().parse_intermixed_args(argv)  # PROMPT may come after options
    request = request_of(args)

    def on_text(piece):
        if not args.json:
            print(piece, end="", flush=True)

    with Progress("run.py", args.verbose or sys.stderr.isatty()) as progress:
        for result in ask(request, progress, on_text):
            progress.clear()
            if args.json:
                print(json.dumps(to_json(request, result)), flush=True)
            else:
                print_result(request, result)
            if not request.several and len(request.prompts) == 1:
                rate = "" if request.scored else f" ({tokens_per_second(result.answer):.1f} tokens a second)"
                progress("picture {vision:.2f} s, prompt {prefill:.2f} s, answer {decode:.2f} s".format(
                    **seconds(result)) + rate)
        return FAILED if progress.complaints else 0


def main(argv):
    """Return the exit status; an error is reported in one line."""
    return run_command("run.py", answer, argv)


if __name__ == "__main__":
    prepare_process()
    # The model in weights/ is so small that waiting for a second thread takes longer than what it saves.
    if not any(word.startswith("--model") for word in sys.argv):
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    sys.exit(main(sys.argv[1:]))
