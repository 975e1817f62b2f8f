"""A checkpoint on disk to answers about pictures: load, encode the prompt, prefill, decode token by token."""
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from minipali.io.backend import to_device, to_host
from minipali.io.config import PaliGemmaConfig, Unusable
from minipali.io.image import Preprocessor
from minipali.io.sampling import sample
from minipali.io.tokenizer import Tokenizer
from minipali.io.weights import load
from minipali.model.gemma import KVCache
from minipali.model.paligemma import decode, image_features, prefill


@dataclass(frozen=True)
class Model:
    """All that answering needs. `tokenizer` is None where the folder has none: token ids still work."""
    cfg: PaliGemmaConfig
    params: dict
    tokenizer: Tokenizer | None
    preprocessor: Preprocessor
    backend: str

    def features(self, images):
        """Pillow pictures as the language model's tokens, each picture encoded once."""  # B pictures -> (B,P,D)
        return self.features_of(np.stack([self.preprocessor(image) for image in images]))

    def features_of(self, pixels):
        """The same for pictures that are already preprocessed."""  # (B,3,S,S) -> (B,P,D)
        dtype = self.params["multi_modal_projector"]["linear"]["weight"].dtype
        return image_features(to_device(pixels.astype(dtype), self.backend), self.params, self.cfg)


def load_model(folder, dtype=np.float32, backend="numpy"):
    """A PaliGemma from a folder in the hub's layout; raises Unusable with one line for whatever is wrong in it."""
    folder = Path(folder)
    if not folder.is_dir():
        raise Unusable(f"{folder}: no such folder, expected one with config.json and *.safetensors")
    cfg, params = load(folder, dtype)
    if not isinstance(cfg, PaliGemmaConfig):
        raise Unusable(f"{folder / 'config.json'}: model_type is siglip, expected paligemma")
    tokens = folder / "tokenizer.json"
    return Model(cfg, to_device(params, backend), Tokenizer.from_file(tokens) if tokens.exists() else None,
                 Preprocessor.from_folder(folder, cfg.vision_config.image_size), backend)


def encode_prompt(text, model):
    """A prompt as PaliGemma was trained to read it: BOS, the text, a newline, the last two tokenized in one go."""
    if model.tokenizer is None:
        raise Unusable("PROMPT: the model's folder has no tokenizer.json; give token ids with --prompt-ids")
    return [model.cfg.bos_token_id, *model.tokenizer.encode(text + "\n")]


def check_ids(ids, cfg):
    """Raise Unusable unless every id has an embedding of its own and picture and prompt fit the model's positions."""
    if not ids:
        raise Unusable("prompt: no token ids, expected at least one")
    for i in ids:
        if not 0 <= i < cfg.text_config.vocab_size:
            raise Unusable(f"prompt: id {i} is outside the vocabulary, 0 to {cfg.text_config.vocab_size - 1}")
        if i == cfg.image_token_index:
            raise Unusable(f"prompt: id {i} stands for a piece of the picture, and those are put in front by themselves")
    length, limit = cfg.vision_config.num_patches + len(ids), cfg.text_config.max_position_embeddings
    if length >= limit:
        raise Unusable(f"prompt: {length} tokens with the picture's, expected fewer than the model's {limit} positions")


@dataclass
class Answer:
    """The tokens written (the stop token left out), why it stopped ("eos" or "length"), and the seconds it took."""
    ids: list = field(default_factory=list)
    stopped_by: str = "length"
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


def generate(model, features, prompts, decoding, on_token=None):
    """Answer B prompts, each a list of ids, about B encoded pictures, together; returns B Answers.

    Prompts may differ in length. A row that has ended is fed padding until all have: it costs time and changes
    nothing. `on_token(row, id)` is called for each token as soon as it is known.
    """
    cfg, started = model.cfg, time.perf_counter()
    lengths = np.array([len(prompt) for prompt in prompts])
    ids = np.full((len(prompts), lengths.max()), cfg.pad_token_id)
    for row, prompt in zip(ids, prompts):
        row[:len(prompt)] = prompt
    longest = features.shape[1] + ids.shape[1]
    count = min(decoding.max_new_tokens, cfg.text_config.max_position_embeddings - longest)
    cache = KVCache(features, len(prompts), longest + count, cfg.text_config)
    rng, answers = decoding.generator(), [Answer() for _ in prompts]
    logits = to_host(prefill(features, ids, lengths, model.params, cfg, cache))
    prefilled = time.perf_counter()
    for step in range(count):
        new = np.full((len(prompts), 1), cfg.pad_token_id)
        for row, answer in enumerate(answers):
            if answer.stopped_by == "eos":
                continue
            token = sample(logits[row], decoding.temperature, decoding.top_k, decoding.top_p, rng)
            if token in cfg.eos_token_ids:
                answer.stopped_by = "eos"
                continue
            answer.ids.append(token)
            new[row] = token
            if on_token:
                on_token(row, token)
        if step == count - 1 or all(answer.stopped_by == "eos" for answer in answers):
            break
        logits = to_host(decode(new, model.params, cfg, cache))[:, -1]
    for answer in answers:
        answer.prefill_seconds, answer.decode_seconds = prefilled - started, time.perf_counter() - prefilled
    return answers
