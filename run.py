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
import re
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

if __name__ == "__main__":
    # Before the slow imports, so that Ctrl-C never ends in a traceback.
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    # The model in weights/ is so small that a second thread only waits for its turn, longer than the first one works.
    if not any(word.startswith("--model") for word in sys.argv):
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from minipali.backend import BACKENDS, to_host
from minipali.decoding.batch import answer_all, in_one_prompt
from minipali.decoding.generate import generate
from minipali.decoding.loaded_model import (
    check_ids,
    encode_prompt,
    is_text_model,
    open_model,
)
from minipali.decoding.sampling import Decoding
from minipali.errors import InputError
from minipali.files import check_writable, replacing
from minipali.inputs.folder import picture_files
from minipali.inputs.image import open_image
from minipali.outputs.boxes import parse
from minipali.outputs.draw import draw
from minipali.outputs.masks import Shapes
from minipali.outputs.picture_file import check_picture_file, save_picture
from minipali.trace import record

HERE = Path(__file__).resolve().parent


class Talk:
    """What is said on stderr, if anybody listens: lines, and one line of progress that the next takes the place of."""

    def __init__(self, wanted):
        self.wanted, self.width = wanted, 0

    def __call__(self, text):
        if self.wanted:
            self.clear()
            print(text, file=sys.stderr, flush=True)

    def progress(self, text):
        if self.wanted:
            self.clear()
            print(text, end="", file=sys.stderr, flush=True)
            self.width = len(text)

    def complain(self, problem):
        self.clear()
        print(f"run.py: error: {problem}", file=sys.stderr, flush=True)

    def clear(self):
        """To be called before an answer is printed: on a terminal both streams share the line."""
        if self.width:
            print("\r" + self.width * " ", end="\r", file=sys.stderr, flush=True)
            self.width = 0


class Parser(argparse.ArgumentParser):
    """Answers a wrong option with one line, without the usage text."""

    def error(self, message):
        raise InputError(message)


def token_ids(text):
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of ids such as 2,15678,108") from None


def whole_number(text):
    try:
        if int(text) > 0:
            return int(text)
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text:.20} is out of range, expected a whole number from 1 up")


def check_decoding(args):
    """Raise InputError for ways to answer that exclude one another."""
    if args.beams > 1 and args.temperature > 0:
        raise InputError("--beams and --temperature: beam search draws nothing, expected one of the two")
    if args.best_of > 1 and not args.temperature > 0:
        raise InputError("--best-of: expected a --temperature above 0, for without it all answers are the same")
    others = {"--beams": args.beams > 1, "--best-of": args.best_of > 1, "--temperature": args.temperature > 0,
              "--constrain": args.constrain, "--save-image": args.save_image is not None}
    if args.score and any(others.values()):
        names = " and ".join(name for name, given in others.items() if given)
        raise InputError(f"--score: a given answer is looked at and none is written, so not with {names}")
    for option, given in [("--dump", args.dump), ("--beams", args.beams > 1), ("--best-of", args.best_of > 1),
                          ("--score", args.score), ("--constrain", args.constrain)]:
        if given and (args.batch or args.ask):
            raise InputError(f"{option}: expected one question about one picture")


def arguments(argv):
    parser = Parser(prog="run.py", description="Ask PaliGemma about a picture.", allow_abbrev=False)
    add = parser.add_argument
    add("image", nargs="?", metavar="IMAGE", help="a picture file, or a folder of them (default: a bundled example)")
    add("prompt", nargs="?", metavar="PROMPT", help='what to ask (default: "caption en")')
    add("--model", default=HERE / "weights", metavar="PATH", help="a folder in the hub's layout, or a big_vision .npz (default: weights/)")
    add("--ask", action="append", default=[], metavar="PROMPT", help="another question; can be given several times")
    add("--each", nargs="+", action="extend", default=[], metavar="FILE",
        help="more pictures, or folders of them; each is answered on its own")
    add("--with", action="append", default=[], dest="others", metavar="FILE",
        help="a picture that stands beside IMAGE in the same prompt; can be given several times")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="stop after N tokens (default 128)")
    add("--temperature", type=float, default=0.0, metavar="X", help="0, the default, always takes the likeliest token")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest tokens that hold probability P")
    add("--beams", type=whole_number, default=1, metavar="N",
        help="beam search that keeps the N likeliest beginnings (default 1: greedy)")
    add("--best-of", type=whole_number, default=1, metavar="N",
        help="draw N answers and give the likeliest; needs --temperature")
    add("--constrain", action="store_true",
        help='let the answer to "detect cat ; dog" or "segment cat" hold nothing but such objects')
    add("--score", action="append", metavar="TEXT",
        help="in place of an answer, the log-probability of this one; may be given several times")
    add("--seed", type=int, default=0, metavar="S", help="of the random draws (default 0)")
    add("--no-image", action="store_true", help="no IMAGE: the language model alone goes on from PROMPT")
    add("--prompt-ids", type=token_ids, metavar="IDS", help="token ids in place of PROMPT, such as 2,15678,108")
    add("--dtype", choices=["float32", "float64"], default="float32", help="what to compute in (default float32)")
    add("--backend", choices=BACKENDS, default="numpy", help="where to compute (default numpy)")
    add("--dump", type=Path, metavar="FILE", help="write the prefill's activations to a .safetensors file")
    add("--save-image", type=Path, metavar="FILE",
        help="write the picture with the boxes and shapes that were found; for several pictures: the folder for these")
    add("--json", action="store_true", help="print one JSON object in place of the text; of several, one on each line")
    add("--verbose", action="store_true", help="print progress and timings to stderr")
    args = parser.parse_intermixed_args(argv)  # PROMPT may come after options
    if args.no_image:
        if args.prompt is not None:
            parser.error("--no-image: expected PROMPT alone, without an IMAGE before it")
        args.image, args.prompt = None, args.image
        for option, given in [("--save-image", args.save_image), ("--with", args.others), ("--each", args.each),
                              ("--ask", args.ask)]:
            if given:
                parser.error(f"--no-image and {option}: expected one of the two")
        if args.prompt is None and args.prompt_ids is None:
            parser.error("--no-image: expected a PROMPT or --prompt-ids to go on from")
    elif args.image is None and not args.each:
        args.image = str(HERE / "weights" / "examples" / "shapes.png")
    if args.prompt is not None and args.prompt_ids is not None:
        parser.error("PROMPT and --prompt-ids: expected one of the two")
    if args.prompt is None and args.prompt_ids is None:
        args.prompt = args.ask.pop(0) if args.ask else "caption en"
    args.batch = bool(args.each) or not args.no_image and os.path.isdir(args.image)
    check_decoding(args)
    if args.dump is not None:
        check_writable(args.dump)
    if args.save_image is not None and not args.batch:
        check_picture_file(args.save_image)
    return args


def dump(path, activations, pixels, ids):
    """The recorded activations, the picture, if there is one, and the ids as one safetensors file."""
    from safetensors.numpy import save  # only needed here
    arrays = {**to_host(activations), "input_ids": np.array([ids])}
    if pixels is not None:
        arrays["pixel_values"] = pixels
    content = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    with replacing(path) as file:
        file.write(content)


def peak_rss_bytes():
    """The most memory that this process has held."""
    try:
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])
    except (OSError, TypeError):
        # Not on Linux, where this would also count the process that started us, however large it was.
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def box_report(detection, mask):
    """One of the `boxes`; its mask covers the whole picture, row by row, and the first run is outside the shape."""
    report = {"label": detection.label, "box": list(detection.box)}
    if mask is not None:
        from minipali.outputs.masks import run_lengths
        report["mask"] = {"width": mask.shape[1], "height": mask.shape[0], "counts": run_lengths(mask)}
    return report


def as_json(answer, tokenizer):
    """One of several answers: its text, and the logarithm of its probability, whole and token by token."""
    text = tokenizer.decode(answer.ids) if tokenizer else ""
    return {"text": text, "ids": answer.ids, "stopped_by": answer.stopped_by, "logprob": answer.logprob,
            "logprobs": answer.logprobs, "stop_logprob": answer.stop_logprob}


def report(found, detections, masks, text, seconds):
    """The answer as `--json` gives it. The first token comes with the prefill, so the speed is that of the others."""
    steps = max(len(found.ids) - (found.stopped_by == "length"), 0)
    return {"output_ids": found.ids, "text": text, "boxes": list(map(box_report, detections, masks)),
            "seconds": {**seconds, "prefill": found.prefill_seconds, "decode": found.decode_seconds},
            "tokens_per_second": steps / found.decode_seconds if steps else 0.0,
            "peak_rss_bytes": peak_rss_bytes(), "stopped_by": found.stopped_by,
            "logprobs": found.logprobs, "stop_logprob": found.stop_logprob}


def report_scores(args, scored, seconds):
    """`--score` in place of an answer: a line for each, in the order given, or what `--json` gives."""
    if not args.json:
        for text, answer in zip(args.score, scored):
            print(f"{answer.logprob:.4f} {' '.join(text.split())}", flush=True)
    scores = [{**as_json(answer, None), "text": text} for text, answer in zip(args.score, scored)]
    return {"scores": scores, "seconds": seconds, "peak_rss_bytes": peak_rss_bytes()}


def search(args, model, features, ids, decoding, grammar, say):
    """Beam search or the best of n, with the sums for who wants to see them -> Answers, the likeliest first."""
    from minipali.decoding.search import beam_search, best_of  # few need them

    def shown(answer):
        text = repr(model.tokenizer.decode(answer.ids)) if model.tokenizer else " ".join(map(str, answer.ids))
        return f"{answer.logprob:.3f} {text}" + (" (ended)" if answer.stopped_by == "eos" else "")

    def on_step(live, ended):
        if args.verbose:
            say("beams: " + ", ".join(map(shown, live + ended)))

    if args.beams > 1:
        found = beam_search(model, features, ids, args.beams, args.max_new_tokens, grammar, on_step)
    else:
        found = best_of(model, features, ids, args.best_of, decoding, grammar)
    for answer in found:
        say(f"log-probability {shown(answer)}")
    return found


def open_questions(args):
    """The model, still without its weights, and what is asked as token ids, checked as far as that is cheap."""
    model = open_model(args.model, args.backend)
    prompts = [args.prompt_ids or encode_prompt(args.prompt, model), *(encode_prompt(text, model) for text in args.ask)]
    for ids in prompts:
        check_ids(ids, model.cfg, 0 if args.no_image else 1 + len(args.others))
    return model, prompts


def understand(found, model, size, shapes):
    """What the tokens of an answer say: the text, the objects in it, and for each its mask or None."""
    text = model.tokenizer.decode(found.ids) if model.tokenizer else ""
    detections = parse(text, *size) if size else []
    return text, detections, shapes.masks(detections, *size) if shapes else [None] * len(detections)


def answer(args, decoding, say):
    """One question about one picture. What is cheap to check comes first, and the weights are read last."""
    started = time.perf_counter()
    images = [] if args.no_image else [open_image(path) for path in [args.image, *args.others]]
    model, [ids] = open_questions(args)
    grammar, given = None, []
    if args.constrain:
        from minipali.decoding.grammar import Grammar
        grammar = Grammar(ids, model)
    if args.score:
        from minipali.decoding.search import encode_answer, score
        prefix_length = len(ids) + (len(images) * model.cfg.vision_config.num_patches if images else 0)
        given = [encode_answer(text, prefix_length, model) for text in args.score]
    model = model.with_weights(args.dtype)
    pixels = np.stack([model.preprocessor(one) for one in images]).astype(args.dtype) if images else None
    loaded = time.perf_counter()
    say(f"{args.image or 'no picture'}: read by {args.model}, which took {loaded - started:.2f} s to load")

    stream = model.tokenizer.decode_stream() if model.tokenizer else None

    def show(_, token):
        if not args.json:
            print(stream.push(token) if stream else f"{token} ", end="", flush=True)

    # Numbers that overflow on the way are no news for a terminal; `generate` refuses those that cannot be used.
    with np.errstate(all="ignore"), record() if args.dump else nullcontext() as activations:
        features = model.features_of(pixels) if images else model.no_picture(1)
        if len(images) > 1:
            features = in_one_prompt(features[:1], features[1:])
        seen = time.perf_counter()
        if given:
            several = score(model, features, ids, given)
        elif args.beams > 1 or args.best_of > 1:
            several = search(args, model, features, ids, decoding, grammar, say)
            for token in several[0].ids:
                show(0, token)
        else:
            several = generate(model, features, [ids], decoding, show, grammar)
    found, masks = several[0], []
    seconds = {"load": loaded - started, "vision": seen - loaded}
    if given:
        result = report_scores(args, several, {**seconds, "prefill": found.prefill_seconds, "decode": found.decode_seconds})
    else:
        if not args.json:
            print(stream.finish() if stream else "", flush=True)
        shapes = Shapes(model, say) if images and (args.json or args.save_image) else None
        text, detections, masks = understand(found, model, images[0].size if images else None, shapes)
        result = report(found, detections, masks, text, seconds)
        if args.beams > 1 or args.best_of > 1:
            name = "beams" if args.beams > 1 else "samples"
            result[name] = [as_json(one, model.tokenizer) for one in several]
    say("picture {vision:.2f} s, prompt {prefill:.2f} s, answer {decode:.2f} s".format(**result["seconds"])
        + (f" ({result['tokens_per_second']:.1f} tokens a second)" if not given else ""))
    if args.dump:
        dump(args.dump, activations, pixels, [model.cfg.image_token_index] * features.shape[1] + ids)
    if args.save_image:
        save_picture(draw(images[0], detections, masks), args.save_image)
    if args.json:
        question = {"model": str(args.model), "prompt": args.prompt, "prompt_ids": ids}
        print(json.dumps({**question, **result}), flush=True)
    return 0


def in_one_line(text):
    """As a column of a line: without tabs and line breaks, and with a file name's bytes that are no UTF-8 escaped."""
    return " ".join(text.replace("\t", " ").splitlines()).encode("utf-8", "backslashreplace").decode("utf-8")


def boxes_folder(folder, paths):
    """Make the folder for the pictures with boxes; InputError if two of them would have one name."""
    names = [Path(path).name for path in paths]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"--save-image: two pictures are called {twice}, and one would take the other's place")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made, expected a folder for several pictures ({error.strerror})") from None


def answer_each(args, decoding, say):
    """Every question about every picture, a line for each answer; the exit status tells if pictures were unreadable."""
    started, unusable = time.perf_counter(), []
    paths, passed_over = picture_files([path for path in [args.image, *args.each] if path is not None])
    others = [open_image(path) for path in args.others]
    if not args.batch:
        open_image(args.image)  # if the only picture cannot be read, neither need the model be
    model, prompts = open_questions(args)
    if args.save_image and args.batch:
        boxes_folder(args.save_image, paths)
    model = model.with_weights(args.dtype)
    loaded, shapes = time.perf_counter() - started, Shapes(model, say) if args.json or args.save_image else None
    say(f"{len(paths)} pictures, {passed_over} other files passed over, {len(prompts)} questions: "
        f"read by {args.model}, which took {loaded:.2f} s to load")

    def refuse(error):
        say.complain(error)
        unusable.append(error)

    with np.errstate(all="ignore"):
        answered = answer_all(model, paths, prompts, model.features(others) if others else None, decoding, refuse)
        for count, (path, size, vision, answers) in enumerate(answered, 1):
            say.clear()
            shown = [], []  # the detections of all questions, and their masks
            for prompt, ids, found in zip([args.prompt, *args.ask], prompts, answers):
                text, detections, masks = understand(found, model, size, shapes)
                shown[0].extend(detections)
                shown[1].extend(masks)
                if args.json:
                    result = report(found, detections, masks, text, {"load": loaded, "vision": vision})
                    question = {"image": path, "model": str(args.model), "prompt": prompt, "prompt_ids": ids}
                    print(json.dumps({**question, **result}), flush=True)
                else:
                    words = in_one_line(text) if model.tokenizer else " ".join(map(str, found.ids))
                    print(f"{in_one_line(path)}\t{words}" if args.batch else words, flush=True)
            if args.save_image:
                to = args.save_image / f"{Path(path).name}.boxes.png" if args.batch else args.save_image
                save_picture(draw(open_image(path), *shown), to)
            say.progress(f"{count + len(unusable)} of {len(paths)} pictures, {time.perf_counter() - started:.0f} s")
    say(f"{len(paths) - len(unusable)} pictures answered about in {time.perf_counter() - started:.1f} s")
    return 2 if unusable else 0


def main(argv):
    """Returns the exit status; whatever was wrong with what the user gave is said in one line."""
    say = Talk(sys.stderr.isatty())
    try:
        args = arguments(argv)
        say.wanted |= args.verbose
        decoding = Decoding(args.temperature, args.top_k, args.top_p, args.seed, args.max_new_tokens)
        if not args.no_image and is_text_model(args.model):
            raise InputError(f"{args.model}: a text model, which sees no picture; give --no-image and a PROMPT alone")
        ask = answer_each if args.batch or args.ask else answer
        return ask(args, decoding, say)
    except MemoryError:
        problem = "not enough memory for this model and picture"
    except InputError as error:
        problem = error
    except OSError as error:  # usually of stdout: what is read and written elsewhere answers for itself
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or what waits there would fail again at exit
        if isinstance(error, BrokenPipeError):  # whoever read the text has closed: there is nobody left to tell
            return 0
        problem = f"{error.filename or 'stdout'}: {error.strerror}"
    say.complain(problem)
    return 2


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    sys.exit(main(sys.argv[1:]))
