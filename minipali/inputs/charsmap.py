"""The rules by which SentencePiece makes characters alike before it looks for pieces: "ﬁ" is read as "fi", "①" as "1".

A model file holds them ready to use (`precompiled_charsmap`), as two tables one behind the other. The first is a trie
that leads from the bytes of a text to a number, the second holds all replacements, each ended by a zero byte; the
number says where in it the replacement begins. A rule may be about several characters ("e" and a combining accent).

The trie is a *double array* (Aoe 1989; the layout is that of the darts-clone library): an array of 32-bit units. From
a unit the way on leads to the unit at (its own place XOR its offset XOR the next byte), if its label is the byte.

    bits 0 to 7    label: the byte that leads here
    bit 8          a key ends here: the unit at (place XOR offset) holds its value in bits 0 to 30
    bit 9          the offset is written in multiples of 256
    bits 10 to 31  offset

Two programs apply the same rules differently, and models saved by one are read by the other, so both ways are here.
"""
import struct
import unicodedata

from minipali.errors import InputError

# Characters that belong to the one before although their category is not M: two joiners, Thai and Lao vowels, marks.
JOINING = {*"\u200c\u200d\u0e33\u0eb3\uff9e\uff9f"}
CONTROLLING = {"Cc", "Cf", "Zl", "Zp"}


class CharsMap:
    """The rules of a `precompiled_charsmap`. Raises InputError for bytes that are none, with a line for the caller."""

    def __init__(self, data: bytes):
        size = struct.unpack_from("<I", data)[0] if len(data) >= 4 else 0
        if not size or size % 4 or 4 + size > len(data):
            raise InputError("precompiled_charsmap: expected the length of a trie, the trie, and the replacements")
        self.units = struct.unpack_from(f"<{size // 4}I", data, 4)
        self.replacements = data[4 + size:]

    def matches(self, data: bytes, start: int):
        """Yield (length in bytes, replacement) of each rule for what begins at byte `start`, the shortest first."""
        place = self._offset(self.units[0])
        for end in range(start, len(data)):
            place ^= data[end]
            # Bit 31 is set in a unit that holds a value: it never equals a byte.
            if place >= len(self.units) or self.units[place] & 0x800000FF != data[end]:
                return
            unit = self.units[place]
            place ^= self._offset(unit)
            if unit & 0x100 and place < len(self.units):
                yield end + 1 - start, self._replacement(self.units[place] & 0x7FFFFFFF)

    @staticmethod
    def _offset(unit):
        return unit >> 10 << (8 if unit & 0x200 else 0)

    def _replacement(self, begin):
        end = self.replacements.find(b"\0", begin)
        return self.replacements[begin:end if end >= 0 else None]

    def longest_match(self, data: bytes, start: int):
        """(replacement, where its rule ends) by the longest rule for what begins at byte `start`, or None.

        This is how the `sentencepiece` package applies the rules, from left to right.
        """
        longest = None
        for length, replacement in self.matches(data, start):
            longest = replacement, start + length
        return longest

    def by_grapheme(self, text: str) -> str:
        """The text as the `tokenizers` package changes it (its normalizer of type Precompiled).

        It goes from one grapheme, what a reader takes for one character, to the next. One of fewer than 6 bytes is
        replaced as a whole if any rule is about its beginning, and it is the shortest such rule: an accent behind a
        "①" is lost. In a longer one, and where no rule fits, each character is looked up by itself.
        """
        changed = []
        for grapheme in graphemes(text):
            for_all = self._first(grapheme) if len(grapheme.encode("utf-8")) < 6 else None
            if for_all is not None:
                changed.append(for_all)
                continue
            for character in grapheme:
                replacement = self._first(character)
                changed.append(character if replacement is None else replacement)
        return "".join(changed)

    def _first(self, text):
        for _, replacement in self.matches(text.encode("utf-8"), 0):
            return replacement.decode("utf-8", "replace")
        return None


def graphemes(text: str):
    """Cut text into graphemes (Unicode Standard Annex 29), as far as `by_grapheme` can tell the difference.

    That is: all but flags, joined emoji and Hangul syllables, whose parts are of 3 bytes or more and have no rules
    that they lose as a whole.
    """
    start = 0
    for i in range(1, len(text) + 1):
        if i == len(text) or not joins(text[i - 1], text[i]):
            yield text[start:i]
            start = i


def joins(left: str, right: str) -> bool:
    """Whether a character belongs to the same grapheme as the one before it."""
    if left == "\r" and right == "\n":
        return True
    category = unicodedata.category(left)
    if category in CONTROLLING and left not in JOINING:
        return False
    return right in JOINING or unicodedata.category(right)[0] == "M"
