"""What a checkpoint holds, without loading it:

    python -m minipali inspect PATH
    python -m minipali inspect PATH --save-int8 OUT      the same model with its matrices in 8 bits, in another folder
"""
import math
import re
from collections import Counter
from pathlib import Path

from minipali.checkpoint import folder_of, open_any
from minipali.checkpoint.config import SiglipConfig
from minipali.checkpoint.int8_file import save_int8
from minipali.checkpoint.safetensors_file import ITEM_BYTES
from minipali.checkpoint.tensors import count_parameters, family
from minipali.errors import InputError, Parser, path_name


def _describe(cfg):
    """The sizes of a model in a line or two: how it sees, if it does, and how it reads."""
    vision, text = cfg.vision_config, cfg.text_config
    if vision:
        yield (f"picture: {vision.image_size}x{vision.image_size} as {vision.num_patches} patches, "
               f"{vision.num_hidden_layers} layers of width {vision.hidden_size}, {vision.num_attention_heads} heads")
    if isinstance(cfg, SiglipConfig):
        yield (f"text: {text.max_position_embeddings} tokens out of {text.vocab_size}, "
               f"{text.num_hidden_layers} layers of width {text.hidden_size}, {text.num_attention_heads} heads")
    else:
        yield (f"text: tokens out of {text.vocab_size}, {text.num_hidden_layers} layers of width {text.hidden_size}, "
               f"{text.num_attention_heads} query heads on {text.num_key_value_heads} key/value heads of "
               f"{text.head_dim}")


def summary(path):
    """What a checkpoint holds, in lines: family, sizes, parameters, then every tensor, those of all layers as one."""
    cfg, tensors = open_any(path)
    total = sum(math.prod(stored.shape) * ITEM_BYTES[stored.dtype] for stored in tensors.values())
    files = len({stored.path for stored in tensors.values()})
    yield (f"{family(cfg)}: {count_parameters(cfg):,} parameters in {len(tensors)} tensors, {total / 1e6:,.1f} MB in "
           f"{files} " + ("file" if files == 1 else "files"))
    yield from _describe(cfg)
    alike = Counter((re.sub(r"(\.layers\.|/encoderblock_)\d+", r"\1*", name), stored.dtype, stored.shape)
                    for name, stored in tensors.items())
    for (name, dtype, shape), count in alike.items():
        yield f"{count:4} x {dtype:4} {list(shape)!s:20} {name}"


def main(argv):
    parser = Parser("minipali inspect", "Print what a checkpoint holds, without loading it.",
                    "  python -m minipali inspect weights\n"
                    "  python -m minipali inspect paligemma-3b-mix-224.npz")
    parser.add_argument("path", type=path_name, metavar="PATH",
                        help="a folder with config.json and *.safetensors, or a big_vision .npz file")
    parser.add_argument("--save-int8", type=path_name, metavar="OUT",
                        help="write the checkpoint into the folder OUT with its matrices in 8 bits")
    args = parser.parse_args(argv)
    if args.save_int8 is not None:
        if folder_of(args.path) != Path(args.path):
            raise InputError(f"--save-int8: {args.path} is an .npz file, expected a folder in the hub's layout")
        save_int8(args.path, args.save_int8)
        args.path = args.save_int8
    for line in summary(args.path):
        print(line)
