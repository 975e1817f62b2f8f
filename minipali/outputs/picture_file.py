"""A picture as a file, in the format that the name's ending asks for."""
import io
from pathlib import Path

from PIL import Image

from minipali.errors import InputError
from minipali.files import check_writable, replacing


def _encoded(picture, path):
    """The bytes of a Pillow picture; InputError if Pillow does not write the format."""
    buffer = io.BytesIO()
    try:
        picture.save(buffer, format=Image.registered_extensions()[Path(path).suffix.lower()])
    except Exception:  # noqa: BLE001 - of the formats that can only be read, or are not in RGB, each raises its own
        raise InputError(f"{path}: not a picture format that Pillow writes, "
                         "expected a name such as boxes.png") from None
    return buffer.getvalue()


def check_picture_file(path: str | Path) -> None:
    """Raise InputError now if `save_picture` could not write this file after all the work."""
    check_writable(path)
    _encoded(Image.new("RGB", (1, 1)), path)


def save_picture(picture: Image.Image, path: str | Path) -> None:
    """Write a Pillow picture, completely or not at all; InputError if its format or its place cannot be used."""
    content = _encoded(picture, path)
    with replacing(path) as file:
        file.write(content)
