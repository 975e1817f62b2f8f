"""Break the running model on purpose, one classic bug at a time:

    python -m minipali lab                          the list of bugs
    python -m minipali lab interleaved-rope         what that bug does to twelve pictures
    python -m minipali lab --all                    one row for each bug
"""
from pathlib import Path

from minipali.decoding.loaded_model import load_model
from minipali.errors import InputError, Parser, integer, named_options, path_name
from minipali.inputs.image import open_image
from minipali.looking import lab
from minipali.looking.classic_bugs import BUGS
from minipali.looking.taps import usual_cause

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"
EXAMPLE = WEIGHTS / "examples" / "shapes.png"
PICTURES = 12
TITLES = {"captions": "captions, to the last word", "questions": "questions", "boxes": "all boxes of a prompt"}


def bug_list():
    """The list of bugs, one line each."""
    for bug in BUGS:
        yield f"{bug.name:22} {bug.what}"


def changed(before, after):
    """How many answers are no longer the same text."""
    return sum(right != wrong for right, wrong in zip(before.texts, after.texts, strict=True))


def table(model, count):
    """One row for each bug: how many answers change, how many captions, questions and boxes are still right."""
    pictures, questions = lab.questions_of(count)
    before = lab.trial(model, pictures, questions)
    groups = list(TITLES)
    yield f"{len(questions)} prompts about {count} held-out pictures; right answers by kind, as with each bug in place"
    yield f"{'':22} {'changed':>8} " + " ".join(f"{group:>12}" for group in groups)
    for bug in [None, *BUGS]:
        after = lab.trial(model, pictures, questions, bug) if bug else before
        right = " ".join(f"{f'{after.right[group]} of {after.asked[group]}':>12}" for group in groups)
        yield f"{bug.name if bug else 'no bug':22} {changed(before, after):8} {right}"


def where_it_shows(model, bug):
    """The first activation that differs while the bundled picture's caption is written, as `compare` finds it."""
    image = open_image(EXAMPLE)
    answer = lab.caption_of(model, image)
    runs = [lab.activations(model, image, "caption en", answer, one) for one in (None, bug)]
    difference = lab.first_difference(*runs)
    if difference is None:
        yield "no activation of this caption differs: one prompt alone does not show the bug"
        return
    step, row = difference
    when = f" of written token {step}" if step else ""
    yield f"first activation that differs: {row.name}{when}"
    cause = row.note if row.note.startswith(("shape", "not all")) else usual_cause(row.name)
    yield f"  what `compare` says of it: {cause}"


def report(model, bug, count):
    """What one bug does: the line, the first activation that differs, the answers, the scores."""
    right_line, wrong_line = lab.lines_of(bug)
    yield f"{bug.name}: {bug.what}"
    yield f"  in {bug.function} of {bug.module.replace('.', '/')}.py"
    yield f"    - {right_line}"
    yield f"    + {wrong_line}"
    yield f"  somebody's own: {bug.source}"
    yield ""
    yield from where_it_shows(model, bug)
    yield ""
    pictures, questions = lab.questions_of(count)
    before, after = lab.trial(model, pictures, questions), lab.trial(model, pictures, questions, bug)
    yield f'"caption en" about {count} held-out pictures; a line with "=" is unchanged'
    for one, right, wrong in zip(questions, before.texts, after.texts, strict=True):
        if one.task == "caption":
            yield f"  = {right}" if right == wrong else f"  - {right}\n  + {wrong!r}"
    yield ""
    yield f"{changed(before, after)} of {len(questions)} answers change. Right answers, before and after:"
    for group, title in TITLES.items():
        yield f"  {title:28} {before.right[group]:4} -> {after.right[group]:4} of {after.asked[group]}"


def main(argv):
    """Print the list, one bug's report, or the table of all."""
    head, _, examples = __doc__.partition("\n\n")
    parser = Parser("minipali lab", head.rstrip(":") + ".", examples)
    add = parser.add_argument
    add("bug", nargs="?", metavar="BUG", help="the name of a bug; without one the list is printed")
    add("--all", action="store_true", help="one row for each bug: how many answers change, how many stay right")
    add("--pictures", type=integer(1), metavar="N", help=f"held-out pictures to ask about (default {PICTURES})")
    add("--model", type=path_name, metavar="PATH", help="a model of the small world (default: weights/)")
    args = parser.parse_args(argv)
    if args.bug and args.all:
        raise InputError("BUG and --all: expected one of the two")
    if not args.bug and not args.all:
        if names := named_options({"--pictures": args.pictures is not None, "--model": args.model is not None}):
            raise InputError(f"{names}: expected the name of a bug or --all as well")
        print("\n".join(bug_list()))
        return
    bug = lab.bug_named(args.bug)
    if args.bug and bug is None:
        raise InputError(f"{args.bug}: no such bug; `python -m minipali lab` lists them")
    model, pictures = load_model(args.model or WEIGHTS), args.pictures or PICTURES
    if model.preprocessor is None or model.tokenizer is None:
        raise InputError(f"{model.path}: expected a model that sees pictures, with its tokenizer")
    for line in table(model, pictures) if args.all else report(model, bug, pictures):
        print(line, flush=True)
