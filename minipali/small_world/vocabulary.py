"""The small model's vocabulary: byte-pair encoding learned from the words of its tasks.

    python -m minipali.small_world.vocabulary OUT_DIR

writes `tokenizer.json` and `tokenizer_config.json` in the form of the published PaliGemma files, so that other
libraries load them too, and prints how typical texts are tokenized. The same call always writes the same bytes.

The layout is PaliGemma's with 2,688 rows in place of 257,216: control tokens, bytes, characters, merges, unused rows,
`<loc0000>` to `<loc1023>`, `<seg000>` to `<seg127>`, and `<image>` last.
"""

import itertools
import re
import string
import sys
from collections import Counter
from pathlib import Path

from minipali.errors import Parser, path_name, prepare_process, run_command
from minipali.files import make_folder, write_json
from minipali.inputs.bpe import merge_pairs
from minipali.inputs.special_tokens import BYTE_NAMES, LOCATION_NAMES
from minipali.inputs.tokenizer import Tokenizer
from minipali.small_world import artwork

ROWS = 2688
CONTROLS = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
BLANK = "▁"
CHARACTERS = ["\n", BLANK, *string.ascii_lowercase, *string.ascii_uppercase, *string.digits, *string.punctuation]

# The words of the tasks. They are stated here, and not taken from the tasks, because the vocabulary may not change when
# a task does: weights fit only the vocabulary that they were trained with.
WORDS = {
    "ask": ["answer en ", ""],
    "shape": ["circle", "square", "triangle", "star", "cross", "heart", "rectangle", "shape"],
    "shapes": ["circles", "squares", "triangles", "stars", "crosses", "hearts", "rectangles", "shapes"],
    "color": ["black", "gray", "red", "green", "blue", "yellow", "brown", "teal"],
    "size": ["small", "large"],
    "place": ["at the top left", "at the top", "at the top right", "on the left", "in the center", "on the right"]
    + ["at the bottom left", "at the bottom", "at the bottom right"],
    "relation": ["left of", "right of", "above", "below"],
    "name": [*artwork.names().values()],
    "word": ["yes", "no", "nothing", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"],
}
TEXTS = [
    "{shape}",
    "{shapes}",
    "{color}",
    "{size}",
    "{place}",
    "{word}",
    "a {word} {word}",
    "caption en",
    "a {name} {place}",
    "a {size} {color} {shape} {place}",
    "a {color} {shape}, a {color} {shape} and a {size} {shape}",
    "detect {size} {color} {shape}",
    "detect {shape} ; {shape}",
    "segment {color} {shape}",
    "ocr",
    "{ask}how many {shapes} are there?",
    "{ask}how many {size} {color} {shapes} are there?",
    "{ask}what color is the {shape}?",
    "{ask}what size is the {shape}?",
    "{ask}what shape is {color}?",
    "{ask}what is {place}?",
    "{ask}where is the {color} {shape}?",
    "{ask}is there a {color} {shape}?",
    "{ask}is the {color} {shape} {relation} the {shape}?",
    "{ask}is the {shape} {size}?",
    "{ask}what is the color of the {shape}?",
    "{ask}what shape does the image contain?",
    "{ask}what shape is in the image?",
    "{ask}does the image not contain a {shape}?",
    "{ask}is no {color} {shape} present?",
]
EXAMPLES = [
    "caption en\n",
    "a large red circle at the top left, a small blue star in the center and a small green square at the bottom right",
    "answer en how many red shapes are there?\n",
    "answer en is the red circle left of the blue star?\n",
    "answer en does the image not contain a teal rectangle?\n",
    "detect red circle ; star\n",
    "<loc0100><loc0200><loc0300><loc0400> red circle ; <loc0000><loc0000><loc0500><loc0500> star",
    "ocr\n",
    "HELLO 42",
]


def corpus():
    """Every text that the templates stand for, as a list of str."""
    texts = []
    for template in TEXTS:
        parts = re.split(r"{(\w+)}", template)  # text, name, text, name, ..., text
        choices = [WORDS[part] if i % 2 else [part] for i, part in enumerate(parts)]
        texts += map("".join, itertools.product(*choices))
    return texts


def count_words(texts):
    """{word: its frequency}. A word is a run of letters or one other character, with the blank before it, if any."""
    counts = Counter()
    for text in texts:
        counts.update(re.findall(f"{BLANK}?(?:[a-z]+|[^{BLANK}])", text.replace(" ", BLANK)))
    return counts


def learn_merges(word_counts, limit):
    """Byte-pair encoding: repeatedly merges the most frequent pair of neighbors (Sennrich et al. 2016, section 3.2).

    Returns at most `limit` pairs, in the order in which they were learned; fewer if every word is one piece before.
    """
    words = {word: list(word) for word in word_counts}
    merges = []
    while len(merges) < limit:
        pairs = Counter()
        for word, pieces in words.items():
            for pair in itertools.pairwise(pieces):
                pairs[pair] += word_counts[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))  # ties: alphabetical order
        merges.append(best)
        for word, pieces in words.items():
            if "".join(best) in word:  # else it cannot hold the pair
                words[word] = merge_pairs(pieces, {best: 0})
    return merges


def layout(merges):
    """The tokens of all rows, in order."""
    locations = sorted(LOCATION_NAMES)
    front = CONTROLS + BYTE_NAMES + CHARACTERS + [left + right for left, right in merges]
    unused = [f"<unused{i}>" for i in range(ROWS - len(front) - len(locations) - 1)]
    return front + unused + locations + ["<image>"]


def tokenizer_json(tokens, merges):
    """The content of tokenizer.json: blanks become "▁", bytes stand in for unknown characters, <bos> goes in front."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<image>"]  # as published: <mask> is not
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": i, "content": token, **flags, "special": token in special}
        for i, token in enumerate(tokens)
        if re.fullmatch(r"<(pad|eos|bos|unk|mask|image|unused\d+|loc\d+|seg\d+)>", token)
    ]
    bos = [{"SpecialToken": {"id": "<bos>", "type_id": i}} for i in range(2)]
    text = [{"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB")]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": BLANK},
        # Has no effect, since no space is left here; the published files have it.
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos[0], text[0]],
            "pair": [bos[0], text[0], bos[1], text[1]],
            "special_tokens": {"<bos>": {"id": "<bos>", "ids": [tokens.index("<bos>")], "tokens": ["<bos>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": BLANK}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens[:-1])},  # <image> is an added token only
            "merges": [f"{left} {right}" for left, right in merges],
        },
    }


def tokenizer_config():
    """The content of tokenizer_config.json, from which other libraries know the special tokens."""
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "additional_special_tokens": ["<image>"],
        "bos_token": "<bos>",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<eos>",
        "model_max_length": 512,
        "pad_token": "<pad>",
        "processor_class": "PaliGemmaProcessor",
        "spaces_between_special_tokens": False,
        "tokenizer_class": "GemmaTokenizer",
        "unk_token": "<unk>",
    }


def train():
    """The content of tokenizer.json, from the words of the tasks."""
    room = ROWS - len(CONTROLS + BYTE_NAMES + CHARACTERS) - len(LOCATION_NAMES) - 1
    merges = learn_merges(count_words(corpus()), room)
    return tokenizer_json(layout(merges), merges)


def write(folder):
    """Train the vocabulary and write tokenizer.json and tokenizer_config.json to a folder."""
    make_folder(folder)
    write_json(folder / "tokenizer.json", train(), indent=1)
    write_json(folder / "tokenizer_config.json", tokenizer_config(), indent=1)


def main(argv):
    parser = Parser("minipali.small_world.vocabulary", "Write the small model's tokenizer, and print how typical texts "
                    "are tokenized.", "  python -m minipali.small_world.vocabulary OUT_DIR")
    parser.add_argument("folder", type=path_name, metavar="OUT_DIR", help="where tokenizer.json is written")
    folder = Path(parser.parse_args(argv).folder)
    write(folder)
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json")
    for text in EXAMPLES:
        ids = tokenizer.encode(text)
        print(f"{len(text.split()):3} words {len(ids):3} tokens   {' '.join(map(tokenizer.token_of, ids))!r}")


if __name__ == "__main__":
    prepare_process()
    sys.exit(run_command("minipali.small_world.vocabulary", main, sys.argv[1:]))
