"""Captions for SigLIP's text tower: cleaned, and padded to the full length that the tower was trained with.

The two generations of SigLIP clean captions differently, and the class that their files name tells which it is:

- SigLIP 1 (SiglipTokenizer): small letters, no punctuation, single blanks. Padded with the stop token.
- SigLIP 2 (GemmaTokenizer, Siglip2Tokenizer): small letters. Padded with <pad>.

Any other class does what its file says. A caption cleaned or padded in the wrong way is no error that anybody sees:
the probabilities are only worse.
"""
import string

import numpy as np

from minipali.errors import InputError
from minipali.inputs.normalizers import lower_case
from minipali.inputs.tokenizer import Tokenizer


def canonical_text(text: str, keep_case: bool = False) -> str:
    """Lower case, no punctuation, single spaces: what every caption of SigLIP 1's training went through."""
    # An underscore joins words, so it becomes a blank first, as in big_vision. (transformers drops it.)
    text = text.replace("_", " ")
    text = text if keep_case else text.lower()
    return " ".join(text.translate(str.maketrans("", "", string.punctuation)).split())


def clean(caption: str, tokenizer: Tokenizer) -> str:
    """A caption as the model of this tokenizer was trained to read it."""
    kind, keep_case = getattr(tokenizer, "kind", None), getattr(tokenizer, "keeps_case", False)
    if kind in ("SiglipTokenizer", None):
        return canonical_text(caption, keep_case)
    if kind in ("GemmaTokenizer", "Siglip2Tokenizer") and not keep_case:
        return lower_case(caption)
    return caption


def caption_ids(captions: list[str], tokenizer: Tokenizer, cfg) -> np.ndarray:
    """Ids of each caption, ended by the stop token and padded: the caption's vector is read off the last place.

    cfg: the text tower's config; its `pad_token_id` counts only where the tokenizer has no padding token.
    """
    # B strings -> (B,T)
    T = cfg.max_position_embeddings
    pad = cfg.pad_token_id if tokenizer.pad_id is None else tokenizer.pad_id
    end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    ids = np.full((len(captions), T), pad, dtype=np.int64)
    for row, caption in zip(ids, captions):
        tokens = [*tokenizer.encode(clean(caption, tokenizer))[:T - len(end)], *end]
        row[:len(tokens)] = tokens
    return ids


def check_caption_ids(ids: np.ndarray, vocab_size: int):
    """Raise InputError unless every id has an embedding."""
    if ids.size and ids.max() >= vocab_size:
        raise InputError(f"captions: id {ids.max()} is outside the model's vocabulary, 0 to {vocab_size - 1}; "
                         "expected the tokenizer that belongs to the model")
