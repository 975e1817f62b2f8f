"""A tokenizer as its authors published it: SentencePiece's `tokenizer.model` (Gemma) or `spiece.model` (SigLIP 1, T5).

The file lists *pieces*, each with a score, and its `model_type` says what the scores are for:

- UNIGRAM (unigram.py): the logarithm of the piece's probability. The likeliest segmentation of a text is chosen.
- BPE (bpe.py): any two neighbors that together spell a piece may join, the highest score before all others, and of
  equal scores the leftmost. A tokenizer.json tells the same in another way, as a list of *merges*: which two neighbors
  may join, the first of the list before all others. (The list of merges that a converter makes from the pieces cannot
  say "leftmost" of two ways to spell one piece.)

The file is a protocol buffer, of which these fields matter:

    message ModelProto     { repeated SentencePiece pieces = 1;  TrainerSpec trainer_spec = 2;
                             NormalizerSpec normalizer_spec = 3;  NormalizerSpec denormalizer_spec = 5; }
    message SentencePiece  { string piece = 1;  float score = 2;  Type type = 3 [default = NORMAL]; }
    message TrainerSpec    { ModelType model_type = 3 [default = UNIGRAM];  bool treat_whitespace_as_suffix = 24;
                             bool byte_fallback = 35;
                             string bos_piece = 46;  string eos_piece = 47;  string pad_piece = 48; }
    message NormalizerSpec { bytes precompiled_charsmap = 2;  bool add_dummy_prefix = 3 [default = true];
                             bool remove_extra_whitespaces = 4 [default = true];
                             bool escape_whitespaces = 5 [default = true]; }

A piece's type says what it is for. Only NORMAL pieces come out of merging; those that are USER_DEFINED (`<loc0000>`,
runs of blanks) are cut out beforehand. No text becomes a piece that is CONTROL (`<bos>`), and UNKNOWN (`<unk>`) and
BYTE stand only for characters that are in no piece.
"""
import math
import struct
from dataclasses import replace
from pathlib import Path

from minipali.errors import InputError
from minipali.files import read_json
from minipali.inputs.bpe import ScoredPieces
from minipali.inputs.charsmap import CharsMap
from minipali.inputs.normalizers import SentencePieceNormalizer
from minipali.inputs.protobuf import BYTES, FIXED32, VARINT, read_message, read_nested
from minipali.inputs.special_tokens import BYTE_NAMES, CONTROL_NAMES, AddedToken
from minipali.inputs.tokenizer import Tokenizer, collector_paused
from minipali.inputs.tokenizer_json import Decoder
from minipali.inputs.unigram import UNKNOWN_PENALTY, Unigram, to_float32

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = TYPES = 1, 2, 3, 4, 6  # 5 is UNUSED: loaders set it, trainers do not
UNIGRAM, BPE = 1, 2
FLOAT = struct.Struct("<f")

# {key: name}; the key in front of a field is its number * 8 + how it is written.
MODEL = {1 * 8 + BYTES: "pieces", 2 * 8 + BYTES: "trainer_spec"}
MODEL |= {3 * 8 + BYTES: "normalizer_spec", 5 * 8 + BYTES: "denormalizer_spec"}
PIECE = {1 * 8 + BYTES: "piece", 2 * 8 + FIXED32: "score", 3 * 8 + VARINT: "type"}
TRAINER = {3 * 8 + VARINT: "model_type", 24 * 8 + VARINT: "treat_whitespace_as_suffix"}
TRAINER |= {35 * 8 + VARINT: "byte_fallback"}
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
                raise InputError(f"{text!r:.40} occurs twice")
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


def read_normalizer(model, kept) -> SentencePieceNormalizer:
    """The normalizer of a model. `kept`: pieces that it leaves unchanged."""
    if read_nested(model, "denormalizer_spec", NORMALIZER).get("precompiled_charsmap"):
        raise InputError("denormalizer_spec: rules that change the answer are not supported, expected none")
    fields = read_nested(model, "normalizer_spec", NORMALIZER)
    if not fields.get("escape_whitespaces", 1):
        raise InputError("normalizer_spec.escape_whitespaces: expected true")
    rules = fields.get("precompiled_charsmap")
    try:
        charsmap = CharsMap(rules) if rules else None
    except InputError as error:
        raise InputError(f"normalizer_spec: {error}") from None
    flags = [bool(fields.get(name, 1)) for name in ("add_dummy_prefix", "remove_extra_whitespaces")]
    return SentencePieceNormalizer(charsmap, *flags, kept)


def read_added(path, pieces):
    """[(id, token)] of an `added_tokens.json`, which says what follows the pieces; [] if there is no such file."""
    if not path.exists():
        return []
    added = read_json(path)
    if not isinstance(added, dict) or any(type(id) is not int for id in added.values()):
        raise InputError(f"{path}: expected an object of token: id")
    ids = {text: id for id, text in enumerate(pieces)}
    added = sorted((id, token) for token, id in added.items())
    for id, token in added:
        expected = ids.setdefault(token, len(ids))
        if id != expected:
            raise InputError(f"{path}: {token!r:.40} has id {id}, expected {expected}")
    return added


def read_added_pieces(pieces, added, cut_out) -> list:
    """The pieces and added tokens that are looked for in a text as a whole, or that only a program puts there.

    cut_out: whether those of type USER_DEFINED are among them.
    """
    tokens = []
    for id, (text, (_, kind)) in enumerate(pieces.items()):
        # What to cut out is looked for after blanks have become "▁": a USER_DEFINED piece with a blank is never found.
        if kind in (UNKNOWN, CONTROL) or (kind == USER_DEFINED and cut_out and " " not in text):
            special = kind != USER_DEFINED or text in CONTROL_NAMES
            tokens.append(replace(AddedToken.plain(id, text), normalized=kind == USER_DEFINED, special=special))
    return tokens + [replace(AddedToken.plain(id, token), special=token in CONTROL_NAMES)
                     for id, token in added if token not in pieces]


class SentencePieceTokenizer(Tokenizer):
    """A `Tokenizer` from a `tokenizer.model`, and from the `added_tokens.json` beside it if there is one.

    Encoding is that of the `sentencepiece` package. Decoding is that of the tokenizer.json that the same model comes
    with: `sentencepiece` shows `<unk>` as " ⁇ ", and saves whole characters from a run of bytes that is not UTF-8.
    bos_id, eos_id, pad_id: of what the model itself calls them, else of `<bos>`, `<eos>`, `<pad>`.
    """

    def __init__(self, data: bytes, added_path: Path):
        model = read_message(data, MODEL)
        trainer = read_nested(model, "trainer_spec", TRAINER)
        algorithm = trainer.get("model_type", UNIGRAM)
        if algorithm not in (UNIGRAM, BPE):
            raise InputError(f"trainer_spec.model_type: expected {UNIGRAM}, unigram, or {BPE}, byte-pair encoding")
        if trainer.get("treat_whitespace_as_suffix"):
            raise InputError("trainer_spec.treat_whitespace_as_suffix: expected false")
        pieces = read_pieces(model.get("pieces", []), trainer.get("byte_fallback"))
        vocab = {text: id for id, text in enumerate(pieces)}
        kept = [text for text, (_, kind) in pieces.items() if kind == USER_DEFINED and text not in CONTROL_NAMES]
        normalizer = read_normalizer(model, kept)
        front = "one dropped" if normalizer.add_dummy_prefix else "kept"
        self._assemble(vocab, read_added_pieces(pieces, read_added(added_path, pieces), algorithm == BPE), [normalizer],
                       [], Decoder([("▁", " ")], True, front))
        for part, default in {"bos": b"<s>", "eos": b"</s>", "pad": b"<pad>"}.items():
            name = read_text(trainer.get(f"{part}_piece") or default)
            if pieces.get(name, (0.0, NORMAL))[1] == CONTROL:  # Gemma's vocabulary has "</s>", a tag of HTML
                self.declare(**{part: name})

        byte_ids = {byte: vocab[name] for byte, name in enumerate(BYTE_NAMES)} if trainer.get("byte_fallback") else {}
        (unknown_id,) = (vocab[text] for text, (_, kind) in pieces.items() if kind == UNKNOWN)
        normal = {text: score for text, (score, kind) in pieces.items() if kind == NORMAL}
        if algorithm == BPE:
            in_text = {text: score for text, score in normal.items() if text not in self.controls}
            self.model = ScoredPieces(vocab, in_text, unknown_id, byte_ids)
            return
        # Pieces of type USER_DEFINED win by their score, and of several the longest.
        scores = normal | {text: to_float32(0.1 * (len(text.encode("utf-8")) - 1)) for text in kept}
        in_text = {text: score for text, score in scores.items() if text not in self.controls}
        unknown_score = min(normal.values(), default=0.0) - UNKNOWN_PENALTY
        self.model = Unigram(vocab, in_text, unknown_id, unknown_score, byte_ids, to_float32)

    @classmethod
    def from_file(cls, path):
        """Read a `tokenizer.model`. Raises InputError, naming the file, if it is broken or of another kind."""
        path = Path(path)
        try:
            with collector_paused():
                return cls(path.read_bytes(), path.with_name("added_tokens.json"))
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from None
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def _look_of(self, token):
        return token.content  # the normalizer keeps it
