"""The same small models as big_vision's arrays, written the way its code writes them."""
import struct

import numpy as np

ATTENTION = "MultiHeadDotProductAttention_0"


def at(shape, element):
    """The array of `shape` whose element [i, j, …] is element(i, j, …)."""
    return element(*np.indices(shape))


def mlp_arrays(of):
    return {"MlpBlock_0/Dense_0/kernel": of("mlp.fc1.weight").swapaxes(-1, -2),
            "MlpBlock_0/Dense_1/kernel": of("mlp.fc2.weight").swapaxes(-1, -2),
            "MlpBlock_0/Dense_0/bias": of("mlp.fc1.bias"), "MlpBlock_0/Dense_1/bias": of("mlp.fc2.bias")}


def encoder_arrays(flat, root, cfg):
    """The layers of an encoder, stacked."""
    L, D, N = cfg.num_hidden_layers, cfg.hidden_size, cfg.num_attention_heads
    H = D // N

    def of(name):
        return np.stack([flat[f"{root}.{i}.{name}"] for i in range(L)])

    arrays = mlp_arrays(of)
    for i in "01":
        arrays[f"LayerNorm_{i}/scale"] = of(f"layer_norm{int(i) + 1}.weight")
        arrays[f"LayerNorm_{i}/bias"] = of(f"layer_norm{int(i) + 1}.bias")
    for theirs, hub in [("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")]:
        w, b = of(f"self_attn.{hub}.weight"), of(f"self_attn.{hub}.bias")
        arrays[f"{ATTENTION}/{theirs}/kernel"] = at((L, D, N, H), lambda layer, d, n, h, w=w: w[layer, n * H + h, d])
        arrays[f"{ATTENTION}/{theirs}/bias"] = at((L, N, H), lambda layer, n, h, b=b: b[layer, n * H + h])
    w = of("self_attn.out_proj.weight")
    arrays[f"{ATTENTION}/out/kernel"] = at((L, N, H, D), lambda layer, n, h, d: w[layer, d, n * H + h])
    arrays[f"{ATTENTION}/out/bias"] = of("self_attn.out_proj.bias")
    return arrays


def vision_arrays(flat, root, cfg, scanned):
    kernel = flat[f"{root}.embeddings.patch_embedding.weight"]
    arrays = {"img/embedding/kernel": at((cfg.patch_size, cfg.patch_size, 3, cfg.hidden_size),
                                         lambda y, x, c, d: kernel[d, c, y, x]),
              "img/embedding/bias": flat[f"{root}.embeddings.patch_embedding.bias"],
              "img/pos_embedding": flat[f"{root}.embeddings.position_embedding.weight"][None],
              "img/Transformer/encoder_norm/scale": flat[f"{root}.post_layernorm.weight"],
              "img/Transformer/encoder_norm/bias": flat[f"{root}.post_layernorm.bias"]}
    return arrays | blocks("img/Transformer", encoder_arrays(flat, f"{root}.encoder.layers", cfg), scanned)


def blocks(root, stacked, scanned):
    """All layers in one array, or an array for each layer, as the older files have it."""
    if scanned:
        return {f"{root}/encoderblock/{name}": x for name, x in stacked.items()}
    return {f"{root}/encoderblock_{i}/{name}": x for name, stack in stacked.items() for i, x in enumerate(stack)}


def head_arrays(flat, root, cfg):
    D, N = cfg.hidden_size, cfg.num_attention_heads
    H = D // N
    of = {name.removeprefix(f"{root}."): x for name, x in flat.items()}.__getitem__
    arrays = mlp_arrays(of)
    w, b, out = of("attention.in_proj_weight"), of("attention.in_proj_bias"), of("attention.out_proj.weight")
    for j, one in enumerate(["query", "key", "value"]):
        arrays[f"{ATTENTION}/{one}/kernel"] = at((D, N, H), lambda d, n, h, j=j: w[j * D + n * H + h, d])
        arrays[f"{ATTENTION}/{one}/bias"] = at((N, H), lambda n, h, j=j: b[j * D + n * H + h])
    arrays[f"{ATTENTION}/out/kernel"] = at((N, H, D), lambda n, h, d: out[d, n * H + h])
    arrays |= {f"{ATTENTION}/out/bias": of("attention.out_proj.bias"), "probe": of("probe"),
               "LayerNorm_0/scale": of("layernorm.weight"), "LayerNorm_0/bias": of("layernorm.bias")}
    return {f"img/MAPHead_0/{name}": x for name, x in arrays.items()}


def paligemma_arrays(flat, cfg):
    text = cfg.text_config
    L, D, F, H = text.num_hidden_layers, text.hidden_size, text.intermediate_size, text.head_dim
    N, K = text.num_attention_heads, text.num_key_value_heads
    root = "language_model.model"

    def of(name):
        return np.stack([flat[f"{root}.layers.{i}.{name}.weight"] for i in range(L)])

    q, k, v, o = (of(f"self_attn.{name}_proj") for name in "qkvo")
    gate, up, down = (of(f"mlp.{name}_proj") for name in ["gate", "up", "down"])
    arrays = {"attn/attn_vec_einsum/w": at((L, N, H, D), lambda layer, n, h, d: o[layer, d, n * H + h]),
              "mlp/gating_einsum": at((L, 2, D, F), lambda layer, i, d, f: np.where(
                  i == 0, gate[layer, f, d], up[layer, f, d])),
              "mlp/linear": at((L, F, D), lambda layer, f, d: down[layer, d, f]),
              "pre_attention_norm/scale": of("input_layernorm")}
    if N == K:
        arrays["attn/qkv_einsum/w"] = at((L, 3, N, D, H), lambda layer, i, n, d, h: np.choose(
            i, [x[layer, n * H + h, d] for x in (q, k, v)]))
    else:
        arrays["attn/q_einsum/w"] = at((L, N, D, H), lambda layer, n, d, h: q[layer, n * H + h, d])
        arrays["attn/kv_einsum/w"] = at((L, 2, K, D, H), lambda layer, i, n, d, h: np.where(
            i == 0, k[layer, n * H + h, d], v[layer, n * H + h, d]))
    if text.post_norms:
        arrays |= {"post_attention_norm/scale": of("post_attention_layernorm"),
                   "pre_ffw_norm/scale": of("pre_feedforward_layernorm"),
                   "post_ffw_norm/scale": of("post_feedforward_layernorm")}
    else:
        arrays["pre_ffw_norm/scale"] = of("post_attention_layernorm")
    return {f"llm/layers/{name}": x for name, x in arrays.items()} | {
        "llm/embedder/input_embedding": flat[f"{root}.embed_tokens.weight"],
        "llm/final_norm/scale": flat[f"{root}.norm.weight"],
        "img/head/kernel": flat["multi_modal_projector.linear.weight"].T,
        "img/head/bias": flat["multi_modal_projector.linear.bias"]}


def to_big_vision(flat, cfg, scanned=(True, True)):
    """The hub's parameters -> big_vision's arrays; `scanned`: whether each tower's layers are stacked."""
    if hasattr(cfg, "image_token_index"):
        return (vision_arrays(flat, "vision_tower.vision_model", cfg.vision_config, scanned[0])
                | paligemma_arrays(flat, cfg))
    text = blocks("txt/Encoder_0", encoder_arrays(flat, "text_model.encoder.layers", cfg.text_config), scanned[1])
    return vision_arrays(flat, "vision_model", cfg.vision_config, scanned[0]) | text | head_arrays(
        flat, "vision_model.head", cfg.vision_config) | {
        "txt/Embed_0/embedding": flat["text_model.embeddings.token_embedding.weight"],
        "txt/pos_embedding": flat["text_model.embeddings.position_embedding.weight"][None],
        "txt/Encoder_0/encoder_norm/scale": flat["text_model.final_layer_norm.weight"],
        "txt/Encoder_0/encoder_norm/bias": flat["text_model.final_layer_norm.bias"],
        "txt/head/kernel": flat["text_model.head.weight"].T, "txt/head/bias": flat["text_model.head.bias"],
        "t": flat["logit_scale"], "b": flat["logit_bias"]}


def write_npz(path, arrays, prefix="params/", save_arrays=np.savez):
    save_arrays(path, **{prefix + name: x for name, x in arrays.items()})
    return path


def npy(header, data=b"", version=(1, 0)):
    """The bytes of an .npy file with any header."""
    header = (header if isinstance(header, str) else repr(header)).encode()
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H", len(header)) + header + data


def described(shape, dtype="<f4"):
    return {"descr": dtype, "fortran_order": False, "shape": shape}
