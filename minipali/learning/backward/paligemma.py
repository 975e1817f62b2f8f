"""Backward of model/paligemma.py: picture, prompt and answer in, the gradient of every weight out."""
import numpy as np

from minipali.learning.backward import siglip
from minipali.learning.backward.gemma import decoder, embed_tokens, output_logits
from minipali.learning.backward.losses import cross_entropy
from minipali.learning.backward.ops import linear
from minipali.model import paligemma
from minipali.model.paligemma import output_head


def image_features(pixels, p, cfg, recompute=False):
    """The tower is not frozen: the paper found that training it with the rest sees space and relations better."""
    # (B,3,height,width) -> (B,P,D)
    x, pull_tower = siglip.vision_tower(pixels, p["vision_tower"]["vision_model"], cfg.vision_config, recompute)
    y, pull_linear = linear(x, **p["multi_modal_projector"]["linear"])

    def pull(dy):
        dx, dlinear = pull_linear(dy)
        dpixels, dtower = pull_tower(dx)
        return dpixels, {"vision_tower": {"vision_model": dtower}, "multi_modal_projector": {"linear": dlinear}}
    return y, pull


def join(features, ids, lengths, p, cfg):
    """What was joined is cut apart again. (The embedding runs twice, once for x and once for its pull: it is cheap.)"""
    # (B,P,D), (B,T), (B,) -> (B,P+T,D), (B,P+T)
    x, positions = paligemma.join(features, ids, lengths, p, cfg)
    _, pull_text = embed_tokens(ids, p["language_model"]["model"], cfg.text_config)
    P = features.shape[1]

    def pull(dx):
        return dx[:, :P], {"language_model": {"model": pull_text(dx[:, P:])}}
    return (x, positions), pull


def forward(features, ids, lengths, prefix_len, p, cfg, recompute=False):
    """The picture's outputs were not asked for, so their gradient starts at 0 and comes through attention."""
    # (B,P,D), (B,T), (B,), (B,) -> (B,T,D)
    (x, positions), pull_join = join(features, ids, lengths, p, cfg)
    x, pull_decoder = decoder(x, p["language_model"]["model"], cfg.text_config, positions, prefix_len, recompute)
    P = features.shape[1]

    def pull(dy):
        dx = np.zeros_like(x)
        dx[:, P:] = dy
        dx, dlayers = pull_decoder(dx)
        dfeatures, grads = pull_join(dx)
        grads["language_model"]["model"].update(dlayers)
        return dfeatures, grads
    return x[:, P:], pull


def suffix_loss(features, ids, lengths, prefix_len, p, cfg, weights, recompute=False):
    """Σ weights · cross-entropy over the answers' tokens, the stop token included; the prompt itself is not learned.

    Token t's output is asked for token t + 1, so the newline that ends the prompt predicts the answer's first token.
    `weights` (B,T) belongs to the predicted tokens: 0 on prompt and padding, and 1 over their number elsewhere for
    the usual mean. The embedding table is input and output at once, so it gets both gradients.
    """  # (B,P,D), (B,T), (B,), (B,), (B,T) -> ()
    x, pull_forward = forward(features, ids, lengths, prefix_len, p, cfg, recompute)
    rows, columns = (np.asarray(i, like=x) for i in np.nonzero(weights[:, 1:]))  # those that predict something
    chosen = x[rows, columns]
    logits, pull_logits = output_logits(chosen, output_head(p, cfg), cfg.text_config)
    losses, pull_losses = cross_entropy(logits, np.asarray(ids, like=x)[rows, columns + 1])
    w = np.asarray(weights, like=x)[rows, columns + 1]

    def pull(dy):
        dchosen, dhead = pull_logits(pull_losses(w * dy))
        dx = np.zeros_like(x)
        dx[rows, columns] = dchosen
        dfeatures, grads = pull_forward(dx)
        if cfg.tie_word_embeddings:
            table = grads["language_model"]["model"]["embed_tokens"]
            for name, dweight in dhead.items():  # "weight", or what learns in its place
                table[name] += dweight
        else:
            grads["language_model"]["lm_head"] = dhead
        return dfeatures, grads
    return (losses * w).sum(), pull
