"""Write golden/unigram.json.xz: unigram and normalizing tokenizers as two packages see them. No test runs this.

    pip install sentencepiece==0.2.3 tokenizers==0.23.3
    PYTHONPATH=.:tests python tests/golden/make_unigram_golden.py

Models in the manner of T5's and SigLIP 1's, trained on the tasks' words, and what converters make of them: the layouts
of a tokenizer.json that are in use. The rules that change characters are a part of the published ones, two of every
block of Unicode, so that the file stays small.
"""
import base64
import json
import random
import tempfile
import unicodedata

from golden.make_sentencepiece_golden import (
    CONTROLS,
    NORMAL,
    TEXTS,
    USER_DEFINED,
    blocks,
    model,
    random_model,
    train,
)
from golden.make_tokenizer_golden import (
    DECODER,
    REPLACE,
    added,
    awkward,
    random_spec,
    random_text,
    write_packed,
)

PUNCTUATION = r"[!\"\#\$%\&'\(\)\*\+,\-\.:;=\?@\[\\\]\^_`\{\|\}\~]"
ACCENTS = ["e\u0301", "\u0301e\u0301", "①\u0301", "ﬁ\u0301x", "é\u0301\u0302", "\u00aa\u0303", "n\u200d", "ÅÅ\u212b",
           "\r\n①\r\nx", "\u0e01\u0e33", "가\u11a8", "\u3000a\u3000\u3000b ", "ﬀﬀ①②", "\u200bﬁ", "İSTANBUL ΣΑΣ"]
CAPTIONS = ["A Photo of 2 Cats!", "snake_case, kebab-case", "  the   end. ", "...", "<pad></s><unk>", "▁a▁▁b▁",
            "don't", "tab\tand\nline", "a/b <c> {d}"]


def rules():
    """The characters that the published rules are about and are here too: nmt's blanks, and two of each block.

    Recorded with the answers, since Python's versions know different versions of Unicode.
    """
    table = {chr(point): " " for point in [9, 10, 13, 0x1680, 0x200B, 0x2581, 0x3000, 0xFEFF]}
    table |= {chr(point): "" for point in [1, 0x7F, 0x8F]}
    for start in range(0x80, 0x30000, 0x80):
        changed = [chr(p) for p in range(start, start + 0x80) if not 0xD800 <= p < 0xE000]
        changed = [c for c in changed if unicodedata.normalize("NFKC", c) != c]
        table |= {c: unicodedata.normalize("NFKC", c) for c in changed[:2] + changed[-1:]}
    table |= {text: unicodedata.normalize("NFC", text) for text in ["e\u0301", "A\u030a", "\u1100\u1161", "n\u0303"]}
    return table


def rule_file(table):
    lines = ["\t".join(" ".join(f"{ord(c):X}" for c in text) for text in pair) for pair in table.items()]
    file = tempfile.NamedTemporaryFile("w", suffix=".tsv", delete=False)
    file.write("\n".join(lines) + "\n")
    file.close()
    return file.name


def unigram(vocab_size, **options):
    """A model as T5's: <pad>, </s>, <unk>, unigram, blanks tidied up, changed by options."""
    return train(vocab_size, **{
        "model_type": "unigram", "byte_fallback": False, "normalization_rule_tsv": rule_file(rules()),
        "normalization_rule_name": "", "add_dummy_prefix": True, "remove_extra_whitespaces": True, "pad_id": 0,
        "allow_whitespace_only_pieces": False, "split_digits": False, "eos_id": 1, "unk_id": 2, "bos_id": -1,
        "eos_piece": "</s>", "bos_piece": "<s>"} | options)


def by_hand(rng):
    """A unigram model whose sums of scores are often equal."""
    pieces = {text: (0.0, kind) for text, _, kind in CONTROLS}
    parts = list("abcdé▁")
    for _ in range(150):
        part = rng.choice(parts) + rng.choice(parts)
        if len(part) < 20:
            parts.append(part)
            pieces.setdefault(part, (float(-rng.randrange(1, 6)), NORMAL))
    pieces |= {"<x>": (0.0, USER_DEFINED), "aba": (0.0, USER_DEFINED), "▁▁": (0.0, USER_DEFINED)}
    pieces |= {letter: (-4.0, NORMAL) for letter in "abc▁"}
    order = list(pieces)
    rng.shuffle(order)
    return model([(text, *pieces[text]) for text in order], [(3, 1)], [(3, 1), (4, 0)])


def metaspace(scheme="always", split=True):
    return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": split}


def regex(pattern, content):
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def layouts(data):
    """{name: tokenizer.json} of one SentencePiece model, by the ways in use to convert it."""
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(data)
    charsmap = base64.b64encode(proto.normalizer_spec.precompiled_charsmap).decode()
    vocab = [[piece.piece, piece.score] for piece in proto.pieces]
    specials = [added(i, vocab[i][0], "special") for i in range(3)]
    precompiled, words = {"type": "Precompiled", "precompiled_charsmap": charsmap}, {"type": "WhitespaceSplit"}
    clean = [{"type": "Lowercase"}, regex(PUNCTUATION, ""), regex(r"\s+", " "),
             {"type": "Strip", "strip_left": True, "strip_right": True}]
    right = {"type": "Strip", "strip_left": False, "strip_right": True}

    def spec(normalizers, pre_tokenizer, decoder, byte_fallback=False):
        return {"version": "1.0", "added_tokens": specials, "decoder": decoder, "pre_tokenizer": pre_tokenizer,
                "normalizer": {"type": "Sequence", "normalizers": normalizers} if len(normalizers) > 1 else
                (normalizers or [None])[0],
                "model": {"type": "Unigram", "unk_id": 2, "vocab": vocab, "byte_fallback": byte_fallback}}
    old = {"type": "Metaspace", "replacement": "▁", "add_prefix_space": True}
    return {
        "t5, older": spec([precompiled, regex(" {2,}", " ")], old, old),
        "t5": spec([precompiled, right, regex(" {2,}", "▁")], metaspace(), metaspace()),
        "t5, newer": spec([precompiled], {"type": "Sequence", "pretokenizers": [words, metaspace()]}, metaspace()),
        "siglip": spec(clean, metaspace(), metaspace()),
        "as its model": spec([precompiled, regex(r"\A +| +\z", ""), regex(" {2,}", " "), REPLACE, regex(r"\A▁", "▁▁")],
                             metaspace(split=False), {"type": "Sequence", "decoders": [
                                 DECODER[0], {"type": "Fuse"},
                                 {"type": "Strip", "content": " ", "start": 1, "stop": 0}]}),
        "bare": spec([], metaspace("first"), metaspace("never")),
    }  # fmt: skip


def lower_cased():
    """What transformers 5 writes for a SigLIP 2: Gemma's file with small letters first."""
    spec = awkward("bytes")
    return spec | {"normalizer": {"type": "Sequence", "normalizers": [{"type": "Lowercase"}, REPLACE]}}


def random_unigram_spec(rng):
    """A random tokenizer.json with a unigram model, and characters and tokens to make texts for it from."""
    spec, letters, contents = random_spec(rng)
    scores = [[token, 0.0 if token[0] == "<" and len(token) > 1 else -float(rng.randrange(1, 9))]
              for token in spec["model"]["vocab"]]
    spec["model"] = {"type": "Unigram", "unk_id": 3, "vocab": scores, "byte_fallback": rng.random() < 0.5}
    spec["pre_tokenizer"] = rng.choice([metaspace(), metaspace("never"), metaspace(split=False), None])
    return spec, letters, contents


def answers(spec, texts):
    """[text, ids, text of the ids] as the tokenizers package has them."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps(spec))
    encoded = [(text, tokenizer.encode(text, add_special_tokens=False).ids) for text in texts]
    return [[text, ids, tokenizer.decode(ids)] for text, ids in encoded]


def random_answers(make, seeds):
    """{seed: [[text, ids, text of the ids]]} over random files, which the seed gives again."""
    found = {}
    for seed in seeds:
        rng = random.Random(seed)
        spec, letters, contents = make(rng)
        found[seed] = answers(spec, [random_text(rng, letters, contents) for _ in range(6)])
    return found


def main():
    import sentencepiece
    import tokenizers
    from sentencepiece import sentencepiece_model_pb2

    def anywhere(data):
        """Without the path of the file with the rules."""
        proto = sentencepiece_model_pb2.ModelProto.FromString(data)
        proto.normalizer_spec.ClearField("normalization_rule_tsv")
        proto.denormalizer_spec.ClearField("normalization_rule_tsv")
        return proto.SerializeToString()

    models = {
        "siglip 1": unigram(420),
        "bytes": unigram(500, byte_fallback=True, add_dummy_prefix=False, remove_extra_whitespaces=False,
                         split_by_whitespace=False, user_defined_symbols=["<loc0000>", "<x>", "the"]),
        "by hand": by_hand(random.Random(2)),
        "bpe, normalized": train(420, normalization_rule_tsv=rule_file(rules()), normalization_rule_name="",
                                 add_dummy_prefix=True, remove_extra_whitespaces=True,
                                 user_defined_symbols=["<x>", "▁▁"]),
    }  # fmt: skip
    models = {name: anywhere(data) for name, data in models.items()}
    texts = [*TEXTS, *ACCENTS, *CAPTIONS, *rules()]
    golden = {"sentencepiece": sentencepiece.__version__, "tokenizers": tokenizers.__version__,
              "rules": rules(), "models": {}}
    for name, data in models.items():
        theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
        # sentencepiece refuses no text, but these characters end its input.
        usable = [text for text in texts + (blocks() if name == "siglip 1" else []) if "\0" not in text]
        golden["models"][name] = {"model": base64.b64encode(data).decode(),
                                  "encoded": [[text, theirs.encode(text)] for text in usable]}
    specs = layouts(models["siglip 1"]) | {"siglip 2": lower_cased()}
    golden["specs"] = specs
    golden["encoded"] = {name: answers(spec, texts + (blocks() if name in ("t5", "siglip") else []))
                         for name, spec in specs.items()}
    golden["random"] = random_answers(random_spec, range(60))
    golden["random unigram"] = random_answers(random_unigram_spec, range(60))
    golden["random models"] = {}
    for seed in range(60):
        rng = random.Random(seed)
        data, letters, symbols = random_model(rng)
        theirs = sentencepiece.SentencePieceProcessor(model_proto=data)
        golden["random models"][seed] = [[text, theirs.encode(text)] for text in (
            random_text(rng, letters, symbols).replace("\0", "") for _ in range(6))]
    write_packed("unigram", golden)


if __name__ == "__main__":
    main()
