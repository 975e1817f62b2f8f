"""A checkpoint on disk to answers about pictures: load, encode the prompt, prefill, decode token by token.

A Gemma by itself continues a text in the same way, with a picture of no tokens in front of it.
"""
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from minipali.io.backend import to_device, to_host
from minipali.io.big_vision import load_npz, open_npz
from minipali.io.config import PaliGemmaConfig, Unusable, read_config
from minipali.io.image import Preprocessor
from minipali.io.sampling import sample
from minipali.io.sentencepiece import read_tokenizer
from minipali.io.tokenizer import Tokenizer
from minipali.io.weights import load, open_checkpoint
from minipali.model.gemma import KVCache
from minipali.model.paligemma import decode, image_features, prefill


@dataclass(frozen=True)
class Model:
    """All that answering needs. `tokenizer` is None where the folder has none: token ids still work. `preprocessor` is
    None for a text model, which sees no pictures."""
    path: Path
    cfg: PaliGemmaConfig
    tokenizer: Tokenizer | None
    preprocessor: Preprocessor | None
    backend: str
    params: dict | None = None

    def with_weights(self, dtype):
        """The same model, ready to compute; this reads the whole checkpoint."""
        read = load_npz if self.path.suffix == ".npz" else load
        return replace(self, params=to_device(read(self.path, dtype)[1], self.backend))

    def features(self, images):
        """Pillow pictures as the language model's tokens, each picture encoded once."""  # B pictures -> (B,P,D)
        return self.features_of(np.stack([self.preprocessor(image) for image in images]))

    def features_of(self, pixels):
        """The same for pictures that are already preprocessed."""  # (B,3,S,S) -> (B,P,D)
        dtype = self.params["multi_modal_projector"]["linear"]["weight"].dtype
        return image_features(to_device(pixels.astype(dtype), self.backend), self.params, self.cfg)

    def no_picture(self, count):
        """What stands in for the features of `count` pictures where there are none."""  # -> (B,0,D)
        table = self.params["language_model"]["model"]["embed_tokens"]["weight"]
        return np.empty_like(table, shape=(count, 0, table.shape[1]))


def is_text_model(path):
    """Whether `path` holds a Gemma without a vision tower, going by its config.json alone."""
    try:
        return read_config(path).vision_config is None
    except Unusable:  # what is wrong there, `open_model` says
        return False


def open_model(path, backend="numpy"):
    """All of a PaliGemma, or of a Gemma, but its weights: enough to know that a prompt will do.

    `path` is a folder in the hub's layout, or a big_vision .npz, beside which the tokenizer is looked for. Raises
    Unusable with one line for whatever is wrong there, and if `backend` is not to be had.
    """
    to_device(np.zeros(1), backend)
    path = Path(path)
    from_npz = path.suffix == ".npz"
    cfg, _ = open_npz(path) if from_npz else open_checkpoint(path)
    if not isinstance(cfg, PaliGemmaConfig):
        raise Unusable(f"{path if from_npz else path / 'config.json'}: model_type is siglip, expected paligemma")
    folder = path.parent if from_npz else path
    preprocessor = cfg.vision_config and Preprocessor.from_folder(folder, cfg.vision_config.image_size)
    return Model(path, cfg, read_tokenizer(folder), preprocessor, backend)


def load_model(folder, dtype=np.float32, backend="numpy"):
    """The whole of a PaliGemma or a Gemma; raises Unusable as `open_model` does."""
    return open_model(folder, backend).with_weights(dtype)


def encode_prompt(text, model):
    """A prompt as PaliGemma was trained to read it: BOS, the text, a newline, the last two tokenized in one go.

    The newline says that the question is over. A plain Gemma goes on where the text stops, so it gets none.
    """
    if model.tokenizer is None:
        raise Unusable("PROMPT: the model's folder has no tokenizer.json or tokenizer.model; give token ids with --prompt-ids")
    text = text + "\n" if model.cfg.vision_config else text
    return [model.cfg.bos_token_id, *model.tokenizer.encode(text)]


def check_ids(ids, cfg, pictures=1):
    """Raise Unusable unless every id has an embedding of its own and pictures and prompt fit the model's positions."""
    if not ids:
        raise Unusable("prompt: no token ids, expected at least one")
    for i in ids:
        if not 0 <= i < cfg.text_config.vocab_size:
            raise Unusable(f"prompt: id {i} is outside the vocabulary, 0 to {cfg.text_config.vocab_size - 1}")
        if i == cfg.image_token_index:
            raise Unusable(f"prompt: id {i} stands for a piece of the picture; those are put in front by themselves")
    patches = pictures * cfg.vision_config.num_patches if pictures else 0  # a text model has no vision_config
    length, limit = patches + len(ids), cfg.text_config.max_position_embeddings
    if length >= limit:
        counted = f"{length} tokens with the picture's" if patches else f"{length} tokens"
        raise Unusable(f"prompt: {counted}, expected fewer than the model's {limit} positions")


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
    nothing. `on_token(row, id)` is called for each token as soon as it is known. Raises Unusable if the scores are not
    finite, which is what damaged weights give.
    """
    cfg, started = model.cfg, time.perf_counter()
    lengths = np.array([len(prompt) for prompt in prompts])
    ids = np.full((len(prompts), lengths.max()), cfg.pad_token_id)
    for row, prompt in zip(ids, prompts):
        row[:len(prompt)] = prompt
    longest = features.shape[1] + ids.shape[1]
    count = min(decoding.max_new_tokens, cfg.text_config.max_position_embeddings - longest)
    cache = KVCache(features, len(prompts), longest + count, cfg.text_config)
    # Each row draws from a stream of its own: what it draws does not depend on how long the others go on.
    rngs, answers = decoding.generator().spawn(len(prompts)), [Answer() for _ in prompts]
    logits = to_host(prefill(features, ids, lengths, model.params, cfg, cache))
    prefilled = time.perf_counter()
    for step in range(count):
        if not np.isfinite(logits).all():
            raise Unusable(f"{model.path}: the scores of the next token are not all finite: its weights are damaged")
        new = np.full((len(prompts), 1), cfg.pad_token_id)
        for row, answer in enumerate(answers):
            if answer.stopped_by == "eos":
                continue
            token = sample(logits[row], decoding.temperature, decoding.top_k, decoding.top_p, rngs[row])
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
