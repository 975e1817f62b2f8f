"""The seeded bugs of tests/mutations can all be tried: each text stands exactly once in its file, tests look at it."""
import ast
import sys

import pytest
from helpers import ROOT, TESTS

sys.path.insert(0, str(TESTS / "mutations"))
import seeded  # noqa: E402

BUGS = seeded.all_bugs()
SOURCES = {bug.file: (ROOT if bug.file == "run.py" else ROOT / "minipali") / bug.file for bug in BUGS}


def test_each_text_stands_once_in_its_file():
    texts = {file: path.read_text(encoding="utf-8") for file, path in SOURCES.items()}
    wrong = [f"{bug.file}: {bug.what}" for bug in BUGS if texts[bug.file].count(bug.old) != 1 or bug.old == bug.new]
    assert not wrong


def test_every_file_with_code_has_a_bug():
    """All but those that only declare: docstrings, imports, a Protocol."""
    def has_code(path):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.Lambda))]
        return any(isinstance(f, ast.Lambda) or len(f.body) > 1 or ast.get_docstring(f) is None for f in functions)
    package = ROOT / "minipali"
    without = [path for path in package.rglob("*.py") if has_code(path)
               and path.relative_to(package).as_posix() not in SOURCES]
    assert not without


def test_no_bug_is_listed_twice():
    assert len({(bug.file, bug.old, bug.new) for bug in BUGS}) == len(BUGS)


@pytest.mark.parametrize("file", SOURCES)
def test_tests_look_at_every_file(file):
    bug = next(bug for bug in BUGS if bug.file == file)
    assert seeded.tests_of(bug) and all((TESTS / name).exists() for name in seeded.tests_of(bug))
