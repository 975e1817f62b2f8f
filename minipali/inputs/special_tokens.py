"""Tokens that stand for something other than a piece of text, and how they are cut out of it."""
import re
import unicodedata
from dataclasses import dataclass

# What published files call control tokens; a prompt that contains one of these names holds plain text.
CONTROL_NAMES = {"<pad>", "<eos>", "<bos>", "<unk>", "<image>", "<start_of_turn>", "<end_of_turn>"}
# A prompt may point at boxes and masks, so these are tokens, whether or not a file lists them or flags them as special.
LOCATION_NAMES = {f"<loc{i:04}>" for i in range(1024)} | {f"<seg{i:03}>" for i in range(128)}
BYTE_NAMES = [f"<0x{byte:02X}>" for byte in range(256)]
BYTE_NAME = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Unicode's White_Space. Python's str.isspace() also counts four control characters, U+001C to U+001F.
WHITE_SPACE = {*"\t\n\v\f\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000", *map(chr, range(0x2000, 0x200B))}
# Symbols that Unicode counts as alphabetic all the same: letters in parentheses, circles and squares.
SQUARED_LETTERS = {*map(chr, [*range(0x1F130, 0x1F14A), *range(0x1F150, 0x1F16A), *range(0x1F170, 0x1F18A)])}


@dataclass(frozen=True)
class AddedToken:
    """One entry of `added_tokens`, with the fields that the file gives it."""

    id: int
    content: str
    single_word: bool  # matches only where no word character touches it
    lstrip: bool  # swallows the white space on its left
    rstrip: bool  # and on its right
    normalized: bool  # is looked for after blanks have become "▁", not before
    special: bool  # left out when decoding

    @classmethod
    def plain(cls, id, content):
        """A token that is matched in the raw text, wherever it stands."""
        return cls(id, content, single_word=False, lstrip=False, rstrip=False, normalized=False, special=False)


def build_trie(named):
    """Nested dicts, one level per character; the key None holds the token that ends there. named: {text: token}."""
    root = {}
    for text, token in named.items():
        node = root
        for character in text:
            node = node.setdefault(character, {})
        node[None] = token
    return root


def longest_match(text, start, trie):
    """The longest token that begins at `start`, and where it ends; (None, start) if there is none."""
    longest, end, node = None, start, trie
    for i in range(start, len(text)):
        node = node.get(text[i])
        if node is None:
            break
        if None in node:
            longest, end = node[None], i + 1
    return longest, end


def is_word(character):
    """Whether a regular expression's \\w means this character (Unicode Technical Standard 18, Annex C)."""
    category = unicodedata.category(character)
    letter = category[0] in "LM" or category in ("Nd", "Nl", "Pc") or character in "\u200c\u200d"
    return letter or "Ⓐ" <= character <= "ⓩ" or character in SQUARED_LETTERS


def cut_out_added(text, trie):
    """Cut text at its added tokens: a list of (text between, None) and (text of the token, token), in order."""
    cuts, done, i = [], 0, 0
    while i < len(text):
        token, stop = longest_match(text, i, trie)
        if token is None:
            i += 1
            continue
        start, i = i, stop
        if token.single_word and any(map(is_word, text[max(start - 1, 0):start] + text[stop:stop + 1])):
            continue
        if token.lstrip and stop <= done:
            continue  # it is itself white space, which the token before has swallowed
        while token.lstrip and start > done and text[start - 1] in WHITE_SPACE:
            start -= 1
        while token.rstrip and stop < len(text) and text[stop] in WHITE_SPACE:
            stop += 1
        if done < start:
            cuts.append((text[done:start], None))
        cuts.append((text[start:stop], token))
        done = stop
    if done < len(text):
        cuts.append((text[done:], None))
    return cuts
