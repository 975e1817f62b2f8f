"""What the X-ray page shows, against transformers and autograd (make_xray_golden.py), and against the model itself."""
import base64
import gzip
import json
import re
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from helpers import GOLDEN_FILES, ROOT, assert_close, random_params, random_pixels
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import load
from small_models import TEXT_CONFIG, model_config, write_model

import run
from minipali.__main__ import main
from minipali.backend import mapped
from minipali.checkpoint.config import parse_config
from minipali.checkpoint.matrices import Float32
from minipali.checkpoint.tensors import unflatten
from minipali.commands import xray as xray_command
from minipali.decoding.generate import Answer, generate
from minipali.decoding.loaded_model import Model
from minipali.decoding.sampling import Decoding
from minipali.inputs.image import Preprocessor
from minipali.looking import panels, sources, xray
from minipali.looking.attribution import (
    erase,
    erased_pictures,
    gradient_times_input,
    patch_map,
    windows,
)
from minipali.looking.gather import decoder_attention, observe, vision_attention
from minipali.looking.logit_lens import logit_lens
from minipali.looking.page import render
from minipali.looking.taps import place
from minipali.looking.xray import Xray, as_byte, scaled_bytes, spread
from minipali.model.gemma import KVCache
from minipali.model.ops import rope, softmax
from minipali.model.paligemma import forward, prefill

NAMES = ["paligemma1", "paligemma2"]


@cache
def golden_seen(name, dtype="float64"):
    """What was seen of the first example of a golden file, and what transformers saw of it."""
    with safe_open(GOLDEN_FILES / f"{name}.safetensors", "np") as file:
        config, tensors = json.loads(file.metadata()["config"]), {key: file.get_tensor(key) for key in file.keys()}
    cfg = parse_config(config)
    params = unflatten({key.removeprefix("weights/"): x.astype(dtype) for key, x in tensors.items()
                        if key.startswith("weights/")})
    model = Model(GOLDEN_FILES, cfg, None, Preprocessor(cfg.vision_config.image_size), "numpy", params)
    stored = load(gzip.decompress((GOLDEN_FILES / "xray.safetensors.gz").read_bytes()))
    reference = {key.removeprefix(f"{name}/"): x for key, x in stored.items() if key.startswith(name)}
    reference["logits"] = tensors["outputs/greedy_logits"][0, :len(reference["answer"])]
    pixels = tensors["inputs/pixel_values"][:1].astype(dtype)
    prompt = tensors["inputs/ids"][0, :tensors["inputs/prompt_lengths"][0]].tolist()
    return observe(model, pixels, prompt, Answer(ids=reference["answer"].tolist())), reference


def digest(x, axes):
    """The products of the last axes with fixed random numbers, as the golden file has them."""
    for _ in range(axes):
        x = x @ np.random.default_rng(x.shape[-1]).standard_normal(x.shape[-1]).astype(x.dtype)
    return x


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_against_transformers(name, dtype):
    """Attention of both towers, scores, the lens, gradients by the chain rule, and a picture with a part erased."""
    seen, reference = golden_seen(name, dtype)
    for tower, weights in [("decoder", decoder_attention(seen)), ("vision", vision_attention(seen))]:
        assert_close(tower, digest(weights.transpose(0, 2, 1, 3), 2), reference[f"{tower}_attention"], "golden")
    assert_close("logits", seen.logits, reference["logits"], "golden")
    assert_close("gradient", gradient_times_input(seen), reference["gradient_times_input"], "golden gradient")
    lens = logit_lens(seen)
    assert (lens.top == reference["lens.top"]).all() and (lens.rank == reference["lens.rank"]).all()
    assert_close("probability", digest(lens.probability, 1), reference["lens.probability"], "golden")
    assert_close("final", digest(lens.final, 1), reference["lens.final"], "golden")
    drop, answers = erase(seen)
    scale = np.abs(np.log(softmax(seen.logits))).max()
    assert_close("erased", drop, reference["erase.drop"], "golden", scale)
    assert len(answers) == 1


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_against_transformers(name):
    """Keys as they are cached, and their bytes.

    There places count from 1, which turns all keys by one place more and changes no score, and a layer with a window
    has forgotten what ours hides by its mask.
    """
    seen, reference = golden_seen(name)
    _, bytes_per_token = panels.cache_content(seen)
    cfg = seen.model.cfg.text_config
    for layer in range(cfg.num_hidden_layers):
        cached = panels.rotated(seen, layer)[2]
        assert len(cached) == seen.patches + len(seen.text)
        turned = rope(cached[None, -3:], np.ones((1, 3)), cfg.rope_thetas[layer])[0]
        assert_close(f"keys {layer}", digest(turned, 2), reference["cache.keys"][layer], "golden")
    assert bytes_per_token == reference["cache.bytes"].sum()


def test_cache_bytes_are_those_of_our_cache():
    seen, _ = golden_seen("paligemma2", "float32")
    cfg = seen.model.cfg
    kept = KVCache(seen.features, 1, seen.patches + len(seen.prompt), cfg.text_config)
    prefill(seen.features, np.array([seen.prompt]), np.array([len(seen.prompt)]), seen.model.params, cfg, kept)
    content, size = panels.cache_content(seen)
    assert size * kept.length == sum(x.nbytes for x in [*kept.keys, *kept.values])
    values = np.sqrt((np.stack(kept.values)[:, 0] ** 2).mean((2, 3)))
    assert_close("values", content[1::2, :kept.length], values, "golden")


@pytest.mark.parametrize("name", NAMES)
def test_turned_queries_and_keys_give_the_attention(name):
    """What the dial computes from q and k before the rotation is what the model's attention came from."""
    seen, _ = golden_seen(name)
    cfg, P = seen.model.cfg.text_config, seen.patches
    group = cfg.num_attention_heads // cfg.num_key_value_heads
    for layer in range(cfg.num_hidden_layers):
        q, _, cached = panels.rotated(seen, layer)
        positions = P + np.arange(len(q))[None]
        q = rope(q[None], positions / cfg.rope_factors[layer], cfg.rope_thetas[layer])[0]
        scores = np.einsum("tnh,snh->nts", q, cached.repeat(group, 1)) * cfg.query_pre_attn_scalar ** -0.5
        if cfg.attn_logit_softcapping:
            scores = cfg.attn_logit_softcapping * np.tanh(scores / cfg.attn_logit_softcapping)
        made, of_layer = panels.masks(seen)
        weights = softmax(np.where(made[of_layer[layer]][P:], scores, -1e300))
        weights = weights[:, seen.first:seen.first + len(seen.steps)]
        assert_close(f"layer {layer}", weights, decoder_attention(seen)[layer], "golden")


def small_seen(kind="gemma", pictures=1, most=9):
    cfg, rng = model_config(kind), np.random.default_rng(1)
    preprocessor = Preprocessor(cfg.vision_config.image_size)
    model = Model(ROOT / "nowhere", cfg, None, preprocessor, "numpy", random_params(cfg, rng))
    pixels = random_pixels(cfg, pictures, rng)
    features = model.features_of(pixels).reshape(1, -1, cfg.text_config.hidden_size)
    [answer] = generate(model, features, [[2, 7, 5]], Decoding(max_new_tokens=most))
    return observe(model, pixels, [2, 7, 5], answer)


@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
@pytest.mark.parametrize("pictures", [1, 2])
def test_gradients_by_small_differences(kind, pictures):
    """All features scaled by 1 + ε change the score by ε times the sum of the map."""
    seen = small_seen(kind, pictures)
    def score(factor):
        model, P = seen.model, seen.patches
        x = forward(seen.features * factor, np.array([seen.text]), np.array([len(seen.text)]),
                    np.array([P + len(seen.prompt)]), model.params, model.cfg)
        table = model.params["language_model"]["model"]["embed_tokens"]["weight"]
        logits = x[0, seen.first:seen.first + len(seen.steps)] @ table.T
        cap = model.cfg.text_config.final_logit_softcapping
        logits = cap * np.tanh(logits / cap) if cap else logits
        rows = np.arange(len(logits))
        others = logits.copy()
        others[rows, seen.steps] = -np.inf
        return logits[rows, seen.steps] - np.log(np.exp(others).sum(-1))

    found = gradient_times_input(seen)
    assert found.shape == (len(seen.steps), seen.patches)
    slope = (score(1 + 1e-6) - score(1 - 1e-6)) / 2e-6
    assert_close("sum of the map", found.sum(-1), slope, "gradient")


def test_gradients_through_compact_matrices():
    """The same map, whether the matrices are arrays or in a form that only multiplies."""
    seen, _ = golden_seen("paligemma2", "float32")
    compact = mapped(seen.model.params["language_model"], lambda w: Float32(w) if w.ndim == 2 else w)
    model = replace(seen.model, params=seen.model.params | {"language_model": compact})
    found = gradient_times_input(replace(seen, model=model))
    assert_close("gradient", found, gradient_times_input(seen), "golden gradient")


def test_erasing_paints_one_window():
    pixels = np.random.default_rng(0).standard_normal((3, 7, 7))
    [first] = erased_pictures(pixels, 3, windows(2))
    assert windows(3) == [(0, 0), (0, 1), (1, 0), (1, 1)] and windows(2) == [(0, 0)]
    assert (first[:, 6:] == pixels[:, 6:]).all() and (first[:, :, 6:] == pixels[:, :, 6:]).all()
    assert_close("painted", first[:, :6, :6], np.broadcast_to(pixels.mean((1, 2))[:, None, None], (3, 6, 6)), "formula")
    [_, second, *_] = erased_pictures(pixels, 2, windows(3))
    assert (second[:, :, :2] == pixels[:, :, :2]).all() and not (second[:, :4, 2:6] == pixels[:, :4, 2:6]).any()


def test_erasing_says_what_the_model_says_then():
    """Each window's answer and its drop, against the model asked about that picture alone."""
    seen = small_seen()
    drop, answers = erase(seen)
    assert drop.shape == (len(seen.steps), 4) and len(answers) == 4
    for number, pixels in enumerate(erased_pictures(seen.pixels[0], 3, windows(3))):
        [answer] = generate(seen.model, seen.model.features_of(pixels[None]), [seen.prompt],
                            Decoding(max_new_tokens=len(seen.answer) + 8))
        assert answers[number] == answer.ids
        again = observe(seen.model, pixels[None], seen.prompt, Answer(ids=seen.answer, stopped_by=(
            "eos" if len(seen.steps) > len(seen.answer) else "length")))
        rows = np.arange(len(seen.steps)), seen.steps
        expected = np.log(softmax(seen.logits))[rows] - np.log(softmax(again.logits))[rows]
        assert_close("drop", drop[:, number], expected, "reordered", 10)


def test_a_patch_gets_the_mean_of_its_windows():
    drop = np.array([[1.0, 2.0, 3.0, 4.0]])
    assert patch_map(drop, 3)[0].tolist() == [1, 1.5, 2, 2, 2.5, 3, 3, 3.5, 4]


def test_next_tokens_hold_all_probability_at_every_temperature():
    seen = small_seen()
    logits, ids, rest = panels.next_tokens(seen)
    assert rest.shape == (len(seen.steps), 20) and (logits[:, :-1] >= logits[:, 1:]).all()
    wide = np.random.default_rng(0).standard_normal((2, 300)) * 3
    logits, ids, rest = panels.next_tokens(replace(seen, logits=wide))
    assert logits.shape == ids.shape == (2, 50)
    for stop, temperature in enumerate(panels.TEMPERATURES):
        share = np.exp(logits / temperature) / (np.exp(logits / temperature).sum(-1) + np.exp(rest[:, stop]))[:, None]
        expected = np.take_along_axis(softmax(wide / temperature), ids, -1)
        assert_close(f"at {temperature}", share, expected, "formula")


def test_the_mask_is_the_decoders():
    seen = small_seen("gemma2")
    made, of_layer = panels.masks(seen)
    assert len(made) == 2 and of_layer == [0, 1]
    for layer in range(2):
        looked = seen.layer(layer, "self_attn.attn_weights") > 0
        assert (looked.all(0) == made[of_layer[layer]]).all()


def test_colors_show_the_main_components():
    colors = panels.token_colors(small_seen())
    assert colors.shape == (2, 9, 3) and colors.min() == 0 and colors.max() == 1


@pytest.mark.parametrize(("caption", "wrong"), [
    ("a small red heart on the left and a large teal star on the right",
     ["a small red heart on the right and a large teal star on the left",
      "a small teal heart on the left and a large red star on the right",
      "a small red star on the left and a large teal heart on the right",
      "a large red heart on the left and a small teal star on the right"]), ("nothing known", [])])
def test_hard_negatives_are_wrong_in_one_thing(caption, wrong):
    assert panels.hard_negatives(caption) == wrong


def test_packing():
    p = np.linspace(0, 1, 1001)
    assert np.abs((as_byte(p) / 255.0) ** 2 - p).max() < 0.004
    assert as_byte(np.array([1e-5])) > 0
    x = np.random.default_rng(0).standard_normal((3, 5, 7))
    values, scale = scaled_bytes(x)
    assert np.abs(values * scale[..., None] - x).max() <= 0.5001 * scale.max()
    assert not scaled_bytes(0 * x)[0].any() and not scaled_bytes(0 * x)[1].any()
    assert spread(5) == [4, 0, 2, 1, 3] and spread(1) == [0]


# --- the page ---------------------------------------------------------------------------------------------------------

def content(page):
    """The arrays and the texts that a page carries."""
    blob = base64.b64decode(re.search(r'id="data">([^<]*)<', page)[1])
    header = json.loads(blob[8:8 + int.from_bytes(blob[:8], "little")])
    return load(blob), json.loads(header["__metadata__"]["texts"])


@cache
def small_page(kind="gemma", pictures=1):
    seen = small_seen(kind, pictures)
    shown = [Image.new("RGB", (20, 10 + i), "red") for i in range(pictures)]
    return render(Xray(seen, shown, "what </script> is <b>this</b>?"))


def test_the_page_needs_nothing_else():
    page = small_page()
    head = page[:page.index("<style>")]
    assert re.search(r"default-src &#x27;none&#x27;; script-src &#x27;sha256-\S+&#x27;; style-src", head)
    outside = re.sub(r'id="data">[^<]*<', "", page)
    for word in ["http:", "https:", "src=", "href=", "@import", "url(", "fetch(", "XMLHttp", "import(", "eval("]:
        assert word not in outside.replace("http://www.w3.org/2000/svg", "").replace("img.src", "").replace(
            "image.src =", ""), word
    assert page.count("<script") == page.count("</script>") == 2
    assert "<b>this" not in page and "&lt;/script&gt; is &lt;b&gt;this" in page


def test_the_same_answer_gives_the_same_bytes():
    assert small_page("gemma2") == small_page.__wrapped__("gemma2")


@pytest.mark.parametrize("kind", ["gemma", "gemma2"])
@pytest.mark.parametrize("pictures", [1, 2])
def test_what_the_page_carries(kind, pictures):
    """Every array is there, in the sizes of the model, and what a byte stands for is what the model gave."""
    arrays, texts = content(small_page(kind, pictures))
    seen = small_seen(kind, pictures)
    A, S, L, N = len(seen.steps), seen.patches + len(seen.text), 2, 12
    attention = decoder_attention(seen)
    for layer in range(L):
        assert np.abs((arrays[f"decoder.heads.{layer}"] / 255.0) ** 2 - attention[layer]).max() < 0.004
        assert arrays[f"decoder.mean.{layer}"].shape == (A, S) and arrays[f"rope.q.{layer}"].shape[1] == N
    assert arrays["gradient"].shape == (A, 9 * pictures) and arrays["erase.map"].shape == (A, 9)
    assert (arrays["gradient"] == gradient_times_input(seen).astype(np.float32)).all()
    assert np.abs((arrays["vision.heads.0"] / 255.0) ** 2 - vision_attention(seen)[0]).max() < 0.004
    assert [texts["tokens"][i] for i in texts["steps"]] == [f"#{i}" for i in seen.steps]
    assert texts["erased"] and len(texts["erased"]) == 4 and texts["pictures"] == pictures
    assert set(texts["leftOut"]) >= {"contrast", "boxes"} and len(texts["maskOfLayer"]) == L
    mask = np.unpackbits(arrays["mask.0"], axis=1)[:, :S]
    assert (mask == panels.masks(seen)[0][0]).all()


def test_what_does_not_fit_is_left_out(monkeypatch):
    """The single heads of layers first; what must be there, and the last layer, stay."""
    monkeypatch.setattr(xray, "SMALL_PAGE", len(small_page()) - 3000)
    page = small_page.__wrapped__()
    assert len(page) <= xray.SMALL_PAGE
    arrays, _ = content(page)
    full, _ = content(small_page())
    gone = set(full) - set(arrays)
    assert gone and all(name.startswith(("vision.heads", "decoder.heads.0", "rope.", "norm.before.0")) for name in gone)
    assert {"rope.q.1", "rope.k.1", "decoder.heads.1", "decoder.mean.0", "vision.mean.0", "mask.0"} <= set(arrays)


def test_what_takes_too_long_is_left_out(monkeypatch):
    monkeypatch.setattr(xray, "PATIENCE", 10)
    seen = small_seen()
    made = Xray(seen, [Image.new("RGB", (9, 9))], None)
    assert {"gradient", "erasing"} <= set(made.left_out) and "gradient" not in made.arrays
    assert "trillion operations; --thorough computes it" in made.left_out["erasing"]
    assert "gradient" in Xray(seen, [Image.new("RGB", (9, 9))], None, thorough=True).arrays


def test_every_panel_has_its_code():
    found, page = sources.sources(), (ROOT / "minipali/looking/page/page.html").read_text()
    assert set(found) == set(re.findall(r'<section id="([\w-]+)"', page)) - {"left-out"}
    for panel in found.values():
        for code in panel["code"]:
            lines = (ROOT / code["file"]).read_text().splitlines()
            first, name = code["code"].splitlines()[0], code["name"].rpartition(".")[2]
            assert lines[code["line"] - 1].strip() == first and f"def {name}(" in code["code"]
            assert '"""' not in code["code"] and len(code["code"].splitlines()) <= 45


def test_the_recorded_names_exist():
    for panel in sources.sources().values():
        for tap in panel["taps"]:
            assert place(tap.format(0)), tap


def test_the_commands_write_the_same_page(tmp_path, capsys, picture):
    folder = write_model(tmp_path)
    assert main(["xray", str(picture), "abc", "--model", str(folder), "--out", str(tmp_path / "a.html")]) == 0
    out, err = capsys.readouterr()
    assert err == "" and out.splitlines()[-1].startswith(f"{tmp_path / 'a.html'}: ")
    assert run.main([str(picture), "abc", "--model", str(folder), "--max-new-tokens", "64", "--xray",
                     str(tmp_path / "b.html")]) == 0
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_a_text_model_has_a_page_too(tmp_path):
    folder = write_model(tmp_path, TEXT_CONFIG)
    assert run.main(["--no-image", "abc", "--model", str(folder), "--max-new-tokens", "5", "--xray",
                     str(tmp_path / "a.html")]) == 0
    arrays, texts = content((tmp_path / "a.html").read_text(encoding="utf-8"))
    assert "grid" not in texts and set(texts["leftOut"]) == {"picture", "patch", "vision", "contrast", "boxes"}
    mask = np.unpackbits(arrays["mask.0"], axis=1)[:, :len(texts["text"])]
    assert texts["prefix"] == 0 and not np.triu(mask, 1).any() and mask.diagonal().all()


@pytest.mark.parametrize("name", ["xray", "lens"])
def test_a_folder_without_a_tokenizer_is_refused(tmp_path, capsys, picture, name):
    """Neither command has the option --prompt-ids; the message says whose it is."""
    folder = write_model(tmp_path)
    (folder / "tokenizer.json").unlink()
    assert main([name, str(picture), "abc", "--model", str(folder)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "run.py --prompt-ids takes token ids" in err


def test_a_page_that_cannot_be_written(tmp_path, capsys, picture, monkeypatch):
    """It is refused before anything is computed."""
    folder = write_model(tmp_path)
    monkeypatch.setattr(xray_command, "ask", None)
    for arguments in (["xray", str(picture), "abc", "--out"], ["xray", str(picture), "--out"]):
        assert main([*arguments, str(tmp_path / "no" / "a.html"), "--model", str(folder)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("minipali xray: error: ") and "cannot be written" in err
    assert run.main([str(picture), "a", "--ask", "b", "--model", str(folder), "--xray", "x.html"]) == 2
    assert "--xray: expected one question about one picture" in capsys.readouterr().err
