"""Does the suite notice? Puts each seeded bug of bugs/ into a copy of the repository and runs the tests that should.

    python tests/mutations/run.py            all of them, some minutes
    python tests/mutations/run.py --fast     a choice, under a minute
    python tests/mutations/run.py rope loss  those whose description or file contains one of the words

The exit status is 1 if a bug survives, if its text is not found exactly once, or if a test fails without any bug.
"""
import argparse
import contextlib
import importlib
import io
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from seeded import all_bugs, tests_of

ROOT = Path(__file__).resolve().parents[2]


def file_of(bug, root):
    """The path of a bug's file: run.py stands beside the package, all others in it."""
    return root / bug.file if bug.file == "run.py" else root / "minipali" / bug.file


def copy_repository(folder):
    for name in ["minipali", "tests"]:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "mutations"))
    shutil.copy(ROOT / "run.py", folder)
    for path in ROOT.iterdir():
        hidden = path.name.startswith(".") and path.name != ".pytest.ini"
        if path.name not in ("minipali", "tests", "run.py") and not hidden:
            (folder / path.name).symlink_to(path)


def run_tests(bug, tests):
    """pytest up to the first failure, in a copy of the repository that has the bug (None: no bug).

    -> its exit status, the test that failed and the last line of its output.
    """
    multiprocessing.current_process().daemon = False  # the tests of the training loop start processes of their own
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as output:
        copy_repository(Path(folder))
        if bug:
            path = file_of(bug, Path(folder))
            path.write_text(path.read_text(encoding="utf-8").replace(bug.old, bug.new), encoding="utf-8")
        os.chdir(folder)
        # A temporary folder of its own: in the common one several pytests would tidy up after one another.
        options = ["-x", "-q", "-p", "no:cacheprovider", f"--basetemp={folder}/.pytest"]
        status = importlib.import_module("pytest").main([*options, *(f"tests/{name}" for name in tests)])
        os.chdir(ROOT)
    failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+)", output.getvalue(), re.MULTILINE)
    return int(status), failed.group(1) if failed else "", (output.getvalue().strip().splitlines() or [""])[-1]


def try_bug(bug):
    """-> (verdict, the test that noticed or what is wrong with the bug)."""
    count = file_of(bug, ROOT).read_text(encoding="utf-8").count(bug.old)
    if count != 1:
        return "INVALID", f"its text is found {count} times in {bug.file}"
    status, failed, last_line = run_tests(bug, tests_of(bug))
    if status == 0:
        return "SURVIVED", " ".join(tests_of(bug))
    return ("killed", failed) if status == 1 else ("INVALID", f"pytest did not run: {last_line}")


def prepare():
    """The settings for all runs, and what takes long to import, here once for all the processes that fork off."""
    # A failing example need not be made small, and a bytecode cache could hide a change made within the same second.
    os.environ |= {"HYPOTHESIS_PROFILE": "mutation", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    sys.dont_write_bytecode = True
    for name in ["hypothesis.extra.numpy", "numpy", "PIL.Image", "pytest", "safetensors.numpy"]:
        importlib.import_module(name)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("words", nargs="*", help="only bugs whose description or file contains one of these")
    parser.add_argument("--fast", action="store_true", help="a choice of bugs, under a minute")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args()
    bugs = [bug for bug in all_bugs() if (bug.fast or not args.fast)
            and (not args.words or any(word.lower() in f"{bug.file} {bug.what}".lower() for word in args.words))]
    needed = sorted({name for bug in bugs for name in tests_of(bug)})
    verdicts = []
    prepare()
    # One fresh process for each run, since a process imports minipali once.
    with multiprocessing.get_context("fork").Pool(args.jobs, maxtasksperchild=1) as pool:
        without_bug = pool.apply_async(run_tests, (None, needed))
        for bug, (verdict, note) in zip(bugs, pool.imap(try_bug, bugs, chunksize=1)):
            verdicts.append(verdict)
            print(f"{verdict:8}  {bug.file}: {bug.what}  [{note}]", flush=True)
        status, failed, last_line = without_bug.get()
    if status != 0:
        sys.exit(f"without any bug {failed or last_line} fails as well: the verdicts mean nothing")
    print(f"{verdicts.count('killed')} of {len(bugs)} killed")
    sys.exit(verdicts.count("killed") != len(bugs))


if __name__ == "__main__":
    main()
