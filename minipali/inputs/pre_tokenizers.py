"""Cutting a text into words, which no piece reaches across: the pre-tokenizers that a tokenizer.json names.

Each is a function of a word and whether it begins the text, and gives a list of words.
"""
import json
import re
from collections.abc import Callable
from functools import partial

from minipali.errors import InputError
from minipali.inputs.special_tokens import WHITE_SPACE

BLANKS = re.compile("[" + "".join(sorted(WHITE_SPACE)) + "]+")


def split_after(text: str, pattern: str) -> list:
    """Cut text after each occurrence of a pattern: "a b" at " " gives "a ", "b"."""
    *parts, last = text.split(pattern)
    return [part + pattern for part in parts] + ([last] if last else [])


def split_before(text: str, pattern: str) -> list:
    """Cut text before each occurrence of a pattern: "▁a▁b" at "▁" gives "▁a", "▁b"."""
    first, *parts = text.split(pattern)
    return ([first] if first else []) + [pattern + part for part in parts]


def cut_after(word: str, begins: bool, pattern: str) -> list:
    """Split: the word cut after a string, wherever it stands in the text."""
    return split_after(word, pattern)


def cut_at_blanks(word: str, begins: bool) -> list:
    """WhitespaceSplit: the parts between white space."""
    return [part for part in BLANKS.split(word) if part]


def cut_metaspace(word: str, begins: bool, mark: str, scheme: str, split: bool) -> list:
    """Metaspace: blanks become the mark, one is put in front, and a word begins at each."""
    word = word.replace(" ", mark)
    if not word.startswith(mark) and (scheme == "always" or scheme == "first" and begins):
        word = mark + word
    return split_before(word, mark) if split else [word]


def splitter(step) -> Callable:
    """The function of a step of type Split, which cuts after a string."""
    pattern = step["pattern"].get("String") if isinstance(step.get("pattern"), dict) else None
    usual = step.get("behavior") == "MergedWithPrevious" and not step.get("invert")
    if not isinstance(pattern, str) or not pattern or not usual:
        raise InputError(f"pre_tokenizer: expected Split on a string, MergedWithPrevious, found {json.dumps(step):.80}")
    return partial(cut_after, pattern=pattern)


def metaspace(step) -> Callable:
    """The function of a step of type Metaspace."""
    mark = step.get("replacement", "▁")
    # Older files say add_prefix_space in place of prepend_scheme.
    scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
    if not isinstance(mark, str) or len(mark) != 1 or scheme not in ("always", "first", "never"):
        raise InputError(f"pre_tokenizer: expected Metaspace of one character, found {json.dumps(step):.80}")
    return partial(cut_metaspace, mark=mark, scheme=scheme, split=bool(step.get("split", True)))


STEPS = {"Split": splitter, "Metaspace": metaspace, "WhitespaceSplit": lambda step: cut_at_blanks}


def read_pre_tokenizer(step) -> Callable:
    """The function of one step of the pre-tokenizer. Raises InputError for a step that is not done here."""
    kind = step.get("type") if isinstance(step, dict) else None
    if kind not in STEPS:
        raise InputError(f"pre_tokenizer: expected {', '.join(STEPS)}, found {json.dumps(step):.80}")
    return STEPS[kind](step)
