"""How long `transformers` takes for what `run.py --prompt-ids … --json` reports, on this CPU and in float32.

    pip install torch==2.13.0 transformers==5.23.0
    python tests/golden/time_transformers.py FOLDER 2,15678,659,108 9
"""
import json
import statistics
import sys
import time

import torch
from transformers import PaliGemmaForConditionalGeneration


def main(folder, prompt, count):
    model = PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    vision = model.config.vision_config
    picture = [model.config.image_token_id] * (vision.image_size // vision.patch_size) ** 2
    ids = torch.tensor([picture + [int(i) for i in prompt.split(",")]])
    pixels = torch.rand(1, 3, vision.image_size, vision.image_size) * 2 - 1
    start = time.perf_counter()
    out = model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids),
                token_type_ids=torch.zeros_like(ids), use_cache=True, logits_to_keep=1)
    first, steps = time.perf_counter() - start, []
    for length in range(ids.shape[1] + 1, ids.shape[1] + int(count)):
        start = time.perf_counter()
        out = model(input_ids=out.logits[:, -1:].argmax(-1), attention_mask=torch.ones(1, length, dtype=ids.dtype),
                    past_key_values=out.past_key_values, use_cache=True)
        steps.append(time.perf_counter() - start)
    print(json.dumps({"first_token_seconds": first, "tokens_per_second": 1 / statistics.median(steps)}))


if __name__ == "__main__":
    with torch.no_grad():
        main(*sys.argv[1:])
