"""Write golden/sentencepiece.json.xz: what the `sentencepiece` package makes of texts. No test runs it.

    pip install sentencepiece==0.2.3
    PYTHONPATH=.:tests python tests/golden/make_sentencepiece_golden.py

Three models in the manner of Gemma's, trained on the tasks' words, and one made by hand whose scores are often equal.
"""
import base64
import io
import random
import struct
import unicodedata

from golden.make_tokenizer_golden import write_packed

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
TRAINER = [(3, 2), (35, 1)]  # byte-pair encoding, byte_fallback
NORMALIZER = [(1, b"identity"), (3, 0), (4, 0)]  # no blank in front, no blanks taken out
CONTROLS = [("<pad>", 0.0, CONTROL), ("<eos>", 0.0, CONTROL), ("<bos>", 0.0, CONTROL), ("<unk>", 0.0, UNKNOWN)]

TEXTS = [
    "", " ", "  ", "   ", "a", " a", "a ", "  a  b   c    d", " " * 40 + "a", "\n", "\n\n\n", "\n" * 9, "\t",
    "\t\t\r\n", "\x00\x01\x7f\x85",
    "\u00a0\u3000\u2028\ufeff\u200d", "caption en\n", "on the beach", " on the beach", "HELLO 42",
    "answer en Where is the cow standing?\n", "detect red circle ; a  large   blue star\n", "1234567890", "é",
    "e\u0301",
    "<loc0000><loc0001> red ; <loc0002>\n", "<seg000><seg001>", "<loc0003>", "<loc000", "<<loc0000>>", "<mask>x<mask>",
    "▁", "a▁b ▁ ▁▁", " ▁ ▁a", "<0x41><0xE2>", "日本語", "Привет, мир", "שלום", "🙂 🙂🙂", "👩‍👩‍👧‍👦", "🇫🇷", "a🙂b",
    "aaaaaaaaaaaaa", "abababab baba", "abcabcabc cab", "x y", "x▁y", "\U0010ffff\ue000\ufffe",
]  # fmt: skip
TYPED_CONTROLS = ["<bos>caption<eos>", "<bos><bos> <pad>\n<unk>", "<s>she is as <s> as this</s>"]


def varint(value):
    """An integer as a protocol buffer holds it."""
    more = b""
    while value > 127:
        more += bytes([value & 127 | 128])
        value >>= 7
    return more + bytes([value])


def message(fields):
    """A protocol buffer of (number, int, float or bytes)."""
    data = bytearray()  # bytes would be copied for each of a quarter of a million pieces
    for number, value in fields:
        if isinstance(value, float):
            data += varint(number << 3 | 5) + struct.pack("<f", value)
        elif isinstance(value, int):
            data += varint(number << 3) + varint(value)
        else:
            data += varint(number << 3 | 2) + varint(len(value)) + value
    return bytes(data)


def model(pieces, trainer=TRAINER, normalizer=NORMALIZER):
    """A tokenizer.model of (text, score, type)."""
    pieces = [message([(1, text.encode()), (2, score), (3, kind)]) for text, score, kind in pieces]
    return message([(1, piece) for piece in pieces] + [(2, message(trainer)), (3, message(normalizer))])


def random_model(rng):
    """A random tokenizer.model, and letters and pieces to make texts from. rng: random.Random."""
    letters = rng.choice(["abc", "ab▁", "abcdé▁", "abcxyz▁<>0\n", "aé日😀▁\u0301"])
    byte_fallback = rng.random() < 0.7
    pieces = {text: (score, kind) for text, score, kind in CONTROLS}
    pieces |= dict.fromkeys(BYTES if byte_fallback else [], (0.0, BYTE))
    symbols = ["<x>", "<loc0001>", "x y", "▁▁", "▁▁▁▁", "\n\n", "aa", "ab", "abc", "a▁", "é日", "<unk", "b"]
    pieces |= dict.fromkeys(rng.sample(symbols, rng.randint(0, 6)), (0.0, USER_DEFINED))
    parts = list(letters)
    for _ in range(rng.choice([0, 5, 30, 120])):
        part = rng.choice(parts) + rng.choice(parts)
        if len(part) < 24:
            parts.append(part)
            pieces.setdefault(part, (float(-rng.randrange(rng.choice([2, 9, 1000]))), NORMAL))
    for letter in letters:  # a letter may be missing and still be part of pieces
        if rng.random() < 0.9:
            pieces.setdefault(letter, (-2000.0, NORMAL))
    pieces |= {"<unk>a": (1.0, NORMAL), "<0xC3><0xA9>": (1.0, NORMAL)} if rng.random() < 0.3 else {}
    order = list(pieces)
    rng.shuffle(order)
    data = model([(text, *pieces[text]) for text in order], [(3, 2), (35, int(byte_fallback))])
    return data, letters, symbols


def random_text(rng, letters, symbols):
    """Letters, runs, pieces and any other characters, mixed."""
    def other():
        return chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)]))

    kinds = [*[lambda: rng.choice(letters)] * 6, lambda: rng.choice(symbols), lambda: rng.choice(" \n\t▁<>é"), other]
    kinds += [lambda: rng.choice(letters + " ") * rng.randint(1, 20)]
    return "".join(rng.choice(kinds)() for _ in range(rng.choice([3, 10, 40])))


def blocks():
    """Eight characters at a time, a few of each part of Unicode."""
    points = [*range(0x20, 0x180), *range(0x180, 0xD800, 120), *range(0xF900, 0x10000, 40)]
    points += range(0x10000, 0x32000, 700)
    characters = [chr(point) for point in points if unicodedata.category(chr(point)) not in ("Cs", "Cn")]
    return ["".join(characters[i:i + 8]) for i in range(0, len(characters), 8)]


def train(vocab_size, **options):
    """A tokenizer.model, trained on the tasks' words with Gemma's settings, changed by options."""
    from sentencepiece import SentencePieceTrainer

    from minipali.small_world.vocabulary import EXAMPLES

    written = io.BytesIO()
    extra = ["  two  blanks   and more", "été à Noël", "日本語 日本", "1990 2024", "def f(x):\n    return x"]
    SentencePieceTrainer.train(
        sentence_iterator=iter([*EXAMPLES, *extra] * 4), model_writer=written, vocab_size=vocab_size, **({
            "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "num_threads": 1,
            "add_dummy_prefix": False, "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True,
            "split_digits": True, "hard_vocab_limit": False, "minloglevel": 2, "pad_id": 0, "eos_id": 1, "bos_id": 2,
            "unk_id": 3, "pad_piece": "<pad>", "eos_piece": "<eos>", "bos_piece": "<bos>", "character_coverage": 1.0,
        } | options))  # fmt: skip
    return written.getvalue()


def main():
    from sentencepiece import SentencePieceProcessor, __version__

    rng = random.Random(3)
    symbols = ["<mask>", "<loc0000>", "<loc0001>", "<loc0002>", "<seg000>", "<seg001>", "<start_of_turn>"]
    symbols += ["▁" * i for i in range(2, 9)] + ["\n" * i for i in range(1, 5)] + ["\t\t"]
    by_hand = next(data for data, letters, _ in (random_model(rng) for _ in range(99))
                   if letters == "abcdé▁" and len(data) > 6000)  # fmt: skip
    models = {
        "gemma": train(560, user_defined_symbols=symbols),
        "across blanks": train(600, split_by_whitespace=False, split_by_unicode_script=False, split_digits=False,
                               bos_piece="<s>", eos_piece="</s>", user_defined_symbols=["a▁", "x y", "▁circle"]),
        "unknown": train(200, byte_fallback=False, character_coverage=0.98),
        "by hand": by_hand,
    }  # fmt: skip
    golden = {"sentencepiece": __version__, "cases": {}}
    for name, data in models.items():
        theirs = SentencePieceProcessor(model_proto=data)
        texts = TEXTS + TYPED_CONTROLS + (blocks() if name == "gemma" else [])
        golden["cases"][name] = {
            "model": base64.b64encode(data).decode(),
            "encoded": [[text, theirs.encode(text)] for text in texts],
        }
    write_packed("sentencepiece", golden)


if __name__ == "__main__":
    main()
