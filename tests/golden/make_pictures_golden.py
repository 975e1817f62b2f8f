"""Write pictures.safetensors: several pictures in one prompt, laid out and answered by `transformers` in float64.

    pip install torch==2.13.0 transformers==5.23.0 tokenizers pillow safetensors
    python tests/golden/make_pictures_golden.py

The models are those of paligemma1.safetensors and paligemma2.safetensors; the order of the tokens is that of the hub's
own PaliGemmaProcessor, given several pictures for one text. The tests never run this.
"""
import json

import make_golden  # lifts what transformers keeps in float32
import numpy as np
import torch
import transformers
from make_golden import (
    BOS,
    EOS,
    FOLDER,
    GEMMA,
    GEMMA2,
    IMAGE,
    NEW_TOKENS,
    NEWLINE,
    VERSION,
    VISION,
)
from PIL import Image
from safetensors.numpy import load_file, save
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.siglip.image_processing_pil_siglip import (
    SiglipImageProcessorPil,
)

SIDE = VISION["image_size"]


def processor():
    """The hub's, with a vocabulary of letters: "a" is token 7 and so on."""
    vocab = {"<pad>": 0, "<eos>": EOS, "<bos>": BOS, "<unk>": 3, "\n": NEWLINE, "<image>": IMAGE}
    vocab |= {letter: 7 + i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz")}
    letters = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    letters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="<bos>", eos_token="<eos>",
                                        pad_token="<pad>", unk_token="<unk>", additional_special_tokens=["<image>"])
    images = SiglipImageProcessorPil(size={"height": SIDE, "width": SIDE})
    images.image_seq_length = (SIDE // VISION["patch_size"]) ** 2
    return PaliGemmaProcessor(images, tokenizer)


def model_of(name, text):
    config = PaliGemmaConfig(vision_config=VISION | {"model_type": "siglip_vision_model", "vision_use_head": False},
                             text_config=text, image_token_index=IMAGE, projection_dim=text["hidden_size"],
                             bos_token_id=BOS, eos_token_id=EOS, pad_token_id=0)
    config.vision_config.projection_dim = text["hidden_size"]
    config._attn_implementation = "eager"
    model = PaliGemmaForConditionalGeneration(config).eval()
    weights = load_file(FOLDER / f"{name}.safetensors")
    with torch.no_grad():
        for key, p in model.named_parameters():
            p.copy_(torch.tensor(weights[f"weights/{make_golden.checkpoint_name(key)}"].astype(np.float64)))
    return model


def main():
    rng, process, tensors = np.random.default_rng(4), processor(), {}
    for count, prompt in [(2, "abca"), (3, "")]:
        bytes_ = rng.integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)
        inputs = process(images=[[Image.fromarray(x) for x in bytes_]], text=["<image>" * count + prompt],
                         return_tensors="np")
        tensors |= {f"{count}/pictures": bytes_, f"{count}/input_ids": inputs["input_ids"]}
        pixels = torch.tensor(inputs["pixel_values"].astype(np.float64)).reshape(count, 3, SIDE, SIDE)
        given = {key: torch.tensor(inputs[key]) for key in ["input_ids", "attention_mask", "token_type_ids"]}
        for name, text in [("paligemma1", GEMMA), ("paligemma2", GEMMA2)]:
            found = model_of(name, text).generate(
                pixel_values=pixels, **given, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None,
                return_dict_in_generate=True, output_logits=True)
            tensors[f"{count}/{name}/greedy_ids"] = found.sequences[:, -NEW_TOKENS:].numpy()
            tensors[f"{count}/{name}/greedy_logits"] = torch.stack(found.logits, 1).numpy()
    path = FOLDER / "pictures.safetensors"
    metadata = {"format": "minipali golden", "version": VERSION, "config": json.dumps({}),
                "written_by": f"transformers {transformers.__version__}, torch {torch.__version__}"}
    path.write_bytes(save({key: np.ascontiguousarray(x) for key, x in tensors.items()}, metadata))
    print(f"{path.name}: {len(tensors)} tensors, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    with make_golden.NoFloat32():
        main()
