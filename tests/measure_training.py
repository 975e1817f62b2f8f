"""How much memory a training step holds, as multiples of the weights: fine-tuning of a random PaliGemma on one picture.

    python tests/measure_training.py                    all weights, a part of them frozen, and LoRA; a minute
    python tests/measure_training.py --layers 18 --width 2048 --mlp 16384 --only lora      the decoder of a 3B: 10 GB

Each way runs in a process of its own: the most memory that it has held, less what it held after the imports, over the
bytes of all weights in float32. Linux only (/proc).
"""
import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WAYS = {"all": [], "frozen": ["--freeze", "*.self_attn.*"], "lora": ["--lora", "language_model.*_proj", "--rank", "8"]}


def memory(field):
    """VmHWM, the most, or VmRSS, what is held now, in bytes."""
    return 1024 * int(re.search(rf"{field}:\s*(\d+)", Path("/proc/self/status").read_text())[1])


def config(layers, width, mlp):
    """A PaliGemma of the shipped vocabulary, with a tower of about a tenth of the decoder."""
    vision = {"hidden_size": width // 4, "intermediate_size": width, "num_hidden_layers": layers, "image_size": 224,
              "num_attention_heads": 4, "patch_size": 14, "vision_use_head": False, "model_type": "siglip_vision_model"}
    text = {"model_type": "gemma", "hidden_size": width, "intermediate_size": mlp, "num_hidden_layers": layers,
            "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": width // 8, "vocab_size": 2048,
            "max_position_embeddings": 512}
    return {"architectures": ["PaliGemmaForConditionalGeneration"], "model_type": "paligemma",
            "image_token_index": 2047, "projection_dim": width, "vision_config": vision, "text_config": text}


def write_model(folder, sizes):
    """A checkpoint of random weights in float32, an example to learn; -> the bytes of its weights."""
    import shutil

    import numpy as np
    from PIL import Image

    from minipali.checkpoint.config import parse_config
    from minipali.checkpoint.hub import save
    from minipali.checkpoint.tensors import param_shapes, unflatten
    rng, written = np.random.default_rng(0), {}
    for name, shape in param_shapes(parse_config(config(*sizes))).items():
        written[name] = rng.standard_normal(shape, np.float32) * np.float32(0.02)
    save(folder, config(*sizes), unflatten(written), "float32")
    shutil.copy(ROOT / "weights" / "tokenizer.json", folder)
    Image.fromarray(rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)).save(folder / "a.png")
    (folder / "data.jsonl").write_text(json.dumps({"image": "a.png", "prefix": "caption en", "suffix": "a red circle"}))
    return sum(x.nbytes for x in written.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for option, default in [("--layers", 12), ("--width", 1024), ("--mlp", 4096), ("--workers", 0), ("--batch", 1)]:
        parser.add_argument(option, type=int, default=default)
    parser.add_argument("--only", choices=WAYS)
    parser.add_argument("--inside", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        from minipali.commands import train
        before = memory("VmRSS")
        train.main(args.inside)
        print(memory("VmHWM") - before)
        return
    with tempfile.TemporaryDirectory() as folder:
        pid = os.fork()  # so that what was needed to write the model is gone
        if not pid:
            Path(folder, "size").write_text(str(write_model(Path(folder), (args.layers, args.width, args.mlp))))
            os._exit(0)
        os.waitpid(pid, 0)
        size = int(Path(folder, "size").read_text())
        print(f"weights: {size / 1e9:.2f} GB in float32")
        for way, options in WAYS.items():
            if args.only not in (None, way):
                continue
            command = ["--from", folder, "--data", f"{folder}/data.jsonl", "--out", f"{folder}/{way}", "--runs",
                       f"{folder}/runs-{way}", "--steps", "2", "--batch", str(args.batch),
                       "--workers", str(args.workers), *options]
            out = subprocess.run([sys.executable, __file__, "--inside", *command], check=True, text=True,
                                 capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)}).stdout
            print(f"{way}: {int(out.split()[-1]) / size:.2f} times the weights", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
