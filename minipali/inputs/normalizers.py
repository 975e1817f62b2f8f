"""What happens to a text before it is cut into pieces: the steps that tokenizer files name, each text -> text.

`read_normalizer` reads the steps of a tokenizer.json, `SentencePieceNormalizer` is what a tokenizer.model asks for.
"""
import base64
import binascii
import json
import re
from collections.abc import Callable
from functools import partial

from minipali.errors import InputError
from minipali.inputs.charsmap import CharsMap
from minipali.inputs.special_tokens import WHITE_SPACE, build_trie, longest_match

HALF_PAIR = re.compile("[\ud800-\udfff]")

# The part of regular expressions that tokenizer files use: one character or a set of them, once or several times,
# alternatives, and the text's two ends. It means the same to every program; the rest does not.
ELEMENT = r"(?:\\[^a-zA-Z0-9\s]|[^\\\[\]&])"
SET = re.compile(rf"\[{ELEMENT}+\]")
PARTS = re.compile(rf"({SET.pattern}|\\[sAz]|\\[^a-zA-Z0-9\s]|[^\\\[\](){{}}^$.*+?|])|(\+|\{{\d+,\d*\}}|\|)")
SPACE = "[" + "".join(sorted(WHITE_SPACE)) + "]"


def lower_case(text: str) -> str:
    """Every character for itself, as the hub's tokenizers do; str.lower() would end a Greek word in another sigma."""
    return "".join([character.lower() for character in text])


def compile_pattern(pattern: str) -> re.Pattern:
    """A pattern of a tokenizer file as one of Python's. Raises InputError for one that may mean something else here."""
    translated, i = "", 0
    while i < len(pattern):
        part = PARTS.match(pattern, i)
        if part is None:
            raise InputError(f"the pattern {pattern!r:.60} is not supported")
        i = part.end()
        if part[1] is None:
            translated += part[2]
        elif SET.fullmatch(part[1]):
            elements = re.findall(ELEMENT, part[1][1:-1])
            if elements[0] == "^" or "-" in elements[1:-1]:
                raise InputError(f"the pattern {pattern!r:.60} is not supported: expected a list of characters")
            translated += "[" + "".join(re.escape(element[-1]) for element in elements) + "]"
        else:
            translated += {r"\s": SPACE, r"\A": r"\A", r"\z": r"\Z"}.get(part[1]) or re.escape(part[1][-1])
    try:
        return re.compile(translated)
    except (re.error, OverflowError):
        raise InputError(f"the pattern {pattern!r:.60} is not a regular expression") from None


def strip(text: str, left: bool, right: bool) -> str:
    """Without white space at its ends: Unicode's, which is not quite Python's."""
    blanks = "".join(WHITE_SPACE)
    text = text.lstrip(blanks) if left else text
    return text.rstrip(blanks) if right else text


def read_replacement(step) -> tuple:
    """(string or compiled pattern, replacement) of a step of type Replace. Raises InputError for any other step."""
    pattern, content = step.get("pattern"), step.get("content")
    if isinstance(pattern, dict) and isinstance(content, str) and not HALF_PAIR.search(content):
        for kind, read in [("String", str), ("Regex", compile_pattern)]:
            if isinstance(pattern.get(kind), str) and pattern[kind]:
                return read(pattern[kind]), content
    raise InputError(f"expected Replace of a string by a string, found {json.dumps(step):.80}")


def replace(text: str, pattern, content: str) -> str:
    """The text with each occurrence of a string or a compiled pattern replaced."""
    if isinstance(pattern, str):
        return text.replace(pattern, content)
    return pattern.sub(lambda _: content, text)  # as a function, since a backslash in a string would mean something


def replacer(step) -> Callable:
    """The function of a step of type Replace."""
    pattern, content = read_replacement(step)
    return partial(replace, pattern=pattern, content=content)


def precompiled(step) -> Callable:
    """The function of a step of type Precompiled: the rules of a SentencePiece model."""
    try:
        data = base64.b64decode(step.get("precompiled_charsmap") or "", validate=True)
    except (TypeError, ValueError, binascii.Error):
        raise InputError("precompiled_charsmap: expected base64") from None
    return CharsMap(data).by_grapheme


def stripper(step) -> Callable:
    """The function of a step of type Strip."""
    left, right = step.get("strip_left", True) is True, step.get("strip_right", True) is True
    return partial(strip, left=left, right=right)


def prepend(text: str, prefix: str) -> str:
    """The prefix and the text; an empty text stays empty."""
    return prefix + text if text else text


def prepender(step) -> Callable:
    """The function of a step of type Prepend."""
    prefix = step.get("prepend")
    if not isinstance(prefix, str) or HALF_PAIR.search(prefix):
        raise InputError(f"Prepend: expected a string, found {json.dumps(step):.80}")
    return partial(prepend, prefix=prefix)


# Functions made by `partial` and not on the spot, so that a tokenizer can be sent to another process.
STEPS = {"Replace": replacer, "Precompiled": precompiled, "Strip": stripper, "Prepend": prepender,
         "Lowercase": lambda step: lower_case}


def read_normalizer(step) -> Callable:
    """The function of one step of a tokenizer.json's normalizer. Raises InputError for a step that is not done here."""
    kind = step.get("type") if isinstance(step, dict) else None
    if kind not in STEPS:
        raise InputError(f"normalizer: expected {', '.join(STEPS)}, found {json.dumps(step):.80}")
    try:
        return STEPS[kind](step)
    except InputError as error:
        raise InputError(f"normalizer: {error}") from None


class SentencePieceNormalizer:
    """The `normalizer_spec` of a tokenizer.model: a text as its model wants it, with "▁" for blanks.

    charsmap: CharsMap or None. add_dummy_prefix: a blank is put in front, so that a word at the beginning is the piece
    that it is elsewhere. remove_extra_whitespaces: none at the ends, no two together. kept: pieces that stay as they
    are wherever they stand (the USER_DEFINED ones).
    """

    def __init__(self, charsmap, add_dummy_prefix: bool, remove_extra_whitespaces: bool, kept):
        self.charsmap, self.kept = charsmap, build_trie({piece.encode("utf-8"): piece for piece in kept})
        self.add_dummy_prefix, self.remove_extra_whitespaces = add_dummy_prefix, remove_extra_whitespaces

    def __call__(self, text: str) -> str:
        if self.charsmap is None and not self.remove_extra_whitespaces:
            parts = [text] if text else []
        else:
            parts = self._parts(text.encode("utf-8"))
        if self.remove_extra_whitespaces:
            parts = self._single_blanks(parts)
        changed = "".join(parts)
        if self.remove_extra_whitespaces and not changed:
            return ""
        changed = ("▁" if self.add_dummy_prefix and text else "") + changed.replace(" ", "▁")
        return changed.rstrip("▁") if self.remove_extra_whitespaces else changed

    def _parts(self, data):
        """Yield the text from left to right: a kept piece, what a rule makes of its characters, or a character."""
        i = 0
        while i < len(data):
            piece, end = longest_match(data, i, self.kept)
            if piece is None:
                replaced = self.charsmap and self.charsmap.longest_match(data, i)
                if not replaced:
                    end = i + (1 if data[i] < 0x80 else 2 if data[i] < 0xE0 else 3 if data[i] < 0xF0 else 4)
                    replaced = data[i:end], end
                piece, end = replaced
                piece = piece.decode("utf-8", "replace")  # rules of a hostile file may end within a character
            yield piece
            i = end

    @staticmethod
    def _single_blanks(parts):
        """Yield the parts without the blanks that follow another blank, or nothing."""
        after_blank = True
        for part in parts:
            part = part.lstrip(" ") if after_blank else part
            if part:
                yield part
                after_blank = part.endswith(" ")
