"""Write golden/captions.json: captions as the hub's own classes read them, and the logits. No test runs this.

    pip install torch==2.13.0 transformers==5.24.0 sentencepiece==0.2.3 protobuf
    PYTHONPATH=.:tests python tests/golden/make_captions_golden.py

A small random SigLIP with each of the tokenizers that the two generations come with. The weights are drawn by NumPy's
RandomState, whose numbers never change, so that the tests draw them again.
"""
import base64
import json
import tempfile
from pathlib import Path

import numpy as np
from golden.make_tokenizer_golden import read_packed
from PIL import Image

from minipali.checkpoint.config import parse_config
from minipali.checkpoint.hub import save
from minipali.checkpoint.tensors import param_shapes, unflatten

FOLDER = Path(__file__).parent
CAPTIONS = ["a photo of 2 cats", "A Photo of 2 Dogs!", "  the   red, star. ", "don't; stop - it (now)", "", "...",
            "ﬁne ①② ＡＢ é e\u0301 İSTANBUL ΣΑΣ", "日本語 ▁a▁▁b", "circle " * 30, "tab\tand\nline", "a/b <c> {d} @#$%"]
PICTURES = 3


def config(vocab_size):
    return {"model_type": "siglip", "vision_config": {
        "model_type": "siglip_vision_model", "hidden_size": 12, "intermediate_size": 10, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 8, "patch_size": 4}, "text_config": {
        "model_type": "siglip_text_model", "hidden_size": 8, "intermediate_size": 9, "num_hidden_layers": 2,
        "num_attention_heads": 2, "vocab_size": vocab_size, "projection_size": 12, "max_position_embeddings": 16}}


def weights(vocab_size):
    """The tree of a small SigLIP's parameters, the same each time."""
    rng, shapes = np.random.RandomState(7), param_shapes(parse_config(config(vocab_size)))
    return unflatten({name: (rng.standard_normal(shape) * 0.5).astype(np.float32) for name, shape in shapes.items()})


def pictures():
    rng = np.random.RandomState(8)
    return [Image.fromarray(rng.randint(0, 256, (8, 8, 3)).astype(np.uint8)) for _ in range(PICTURES)]


def write_tokenizer(folder, kind):
    """The files of one of the tokenizers: what the hub's folders hold -> the number of its tokens."""
    models, specs = read_packed("unigram")["models"], read_packed("unigram")["specs"]
    spiece = base64.b64decode(models["siglip 1"]["model"])
    declared = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": {"content": "</s>", "__type": "AddedToken"},
                "tokenizer_class": "SiglipTokenizer", "model_max_length": 16, "do_lower_case": True}
    if kind == "siglip 1":
        (folder / "spiece.model").write_bytes(spiece)
    else:
        spec = specs["siglip 2"] if kind == "siglip 2, saved again" else specs["siglip 2"] | {
            "normalizer": specs["siglip 2"]["normalizer"]["normalizers"][1]}
        a, end = {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<eos>", "type_id": 0}}
        spec["post_processor"] = {"type": "TemplateProcessing", "single": [a, end], "pair": [a, a, end],
                                  "special_tokens": {"<eos>": {"id": "<eos>", "ids": [1], "tokens": ["<eos>"]}}}
        (folder / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
        declared = {"eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>", "pad_token": "<pad>",
                    "tokenizer_class": "TokenizersBackend" if "again" in kind else "GemmaTokenizerFast",
                    "padding_side": "right", "add_bos_token": False, "add_eos_token": True, "model_max_length": 16}
    (folder / "tokenizer_config.json").write_text(json.dumps(declared), encoding="utf-8")
    if kind == "siglip 1":
        return len(read_packed("unigram")["specs"]["t5"]["model"]["vocab"])
    return 1 + max([*spec["model"]["vocab"].values(), *(token["id"] for token in spec["added_tokens"])])


KINDS = ["siglip 1", "siglip 2", "siglip 2, saved again"]


def main():
    import torch
    import transformers
    from transformers import AutoModel, AutoTokenizer
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    golden = {"transformers": transformers.__version__, "cases": {}}
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            size = write_tokenizer(folder, kind)
            save(folder, config(size), weights(size), "float32")
            tokenizer = AutoTokenizer.from_pretrained(folder)
            # GemmaTokenizer itself does not make letters small, though its SigLIP was trained on small ones.
            captions = [caption.lower() for caption in CAPTIONS] if kind == "siglip 2" else CAPTIONS
            ids = tokenizer(captions, padding="max_length", truncation=True, max_length=16)["input_ids"]
            model = AutoModel.from_pretrained(folder).double().eval()
            pixels = SiglipImageProcessorPil(size={"height": 8, "width": 8})(pictures())["pixel_values"]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor(ids), pixel_values=torch.tensor(np.array(pixels)).double())
            golden["cases"][kind] = {"class": type(tokenizer).__name__, "ids": ids,
                                     "logits": logits.logits_per_image.tolist()}
            print(kind, type(tokenizer).__name__, ids[1], tokenizer.pad_token)
    (FOLDER / "captions.json").write_text(json.dumps(golden, separators=(",", ":")) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
