"""Random weights to start from."""
import math

import numpy as np

from minipali.checkpoint.config import PaliGemmaConfig, SiglipConfig
from minipali.checkpoint.tensors import param_shapes, unflatten


def line_waves(count, width, longest):
    """Numbers 0 to count-1 as sines and cosines of many lengths, each row of length 1: close numbers lie close."""
    half = width // 2  # -> (count, D)
    angle = np.arange(count)[:, None] * (2 * math.pi / longest * (longest / 8) ** (np.arange(half) / half))
    table = np.zeros((count, width))
    table[:, :2 * half] = np.concatenate([np.sin(angle), np.cos(angle)], axis=1) / math.sqrt(half)
    return table


def order_locations(params, tokenizer):
    """Start the embeddings of <loc0000> to <loc1023> as points along a line, in place.

    From random rows, "a little further left" would have to be learned for each of the 1024 tokens by itself.
    """
    table = params["language_model"]["model"]["embed_tokens"]["weight"]
    rows = [tokenizer.id_of(f"<loc{i:04d}>") for i in range(1024)]
    table[rows] = 0.7 * line_waves(1024, table.shape[1], 2048) + 0.7 * table[rows]


def waves(count, width):
    """A start for the table of patch positions: rows and columns as sines and cosines of several lengths, so that
    neighbors are alike from the first step on (Vaswani et al. 2017, section 3.5, in two dimensions)."""  # -> (P,D)
    side, quarter = math.isqrt(count), width // 4
    place = np.arange(side)[:, None] * (10.0 * side) ** (-np.arange(quarter) / quarter)  # (side, D/4)
    wave = np.concatenate([np.sin(place), np.cos(place)], axis=1)
    rows, columns = np.repeat(wave, side, axis=0), np.tile(wave, (side, 1))
    table = np.zeros((count, width))
    table[:side * side, :4 * quarter] = 0.5 * np.concatenate([rows, columns], axis=1)
    return table


def random_params(cfg: PaliGemmaConfig | SiglipConfig, rng: np.random.Generator, dtype=np.float32) -> dict:
    """A tree of parameters before training: every layer hands on signals of about the size that came in.

    Matrices are normal with a spread of 1/√(inputs), those that write into the residual stream smaller by √(2L), so
    that L layers together do not dominate what came first. Norms start as the identity: LayerNorm's scale is stored as
    it is (1), Gemma's RMSNorm minus 1 (0). SigLIP's temperature and bias start where its paper starts them.
    """
    flat = {}
    for name, shape in param_shapes(cfg).items():
        module, _, kind = name.rpartition(".")
        if name == "logit_scale":
            value = np.full(shape, math.log(10.0))
        elif name == "logit_bias":
            value = np.full(shape, -10.0)
        elif kind in ("bias", "in_proj_bias"):
            value = np.zeros(shape)
        elif len(shape) == 1:
            value = np.zeros(shape) if module.startswith("language_model") else np.ones(shape)
        elif module.endswith("position_embedding") and "vision" in module:
            value = waves(*shape)
        elif module.endswith("position_embedding") or kind == "probe":
            value = rng.standard_normal(shape) * 0.2
        else:
            value = rng.standard_normal(shape) / math.sqrt(math.prod(shape[1:]))
            if module.endswith(("out_proj", "fc2", "o_proj", "down_proj")):
                value /= math.sqrt(2 * _depth(name, cfg))
        flat[name] = value.astype(dtype)
    return unflatten(flat)


def _depth(name, cfg):
    text = name.startswith(("language_model", "text_model"))
    return (cfg.text_config if text else cfg.vision_config).num_hidden_layers
