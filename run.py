"""Ask PaliGemma about a picture.

    python run.py                                              the model in weights/ says what is in a bundled picture
    python run.py photo.jpg "answer en how many stars are there?"
    python run.py photo.jpg "detect red circle" --save-image boxes.png
    python run.py photo.jpg "caption en" --model paligemma-3b-mix-224
    python run.py --no-image "The capital of France is" --model gemma-3-270m
"""
import argparse
import io
import json
import os
import re
import signal
import sys
import time
from contextlib import nullcontext, suppress
from pathlib import Path

if __name__ == "__main__":
    # Before the slow imports, so that Ctrl-C never ends in a traceback.
    signal.signal(signal.SIGINT, lambda *_: sys.exit(130))
    # The model in weights/ is so small that a second thread only waits for its turn, longer than the first one works.
    if not any(word.startswith("--model") for word in sys.argv):
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np
from PIL import Image

from minipali.io.backend import BACKENDS, to_host
from minipali.io.config import Unusable
from minipali.io.generate import (
    check_ids,
    encode_prompt,
    generate,
    is_text_model,
    open_model,
)
from minipali.io.image import open_image
from minipali.io.locations import draw, parse
from minipali.io.sampling import Decoding
from minipali.looking.trace import record

HERE = Path(__file__).resolve().parent


class Parser(argparse.ArgumentParser):
    """Answers a wrong option with one line, without the usage text."""

    def error(self, message):
        raise Unusable(message)


def token_ids(text):
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of ids such as 2,15678,108") from None


def check_writable(path):
    """Raise Unusable now for what could not be written after all the work."""
    if os.path.exists(path) and not os.path.isfile(path):  # os.replace would take a device's place, too
        raise Unusable(f"{path}: cannot be written, for it is no file")
    if not os.access(path.parent, os.W_OK):
        raise Unusable(f"{path}: cannot be written, expected a folder that exists and takes files")


def picture_bytes(image, path):
    """A picture in the format that the name's ending asks for; Unusable if Pillow does not write it."""
    buffer = io.BytesIO()
    try:
        image.save(buffer, format=Image.registered_extensions()[path.suffix.lower()])
    except Exception:  # noqa: BLE001 - of the formats that can only be read, or are not in RGB, each raises its own
        raise Unusable(f"{path}: not a picture format that Pillow writes, expected a name such as boxes.png") from None
    return buffer.getvalue()


def arguments(argv):
    parser = Parser(prog="run.py", description="Ask PaliGemma about a picture.", allow_abbrev=False)
    add = parser.add_argument
    add("image", nargs="?", metavar="IMAGE", help="a picture file (default: a bundled example)")
    add("prompt", nargs="?", metavar="PROMPT", help='what to ask (default: "caption en")')
    add("--model", default=HERE / "weights", metavar="PATH", help="a folder in the hub's layout, or a big_vision .npz (default: weights/)")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="stop after N tokens (default 128)")
    add("--temperature", type=float, default=0.0, metavar="X", help="0, the default, always takes the likeliest token")
    add("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest tokens that hold probability P")
    add("--seed", type=int, default=0, metavar="S", help="of the random draws (default 0)")
    add("--no-image", action="store_true", help="no IMAGE: the language model alone goes on from PROMPT")
    add("--prompt-ids", type=token_ids, metavar="IDS", help="token ids in place of PROMPT, such as 2,15678,108")
    add("--dtype", choices=["float32", "float64"], default="float32", help="what to compute in (default float32)")
    add("--backend", choices=BACKENDS, default="numpy", help="where to compute (default numpy)")
    add("--dump", type=Path, metavar="FILE", help="write the prefill's activations to a .safetensors file")
    add("--save-image", type=Path, metavar="FILE", help="write the picture with the boxes that were found")
    add("--json", action="store_true", help="print one JSON object in place of the text")
    add("--verbose", action="store_true", help="print progress and timings to stderr")
    args = parser.parse_args(argv)
    if args.no_image:
        if args.prompt is not None:
            parser.error("--no-image: expected PROMPT alone, without an IMAGE before it")
        args.image, args.prompt = None, args.image
        if args.save_image is not None:
            parser.error("--no-image and --save-image: expected one of the two, for there is no picture to draw on")
    elif args.image is None:
        args.image = HERE / "weights" / "examples" / "shapes.png"
    if args.prompt is not None and args.prompt_ids is not None:
        parser.error("PROMPT and --prompt-ids: expected one of the two")
    if args.prompt is None and args.prompt_ids is None:
        if args.no_image:
            parser.error("--no-image: expected a PROMPT or --prompt-ids to go on from")
        args.prompt = "caption en"
    for path in [args.dump, args.save_image]:
        if path is not None:
            check_writable(path)
    if args.save_image is not None:
        picture_bytes(Image.new("RGB", (1, 1)), args.save_image)
    return args


def replace_file(path, content):
    """Write bytes under another name first, so that no half-written file is ever left under this one."""
    part = f"{path}.part"
    try:
        Path(part).write_bytes(content)
        os.replace(part, path)
    except OSError as error:
        raise Unusable(f"{path}: cannot be written ({error.strerror})") from None
    finally:
        with suppress(OSError):
            os.unlink(part)


def dump(path, activations, pixels, ids):
    """The recorded activations, the picture, if there is one, and the ids as one safetensors file."""
    from safetensors.numpy import save  # only needed here
    arrays = {**to_host(activations), "input_ids": np.array([ids])}
    if pixels is not None:
        arrays["pixel_values"] = pixels
    replace_file(path, save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))


def peak_rss_bytes():
    """The most memory that this process has held."""
    try:
        return 1024 * int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])
    except (OSError, TypeError):
        # Not on Linux, where this would also count the process that started us, however large it was.
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def report(found, detections, text, seconds):
    """The answer as `--json` gives it. The first token comes with the prefill, so the speed is that of the others."""
    steps = max(len(found.ids) - (found.stopped_by == "length"), 0)
    return {"output_ids": found.ids, "text": text,
            "boxes": [{"label": detection.label, "box": list(detection.box)} for detection in detections],
            "seconds": {**seconds, "prefill": found.prefill_seconds, "decode": found.decode_seconds},
            "tokens_per_second": steps / found.decode_seconds if steps else 0.0,
            "peak_rss_bytes": peak_rss_bytes(), "stopped_by": found.stopped_by}


def answer(args):
    """All that is asked for. What is cheap to check comes first, and the weights are read last."""
    decoding = Decoding(args.temperature, args.top_k, args.top_p, args.seed, args.max_new_tokens)
    talk = args.verbose or sys.stderr.isatty()

    def say(text):
        if talk:
            print(text, file=sys.stderr, flush=True)

    started = time.perf_counter()
    if not args.no_image and is_text_model(args.model):
        raise Unusable(f"{args.model}: a text model, which sees no picture; give --no-image and a PROMPT alone")
    image = None if args.no_image else open_image(args.image)
    model = open_model(args.model, args.backend)
    ids = args.prompt_ids or encode_prompt(args.prompt, model)
    check_ids(ids, model.cfg, 0 if args.no_image else None)
    model = model.with_weights(args.dtype)
    pixels = None if args.no_image else model.preprocessor(image)[None].astype(args.dtype)
    loaded = time.perf_counter()
    say(f"{args.image or 'no picture'}: read by {args.model}, which took {loaded - started:.2f} s to load")

    stream = model.tokenizer.decode_stream() if model.tokenizer else None

    def show(_, token):
        if not args.json:
            print(stream.push(token) if stream else f"{token} ", end="", flush=True)

    # Numbers that overflow on the way are no news for a terminal; `generate` refuses those that cannot be used.
    with np.errstate(all="ignore"), record() if args.dump else nullcontext() as activations:
        features = model.no_picture(1) if args.no_image else model.features_of(pixels)
        seen = time.perf_counter()
        [found] = generate(model, features, [ids], decoding, show)
    if not args.json:
        print(stream.finish() if stream else "", flush=True)

    text = model.tokenizer.decode(found.ids) if model.tokenizer else ""
    detections = parse(text, *image.size) if image else []
    result = report(found, detections, text, {"load": loaded - started, "vision": seen - loaded})
    say("picture {vision:.2f} s, prompt {prefill:.2f} s, answer {decode:.2f} s".format(**result["seconds"])
        + f" ({result['tokens_per_second']:.1f} tokens a second)")
    if args.dump:
        dump(args.dump, activations, pixels, [model.cfg.image_token_index] * features.shape[1] + ids)
    if args.save_image:
        replace_file(args.save_image, picture_bytes(draw(image, detections), args.save_image))
    if args.json:
        question = {"model": str(args.model), "prompt": args.prompt, "prompt_ids": ids}
        print(json.dumps({**question, **result}), flush=True)


def main(argv):
    """Returns the exit status; whatever was wrong with what the user gave is said in one line."""
    try:
        answer(arguments(argv))
        return 0
    except MemoryError:
        problem = "not enough memory for this model and picture"
    except Unusable as error:
        problem = error
    except OSError as error:  # usually of stdout: what is read and written elsewhere answers for itself
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or what waits there would fail again at exit
        if isinstance(error, BrokenPipeError):  # whoever read the text has closed: there is nobody left to tell
            return 0
        problem = f"{error.filename or 'stdout'}: {error.strerror}"
    print(f"run.py: error: {problem}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    sys.exit(main(sys.argv[1:]))
