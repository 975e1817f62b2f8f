"""What mattered for an answer, asked in two ways that attention does not answer: by gradients, and by erasing.

The gradient says what an infinitely small change of the picture would do to a token's score; times the input, what
taking all of it away would do if the model were a straight line. Erasing takes a part away and runs the model again.
"""
import numpy as np

from minipali.backend import mapped, to_device, to_host
from minipali.checkpoint.matrices import Matrix
from minipali.decoding.generate import generate
from minipali.decoding.sampling import Decoding
from minipali.learning.backward.gemma import output_logits
from minipali.learning.backward.paligemma import forward
from minipali.learning.lora import Frozen
from minipali.model import gemma, paligemma
from minipali.model.ops import log_softmax, softmax

BATCH_TOKENS = 4096  # of erased pictures and their answers that go through the model together


class _Fixed(Frozen):
    """A matrix without a gradient of its own; one that is kept compact is an array for the moment of a product."""

    def __rmatmul__(self, x):
        return x @ (np.asarray(self.array) if isinstance(self.array, Matrix) else self.array)


def gradient_times_input(seen):
    """Σ over features of d score / d feature · feature, for each picture token; positive: it spoke for the step.

    The score is the step's log-odds, its logit minus log Σ exp of all others: log p itself is flat where p is nearly 1.
    One pull through the whole decoder for each step (Simonyan et al. 2014; Shrikumar et al. 2016).
    """  # -> (steps,images·P)
    model, cfg, P = seen.model, seen.model.cfg, seen.patches
    params = mapped(model.params["language_model"], lambda w: _Fixed(w) if len(w.shape) == 2 else w)
    params = {"language_model": params}
    features = to_device(seen.features, model.backend)
    x, pull = forward(features, np.array([seen.text]), np.array([len(seen.text)]), np.array([P + len(seen.prompt)]),
                      params, cfg)
    rows = []
    for row, token in enumerate(seen.steps, seen.first):
        logits, pull_logits = output_logits(x[0, row:row + 1], paligemma.output_head(params, cfg), cfg.text_config)
        dlogits = np.array(logits)
        dlogits[0, token] = -np.inf
        dlogits = -softmax(dlogits)  # the gradient of log Σ exp is softmax
        dlogits[0, token] = 1
        dx = np.zeros_like(x)
        dx[0, row] = pull_logits(dlogits)[0][0]
        dfeatures, _ = pull(dx)
        rows.append(to_host((dfeatures * features).sum(-1)[0]))
    return np.stack(rows)


def windows(side, size=2):
    """The places of a square of size x size patches on the grid, row by row: (row, column) of its top left patch."""
    return [(row, column) for row in range(side - size + 1) for column in range(side - size + 1)]


def erased_pictures(pixels, patch, places, size=2):
    """The picture once for each window, with the window in the picture's mean color."""
    # (3,size,size) -> (windows,3,size,size)
    copies = np.repeat(pixels[None], len(places), 0)
    mean = pixels.mean((1, 2))[:, None, None]
    for copy, (row, column) in zip(copies, places):
        copy[:, row * patch:(row + size) * patch, column * patch:(column + size) * patch] = mean
    return copies


def erase(seen, size=2, on_progress=lambda done, of: None):
    """What is said of the first picture, and how probable each step is, when size x size patches are erased.

    -> drop (steps,windows): log p(step) as it was minus log p(step) without the window, after the same answer so far;
    and for each window the ids of the new answer.
    """
    model, vision = seen.model, seen.model.cfg.vision_config
    side = round(vision.num_patches ** 0.5)
    places = windows(side, size)
    pictures = erased_pictures(seen.pixels[0], vision.patch_size, places, size)
    others = seen.features[:, vision.num_patches:]
    at_once = max(1, BATCH_TOKENS // (seen.patches + len(seen.text)))
    before = _log_probs(seen, seen.features)
    drops, answers = [], []
    for start in range(0, len(pictures), at_once):
        features = to_host(model.features_of(pictures[start:start + at_once]))
        features = np.concatenate([features, np.repeat(others, len(features), 0)], 1)
        drops.append(before - _log_probs(seen, features))
        written = generate(model, to_device(features, model.backend), [seen.prompt] * len(features),
                           Decoding(max_new_tokens=max(1, len(seen.answer) + 8)))
        answers += [answer.ids for answer in written]
        on_progress(len(answers), len(pictures))
    return np.concatenate(drops).T, answers


def _log_probs(seen, features):
    """The log-probability of each step after the answer as it was, for each row of features."""
    # (B,images·P,D) -> (B,steps)
    model, cfg, B = seen.model, seen.model.cfg, len(features)
    ids = np.tile(np.array(seen.text), (B, 1))
    x = paligemma.forward(to_device(features, model.backend), ids, np.full(B, ids.shape[1]),
                          np.full(B, features.shape[1] + len(seen.prompt)), model.params, cfg)
    x = x[:, seen.first:seen.first + len(seen.steps)]
    scores = log_softmax(to_host(gemma.output_logits(x, paligemma.output_head(model.params, cfg), cfg.text_config)))
    return np.take_along_axis(scores, np.array(seen.steps)[None, :, None], -1)[..., 0]


def patch_map(drop, side, size=2):
    """For each patch the mean over the windows that cover it."""  # (steps,windows) -> (steps,P)
    total, count = np.zeros((len(drop), side, side)), np.zeros((side, side))
    for values, (row, column) in zip(drop.T, windows(side, size)):
        total[:, row:row + size, column:column + size] += values[:, None, None]
        count[row:row + size, column:column + size] += 1
    return (total / np.maximum(count, 1)).reshape(len(drop), -1)
