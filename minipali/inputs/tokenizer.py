"""The Gemma tokenizer: text to token ids and back, as a `tokenizer.json` describes it.

Three steps, in this order:

1. *Added tokens* (`<loc0512>`, `<seg007>`, runs of newlines, ...) are cut out of the raw text, leftmost first and the
   longest of those that begin at one place.
2. In what remains, every blank becomes "▁" (U+2581). Nothing is put in front: "on" and " on" are different tokens.
3. *Byte-pair encoding*: begin with single characters and merge neighbours, the pair that stands first in the list of
   merges first. A character that the vocabulary lacks becomes its UTF-8 bytes: `é` is `<0xC3>` `<0xA9>`.

Decoding goes back: "▁" to blank, byte tokens to characters, and nothing else is touched. (Tidying up with
`text.strip("<s>")` strips the *letters* "<", "s" and ">": "she is" comes back as "he i".)
"""

import gc
import json
import re
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from minipali.errors import InputError
from minipali.inputs.bpe import merge_pairs
from minipali.inputs.special_tokens import (
    BYTE_NAME,
    BYTE_NAMES,
    CONTROL_NAMES,
    LOCATION_NAMES,
    AddedToken,
    build_trie,
    cut_out_added,
)

HALF_PAIR = re.compile("[\ud800-\udfff]")


def split_after(text, pattern):
    """Cuts text after each occurrence of a pattern: "a b" at " " gives "a ", "b"."""
    *parts, last = text.split(pattern)
    return [part + pattern for part in parts] + ([last] if last else [])


class DecodeStream:
    """Turns token ids into text one at a time; what `push` and `finish` return, joined, is what `decode` returns.

    A run of byte tokens is held back until another token ends it: only the whole run says whether it is UTF-8 (if it
    is not, each byte becomes U+FFFD), and half a character never gets out.
    """

    def __init__(self, tokenizer, skip_special):
        self.tokenizer = tokenizer
        self.skip_special = skip_special
        self.run = bytearray()

    def push(self, id):
        """Takes the next token id, returns the text that is now certain (often "", inside a run of bytes)."""
        token = self.tokenizer.token_of(id)
        # An id without a token (checkpoints pad their embedding table) has no text.
        if token is None or (self.skip_special and token in self.tokenizer.special):
            return ""
        for pattern, content in self.tokenizer.decoder_replacements:
            token = token.replace(pattern, content)
        byte = BYTE_NAME.fullmatch(token) if self.tokenizer.decodes_bytes else None
        if byte is None:
            return self.finish() + token
        self.run.append(int(byte[1], 16))
        return ""

    def finish(self):
        """Returns the text of the bytes held back."""
        run, self.run = bytes(self.run), bytearray()
        try:
            return run.decode("utf-8")
        except UnicodeDecodeError:
            return "\ufffd" * len(run)


@contextmanager
def collector_paused():
    """Python's garbage collector would walk through half a million merges again and again while they are being made."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_json(path):
    """The object in a JSON file. Raises InputError if there is none."""
    try:
        spec = json.loads(Path(path).read_bytes().decode("utf-8"))
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}") from None
    if not isinstance(spec, dict):
        raise InputError("expected a JSON object")
    return spec


def read_vocab(model):
    """{token: id} of the model. Raises InputError unless every id is a different whole number."""
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not vocab:
        raise InputError("model.vocab: expected an object of token: id")
    if set(map(type, vocab.values())) != {int} or min(vocab.values()) < 0:
        raise InputError("model.vocab: expected ids that are whole numbers from 0 up")
    if len(set(vocab.values())) != len(vocab):
        raise InputError("model.vocab: two tokens have the same id")
    return vocab


def read_merges(model, vocab):
    """{(left, right): rank}. Older files write a merge as "left right", newer ones as ["left", "right"]."""
    merges = model.get("merges")
    kinds = set(map(type, merges)) if isinstance(merges, list) else {None}
    if kinds == {str}:
        merges = [merge.split(" ") for merge in merges]
    elif not kinds <= {list}:
        raise InputError('model.merges: expected a list of "left right" or of ["left", "right"]')
    pairs = list(map(tuple, merges))
    try:
        sound = set(map(len, pairs)) <= {2} and all(map(vocab.__contains__, map("".join, pairs)))
    except TypeError:
        sound = False
    if not sound:
        raise InputError("model.merges: expected pairs of tokens that together make a token of model.vocab")
    return {pair: rank for rank, pair in enumerate(pairs)}


def read_added_tokens(spec, vocab):
    """The list of AddedToken. Raises InputError if an id differs from the one that the token's place gives it."""
    entries = spec.get("added_tokens") or []
    names, kinds = ([getattr(field, about) for field in fields(AddedToken)] for about in ("name", "type"))
    tokens, ids = [], dict(vocab)
    for place, entry in enumerate(entries if isinstance(entries, list) else [None]):
        values = [entry.get(name) for name in names] if isinstance(entry, dict) else []
        if [type(value) for value in values] != kinds:
            raise InputError(f"added_tokens[{place}]: expected the fields {', '.join(names)}")
        token = AddedToken(*values)
        # The numbering of the `tokenizers` package: a token of the vocabulary keeps its id, the others follow on.
        expected = ids.setdefault(token.content, len(ids))
        if token.id != expected:
            raise InputError(f"added_tokens[{place}]: {token.content!r:.40} has id {token.id}, expected {expected}")
        tokens.append(token)
    return [token for token in tokens if token.content]


def read_steps(step, listed_under):
    """The steps of a normalizer, pre-tokenizer or decoder as a flat list: a Sequence, one step alone, or null."""
    if isinstance(step, dict) and step.get("type") == "Sequence" and isinstance(step.get(listed_under), list):
        return step[listed_under]
    return [] if step is None else [step]


def read_replacement(step, where):
    """(text, replacement) of a step of type Replace. Raises InputError for any other step."""
    if isinstance(step, dict) and step.get("type") == "Replace" and isinstance(step.get("pattern"), dict):
        pattern, content = step["pattern"].get("String"), step.get("content")
        if isinstance(pattern, str) and pattern and isinstance(content, str) and not HALF_PAIR.search(content):
            return pattern, content
    raise InputError(f"{where}: expected Replace of a string, found {json.dumps(step):.80}")


def read_split(step):
    """The text after which a step of type Split cuts. Raises InputError for any other step."""
    if isinstance(step, dict) and step.get("type") == "Split" and isinstance(step.get("pattern"), dict):
        pattern, behavior = step["pattern"].get("String"), step.get("behavior")
        if isinstance(pattern, str) and pattern and behavior == "MergedWithPrevious" and not step.get("invert"):
            return pattern
    raise InputError(f"pre_tokenizer: expected Split on a string, MergedWithPrevious, found {json.dumps(step):.80}")


def read_decoder(steps):
    """The replacements of the decoder, and whether it puts byte tokens together. Raises InputError for other steps."""
    kinds = [step.get("type") if isinstance(step, dict) else None for step in steps]
    count = kinds.count("Replace")
    if not kinds or kinds[count:] not in ([], ["Fuse"], ["ByteFallback"], ["ByteFallback", "Fuse"]):
        raise InputError(f"decoder: expected Replace, ByteFallback, Fuse, found {json.dumps(kinds):.80}")
    return [read_replacement(step, "decoder") for step in steps[:count]], "ByteFallback" in kinds


class Tokenizer:
    """Text to ids and back; `Tokenizer.from_file(path)` reads a `tokenizer.json`, or raises InputError with one line.

    vocab_size: rows that an embedding table needs (highest id + 1).
    bos_id, eos_id, pad_id, image_id: int, or None where the file has no such token.
    """

    def __init__(self, spec):
        model = spec.get("model")
        if not isinstance(model, dict) or model.get("type", "BPE") != "BPE":
            raise InputError("model: expected type BPE")
        for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            if model.get(option):
                raise InputError(f"model.{option}: expected null, found {model[option]!r:.40}")
        self.fuse_unk = model.get("fuse_unk", False)
        self.byte_fallback = model.get("byte_fallback", False)
        self.ignore_merges = model.get("ignore_merges", False)

        self.vocab = read_vocab(model)
        self.unk_token = model.get("unk_token")
        if self.unk_token is not None and (not isinstance(self.unk_token, str) or self.unk_token not in self.vocab):
            raise InputError(f"model.unk_token: {self.unk_token!r:.40} is not in model.vocab")
        added = read_added_tokens(spec, self.vocab)
        normalizers = read_steps(spec.get("normalizer"), "normalizers")
        self.replacements = [read_replacement(step, "normalizer") for step in normalizers]
        self.splits = [read_split(step) for step in read_steps(spec.get("pre_tokenizer"), "pretokenizers")]
        self.ids = self.vocab | {token.content: token.id for token in added}
        self.tokens = {id: token for token, id in self.ids.items()}
        self.tokens |= {token.id: self._normalize(token.content) for token in added if token.normalized}
        if HALF_PAIR.search("".join(self.ids)):
            raise InputError("model.vocab: a token holds half a surrogate pair, which is not text")
        self.vocab_size = max(self.tokens) + 1
        self.bos_id, self.eos_id, self.pad_id = map(self.id_of, ("<bos>", "<eos>", "<pad>"))
        self.image_id = self.id_of("<image>")

        self.special = {token.content for token in added if token.special} - LOCATION_NAMES
        self.controls = self.special | CONTROL_NAMES
        self.ranks = read_merges(model, self.vocab)
        for name in self.controls:  # plain text must not become a control token by way of the merges either
            for i in range(1, len(name)):
                self.ranks.pop((name[:i], name[i:]), None)

        listed = {token.content for token in added}
        unlisted = [AddedToken.plain(self.ids[name], name) for name in LOCATION_NAMES - listed if name in self.ids]
        in_text = [token for token in added if token.content not in self.controls] + unlisted

        decoder = read_decoder(read_steps(spec.get("decoder"), "decoders"))
        self.decoder_replacements, self.decodes_bytes = decoder
        self.tries = {True: self._tries(added), False: self._tries(in_text)}

    @classmethod
    def from_file(cls, path):
        """Reads a `tokenizer.json`. Raises InputError, naming the file, if it is broken or of another kind."""
        try:
            with collector_paused():
                return cls(read_json(path))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def id_of(self, token):
        """The id of a token, None if there is no such token."""
        return self.ids.get(token)

    def token_of(self, id):
        """The token of an id as the file writes it ("▁cat"), None if there is no such id."""
        return self.tokens.get(id)

    def encode(self, text, control=False):
        """The list of ids of a text; no <bos> is put in front, and " " at the start stays what it is.

        control: whether `<bos>`, `<image>` and the like in the text stand for the tokens (as the `tokenizers` package
        takes them) or are plain text. What a user typed is plain text. Raises InputError for half a surrogate pair.
        """
        half = HALF_PAIR.search(text)
        if half:
            raise InputError(f"text: U+{ord(half[0]):04X} at character {half.start()} is half a surrogate pair, not text")
        ids = []
        raw, normalized = self.tries[control]
        for piece, token in self._cut(text, raw, normalized):
            ids += [token.id] if token else self._encode_word(piece)
        return ids

    def decode(self, ids, skip_special=True):
        """The text of ids. skip_special: leaves out tokens flagged special (never `<loc…>` and `<seg…>`)."""
        stream = self.decode_stream(skip_special)
        return "".join([stream.push(id) for id in ids]) + stream.finish()

    def decode_stream(self, skip_special=True):
        """A DecodeStream, for showing text while it is being generated."""
        return DecodeStream(self, skip_special)

    def _normalize(self, text):
        for pattern, content in self.replacements:
            text = text.replace(pattern, content)
        return text

    def _tries(self, tokens):
        """What to look for in the raw text, and what in the normalized text between."""
        raw = {token.content: token for token in tokens if not token.normalized}
        return build_trie(raw), build_trie({self._normalize(t.content): t for t in tokens if t.normalized})

    def _cut(self, text, raw, normalized):
        """Yields (text, token) for an added token and (word, None) for what goes to byte-pair encoding."""
        for piece, token in cut_out_added(text, raw):
            if token:
                yield piece, token
                continue
            for word, token in cut_out_added(self._normalize(piece), normalized):
                words = [word]
                for pattern in [] if token else self.splits:
                    words = [part for word in words for part in split_after(word, pattern)]
                yield from ((word, token) for word in words)

    def _characters(self, word):
        """The pieces that merging starts from: characters, bytes of unknown characters, or the unknown token."""
        # The unknown token waits, since with fuse_unk the next unknown character joins it (even across byte tokens).
        pieces, waiting = [], []
        for character in word:
            if character in self.vocab and character not in self.controls:
                pieces += [*waiting, character]
                waiting = []
                continue
            names = [BYTE_NAMES[byte] for byte in character.encode("utf-8")]
            if self.byte_fallback and all(name in self.vocab for name in names):
                pieces += names
            elif self.unk_token:
                pieces += [] if self.fuse_unk else waiting
                waiting = [self.unk_token]
        return pieces + waiting

    def _encode_word(self, word):
        if self.ignore_merges and word in self.vocab and word not in self.controls:
            return [self.vocab[word]]
        return [self.vocab[piece] for piece in merge_pairs(self._characters(word), self.ranks)]
