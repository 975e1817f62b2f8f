"""Write golden/prompts.json: prompts as the hub's PaliGemmaProcessor reads them. No test runs this.

    pip install transformers==5.24.0 tokenizers pillow
    PYTHONPATH=tests python tests/golden/make_prompts_golden.py
"""
import json
from pathlib import Path

from golden.make_tokenizer_golden import awkward

PROMPTS = [["abc xy", 1], ["", 1], [" abc", 1], ["\nabc", 1], ["<loc0000>ab", 1], ["abc", 2]]


def main():
    import transformers
    from PIL import Image
    from tokenizers import Tokenizer
    from transformers import PaliGemmaProcessor, PreTrainedTokenizerFast
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    letters = Tokenizer.from_str(json.dumps(awkward("bytes")))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=letters, bos_token="<bos>", eos_token="<eos>",
                                        pad_token="<pad>", unk_token="<unk>", additional_special_tokens=["<image>"])
    images = SiglipImageProcessorPil(size={"height": 8, "width": 8})
    images.image_seq_length = 4
    process, image = PaliGemmaProcessor(images, tokenizer), tokenizer.convert_tokens_to_ids("<image>")
    cases = []
    for prompt, pictures in PROMPTS:
        shown = [[Image.new("RGB", (8, 8))] * pictures]
        ids = process(images=shown, text=["<image>" * pictures + prompt])["input_ids"][0]
        assert ids[:4 * pictures] == [image] * 4 * pictures
        cases.append({"prompt": prompt, "pictures": pictures, "ids": ids[4 * pictures:]})
    golden = {"transformers": transformers.__version__, "cases": cases}
    Path(__file__).with_name("prompts.json").write_text(json.dumps(golden) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
