"""The arrays behind the panels of the X-ray page, worked out of what was seen: a function a panel, or half of one.

No panel computes anything in a way of its own: what the model has a function for, that function is called.
"""
import re

import numpy as np

from minipali.backend import to_host
from minipali.decoding.generate import generate
from minipali.decoding.loaded_model import encode_prompt
from minipali.decoding.pair import load_pair
from minipali.decoding.sampling import Decoding
from minipali.errors import InputError
from minipali.inputs.captions import canonical_text
from minipali.inputs.image import open_image
from minipali.looking.gather import VISION, residual_stream
from minipali.model import gemma
from minipali.model.losses import l2_normalize
from minipali.model.ops import log_sum_exp, rope
from minipali.model.siglip import heads, patchify
from minipali.small_world.world import COLORS, SHAPES, SIZES

TEMPERATURES = [step / 10 for step in range(1, 21)]  # the stops of the slider
SHOWN_LOGITS = 50
OPPOSITES = [("left", "right"), ("top", "bottom")]


# --- the picture ------------------------------------------------------------------------------------------------------

def patch_kernels(seen, count=12):
    """The `count` kernels that respond most strongly somewhere in the first picture, and their responses.

    -> the rows of the token that they make (count,), kernels (count,3,size,size), responses (P,count) with the bias.
    """
    table = seen.model.params["vision_tower"]["vision_model"]["embeddings"]["patch_embedding"]
    weight, bias = to_host(table["weight"]), to_host(table["bias"])
    size = seen.model.cfg.vision_config.patch_size
    responses = patchify(seen.pixels[:1], size)[0] @ weight.reshape(len(weight), -1).T + bias
    spread = np.ptp(responses, 0)
    rows = np.sort(np.argsort(-spread, kind="stable")[:count])
    return rows, weight[rows], responses[:, rows]


def position_neighbors(model):
    """How alike the learned rows of two positions are: cosines, less what all rows have in common."""  # -> (P,P)
    table = model.params["vision_tower"]["vision_model"]["embeddings"]["position_embedding"]["weight"]
    rows = to_host(table).astype(np.float64)
    rows = l2_normalize(rows - rows.mean(0) + 1e-12)
    return rows @ rows.T


def token_colors(seen):
    """Patch tokens as colors: the embeddings, then each vision layer, by their three main components.

    The components are those of the layer itself; their sign is chosen so that the largest entry is positive.
    """  # -> (1+L,P,3) in 0..1
    layers = [f"{VISION}.embeddings", *(f"{VISION}.encoder.layers.{i}"
                                        for i in range(seen.model.cfg.vision_config.num_hidden_layers))]
    colors = []
    for name in layers:
        x = seen.activations[name][0].astype(np.float64)
        x = x - x.mean(0)
        _, directions = np.linalg.eigh(x.T @ x)  # (D,D), the largest component last
        scores = x @ directions[:, ::-1][:, :3]
        scores = np.pad(scores, ((0, 0), (0, 3 - scores.shape[1])))
        scores *= np.sign(np.take_along_axis(scores, np.abs(scores).argmax(0)[None], 0) + 1e-30)
        low, high = scores.min(0), scores.max(0)
        colors.append((scores - low) / np.maximum(high - low, 1e-12))
    return np.stack(colors)


# --- the language model -----------------------------------------------------------------------------------------------

def masks(seen):
    """Who may look at whom, for each window that a layer has, as the decoder itself makes it; and each layer's mask.

    -> masks (windows,S,S), and for each layer the number of its mask.
    """
    cfg, S = seen.model.cfg.text_config, seen.patches + len(seen.text)
    positions, kinds = np.arange(S)[None], list(dict.fromkeys(cfg.sliding_windows))
    made = [gemma.prefix_lm_mask(positions, positions, np.array([seen.prefix_length]), window)[0] for window in kinds]
    return np.stack(made), [kinds.index(window) for window in cfg.sliding_windows]


def stream_sizes(seen):
    """Root mean squares of the text tokens: of the stream (1+2L,T), and of what each block added (2L,T)."""
    stream = residual_stream(seen)

    def size(x):
        return np.sqrt((x * x).mean(-1))
    return size(stream), size(np.diff(stream, axis=0))


def norms(seen):
    """What the first norm of each layer, and the last one, read at the tokens that predict a step, and their factors.

    -> before (L+1,steps,D), factors 1 + weight (L+1,D).
    """
    rows, params = seen.first + np.arange(len(seen.steps)), seen.model.params["language_model"]["model"]
    weights = [*(layer["input_layernorm"]["weight"] for layer in params["layers"]), params["norm"]["weight"]]
    return residual_stream(seen)[::2][:, rows], 1 + np.stack([to_host(w) for w in weights])


def rotated(seen, layer):
    """Queries and keys of the text tokens before the rotation, and of all keys after it (those that the cache holds).

    -> q (T,N,H), k (T,K,H), cached keys (S,K,H); positions are divided by the layer's factor (1 in most models).
    """
    cfg, P = seen.model.cfg.text_config, seen.patches
    q, k = (seen.layer(layer, f"self_attn.{name}_norm") if cfg.qk_norms else
            heads(seen.layer(layer, f"self_attn.{name}_proj")[None], count)[0]
            for name, count in [("q", cfg.num_attention_heads), ("k", cfg.num_key_value_heads)])
    positions = np.arange(len(k))[None] / cfg.rope_factors[layer]
    return q[P:], k[P:], rope(k[None], positions, cfg.rope_thetas[layer])[0]


def cache_content(seen):
    """The root mean square of each cached key and value, (2L,S), and the bytes that one token takes in all layers."""
    cfg, rows, size = seen.model.cfg.text_config, [], 0
    for layer in range(cfg.num_hidden_layers):
        cached = rotated(seen, layer)[2]
        value = seen.layer(layer, "self_attn.v_proj").reshape(cached.shape)
        size += (cached.nbytes + value.nbytes) // len(cached)
        rows += [np.sqrt((x * x).mean((1, 2))) for x in (cached, value)]
    return np.stack(rows), size


def next_tokens(seen):
    """Of each step the 50 largest logits, their tokens, and log Σ exp(logit / temperature) of the rest.

    -> logits (steps,50), ids (steps,50), rest (steps,20): one for each stop of the temperature's slider, so that the
    share of the tail is right at each.
    """
    count = min(SHOWN_LOGITS, seen.logits.shape[1])
    logits = seen.logits.astype(np.float64)
    ids = np.argsort(-logits, -1, kind="stable")[:, :count]
    best = np.take_along_axis(logits, ids, -1)
    others = logits.copy()
    np.put_along_axis(others, ids, -np.inf, -1)
    if others.shape[1] == count:
        return best, ids, np.full((len(best), len(TEMPERATURES)), -np.inf)
    return best, ids, np.stack([log_sum_exp(others / temperature) for temperature in TEMPERATURES], -1)


# --- the contrastive pair ---------------------------------------------------------------------------------------------

def hard_negatives(caption):
    """Captions in which one thing is wrong: a side, a color, a shape, a size, or two colors exchanged."""
    words, made = caption.split(), []

    def replaced(change):
        new = " ".join(change.get(word, word) for word in words)
        if new != caption and new not in made:
            made.append(new)

    for a, b in OPPOSITES:
        replaced({a: b, b: a})
    for group in (list(COLORS), list(SHAPES), list(SIZES)):
        there = list(dict.fromkeys(word for word in words if word in group))
        if len(there) > 1:
            replaced({there[0]: there[1], there[1]: there[0]})
        elif there:
            replaced({there[0]: group[(group.index(there[0]) + 1) % len(group)]})
    return made


def contrast(seen, pictures, most=8):
    """The bundled pair's cosines of this picture and the examples with true captions and hard negatives.

    -> captions, cosines (pictures, captions), log scale, bias, Pillow pictures. Raises InputError where no pair lies
    beside the model, or the model has no text to show.
    """
    folder = seen.model.path.parent if seen.model.path.suffix == ".npz" else seen.model.path
    if not (folder / "siglip").is_dir():
        raise InputError("no contrastive pair lies beside this model (a folder siglip/)")
    if seen.model.tokenizer is None:
        raise InputError("the model has no tokenizer to write a caption with")
    pair, model = load_pair(folder / "siglip"), seen.model
    shown = [pictures[0], *_examples(folder, pictures[0])][:3]
    answers = generate(model, model.features(shown), [encode_prompt("caption en", model)] * len(shown),
                       Decoding(max_new_tokens=60))
    true = [canonical_text(re.sub(r"<\w+>", "", model.tokenizer.decode(answer.ids))) for answer in answers]
    captions = list(dict.fromkeys([*true, *hard_negatives(true[0])]))[:most]
    cosines = l2_normalize(pair.images(shown)) @ l2_normalize(pair.texts(captions)).T
    return captions, cosines, float(pair.params["logit_scale"][0]), float(pair.params["logit_bias"][0]), shown


def _examples(folder, picture):
    """Other pictures to tell this one from: those that lie beside the model."""
    for path in sorted((folder / "examples").glob("*.png")):
        image = open_image(path)
        if image.tobytes() != picture.tobytes():
            yield image
