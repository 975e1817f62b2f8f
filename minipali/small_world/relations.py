"""Where one thing lies, seen from another: two kinds of questions that both worlds ask, and the one right answer."""
from minipali.small_world.world import PLACES

QUESTIONS = {
    "relation": "is the {noun} {relation} the {other}?",
    "side": "is the {noun} {sides} the {other}?",
}
RELATIONS = ("left of", "right of", "above", "below")


def choice(rng, options):
    """One of these options, all equally likely."""
    return options[rng.integers(len(options))]


def _cell(thing):
    return divmod(PLACES.index(thing.place), 3)


def pairs(things):
    """(nouns of a thing, relation, nouns of another, whether it holds) for every pair in different rows or columns.

    `things` are pairs (thing, the nouns that fit it alone). Two in one column are neither left nor right of one
    another, so that is not asked.
    """
    for a, nouns in things:
        for b, others in things:
            (row_a, column_a), (row_b, column_b) = _cell(a), _cell(b)
            across, down = column_b - column_a, row_b - row_a
            signs = zip(RELATIONS, (across, -across, down, -down))
            yield from ((nouns, word, others, sign > 0) for word, sign in signs if sign)


def relation(things, rng):
    """Whether one of these `things`, as for `pairs`, lies left of, right of, above or below another.

    None where no two can be compared.
    """
    if not (possible := list(pairs(things))):
        return None
    nouns, word, others, true = choice(rng, possible)
    question = QUESTIONS["relation"].format(noun=choice(rng, nouns), relation=word, other=choice(rng, others))
    return "answer en " + question, "yes" if true else "no"


def side(things, rng):
    """On which of two sides of another a thing lies; None likewise.

    It needs the same knowledge as `relation`, but is learned far sooner: here the place of the first thing alone makes
    one answer likelier, while it says nothing about a "yes" or "no".
    """
    if not (possible := [pair for pair in pairs(things) if pair[3]]):
        return None
    nouns, word, others, _ = choice(rng, possible)
    sides = "above or below" if word in ("above", "below") else "left or right of"
    question = QUESTIONS["side"].format(noun=choice(rng, nouns), sides=sides, other=choice(rng, others))
    return "answer en " + question, word.removesuffix(" of")
