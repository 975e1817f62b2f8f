"""Which files a folder holds: pictures to ask about, and what lies beside the weights of a model."""
import os
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from minipali.errors import InputError


def picture_files(paths: Iterable[str | Path]) -> tuple[list[str | Path], int]:
    """Files as they are given, folders as the pictures in them by name; and how many other files the folders hold.

    In a folder a picture is what has the ending of a format that Pillow reads: a damaged one is still meant to be one.
    Hidden files and subfolders are passed over. Raises InputError for a folder without pictures.
    """
    pictures, passed_over = [], 0
    for path in paths:
        if not os.path.isdir(path):
            pictures.append(path)
            continue
        try:
            files = sorted(entry.name for entry in os.scandir(path) if entry.is_file() and entry.name[0] != ".")
        except OSError as error:
            raise InputError(f"{path}: cannot be read as a folder ({error.strerror})") from None
        endings = {ending for ending, format in Image.registered_extensions().items() if format in Image.OPEN}
        in_folder = [os.path.join(path, name) for name in files if Path(name).suffix.lower() in endings]
        if not in_folder:
            raise InputError(f"{path}: a folder without pictures, expected a picture file or a folder of them")
        pictures += in_folder
        passed_over += len(files) - len(in_folder)
    return pictures, passed_over


# What makes text of ids and numbers of pictures. Other files, such as a model card, tell of another model.
COMPANIONS = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "added_tokens.json",
              "special_tokens_map.json", "preprocessor_config.json", "processor_config.json", "generation_config.json")
