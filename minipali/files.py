"""Reading and writing whole files."""
import contextlib
import json
import os
from pathlib import Path

from minipali.errors import InputError


def read_json(path):
    """A JSON file's content; InputError if it is missing, is not text or is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # also bytes that are not UTF-8, and numbers of 5000 digits
        raise InputError(f"{path}: not valid JSON ({error})") from None


@contextlib.contextmanager
def replacing(path):
    """A file to write to that takes the place of `path` when it is whole, and vanishes if it does not get there."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
