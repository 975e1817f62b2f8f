"""The first stage: its batches, its gradient, and the folder that it writes."""
import itertools
import json
import math
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
from galleries import NAMES, small_gallery
from helpers import ROOT, assert_close, seeds
from hypothesis import given

from minipali.checkpoint.config import (
    SiglipConfig,
    SiglipTextConfig,
    VisionConfig,
)
from minipali.checkpoint.tensors import flatten, unflatten
from minipali.inputs.captions import canonical_text
from minipali.inputs.read_tokenizer import read_tokenizer
from minipali.inputs.tokenizer import Tokenizer
from minipali.learning.initialize import random_params
from minipali.model import losses, siglip
from minipali.small_world import artwork, drawings, tasks, vocabulary, world
from minipali.small_world import patch_labels as patches
from minipali.small_world.drawing_tasks import article, sentence
from minipali.small_world.drawing_tasks import caption as drawing_caption
from minipali.small_world.recipe import PREPROCESSOR, SIGLIP, patch_head
from minipali.small_world.stages import Contrastive, MaskCodes, WordTokenizer, scaled


@cache
def tokenizer():
    return Tokenizer.from_file(ROOT / "weights" / "tokenizer.json")


@cache
def new_tokenizer():
    """With the names of the drawings; the one that ships may be older."""
    return Tokenizer(vocabulary.train())


CONFIG = SiglipConfig(
    vision_config=VisionConfig(hidden_size=6, intermediate_size=7, num_hidden_layers=1, num_attention_heads=2,
                               image_size=world.SIDE, patch_size=14, num_channels=3, layer_norm_eps=0.01,
                               vision_use_head=True),
    text_config=SiglipTextConfig(vocab_size=2048, hidden_size=4, intermediate_size=5, num_hidden_layers=1,
                                 num_attention_heads=2, max_position_embeddings=40, layer_norm_eps=0.01,
                                 projection_size=6, pad_token_id=0))


def stage(pictures=6, seed=0):
    return Contrastive(CONFIG, WordTokenizer(tokenizer()), seed, pictures)


@given(seeds)
def test_no_two_captions_of_a_batch_are_alike(seed):
    """As the ids that the tower sees; and each belongs to the picture in its row."""
    batch = stage(6, seed).batch(seed % 91)
    assert len(np.unique(batch["ids"], axis=0)) == len(batch["pixels"]) == 6
    scenes = tasks.distinct(lambda number: world.draw((seed, 1, seed % 91, number)), 6)
    for picture, row, (caption, scene) in zip(batch["pixels"], batch["ids"], scenes.items()):
        assert np.array_equal(picture, scene.image)
        assert tokenizer().decode(row[:row.tolist().index(1)].tolist()) == canonical_text(caption)


def test_the_longest_caption_fits():
    """Four things of the most tokens: a cut caption would leave pictures that cannot be told apart.

    With the drawings' names and the vocabulary that is learned with them.
    """
    words = WordTokenizer(tokenizer())
    thing = max((SimpleNamespace(size=size, color=color, shape=shape, place=place) for size, color, shape, place in
                 itertools.product(world.SIZES, world.COLORS, world.SHAPES, world.PLACES)),
                key=lambda thing: len(words.encode(" ".join(vars(thing).values()))))
    _, text = tasks.caption(SimpleNamespace(things=[thing] * 4), None)
    length = SIGLIP["text_config"]["max_position_embeddings"]
    assert len(tokenizer().encode(canonical_text(text))) < length
    assert CONFIG.text_config.max_position_embeddings == length
    new = new_tokenizer()
    longest = max(artwork.names().values(), key=lambda name: len(new.encode(article(name))))
    text = sentence([(longest, place) for place in ("at the bottom left",) * 4])
    assert len(new.encode(canonical_text(text))) < length


def test_distinct_keeps_the_first_of_each_caption():
    star = {"size": "small", "shape": "star", "place": "at the top"}
    drawn = [SimpleNamespace(number=i, things=[SimpleNamespace(color=color, **star)])
             for i, color in enumerate(["red", "red", "teal", "red"])]
    scenes = tasks.distinct(drawn.__getitem__, 2)
    assert [scene.number for scene in scenes.values()] == [0, 2]
    assert list(scenes) == ["a small red star at the top", "a small teal star at the top"]


@pytest.mark.parametrize("drawn", [{}, {"drawn": 3, "captioned": 2, "wrong": 1}])
def test_contrastive_gradient_is_the_slope(drawn, monkeypatch):
    """All of it: both towers, the pooling head, temperature and bias; captions for some pictures, patches for all; and
    captions that belong to no picture."""
    monkeypatch.setattr(drawings, "gallery", lambda artists, cache: small_gallery())
    monkeypatch.setattr(patches, "KINDS", (*patches.KINDS[:8], *NAMES.values()))
    rng, paired = np.random.default_rng(0), 5 if drawn else 3
    one = Contrastive(CONFIG, WordTokenizer(tokenizer()), 0, 3, **drawn, easy=1, text=1,
                      codes_of=MaskCodes(ROOT / "weights" / "vae-oid.npz"))
    head = {name: x.astype(np.float64) for name, x in patch_head(6, rng).items()}
    params, batch = {**random_params(CONFIG, rng, np.float64), "patch_head": head}, one.batch(0)
    loss, grads = one.loss_and_gradient(params, batch)
    flat, grads = flatten(params), flatten(grads)
    assert set(grads) == set(flat)
    assert one.examples(batch) == (8 if drawn else 5)
    assert len(batch["ids"]) == (6 if drawn else 3)

    def value(flat):
        p = unflatten(flat)
        pixels = scaled(batch["pixels"]).astype(np.float64)
        images = siglip.encode_image(pixels[:paired], p, CONFIG)
        texts = siglip.encode_text(batch["ids"], p, CONFIG)
        tokens = siglip.vision_tower(pixels, p["vision_model"], CONFIG.vision_config)
        return losses.siglip_loss(images, texts, p["logit_scale"], p["logit_bias"]) + patches.loss_of(
            tokens, batch["labels"], p["patch_head"])[0]
    assert_close("loss", loss, value(flat), "formula")
    for part in ("vision_model", "text_model", "logit", "patch_head"):
        names = [name for name in flat if name.startswith(part)]
        norm = math.sqrt(sum((grads[name] ** 2).sum() for name in names))
        h, ends = 1e-6, []
        direction = {name: grads[name] / norm + rng.standard_normal(flat[name].shape) / math.sqrt(
            flat[name].size * len(names)) for name in names}
        for side in (h, -h):
            ends.append(value({**flat, **{name: flat[name] + side * direction[name] for name in names}}))
        ours = np.array(sum((grads[name] * direction[name]).sum() for name in names))
        assert_close(part, ours, (ends[0] - ends[1]) / (2 * h), "gradient")


def test_batches_with_drawings_have_their_captions_and_wrong_ones(monkeypatch):
    """Shapes, then drawings, then the wrong captions: row by row those of the pictures, no two alike."""
    monkeypatch.setattr(drawings, "gallery", lambda artists, cache: {("noto",): small_gallery()}[artists])
    monkeypatch.setattr(patches, "KINDS", (*patches.KINDS[:8], *NAMES.values()))
    one = Contrastive(CONFIG, WordTokenizer(new_tokenizer()), 0, 2, drawn=4, captioned=3, wrong=3, easy=1, text=1,
                      artists=("noto",))
    for number in range(5):
        batch = one.batch(number)
        scenes = list(tasks.distinct(lambda i: drawings.draw((0, 1, number, i), small_gallery()), 4,  # noqa: B023
                                     drawing_caption).items())
        assert len(batch["pixels"]) == len(batch["labels"]) == one.examples(batch) == 8
        texts = [new_tokenizer().decode(row[:row.tolist().index(1)].tolist()) for row in batch["ids"]]
        assert len(set(texts)) == len(texts) > 5
        for (_, scene), picture, labels in zip(scenes, batch["pixels"][2:], batch["labels"][2:]):
            assert np.array_equal(picture, scene.image)
            assert np.array_equal(labels, patches.labels(scene.things))
        assert texts[2:5] == [canonical_text(caption) for caption, _ in scenes[:3]]


def test_the_pairs_folder_tells_the_hub_how_captions_are_made(pair_folder):
    """Cleaned, EOS behind and no BOS in front, padding on the right: what SiglipProcessor needs to give our ids."""
    spec, about, picture = (json.loads((pair_folder / f"{name}.json").read_text(encoding="utf-8")) for name in (
        "tokenizer", "tokenizer_config", "preprocessor_config"))
    pieces = spec["post_processor"]["single"]
    assert [next(iter(piece)) for piece in pieces] == ["Sequence", "SpecialToken"]
    assert pieces[1]["SpecialToken"]["id"] == about["eos_token"] == "<eos>"
    assert (about["padding_side"], about["model_max_length"]) == ("right", 40)
    assert about["processor_class"] == picture["processor_class"] == "SiglipProcessor"
    assert picture["size"] == PREPROCESSOR["size"]
    assert "image_seq_length" not in picture
    captions = ["a large red circle on the left", "HELLO 42", " It's_a (red)\tcircle! ",
                "".join(map(chr, range(32, 127)))]
    ours = read_tokenizer(pair_folder)
    assert ours.kind == "PreTrainedTokenizer"
    for text in captions:
        assert ours.encode(text) == tokenizer().encode(canonical_text(text))
    shipped = (ROOT / "weights" / "siglip" / "tokenizer.json").read_bytes()
    assert shipped == (pair_folder / "tokenizer.json").read_bytes()
