"""Give a new vision tower the language model of an older model:

    python -m minipali.small_world.transplant OLD NEW OUT

A language model sees of a picture only what the projector makes of the tower's features. It can therefore stay when the
tower is replaced, if a new projector gives it what it is used to: the linear map from the new tower's features to the
old model's soft tokens, fitted by least squares on pictures of the small world. What remains to be learned is what the
old tower did not see. Rows of the embedding table go with their tokens; a token that the old vocabulary lacks gets a
random row of the usual size.
"""
import sys
from dataclasses import replace

import numpy as np

from minipali.checkpoint import write_like
from minipali.checkpoint.config import parse_config
from minipali.checkpoint.tensors import flatten
from minipali.decoding.loaded_model import open_model
from minipali.errors import InputError, Parser, path_name, prepare_process, run_command
from minipali.files import check_folder
from minipali.model.paligemma import image_features
from minipali.model.siglip import vision_tower
from minipali.small_world import easy_vqa, world
from minipali.small_world.recipe import PALIGEMMA
from minipali.small_world.stages import scaled

PICTURES = {"shapes": 3500, "letters": 2000, "easy-VQA": 400}  # that the map is fitted on
RIDGE = 1e-5  # keeps the map small in directions in which the features hardly vary
SEED = 5  # the number that these pictures' seeds begin with


def pictures(counts):
    """So many pictures of each kind as the towers' input."""  # -> (B,3,SIDE,SIDE)
    drawn = [world.draw((SEED, i)).image for i in range(counts["shapes"])]
    drawn += [world.draw_text((SEED, i))[0] for i in range(counts["letters"])]
    drawn += [easy_vqa.synthetic((SEED, i), "train", world.SIDE, 1)[0] for i in range(counts["easy-VQA"])]
    return scaled(np.stack(drawn))


def linear_map(x, y):
    """Weight (out, in) and bias (out,) of the linear map that brings x nearest to y, and the share of y's variance that
    it explains.

    Least squares: the best weights W solve (XᵀX) W = XᵀY, here with a little of the identity added to XᵀX.
    """  # (..., in), (..., out)
    x, y = (array.reshape(-1, array.shape[-1]).astype(np.float64) for array in (x, y))
    x_mean, y_mean = x.mean(0), y.mean(0)
    centered = x - x_mean
    squares = centered.T @ centered
    ridge = RIDGE * np.trace(squares) / len(squares) * np.eye(len(squares))
    weight = np.linalg.solve(squares + ridge, centered.T @ (y - y_mean)).T
    bias = y_mean - weight @ x_mean
    left = ((x @ weight.T + bias - y) ** 2).sum() / ((y - y_mean) ** 2).sum()
    return weight.astype(np.float32), bias.astype(np.float32), 1 - left


def table_for(tokenizer, old_tokenizer, old_table, rows, rng):
    """The embedding table for a vocabulary, with the rows of the old one for the tokens that both have."""
    table = old_table.mean(0) + rng.standard_normal((rows, old_table.shape[1])) * old_table.std(0)
    old_ids = {old_tokenizer.token_of(i): i for i in range(old_tokenizer.vocab_size)}
    for i in range(tokenizer.vocab_size):
        if (old := old_ids.get(tokenizer.token_of(i))) is not None:
            table[i] = old_table[old]
    return table.astype(np.float32)


def transplant(old, new, counts):
    """The new model's parameters with the old language model, as far as possible, and what `linear_map` explains.

    `old`, `new`: (configuration, parameters, tokenizer); of the new model the tower and the vocabulary are used.
    """
    (old_cfg, old_params, old_tokenizer), (cfg, params, tokenizer) = old, new
    pieces = np.array_split(pictures(counts), max(1, sum(counts.values()) // 100))
    tower = params["vision_tower"]["vision_model"]
    features = np.concatenate([vision_tower(piece, tower, cfg.vision_config) for piece in pieces])
    wanted = np.concatenate([image_features(piece, old_params, old_cfg) for piece in pieces])
    weight, bias, explained = linear_map(features, wanted)
    model = old_params["language_model"]["model"]
    table = table_for(tokenizer, old_tokenizer, model["embed_tokens"]["weight"], cfg.text_config.vocab_size,
                      np.random.default_rng(0))
    language_model = old_params["language_model"] | {"model": model | {"embed_tokens": {"weight": table}}}
    return params | {"multi_modal_projector": {"linear": {"weight": weight, "bias": bias}},
                     "language_model": language_model}, explained


def grid_of(cfg):
    """The sides of a tower's pictures and patches; None of a text model."""
    return cfg.vision_config and (cfg.vision_config.image_size, cfg.vision_config.patch_size)


def main(argv):
    parser = Parser("minipali.small_world.transplant", "Give a new vision tower the language model of an older model.",
                    "  python -m minipali.small_world.transplant weights trained start")
    add = parser.add_argument
    add("old", type=path_name, metavar="OLD", help="the model whose language model stays")
    add("new", type=path_name, metavar="NEW", help="a model of the default's sizes, whose tower and vocabulary stay")
    add("out", type=path_name, metavar="OUT", help="the folder to write")
    args = parser.parse_args(argv)
    check_folder(args.out)
    old, new = open_model(args.old), open_model(args.new)
    if new.cfg != parse_config(PALIGEMMA):
        raise InputError(f"{args.new}: another model than the default's")
    if replace(old.cfg.text_config, vocab_size=new.cfg.text_config.vocab_size) != new.cfg.text_config:
        raise InputError(f"{args.old}: a language model of other sizes than the default's")
    if grid_of(old.cfg) != grid_of(new.cfg):
        raise InputError(f"{args.old}: a tower of other pictures or patches than the default's, or none")
    for model in old, new:
        if model.tokenizer is None:
            raise InputError(f"{model.path}: no tokenizer, which tells whose row is whose")
    old, new = (model.with_weights("float32") for model in (old, new))
    params, explained = transplant(*((model.cfg, model.params, model.tokenizer) for model in (old, new)), PICTURES)
    write_like(new, args.out, flatten(params))
    print(f"the new projector explains {100 * explained:.0f} % of the old soft tokens' variance")


if __name__ == "__main__":
    prepare_process()
    sys.exit(run_command("minipali.small_world.transplant", main, sys.argv[1:]))
