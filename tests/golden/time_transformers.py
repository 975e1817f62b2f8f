"""How long `transformers` takes for what `python -m minipali bench` measures, on this CPU and in float32.

    pip install torch==2.13.0 transformers==5.24.0
    python tests/golden/time_transformers.py FOLDER 2,15678,659,108 12

The last two arguments are the prompt's ids and the number of tokens to write. Two answers, of which the second counts.
"""
import json
import resource
import statistics
import sys
import time

import torch
from transformers import PaliGemmaForConditionalGeneration


def answer(model, ids, pixels, count):
    """Seconds to the first token, then seconds of each further one."""
    start = time.perf_counter()
    out = model(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids),
                token_type_ids=torch.zeros_like(ids), use_cache=True, logits_to_keep=1)
    first, steps = time.perf_counter() - start, []
    for length in range(ids.shape[1] + 1, ids.shape[1] + max(count, 2)):
        start = time.perf_counter()
        out = model(input_ids=out.logits[:, -1:].argmax(-1), attention_mask=torch.ones(1, length, dtype=ids.dtype),
                    past_key_values=out.past_key_values, use_cache=True)
        steps.append(time.perf_counter() - start)
    return first, steps


def main(folder, prompt, count):
    started = time.perf_counter()
    model = PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    loaded = time.perf_counter() - started
    vision = model.config.vision_config
    picture = [model.config.image_token_id] * (vision.image_size // vision.patch_size) ** 2
    ids = torch.tensor([picture + [int(i) for i in prompt.split(",")]])
    pixels = torch.rand(1, 3, vision.image_size, vision.image_size) * 2 - 1
    answer(model, ids, pixels, 1)
    first, steps = answer(model, ids, pixels, int(count))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(json.dumps({"load_seconds": loaded, "first_token_seconds": first,
                      "tokens_per_second": 1 / statistics.median(steps),
                      "answer_seconds": first + sum(steps[:int(count) - 1]), "peak_rss_bytes": peak,
                      "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    with torch.no_grad():
        main(*sys.argv[1:])
