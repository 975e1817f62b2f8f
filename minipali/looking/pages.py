"""Pages whose code is run: the README and the course say nothing that a run does not give.

A page is Markdown with four conventions, none of which a reader has to know:

    ```python     is run; the blocks of a page share one namespace, and a ```text block behind one is what it prints
    ```sh         with a ```text or ```json block behind it: is run line by line, and the block is what it prints
    ```py         is an excerpt of the file that the nearest link before it names, and must stand there
    0.90<!--= f"{x:.2f}" -->          a number in the text is the value of an expression over the page's variables, or
                                      of lines("file.py"), the file's length
    [`softmax`](ops.py#L15-L24)       lines of a function or class, found by its name
"""
import ast
import contextlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
VALUE = re.compile(r"([^\s*|(]+)<!--= (.*?) -->")
LINK = re.compile(r"\[`([\w.]+)`\]\((\S+?\.py)#L\d+(?:-L\d+)?\)")
FILE = re.compile(r"\]\((\S+?\.py)(?:#\S*)?\)")


VARYING = {"seconds", "tokens_per_second", "peak_rss_bytes"}  # of run.py --json: another run gives other numbers

ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def scratch():
    """A folder in which commands find the repository's files and may write their own; the current one until it ends."""
    before, path = os.getcwd(), os.environ.get("PYTHONPATH")
    with tempfile.TemporaryDirectory() as folder:
        for name in ["weights", "minipali", "tests", "run.py"]:
            (Path(folder) / name).symlink_to(ROOT / name)
        os.chdir(folder)
        os.environ["PYTHONPATH"] = str(ROOT)
        try:
            yield
        finally:
            os.chdir(before)
            if path is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = path


def rounded(value):
    """JSON with four decimals, which is more than a reader wants and less than machines disagree about."""
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    return [rounded(inner) for inner in value] if isinstance(value, list) else value


def json_block(printed, shown):
    """What --json printed, a key a line; `shown`, the page's block, if it says the same but for timings and memory."""
    new = rounded(json.loads(printed)) | {"model": "weights"}
    old = json.loads(shown or "{}")
    if new.keys() == old.keys() and all(old[key] == new[key] for key in new.keys() - VARYING):
        return shown
    return "{\n" + ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in new.items()) + "\n}\n"


def run_shell(line):
    """What a command prints on stdout, run by this Python; what stands before "&&" was done before."""
    words = shlex.split(line.rpartition("&& ")[2])
    if words[0] == "python":
        words[0] = sys.executable
    return subprocess.run(words, capture_output=True, text=True, encoding="utf-8", check=True).stdout


def lines_of(path, name):
    """(first, last) line of a function, class or method ("KVCache.store") in a file."""
    node = ast.parse(path.read_text(encoding="utf-8"))
    for part in name.split("."):
        node = next(child for child in node.body if getattr(child, "name", None) == part)
    return node.lineno, node.end_lineno


def with_anchors(text, folder):
    """The page with every link to a function leading to the lines where it stands today."""
    def anchor(match):
        name, file = match.groups()
        return "[`{}`]({}#L{}-L{})".format(name, file, *lines_of(folder / file, name))
    return LINK.sub(anchor, text)


def missing_excerpts(text, folder):
    """The ```py blocks that do not stand in the file that was linked last before them."""
    for match in FENCE.finditer(text):
        if match[1] == "py":
            file = FILE.findall(text[:match.start()])[-1]
            source = (folder / file).read_text(encoding="utf-8")
            if not any(textwrap.indent(match[2], indent) in source for indent in ("", "    ", "        ")):
                yield file, match[2]


def run_page(text, folder, shell=run_shell):
    """The page as it would be if it were written today: outputs, numbers and anchors made again.

    `folder` is where its links start, `shell` gives what a command line prints.
    """
    namespace, pieces, printed, last = {"__name__": "page"}, [], None, 0
    namespace["lines"] = lambda file: len((folder / file).read_text(encoding="utf-8").splitlines())

    def evaluated(match):
        return f"{eval(match[2], namespace)}<!--= {match[2]} -->"

    blocks = list(FENCE.finditer(text))
    for match, after in zip(blocks, [*blocks[1:], None]):
        pieces.append(VALUE.sub(evaluated, text[last:match.start()]))
        kind, code = match.groups()
        last = match.end()
        if kind in ("text", "json") and printed is not None:
            content = printed if kind == "text" else json_block(printed, code)
            pieces.append(f"```{kind}\n{content}```")
            printed = None
            continue
        printed = None
        if kind == "python":
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile(code, "<page>", "exec"), namespace)
            printed = output.getvalue()
        elif kind == "sh" and after and after[1] in ("text", "json") and not text[match.end():after.start()].strip():
            printed = "".join(shell(line) for line in code.splitlines())
        pieces.append(match[0])
    pieces.append(VALUE.sub(evaluated, text[last:]))
    return with_anchors("".join(pieces), folder)
