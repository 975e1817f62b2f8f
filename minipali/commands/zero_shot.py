"""Which of these captions fits the picture? The contrastive pair answers, for any list of captions.

    python -m minipali.commands.zero_shot photo.png "a large red circle" "a small blue star"
    python -m minipali.commands.zero_shot --matrix similarity.png         held-out pictures against one another's captions
"""
import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from minipali.inputs.captions import caption_ids
from minipali.checkpoint.config import SiglipConfig, Unusable
from minipali.inputs.image import Preprocessor, open_image
from minipali.inputs.tokenizer import Tokenizer
from minipali.checkpoint.safetensors_file import load
from minipali.small_world import tasks, world
from minipali.outputs.sheets import save_picture, similarity_picture
from minipali.model.losses import similarity
from minipali.model.ops import sigmoid
from minipali.model.siglip import encode_image, encode_text

PAIR = Path(__file__).resolve().parents[2] / "weights" / "siglip"


@dataclass(frozen=True)
class Pair:
    """The two towers, with what turns pictures and captions into their inputs."""
    cfg: SiglipConfig
    params: dict
    tokenizer: Tokenizer
    preprocessor: Preprocessor

    def images(self, pictures):
        """Pillow pictures as vectors."""  # B pictures -> (B,D)
        pixels = np.stack([self.preprocessor(picture) for picture in pictures])
        return encode_image(pixels, self.params, self.cfg)

    def texts(self, captions):
        """Captions as vectors."""  # B strings -> (B,D)
        return encode_text(caption_ids(captions, self.tokenizer, self.cfg.text_config), self.params, self.cfg)

    def logits(self, pictures, captions):
        """How well each picture fits each caption; above 0 means "yes"."""  # -> (pictures, captions)
        table = similarity(self.images(pictures), self.texts(captions), self.params["logit_scale"])
        return table + self.params["logit_bias"]


def load_pair(folder=PAIR):
    """A SigLIP pair from a folder in the hub's layout; raises Unusable with one line for whatever is wrong in it."""
    folder = Path(folder)
    if not folder.is_dir():
        raise Unusable(f"{folder}: no such folder, expected one with config.json and *.safetensors")
    cfg, params = load(folder)
    if not isinstance(cfg, SiglipConfig):
        found = "paligemma" if cfg.vision_config else "a text model's"
        raise Unusable(f"{folder / 'config.json'}: model_type is {found}, expected siglip")
    return Pair(cfg, params, Tokenizer.from_file(folder / "tokenizer.json"),
                Preprocessor.from_folder(folder, cfg.vision_config.image_size))


def held_out(seed, count):
    """Pictures that no training saw, and their captions, no two alike: ([Pillow pictures], [str]).

    `seed`: a tuple of integers; other ones give other pictures.
    """
    scenes = tasks.distinct(lambda number: world.draw((*seed, number), "test"), count)
    return [Image.fromarray(scene.image) for scene in scenes.values()], list(scenes)


def draw_matrix(pair, path, count=8):
    """Write a picture of how likely the pair finds each of `count` captions for each of their pictures."""
    pictures, captions = held_out((0,), count)
    save_picture(similarity_picture(sigmoid(pair.logits(pictures, captions)), pictures, captions), path)


def main(argv):
    parser = argparse.ArgumentParser(prog="minipali.commands.zero_shot", description=__doc__.split("\n")[0])
    parser.add_argument("image", nargs="?", metavar="IMAGE")
    parser.add_argument("captions", nargs="*", metavar="CAPTION")
    parser.add_argument("--model", default=PAIR, metavar="PATH", help="a SigLIP folder (default: weights/siglip)")
    parser.add_argument("--matrix", metavar="FILE", help="draw the probabilities of 8 held-out pictures and captions")
    args = parser.parse_args(argv)
    if bool(args.matrix) == bool(args.captions) or args.matrix and args.image:
        raise Unusable("expected a picture and at least one caption, or --matrix FILE and neither")
    if args.matrix:
        return draw_matrix(load_pair(args.model), args.matrix)
    picture = open_image(args.image)
    [logits] = load_pair(args.model).logits([picture], args.captions)
    for i in np.argsort(-logits, kind="stable"):
        # Each probability is a yes/no of its own: several captions may fit, or none, and they need not sum to 1.
        print(f"{sigmoid(logits[i]):7.2%}  {args.captions[i]}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except Unusable as error:
        print(f"minipali.commands.zero_shot: error: {error}", file=sys.stderr)
        sys.exit(2)
