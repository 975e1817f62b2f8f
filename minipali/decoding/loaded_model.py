"""A checkpoint with its tokenizer and its preprocessor: all that answering needs."""
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike
from PIL import Image

from minipali.backend import to_device
from minipali.checkpoint import folder_of, load_any, open_any
from minipali.checkpoint.choice import choose_weights
from minipali.checkpoint.config import PaliGemmaConfig, read_config
from minipali.errors import InputError
from minipali.inputs.image import Preprocessor
from minipali.inputs.read_tokenizer import read_tokenizer
from minipali.inputs.tokenizer import Tokenizer
from minipali.model.paligemma import image_features


@dataclass(frozen=True)
class Model:
    """All that answering needs. `tokenizer` is None where the folder has none: token ids still work. `preprocessor` is
    None for a text model, which sees no pictures. `weights`: the line that says in which form they are held."""
    path: Path
    cfg: PaliGemmaConfig
    tokenizer: Tokenizer | None
    preprocessor: Preprocessor | None
    backend: str
    params: dict | None = None
    weights: str = ""

    def with_weights(self, dtype: DTypeLike, weights: str | None = None) -> "Model":
        """The same model, ready to compute; this reads the whole checkpoint.

        `weights`: float32, bfloat16 or int8, the form in which matrices are held; by default what choice.py chooses.
        Raises InputError, as if for the option --weights, if that form is unavailable.
        """
        line = f"weights: arrays of {np.dtype(dtype)}"
        if np.dtype(dtype) == np.float32 and self.backend == "numpy":
            if weights is not None or folder_of(self.path) == self.path:
                weights, line = choose_weights(open_any(self.path)[1], weights)
        elif weights not in (None, "float32"):
            raise InputError(f"--weights {weights}: expected float32 with --dtype float64 and with --backend cupy")
        else:
            weights = None
        params = to_device(load_any(self.path, dtype, weights)[1], self.backend)
        return replace(self, params=params, weights=line)

    def features(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Pillow pictures as the language model's tokens, each picture encoded once."""  # B pictures -> (B,P,D)
        return self.features_of(np.stack([self.preprocessor(image) for image in images]))

    def features_of(self, pixels: np.ndarray) -> np.ndarray:
        """The same for pictures that are already preprocessed."""  # (B,3,size,size) -> (B,P,D)
        dtype = self.params["multi_modal_projector"]["linear"]["weight"].dtype
        return image_features(to_device(pixels.astype(dtype), self.backend), self.params, self.cfg)

    def no_picture(self, count: int) -> np.ndarray:
        """What stands in for the features of `count` pictures where there are none."""  # -> (B,0,D)
        table = self.params["language_model"]["model"]["embed_tokens"]["weight"]
        return np.empty_like(table, shape=(count, 0, table.shape[1]))


def read_params(path: str | Path, dtype: DTypeLike) -> dict:
    """The tree of a checkpoint's parameters, in `dtype`."""
    return load_any(path, dtype)[1]


def is_text_model(path: str | Path) -> bool:
    """Whether `path` holds a Gemma without a vision tower, going by its config.json alone."""
    try:
        return read_config(path).vision_config is None
    except InputError:  # `open_model` reports what is wrong
        return False


def open_model(path: str | Path, backend: str = "numpy") -> Model:
    """All of a PaliGemma, or of a Gemma, but its weights: enough to check a prompt.

    `path` is a folder in the hub's layout, or a big_vision .npz, beside which the tokenizer is looked for. Raises
    InputError with one line for whatever is wrong there, and if `backend` is unavailable.
    """
    to_device(np.zeros(1), backend)
    path, folder = Path(path), folder_of(path)
    cfg, _ = open_any(path)
    if not isinstance(cfg, PaliGemmaConfig):
        raise InputError(f"{path}: model_type is siglip, expected paligemma")
    preprocessor = cfg.vision_config and Preprocessor.from_folder(folder, cfg.vision_config.image_size)
    return Model(path, cfg, read_tokenizer(folder), preprocessor, backend)


def load_model(folder: str | Path, dtype: DTypeLike = np.float32, backend: str = "numpy",
               weights: str | None = None) -> Model:
    """The whole of a PaliGemma or a Gemma; raises InputError as `open_model` does. `weights`: see with_weights."""
    return open_model(folder, backend).with_weights(dtype, weights)


def without_placeholders(text: str, pictures: int, note: Callable[[str], None] | None = None) -> str:
    """A prompt without the `<image>` and `<bos>` that it begins with, as prompts for the hub's processor do.

    They are redundant, since the pictures' tokens and BOS are put in front anyway. Elsewhere in a prompt they are
    plain text, like all names of control tokens. `note(line)` is called with what is left out. Raises InputError if
    there are `<image>`, but not one for each of `pictures`.
    """
    leading = re.match("(?:<image>|<bos>)*", text)[0]
    images = leading.count("<image>")
    if images and images != pictures:
        raise InputError(f"prompt: begins with {images} <image>, expected one for each picture ({pictures}), or none")
    if leading and note:
        note(f"prompt: {leading} at the beginning is left out, since pictures and BOS are put in front automatically")
    return text[len(leading):]


def encode_prompt(text: str, model: Model, pictures: int = 1, note: Callable[[str], None] | None = None) -> list[int]:
    """A prompt as PaliGemma was trained to read it: BOS, the text, a newline, the last two tokenized in one go.

    The newline marks the end of the question. A plain Gemma continues the text, so it gets none.
    `pictures`, `note`: as in `without_placeholders`; a plain Gemma knows no `<image>`. Raises InputError.
    """
    if model.tokenizer is None:
        raise InputError("PROMPT: the model's folder has no tokenizer.json or tokenizer.model; "
                         "run.py --prompt-ids takes token ids")
    if model.cfg.vision_config or text.startswith("<bos>"):
        text = without_placeholders(text, pictures, note)
    text = text + "\n" if model.cfg.vision_config else text
    return [model.cfg.bos_token_id, *model.tokenizer.encode(text)]


def check_vocabulary(what: str, ids: Sequence[int], cfg: PaliGemmaConfig) -> None:
    """Raise InputError unless every id has an embedding of its own; `what` says where the ids come from."""
    for i in ids:
        if not 0 <= i < cfg.text_config.vocab_size:
            raise InputError(f"{what}: id {i} is outside the vocabulary, 0 to {cfg.text_config.vocab_size - 1}")
        if i == cfg.image_token_index:
            raise InputError(f"{what}: id {i} stands for a piece of the picture; "
                             "those are put in front automatically")


def check_ids(ids: Sequence[int], cfg: PaliGemmaConfig, pictures: int = 1) -> None:
    """Raise InputError unless every id has an embedding of its own, and pictures and prompt fit the model."""
    if not ids:
        raise InputError("prompt: no token ids, expected at least one")
    check_vocabulary("prompt", ids, cfg)
    patches = pictures * cfg.vision_config.num_patches if pictures else 0  # a text model has no vision_config
    length, limit = patches + len(ids), cfg.text_config.max_position_embeddings
    if length >= limit:
        counted = f"{length} tokens with the picture's" if patches else f"{length} tokens"
        raise InputError(f"prompt: {counted}, expected fewer than the model's {limit} positions")
