"""Text to token ids and back, as a `tokenizer.json` describes it: the tokenizer of Gemma, or of a SigLIP.

Four steps, in this order:

1. *Added tokens* (`<loc0512>`, `<seg007>`, runs of newlines, ...) are cut out of the raw text, leftmost first and the
   longest of those that begin at one place (special_tokens.py).
2. What remains is *normalized* (normalizers.py). For Gemma every blank becomes "▁" (U+2581), and nothing is put in
   front: "on" and " on" are different tokens. SigLIP 1 knows small letters only, and one blank at a time.
3. It may be cut into words that no token reaches across (pre_tokenizers.py). Gemma's is not.
4. A word becomes the tokens of the vocabulary, by *byte-pair encoding* (bpe.py) or as a *unigram model* finds them
   (unigram.py). A character that the vocabulary lacks becomes its UTF-8 bytes: `é` is `<0xC3>` `<0xA9>`.

Decoding goes back: "▁" to blank, byte tokens to characters, and nothing else is touched. (Tidying up with
`text.strip("<s>")` strips the *letters* "<", "s" and ">": "she is" comes back as "he i".)
"""
import gc
from collections.abc import Callable
from contextlib import contextmanager

from minipali.errors import InputError
from minipali.files import read_json
from minipali.inputs.normalizers import HALF_PAIR, read_normalizer
from minipali.inputs.pre_tokenizers import read_pre_tokenizer
from minipali.inputs.special_tokens import (
    BYTE_NAME,
    CONTROL_NAMES,
    LOCATION_NAMES,
    AddedToken,
    build_trie,
    cut_out_added,
)
from minipali.inputs.tokenizer_json import (
    Decoder,
    read_added_tokens,
    read_bpe,
    read_decoder,
    read_scored_vocab,
    read_steps,
    read_unigram,
    read_vocab,
)


class DecodeStream:
    """Token ids into text, one at a time; what `push` and `finish` return, joined, is what `decode` returns.

    A run of byte tokens is held back until another token ends it: only the whole run says whether it is UTF-8 (if it
    is not, each byte becomes U+FFFD), and half a character never gets out.
    """

    def __init__(self, tokenizer: "Tokenizer", skip_special: bool):
        self.tokenizer = tokenizer
        self.skip_special = skip_special
        self.run = bytearray()
        self.front = tokenizer.decoder.front

    def push(self, id: int) -> str:
        """Take the next token id, return the text that is now certain (often "", inside a run of bytes)."""
        token = self.tokenizer.token_of(id)
        # An id without a token (checkpoints pad their embedding table) has no text.
        if token is None or (self.skip_special and token in self.tokenizer.special):
            return ""
        for pattern, content in self.tokenizer.decoder.replacements:
            token = token.replace(pattern, "" if self.front == "dropped" else content)
        if self.front == "dropped":
            self.front = "kept"
        byte = BYTE_NAME.fullmatch(token) if self.tokenizer.decoder.decodes_bytes else None
        if byte is None:
            return self.finish() + self._at_front(token)
        self.run.append(int(byte[1], 16))
        return ""

    def finish(self) -> str:
        """Return the text of the bytes held back."""
        run, self.run = bytes(self.run), bytearray()
        try:
            return self._at_front(run.decode("utf-8"))
        except UnicodeDecodeError:
            return self._at_front("\ufffd" * len(run))

    def _at_front(self, text):
        if self.front == "one dropped" and text:
            self.front = "kept"
            return text.removeprefix(" ")
        return text


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


class Tokenizer:
    """Text to ids and back; `Tokenizer.from_file(path)` reads a `tokenizer.json`, or raises InputError with one line.

    vocab_size: rows that an embedding table needs (highest id + 1).
    bos_id, eos_id, pad_id, image_id: int, or None where the file has no such token; `declare` sets the first three.
    kind: the class that reads these files elsewhere, such as "SiglipTokenizer", or None; keeps_case: whether it is told
    not to make letters small. `read_tokenizer` sets both.
    """

    def __init__(self, spec: dict):
        model = spec.get("model")
        kind = model.get("type", "BPE") if isinstance(model, dict) else None
        if kind not in ("BPE", "Unigram"):
            raise InputError("model: expected type BPE or Unigram")
        scores = read_scored_vocab(model) if kind == "Unigram" else {}
        vocab = {token: id for id, token in enumerate(scores)} or read_vocab(model)
        added = read_added_tokens(spec, vocab)
        normalizers = [read_normalizer(step) for step in read_steps(spec.get("normalizer"), "normalizers")]
        pre_tokenizers = [read_pre_tokenizer(step) for step in read_steps(spec.get("pre_tokenizer"), "pretokenizers")]
        decoder = read_decoder(read_steps(spec.get("decoder"), "decoders"))
        self._assemble(vocab, added, normalizers, pre_tokenizers, decoder)
        if scores:
            self.model = read_unigram(model, scores, vocab, self.controls)
        else:
            self.model = read_bpe(model, vocab, self.controls)

    def _assemble(self, vocab: dict, added: list[AddedToken], normalizers: list[Callable],
                  pre_tokenizers: list[Callable], decoder: Decoder):
        """All but the model, which must not make tokens out of text that are in `controls`."""
        self.normalizers, self.pre_tokenizers, self.decoder = normalizers, pre_tokenizers, decoder
        self.ids = vocab | {token.content: token.id for token in added}
        self.tokens = {id: token for token, id in self.ids.items()}
        self.tokens |= {token.id: self._look_of(token) for token in added if token.normalized}
        if HALF_PAIR.search("".join(self.ids)):
            raise InputError("model.vocab: a token holds half a surrogate pair, which is not text")
        self.vocab_size = max(self.tokens) + 1
        self.kind, self.keeps_case = None, False
        self.bos_id = self.eos_id = self.pad_id = None
        self.declare(bos="<s>", eos="</s>")
        self.declare(bos="<bos>", eos="<eos>", pad="<pad>")
        self.image_id = self.id_of("<image>")

        self.special = {token.content for token in added if token.special} - LOCATION_NAMES
        self.controls = self.special | CONTROL_NAMES
        listed = {token.content for token in added}
        unlisted = [AddedToken.plain(self.ids[name], name) for name in LOCATION_NAMES - listed if name in self.ids]
        in_text = [token for token in added if token.content not in self.controls] + unlisted
        self.tries = {True: self._tries(added), False: self._tries(in_text)}

    @classmethod
    def from_file(cls, path) -> "Tokenizer":
        """Read a `tokenizer.json`. Raises InputError, naming the file, if it is broken or of another kind."""
        with collector_paused():
            spec = read_json(path)
            try:
                if not isinstance(spec, dict):
                    raise InputError("expected a JSON object")
                return cls(spec)
            except InputError as error:
                raise InputError(f"{path}: {error}") from None

    def declare(self, **names):
        """Say which tokens stand for beginning, end and padding: bos, eos and pad, by name.

        A name that is no token, or None, changes nothing.
        """
        for part, name in names.items():
            id = self.id_of(name)
            if id is not None:
                setattr(self, f"{part}_id", id)

    def id_of(self, token: str) -> int | None:
        """The id of a token, None if there is no such token."""
        return self.ids.get(token)

    def token_of(self, id: int) -> str | None:
        """The token of an id as the file writes it ("▁cat"), None if there is no such id."""
        return self.tokens.get(id)

    def encode(self, text: str, control: bool = False) -> list[int]:
        """The list of ids of a text; no <bos> is put in front, and " " at the start stays what it is.

        control: whether `<bos>`, `<image>` and the like in the text stand for the tokens (as the `tokenizers` package
        takes them) or are plain text. What a user typed is plain text. Raises InputError for half a surrogate pair.
        """
        half = HALF_PAIR.search(text)
        if half:
            where = f"U+{ord(half[0]):04X} at character {half.start()}"
            raise InputError(f"text: {where} is half a surrogate pair, not text")
        ids = []
        raw, normalized = self.tries[control]
        for piece, token in self._cut(text, raw, normalized):
            ids += [token.id] if token else self.model.encode(piece)
        return ids

    def decode(self, ids, skip_special: bool = True) -> str:
        """The text of ids. skip_special: leaves out tokens flagged special (never `<loc…>` and `<seg…>`)."""
        stream = self.decode_stream(skip_special)
        return "".join([stream.push(id) for id in ids]) + stream.finish()

    def decode_stream(self, skip_special: bool = True) -> DecodeStream:
        """A DecodeStream, for showing text while it is being generated."""
        return DecodeStream(self, skip_special)

    def _normalize(self, text):
        for step in self.normalizers:
            text = step(text)
        return text

    def _look_of(self, token):
        """What a token looks like in a normalized text."""
        return self._normalize(token.content)

    def _tries(self, tokens):
        """What to look for in the raw text, and what in the normalized text between."""
        raw = {token.content: token for token in tokens if not token.normalized}
        return build_trie(raw), build_trie({self._look_of(t): t for t in tokens if t.normalized})

    def _cut(self, text, raw, normalized):
        """Yield (text, token) for an added token and (word, None) for what the model makes tokens of."""
        begins = True
        for piece, token in cut_out_added(text, raw):
            if token:
                yield piece, token
                begins = False
                continue
            for word, token in cut_out_added(self._normalize(piece), normalized):
                words = [word]
                for cut in [] if token else self.pre_tokenizers:
                    words = [part for i, word in enumerate(words) if word for part in cut(word, begins and i == 0)]
                yield from ((word, token) for word in words)
                begins = False
