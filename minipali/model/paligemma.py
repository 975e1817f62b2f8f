r"""PaliGemma (Beyer et al. 2024): the picture's tokens in front of the prompt's, and Gemma writes what follows.

    [picture 0 … P-1] [BOS prompt "\n"] [suffix EOS]
     \__________ prefix: all see all __/ \_ written one by one

`prefill` sends the prefix through once and fills the cache, `decode` adds tokens to it. `forward` does the whole
sequence at once without a cache: slower to write text with, but simple enough to be believed, and what training uses.
"""
import numpy as np

from minipali.model.gemma import decoder, embed_tokens, output_logits
from minipali.model.ops import linear
from minipali.model.siglip import vision_tower
from minipali.trace import scope, tap


def image_features(pixels, p, cfg):
    """The picture as P tokens that the language model can read: the vision tower, then one linear map, the projector.
    The projector is the one part that neither model brings along. Its "soft tokens" are rows of no vocabulary.
    """  # (B,3,height,width) -> (B,P,D)
    with scope("vision_tower", "vision_model"):
        x = vision_tower(pixels, p["vision_tower"]["vision_model"], cfg.vision_config)
    return tap("multi_modal_projector", linear(x, **p["multi_modal_projector"]["linear"]))


def output_head(p, cfg):
    """The (V, D) matrix that scores tokens: Gemma's own embedding table, unless the config unties the two."""
    module = p["language_model"]["model"]["embed_tokens"] if cfg.tie_word_embeddings else p["language_model"]["lm_head"]
    return module["weight"]


def join(features, ids, lengths, p, cfg):
    """Picture tokens before text tokens, with everyone's position; what lies behind a row's length is padding, at -1.

    The picture is not scaled by √D, the text is. Without a picture, `features` has P = 0 tokens.
    """  # (B,P,D), (B,T), (B,) -> (B,P+T,D), (B,P+T)
    with scope("language_model", "model"):
        text = tap("embed_tokens", embed_tokens(ids, p["language_model"]["model"], cfg.text_config))
    x = np.concatenate([features, text], axis=1)
    positions = np.arange(x.shape[1], like=x)[None]
    is_token = positions < np.asarray(lengths, like=x)[:, None] + features.shape[1]  # (B,P+T)
    return x, np.where(is_token, positions, -1)


def language_model(x, p, cfg, positions, prefix_len, cache=None):
    """The decoder under its checkpoint name."""  # (B,T,D), (B,T), (B,) -> (B,T,D)
    with scope("language_model", "model"):
        return decoder(x, p["language_model"]["model"], cfg.text_config, positions, prefix_len, cache)


def forward(features, ids, lengths, prefix_len, p, cfg):
    """Prefix and suffix at once, without a cache: what comes out at each text position, before the output head.

    `ids` holds prefix and suffix padded on the right, `lengths` how many of each row count, `prefix_len` how many
    tokens of the joined sequence (picture included) are prefix. Token t's output predicts token t + 1.
    """  # (B,P,D), (B,T), (B,), (B,) -> (B,T,D)
    x, positions = join(features, ids, lengths, p, cfg)
    x = language_model(x, p, cfg, positions, prefix_len)
    return x[:, features.shape[1]:]


def prefill(features, ids, lengths, p, cfg, cache):
    """The whole prefix in one call: fills the cache and scores the first token of the answer.

    Rows may differ in length (padding on the right, `lengths` says where it starts): each gives what it would alone.
    Only the last valid position meets the output head: for all of them, 257,216 scores each would be gigabytes.
    Raises ValueError if the cache is in use: a prefix in pieces could not look ahead, and would be another model.
    """  # (B,P,D), (B,T), (B,) -> (B,V)
    if cache.length:
        raise ValueError("the prefix goes through in one call, into an empty cache")
    x, positions = join(features, ids, lengths, p, cfg)
    prefix_len = positions.max(1) + 1
    x = language_model(x, p, cfg, positions, prefix_len, cache)
    cache.prefix_len, cache.written = prefix_len, 0
    last = x[np.arange(x.shape[0], like=x), prefix_len - 1]
    return tap("logits", output_logits(last, output_head(p, cfg), cfg.text_config))


def decode(ids, p, cfg, cache):
    """Add suffix tokens, usually one per row, after a prefill; scores the token after each.

    Positions go on where the row's own prefix ended, not where the padding did.
    """  # (B,T) -> (B,T,V)
    with scope("language_model", "model"):
        x = tap("embed_tokens", embed_tokens(ids, p["language_model"]["model"], cfg.text_config))
    steps = cache.written + np.arange(x.shape[1], like=x)
    x = language_model(x, p, cfg, cache.prefix_len[:, None] + steps, cache.prefix_len, cache)
    cache.written += ids.shape[1]
    return tap("logits", output_logits(x, output_head(p, cfg), cfg.text_config))
