"""Write a function of this repository anew, and have it checked:

    python -m minipali exercise                     the exercises, and which are solved
    python -m minipali exercise softmax             writes exercises/softmax.py; the next time, checks it
    python -m minipali exercise softmax --hint      one more hint
    python -m minipali exercise softmax --solution  where the solution stands
"""
from pathlib import Path

from minipali.decoding.generate import generate
from minipali.decoding.loaded_model import encode_prompt, load_model
from minipali.decoding.sampling import Decoding
from minipali.errors import InputError, Parser, path_name
from minipali.files import replacing
from minipali.inputs.image import open_image
from minipali.looking import exercise as work
from minipali.looking.exercise_list import EXERCISES, named

WEIGHTS = work.ROOT / "weights"
PICTURE = WEIGHTS / "examples" / "shapes.png"


def is_solved(folder, exercise, progress):
    """Whether the file is the one that passed."""
    path = folder / f"{exercise.name}.py"
    return path.exists() and progress.get(exercise.name, {}).get("solved") == work.fingerprint(path)


def overview(folder):
    """One line for each exercise, under the topics of the course, and how many are solved."""
    progress, topic, solved = work.read_progress(folder), None, 0
    for exercise in EXERCISES:
        if exercise.topic != topic:
            topic = exercise.topic
            yield f"{topic}"
        done = is_solved(folder, exercise, progress)
        solved += done
        yield f"  [{'x' if done else ' '}] {exercise.name:18} {exercise.task}"
    yield f"{solved} of {len(EXERCISES)} solved"


def begin(folder, exercise):
    """Write the stub, and say what is asked."""
    path = folder / f"{exercise.name}.py"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(work.stub(exercise).encode())
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror})") from None
    yield f"{exercise.name}: {exercise.task}"
    yield f"The trap: {exercise.trap}"
    yield f"Write it in {path}, then give the same command again. --hint gives {len(exercise.hints)} hints."


def answer_with(exercise, function):
    """What the bundled model says of a picture with the reader's function in it."""
    model = load_model(WEIGHTS)
    with work.installed(exercise, function):
        features = model.features([open_image(PICTURE)])
        [answer] = generate(model, features, [encode_prompt("caption en", model)], Decoding(max_new_tokens=60))
    return model.tokenizer.decode(answer.ids)


def failed_test(output):
    """The lines of pytest's output that say what failed."""
    lines = output.splitlines()
    wanted = [line for line in lines if line.startswith(("E  ", "FAILED", "ERROR"))]
    return (wanted or lines)[-8:]


def examine(folder, exercise):
    """Check the reader's file: our cases, its own tests, the running model. Yields lines; returns success."""
    path = folder / f"{exercise.name}.py"
    function = work.load(path, exercise)
    try:
        work.check(exercise, function)
    except work.Mistake as mistake:
        yield f"not yet: {mistake}"
        yield f"`python -m minipali exercise {exercise.name} --hint` gives a hint."
        return False
    yield f"your {exercise.function} gives what the repository's gives, on {len(exercise.cases)} kinds of input"
    passed, output = work.run_tests(exercise, path)
    if not passed:
        yield "not yet: one of its own tests fails"
        yield from (f"  {line}" for line in failed_test(output))
        return False
    yield f"its own tests pass ({exercise.tests[0]}, -k {exercise.tests[1]!r})"
    yield f"with it the bundled model answers: {answer_with(exercise, function)}"
    yield f"solved. How it stands in the repository: {exercise.where()}"
    work.write_progress(folder, exercise.name, solved=work.fingerprint(path))
    return True


def hint(folder, exercise):
    """The next hint, and all before it."""
    shown = min(work.read_progress(folder).get(exercise.name, {}).get("hints", 0) + 1, len(exercise.hints))
    folder.mkdir(parents=True, exist_ok=True)
    work.write_progress(folder, exercise.name, hints=shown)
    for number, text in enumerate(exercise.hints[:shown], 1):
        yield f"hint {number} of {len(exercise.hints)}: {text}"


def main(argv):
    """The overview, a stub, a check, a hint or the place of the solution; status 1 for what is not solved yet."""
    head, _, examples = __doc__.partition("\n\n")
    parser = Parser("minipali exercise", head.rstrip(":") + ".", examples)
    add = parser.add_argument
    add("name", nargs="?", metavar="EXERCISE", help="which one; without it all are listed")
    add("--hint", action="store_true", help="one more hint")
    add("--solution", action="store_true", help="where the solution stands")
    add("--folder", type=path_name, default="exercises", metavar="DIR",
        help="where your files are (default exercises/)")
    args = parser.parse_args(argv)
    folder = Path(args.folder)
    if args.name is None:
        if args.hint or args.solution:
            raise InputError("--hint and --solution: expected the name of an exercise")
        print("\n".join(overview(folder)))
        return 0
    exercise = named(args.name)
    if exercise is None:
        raise InputError(f"{args.name}: no such exercise; `python -m minipali exercise` lists them")
    if args.hint and args.solution:
        raise InputError("--hint and --solution: expected one of the two")
    if args.solution:
        print(exercise.where())
        return 0
    if args.hint:
        print("\n".join(hint(folder, exercise)))
        return 0
    if not (folder / f"{exercise.name}.py").exists():
        print("\n".join(begin(folder, exercise)))
        return 0
    lines = examine(folder, exercise)
    while True:
        try:
            print(next(lines), flush=True)
        except StopIteration as end:
            return 0 if end.value else 1
