"""Write golden/tokenizer.json.xz: texts and ids as the `tokenizers` package sees them. No test runs this.

    pip install tokenizers==0.23.3
    python tests/golden/make_tokenizer_golden.py

Over the shipped vocabulary and over two small awkward ones that turn every switch of the format once.
"""
import json
import lzma
import random
import unicodedata
from pathlib import Path

FOLDER = Path(__file__).parent
SHIPPED = FOLDER.parents[1] / "weights" / "tokenizer.json"
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
DECODER = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]

TEXTS = [
    "", " ", "  ", "a", " a", "a ", "\n", "\n\n", "\n\n\n", "\t", "\r\n", "\x00\x01\x7f", "\u00a0\u3000\u2028\ufeff",
    "caption en\n", "on the beach", " on the beach", "a large red circle at the top left and a small star.",
    "answer en Where is the cow standing?\n", "HELLO 42", "<s>she is as <s> as this</s>", "<loc0100><loc1023> red ; ",
    "<loc0000> <loc0001>\n<seg000><seg127>", "<loc12>", "<loc1024>", "<loc0001", "<<loc0001>>", "<bos>caption<eos>",
    "<bos><bos> <image><pad>\n<unk>", "<mask>x<mask>", "<unused0><unused12>", "▁", "a▁b ▁ ▁▁", "▁▁▁▁", "<0x41><0xE2>",
    "é", "e\u0301", "ÀÉÎ", "日本語", "Привет, мир", "שלום", "🙂", "👩‍👩‍👧‍👦", "🇫🇷", "\U0010ffff\ue000", "a🙂b", "½Ⅳ²",
    "x xy  xyz xx", "xyz<t>xyz", "a<t> b <t>c", "x\n\n\ny \n", "abcabcabc", "aaaaaaaaaaaaa", "ab ab  ab", "<w>",
    "a<w>b", "<t> <u<t>  <u <u", "éé ÀÉ½é", "cabx", "q cabx", " <w> ",
    "<w><w>", "_<w>", "é<w>-", "a b a b", "q<n x>q", "<n▁x>", "aé\u4e00qé", "qqaqq", "  <t>  <t>  ",
]  # fmt: skip


def added(id, content, *flags):
    """One entry of `added_tokens`, with the named flags on."""
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    return {"id": id, "content": content} | {name: name in flags for name in names}


def spec(vocab, merges, added_tokens, normalizer, pre_tokenizer, decoder, **model):
    """A tokenizer.json."""
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added_tokens, "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer, "post_processor": None, "decoder": {"type": "Sequence", "decoders": decoder},
        "model": {"type": "BPE", "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
        | {**model, "vocab": vocab, "merges": merges},
    }  # fmt: skip


def awkward(kind):
    """"bytes": byte fallback with a gap, odd added tokens. "unknown": no bytes, unknown tokens, ignore_merges."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *(BYTES if kind == "bytes" else BYTES[0xA9:0xC4])]
    swapped = {"<0x09>": "\t", "<0xC3>": "À"}  # the first is so in some published files
    tokens = [swapped.get(token, token) for token in tokens]
    tokens += [*"▁abcxy\n<", "\n\n", "▁▁", "▁▁▁", "ab", "bc", "abc", "▁a", "▁ab", "aa", "aaaa", "xy", "▁x", "▁xy"]
    tokens += ["cab", "cabx"]  # no merges lead to the last
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = ["b c", "a b", "ab c", "a bc", "▁ ▁", "▁▁ ▁", "x y", "▁x y", "▁ x", "▁ ab", "▁ a", "▁a b", "a a", "aa aa"]
    merges += ["c ab", "▁ xy"]
    listed = [added(vocab[token], token, "special") for token in ("<pad>", "<eos>", "<bos>", "<unk>")]
    listed += [added(vocab[token], token) for token in ("\n", "\n\n", "▁▁▁")]
    new = [("<t>", "lstrip", "rstrip"), ("<w>", "single_word"), ("<n x>", "normalized"), ("xyz", "normalized"),
           ("<loc0000>",), ("<loc0001>",), ("<seg000>",), (" <u", "lstrip"), ("<image>", "special")]  # fmt: skip
    listed += [added(len(vocab) + i, *token) for i, token in enumerate(new)]
    if kind == "bytes":
        options = {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "ignore_merges": False}
        return spec(vocab, merges, listed, REPLACE, None, DECODER, **options)
    options = {"unk_token": "<unk>", "fuse_unk": False, "byte_fallback": False, "ignore_merges": True}
    return spec(vocab, [merge.split(" ") for merge in merges], listed, None, SPLIT, DECODER, **options)


def random_spec(rng):
    """A random tokenizer.json, and characters and tokens to make texts for it from. rng: random.Random."""
    letters = rng.choice(["abc", "ab▁", "abcdé▁", "abcxyz▁ <>\n", "aé日😀▁\u0301"])
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", *rng.sample(BYTES, rng.choice([0, 128, 255, 256, 256]))]
    tokens += [letter for letter in letters if rng.random() < 0.9]
    vocab, merges, listed = {token: i for i, token in enumerate(tokens)}, [], {}
    parts = [token for token in tokens if token not in BYTES and len(token) == 1]
    for _ in range(rng.choice([0, 5, 30, 120]) if parts else 0):
        pair = [rng.choice(parts), rng.choice(parts)]
        if len("".join(pair)) < 24:
            merges.append(pair)
            parts.append("".join(pair))
            vocab.setdefault("".join(pair), len(vocab))
    rng.choice([rng.shuffle, len])(merges)
    if " " not in letters and rng.random() < 0.5:
        merges = [" ".join(pair) for pair in merges]
    choices = ["<image>", "<loc0001>", "<loc000", "<seg0012>", "<x>", "<bos", "x y", "▁▁", " a", "a ", "\n", "\n\n"]
    choices += ["ab", "abc", "bca", "é", "日😀", "_"]
    contents = ["<pad>", "<eos>", "<bos>", "<unk>", *rng.sample(choices, rng.randint(0, 9))]
    for content in contents:
        id = vocab.get(content, len(vocab) + sum(token not in vocab for token in listed))
        flags = [flag for flag in ("single_word", "lstrip", "rstrip", "normalized") if rng.random() < 0.2]
        if content.strip() != content:  # where the white space of two tokens overlaps, the package panics
            flags = [flag for flag in flags if flag != "lstrip"]
        special = content in contents[:4] or (content == "<image>" and rng.random() < 0.5)
        listed[content] = added(id, content, *([] if special else flags), *(["special"] if special else []))
    normalizer = rng.choice([REPLACE, REPLACE, None, {"type": "Sequence", "normalizers": [REPLACE]}])
    pre_tokenizer = rng.choice([SPLIT, None, *(SPLIT | {"pattern": {"String": text}} for text in ("▁", "ab"))])
    options = {name: rng.random() < 0.5 for name in ("fuse_unk", "byte_fallback", "ignore_merges")}
    options["unk_token"] = rng.choice(["<unk>", "<unk>", None])
    decoder = rng.choice([DECODER, DECODER, DECODER[1:], DECODER[:1]])
    return spec(vocab, merges, list(listed.values()), normalizer, pre_tokenizer, decoder, **options), letters, contents


def random_text(rng, letters, contents):
    """Letters, tokens, runs, blanks and any other characters of Unicode, mixed."""
    def other():
        character = chr(rng.randrange(rng.choice([0x80, 0x800, 0x10000, 0x110000])))
        return "" if unicodedata.category(character) in ("Cs", "Cn") else character

    kinds = [
        *[lambda: rng.choice(letters)] * 4,
        lambda: rng.choice(contents),
        lambda: rng.choice(" \n\t_-<>\u200d\u0301\x1c\u3000\x85Ⓐ½"),
        lambda: rng.choice(letters) * rng.randint(1, 20),
        other,
    ]
    return "".join(rng.choice(kinds)() for _ in range(rng.choice([3, 10, 40])))


def read_packed(name):
    """The content of golden/NAME.json.xz."""
    return json.loads(lzma.decompress((FOLDER / f"{name}.json.xz").read_bytes()))


def write_packed(name, content):
    """Write golden/NAME.json.xz: JSON, packed, since these are texts and ids that nobody reads."""
    data = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    (FOLDER / f"{name}.json.xz").write_bytes(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def main():
    from tokenizers import Tokenizer, __version__

    rng = random.Random(0)
    blocks = ["".join(map(chr, range(start, start + 8))) for start in range(0x80, 0x110000, 0x1C40)]
    blocks = [block for block in blocks if not "\ud800" <= block[0] <= "\udfff"]
    specs = {"shipped": None, "bytes": awkward("bytes"), "unknown": awkward("unknown")}
    golden = {"tokenizers": __version__, "specs": specs, "cases": {}}
    for name, content in specs.items():
        tokenizer = Tokenizer.from_file(str(SHIPPED)) if content is None else Tokenizer.from_str(json.dumps(content))
        # Most ids are bytes here, so that runs of them, whole and broken, stand beside one another.
        draws = [[rng.choice([rng.randrange(tokenizer.get_vocab_size()), rng.randrange(4, 260)]) for _ in range(9)]
                 for _ in range(60)]  # fmt: skip
        texts = TEXTS + (blocks if name == "shipped" else [])
        encoded = [(text, tokenizer.encode(text, add_special_tokens=False).ids) for text in texts]
        decoded = [
            [ids, *(tokenizer.decode(ids, skip_special_tokens=skip) for skip in (True, False))]
            for ids in draws + [ids for _, ids in encoded[:len(TEXTS)]]
        ]
        golden["cases"][name] = {"encoded": encoded, "decoded": decoded}
    write_packed("tokenizer", golden)


if __name__ == "__main__":
    main()
