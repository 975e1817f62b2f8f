"""The shipped model in `transformers` beside run.py: the same activations, and the same text on fifty pictures.

    pip install torch==2.13.0 transformers==5.23.0
    python tests/golden/compare_default.py [FOLDER]

Loads the folder unchanged, with its own processor and tokenizer, and runs both in float32 on held-out pictures, every
second one of drawings (their cache is made by `python -m minipali.small_world.artwork`). Prints the largest difference
of each kind of activation as a share of the tensor's largest value, and which texts differ.
"""
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.numpy import load_file
from transformers import AutoProcessor, PaliGemmaForConditionalGeneration

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from minipali.decoding.generate import generate
from minipali.decoding.loaded_model import encode_prompt, load_model
from minipali.decoding.sampling import Decoding
from minipali.small_world import artwork, drawing_tasks, drawings, tasks, world

PICTURES, LIMIT = 50, 1e-5


def module_outputs(model, inputs):
    """Every module's output under its name, less the outer `model.`, and the model's own output."""
    outputs = {}

    def note(name):
        def hook(_, __, output):
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(output, torch.Tensor):
                outputs.setdefault(name, output.detach().numpy())
        return hook
    hooks = [module.register_forward_hook(note(name.removeprefix("model."))) for name, module in model.named_modules()]
    with torch.no_grad():
        result = model(**inputs)
    for hook in hooks:
        hook.remove()
    return outputs, result


def theirs_of(name):
    """Our name for an activation -> theirs: towers are flattened, and the decoder is no longer inside a `model`."""
    return name.replace("vision_tower.vision_model.", "vision_tower.").replace("language_model.model.",
                                                                               "language_model.")


def picture_and_prompt(number, drawn):
    """A held-out picture, of drawings if the number is odd, and a prompt about it, of another kind each time."""
    rng = np.random.default_rng(number)
    if number % 2:
        scene = drawings.draw((9, number), drawn, "test")
        asked = [drawing_tasks.ask(task, scene, rng, drawn.names) for task in drawing_tasks.TASKS if task != "segment"]
        prompts = [example[0] for example in asked if example is not None]
    else:
        scene = world.draw((9, number), "test")
        prompts = [prefix for _, prefix, _ in tasks.examples(scene, rng) if "segment" not in prefix]
    return Image.fromarray(scene.image), prompts[number // 2 % len(prompts)]


def main(folder):
    theirs = PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    theirs.eval()
    processor, ours = AutoProcessor.from_pretrained(folder), load_model(folder)
    drawn, worst, same = drawings.gallery((artwork.VALIDATION,)), {}, 0
    for number in range(PICTURES):
        picture, prompt = picture_and_prompt(number, drawn)
        inputs = processor(text="<image>" + prompt, images=picture, return_tensors="pt")
        if number < 5:
            with tempfile.TemporaryDirectory() as scratch:
                picture.save(f"{scratch}/picture.png")
                subprocess.run([sys.executable, ROOT / "run.py", f"{scratch}/picture.png", prompt, "--model", folder,
                                "--dump",
                                f"{scratch}/dump.safetensors", "--max-new-tokens", "1"], check=True,
                               capture_output=True)
                dumped = load_file(f"{scratch}/dump.safetensors")
            outputs, result = module_outputs(theirs, inputs)
            outputs |= {"logits": result.logits[:, -1].detach().numpy(), "pixel_values": inputs["pixel_values"].numpy()}
            assert np.array_equal(dumped["input_ids"], inputs["input_ids"].numpy()), "input_ids differ"
            compared = 0
            for name, x in dumped.items():
                if (y := outputs.get(theirs_of(name))) is not None and y.shape == x.shape:
                    kind = re.sub(r"\.\d+\.", ".*.", re.sub(r"\.\d+$", ".*", name))
                    worst[kind] = max(worst.get(kind, 0), float(np.abs(x - y).max() / np.abs(y).max()))
                    compared += 1
            print(f"picture {number}: {compared} of {len(dumped) - 1} activations compared", flush=True)
        with torch.no_grad():
            ids = theirs.generate(**inputs, max_new_tokens=160, do_sample=False)[0, inputs["input_ids"].shape[1]:]
        text = processor.tokenizer.decode(ids[ids != ours.cfg.eos_token_ids[0]], skip_special_tokens=False)
        [answer] = generate(ours, ours.features([picture]), [encode_prompt(prompt, ours)], Decoding(max_new_tokens=160))
        said = ours.tokenizer.decode(answer.ids)
        same += said == text
        if said != text:
            print(f"{prompt!r}: ours {said!r}, theirs {text!r}")
    for kind, difference in sorted(worst.items(), key=lambda item: item[1]):
        print(f"{difference:9.1e}  {kind}")
    print(f"largest difference {max(worst.values()):.1e} (limit {LIMIT:.0e}), "
          f"same text on {same} of {PICTURES} pictures")
    return max(worst.values()) > LIMIT or same < PICTURES


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else str(ROOT / "weights")))
