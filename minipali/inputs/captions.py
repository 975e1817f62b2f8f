"""Captions for SigLIP's text tower: cleaned, and padded to the full length that the tower was trained with."""
import string

import numpy as np


def canonical(text):
    """Lower case, no punctuation, single spaces: what every caption of SigLIP's training went through."""
    return " ".join(text.lower().translate(str.maketrans("", "", string.punctuation)).split())


def caption_ids(captions, tokenizer, cfg):
    """Ids of each caption, ended by EOS and padded to the tower's length: its vector is read off the last place."""
    # B strings -> (B,T)
    T = cfg.max_position_embeddings
    ids = np.full((len(captions), T), cfg.pad_token_id, dtype=np.int64)
    for row, caption in zip(ids, captions):
        tokens = [*tokenizer.encode(canonical(caption))[:T - 1], tokenizer.eos_id]
        row[:len(tokens)] = tokens
    return ids
