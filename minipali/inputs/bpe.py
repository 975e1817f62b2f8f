"""Byte-pair encoding: a text begins as single characters, and neighbors merge, the pair with the lowest rank first.

The ranks come from training: the pair that stood side by side most often in the training text merged first, and so on.
The tokenizer of Gemma, and so of PaliGemma and of SigLIP 2.
"""
import heapq
from itertools import pairwise

from minipali.inputs.special_tokens import BYTE_NAMES


def merge_pairs(pieces: list, ranks: dict) -> list:
    """Merge neighboring pieces, lowest rank first and leftmost among equals, until no pair of neighbors has a rank.

    pieces: list of str; ranks: {(left, right): rank}. Returns the list of merged pieces. (Sennrich et al. 2016, 3.2)
    """
    # The obvious loop (find the best pair, merge it, look again) is quadratic, and Gemma does not split text into
    # words first: a page of text is one sequence. So a heap holds the pairs, and a linked list says who is whose
    # neighbor. A heap entry that was overtaken by another merge is noticed when its turn comes, not searched for.
    end = len(pieces)
    pieces = [*pieces, None]  # None has no rank with anything: the end (also reached as -1), and slots merged away
    after, before = list(range(1, end + 1)), list(range(-1, end))
    heap = [(rank, i) for i, pair in enumerate(pairwise(pieces)) if (rank := ranks.get(pair)) is not None]
    heapq.heapify(heap)
    while heap:
        rank, i = heapq.heappop(heap)
        j = after[i]
        if ranks.get((pieces[i], pieces[j])) != rank:
            continue
        pieces[i] += pieces[j]
        pieces[j] = None
        after[i] = after[j]
        before[after[i]] = i
        for left, right in ((before[i], i), (i, after[i])):
            rank = ranks.get((pieces[left], pieces[right]))
            if rank is not None:
                heapq.heappush(heap, (rank, left))
    return [piece for piece in pieces if piece is not None]


class ListedMerges:
    """The byte-pair encoding of a tokenizer.json, which lists the merges: text between added tokens to ids.

    vocab: {token: id}; ranks: {(left, right): rank}; controls: tokens that no text becomes. unknown: the token that
    stands for a character that the vocabulary lacks, or None; with fuse_unknown one for a run of them.
    byte_fallback: the character becomes its UTF-8 bytes where all of them are tokens. whole_words: a word that is a
    token is not cut up ("ignore_merges").
    """

    def __init__(self, vocab, ranks, controls, unknown, fuse_unknown, byte_fallback, whole_words):
        self.vocab, self.ranks, self.controls = vocab, ranks, controls
        self.unknown, self.fuse_unknown = unknown, fuse_unknown
        self.byte_fallback, self.whole_words = byte_fallback, whole_words

    def encode(self, word: str) -> list:
        if self.whole_words and word in self.vocab and word not in self.controls:
            return [self.vocab[word]]
        return [self.vocab[piece] for piece in merge_pairs(self._characters(word), self.ranks)]

    def _characters(self, word):
        """The pieces that merging starts from: characters, bytes of unknown characters, or the unknown token."""
        # The unknown token waits: with fuse_unknown the next unknown character joins it (even across byte tokens).
        pieces, waiting = [], []
        for character in word:
            if character in self.vocab and character not in self.controls:
                pieces += [*waiting, character]
                waiting = []
                continue
            names = [BYTE_NAMES[byte] for byte in character.encode("utf-8")]
            if self.byte_fallback and all(name in self.vocab for name in names):
                pieces += names
            elif self.unknown:
                pieces += [] if self.fuse_unknown else waiting
                waiting = [self.unknown]
        return pieces + waiting


class JoinRanks(dict):
    """{text of a piece: rank}, asked by `merge_pairs` with the two neighbors that would make it."""

    def get(self, pair):
        left, right = pair
        return None if left is None or right is None else super().get(left + right)


class ScoredPieces:
    """The byte-pair encoding of a tokenizer.model, which lists pieces with scores: text between added tokens to ids.

    Any two neighbors that together spell a piece may join, the highest score first. ids, scores: {piece: id} and
    {piece: score} of the pieces that text may become; byte_ids: {byte: id}, empty where bytes do not stand in for
    unknown characters.
    """

    def __init__(self, ids, scores, unknown_id, byte_ids):
        self.ids, self.unknown_id, self.byte_ids = ids, unknown_id, byte_ids
        self.ranks = JoinRanks({piece: -score for piece, score in scores.items()})

    def encode(self, word: str) -> list:
        ids = []
        for piece in merge_pairs(list(word), self.ranks):
            if piece in self.ranks:
                ids.append(self.ids[piece])
            elif self.byte_ids:
                ids += [self.byte_ids[byte] for byte in piece.encode("utf-8")]
            elif ids[-1:] != [self.unknown_id]:  # a run of unknown characters is one unknown token
                ids.append(self.unknown_id)
        return ids
