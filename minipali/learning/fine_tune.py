"""Fine-tuning: a model goes on learning from the user's own pictures, prompts and answers.

    python -m minipali train --from DIR --data FILE.jsonl --out OUT

The file has one example a line, {"image": "cow.jpg", "prefix": "answer en where is the cow?", "suffix": "beach"}, as
big_vision's own have; pictures lie relative to it. The loss is the hub's (its processor with `suffix=`, its model with
`labels`): the mean over all tokens of a batch's suffixes, EOS among them; prefix and padding are not learned.

All weights learn, or those that no `--freeze` pattern names, or with `--lora` low-rank matrices beside some of them.
The loop is given only what learns: a frozen weight has no place in its vector, so no average, no decay and no clipping.
"""
import functools
import hashlib
import math
import os
import sys
from argparse import Namespace
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import numpy as np

from minipali.backend import to_device
from minipali.checkpoint import folder_of, write_like
from minipali.checkpoint.tensors import flatten, param_shapes, unflatten
from minipali.decoding.loaded_model import open_model, read_params
from minipali.errors import InputError
from minipali.files import make_folder
from minipali.inputs.image import open_image
from minipali.learning import lora
from minipali.learning.backward import paligemma
from minipali.learning.backward.ops import linear
from minipali.learning.examples import order, read_examples
from minipali.learning.loop import Schedule, train
from minipali.model.siglip import vision_tower

EPOCHS = 3  # how often each example is seen if --steps does not say
LARGE = 100_000_000  # from this number of weights on, saving memory matters more than time


# --- what learns ------------------------------------------------------------------------------------------------------

def matching(patterns, names, option):
    """The names that at least one pattern matches; InputError if a pattern matches none."""
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(f"{option}: {pattern!r} matches no name such as {', '.join(list(names)[-2:])}")
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def choose(shapes, freeze, adapt):
    """The names of the weights whose gradient is needed: all but the frozen, or the matrices that LoRA is to adapt.

    `freeze` are patterns of the checkpoint's names (as `python -m minipali inspect` lists a folder's), `adapt` of
    modules: "*.q_proj" is that of "….q_proj.weight".
    """
    if adapt:
        matrices = {name.removesuffix(".weight"): name for name, shape in shapes.items() if len(shape) == 2}
        return [matrices[module] for module in matching(adapt, matrices, "--lora")]
    frozen = set(matching(freeze, shapes, "--freeze"))
    if len(frozen) == len(shapes):
        raise InputError("--freeze: every weight is frozen, and nothing is left to learn")
    return [name for name in shapes if name not in frozen]


def read_weights(path: Path) -> dict:
    """{name: array} of a checkpoint of either kind, in float32."""
    return flatten(read_params(path, np.float32))


@functools.cache
def _read_some(path, names, backend):
    weights = read_weights(path)
    return to_device({name: weights[name] for name in names}, backend)


@dataclass(frozen=True)
class FrozenWeights:
    """The weights that stay, read from their checkpoint when first needed: what goes to another process is its name,
    and float32 stays mapped there, once for all processes."""
    path: Path
    names: tuple
    backend: str = "numpy"

    def __call__(self):
        return _read_some(self.path, self.names, self.backend)


def image_features(pixels, p, cfg, learned, recompute=False):
    """As paligemma.image_features, but a tower of which nothing learns only runs forward: it comes before all else, so
    no gradient has to pass through it. No activations of it are kept, since no backward pass follows."""
    if any(name.startswith("vision_tower.") for name in learned):
        return paligemma.image_features(pixels, p, cfg, recompute)
    x = vision_tower(pixels, p["vision_tower"]["vision_model"], cfg.vision_config)
    y, pull_linear = linear(x, **p["multi_modal_projector"]["linear"])
    return y, lambda dy: (None, {"multi_modal_projector": {"linear": pull_linear(dy)[1]}})


# --- the stage --------------------------------------------------------------------------------------------------------

def is_multiplied(name, x):
    """Whether a weight is a matrix that `linear` multiplies with or `embed` looks rows up in."""
    return len(x.shape) == 2 and "position_embedding" not in name


@dataclass(frozen=True)
class FineTune:
    """The stage that the loop trains: `size` of the examples `rows` a batch, in the order that follows from `seed`.

    `learned`: names of the checkpoint's weights that change; `frozen()`: {name: array} of all that are not the loop's;
    `scale`: LoRA's alpha / rank, or None without; `about`: what else distinguishes this run; `recompute`: whether
    layers are computed twice to keep little of them in memory, which changes no bit (see backward.ops.recomputed).
    """
    cfg: object
    preprocessor: object
    rows: tuple
    size: int
    seed: int
    learned: tuple
    frozen: object
    scale: float | None = None
    about: tuple = ()
    recompute: bool = False

    def batch(self, number):
        """Pixels (B,3,size,size), ids (B,T) of prefix and suffix padded on the right, `learned` (B,T): the suffix."""
        drawn = [self.rows[i] for i in order(self.seed, number, self.size, len(self.rows))]
        lengths = np.array([len(row.prefix) + len(row.suffix) for row in drawn])
        ids = np.full((len(drawn), lengths.max()), self.cfg.pad_token_id)
        learned = np.zeros(ids.shape, bool)
        for i, row in enumerate(drawn):
            ids[i, :lengths[i]] = row.prefix + row.suffix
            learned[i, len(row.prefix):lengths[i]] = True
        prefix_len = self.cfg.vision_config.num_patches + np.array([len(row.prefix) for row in drawn])
        return {"pixels": np.stack([self.pixels(row) for row in drawn]), "ids": ids, "lengths": lengths,
                "learned": learned, "prefix_len": prefix_len}

    def pixels(self, row):
        """A row's picture, opened only now: all of them would not fit into memory."""
        try:
            return self.preprocessor(open_image(row.image))
        except InputError as problem:  # its header was fine, or it has changed since
            raise InputError(f"{row.where}: {problem}") from None

    def examples(self, batch):
        return len(batch["ids"])

    def identity(self):
        return {"stage": "fine-tune", "seed": self.seed, "batch": self.size, **dict(self.about)}

    def weights(self, trained):
        """All weights of the model by name, from those that the loop trains: no gradient is formed of a frozen matrix.

        (A table of positions is added and not multiplied with, which takes an array; it is small.)
        """
        frozen = self.frozen()
        if self.scale is not None:
            adapted = lora.merged(frozen, trained, self.learned, self.scale)
            trained = {name: x if is_multiplied(name, x) else np.asarray(x)
                       for name, x in adapted.items() if name in self.learned}
        return {**{name: lora.Frozen(x) if is_multiplied(name, x) else x for name, x in frozen.items()}, **trained}

    def loss_and_gradient(self, p, batch):
        """The loss () and the gradients of what `p` holds."""
        trained = flatten(p)
        params = unflatten(self.weights(trained))
        dtype = next(iter(trained.values())).dtype
        features, pull_features = image_features(batch["pixels"].astype(dtype), params, self.cfg, self.learned,
                                                 self.recompute)
        share = batch["learned"].astype(dtype)
        loss, pull = paligemma.suffix_loss(features, batch["ids"], batch["lengths"], batch["prefix_len"], params,
                                           self.cfg, share / share.sum(), self.recompute)
        dfeatures, grads = pull(1.0)
        grads = flatten({**pull_features(dfeatures)[1], **grads})
        if self.scale is not None:
            grads |= lora.pull(grads, trained, [name for name in self.learned if name in grads], self.scale)
        return loss, {name: grads[name] for name in trained}


# --- the command ------------------------------------------------------------------------------------------------------

def first_weights(path, names):
    """What the learning starts from: those weights of a checkpoint."""
    weights = read_weights(path)
    return unflatten({name: weights[name] for name in names})


def stage_of(model, args, examples):
    """The stage for the command's options, the function that gives what it starts from, and {name: shape} of that."""
    shapes, scale = param_shapes(model.cfg), None
    learned = choose(shapes, args.freeze or [], args.lora or [])
    if args.lora:
        rank, alpha = args.rank or 8, args.alpha or 16.0
        factors = lora.start({name: shapes[name] for name in learned}, rank, np.random.default_rng((args.seed, 4)))
        start, trained = partial(unflatten, factors), {name: x.shape for name, x in factors.items()}
        scale = alpha / rank
    else:
        start, trained = partial(first_weights, model.path, learned), {name: shapes[name] for name in learned}
    frozen = FrozenWeights(model.path, tuple(name for name in shapes if name not in trained), args.backend)
    digest = hashlib.sha256(repr([(str(row.image), row.prefix, row.suffix) for row in examples]).encode()).hexdigest()
    about = (("model", str(model.path)), ("data", digest), ("scale", scale))
    recompute = sum(map(math.prod, shapes.values())) >= LARGE
    return FineTune(model.cfg, model.preprocessor, tuple(examples), args.batch or 8, args.seed, tuple(learned), frozen,
                    scale, about, recompute), start, trained


def fine_tune(args: Namespace) -> None:
    """What `python -m minipali train` does with `--data`; raises InputError before any step if something is wrong."""
    model = open_model(args.start, args.backend)
    folder = folder_of(model.path)
    if model.tokenizer is None:
        raise InputError(f"{folder}: neither tokenizer.json nor tokenizer.model is there")
    if args.out.exists() and os.path.samefile(args.out, folder):  # to go on after Ctrl-C takes the old weights
        raise InputError(f"--out: {args.out} is the folder of --from, expected another")
    notes = {}
    examples = read_examples(args.data, model, lambda note: notes.setdefault(note))
    for note in notes:  # once, though it may be about every line
        print(f"{args.data}: {note}", file=sys.stderr)
    stage, start, shapes = stage_of(model, args, examples)
    make_folder(args.out)
    steps = math.ceil(EPOCHS * len(examples) / stage.size) if args.steps is None else args.steps
    rate = args.rate or (1e-4 if args.lora else 1e-5)
    print(f"{len(examples)} examples, {steps} steps of {stage.size}; {sum(map(math.prod, shapes.values())):,} numbers "
          f"in {len(shapes)} tensors learn", file=sys.stderr)
    # A twentieth of the steps to warm up, as for the paper's transfers; no decay: it would pull what is known to 0.
    schedule = Schedule(steps, rate, warmup=steps // 20, beta2=0.999, decay=0.0, shards=1)
    trained = flatten(train(stage, start, schedule, args.runs / "fine-tune.safetensors", args.workers,
                            args.backend, every=max(1, min(20, steps // 20))))
    _read_some.cache_clear()  # or all that is frozen would be in memory twice
    weights = read_weights(model.path)
    final = {**weights, **trained} if stage.scale is None else lora.merged(weights, trained, stage.learned, stage.scale)
    write_like(model, args.out, final, args.dtype)
