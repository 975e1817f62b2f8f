"""Reading a tokenizer.json: what `Tokenizer` is made of, or one line about what is wrong in the file."""
import json
import math
from dataclasses import dataclass, fields

from minipali.errors import InputError
from minipali.inputs.bpe import ListedMerges
from minipali.inputs.normalizers import read_replacement
from minipali.inputs.special_tokens import BYTE_NAMES, AddedToken
from minipali.inputs.unigram import UNKNOWN_PENALTY, Unigram


@dataclass(frozen=True)
class Decoder:
    """How tokens become text again.

    replacements: [(string, replacement)] in each token. decodes_bytes: whether byte tokens are put together.
    front: what becomes of blanks at the beginning, "kept", "one dropped", or all "dropped" of the first token.
    """

    replacements: list
    decodes_bytes: bool
    front: str = "kept"


def read_vocab(model):
    """{token: id} of the model. Raises InputError unless the ids are different integers of at least 0."""
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not vocab:
        raise InputError("model.vocab: expected an object of token: id")
    if set(map(type, vocab.values())) != {int} or min(vocab.values()) < 0:
        raise InputError("model.vocab: expected ids that are integers of at least 0")
    if len(set(vocab.values())) != len(vocab):
        raise InputError("model.vocab: two tokens have the same id")
    return vocab


def read_scored_vocab(model) -> dict:
    """{token: score} of a unigram model, in the order of ids. Raises InputError unless it is a list of such pairs."""
    pairs = model.get("vocab")
    try:
        scores = {token: float(score) for token, score in pairs}
    except (TypeError, ValueError, OverflowError):
        raise InputError("model.vocab: expected a list of [token, score]") from None
    if not scores or set(map(type, scores)) != {str} or not all(map(math.isfinite, scores.values())):
        raise InputError("model.vocab: expected a list of [token, score]")
    if len(scores) != len(pairs):
        raise InputError("model.vocab: a token occurs twice")
    return scores


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


def read_bpe(model, vocab, controls) -> ListedMerges:
    """The byte-pair encoding of a model of type BPE. `controls`: tokens that no text becomes."""
    for option in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(option):
            raise InputError(f"model.{option}: expected null, found {model[option]!r:.40}")
    unknown = model.get("unk_token")
    if unknown is not None and (not isinstance(unknown, str) or unknown not in vocab):
        raise InputError(f"model.unk_token: {unknown!r:.40} is not in model.vocab")
    ranks = read_merges(model, vocab)
    for name in controls:  # plain text must not become a control token by way of the merges either
        for i in range(1, len(name)):
            ranks.pop((name[:i], name[i:]), None)
    options = [bool(model.get(name)) for name in ("fuse_unk", "byte_fallback", "ignore_merges")]
    return ListedMerges(vocab, ranks, controls, unknown, *options)


def read_unigram(model, scores, vocab, controls) -> Unigram:
    """The unigram model of a model of type Unigram."""
    unknown_id = model.get("unk_id")
    if type(unknown_id) is not int or not 0 <= unknown_id < len(vocab):
        raise InputError(f"model.unk_id: expected the id of a token, found {json.dumps(unknown_id):.40}")
    byte_ids = {byte: vocab[name] for byte, name in enumerate(BYTE_NAMES) if name in vocab}
    in_text = {token: score for token, score in scores.items() if token and token not in controls}
    return Unigram(vocab, in_text, unknown_id, min(scores.values()) - UNKNOWN_PENALTY,
                   byte_ids if model.get("byte_fallback") else {})


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


def read_decoder(steps) -> Decoder:
    """The decoder of a list of steps. Raises InputError for steps that are not undone here."""
    kinds = [step.get("type") if isinstance(step, dict) else None for step in steps]
    if kinds == ["Metaspace"]:
        mark = steps[0].get("replacement", "▁")
        scheme = steps[0].get("prepend_scheme", "always" if steps[0].get("add_prefix_space", True) else "never")
        if isinstance(mark, str) and len(mark) == 1:
            return Decoder([(mark, " ")], False, "kept" if scheme == "never" else "dropped")
    count = kinds.count("Replace")
    front = "kept"
    strip_one = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    if kinds[-2:] == ["Fuse", "Strip"] and steps[-1] == strip_one:
        front = "one dropped"
        kinds.pop()
    if not kinds or kinds[count:] not in ([], ["Fuse"], ["ByteFallback"], ["ByteFallback", "Fuse"]):
        expected = "Metaspace, or Replace, ByteFallback, Fuse, Strip"
        raise InputError(f"decoder: expected {expected}, found {json.dumps(kinds):.60}")
    try:
        replacements = [read_replacement(step) for step in steps[:count]]
    except InputError as error:
        raise InputError(f"decoder: {error}") from None
    if any(not isinstance(pattern, str) for pattern, _ in replacements):
        raise InputError("decoder: expected Replace of a string")
    return Decoder(replacements, "ByteFallback" in kinds, front)
