"""Small training stages, for the tests of several rooms."""
import json
import signal
from functools import cache

import numpy as np
from helpers import ROOT
from safetensors import safe_open

from minipali.checkpoint.config import (
    GemmaConfig,
    PaliGemmaConfig,
    VisionConfig,
)
from minipali.checkpoint.tensors import flatten, unflatten
from minipali.inputs.tokenizer import Tokenizer
from minipali.learning.loop import Schedule, train
from minipali.small_world import world
from minipali.small_world.stages import PrefixLM, WordTokenizer
from minipali.small_world.vocabulary import ROWS


@cache
def tokenizer():
    return Tokenizer.from_file(ROOT / "weights" / "tokenizer.json")


def config(image_size=world.SIDE):
    """A PaliGemma with four patches and the shipped vocabulary, otherwise as small as can be."""
    vision = VisionConfig(hidden_size=6, intermediate_size=7, num_hidden_layers=1, num_attention_heads=2,
                          image_size=image_size, patch_size=image_size // 2, num_channels=3, layer_norm_eps=0.01,
                          vision_use_head=False)
    text = GemmaConfig(vocab_size=ROWS, hidden_size=5, intermediate_size=7, num_hidden_layers=1, num_attention_heads=2,
                       num_key_value_heads=1, head_dim=4, rms_norm_eps=0.01, rope_thetas=(1e4,), rope_factors=(1.0,),
                       max_position_embeddings=256, query_pre_attn_scalar=4, attn_logit_softcapping=None,
                       final_logit_softcapping=None, sliding_windows=(None,), post_norms=False, qk_norms=False,
                       prefix_lm=True)
    return PaliGemmaConfig(vision_config=vision, text_config=text, image_token_index=ROWS - 1, bos_token_id=2,
                           eos_token_ids=(1,), pad_token_id=0, tie_word_embeddings=True)


def prefix_lm(pictures=3, sources=None, seed=0):
    sources = sources or {"world": (0.5, 3), "easy_vqa_like": (0.3, 2), "text": (0.2, 1)}
    return PrefixLM(config(), WordTokenizer(tokenizer()), seed, pictures, sources)


class Given:
    """A stage whose gradients are given; it notes the weights that it is shown."""
    def __init__(self, gradients):
        self.gradients, self.seen = gradients, []

    def batch(self, step):
        return {name: x[step] for name, x in self.gradients.items()}

    def examples(self, batch):
        return 1

    def identity(self):
        return {"stage": "given"}

    def loss_and_gradient(self, p, batch):
        self.seen.append({name: x.copy() for name, x in flatten(p).items()})
        return 0.0, unflatten(batch)


class Toy:
    """A stage that pulls a small tree towards random ones; `events` happen as batches of these numbers are drawn."""
    def __init__(self, events=None, seed=3):
        self.events, self.seed, self.drawn = events or {}, seed, []

    def batch(self, number):
        self.drawn.append(number)
        self.events.get(number, lambda: None)()
        return np.random.default_rng((self.seed, number)).standard_normal(8).astype(np.float32)

    def examples(self, batch):
        return 4

    def identity(self):
        return {"stage": "toy", "seed": self.seed, "sources": {"a": (0.5, 3)}}

    def loss_and_gradient(self, p, batch):
        off = p["w"] - batch[:6].reshape(2, 3), p["b"] - batch[6:]
        return (off[0] ** 2).sum() + (off[1] ** 2).sum(), {"b": 2 * off[1], "w": 2 * off[0]}


def run(stage, path, steps=9, shards=2, **how):
    params = {"w": np.ones((2, 3), np.float32), "b": np.zeros(2, np.float32)}
    schedule = Schedule(steps, rate=0.1, warmup=3, shards=shards)
    return train(stage, params, schedule, path, **{"workers": 0, "report": lambda *_: None, **how})


def state_of(path):
    with safe_open(path, "np") as file:
        names = file.keys()
        return json.loads(file.metadata()["about"])["step"], {name: file.get_tensor(name) for name in names}


def press():
    signal.raise_signal(signal.SIGINT)


def fail():
    raise ZeroDivisionError("a batch that cannot be drawn")
