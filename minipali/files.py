"""Reading and writing complete files: a reader sees the old content or the new, never a part of it."""
import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from minipali.errors import InputError


def read_json(path: str | Path) -> Any:
    """A JSON file's content; InputError if it is missing, is not text or is not JSON."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))  # a byte order mark may stand in front
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # also bytes that are not UTF-8, and numbers of 5000 digits
        raise InputError(f"{path}: not valid JSON ({error})") from None


def check_writable(path: str | Path) -> None:
    """Raise InputError now for what could not be written after all the work."""
    if os.path.exists(path) and not os.path.isfile(path):  # renaming would put a file in a device's place
        raise InputError(f"{path}: cannot be written: it exists and is not a regular file")
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise InputError(f"{path}: cannot be written, expected a folder that exists and takes files")


def check_folder(path: str | Path) -> None:
    """Raise InputError now if `make_folder` could not make this folder, or nothing could be written into it."""
    nearest = next(folder for folder in [Path(path), *Path(path).absolute().parents] if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise InputError(f"{path}: cannot be written into, expected a folder, or a place where one can be made")


def make_folder(path: str | Path) -> None:
    """The folder, made with its parents where it is missing; InputError unless files can be written into it."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written into, expected a folder ({error.strerror})") from None
    if not os.access(path, os.W_OK):
        raise InputError(f"{path}: cannot be written into (Permission denied)")


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file to write to, which takes the place of `path` when the block ends, or vanishes if it fails.

    The bytes go to a file of another name in the same folder, they are flushed to the disk, and then the file is
    renamed. The name is unique, so two runs that write the same `path` never see each other's bytes: the last to
    finish wins. A replaced file keeps its permissions, a symbolic link stays and its target is replaced, as if the
    file had been opened and overwritten. Raises InputError if `path` cannot be written.
    """
    check_writable(path)
    target = Path(os.path.realpath(path))
    # Short, whatever the length of the name: a folder takes names of 255 bytes. Hidden: no reader takes it for a shard.
    temporary = target.with_name(f".{target.name[:40]}.{os.urandom(6).hex()}.part")
    try:
        # Not tempfile, whose files only their owner can read: 0o666 less the umask is what any new file gets.
        with open(temporary, "xb", opener=lambda name, flags: os.open(name, flags, 0o666)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileNotFoundError):
            os.chmod(temporary, stat.S_IMODE(os.stat(target).st_mode))
        os.replace(temporary, target)
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror or error})") from None
    finally:
        with contextlib.suppress(OSError):  # after a success it no longer exists
            os.unlink(temporary)


def write_json(path: str | Path, content: Any, indent: int = 2) -> None:
    """Write a JSON file, completely or not at all."""
    with replacing(path) as file:
        file.write((json.dumps(content, ensure_ascii=False, indent=indent) + "\n").encode("utf-8"))
