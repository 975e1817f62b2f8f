"""The contrastive pair: pictures and captions as vectors that can be compared."""
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minipali.checkpoint.config import SiglipConfig
from minipali.checkpoint.hub import load
from minipali.errors import InputError
from minipali.inputs.captions import caption_ids
from minipali.inputs.image import Preprocessor
from minipali.inputs.tokenizer import Tokenizer
from minipali.model.losses import similarity
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
    """A SigLIP pair from a folder in the hub's layout; raises InputError with one line for whatever is wrong in it."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder, expected one with config.json and *.safetensors")
    cfg, params = load(folder)
    if not isinstance(cfg, SiglipConfig):
        found = "paligemma" if cfg.vision_config else "a text model's"
        raise InputError(f"{folder / 'config.json'}: model_type is {found}, expected siglip")
    return Pair(cfg, params, Tokenizer.from_file(folder / "tokenizer.json"),
                Preprocessor.from_folder(folder, cfg.vision_config.image_size))
