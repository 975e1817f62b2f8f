"""A checkpoint on disk to answers about pictures: load, encode the prompt, prefill, decode token by token.

A Gemma by itself continues a text in the same way, with a picture of no tokens in front of it.
"""
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from minipali.backend import to_device, to_host
from minipali.checkpoint.big_vision import load_npz, open_npz
from minipali.checkpoint.config import PaliGemmaConfig, Unusable, read_config
from minipali.inputs.image import Preprocessor
from minipali.decoding.sampling import log_probs, sample
from minipali.inputs.sentencepiece import read_tokenizer
from minipali.inputs.tokenizer import Tokenizer
from minipali.checkpoint.safetensors_file import load, open_checkpoint
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
        return replace(self, params=to_device(read_params(self.path, dtype), self.backend))

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


def read_params(path, dtype):
    """The tree of a checkpoint's parameters, in memory: of a folder, or of a big_vision .npz."""
    return (load_npz if Path(path).suffix == ".npz" else load)(path, dtype)[1]


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


def check_vocabulary(what, ids, cfg):
    """Raise Unusable unless every id has an embedding of its own; `what` says where the ids come from."""
    for i in ids:
        if not 0 <= i < cfg.text_config.vocab_size:
            raise Unusable(f"{what}: id {i} is outside the vocabulary, 0 to {cfg.text_config.vocab_size - 1}")
        if i == cfg.image_token_index:
            raise Unusable(f"{what}: id {i} stands for a piece of the picture; those are put in front by themselves")


def check_ids(ids, cfg, pictures=1):
    """Raise Unusable unless every id has an embedding of its own and pictures and prompt fit the model's positions."""
    if not ids:
        raise Unusable("prompt: no token ids, expected at least one")
    check_vocabulary("prompt", ids, cfg)
    patches = pictures * cfg.vision_config.num_patches if pictures else 0  # a text model has no vision_config
    length, limit = patches + len(ids), cfg.text_config.max_position_embeddings
    if length >= limit:
        counted = f"{length} tokens with the picture's" if patches else f"{length} tokens"
        raise Unusable(f"prompt: {counted}, expected fewer than the model's {limit} positions")


@dataclass
class Answer:
    """The tokens written (the stop token left out), why it stopped ("eos" or "length"), and the seconds it took.

    `logprobs`: the logarithm of each token's probability, `stop_logprob` that of the stop token (None at "length"),
    as the model gave them, before temperature, top-k, top-p or a grammar (see `grammar`) left anything out.
    """
    ids: list = field(default_factory=list)
    stopped_by: str = "length"
    logprobs: list = field(default_factory=list)
    stop_logprob: float | None = None
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def logprob(self):
        """That of the whole answer: probabilities multiply, so their logarithms add up."""
        return sum(self.logprobs) + (self.stop_logprob or 0.0)


@dataclass
class Prefix:
    """A prefix that has gone through: the scores (B,V) of what follows, on the host, and room for that many tokens."""
    logits: np.ndarray
    cache: KVCache
    room: int
    seconds: float


def finite(model, logits):
    """The logits as they are; raises Unusable if any is no number."""
    if not np.isfinite(logits).all():
        raise Unusable(f"{model.path}: the scores of the next token are not all finite: its weights are damaged")
    return logits


def read_prefix(model, features, prompts, most):
    """Pictures and prompts through the model, once, with room for answers of up to `most` tokens."""
    cfg, started = model.cfg, time.perf_counter()
    lengths = np.array([len(prompt) for prompt in prompts])
    ids = np.full((len(prompts), lengths.max()), cfg.pad_token_id)
    for row, prompt in zip(ids, prompts):
        row[:len(prompt)] = prompt
    longest = features.shape[1] + ids.shape[1]
    room = min(most, cfg.text_config.max_position_embeddings - longest)
    cache = KVCache(features, len(prompts), longest + room, cfg.text_config)
    logits = finite(model, to_host(prefill(features, ids, lengths, model.params, cfg, cache)))
    return Prefix(logits, cache, room, time.perf_counter() - started)


def next_logits(model, cache, new):
    """The scores, on the host, of what follows each of the new tokens."""  # (B,T) -> (B,T,V)
    return finite(model, to_host(decode(new, model.params, model.cfg, cache)))


def permitted(logits, grammar, ids, left):
    """The logits (V,) with -inf for what a grammar does not let follow `ids`; see `grammar`."""
    if grammar is None:
        return logits
    masked, allowed = np.full_like(logits, -np.inf), grammar.allowed(ids, left)
    masked[allowed] = logits[allowed]
    return masked


def generate(model, features, prompts, decoding, on_token=None, grammar=None):
    """Answer B prompts, each a list of ids, about B encoded pictures, together; returns B Answers.

    Prompts may differ in length. A row that has ended is fed padding until all have: it costs time and changes
    nothing. `on_token(row, id)` is called for each token as soon as it is known. Raises Unusable if the scores are not
    finite, which is what damaged weights give. `search` has what goes on from one prefix in several ways.
    """
    return write(model, read_prefix(model, features, prompts, decoding.max_new_tokens), decoding, on_token, grammar)


def write(model, prefix, decoding, on_token=None, grammar=None):
    """The answers that follow a prefix, token by token; the second half of `generate`."""
    cfg, logits, started = model.cfg, prefix.logits, time.perf_counter()
    answers = [Answer(prefill_seconds=prefix.seconds) for _ in logits]
    # Each row draws from a stream of its own: what it draws does not depend on how long the others go on.
    rngs = decoding.generator().spawn(len(answers))
    for step in range(prefix.room):
        new = np.full((len(answers), 1), cfg.pad_token_id)
        for row, answer in enumerate(answers):
            if answer.stopped_by == "eos":
                continue
            scores = permitted(logits[row], grammar, answer.ids, prefix.room - step)
            token = sample(scores, decoding.temperature, decoding.top_k, decoding.top_p, rngs[row])
            logprob = float(log_probs(logits[row])[token])
            if token in cfg.eos_token_ids:
                answer.stopped_by, answer.stop_logprob = "eos", logprob
                continue
            answer.ids.append(token)
            answer.logprobs.append(logprob)
            new[row] = token
            if on_token:
                on_token(row, token)
        if step == prefix.room - 1 or all(answer.stopped_by == "eos" for answer in answers):
            break
        logits = next_logits(model, prefix.cache, new)[:, -1]
    for answer in answers:
        answer.decode_seconds = time.perf_counter() - started
    return answers
