"""How every command ends: with its answer, or with one line on stderr that says what was wrong."""
import argparse
import contextlib
import errno
import math
import os
import signal
import sys
from collections.abc import Callable

DONE, FAILED, INTERRUPTED = 0, 2, 130  # the exit statuses; 130 is what shells give to Ctrl-C


class CommandError(Exception):
    """A command cannot go on; the message is one line."""

    def __init__(self, message):
        # A name from a hostile file may hold line breaks or terminal codes: they are shown escaped.
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in str(message)))


class InputError(CommandError, ValueError):
    """Input from the user cannot be used; the message is one line that says what was expected."""


class Interrupted(Exception):
    """A run was interrupted and has saved where it is; the message says how to go on."""


class OutputError(Exception):
    """stdout cannot be written; the cause is the OSError."""


def short_name(name: str) -> str:
    """A name from a header can be as long as the header."""
    return name if len(name) <= 150 else name[:150] + "…"


# --- options ----------------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """A parser that answers a wrong option with one line, without the usage text; `examples` end the help."""

    def __init__(self, prog: str, description: str, examples: str):
        super().__init__(prog=prog, description=description, epilog=f"examples:\n{examples}", allow_abbrev=False,
                         formatter_class=argparse.RawDescriptionHelpFormatter)

    def error(self, message):
        raise InputError(message)


def integer(least: int) -> Callable[[str], int]:
    """The type of an option that is an integer of at least `least`."""
    def convert(text):
        with contextlib.suppress(ValueError):  # int() also refuses numbers of thousands of digits
            if int(text) >= least:
                return int(text)
        raise argparse.ArgumentTypeError(f"{text:.20}: expected an integer of at least {least}")
    return convert


def positive(text: str) -> float:
    """The type of an option that is a number above 0."""
    with contextlib.suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text:.20}: expected a number above 0")


def path_name(text: str) -> str:
    """The type of an option that names a file or a folder. An empty text would mean the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, found an empty text")
    return text


def named_options(options: dict[str, object]) -> str:
    """Of {option: whether it was given} those that were: "--a and --b", or "" if there is none."""
    return " and ".join(name for name, there in options.items() if there)


# --- stderr and stdout ------------------------------------------------------------------------------------------------

def _silence(stream):
    """Discard what is still buffered: Python would try to write it again at exit, and fail with status 120."""
    with contextlib.suppress(OSError, ValueError):  # a stream without a number has nothing to send
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _say(text, end="\n"):
    """Print to stderr. A stderr that cannot be written does not end a run."""
    try:
        print(text, end=end, file=sys.stderr, flush=True)
    except OSError:
        _silence(sys.stderr)


class Progress:
    """Messages on stderr, if wanted: lines, and a progress line that the next one replaces."""

    def __init__(self, name: str, wanted: bool):
        self.name, self.wanted = name, wanted
        self.width = 0  # of the line of progress that is on the screen
        self.complaints = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.clear()

    def __call__(self, text: str) -> None:
        if self.wanted:
            self.clear()
            _say(text)

    def update(self, text: str) -> None:
        """Show a line that the next one overwrites."""
        if self.wanted:
            self.clear()
            _say(text, end="")
            self.width = len(text)

    def complain(self, problem: object) -> None:
        """One line about what is wrong, wanted or not."""
        self.clear()
        self.complaints += 1
        _say(f"{self.name}: error: {problem}")

    def clear(self):
        """To be called before an answer is printed: on a terminal both streams share the line."""
        if self.width:
            _say("\r" + self.width * " ", end="\r")
            self.width = 0


class _Stdout:
    """stdout; an error in writing it is an OutputError, unlike an error in any other file."""

    def __init__(self, stream):
        self._stream = stream

    def _tried(self, act, *arguments):
        try:
            return act(*arguments)
        except OSError as error:
            raise OutputError from error

    def write(self, text):
        return self._tried(self._stream.write, text)

    def flush(self):
        self._tried(self._stream.flush)

    def __getattr__(self, name):
        return getattr(self._stream, name)


# --- the process ------------------------------------------------------------------------------------------------------

def _on_interrupt(*_):
    # A second Ctrl-C waits for nothing: the first may be held up by threads that still have work.
    signal.signal(signal.SIGINT, lambda *_: os._exit(INTERRUPTED))
    sys.exit(INTERRUPTED)


def prepare_process() -> None:
    """To be called before the slow imports, so that Ctrl-C never ends in a traceback, and no stream is missing."""
    signal.signal(signal.SIGINT, _on_interrupt)
    # Where a stream is closed, the next file that is opened would get its number, and what is printed with it.
    for name, mode in [("stdin", "r"), ("stdout", "w"), ("stderr", "w")]:
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
    # UTF-8 whatever the terminal's encoding; a file name's bytes that are not UTF-8 are shown escaped.
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")


def _problem(error):
    """The line about an error that is not a bug in this program, or None."""
    if isinstance(error, CommandError):
        return error
    if isinstance(error, MemoryError) or isinstance(error, OSError) and error.errno == errno.ENOMEM:
        detail = f" ({error})" if isinstance(error, MemoryError) and str(error) else ""
        return CommandError(f"not enough memory for this model and what it was asked{detail}")
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return CommandError("not enough memory, or too many processes, to start a thread")
    if isinstance(error, ImportError):
        cause = error  # NumPy wraps the cause in a page of advice
        while isinstance(cause.__cause__ or cause.__context__, ImportError):
            cause = cause.__cause__ or cause.__context__
        if isinstance(cause, ModuleNotFoundError) and not (cause.name or "").startswith("minipali"):
            return CommandError(f"the package {cause.name} is not installed (pip install -r requirements.txt)")
        if "map segment" in str(cause) or "allocate memory" in str(cause):
            return CommandError(f"not enough memory to start ({cause})")
    if isinstance(error, OSError):  # known files raise InputError where they are read or written; this is all else
        return CommandError(f"{error.filename}: {error.strerror}" if error.filename else error)
    return None


def run_command(name: str, main: Callable[[list[str]], int | None], argv: list[str]) -> int:
    """Call main(argv) and return the exit status: 0 done, 2 after one line on stderr, 130 interrupted.

    Whoever reads stdout may close it early (`| head`): that is no error. Bugs in the program keep their traceback.
    """
    stdout, sys.stdout = sys.stdout, _Stdout(sys.stdout)
    try:
        try:
            status = main(argv) or DONE
        except SystemExit as stop:  # after --help, or Ctrl-C
            status = stop.code or DONE
        sys.stdout.flush()
        return status
    except (Interrupted, KeyboardInterrupt) as error:
        _say(f"\n{error}" if str(error) else "")
        return INTERRUPTED
    except OutputError as error:
        _silence(stdout)
        if isinstance(error.__cause__, BrokenPipeError):
            return DONE
        _say(f"{name}: error: stdout: {error.__cause__.strerror}")
        return FAILED
    except Exception as error:
        problem = _problem(error)
        if problem is None:
            raise
        _say(f"{name}: error: {problem}")
        return FAILED
    finally:
        sys.stdout = stdout
