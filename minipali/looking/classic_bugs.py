"""The classic bugs of ports: each is one line that somebody really got wrong, and where they told the public about it.

`python -m minipali lab` puts them into the running model one by one. None of them raises an error: shapes fit, numbers
are finite, and some let the model say a perfect sentence. That is why this repository compares activations, not text.
"""
from typing import NamedTuple

OPS, SIGLIP, GEMMA, PALIGEMMA = (f"minipali.model.{name}" for name in ("ops", "siglip", "gemma", "paligemma"))
IMAGE, LOADED = "minipali.inputs.image", "minipali.decoding.loaded_model"


class ClassicBug(NamedTuple):
    """`old` stands exactly once in `function` of `module` ("Class.method" for a method), and `new` takes its place."""
    name: str
    module: str
    function: str
    what: str
    old: str
    new: str
    source: str


BUGS = [
    # The picture, before the model sees it.
    ClassicBug("bgr", IMAGE, "preprocess", "the channels come in the order blue, green, red",
               "pixels.transpose(2, 0, 1)", "pixels[..., ::-1].transpose(2, 0, 1)",
               "https://github.com/qubvel/classification_models/issues/4"),
    ClassicBug("pixels-from-zero", IMAGE, "preprocess", "pixels go from 0 to 1 and not from -1 to 1",
               "(pixels - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)", "pixels",
               "https://github.com/vllm-project/semantic-router/pull/1928"),
    ClassicBug("imagenet-colors", IMAGE, "preprocess", "normalized with the mean and deviation of ImageNet",
               "(pixels - np.asarray(mean, np.float32)) / np.asarray(std, np.float32)",
               "(pixels - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])",
               "https://github.com/vllm-project/vllm/pull/37978"),
    # The prompt.
    ClassicBug("no-bos", LOADED, "encode_prompt", "the prompt begins without BOS",
               "[model.cfg.bos_token_id, *", "[*",
               "https://github.com/EleutherAI/lm-evaluation-harness/pull/1465"),
    ClassicBug("no-newline", LOADED, "encode_prompt", "the prompt ends without the newline that says: now answer",
               'text + "\\n" if', "text if",
               "https://github.com/huggingface/transformers/issues/35200"),
    # The vision tower.
    ClassicBug("patches-by-reshape", SIGLIP, "patchify", "patches are cut by a reshape alone: strips, not squares",
               "squares.transpose(0, 2, 4, 1, 3, 5)", "squares",
               "https://github.com/duoan/TorchCode/issues/21"),
    ClassicBug("patches-by-column", SIGLIP, "patchify", "patches are numbered down the columns",
               "squares.transpose(0, 2, 4, 1, 3, 5)", "squares.transpose(0, 4, 2, 1, 3, 5)",
               "https://github.com/vllm-project/vllm/pull/52932"),
    ClassicBug("channels-last", SIGLIP, "patchify",
               "inside a patch the channel comes last, where the kernel has it first",
               "squares.transpose(0, 2, 4, 1, 3, 5)", "squares.transpose(0, 2, 4, 3, 5, 1)",
               "https://github.com/lablup/mlxcel/issues/1610"),
    ClassicBug("no-patch-positions", SIGLIP, "patch_embeddings", "the learned positions of the patches are not added",
               'x + p["position_embedding"]["weight"]', "x",
               "https://github.com/ml-explore/mlx-lm/pull/93"),
    ClassicBug("scale-by-width", SIGLIP, "self_attention", "scores are divided by the root of the width, not of a head",
               "1 / math.sqrt(q.shape[-1])", "1 / math.sqrt(x.shape[-1])",
               "https://github.com/FareedKhan-dev/train-llm-from-scratch/pull/3"),
    ClassicBug("one-layer-short", SIGLIP, "encoder", "the last layer of the tower is left out",
               'enumerate(p["layers"])', 'enumerate(p["layers"][:-1])',
               "https://github.com/vllm-project/vllm/pull/8155"),
    ClassicBug("no-post-layernorm", SIGLIP, "vision_tower", "the norm behind the last layer is left out",
               'return tap("post_layernorm", layer_norm(x, **p["post_layernorm"], eps=cfg.layer_norm_eps))', "return x",
               "https://github.com/LLaVA-VL/LLaVA-NeXT/issues/346"),
    # Attention.
    ClassicBug("no-scale", OPS, "attention_weights", "scores are not divided by the root of a head's size",
               "reshape(B, N, T, S) * scale", "reshape(B, N, T, S)",
               "https://github.com/mlc-ai/mlc-llm/pull/3426"),
    ClassicBug("heads-not-transposed", OPS, "weighted_values", "heads are joined by a reshape without the transpose",
               "reshape(B, N, T, H).transpose(0, 2, 1, 3)", "reshape(B, T, N, H)",
               "https://github.com/jsbaan/transformer-from-scratch/pull/6"),
    # Norms and the MLP.
    ClassicBug("norm-without-one", OPS, "rms_norm", "the scale is read as Llama's: weight, not 1 + weight",
               "* (1 + weight)", "* weight",
               "https://github.com/linkedin/Liger-Kernel/issues/74"),
    ClassicBug("norm-with-two", OPS, "rms_norm", "1 is added to a scale that has it already: 2 + weight",
               "* (1 + weight)", "* (2 + weight)",
               "https://github.com/utensils/mold/pull/1078"),
    ClassicBug("norm-by-deviation", OPS, "rms_norm", "divided by the standard deviation, not by the root mean square",
               "np.sqrt((x * x).mean(-1, keepdims=True) + eps)", "np.sqrt(x.var(-1, keepdims=True) + eps)",
               "https://github.com/stanford-cs336/assignment1-basics/issues/93"),
    ClassicBug("silu", GEMMA, "mlp", "the gate goes through SiLU, as in Llama, and not through GELU",
               "gelu(gate) * up", "gate / (1 + np.exp(-gate)) * up",
               "https://github.com/huggingface/candle/issues/3745"),
    # Positions.
    ClassicBug("interleaved-rope", OPS, "rope", "rotary pairs are neighbors, not half a head apart",
               "x[..., :half], x[..., half:]", "x[..., ::2], x[..., 1::2]",
               "https://github.com/NeuraLegion/shainet/pull/111"),
    ClassicBug("position-zero", PALIGEMMA, "decode", "every written token stands at position 0",
               "cache.prefix_len[:, None] + steps", "0 * (cache.prefix_len[:, None] + steps)",
               "https://github.com/Blaizzy/mlx-vlm/issues/1983"),
    ClassicBug("position-too-far", PALIGEMMA, "decode", "every written token stands one position too far",
               "cache.prefix_len[:, None] + steps", "cache.prefix_len[:, None] + steps + 1",
               "https://github.com/microsoft/onnxruntime-genai/pull/2354"),
    # The prefix.
    ClassicBug("causal-prefix", GEMMA, "prefix_lm_mask",
               "the prefix is causal: the picture cannot look at the question",
               "(causal | both_in_prefix)", "causal",
               "https://github.com/Ke-Wang1017/openpi_subtask/issues/10"),
    ClassicBug("padding-attended", GEMMA, "prefix_lm_mask", "padding is looked at: only a batch of prompts shows it",
               "(k >= 0) & (causal", "(causal",
               "https://github.com/huggingface/transformers/pull/35859"),
    ClassicBug("text-not-scaled", GEMMA, "embed_tokens", "text tokens are not multiplied by the root of the width",
               " * math.sqrt(cfg.hidden_size)", "",
               "https://github.com/hkproj/pytorch-paligemma/issues/3"),
    ClassicBug("picture-scaled", PALIGEMMA, "join", "picture tokens are divided by the root of the width",
               "np.concatenate([features, text]",
               "np.concatenate([features * cfg.text_config.hidden_size ** -0.5, text]",
               "https://github.com/vllm-project/vllm/issues/52692"),
]
