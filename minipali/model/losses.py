"""What the models are trained to make small: cross-entropy for tokens, and two ways to teach a picture its caption.

Contrastive learning shows B pictures and their B captions and asks which belongs to which. Both losses start from the
same B × B table of similarities. Row i, column j says how well picture i fits caption j; the diagonal is the truth.
"""
import numpy as np

from minipali.model.ops import log_sigmoid, log_softmax


def cross_entropy(logits, targets):
    """Minus the log-probability of the right token, for each row."""  # (T,V), (T,) -> (T,)
    return -log_softmax(logits)[np.arange(logits.shape[0], like=logits), targets]


def l2_normalize(x):
    """To length 1, so that a dot product is the cosine of an angle and no vector wins by length."""  # (B,D) -> (B,D)
    return x / np.sqrt((x * x).sum(-1, keepdims=True))


def similarity(images, texts, log_scale):
    """The table: cosines, times exp(log_scale), the inverse "temperature". It is learned as a logarithm, so it stays
    positive. Cosines end at 1: unscaled, a perfect match against 1,023 zeros would get the probability 0.003.
    """  # (B,D), (texts,D), (1,) -> (B,texts)
    return l2_normalize(images) @ l2_normalize(texts).T * np.exp(log_scale)


def clip_loss(images, texts, log_scale):
    """CLIP (Radford et al. 2021, figure 3): each picture picks its caption among B, each caption its picture.

    Two softmax cross-entropies, averaged. Every softmax divides by a sum over the whole row (or column), so each
    similarity's gradient depends on all others: the table must exist whole, in one place, and the loss means something
    else for every batch size. That sum is also where exp overflows, hence log_softmax.
    """  # (B,D), (B,D), (1,) -> ()
    table = similarity(images, texts, log_scale)
    pick_text = -np.diagonal(log_softmax(table)).mean()
    pick_image = -np.diagonal(log_softmax(table.T)).mean()
    return 0.5 * (pick_text + pick_image)


def siglip_loss(images, texts, log_scale, bias):
    """SigLIP (Zhai et al. 2023, equation 1): each of the B × B pairs is a yes/no question of its own.

    -log sigmoid(±(similarity + bias)), + on the diagonal. No pair needs another pair, so the table can be made in
    pieces (below). The sum goes over pairs and the mean over pictures only: divided by B² it would fade as B grows.
    A learned bias says from the first step that nearly all pairs are a "no". It starts at -10, about log(1/(B-1)) for
    B = 22,000, where one pair in B fits. Texts beyond the first B (say, "hard negatives") fit no picture.
    """  # (B,D), (texts,D), (1,), (1,) -> ()
    table = similarity(images, texts, log_scale) + bias
    signs = 2 * np.eye(*table.shape, like=table, dtype=table.dtype) - 1
    return -log_sigmoid(signs * table).sum(-1).mean()


def siglip_loss_chunked(images, texts, log_scale, bias, chunk):
    """The same number from `chunk` captions at a time: no more than B × chunk of the table is ever held.

    This is how SigLIP runs over many devices: captions are passed around, each device adds up its own pairs. CLIP's
    softmax has no such form: until the last piece has been seen, no probability in the row is known.
    """  # (B,D), (B,D), (1,), (1,) -> ()
    total = 0
    for start in range(0, texts.shape[0], chunk):
        table = similarity(images, texts[start:start + chunk], log_scale) + bias
        own = np.arange(images.shape[0], like=table)[:, None] == start + np.arange(table.shape[1], like=table)
        total = total - log_sigmoid(np.where(own, table, -table)).sum()
    return total / images.shape[0]
