"""Unigram segmentation: of all ways to cut a text into pieces, the likeliest. The tokenizer of T5 and of SigLIP 1.

A unigram model takes the pieces of a text as drawn one by one, each independent of the others, so the probability of a
segmentation is the product of its pieces' probabilities, and its logarithm the sum of their scores:

    "▁hats" = ▁hat + s          -7.1 - 3.2 = -10.3     <- chosen
            = ▁ha + ts          -6.4 - 8.0 = -14.4
            = ▁ + h + a + t + s        ...   = -24.9

A text of n characters can be cut in 2^(n-1) ways. The Viterbi algorithm does not list them: the best way to reach place
j ends with some piece text[i:j], and before that piece it is the best way to reach i, whatever follows. So

    best(0) = 0        best(j) = max over i < j of  best(i) + score(text[i:j])

from left to right, remembering for each j the piece that won; then, from the end, the pieces are read off backward.
(Byte-pair encoding, in bpe.py, decides step by step and never looks back.) Kudo 2018, "Subword regularization",
section 3.2.

A character that is no piece could not be reached at all. It counts as unknown, 10 below the worst score there is.
"""
import math
import struct
from itertools import pairwise

UNKNOWN_PENALTY = 10.0
FLOAT32 = struct.Struct("<f")


def to_float32(value: float) -> float:
    """The nearest number that 32 bits can hold."""
    return FLOAT32.unpack(FLOAT32.pack(value))[0]


def segment(text: str, scores: dict, lengths: list, unknown_score: float, rounded=float) -> list:
    """The likeliest segmentation of a text: a list of (piece, whether it is in `scores`).

    scores: {piece: score}; lengths: the lengths of pieces that occur, shortest first.
    rounded: what the sums are kept in; the `sentencepiece` package keeps 32 bits, which can decide between equals.
    """
    best = [0.0] + [-math.inf] * len(text)
    starts = [0] * (len(text) + 1)
    for i in range(len(text)):
        ends = [i + length for length in lengths if i + length <= len(text)]
        ways = [(j, score) for j in ends if (score := scores.get(text[i:j])) is not None]
        if text[i] not in scores:
            ways.append((i + 1, unknown_score))
        for j, score in ways:
            total = rounded(best[i] + score)
            if total > best[j]:  # of equally good ways, the first found stays: the one whose last piece is the longest
                best[j], starts[j] = total, i
    cuts = [len(text)]
    while cuts[-1] > 0:
        cuts.append(starts[cuts[-1]])
    return [(text[i:j], text[i:j] in scores) for i, j in pairwise(reversed(cuts))]


class Unigram:
    """A unigram model: text between added tokens to ids.

    ids, scores: {piece: id}, {piece: score}; byte_ids: {byte: id}, empty where the model has no tokens for bytes.
    """

    def __init__(self, ids: dict, scores: dict, unknown_id: int, unknown_score: float, byte_ids: dict, rounded=float):
        self.ids, self.scores, self.unknown_id = ids, scores, unknown_id
        self.unknown_score, self.byte_ids, self.rounded = unknown_score, byte_ids, rounded
        # Every place tries every length that occurs, so a piece of absurd length in a hostile file costs little.
        self.lengths = sorted(set(map(len, scores)))

    def encode(self, word: str) -> list:
        ids, unknown = [], ""
        for piece, known in segment(word, self.scores, self.lengths, self.unknown_score, self.rounded):
            if known:
                ids += [*self._unknown_ids(unknown), self.ids[piece]]
                unknown = ""
            else:
                unknown += piece
        return ids + self._unknown_ids(unknown)

    def _unknown_ids(self, text):
        """Unknown characters side by side become their bytes, or one unknown token together."""
        data = text.encode("utf-8")
        if all(byte in self.byte_ids for byte in data):
            return [self.byte_ids[byte] for byte in data]
        return [self.unknown_id]
