"""The Gemma tokenizer as its authors published it: SentencePiece's `tokenizer.model`, for want of a tokenizer.json.

It is the same byte-pair encoding, told in another way. A `tokenizer.json` lists *merges*: which two neighbours may
join, the first of the list before all others. A `tokenizer.model` lists *pieces*, each with a score: any two neighbours
that together spell a piece may join, the highest score before all others, and of equal scores the leftmost. (The list
of merges that a converter makes from the pieces cannot say "leftmost" of two ways to spell one piece.)

The file is a protocol buffer, of which these fields matter:

    message ModelProto     { repeated SentencePiece pieces = 1;  TrainerSpec trainer_spec = 2;
                             NormalizerSpec normalizer_spec = 3;  NormalizerSpec denormalizer_spec = 5; }
    message SentencePiece  { string piece = 1;  float score = 2;  Type type = 3 [default = NORMAL]; }
    message TrainerSpec    { ModelType model_type = 3 [default = UNIGRAM];  bool byte_fallback = 35;
                             string bos_piece = 46;  string eos_piece = 47;  string pad_piece = 48; }
    message NormalizerSpec { bytes precompiled_charsmap = 2;  bool add_dummy_prefix = 3 [default = true];
                             bool remove_extra_whitespaces = 4 [default = true];
                             bool escape_whitespaces = 5 [default = true]; }

What a piece is for says its type. Only NORMAL pieces come out of merging; those that are USER_DEFINED (`<loc0000>`,
runs of blanks) are cut out beforehand. No text becomes a piece that is CONTROL (`<bos>`), and UNKNOWN (`<unk>`) and
BYTE stand only for characters that are in no piece.
"""

import math
import struct
from pathlib import Path

from minipali.errors import InputError
from minipali.inputs.bpe import merge_pairs
from minipali.inputs.protobuf import BYTES, FIXED32, VARINT, read_message, read_nested
from minipali.inputs.special_tokens import BYTE_NAMES, CONTROL_NAMES, AddedToken
from minipali.inputs.tokenizer import Tokenizer, collector_paused, read_json

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = TYPES = 1, 2, 3, 4, 6  # 5 is UNUSED: loaders set it, trainers do not
BPE = 2
FLOAT = struct.Struct("<f")

# {key: name}; the key in front of a field is its number * 8 + how it is written.
MODEL = {1 * 8 + BYTES: "pieces", 2 * 8 + BYTES: "trainer_spec"}
MODEL |= {3 * 8 + BYTES: "normalizer_spec", 5 * 8 + BYTES: "denormalizer_spec"}
PIECE = {1 * 8 + BYTES: "piece", 2 * 8 + FIXED32: "score", 3 * 8 + VARINT: "type"}
TRAINER = {3 * 8 + VARINT: "model_type", 35 * 8 + VARINT: "byte_fallback"}
TRAINER |= {46 * 8 + BYTES: "bos_piece", 47 * 8 + BYTES: "eos_piece", 48 * 8 + BYTES: "pad_piece"}
NORMALIZER = {2 * 8 + BYTES: "precompiled_charsmap", 3 * 8 + VARINT: "add_dummy_prefix"}
NORMALIZER |= {4 * 8 + VARINT: "remove_extra_whitespaces", 5 * 8 + VARINT: "escape_whitespaces"}


def read_text(value):
    """UTF-8 as text. Raises InputError for anything else."""
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{value!r:.40} is not UTF-8") from None


def read_piece(data):
    """(text, score, type) of one piece."""
    fields = read_message(data, PIECE)
    text = read_text(fields["piece"][-1]) if "piece" in fields else ""
    score = FLOAT.unpack(fields["score"][-1])[0] if "score" in fields else 0.0
    kind = fields["type"][-1] if "type" in fields else NORMAL
    if not text or "\0" in text:
        raise InputError(f"{text!r:.40}, expected a piece of text without U+0000")
    if math.isnan(score):
        raise InputError(f"{text!r:.40}: the score is not a number")
    if kind not in TYPES:
        raise InputError(f"{text!r:.40}: type {kind} is not supported, expected 1, 2, 3, 4 or 6")
    return text, score, kind


def read_pieces(messages, byte_fallback):
    """{text: (score, type)} in the order of ids. Raises InputError for what is wrong with one piece or with all."""
    pieces = {}
    try:
        for message in messages:
            text, score, kind = read_piece(message)
            if text in pieces:
                raise InputError(f"{text!r:.40} is there twice")
            pieces[text] = score, kind
    except InputError as error:
        raise InputError(f"pieces[{len(pieces)}]: {error}") from None
    unknown, bytes_ = ([text for text, (_, kind) in pieces.items() if kind == type_] for type_ in (UNKNOWN, BYTE))
    if len(unknown) != 1:
        raise InputError(f"pieces: {len(unknown)} are of type UNKNOWN, expected one")
    if set(bytes_) != (set(BYTE_NAMES) if byte_fallback else set()):
        expected = "<0x00> to <0xFF>" if byte_fallback else "none, since trainer_spec.byte_fallback is false"
        raise InputError(f"pieces: {len(bytes_)} are of type BYTE, expected {expected}")
    return pieces


def check_normalizers(model):
    """Raises InputError unless the model takes text as it is: a blank becomes "▁", and nothing else changes."""
    for name in ("normalizer_spec", "denormalizer_spec"):
        if read_nested(model, name, NORMALIZER).get("precompiled_charsmap"):
            raise InputError(f"{name}: rules that change characters are not supported, expected identity, as in Gemma")
    normalizer = read_nested(model, "normalizer_spec", NORMALIZER)
    for name, expected in (("add_dummy_prefix", 0), ("remove_extra_whitespaces", 0), ("escape_whitespaces", 1)):
        if bool(normalizer.get(name, 1)) != expected:
            raise InputError(f"normalizer_spec.{name}: expected {'true' if expected else 'false'}, as in Gemma")


def read_added(path, pieces):
    """[(id, token)] of an `added_tokens.json`, which says what follows the pieces; [] if there is no such file."""
    if not path.exists():
        return []
    try:
        ids = {text: id for id, text in enumerate(pieces)}
        added = read_json(path)
        if any(type(id) is not int for id in added.values()):
            raise InputError("expected an object of token: id")
        added = sorted((id, token) for token, id in added.items())
        for id, token in added:
            expected = ids.setdefault(token, len(ids))
            if id != expected:
                raise InputError(f"{token!r:.40} has id {id}, expected {expected}")
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return added


def tokenizer_json(pieces, added):
    """What a tokenizer.json would say, but for the merges: the pieces' ids, and which of them are added tokens."""
    entries = []
    for id, (text, (_, kind)) in enumerate(pieces.items()):
        # What to cut out is looked for after blanks have become "▁": a USER_DEFINED piece with a blank is never found.
        if kind in (UNKNOWN, CONTROL) or (kind == USER_DEFINED and " " not in text):
            flags = {"normalized": kind == USER_DEFINED, "special": kind != USER_DEFINED or text in CONTROL_NAMES}
            entries.append(vars(AddedToken.plain(id, text)) | flags)
    for id, token in added:
        if token not in pieces:
            entries.append(vars(AddedToken.plain(id, token)) | {"special": token in CONTROL_NAMES})
    (unknown,) = (text for text, (_, kind) in pieces.items() if kind == UNKNOWN)
    return {
        "model": {"vocab": {text: id for id, text in enumerate(pieces)}, "merges": [], "unk_token": unknown},
        "added_tokens": entries,
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
    }


class JoinRanks(dict):
    """{text of a piece: rank}, asked by `merge_pairs` with the two neighbours that would make it."""

    def get(self, pair):
        left, right = pair
        return None if left is None or right is None else super().get(left + right)


class SentencePieceTokenizer(Tokenizer):
    """A `Tokenizer` from a `tokenizer.model`, and from the `added_tokens.json` beside it if there is one.

    Encoding is that of the `sentencepiece` package. Decoding is that of the tokenizer.json that the same model comes
    with: `sentencepiece` shows `<unk>` as " ⁇ ", and saves whole characters from a run of bytes that is not UTF-8.
    bos_id, eos_id, pad_id: of `<bos>`, `<eos>`, `<pad>`, else of what the model itself calls them, `<s>` for example.
    """

    def __init__(self, data, added_path):
        model = read_message(data, MODEL)
        trainer = read_nested(model, "trainer_spec", TRAINER)
        if trainer.get("model_type", 1) != BPE:
            raise InputError(f"trainer_spec.model_type: expected {BPE}, byte-pair encoding")
        check_normalizers(model)
        pieces = read_pieces(model.get("pieces", []), trainer.get("byte_fallback"))
        super().__init__(tokenizer_json(pieces, read_added(added_path, pieces)))
        self.byte_fallback = bool(trainer.get("byte_fallback"))
        merged = {text: -score for text, (score, kind) in pieces.items() if kind == NORMAL}
        self.ranks = JoinRanks({text: rank for text, rank in merged.items() if text not in self.controls})
        names = {"bos_piece": b"<s>", "eos_piece": b"</s>", "pad_piece": b"<pad>"}
        named = [self.id_of(read_text(trainer.get(name) or default)) for name, default in names.items()]
        found = self.bos_id, self.eos_id, self.pad_id
        self.bos_id, self.eos_id, self.pad_id = (b if a is None else a for a, b in zip(found, named, strict=True))

    @classmethod
    def from_file(cls, path):
        """Reads a `tokenizer.model`. Raises InputError, naming the file, if it is broken or of another kind."""
        path = Path(path)
        try:
            with collector_paused():
                return cls(path.read_bytes(), path.with_name("added_tokens.json"))
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def _encode_word(self, word):
        ids = []
        for piece in merge_pairs(list(word), self.ranks):
            if piece in self.ranks:
                ids.append(self.ids[piece])
            elif self.byte_fallback:
                ids += [self.ids[BYTE_NAMES[byte]] for byte in piece.encode("utf-8")]
            elif ids[-1:] != [self.ids[self.unk_token]]:  # a run of unknown characters is one unknown token
                ids.append(self.ids[self.unk_token])
        return ids


def read_tokenizer(folder):
    """The tokenizer of a model's folder: its tokenizer.json, else its tokenizer.model, else None."""
    for name, kind in (("tokenizer.json", Tokenizer), ("tokenizer.model", SentencePieceTokenizer)):
        path = Path(folder) / name
        if path.exists():
            return kind.from_file(path)
    return None
