"""What is wrong with what the user gave, in one line."""
import sys


class InputError(ValueError):
    """Something that the user gave cannot be used; the message is one line that says what was expected."""

    def __init__(self, message):
        # A name from a hostile file may hold line breaks or terminal codes: they are shown escaped.
        super().__init__("".join(c if c.isprintable() else repr(c)[1:-1] for c in message))


def short_name(name):
    """A name from a header can be as long as the header."""
    return name if len(name) <= 150 else name[:150] + "…"


class Interrupted(Exception):
    """A run was interrupted and has saved where it is; the message says how to go on."""


def run_command(name, main, argv):
    """Call main(argv) -> the exit status. What is wrong with what the user gave is said in one line on stderr."""
    try:
        return main(argv) or 0
    except InputError as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    except (Interrupted, KeyboardInterrupt) as error:
        print(f"\n{error}" if str(error) else "", file=sys.stderr)
        return 130
