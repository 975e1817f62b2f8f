"""Measure the first stage from the saved state of a run, which may still be in progress:

    python -m minipali.small_world.progress runs/contrastive.safetensors runs/out/tokenizer.json

prints for how many held-out drawings the name that the patches of a thing together find likeliest is right, for how
many the right name is among the five likeliest, and how many pictures and captions of 64 are matched: for the artists
of the training set, and for the validation artist.
"""

import sys

import numpy as np

from minipali.checkpoint.config import parse_config
from minipali.errors import Parser, path_name, prepare_process, run_command
from minipali.inputs.captions import caption_ids
from minipali.inputs.tokenizer import Tokenizer
from minipali.learning.optimizer import views
from minipali.learning.state import read_state
from minipali.model import siglip
from minipali.model.losses import similarity
from minipali.model.ops import linear, log_softmax
from minipali.small_world import artwork, drawing_tasks, drawings, patch_labels, tasks
from minipali.small_world.recipe import SIGLIP
from minipali.small_world.stages import WordTokenizer, scaled

FIRST_NAME = patch_labels.KINDS.index("rectangle") + 1  # after "nothing" and the shapes
CANDIDATES = 64  # pictures in a batch, each of which has to be matched with its own caption


def name_ranks(scores, scene):
    """For each visible thing the rank of its name, 0 if it is the likeliest, by the sum of its patches' scores.

    `scores` (P,kinds): log-probabilities of what lies on each patch.
    """
    ranks = []
    labels = patch_labels.labels(scene.things)[:, 0]
    for thing in scene.things:
        kind = patch_labels.KINDS.index(thing.name)
        own = (labels == kind) & (patch_labels.per_patch(thing.mask).reshape(-1) >= patch_labels.THING_PIXELS)
        if own.any():
            votes = scores[own, FIRST_NAME:].sum(0)
            ranks.append(int(np.count_nonzero(votes > votes[kind - FIRST_NAME])))
    return ranks


def measure(params, cfg, tokenizer, gallery, batches=6):
    """{what: percent} over held-out scenes of a gallery, CANDIDATES a batch, all with different captions."""
    ranks = {True: [], False: []}  # for scenes of one drawing, and of several
    to_text = to_image = 0
    for number in range(batches):
        drawn = tasks.distinct(lambda i: drawings.draw((number, i), gallery, "test"), CANDIDATES,  # noqa: B023
                               drawing_tasks.caption)
        pixels = scaled(np.stack([scene.image for scene in drawn.values()]))
        features = siglip.vision_tower(pixels, params["vision_model"], cfg.vision_config)
        scores = log_softmax(linear(features, **params["patch_head"])[:, :, :len(patch_labels.KINDS)])
        for scene, patches in zip(drawn.values(), scores):
            ranks[len(scene.things) == 1] += name_ranks(patches, scene)
        images = siglip.attention_pool(features, params["vision_model"]["head"], cfg.vision_config)
        texts = siglip.encode_text(caption_ids(list(drawn), tokenizer, cfg.text_config), params, cfg)
        table = similarity(images, texts, params["logit_scale"])
        to_text += np.count_nonzero(table.argmax(1) == np.arange(CANDIDATES))
        to_image += np.count_nonzero(table.argmax(0) == np.arange(CANDIDATES))
    one, several = np.array(ranks[True]), np.array(ranks[False])
    return {"one drawing": 100 * np.mean(one == 0), "in five": 100 * np.mean(one < 5),
            "several": 100 * np.mean(several == 0), "in 5": 100 * np.mean(several < 5),
            "caption": 100 * to_text / CANDIDATES / batches, "picture": 100 * to_image / CANDIDATES / batches}


def main(arguments):
    parser = Parser("minipali.small_world.progress", "Measure a first stage that may still be going on.",
                    "  python -m minipali.small_world.progress runs/contrastive.safetensors trained/tokenizer.json")
    parser.add_argument("state", type=path_name, metavar="STATE", help="the first stage's file in the folder of runs")
    parser.add_argument("tokenizer", type=path_name, metavar="TOKENIZER",
                        help="tokenizer.json beside the model in training")
    args = parser.parse_args(arguments)
    state, about = read_state(args.state)
    params = views(state["weights"], {name: tuple(shape) for name, shape in about["shapes"].items()})
    tokenizer = WordTokenizer(Tokenizer.from_file(args.tokenizer))
    for whose, artists in ("trained on", drawings.TRAINED_ON), (artwork.VALIDATION, (artwork.VALIDATION,)):
        shares = measure(params, parse_config(SIGLIP), tokenizer, drawings.gallery(artists))
        columns = "  ".join(f"{what} {share:.1f} %" for what, share in shares.items())
        print(f"step {about['step']:6}  {whose:12} {columns}", flush=True)


if __name__ == "__main__":
    prepare_process()
    sys.exit(run_command("minipali.small_world.progress", main, sys.argv[1:]))
