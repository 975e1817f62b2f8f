"""How fast a checkpoint answers on this machine, and how near that comes to what the machine can do.

    python -m minipali bench                                     the model in weights/
    python -m minipali bench paligemma-3b-mix-224 --batch 8 --picture speed.png
    python -m minipali bench paligemma-3b-mix-224 --against python3 --rounds 3

The limits are measured in the same run: of matrix products (the picture, and the prefill, which has many tokens at
once) in operations a second, of matrix times vector (decoding, which reads every weight for one token) in numbers a
second. Each form of the weights runs in a process of its own, so that its peak memory is its own. --against PYTHON is
a Python with torch and transformers: it runs the same checkpoint in float32, in turn with this package.
"""
import json
import math
import multiprocessing
import platform
import statistics
import subprocess
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np

from minipali.backend import keep_freed_memory
from minipali.checkpoint import open_any
from minipali.checkpoint.choice import WEIGHTS, choose_weights
from minipali.checkpoint.read_matrices import matrix_of, stays_matrix
from minipali.checkpoint.tensors import param_shapes
from minipali.commands.bench_picture import bench_picture, decode_limit
from minipali.commands.report import peak_rss_bytes
from minipali.decoding.loaded_model import open_model
from minipali.errors import CommandError, InputError, Parser, integer, path_name
from minipali.model.gemma import KVCache
from minipali.model.paligemma import decode, prefill
from minipali.outputs.picture_file import check_picture_file, save_picture
from minipali.parallel import open_blas, thread_count

ROOT = Path(__file__).resolve().parents[2]
BASELINE = ROOT / "tests" / "golden" / "time_transformers.py"
PROMPT = 4              # token ids after the picture's: BOS and three more
LIMIT = 16384, 2048     # the matrix that the limits are measured with, larger than any cache
LIMIT_ROWS = 260        # and the tokens that meet it, as many as a short prompt and a picture of 224 pixels have


def fastest(function, repeats=5):
    """Seconds of the fastest of several calls: what the machine can do when nothing else wants it."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def machine_limits():
    """{form: (operations a second of a matrix product, numbers a second of matrix times vector)}."""
    rng, limits = np.random.default_rng(0), {}
    array, x = rng.random(LIMIT, np.float32), rng.random((LIMIT_ROWS, LIMIT[1]), np.float32)
    for form in ["plain", *WEIGHTS]:
        matrix = array if form == "plain" else matrix_of(LIMIT, lambda start, stop: array[start:stop], form)
        product, vector = fastest(lambda: x @ matrix.T), fastest(lambda: x[:1] @ matrix.T)  # noqa: B023 - called now
        limits[form] = 2 * LIMIT_ROWS * array.size / product, array.size / vector
    return limits


def work(cfg, tokens):
    """What one answer takes: operations of the picture and of a prefill of `tokens`, numbers read for each token."""
    matrices = {name: math.prod(shape) for name, shape in param_shapes(cfg).items() if stays_matrix(name, shape)}
    decoder = sum(size for name, size in matrices.items() if ".layers." in name and name.startswith("language_model."))
    head = next(size for name, size in reversed(matrices.items()) if "embed_tokens" in name or "lm_head" in name)
    text, vision, picture = cfg.text_config, cfg.vision_config, 0
    if vision:
        patches = vision.num_patches
        seen = sum(size for name, size in matrices.items() if not name.startswith("language_model."))
        seen += vision.hidden_size * vision.num_channels * vision.patch_size ** 2
        picture = 2 * patches * seen + 4 * vision.num_hidden_layers * patches ** 2 * vision.hidden_size
    attention = 4 * text.num_hidden_layers * tokens ** 2 * text.num_attention_heads * text.head_dim
    return {"vision": picture, "prefill": 2 * (tokens * decoder + head) + attention, "decode": decoder + head,
            "head": head}


def answer(model, batch, steps):
    """Seconds of the picture, of the prefill and of each further token, for `batch` pictures at once."""
    cfg, rng, started = model.cfg, np.random.default_rng(0), time.perf_counter()
    if cfg.vision_config:
        size = cfg.vision_config.image_size
        features = model.features_of(rng.uniform(-1, 1, (batch, 3, size, size)))
    else:
        features = model.no_picture(batch)
    seen = time.perf_counter()
    ids = np.tile([[cfg.bos_token_id, *range(3, 2 + PROMPT)]], (batch, 1))
    cache = KVCache(features, batch, features.shape[1] + PROMPT + steps, cfg.text_config)
    logits = prefill(features, ids, np.full(batch, PROMPT), model.params, cfg, cache)
    seconds, last = [], time.perf_counter()
    prefilled = last - seen
    for _ in range(steps):
        logits = decode(logits.argmax(-1)[:, None], model.params, cfg, cache)[:, -1]
        seconds.append(time.perf_counter() - last)
        last += seconds[-1]
    return seen - started, prefilled, seconds


def measure(path, form, tokens, batch):
    """The figures of one form of the weights, in this process: opening, then two answers of which the second counts.

    The first one also reads what is still on the disk; `ready` is the time from opening to its first token.
    """
    keep_freed_memory()  # as run.py does; this is a new process
    started = time.perf_counter()
    model = open_model(path).with_weights(np.float32, form)
    opened = time.perf_counter() - started
    vision, prefilled, _ = answer(model, 1, 0)
    figures = {"form": form, "opens": opened, "ready": opened + vision + prefilled}
    vision, prefilled, steps = answer(model, 1, max(tokens - 1, 1))
    figures |= {"vision": vision, "prefill": prefilled, "first": vision + prefilled,
                "speed": 1 / statistics.median(steps),
                "answer": vision + prefilled + sum(steps[:tokens - 1])}
    figures["peak"] = peak_rss_bytes()
    if batch > 1:
        figures["together"] = batch / statistics.median(answer(model, batch, 4)[2])
    return figures


def in_own_process(*arguments):
    """`measure` in a new process, so that memory is counted from nothing."""
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(measure, *arguments).result()
    except BrokenProcessPool:
        raise CommandError("the measuring process died, perhaps for lack of memory; --weights int8 needs the "
                           "least") from None


def transformers_figures(python, path, cfg, tokens):
    """The same figures of `transformers` in float32, by the Python that has it."""
    ids = ",".join(map(str, [cfg.bos_token_id, *range(3, 2 + PROMPT)]))
    try:
        done = subprocess.run([python, BASELINE, path, ids, str(tokens)], capture_output=True, text=True, check=False)
    except OSError as error:
        raise InputError(f"--against {python}: cannot be run ({error.strerror})") from None
    try:
        figures = json.loads(done.stdout.strip().splitlines()[-1])
        return {"form": "transformers", "first": figures["first_token_seconds"], "speed": figures["tokens_per_second"],
                "answer": figures["answer_seconds"], "peak": figures["peak_rss_bytes"],
                "opens": figures["load_seconds"]}
    except (IndexError, KeyError, ValueError):
        why = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise CommandError(f"--against {python}: transformers gave no figures ({why:.200})") from None


def medians(rounds):
    """One row of figures from those of several rounds."""
    return {key: value if isinstance(value, str) else statistics.median(row[key] for row in rounds)
            for key, value in rounds[0].items() if value is not None}


def ratio(ours, theirs, key):
    """Our figure over theirs: the ratio of the medians, and the smallest and largest of a round."""
    each = [a[key] / b[key] for a, b in zip(ours, theirs)]
    middle = statistics.median(row[key] for row in ours) / statistics.median(row[key] for row in theirs)
    return f"{middle:.2f} ({min(each):.2f} to {max(each):.2f})"


def add_shares(row, needed, limits):
    """Beside each figure, the part of the machine's limit that it reaches: plain products for what many tokens share,
    matrix times vector of the same form for decoding."""
    operations, _ = limits["plain"]
    if row["form"] == "float32":
        limits = limits | {"float32": (operations, max(limits["plain"][1], limits["float32"][1]))}
    for key in ["vision", "prefill"]:
        row[f"{key} share"] = needed[key] / row[key] / operations
    row["decode share"] = row["speed"] / decode_limit(row["form"], needed, limits)
    return row


def table(rows, batch):
    """The figures as lines of text, a line for each form."""
    columns = [("opens", "opens s", "{:.2f}"), ("ready", "to 1st token s", "{:.2f}"), ("vision", "picture s", "{:.2f}"),
               ("vision share", "of limit", "{:.0%}"), ("prefill", "prefill s", "{:.2f}"),
               ("prefill share", "of limit", "{:.0%}"), ("first", "1st token s", "{:.2f}"),
               ("speed", "tokens/s", "{:.2f}"), ("decode share", "of limit", "{:.0%}"),
               ("answer", "answer s", "{:.2f}"),
               ("peak", "peak GB", "{:.2f}"), *([("together", f"tokens/s of {batch}", "{:.2f}")] if batch > 1 else [])]
    lines = [["weights", *(title for _, title, _ in columns)]]
    for row in rows:
        scaled = row | {"peak": row["peak"] / 1e9} if "peak" in row else row
        lines.append([row["form"], *(shape.format(scaled[key]) if key in row else "" for key, _, shape in columns)])
    widths = [max(map(len, column)) for column in zip(*lines)]
    return ["  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths)).rstrip() for line in lines]


def main(argv):
    parser = Parser("minipali bench", __doc__.split("\n")[0], "\n".join(__doc__.split("\n")[2:5]))
    add = parser.add_argument
    add("checkpoint", nargs="?", type=path_name, default=ROOT / "weights", metavar="CHECKPOINT",
        help="default: weights/")
    add("--weights", choices=WEIGHTS, action="append",
        help="a form to measure; can be given several times (default all)")
    add("--tokens", type=integer(1), default=12, metavar="N", help="length of the answer (default 12)")
    add("--batch", type=integer(1), default=1, metavar="N", help="also the speed of N answers written together")
    add("--rounds", type=integer(1), default=1, metavar="N", help="medians of N rounds (default 1)")
    add("--against", type=path_name, metavar="PYTHON", help="a Python with torch and transformers, which runs in turn")
    add("--picture", type=path_name, metavar="FILE", help="draw the figures as bars against the limits")
    add("--json", action="store_true", help="print one JSON object in place of the table")
    args = parser.parse_args(argv)
    if args.picture is not None:
        check_picture_file(args.picture)
    model = open_model(args.checkpoint)
    limits, own = machine_limits(), choose_weights(open_any(args.checkpoint)[1])
    needed = work(model.cfg, (model.cfg.vision_config.num_patches if model.cfg.vision_config else 0) + PROMPT)
    forms = list(dict.fromkeys(args.weights or WEIGHTS))
    rounds = {form: [] for form in [*forms, *(["transformers"] if args.against else [])]}
    for _ in range(args.rounds):
        for form in forms:
            rounds[form].append(in_own_process(args.checkpoint, form, args.tokens, args.batch))
            if args.against and form == forms[0]:
                rounds["transformers"].append(
                    transformers_figures(args.against, args.checkpoint, model.cfg, args.tokens))
    rows = [add_shares(medians(figures), needed, limits) if form in WEIGHTS else medians(figures)
            for form, figures in rounds.items()]
    ratios = {form: {key: ratio(rounds[form], rounds["transformers"], key) for key in ["first", "answer", "speed"]}
              for form in forms} if args.against else {}
    machine = {"threads": thread_count(), "blas": "OpenBLAS" if open_blas() else "not OpenBLAS",
               "processor": platform.machine(), "limits": limits}
    if args.picture is not None:
        save_picture(bench_picture(rows, needed, limits), args.picture)
    if args.json:
        print(json.dumps({"model": str(args.checkpoint), "machine": machine, "rounds": rounds, "ratios": ratios}))
        return
    print(f"machine: {machine['threads']} threads, {machine['blas']}, {machine['processor']}")
    for form, (operations, numbers) in limits.items():
        width = 4 if form == "plain" else {"float32": 4, "bfloat16": 2, "int8": 1}[form]
        label = "NumPy alone" if form == "plain" else f"{form} tiles"
        print(f"  {label:15} {operations / 1e9:7.0f} GFLOP/s of products, "
              f"matrix times vector {numbers / 1e9:6.2f} billion numbers/s ({width * numbers / 1e9:.1f} GB/s)")
    print(f"{args.checkpoint}: {own[1]}; an answer of {args.tokens} tokens, {args.rounds} round(s)")
    for line in table(rows, args.batch):
        print(line)
    for form, row in ratios.items():
        print(f"{form} over transformers float32: first token {row['first']}, answer {row['answer']}, "
              f"tokens a second {row['speed']}")
