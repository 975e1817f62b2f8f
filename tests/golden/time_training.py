"""Examples a second of a training step, here and in PyTorch: weights/, the same batches, AdamW, one thread.

    pip install torch==2.13.0 transformers==5.24.0 pillow safetensors
    OPENBLAS_NUM_THREADS=1 python tests/golden/time_training.py [ROUNDS]

Both run a batch of 24 pictures with four prompts about each: the tower once for each picture, the loss on the answers'
tokens alone, gradients of every weight, clipping, AdamW. PyTorch runs eagerly, through `transformers`' modules, with
the prefix-LM mask given. They take turns; both speeds and their ratio are printed for each
round, and the ratios' median.
"""
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from transformers import PaliGemmaForConditionalGeneration

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from minipali.backend import keep_freed_memory  # noqa: E402
from minipali.checkpoint.hub import load  # noqa: E402
from minipali.checkpoint.tensors import flatten  # noqa: E402
from minipali.inputs.tokenizer import Tokenizer  # noqa: E402
from minipali.learning.loop import Schedule, update  # noqa: E402
from minipali.learning.optimizer import gradient_norm, pack  # noqa: E402
from minipali.model.gemma import prefix_lm_mask  # noqa: E402
from minipali.small_world.stages import PrefixLM, WordTokenizer, scaled  # noqa: E402

SCHEDULE = Schedule(1000, rate=1e-4, warmup=1, shards=1)


class Ours:
    def __init__(self, stage):
        keep_freed_memory()
        self.stage = stage
        self.weights, self.params = pack(load(ROOT / "weights")[1])
        self.shapes = {name: x.shape for name, x in flatten(self.params).items()}
        self.averages = {"first": np.zeros_like(self.weights), "second": np.zeros_like(self.weights)}
        self.step = 0

    def __call__(self, batch):
        loss, gradients = self.stage.loss_and_gradient(self.params, batch)
        gradients = flatten(gradients)
        norm = gradient_norm([gradients[name] for name in self.shapes])
        update(SCHEDULE, self.step, self.weights, gradients, norm, self.averages, self.shapes)
        self.step += 1
        return float(loss)


class Theirs:
    def __init__(self, stage):
        torch.set_num_threads(1)
        self.model = PaliGemmaForConditionalGeneration.from_pretrained(ROOT / "weights", dtype=torch.float32).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=SCHEDULE.rate, betas=(0.9, 0.98), eps=1e-8,
                                           weight_decay=SCHEDULE.decay)

    def __call__(self, batch):
        inner = self.model.model
        tower = inner.vision_tower(torch.from_numpy(np.ascontiguousarray(scaled(batch["pixels"])))).last_hidden_state
        features = inner.multi_modal_projector(tower)
        total = 0
        for group in batch["groups"]:
            patches, ids = features.shape[1], torch.from_numpy(group["ids"])
            text = inner.language_model.embed_tokens(ids)  # scaled by the module itself
            x = torch.cat([features[torch.from_numpy(group["picture"])], text], dim=1)
            places = np.arange(x.shape[1])[None]
            positions = np.where(places < group["lengths"][:, None] + patches, places, -1)
            allowed = torch.from_numpy(prefix_lm_mask(positions, positions, group["prefix_len"])[:, None])
            mask = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
            out = inner.language_model(inputs_embeds=x, attention_mask=mask, use_cache=False,
                                       position_ids=torch.from_numpy(np.maximum(positions, 0))).last_hidden_state
            weights = torch.from_numpy(group["weights"])
            rows, columns = torch.nonzero(weights[:, 1:], as_tuple=True)
            logits = self.model.lm_head(out[rows, patches + columns])
            losses = torch.nn.functional.cross_entropy(logits, ids[rows, columns + 1], reduction="none")
            total = total + (losses * weights[rows, columns + 1]).sum()
        self.optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return float(total)


def main(rounds=3):
    tokenizer = WordTokenizer(Tokenizer.from_file(ROOT / "weights" / "tokenizer.json"))
    cfg, _ = load(ROOT / "weights")
    stage = PrefixLM(cfg, tokenizer, 0, 24, {"world": (1.0, 4)})
    batches = [stage.batch(number) for number in range(4)]
    sides = {"here": Ours(stage), "PyTorch": Theirs(stage)}
    print("loss of the first batch:", {name: round(run(batches[0]), 5) for name, run in sides.items()})
    ratios = []
    for _ in range(int(rounds)):
        speeds = {}
        for name, run in sides.items():
            started = time.perf_counter()
            examples = sum(bool(run(batch)) * stage.examples(batch) for batch in batches)
            speeds[name] = examples / (time.perf_counter() - started)
        ratios.append(speeds["here"] / speeds["PyTorch"])
        print(", ".join(f"{name} {speed:.1f} examples/s" for name, speed in speeds.items()), f"ratio {ratios[-1]:.2f}")
    print(f"median ratio {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
