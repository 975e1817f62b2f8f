"""Every command ends with its answer, or with one line on stderr and a status, whatever happens to it."""
import errno
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from helpers import ROOT

from minipali import errors
from minipali.__main__ import COMMANDS, main
from minipali.commands import inspect
from minipali.errors import (
    CommandError,
    InputError,
    Interrupted,
    Parser,
    Progress,
    integer,
    named_options,
    path_name,
    positive,
    run_command,
)

unix = pytest.mark.skipif(sys.platform == "win32", reason="signals and file numbers of this kind are Unix's")
HELD_OUT = "weights/examples/cross.png"


def shell(*argv, run=False, **options):
    """`python -m minipali …`, or run.py, as a process of its own, in bytes."""
    command = [sys.executable, *(["run.py"] if run else ["-m", "minipali"]), *argv]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run(command, cwd=ROOT, timeout=60, check=False, **streams)


# --- messages ---------------------------------------------------------------------------------------------------------

def test_messages_are_one_line():
    """Line breaks and terminal codes of a hostile file are shown, not obeyed; letters of all scripts stay."""
    assert str(InputError("ä\nb\x1b[31m\u2028c")) == "ä\\nb\\x1b[31m\\u2028c"
    assert isinstance(InputError("a"), CommandError) and isinstance(InputError("a"), ValueError)


FAILURES = {
    "input": (InputError("a.png: no such file"), "a.png: no such file$"),
    "worker": (CommandError("a worker has died"), "a worker has died$"),
    "memory": (MemoryError(), "not enough memory"),
    "memory for an array": (np._core._exceptions._ArrayMemoryError((9, 9), np.dtype("f4")), "not enough memory.*324"),
    "memory for a map": (OSError(errno.ENOMEM, "Cannot allocate memory"), "not enough memory"),
    "threads": (RuntimeError("can't start new thread"), "not enough memory.*thread"),
    "a library in no memory": (ImportError("numpy: page of advice"), "not enough memory to start.*libx.so"),
    "a package": (ModuleNotFoundError("No module named 'PIL'", name="PIL"), "PIL is not installed .pip install"),
    "a file": (PermissionError(errno.EACCES, "Permission denied", "a.txt"), "a.txt: Permission denied$"),
    "a pipe that is not stdout": (BrokenPipeError(errno.EPIPE, "Broken pipe"), "Broken pipe$"),
}
FAILURES["a library in no memory"][0].__cause__ = ImportError("libx.so: failed to map segment from shared object")


@pytest.mark.parametrize("name", FAILURES)
def test_failures_are_one_line(capsys, name):
    error, pattern = FAILURES[name]

    def fail(argv):
        assert argv == ["x"]
        raise error
    stdout = sys.stdout
    assert run_command("minipali test", fail, ["x"]) == 2 and sys.stdout is stdout
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("minipali test: error: ") and err.count("\n") == 1
    assert re.search(pattern, err[:-1]) and "stdout" not in err and "Traceback" not in err


@pytest.mark.parametrize("error", [ZeroDivisionError, TypeError, KeyError, ValueError, RuntimeError, ImportError])
def test_mistakes_of_the_program_keep_their_traceback(error):
    """They are for whoever mends them; in one line they could not be found."""
    def fail(argv):
        raise error("a mistake")
    with pytest.raises(error):
        run_command("minipali test", fail, [])


@pytest.mark.parametrize("error, line", [(Interrupted("stopped; go on"), "\nstopped; go on\n"),
                                         (KeyboardInterrupt(), "\n"), (SystemExit(130), "")])
def test_interrupted(capsys, error, line):
    def fail(argv):
        raise error
    assert run_command("minipali test", fail, []) == 130
    assert capsys.readouterr() == ("", line)


def test_statuses(capsys):
    """What main returns, None for 0; --help ends with 0."""
    def helped(argv):
        Parser("minipali test", "It tests.", "  an example").parse_args(["--help"])
    assert [run_command("t", lambda argv, status=status: status, []) for status in (None, 0, 2, 7)] == [0, 0, 2, 7]
    assert run_command("t", helped, []) == 0
    out, err = capsys.readouterr()
    assert "It tests." in out and out.endswith("examples:\n  an example\n") and err == ""


# --- options ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, good, bad, expected", [
    (integer(1), {"1": 1, "40": 40}, ["0", "-1", "1.5", "two", "", "9" * 5000], "an integer of at least 1"),
    (integer(0), {"0": 0, "7": 7}, ["-1", "x"], "an integer of at least 0"),
    (positive, {"0.5": 0.5, "1e-9": 1e-9}, ["0", "-1", "nan", "inf", "x", ""], "a number above 0"),
    (path_name, {"a b": "a b"}, [""], "a path")])
def test_types_of_options(kind, good, bad, expected):
    parser = Parser("minipali test", "", "")
    parser.add_argument("--option", type=kind)
    for text, value in good.items():
        assert parser.parse_args(["--option", text]).option == value
    for text in bad:
        with pytest.raises(InputError, match=f"^argument --option: .*expected {expected}") as caught:
            parser.parse_args([f"--option={text}"])
        assert len(str(caught.value)) < 100


def test_options_are_not_cut_short():
    """An option that is added later could change what an old command means."""
    parser = Parser("minipali test", "", "")
    parser.add_argument("--option")
    with pytest.raises(InputError, match="^unrecognized arguments: --opt"):
        parser.parse_args(["--opt", "1"])


def test_named_options():
    assert named_options({"--a": 1, "--b": None, "--c": "x", "--d": 0, "--e": []}) == "--a and --c"
    assert named_options({"--a": False}) == ""


# --- stderr -----------------------------------------------------------------------------------------------------------

def test_progress_is_wiped_away(capsys):
    """Before the next line, before a complaint, and at the end, also after an error."""
    with pytest.raises(InputError), Progress("minipali test", wanted=True) as progress:
        progress("begin")
        progress.update("12 %")
        progress.update("100 %")
        progress.complain("a.png: broken")
        progress.update("x")
        raise InputError("b")
    wiped = [f"\r{' ' * width}\r" for width in (4, 5, 1)]
    assert progress.complaints == 1
    assert capsys.readouterr().err == (
        f"begin\n12 %{wiped[0]}100 %{wiped[1]}minipali test: error: a.png: broken\nx{wiped[2]}")


def test_progress_that_nobody_wants(capsys):
    with Progress("minipali test", wanted=False) as progress:
        progress("begin")
        progress.update("12 %")
        progress.complain("a.png: broken")
    assert capsys.readouterr().err == "minipali test: error: a.png: broken\n"


class Broken(io.StringIO):
    """A stream that cannot be written."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


def test_a_stderr_that_cannot_be_written_ends_no_run(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Broken(OSError(errno.ENOSPC, "No space left on device")))
    with Progress("minipali test", wanted=True) as progress:
        progress("begin")
        progress.update("12 %")
    assert run_command("minipali test", lambda argv: progress.complain("x"), []) == 0


@pytest.mark.parametrize("error, status, line", [
    (BrokenPipeError(errno.EPIPE, "Broken pipe"), 0, ""),
    (OSError(errno.ENOSPC, "No space left on device"), 2, "minipali test: error: stdout: No space left on device\n")])
def test_a_stdout_that_cannot_be_written(monkeypatch, capsys, error, status, line):
    """A reader who has seen enough is no error. What fails after the answer, when it is flushed, counts as well."""
    monkeypatch.setattr(sys, "stdout", Broken(error))
    assert run_command("minipali test", lambda argv: print("answer"), []) == status
    assert capsys.readouterr().err == line


# --- the commands as processes ----------------------------------------------------------------------------------------

def test_the_commands_are_listed(capsys):
    """One line each, and each line can be copied."""
    for argv in [], ["--help"], ["-h"]:
        assert main(argv) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[3] for line in lines] == list(COMMANDS)
        assert all(line.startswith("python -m minipali ") and len(line) < 120 for line in lines)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name, capsys):
    """Every option has a help text, and at the end stand examples of this very command."""
    assert main([name, "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.startswith(f"usage: minipali {name} ")
    head, _, examples = out.partition("\nexamples:\n")
    assert all(line.lstrip().startswith("python ") for line in examples.splitlines())
    assert f"python -m minipali {name} " in examples
    assert re.search(r"^usage: .*?\n\n[A-Z][^\n]*.*?\.\n\n", head, re.DOTALL), "a sentence, with its end"
    for line in re.findall(r"^  (-\S.*|[A-Z]\S.*)$", head, re.MULTILINE):
        assert re.search(r"\S {2,}\S", line) or re.search(rf"{re.escape(line)}\n {{10,}}\S", head), f"no help: {line}"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_in_one_line(name, capsys):
    assert main([name, "--no-such-option", "x"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and re.fullmatch(rf"minipali {name}: error: [^\n]+\n", err)


def test_an_unknown_command(capsys):
    for word in ["trian", "x" * 500, "--", "a\nb", "../train", ""]:
        assert main([word]) == 2
        out, err = capsys.readouterr()
        assert out == "" and re.fullmatch(r"minipali: error: [^\n]{20,300}\n", err) and "evaluate" in err


@unix
@pytest.mark.parametrize("run", [True, False])
def test_closed_pipes(run):
    process = subprocess.Popen([sys.executable, *(["run.py"] if run else ["-m", "minipali", "inspect", "weights"])],
                               cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert (process.wait(60), err) == (0, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="/dev/full is Linux's")
@pytest.mark.parametrize("words", [["inspect", "weights"], [], ["train", "--help"]])
def test_full_disks(words):
    """Said once. Python would try to write again at exit what is left, and then leave with status 120."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "wb") as full:
        done = shell(*words, stdout=full, env=environment)
        name = " ".join(["minipali", *words[:1]])
        assert (done.returncode, done.stderr.decode()) == (2, f"{name}: error: stdout: No space left on device\n")
        done = shell(*words, stderr=full, env=environment)
        assert done.returncode == 0 and done.stdout


@unix
@pytest.mark.parametrize("numbers", [[1], [0], [2], [0, 1, 2]])
def test_closed_streams(tmp_path, numbers):
    """Nobody reads, and no file gets stdout's number: the dump below would be full of text."""
    dump = tmp_path / "taps.safetensors"
    done = shell("--dump", dump, "--json", run=True, preexec_fn=lambda: [os.close(number) for number in numbers])
    assert done.returncode == 0 and done.stderr == b"" and dump.read_bytes()[8:9] == b"{"
    assert (done.stdout == b"") == (1 in numbers)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "ascii:strict"])
def test_narrow_encodings(tmp_path, encoding):
    """stdout is UTF-8 whatever it is told to be, and stderr escapes what it cannot say."""
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    picture = shutil.copy(ROOT / HELD_OUT, tmp_path / "é→🦉.png")
    done = shell("zero-shot", picture, "a→b", "é🦉", env=environment)
    assert (done.returncode, done.stderr) == (0, b"") and {"a→b", "é🦉"} <= set(done.stdout.decode("utf-8").split())
    done = shell("--each", picture, run=True, env=environment)
    assert done.returncode == 0 and "é→🦉.png\ta " in done.stdout.decode("utf-8")
    for words, run in [(["zero-shot", "→🦉.png", "a"], False), (["→🦉.png"], True)]:
        done = shell(*words, run=run, env=environment)
        assert done.returncode == 2 and done.stderr.count(b"\n") == 1 and b"no such file" in done.stderr
        assert b"Traceback" not in done.stderr


def test_names_that_are_not_text_are_printed():
    """A file's name may hold any byte; on stdout it is shown escaped and ends no run."""
    code = ("import sys; from minipali.errors import prepare_process, run_command; prepare_process(); "
            "sys.exit(run_command('t', lambda argv: print('a\\udcff\\ud800é'), []))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.decode("utf-8").strip(), done.stderr) == (0, "a\\udcff\\ud800é", b"")


@unix
@pytest.mark.parametrize("run", [True, False])
def test_interrupted_while_starting(tmp_path, run):
    """Also in the tenth of a second in which nothing but imports has happened."""
    (tmp_path / "PIL.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(30)\n")
    done = shell(*([] if run else ["evaluate"]), run=run, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


SLOW = """
import os, sys, threading, time
from minipali.errors import prepare_process, run_command
prepare_process()

def main(argv):
    threading.Thread(target=time.sleep, args=(40,)).start()
    print("ready", flush=True)
    time.sleep(40)

sys.exit(run_command("minipali test", main, []))
"""


@unix
def test_a_second_interrupt_waits_for_nothing():
    """The first waits for the threads that still have work; and then there is not a word about it."""
    process = subprocess.Popen([sys.executable, "-c", SLOW], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (130, b"", b"")


TIGHT = """
import os, re, resource, sys
import numpy, run
from minipali.commands import ask
held = 1024 * int(re.search(r"VmSize:\\s*(\\d+)", open("/proc/self/status").read())[1])
resource.setrlimit(resource.RLIMIT_AS, (held + (1 << 22), held + (1 << 22)))
sys.exit(run.main(["--max-new-tokens", "1"]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is read from /proc")
def test_too_little_memory():
    """Four megabytes more than the program itself takes: whatever fails first, memory is what is blamed."""
    done = subprocess.run([sys.executable, "-c", TIGHT], cwd=ROOT, capture_output=True, timeout=60, check=False,
                          env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})
    assert re.fullmatch(rb"run\.py: error: not enough memory[^\n]*\n", done.stderr), done.stderr
    assert (done.returncode, done.stdout) == (2, b"")


@pytest.mark.parametrize("package", ["numpy", "PIL"])
def test_a_missing_package(package):
    """As it is before the README's first command."""
    code = f"import sys; sys.modules[{package!r}] = None; import run; sys.exit(run.main([]))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60, check=False)
    assert done.returncode == 2 and done.stderr.decode() == (
        f"run.py: error: the package {package} is not installed (pip install -r requirements.txt)\n")


def test_names_with_bytes_that_are_no_text(capsys):
    """A file's name may hold any byte; errors show it escaped."""
    assert run_command("minipali inspect", inspect.main, ["a\udcff\nb"]) == 2
    assert "a\\udcff\\nb: no such folder" in capsys.readouterr().err


def test_the_statuses_are_the_contract():
    assert (errors.DONE, errors.FAILED, errors.INTERRUPTED) == (0, 2, 130)
