"""The house: which room may import which, no circle, no file too long to read at once."""
import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT

PACKAGE = ROOT / "minipali"

# Higher rows may import lower ones, never the other way round. A name is a folder, or a file beside the folders.
ROWS = [
    ["run"],
    ["__main__", "commands"],
    ["looking"],
    ["small_world"],
    ["learning"],
    ["decoding"],
    ["outputs"],
    ["checkpoint"],
    ["inputs"],
    ["model"],
    ["parallel", "backend", "files", "trace", "errors"],
]
RANK = {name: -row for row, names in enumerate(ROWS) for name in names}
CORE = {f"model/{name}.py" for name in ["ops", "siglip", "gemma", "paligemma", "losses"]}
LONGEST = 300
# Longer ones, each with the reason why it is not two files.
LONG = {
}
FILES = [ROOT / "run.py", *sorted(PACKAGE.rglob("*.py"))]


def module_of(path):
    """minipali/model/ops.py -> "model.ops", minipali/model/__init__.py -> "model", run.py -> "run"."""
    parts = path.relative_to(ROOT if path.parent == ROOT else PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_of(path): path for path in FILES}


def imported(path):
    """The modules of this repository that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name == "run" or name.startswith("minipali"):
                name = name.removeprefix("minipali").lstrip(".")
                yield name if name in MODULES else name.rpartition(".")[0]


GRAPH = {module: sorted({other for other in imported(path) if other and other != module})
         for module, path in MODULES.items()}


@pytest.mark.parametrize("module", [module for module in GRAPH if module])
def test_imports_go_down(module):
    room = module.split(".")[0]
    assert room in RANK, f"{module}: no row of the table of rooms"
    for other in GRAPH[module]:
        assert RANK[other.split(".")[0]] <= RANK[room], f"{module} imports {other}, which stands above it"


def test_no_two_files_import_each_other():
    """Depth first along the imports: a file that leads back to one on the way is a circle."""
    done, way = set(), []

    def visit(module):
        assert module not in way, f"a circle: {' -> '.join([*way[way.index(module):], module])}"
        if module not in done:
            way.append(module)
            for other in GRAPH.get(module, []):
                visit(other)
            done.add(way.pop())

    for module in GRAPH:
        visit(module)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_can_be_read_at_once(path):
    name = path.relative_to(ROOT if path.parent == ROOT else PACKAGE).as_posix()
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST or name in LONG, f"{name} has {lines} lines"


def test_the_core_is_read_in_one_sitting():
    assert sum(len((PACKAGE / name).read_text(encoding="utf-8").splitlines()) for name in CORE) <= 620


def test_tests_mirror_the_rooms():
    """Each folder of tests is a room, and no test file imports another."""
    tests = ROOT / "tests"
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    folders = {path.name for path in tests.iterdir() if path.is_dir()} - {"golden", "mutations", "__pycache__"}
    assert folders <= rooms
    for path in tests.rglob("test_*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        assert not [name for name in names if Path(name).name.startswith("test_")], path


two_cores = pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core runs one process")
HANGING = """
import pytest

@pytest.mark.limit(1)
def test_endless():
    while True:
        pass

def test_after():
    import os
    assert os.environ["OPENBLAS_NUM_THREADS"] == "1"

@pytest.mark.slow
def test_slow():
    raise AssertionError
"""


@pytest.mark.skipif(sys.platform == "win32", reason="alarms are Unix's")
def test_a_test_that_hangs_fails(tmp_path):
    """And the next one runs; one that takes minutes runs only if it is asked for; BLAS has one thread."""
    (tmp_path / "test_hanging.py").write_text(HANGING)
    status, printed = pytest_in(tmp_path)
    assert status == 1 and "took longer than 1 s" in printed
    assert "1 failed, 1 passed, 1 skipped" in printed


WAITING = """
import os, time
from pathlib import Path

def test_where():
    with open("ran", "a") as file:
        file.write(f"NUMBER {os.getpid()} ")
    for _ in range(1000):  # until the other process has a file as well
        if len(set(Path("ran").read_text().split()[1::2])) > 1:
            return
        time.sleep(0.02)

def test_more():
    assert NUMBER not in (0, 5), "failed: NUMBER"
"""


@two_cores
def test_two_processes_report_as_one(tmp_path):
    """Each file's tests run once, in either process; what the second one says is printed and counted by the first."""
    for i in range(6):
        (tmp_path / f"test_{i}.py").write_text(WAITING.replace("NUMBER", str(i)))
    status, printed = pytest_in(tmp_path)
    assert status == 1 and "2 failed, 10 passed" in printed and "failed: 0" in printed and "failed: 5" in printed
    ran = (tmp_path / "ran").read_text().split()
    assert sorted(ran[::2]) == list("012345") and len(set(ran[1::2])) == 2


@two_cores
def test_a_process_that_dies_is_noticed(tmp_path):
    """Its unfinished file would otherwise be missing in silence. The last file is the second process's first."""
    (tmp_path / "test_1.py").write_text(
        "import os, time\ndef test_it():\n    while not os.path.exists('dead'):\n        time.sleep(0.02)\n")
    (tmp_path / "test_2.py").write_text("import os\ndef test_it():\n    open('dead', 'w').close()\n    os._exit(0)\n")
    status, printed = pytest_in(tmp_path)
    assert status == 1 and "the second process ended with status 0" in printed


def pytest_in(folder):
    """Our pytest on a folder with tests of its own -> its status and what it prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    environment.pop("OPENBLAS_NUM_THREADS", None)
    command = [sys.executable, "-m", "pytest", "-q", "-c", ROOT / ".pytest.ini", "-p", "conftest", "-p",
               "no:cacheprovider", f"--rootdir={folder}", folder]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout + done.stderr


def test_golden_files_stay_small():
    """Under 2 MB in all, generators included."""
    assert sum(path.stat().st_size for path in (ROOT / "tests" / "golden").iterdir() if path.is_file()) < 2_000_000


THIRD_PERSON = """
    Adds Answers Applies Asks Builds Calls Checks Compares Computes Converts Copies Counts Creates Cuts Decodes
    Draws Encodes Fetches Fills Finds Gives Goes Handles Holds Keeps Loads Looks Makes Maps Measures Merges Moves
    Opens Parses Prints Puts Raises Reads Removes Resizes Returns Runs Says Sends Sets Shows Splits Stands Stops
    Takes Tells Trains Turns Updates Writes Yields
""".split()


@pytest.mark.parametrize("path", FILES, ids=str)
def test_docstrings_begin_in_the_imperative(path):
    """Write, not Writes: PEP 257. A docstring may also begin with what the function gives, such as "Rows of text"."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            first = (ast.get_docstring(node) or "-").split()[0]
            assert first not in THIRD_PERSON, f"{path}: {ast.get_docstring(node)[:60]}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_slices_have_no_blanks_around_their_colons(path):
    """x[a:b + 1], as everywhere in NumPy's own documentation."""
    text = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Slice):
            source = ast.get_source_segment(text, node)
            for part in (node.lower, node.upper, node.step):
                source = source.replace(ast.get_source_segment(text, part), "", 1) if part else source
            assert " " not in source, f"{path}:{node.lineno}"
