"""The examples of fine-tuning: a JSONL file, one picture, prompt and answer a line; and their order."""
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from minipali.decoding.loaded_model import Model, check_ids, encode_prompt
from minipali.errors import InputError
from minipali.inputs.image import check_image


class Example(NamedTuple):
    """A picture's path, the ids of the prompt and of the answer, and `where` they stand in the file, for errors."""
    image: Path
    prefix: tuple
    suffix: tuple
    where: str


def _parse(line, folder, model, note):
    """One line of the file -> picture, prefix ids, suffix ids; InputError says what is wrong with it."""
    try:
        fields = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON ({error})") from None
    if not isinstance(fields, dict):
        raise InputError(f"expected an object with image, prefix and suffix, found {type(fields).__name__}")
    for name in ("image", "prefix", "suffix"):
        if name not in fields:
            raise InputError(f"{name} is missing")
        if not isinstance(fields[name], str):
            raise InputError(f"{name} is {json.dumps(fields[name])[:80]}, expected text")
    cfg = model.cfg
    prefix, suffix = encode_prompt(fields["prefix"], model, note=note), model.tokenizer.encode(fields["suffix"])
    check_ids([*prefix, *suffix], cfg)  # one place is left for EOS, as in answering
    return folder / fields["image"], tuple(prefix), (*suffix, cfg.eos_token_ids[0])


def read_examples(path: Path, model: Model, note=None) -> list[Example]:
    """The examples of a JSONL file, tokenized, each picture's header checked; blank lines and other fields are skipped.

    `note(line)` is called where a prefix begins with <image> or <bos>, which are left out.
    Raises InputError, "FILE, line N: ...", at the first line that cannot be learned from.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    examples, checked = [], set()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            image, prefix, suffix = _parse(line, path.parent, model, note)
            if image not in checked:
                check_image(image)
                checked.add(image)
        except InputError as problem:
            raise InputError(f"{where}: {problem}") from None
        examples.append(Example(image, prefix, suffix, where))
    if not examples:
        raise InputError(f"{path}: no examples")
    return examples


def order(seed, number, size, count):
    """Which of `count` examples make batch `number` of `size`: all in a new order, then all again in another.

    It follows from the arguments alone. A batch may hold the end of one round and the beginning of the next.
    """
    places = range(number * size, (number + 1) * size)
    rounds = {place // count: None for place in places}
    shuffled = {i: np.random.default_rng((seed, 3, i)).permutation(count) for i in rounds}
    return [int(shuffled[place // count][place % count]) for place in places]
