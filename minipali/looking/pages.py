"""Pages whose code is run: the README and the course say nothing that a run does not give.

A page is Markdown with four conventions, none of which a reader has to know:

    ```python     is run; the blocks of a page share one namespace, and a ```text block behind one is what it prints
    ```sh         is run line by line; the ```text block behind it is what it prints ("sh slow": not run here)
    ```py         is an excerpt of the file that the nearest link before it names, and must stand there
    0.90<!--= f"{x:.2f}" -->          a number in the text is the value of an expression over the page's variables
    [`softmax`](ops.py#L15-L24)       lines of a function or class, found by its name
"""
import ast
import contextlib
import io
import re
import shlex
import subprocess
import sys
import textwrap

FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
VALUE = re.compile(r"([^\s*|(]+)<!--= (.*?) -->")
LINK = re.compile(r"\[`([\w.]+)`\]\((\S+?\.py)#L\d+(?:-L\d+)?\)")
FILE = re.compile(r"\]\((\S+?\.py)(?:#\S*)?\)")


def run_shell(line):
    """What a command prints on stdout, run by this Python; its errors are this process's."""
    words = shlex.split(line)
    if words[0] == "python":
        words[0] = sys.executable
    return subprocess.run(words, capture_output=True, text=True, encoding="utf-8", check=False).stdout


def lines_of(path, name):
    """(first, last) line of a function, class or method ("KVCache.store") in a file."""
    nodes, found = ast.parse(path.read_text(encoding="utf-8")).body, None
    for part in name.split("."):
        found = next(node for node in nodes if getattr(node, "name", None) == part)
        nodes = found.body
    return found.lineno, found.end_lineno


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

    def evaluated(match):
        return f"{eval(match[2], namespace)}<!--= {match[2]} -->"

    for match in FENCE.finditer(text):
        pieces.append(VALUE.sub(evaluated, text[last:match.start()]))
        kind, code = match.groups()
        last = match.end()
        if kind == "text" and printed is not None:
            pieces.append(f"```text\n{printed}```")
            printed = None
            continue
        printed = None
        if kind == "python":
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(compile(code, "<page>", "exec"), namespace)
            printed = output.getvalue()
        elif kind == "sh":
            printed = "".join(shell(line) for line in code.splitlines())
        pieces.append(match[0])
    pieces.append(VALUE.sub(evaluated, text[last:]))
    return with_anchors("".join(pieces), folder)
