"""Byte-pair encoding: neighbors merge, the pair with the lowest rank first."""
import heapq
from itertools import pairwise


def merge_pairs(pieces, ranks):
    """Merges neighbouring pieces, lowest rank first and leftmost among equals, until no pair of neighbours has a rank.

    pieces: list of str; ranks: {(left, right): rank}. Returns the list of merged pieces. (Sennrich et al. 2016, 3.2)
    """
    # The obvious loop (find the best pair, merge it, look again) is quadratic, and Gemma does not split text into
    # words first: a page of text is one sequence. So a heap holds the pairs, and a linked list says who is whose
    # neighbour. A heap entry that was overtaken by another merge is noticed when its turn comes, not searched for.
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
