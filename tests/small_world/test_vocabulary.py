"""How the small vocabulary is learned and laid out."""
from functools import cache

import pytest

from minipali.inputs.special_tokens import BYTE_NAMES, LOCATION_NAMES
from minipali.inputs.tokenizer import Tokenizer
from minipali.small_world.vocabulary import BLANK, CHARACTERS, CONTROLS, ROWS, count_words, layout, learn_merges, train


@cache
def trained():
    """The content of tokenizer.json."""
    return train()


def test_words_are_runs_of_letters_with_the_blank_before_them():
    assert count_words(["a red, red 4x", "red"]) == {"a": 1, f"{BLANK}red": 2, ",": 1, f"{BLANK}4": 1, "x": 1, "red": 1}


@pytest.mark.parametrize(("words", "merges"), [
    ({"aab": 5, "aac": 3, "bc": 1}, [("a", "a"), ("aa", "b"), ("aa", "c"), ("b", "c")]),
    ({"ab": 1, "cd": 1}, [("a", "b"), ("c", "d")]),
    ({"bcd": 2, "cd": 1}, [("c", "d"), ("b", "cd")])])
def test_the_most_frequent_pair_is_merged_first(words, merges):
    """Of equals the first in the alphabet; until every word is one piece, or the limit is reached."""
    assert learn_merges(words, 99) == merges
    assert learn_merges(words, 1) == merges[:1]


def test_rows_are_laid_out_as_in_paligemma():
    """Controls, bytes, characters, merges, unused rows, places, codes, <image> last; every row once."""
    tokens = layout([("a", "b"), ("ab", "c")])
    front = [*CONTROLS, *BYTE_NAMES, *CHARACTERS, "ab", "abc"]
    assert tokens[:len(front)] == front
    assert tokens[len(front)] == "<unused0>"
    assert len(tokens) == len(set(tokens)) == ROWS
    assert tokens[-1] == "<image>"
    places = [f"<loc{i:04}>" for i in range(1024)] + [f"<seg{i:03}>" for i in range(128)]
    assert tokens[-1 - len(LOCATION_NAMES):-1] == places


def test_the_trained_tokenizer_reads_what_it_never_saw():
    """Unknown characters fall into their bytes and come back; words of the tasks are one token each."""
    tokenizer = Tokenizer(trained())
    assert [tokenizer.token_of(i) for i in tokenizer.encode("é")] == ["<0xC3>", "<0xA9>"]
    assert tokenizer.decode(tokenizer.encode("é a red circle\n")) == "é a red circle\n"
    assert [tokenizer.token_of(i) for i in tokenizer.encode("a red circle")] == ["a", f"{BLANK}red", f"{BLANK}circle"]
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, tokenizer.image_id) == (0, 1, 2, ROWS - 1)
