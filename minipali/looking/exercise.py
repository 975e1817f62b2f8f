"""Exercises: the reader writes a function of this repository anew, and it is held against the one that stands here.

The stub is made from the function itself: its signature, its docstring and its shape line, without the lines that do
the work. So the solution is always the source, and no stub can be out of date. See `exercise_list` for the exercises.
"""
import ast
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minipali.errors import InputError
from minipali.files import read_json, replacing

ROOT = Path(__file__).resolve().parents[2]
PROGRESS = ".progress.json"
TOLERANCES = {"float64": 1e-9, "float32": 1e-5}  # as a share of the largest value that is expected


class Mistake(Exception):
    """What is wrong with the reader's function, in words that help."""


@dataclass(frozen=True)
class Case:
    """`arguments(rng)` for both functions; `says` is what to think about if their results differ.

    `outcome(function, *arguments)`: what is compared, where that is not simply what the function returns.
    """
    says: str
    arguments: object
    outcome: object = staticmethod(lambda function, *arguments: function(*arguments))


@dataclass(frozen=True)
class Exercise:
    """`function` of `module`; `near_miss`: (text, wrong text) of the classic mistake; `tests`: (file, words of -k)."""
    name: str
    module: str
    function: str
    topic: str
    task: str
    trap: str
    hints: tuple
    cases: tuple
    near_miss: tuple
    tests: tuple

    def original(self):
        """The function as it stands in this repository."""
        return functools.reduce(getattr, self.function.split("."), importlib.import_module(self.module))

    def source(self):
        """Its text, without indentation."""
        return inspect.cleandoc("\n" + inspect.getsource(inspect.unwrap(self.original())))

    def where(self):
        """The solution's place, as PATH:LINE."""
        code = inspect.unwrap(self.original()).__code__
        return f"{Path(code.co_filename).resolve().relative_to(ROOT).as_posix()}:{code.co_firstlineno}"


# --- the stub ---------------------------------------------------------------------------------------------------------

def _imports(exercise):
    """The import lines that the function needs: those of its module, and what it uses of the module itself."""
    module = importlib.import_module(exercise.module)
    tree = ast.parse(inspect.getsource(module))
    used = {node.id for node in ast.walk(ast.parse(exercise.source())) if isinstance(node, ast.Name)}
    lines, own = [], set()
    used.add("np")
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias for alias in node.names if (alias.asname or alias.name).split(".")[0] in used]
            if names:
                node.names = names
                lines.append(ast.unparse(node))
        else:
            targets = node.targets if isinstance(node, ast.Assign) else [node]
            own |= {getattr(target, "name", getattr(target, "id", None)) for target in targets}
    own = sorted(own & used - {exercise.function.split(".")[-1]})
    return lines + ([f"from {exercise.module} import {', '.join(own)}"] if own else [])


def stub(exercise):
    """The file that the reader fills in."""
    source = exercise.source()
    function = ast.parse(source).body[0]
    lines = source.splitlines()
    first = function.lineno  # decorators stand above it and are left out
    last = function.body[0].end_lineno if ast.get_docstring(function) else first
    while last < len(lines) and lines[last].strip().startswith("#"):
        last += 1
    about = f'"""Exercise: {exercise.task}"""'
    body = "\n".join(lines[first - 1:last])
    return "\n".join([about, *_imports(exercise)]) + f'\n\n\n{body}\n    raise NotImplementedError\n'


def solution(exercise, old="", new=""):
    """The same file with the lines of the repository in it, `old` replaced by `new`."""
    source = exercise.source()
    if old and source.count(old) != 1:
        raise ValueError(f"{exercise.name}: the text of the near miss stands {source.count(old)} times in the function")
    source = source.replace(old, new) if old else source
    lines = source.splitlines()
    body = "\n".join(lines[ast.parse(source).body[0].lineno - 1:])
    return "\n".join(_imports(exercise)) + f"\n\n\n{body}\n"


def load(path, exercise):
    """The reader's function; InputError with file and line if the file cannot even be read as Python."""
    name = exercise.function.split(".")[-1]
    spec = importlib.util.spec_from_file_location(f"exercise_{exercise.name.replace('-', '_')}", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise InputError(f"{path}, line {error.lineno}: {error.msg}") from None
    except Exception as error:  # noqa: BLE001 - it is the reader's file: anything may be in it
        raise InputError(f"{path}: {type(error).__name__} while it is read: {error}") from None
    if not callable(getattr(module, name, None)):
        raise InputError(f"{path}: expected a function {name}")
    return getattr(module, name)


# --- the check --------------------------------------------------------------------------------------------------------

def _difference(result, expected, name="the result"):
    """In words, how two results differ, or None."""
    if dataclasses.is_dataclass(expected) and type(result) is type(expected):
        result, expected = dataclasses.asdict(result), dataclasses.asdict(expected)
    if isinstance(expected, dict):
        if not isinstance(result, dict) or result.keys() != expected.keys():
            return f"{name} should hold {', '.join(map(str, expected))}"
        parts = (_difference(result[key], value, f"{key!r} of {name}") for key, value in expected.items())
        return next(filter(None, parts), None)
    if isinstance(expected, (tuple, list)):
        if not isinstance(result, (tuple, list)) or len(result) != len(expected):
            return f"{name} should have {len(expected)} parts"
        pairs = enumerate(zip(result, expected, strict=True))
        parts = (_difference(x, y, f"part {i} of {name}") for i, (x, y) in pairs)
        return next(filter(None, parts), None)
    if not isinstance(expected, (np.ndarray, np.generic)):
        return None if result == expected else f"{name} is {result!r}, expected {expected!r}"
    return _array_difference(result, expected, name)


def _array_difference(result, expected, name):
    if not isinstance(result, (np.ndarray, np.generic)):
        return f"{name} should be an array, and is {type(result).__name__}"
    if result.shape != expected.shape:
        return f"{name} has the shape {result.shape}, expected {expected.shape}"
    if result.dtype != expected.dtype:
        return f"{name} is {result.dtype}, expected {expected.dtype}: the type that comes in should go out"
    if not expected.size:
        return None
    x, y = result.astype(np.float64), expected.astype(np.float64)
    if not np.isfinite(x[np.isfinite(y)]).all():
        return f"{name} holds nan or infinity where numbers are expected"
    distance = np.abs(x - y)
    if distance.max() <= TOLERANCES.get(str(expected.dtype), 0.0) * (np.abs(y).max() or 1.0):
        return None
    at = tuple(map(int, np.unravel_index(np.argmax(distance), y.shape)))
    place = f" differs most at {at}:" if at else ""
    return f"{name}{place or ' is'} {result[at]:.7g}, expected {expected[at]:.7g}"


def _copied(tree):
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)(map(_copied, tree))
    return tree.copy() if isinstance(tree, np.ndarray) else tree


def _changed(arguments, before):
    """Whether an array in the arguments is no longer what it was."""
    if isinstance(arguments, dict):
        return any(_changed(arguments[key], before[key]) for key in arguments)
    if isinstance(arguments, (tuple, list)):
        return any(map(_changed, arguments, before))
    is_array = isinstance(arguments, np.ndarray)
    return is_array and not np.array_equal(arguments, before, equal_nan=arguments.dtype.kind == "f")


def check(exercise, function):
    """Hold the reader's function against the original on every case; raises Mistake with the first that differs."""
    for number, case in enumerate(exercise.cases):
        arguments, ours = (case.arguments(np.random.default_rng(number)) for _ in range(2))
        before = _copied(arguments)
        expected = case.outcome(exercise.original(), *ours)
        try:
            with np.errstate(all="ignore"):
                result = case.outcome(function, *arguments)
        except NotImplementedError:
            raise Mistake("it is not written yet: put your lines in place of `raise NotImplementedError`") from None
        except Exception as error:  # noqa: BLE001 - the reader's code may raise anything
            file = inspect.unwrap(function).__code__.co_filename
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
            where = f" in line {lines[-1]}" if lines else ""
            raise Mistake(f"{type(error).__name__}{where}: {error}. {case.says}") from None
        problem = _difference(result, expected)
        if problem:
            raise Mistake(f"{problem}. {case.says}")
        if isinstance(arguments, tuple) and _changed(arguments, before):
            raise Mistake("it changes its inputs: make new arrays, and leave what was given as it is")


@contextlib.contextmanager
def installed(exercise, function):
    """Inside, every module of the package uses the reader's function in place of the original."""
    original, places = exercise.original(), []
    *holder, name = exercise.function.split(".")
    if holder:
        owner = getattr(importlib.import_module(exercise.module), holder[0])
        places.append((owner, name))
    else:
        for module_name, module in list(sys.modules.items()):
            if module_name.startswith("minipali."):
                places += [(module, key) for key, value in vars(module).items() if value is original]
    for owner, key in places:
        setattr(owner, key, function)
    try:
        yield
    finally:
        for owner, key in places:
            setattr(owner, key, original)


def run_tests(exercise, path):
    """The function's own tests, with the reader's version in its place -> (whether they pass, pytest's output)."""
    file, words = exercise.tests
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "minipali.looking.exercise_plugin",
               "-p", "no:cacheprovider", file, "-k", words]
    environment = {**os.environ, "MINIPALI_EXERCISE": f"{exercise.name}={Path(path).resolve()}",
                   "HYPOTHESIS_PROFILE": "mutation"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done.returncode == 0, done.stdout + done.stderr


# --- progress ---------------------------------------------------------------------------------------------------------

def fingerprint(path):
    """Of a file's content: a solved exercise that is edited is open again."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def read_progress(folder):
    """{exercise: {"solved": fingerprint, "hints": how many were shown}}, empty where nothing is known."""
    path = Path(folder) / PROGRESS
    return read_json(path) if path.exists() else {}


def write_progress(folder, name, **fields):
    """Remember something about one exercise."""
    progress = read_progress(folder)
    progress[name] = {**progress.get(name, {}), **fields}
    with replacing(Path(folder) / PROGRESS) as file:
        file.write(json.dumps(progress, indent=2).encode())


@functools.cache
def bundled():
    """The model that comes with the repository, in float64: some exercises are tried on its real weights."""
    from minipali.decoding.loaded_model import load_model  # only some exercises need it
    return load_model(ROOT / "weights", np.float64)
