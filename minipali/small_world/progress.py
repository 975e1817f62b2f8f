"""What the first stage knows so far, read off the file of a run that may still be going on:

    python -m minipali.small_world.progress runs/contrastive.safetensors runs/out/tokenizer.json

prints how many held-out drawings have the right name (the one that the patches of a thing together find likeliest, and
whether it is among their first five), and how many pictures and captions of 64 find one another: for the artists that
are trained on, and for the one by whom things are chosen.
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

FIRST_NAME = patch_labels.KINDS.index("rectangle") + 1  # before the names stand "nothing" and the shapes
ALIKE = 64  # pictures, among whose captions each has to find its own


def named(scores, scene):
    """For each thing in sight the places of its name among all, best first (0: right); its patches vote together.

    `scores` (P, kinds): log-probabilities of what lies on each patch.
    """
    found = []
    labels = patch_labels.labels(scene.things)[:, 0]
    for thing in scene.things:
        kind = patch_labels.KINDS.index(thing.name)
        own = (labels == kind) & (patch_labels.per_patch(thing.mask).reshape(-1) >= patch_labels.THING)
        if own.any():
            votes = scores[own, FIRST_NAME:].sum(0)
            found.append(int(np.count_nonzero(votes > votes[kind - FIRST_NAME])))
    return found


def measure(params, cfg, tokenizer, gallery, batches=6):
    """{what: percent} of held-out scenes by the artists of a gallery, ALIKE scenes a batch with different captions."""
    places = {True: [], False: []}
    to_text = to_image = 0
    for number in range(batches):
        drawn = tasks.distinct(lambda i: drawings.draw((number, i), gallery, "test"), ALIKE,  # noqa: B023
                               drawing_tasks.caption)
        pixels = scaled(np.stack([scene.image for scene in drawn.values()]))
        features = siglip.vision_tower(pixels, params["vision_model"], cfg.vision_config)
        scores = log_softmax(linear(features, **params["patch_head"])[:, :, :len(patch_labels.KINDS)])
        for scene, patches in zip(drawn.values(), scores):
            places[len(scene.things) == 1] += named(patches, scene)
        images = siglip.attention_pool(features, params["vision_model"]["head"], cfg.vision_config)
        texts = siglip.encode_text(caption_ids(list(drawn), tokenizer, cfg.text_config), params, cfg)
        table = similarity(images, texts, params["logit_scale"])
        to_text += np.count_nonzero(table.argmax(1) == np.arange(ALIKE))
        to_image += np.count_nonzero(table.argmax(0) == np.arange(ALIKE))
    one, several = np.array(places[True]), np.array(places[False])
    return {"one drawing": 100 * np.mean(one == 0), "in five": 100 * np.mean(one < 5),
            "several": 100 * np.mean(several == 0), "in 5": 100 * np.mean(several < 5),
            "caption": 100 * to_text / ALIKE / batches, "picture": 100 * to_image / ALIKE / batches}


def main(arguments):
    parser = Parser("minipali.small_world.progress", "Measure a first stage that may still be going on.",
                    "  python -m minipali.small_world.progress runs/contrastive.safetensors trained/tokenizer.json")
    parser.add_argument("state", type=path_name, metavar="STATE", help="the first stage's file in the folder of runs")
    parser.add_argument("tokenizer", type=path_name, metavar="TOKENIZER", help="tokenizer.json beside the model in training")
    args = parser.parse_args(arguments)
    state, about = read_state(args.state)
    params = views(state["weights"], {name: tuple(shape) for name, shape in about["shapes"].items()})
    tokenizer = WordTokenizer(Tokenizer.from_file(args.tokenizer))
    for who, artists in ("trained on", drawings.TRAINED_ON), (artwork.CHOICE, (artwork.CHOICE,)):
        shares = measure(params, parse_config(SIGLIP), tokenizer, drawings.gallery(artists))
        told = "  ".join(f"{what} {share:.1f} %" for what, share in shares.items())
        print(f"step {about['step']:6}  {who:12} {told}", flush=True)


if __name__ == "__main__":
    prepare_process()
    sys.exit(run_command("minipali.small_world.progress", main, sys.argv[1:]))
