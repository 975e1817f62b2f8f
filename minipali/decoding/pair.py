"""The contrastive pair: pictures and captions as vectors that can be compared."""
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minipali.checkpoint import folder_of, load_any
from minipali.checkpoint.config import SiglipConfig
from minipali.errors import InputError
from minipali.inputs.captions import caption_ids, check_caption_ids
from minipali.inputs.image import Preprocessor
from minipali.inputs.read_tokenizer import READERS, read_tokenizer
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

    def images(self, pictures) -> np.ndarray:
        """Pillow pictures as vectors."""  # B pictures -> (B,D)
        pixels = np.stack([self.preprocessor(picture) for picture in pictures])
        return encode_image(pixels, self.params, self.cfg)

    def texts(self, captions: list[str]) -> np.ndarray:
        """Captions as vectors; InputError if the tokenizer has ids that the model has no embedding for."""
        # B strings -> (B,D)
        ids = caption_ids(captions, self.tokenizer, self.cfg.text_config)
        check_caption_ids(ids, self.cfg.text_config.vocab_size)
        return encode_text(ids, self.params, self.cfg)

    def logits(self, pictures, captions: list[str]) -> np.ndarray:
        """How well each picture fits each caption; above 0 means "yes"."""  # -> (pictures, captions)
        table = similarity(self.images(pictures), self.texts(captions), self.params["logit_scale"])
        return table + self.params["logit_bias"]


def load_pair(path: str | Path = PAIR) -> Pair:
    """A SigLIP pair: a folder in the hub's layout, or a big_vision .npz with the tokenizer beside it.

    Raises InputError, in one line, for whatever is wrong there.
    """
    cfg, params = load_any(path)
    folder = folder_of(path)
    if not isinstance(cfg, SiglipConfig):
        kind = "paligemma" if cfg.vision_config else "a text model's"
        where = path if folder != Path(path) else folder / "config.json"
        raise InputError(f"{where}: model_type is {kind}, expected siglip")
    tokenizer = read_tokenizer(folder)
    if tokenizer is None:
        raise InputError(f"{folder}: no tokenizer for captions, expected {', '.join(READERS)}")
    return Pair(cfg, params, tokenizer, Preprocessor.from_folder(folder, cfg.vision_config.image_size))
