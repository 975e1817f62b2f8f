"""From a picture file to the numbers that the vision tower reads, rounded where the hub's processor rounds.

A picture is squeezed to a square (the aspect ratio is given up on purpose: PaliGemma paper, section 7), its bytes are
scaled to 0..1, and mean and deviation of 0.5 take them to -1..1.
"""
import dataclasses
import logging
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from minipali.errors import InputError
from minipali.files import read_json

# Pillow only warns from this size on (a file of a few bytes can claim it) and refuses at twice of it. It is a quarter
# of a gigabyte of RGB, a thousand times what any model looks at, and here it is the limit.
MAX_PIXELS = 89_478_485

logging.getLogger("PIL").addHandler(logging.NullHandler())  # InputError alone reports what is wrong with a picture


def _deep_gray_to_bytes(image):
    """Gray values of 16 or 32 bits, or floats, to the 8 bits of mode L."""
    values = np.asarray(image)
    if image.mode == "F":
        values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=255.0, neginf=0.0).clip(0, 2**31 - 1)
        if values.max() <= 1:
            values = 255 * values
        values = np.rint(values).astype(np.int64)
    # Mode I does not tell how many bits a file uses: take the fewest of 8, 16 and 31 that hold its brightest pixel.
    bits = 16 if image.mode.startswith("I;16") else next(n for n in [8, 16, 31] if values.max() < 2**n)
    # The high byte, which is also what Pillow keeps of 16-bit color.
    return Image.fromarray((values.clip(0) >> (bits - 8)).astype(np.uint8))


def to_rgb(image: Image.Image) -> Image.Image:
    """A Pillow picture of any mode as RGB.

    Transparency is dropped and not laid over white: the hub's `load_image` and big_vision do the same. (The hub's
    processor, handed RGBA, lays it over white in its latest versions and fails in most others.)
    """
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _deep_gray_to_bytes(image)  # convert("RGB") would clip: every value from 255 up turns white
    elif image.mode == "La":
        image = image.convert("LA")  # Pillow has no direct way from premultiplied gray
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # palettes with transparency: it is dropped on purpose
        return image.convert("RGB")


def _upright(image):
    """The picture rotated as its EXIF tag says: cameras store pixels in the sensor's orientation."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # noqa: BLE001 - Pillow raises nearly anything on damaged EXIF data; the picture is fine
        return image


def _opened(path, file):
    """A Pillow image of which only the header has been read."""
    image = Image.open(file)
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(f"{path}: a picture of {width} x {height} pixels, expected at most {MAX_PIXELS:,} pixels")
    return image


def _read(path):
    with open(path, "rb") as file, _opened(path, file) as image:
        image.load()
        return to_rgb(_upright(image))


def _verify(path):
    with open(path, "rb") as file, _opened(path, file) as image:
        image.verify()


def _with_input_errors(read, path):
    """read(path), with whatever it raises turned into an InputError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a repairable file is a usable one; a hopeless one raises
            return read(path)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise InputError(f"{path}: a folder, expected a picture file") from None
    except UnidentifiedImageError:
        raise InputError(f"{path}: not a picture in a format that Pillow reads") from None
    except Image.DecompressionBombError:
        raise InputError(f"{path}: a picture that is too large, expected at most {MAX_PIXELS:,} pixels") from None
    except MemoryError:
        raise InputError(f"{path}: not enough memory to read this picture") from None
    except Exception as error:  # noqa: BLE001 - Pillow's decoders raise nearly anything on damaged bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{path}: cannot be read as a picture ({reason})") from None


def open_image(path: str | Path) -> Image.Image:
    """The first frame of a picture file as an upright RGB Pillow image; InputError if there is none."""
    return _with_input_errors(_read, path)


def check_image(path: str | Path) -> None:
    """Raise InputError as `open_image` does, as far as that can be known without decoding a pixel, which is quick."""
    _with_input_errors(_verify, path)


def preprocess(image: Image.Image, size: int, mean: Sequence[float], std: Sequence[float], resample: int,
               rescale_factor: float) -> np.ndarray:
    """A picture as the vision tower's input: (3, size, size), float32, channels R, G, B.

    `resample` is Pillow's number of the filter (3 is bicubic). Equal to the hub's SiglipImageProcessorPil bit for bit.
    """
    # The filter works on bytes and rounds back to bytes, and widens itself when it shrinks a picture (antialiasing);
    # torch.nn.functional.interpolate on floats does neither, and its numbers differ in the second digit.
    pixels = np.asarray(to_rgb(image).resize((size, size), resample))
    pixels = (pixels.astype(np.float64) * rescale_factor).astype(np.float32)
    pixels = (pixels - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))  # (size,size,3) -> (3,size,size)


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _channels(values, name, where):
    """A field that holds one number for each of the three channels, or one for all."""
    value = values.get(name, 0.5)
    numbers = value if isinstance(value, list) else [value] * 3
    if len(numbers) != 3 or not all(map(_is_number, numbers)):
        raise InputError(f"{where}: {name} is {value!r}, expected three numbers")
    return tuple(map(float, numbers))


def _processor_fields(folder):
    """The fields of the hub's image processor in a folder, and the file that holds them; none if there is no file."""
    for name, section in [("processor_config.json", "image_processor"), ("preprocessor_config.json", None)]:
        path = Path(folder) / name
        if not path.exists():
            continue
        values = read_json(path)
        if section and isinstance(values, dict):
            values = values.get(section)
            if values is None:  # an older processor_config.json: the picture has a file of its own
                continue
        if not isinstance(values, dict):
            raise InputError(f"{path}: expected an object of fields, found {type(values).__name__}")
        return {name: value for name, value in values.items() if value is not None}, path
    return {}, folder


@dataclasses.dataclass(frozen=True)
class Preprocessor:
    """`preprocess` with the numbers that belong to a checkpoint; the defaults are those of every published SigLIP."""
    size: int
    mean: tuple = (0.5, 0.5, 0.5)
    std: tuple = (0.5, 0.5, 0.5)
    resample: int = int(Image.Resampling.BICUBIC)
    rescale_factor: float = 1 / 255

    @classmethod
    def from_folder(cls, folder: str | Path, image_size: int) -> "Preprocessor":
        """What a checkpoint's processor_config.json or preprocessor_config.json says, or the defaults without one.

        `image_size` is the model's; InputError if the file declares another, or a step that is not supported.
        """
        values, where = _processor_fields(folder)
        for flag, expected in [("do_resize", True), ("do_center_crop", False), ("do_pad", False)]:
            if values.get(flag, expected) is not expected:
                raise InputError(f"{where}: {flag} is {values[flag]!r}, expected {str(expected).lower()}")
        size = values.get("size", image_size)
        if size not in (image_size, {"height": image_size, "width": image_size}):
            raise InputError(f"{where}: size is {size!r}, expected the model's, {image_size} x {image_size}")
        resample = values.get("resample", cls.resample)
        if isinstance(resample, bool) or resample not in list(Image.Resampling):
            raise InputError(f"{where}: resample is {resample!r}, expected the number of a filter of Pillow's, 0 to 5")
        mean, std = _channels(values, "image_mean", where), _channels(values, "image_std", where)
        if 0 in std:
            raise InputError(f"{where}: image_std is {values['image_std']!r}, expected no zero")
        rescale_factor = values.get("rescale_factor", cls.rescale_factor)
        if not _is_number(rescale_factor):
            raise InputError(f"{where}: rescale_factor is {rescale_factor!r}, expected a number")
        if values.get("do_rescale") is False:
            rescale_factor = 1.0
        if values.get("do_normalize") is False:
            mean, std = (0.0,) * 3, (1.0,) * 3
        return cls(image_size, mean, std, int(resample), float(rescale_factor))

    def __call__(self, image: Image.Image) -> np.ndarray:
        """A Pillow image -> (3, size, size), float32."""
        return preprocess(image, self.size, self.mean, self.std, self.resample, self.rescale_factor)
