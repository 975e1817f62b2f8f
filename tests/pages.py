"""What the README and the course are checked with: their commands are run in this process."""
import contextlib
import io
import re
import shlex

import run
from minipali.__main__ import main
from minipali.looking.pages import FENCE


def shell(line):
    """What one of the page's commands prints on stdout; a command that fails fails the test."""
    words = shlex.split(line.rpartition("&& ")[2])  # requirements are installed where tests run
    with contextlib.redirect_stdout(io.StringIO()) as output:
        if words[:2] == ["python", "run.py"]:
            status = run.main(words[2:])
        else:
            assert words[:3] == ["python", "-m", "minipali"], line
            status = main(words[3:])
    assert status == 0, line
    return output.getvalue()


def prose(text):
    """A page without its code, its links' targets and its comments; a checked number becomes #."""
    text = re.sub(r"[^\s*|(]+<!--= .*? -->", "#", FENCE.sub("", text))
    text = re.sub(r"^    .*$", "", text, flags=re.MULTILINE)
    return re.sub(r"`[^`\n]*`|\]\([^)]*\)|<!--.*?-->", "", text)


def differing_lines(a, b):
    """The lines in which two texts differ, for a message that can be read."""
    return [(x, y) for x, y in zip(a.splitlines(), b.splitlines()) if x != y][:10]
