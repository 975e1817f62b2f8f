"""Fine-tuning: the file of examples, what learns and what stays, LoRA, the folder that comes out; PyTorch's curves."""
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import (
    ROOT,
    assert_close,
    flat_params,
    paligemma_configs,
    random_params,
    random_pixels,
    seeds,
    unpacked,
)
from hypothesis import given
from hypothesis import strategies as st
from npz_models import to_big_vision, write_npz
from PIL import Image
from safetensors import safe_open

from minipali.checkpoint import stored_dtype
from minipali.checkpoint.config import config_json, parse_config
from minipali.checkpoint.hub import inventory, load, save
from minipali.checkpoint.tensors import flatten, param_shapes, unflatten
from minipali.commands import train as command
from minipali.decoding.loaded_model import load_model, open_model
from minipali.errors import InputError
from minipali.inputs.image import check_image
from minipali.learning import fine_tune, lora
from minipali.learning.backward import siglip as backward_siglip
from minipali.learning.examples import order, read_examples
from minipali.learning.fine_tune import (
    FineTune,
    choose,
    image_features,
    matching,
)
from minipali.learning.initialize import random_params as random_start
from minipali.learning.loop import Schedule, train
from minipali.model.gemma import output_logits
from minipali.model.paligemma import forward, output_head
from minipali.small_world import world
from minipali.small_world.vocabulary import ROWS

SHIPPED = ROOT / "weights"


@cache
def golden():
    """fine_tune.safetensors.xz: what it says of itself, and its tensors by name."""
    with unpacked("fine_tune.safetensors") as path, safe_open(path, "np") as file:
        about = file.metadata()
        assert (about["format"], about["version"]) == ("minipali golden", "1")
        said = {name: json.loads(text) for name, text in about.items() if text[0] in "{["}
        return said, {name: file.get_tensor(name) for name in list(file.keys())}


def part(tensors, prefix):
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def write_folder(folder, config, flat, dtype="float32"):
    """A model of the shipped vocabulary in the hub's layout."""
    save(folder, config, unflatten(flat), dtype)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(SHIPPED / name, folder / name)
    return folder


def write_data(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tiny():
    """The config.json of a small model with the shipped vocabulary."""
    return {"architectures": ["PaliGemmaForConditionalGeneration"], "model_type": "paligemma",
            "image_token_index": ROWS - 1, "projection_dim": 16, "vision_config": {
                "model_type": "siglip_vision_model", "hidden_size": 12, "intermediate_size": 14, "num_hidden_layers": 2,
                "num_attention_heads": 2, "image_size": 28, "patch_size": 7, "vision_use_head": False},
            "text_config": {"model_type": "gemma", "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2,
                            "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6, "vocab_size": ROWS,
                            "max_position_embeddings": 64}}


@pytest.fixture
def place(tmp_path, tiny):
    """A folder with a model, a picture and a file of two examples."""
    flat = flat_params(parse_config(tiny), np.random.default_rng(0), np.float32)
    write_folder(tmp_path / "model", tiny, flat, "bfloat16")
    Image.fromarray(np.arange(30 * 20 * 3, dtype=np.uint8).reshape(30, 20, 3)).save(tmp_path / "a.png")
    write_data(tmp_path / "data.jsonl", [{"image": "a.png", "prefix": "caption en", "suffix": "a red circle", "id": 7},
                                         {"image": "a.png", "prefix": "", "suffix": "blue"}])
    return tmp_path


def run(place, *options, out="out"):
    """The command, without processes; returns the folder that it wrote."""
    command.main(["--from", str(place / "model"), "--data", str(place / "data.jsonl"), "--out", str(place / out),
                  "--runs", str(place / "runs" / out), *options])
    return place / out


# --- PyTorch's curves -------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def hub_examples(tmp_path_factory):
    """The golden pictures and texts as files, and the golden models in float64 beside them."""
    said, tensors = golden()
    folder = tmp_path_factory.mktemp("golden")
    rows = []
    for i, (prefix, suffix) in enumerate(said["examples"]):
        # As the hub's processor has resized them: how a pixel is rounded there depends on the version of Pillow.
        resized = np.rint((tensors["processor/pixel_values"][i] + 1) * 127.5).astype(np.uint8)
        Image.fromarray(resized.transpose(1, 2, 0)).save(folder / f"{i}.png")
        rows.append({"image": f"{i}.png", "prefix": prefix, "suffix": suffix})
    write_data(folder / "data.jsonl", rows)
    for kind, config in said["configs"].items():
        flat = {name: x.astype(np.float64) for name, x in part(tensors, f"weights/{kind}/").items()}
        write_folder(folder / kind, config, flat, "float64")
    return folder


def hub_stage(folder, kind, freeze=(), adapt=()):
    said, _ = golden()
    _, size, seed = said["order"]
    rank, alpha = said["lora"]
    model = open_model(folder / kind)
    weights = flatten(load(folder / kind, np.float64)[1])
    learned = choose(param_shapes(model.cfg), freeze, adapt)
    frozen = {name: x for name, x in weights.items() if adapt or name not in learned}
    rows = tuple(read_examples(folder / "data.jsonl", model))
    stage = FineTune(model.cfg, model.preprocessor, rows, size, seed, tuple(learned), lambda: frozen,
                     alpha / rank if adapt else None)
    return stage, {name: weights[name] for name in learned}, frozen


def test_batches_are_those_of_the_hubs_processor(hub_examples):
    """Ids, labels and pixels of each example as the processor with `suffix=` gives them; its padding is on the left."""
    stage, _, _ = hub_stage(hub_examples, "gemma")
    tensors, patches = part(golden()[1], "processor/"), stage.cfg.vision_config.num_patches
    seen = set()
    for number in range(4):
        batch = stage.batch(number)
        for row, i in enumerate(order(stage.seed, number, stage.size, 6)):
            seen.add(i)
            n = batch["lengths"][row]
            valid = tensors["attention_mask"][i].astype(bool)
            ids, labels = tensors["input_ids"][i][valid], tensors["labels"][i][valid]
            assert (ids[:patches] == stage.cfg.image_token_index).all()
            assert batch["ids"][row, :n].tolist() == ids[patches:].tolist()
            ours = np.where(batch["learned"][row], batch["ids"][row], -100)
            assert ours[:n].tolist() == labels[patches:].tolist()
            assert (ours[n:] == -100).all()
            assert batch["prefix_len"][row] == np.count_nonzero(labels == -100)
            assert np.array_equal(batch["pixels"][row], tensors["pixel_values"][i])
    assert seen == set(range(6))


def test_prefixes_may_begin_as_the_hubs_processor_wants_them(hub_examples, tmp_path):
    """The hub's data has <image> before each prefix: the examples are the same, and it is said."""
    model, notes = open_model(hub_examples / "gemma"), []
    rows = [json.loads(line) for line in (hub_examples / "data.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row | {"image": str(hub_examples / row["image"])} for row in rows]
    for leading in ["<image>", "<image><bos>"]:
        write_data(tmp_path / "data.jsonl", [row | {"prefix": leading + row["prefix"]} for row in rows])
        again = read_examples(tmp_path / "data.jsonl", model, notes.append)
        plain = read_examples(hub_examples / "data.jsonl", model)
        assert [row[1:3] for row in again] == [row[1:3] for row in plain]
    assert len(notes) == 2 * len(rows) and "<image><bos> at the beginning is left out" in notes[-1]
    write_data(tmp_path / "data.jsonl", [rows[0] | {"prefix": "<image><image>x"}])
    with pytest.raises(InputError, match="line 1: prompt: begins with 2 <image>, expected one for each picture"):
        read_examples(tmp_path / "data.jsonl", model)


@pytest.mark.parametrize("name", ["tower frozen", "parts frozen", "lora"])
def test_fine_tuning_is_pytorchs(hub_examples, tmp_path, name):
    """Ten steps from the same files: each loss, each gradient's length; frozen weights stay, LoRA's end the same."""
    said, tensors = golden()
    kind, freeze, adapt = said["runs"][name]
    stage, start, frozen = hub_stage(hub_examples, kind, () if adapt else freeze, adapt)
    expected = part(tensors, f"runs/{name}/")
    start = part(expected, "start/") or start
    before = {key: x.copy() for key, x in frozen.items()}
    curve = []
    schedule = Schedule(said["order"][0], shards=1, **said["settings"])
    trained = train(stage, unflatten(start), schedule, tmp_path / "state", workers=0, every=1,
                    report=lambda step, steps, loss, norm, *_: curve.append((loss, norm)))
    losses, lengths = np.array(curve).T
    assert_close("losses", losses, expected["loss"], "golden")
    assert_close("lengths", lengths, expected["length"], "golden")
    trained = flatten(trained)
    for key, x in part(expected, "end/").items():
        assert_close(key, trained[key], x, "golden")
    assert set(trained) | set(frozen) | set(stage.learned) == {*param_shapes(stage.cfg), *trained}
    assert not set(trained) & set(frozen)
    assert all(np.array_equal(x, before[key]) for key, x in frozen.items())


# --- LoRA -------------------------------------------------------------------------------------------------------------

def test_lora_of_the_whole_model_is_the_slope(hub_examples):
    """The stage's gradient along a direction against central differences, B away from zero."""
    adapted = ["*.v_proj", "*.fc1", "*embed_tokens", "*position_embedding"]
    stage, weights, _ = hub_stage(hub_examples, "gemma2", (), adapted)
    rng, batch = np.random.default_rng(0), stage.batch(0)
    thin = lora.start({name: x.shape for name, x in weights.items()}, 3, rng, np.float64)
    thin = {name: x + 0.1 * rng.standard_normal(x.shape) for name, x in thin.items()}
    _, grads = stage.loss_and_gradient(unflatten(thin), batch)
    direction = {name: g / np.linalg.norm(g) for name, g in grads.items()}
    ends = [stage.loss_and_gradient({name: x + h * direction[name] for name, x in thin.items()}, batch)[0]
            for h in (1e-6, -1e-6)]
    assert_close("slope", np.array(sum((grads[name] * d).sum() for name, d in direction.items())),
                 (ends[0] - ends[1]) / 2e-6, "gradient")
    twice, again = replace(stage, recompute=True).loss_and_gradient(unflatten(thin), batch)
    assert twice == stage.loss_and_gradient(unflatten(thin), batch)[0]
    assert all(np.array_equal(x, grads[name]) for name, x in again.items())


# --- what learns ------------------------------------------------------------------------------------------------------

def test_patterns(tiny):
    shapes = param_shapes(parse_config(tiny))
    learned = choose(shapes, ["vision_tower.*", "*norm.weight"], [])
    assert learned == [name for name in shapes
                       if not name.startswith("vision_tower.") and not name.endswith("norm.weight")]
    assert choose(shapes, [], []) == list(shapes)
    assert choose(shapes, [], ["language_model.*.layers.1.*.v_proj"]) == [
        "language_model.model.layers.1.self_attn.v_proj.weight"]
    for patterns, adapt, message in [
            (["vision_tower.*", "vision.*"], [], r"--freeze: 'vision\.\*' matches no name such as .*norm\.weight$"),
            (["*"], [], "every weight is frozen"), ([], ["*.weight"], r"--lora: '\*\.weight' matches no name such as "),
            ([], ["*norm"], "matches no name"), ([], ["*patch_embedding"], "matches no name")]:
        with pytest.raises(InputError, match=message):
            choose(shapes, patterns, adapt)
    assert matching(["B*"], ["bc", "Bc"], "") == ["Bc"], "names are spelled as they are"


@given(paligemma_configs(), seeds)
def test_a_tower_of_which_nothing_learns_only_runs_forward(cfg, seed):
    """The same features and, of what learns, the same gradients; its backward functions are not called at all."""
    rng = np.random.default_rng(seed)
    params, pixels = random_params(cfg, rng), random_pixels(cfg, 2, rng)
    expected, pull = image_features(pixels, params, cfg, ["vision_tower.vision_model.post_layernorm.bias"])
    dy = rng.standard_normal(expected.shape)
    grads = pull(dy)[1]
    assert "vision_tower" in grads
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backward_siglip, "vision_tower", None)
        features, pull = image_features(pixels, params, cfg, ["multi_modal_projector.linear.weight"])
        frozen_grads = pull(dy)[1]
    assert np.array_equal(features, expected)
    assert list(frozen_grads) == ["multi_modal_projector"]
    for name, x in flatten(frozen_grads).items():
        assert np.array_equal(x, flatten(grads)[name]), name


@given(st.integers(0, 9), st.integers(1, 5), st.integers(1, 7))
def test_every_round_shows_every_example_once(seed, size, count):
    """Batches end to end are one permutation after the other, not all the same, whatever the size of a batch."""
    drawn = [i for number in range(4 * count) for i in order(seed, number, size, count)]
    rounds = [drawn[at:at + count] for at in range(0, len(drawn), count)]
    assert all(sorted(one) == list(range(count)) for one in rounds)
    if count > 4:
        assert len({tuple(one) for one in rounds}) > 1
        assert drawn != [i for number in range(4 * count) for i in order(seed + 1, number, size, count)]


# --- the file of examples ---------------------------------------------------------------------------------------------

def test_examples_are_read(place):
    model = open_model(place / "model")
    first, second = read_examples(place / "data.jsonl", model)
    t = model.tokenizer
    assert (first.image, second.where) == (place / "a.png", f"{place / 'data.jsonl'}, line 2")
    assert list(first.prefix) == [2, *t.encode("caption en\n")]
    assert list(first.suffix) == [*t.encode("a red circle"), 1]
    assert list(second.prefix) == [2, *t.encode("\n")]
    text = (place / "data.jsonl").read_bytes()
    (place / "more.jsonl").write_bytes(b"\xef\xbb\xbf\n" + text.replace(b"a.png", bytes(place / "a.png")) + b" \r\n")
    again = read_examples(place / "more.jsonl", model)
    assert [row[:3] for row in again] == [first[:3], second[:3]]
    assert again[0].where.endswith("line 2")


def good(**fields):
    return json.dumps({"image": "a.png", "prefix": "caption en", "suffix": "blue"} | fields).encode()


BAD = [(b"{", "not valid JSON"), (b"[1]", "expected an object with image, prefix and suffix, found list"),
       (b'{"image": "a.png", "suffix": "x"}', "prefix is missing"), (good(suffix=3), "suffix is 3, expected text"),
       (good(image=["a.png"]), 'image is \\["a.png"\\], expected text'), (b"\xff{}", "not valid JSON"),
       (b"[" * 100_000, "not valid JSON"), (good(prefix=None), "prefix is null"),
       (good(image="b.png"), "b.png: no such file"), (good(image=""), "a folder, expected a picture"),
       (good(image="data.jsonl"), "data.jsonl: not a picture"), (good(image="cut.png"), "cut.png: cannot be read"),
       (good(image="a\0.png"), "cannot be read as a picture"),
       (good(suffix="red " * 50), "tokens with the picture's, expected fewer than the model's 64 positions")]


@pytest.mark.parametrize(("line", "message"), BAD, ids=range(len(BAD)))
def test_bad_lines_are_named(place, line, message):
    """One line, before any step, with the number that an editor shows."""
    (place / "cut.png").write_bytes((place / "a.png").read_bytes()[:-30])
    (place / "bad.jsonl").write_bytes(b"\n".join([good(), b"", line, good()]))
    with pytest.raises(InputError, match=r"bad\.jsonl, line 3: .*" + message) as caught:
        read_examples(place / "bad.jsonl", open_model(place / "model"))
    assert "\n" not in str(caught.value)


def test_as_long_as_the_model_allows(place):
    """Picture, prefix, suffix and EOS may fill every position and no more."""
    model = open_model(place / "model")
    room = 64 - model.cfg.vision_config.num_patches - len(model.tokenizer.encode("caption en\n")) - 2
    word = " blue"
    assert len(model.tokenizer.encode(word * 9)) == 9
    (place / "long.jsonl").write_bytes(good(suffix=word * room))
    [row] = read_examples(place / "long.jsonl", model)
    assert model.cfg.vision_config.num_patches + len(row.prefix) + len(row.suffix) == 64
    (place / "long.jsonl").write_bytes(good(suffix=word * (room + 1)))
    with pytest.raises(InputError, match="line 1: .* 64 tokens"):
        read_examples(place / "long.jsonl", model)


def test_files_without_examples(place):
    (place / "empty.jsonl").write_bytes(b"\n\n")
    for name, message in [("empty.jsonl", "empty.jsonl: no examples"), ("none.jsonl", "none.jsonl: cannot be read")]:
        with pytest.raises(InputError, match=message):
            read_examples(place / name, open_model(place / "model"))


def test_a_picture_that_only_decoding_shows_to_be_damaged_is_named_too(place):
    """The check at the start reads headers; a cut-off JPEG has a good one."""
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(place / "a.jpg")
    (place / "cut.jpg").write_bytes((place / "a.jpg").read_bytes()[:-500])
    check_image(place / "cut.jpg")
    write_data(place / "data.jsonl", [{"image": "cut.jpg", "prefix": "", "suffix": "x"}])
    with pytest.raises(InputError, match=r"data\.jsonl, line 1: .*cut\.jpg: cannot be read as a picture"):
        run(place, "--steps", "1")


def test_check_image_refuses_absurd_sizes(place, monkeypatch):
    monkeypatch.setattr("minipali.inputs.image.MAX_PIXELS", 599)
    with pytest.raises(InputError, match="20 x 30 pixels"):
        check_image(place / "a.png")


# --- the command and its folder ---------------------------------------------------------------------------------------

def before_training(config):
    return random_start(parse_config(config), np.random.default_rng(0))


def test_fifty_easy_pictures_are_learned(tmp_path, tiny, monkeypatch):
    """One thing each, near enough to fill the picture, asked for its color: the loss falls far below guessing."""
    rows = []
    alone = (scene for scene in map(world.draw, itertools.count()) if len(scene.things) == 1)
    for i, scene in enumerate(itertools.islice(alone, 50)):
        [thing], image = scene.things, Image.fromarray(scene.image)
        image.crop(tuple(map(int, thing.box))).save(tmp_path / f"{i}.png")
        rows.append({"image": f"{i}.png", "prefix": "color", "suffix": thing.color})
    write_data(tmp_path / "data.jsonl", rows)
    write_folder(tmp_path / "model", tiny, flatten(before_training(tiny)))
    losses, examples = [], []

    def report(step, steps, loss, length, done, started):
        losses.append(loss)
        examples.append(done["examples"])
    monkeypatch.setattr(fine_tune, "train", partial(train, report=report))
    run(tmp_path, "--steps", "80", "--rate", "0.02", "--batch", "10")
    assert len(losses) == 20
    assert losses[0] > 5
    assert examples[-1] == 80 * 10, "a step is one batch"
    counts = np.unique([row["suffix"] for row in rows], return_counts=True)[1] / 50
    guessing = -(counts * np.log(counts)).sum() / 2  # the color, of which some are more frequent, and EOS for certain
    assert np.mean(losses[-5:]) < 0.5 * guessing, (losses, guessing)


def logits(model, stage):
    batch = stage.batch(0)
    features = model.features_of(batch["pixels"])
    x = forward(features, batch["ids"], batch["lengths"], batch["prefix_len"], model.params, model.cfg)
    return output_logits(x, output_head(model.params, model.cfg), model.cfg.text_config)


@pytest.mark.parametrize("options", [("--freeze", "vision_tower.*,*norm*"),
                                     ("--lora", "*.q_proj,*.v_proj", "--rank", "2")])
def test_the_folder(place, tiny, options):
    """bfloat16 as before, frozen weights as the same bytes, config and tokenizer as the same content; it opens."""
    out = run(place, "--steps", "3", "--rate", "0.1", *options)
    assert json.loads((out / "config.json").read_text()) == tiny
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (SHIPPED / name).read_bytes()
    assert sorted(os.listdir(out)) == ["config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json",
                                       "tokenizer_config.json"]
    assert {dtype for dtype, _ in inventory(out).values()} == {"BF16"}
    before, after = flatten(load(place / "model")[1]), flatten(load(out)[1])
    for name, x in after.items():
        frozen = (name.startswith("vision_tower.") or "norm" in name) if options[0] == "--freeze" else (
            "q_proj.weight" not in name and "v_proj.weight" not in name)
        assert np.array_equal(x, before[name]) == frozen, name
    if options[0] == "--lora":
        change = after["language_model.model.layers.1.self_attn.q_proj.weight"]
        change = change - before["language_model.model.layers.1.self_attn.q_proj.weight"]
        singular = np.linalg.svd(change, compute_uv=False)
        assert singular[2] < 0.1 * singular[1], "two directions, and what bfloat16 rounds"
    load_model(out)


def test_lora_is_merged_as_it_was_trained(place):
    """The folder gives the scores that the model had at the end of training, alpha over rank and all."""
    out = run(place, "--steps", "4", "--rate", "0.1", "--lora", "language_model.*_proj", "--rank", "4", "--alpha", "2",
              "--dtype", "float32")
    model = open_model(place / "model")
    args = SimpleNamespace(freeze=None, lora=["language_model.*_proj"], rank=4, alpha=2.0, seed=0, backend="numpy",
                           batch=8)
    stage, *_ = fine_tune.stage_of(model, args, read_examples(place / "data.jsonl", model))
    with safe_open(place / "runs" / "out" / "fine-tune.safetensors", "np") as file:
        about = json.loads(file.metadata()["about"])
        vector = file.get_tensor("weights")
    assert about["step"] == 4
    assert sum(math.prod(shape) for shape in about["shapes"].values()) == vector.size
    thin, at = {}, 0
    for name, shape in about["shapes"].items():
        thin[name] = vector[at:at + math.prod(shape)].reshape(shape)
        at += math.prod(shape)
    weights = flatten(load(place / "model")[1])
    for name in stage.learned:
        a, b = (thin[other] for other in lora.names_of(name))
        weights[name] = weights[name] + 0.5 * (b @ a)
    trained = load_model(out)
    for name, x in flatten(trained.params).items():
        assert_close(name, x, weights[name], "reordered")
    expected = logits(trained, stage)
    assert_close("scores", expected, logits(
        type(trained)(**{**trained.__dict__, "params": unflatten(stage.weights(thin))}), stage), "reordered")


def test_what_a_large_model_keeps(place, monkeypatch):
    """Frozen matrices stand in the tree as Frozen; from LARGE weights on, layers are computed twice."""
    model = open_model(place / "model")
    examples = read_examples(place / "data.jsonl", model)
    args = SimpleNamespace(freeze=["vision_tower.*", "*.q_proj.weight"], lora=None, seed=0, backend="numpy", batch=2)
    total = sum(x.size for x in flatten(load(place / "model")[1]).values())
    for large, recompute in [(total, True), (total + 1, False)]:
        monkeypatch.setattr(fine_tune, "LARGE", large)
        stage, start, shapes = fine_tune.stage_of(model, args, examples)
        assert stage.recompute is recompute
    first = flatten(start())
    assert {name: x.shape for name, x in first.items()} == shapes
    for name, x in stage.weights(first).items():
        frozen = name not in first and x.shape[1:] and len(x.shape) == 2 and "position" not in name
        assert isinstance(x, lora.Frozen) == bool(frozen), name


@pytest.mark.parametrize(("options", "expected"), [
    ([], Schedule(100, rate=1e-5, warmup=5, beta2=0.999, decay=0.0, shards=1)),
    (["--rate", "0.01"], Schedule(100, rate=0.01, warmup=5, beta2=0.999, decay=0.0, shards=1)),
    (["--lora", "*.q_proj"], Schedule(100, rate=1e-4, warmup=5, beta2=0.999, decay=0.0, shards=1))])
def test_how_fast_it_learns(place, monkeypatch, options, expected):
    """A twentieth of the steps to warm up, AdamW's usual averages, no decay, one batch a step."""
    seen = []

    def stop(stage, params, schedule, *args, **how):
        seen.append((stage, schedule))
        raise InputError("enough")
    monkeypatch.setattr(fine_tune, "train", stop)
    with pytest.raises(InputError, match="enough"):
        run(place, "--steps", "100", *options)
    [(stage, schedule)] = seen
    assert schedule == expected
    assert stage.size == 8


def test_what_help_says_is_so(place, monkeypatch, capsys):
    """The defaults of the options that only fine-tuning has, as `--help` states them."""
    with pytest.raises(SystemExit):
        command.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    stated = {option: re.search(rf"{option} [A-Z]+ .*?\(default ([^,)]+)", text)[1] for option in
              ("--batch", "--rank", "--alpha")}
    seen = []
    monkeypatch.setattr(fine_tune, "train", lambda stage, params, *_, **how: seen.append((stage, params())) or params())
    run(place, "--lora", "*.q_proj")
    [(stage, thin)] = seen
    rank = next(iter(flatten(thin).values())).shape[0]
    assert stated == {"--batch": str(stage.size), "--rank": str(rank), "--alpha": f"{stage.scale * rank:g}"}


def test_three_rounds_if_no_steps_are_given(place, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(fine_tune, "train", lambda stage, params, schedule, *_, **how: (
        seen.append(schedule.steps), params())[1])
    write_data(place / "data.jsonl", [{"image": "a.png", "prefix": "", "suffix": "blue"}] * 7)
    run(place, "--batch", "4")
    assert seen == [math.ceil(3 * 7 / 4)]
    assert "7 examples, 6 steps of 4; " in capsys.readouterr().err


def test_a_run_goes_on_and_another_is_refused(place):
    """The same command again writes the same folder; other options, other examples or another model are another run."""
    first = (run(place, "--steps", "2") / "model.safetensors").read_bytes()
    assert (run(place, "--steps", "2") / "model.safetensors").read_bytes() == first
    for more, what in [(("--batch", "3"), "batch"), (("--rate", "0.5"), "rate"),
                       (("--lora", "*.q_proj"), "rate, scale, shapes"), (("--freeze", "*norm*"), "shapes"),
                       (("--seed", "1"), "seed")]:
        with pytest.raises(InputError, match=f"another {what}"):
            run(place, "--steps", "2", *more)
    write_data(place / "data.jsonl", [{"image": "a.png", "prefix": "", "suffix": "blue"}])
    with pytest.raises(InputError, match="another data"):
        run(place, "--steps", "2")


def test_big_vision_in_the_hubs_layout_out(place, tiny):
    """A PaliGemma 2 in an .npz: config.json is made from its sizes, the preprocessor's file from what it does."""
    config = {**tiny, "text_config": {**tiny["text_config"], "model_type": "gemma2", "query_pre_attn_scalar": 6,
                                      "max_position_embeddings": 8192}, "image_token_index": 2048}
    cfg = parse_config(config)
    flat = flat_params(cfg, np.random.default_rng(0), np.float32)
    (place / "npz").mkdir()
    path = write_npz(place / "npz" / "model.npz", to_big_vision(flat, cfg))
    shutil.copyfile(SHIPPED / "tokenizer.json", place / "npz" / "tokenizer.json")
    out = place / "out"
    command.main(["--from", str(path), "--data", str(place / "data.jsonl"), "--out", str(out),
                  "--runs", str(place / "runs"), "--steps", "1", "--rate", "0.1", "--freeze", "vision_tower.*"])
    model, before = load_model(out), open_model(path)
    assert (model.cfg, model.preprocessor) == (before.cfg, before.preprocessor)
    after = flatten(model.params)
    assert all(np.array_equal(after[name], x) == name.startswith("vision_tower.") for name, x in flat.items())
    assert stored_dtype(out) == stored_dtype(path) == "float32"


@given(paligemma_configs())
def test_config_json_says_what_the_config_says(cfg):
    """Of Gemma 1 and 2, which are what PaliGemma has inside: one rotary base, no norms of queries and keys."""
    layers = cfg.text_config.num_hidden_layers
    text = replace(cfg.text_config, rope_thetas=cfg.text_config.rope_thetas[:1] * layers, rope_factors=(1.0,) * layers,
                   qk_norms=False, prefix_lm=True)
    cfg = replace(cfg, text_config=text)
    assert parse_config(json.loads(json.dumps(config_json(cfg)))) == cfg


def test_dtypes_of_a_file(place, tiny):
    assert stored_dtype(place / "model") == "bfloat16"
    flat = flat_params(parse_config(tiny), np.random.default_rng(0), np.float32)
    from safetensors.numpy import save_file
    mixed = {name: x.astype(np.float16) if "bias" in name else x.astype(np.float64) for name, x in flat.items()}
    (place / "model" / "model.safetensors").unlink()
    save_file(mixed, place / "model" / "model.safetensors")
    assert stored_dtype(place / "model") == "float32"


REFUSED = [(("--from", "model", "--data", "data.jsonl", "--out", "model"), "--out: model is the folder of --from"),
           (("--from", "model", "--data", "data.jsonl", "--out", "a.png"), "a.png: cannot be written"),
           (("--from", "model", "--data", "data.jsonl", "--freeze", "visoin*"),
            "--freeze: 'visoin\\*' matches no name"),
           (("--from", "mute", "--data", "data.jsonl"), "mute: neither tokenizer.json nor tokenizer.model"),
           (("--from", "nowhere", "--data", "data.jsonl"), "nowhere: no such folder")]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=range(len(REFUSED)))
def test_options_that_will_not_do(place, monkeypatch, options, message):
    shutil.copytree(place / "model", place / "mute", ignore=lambda *_: ["tokenizer.json"])
    monkeypatch.chdir(place)
    with pytest.raises(InputError, match=message):
        command.main(["--out", "out", *options])
    assert not (place / "out").exists()


def test_the_error_line(place):
    """The real program: status 2 and one line that names the file and the line in it."""
    (place / "data.jsonl").write_bytes(good() + b"\n" + good(image="gone.png"))
    process = subprocess.run([sys.executable, "-m", "minipali", "train", "--from", place / "model", "--data",
                              place / "data.jsonl", "--out", place / "out"], capture_output=True, text=True,
                             check=False, cwd=ROOT, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"})
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr == (f"minipali train: error: {place / 'data.jsonl'}, line 2: {place / 'gone.png'}: "
                              "no such file\n")
