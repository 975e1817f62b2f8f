"""The two stages of training: what a batch holds, and its loss and gradient. They are the paper's stages 0 and 1.

1. `Contrastive`: the vision tower learns to match pictures and captions (SigLIP's sigmoid loss), and what lies on each
   patch.
2. `PrefixLM`: the whole model learns to answer prompts about pictures, with the loss on the answer alone.

A batch depends only on the seed and its number, so a run that was stopped continues with exactly the batches that it
would have had, and any process can make any of them. Batches are made on the host; losses run where the weights are.
"""
import functools
import re
from dataclasses import dataclass

import numpy as np

from minipali.checkpoint import vae_oid
from minipali.inputs.captions import caption_ids
from minipali.learning.backward import losses, paligemma, siglip
from minipali.model import vq_vae
from minipali.small_world import artwork, drawing_tasks, drawings, easy_vqa, patch_labels, tasks, world

MEAN, STD = 0.5, 0.5  # of the preprocessor: it maps pixels from 0..255 to -1..1


@dataclass(frozen=True)
class WordTokenizer:
    """A tokenizer that remembers the ids of each word. Exact only if no token spans a space, as in our vocabulary."""
    tokenizer: object

    @functools.cached_property
    def _ids_of_word(self):
        return {}

    def __getattr__(self, name):
        return getattr(object.__getattribute__(self, "tokenizer"), name)

    def encode(self, text):
        ids = []
        for word in re.findall(r"<\w+>| ?[^ <]+|.", text, re.DOTALL):
            if word not in self._ids_of_word:
                self._ids_of_word[word] = self.tokenizer.encode(word)
            ids += self._ids_of_word[word]
        return ids


def scaled(pixels):
    """Pictures of bytes as the vision tower's input."""  # (B,height,width,3) -> (B,3,height,width)
    return ((pixels.astype(np.float32) / 255 - MEAN) / STD).transpose(0, 3, 1, 2)


def add_trees(a, b):
    """The sum of two trees of arrays."""
    if isinstance(a, dict):
        return {key: add_trees(a[key], b[key]) for key in a}
    return [add_trees(x, y) for x, y in zip(a, b)] if isinstance(a, list) else a + b


@functools.cache
def _autoencoder(path):
    return vae_oid.read(path)


@dataclass(frozen=True)
class MaskCodes:
    """A function from masks (...,64,64) to codes (...,16). It holds only the file's name, to be small when pickled."""
    path: object

    def __call__(self, masks):
        codes = vq_vae.encode(masks.reshape(-1, *masks.shape[-2:]), _autoencoder(self.path))
        return codes.reshape(*masks.shape[:-2], -1).tolist()


@dataclass(frozen=True)
class Contrastive:
    """Stage 1: the contrastive loss over captioned scenes, and a loss on what lies on each patch of every picture.

    A batch has `shapes` scenes of shapes and `drawn` scenes of drawings by these `artists`. All of the former and the
    first `captioned` of the latter enter the contrastive loss, beside `wrong` captions that nearly fit and belong to no
    picture. The other drawings, `easy` pictures like easy-VQA's and `text` pictures of letters enter only the patches'
    loss. The parameters need a layer "patch_head" for it (see recipe.py), which is dropped after training.
    """
    cfg: object
    tokenizer: object
    seed: int
    shapes: int
    drawn: int = 0
    captioned: int = 0
    wrong: int = 0
    easy: int = 0
    text: int = 0
    artists: tuple = drawings.TRAINED_ON
    cache: object = artwork.CACHE
    codes_of: object = None

    def batch(self, number):
        """Pictures (B,height,width,3) of bytes, the labels (B,P,questions) of their patches, and caption ids (texts,T).

        The first `shapes` + `captioned` captions belong to the first pictures, in order. All captions differ: of two
        equal ones, each would count as a wrong caption of the other's picture.
        """
        scenes = tasks.distinct(lambda i: world.draw((self.seed, 1, number, i)), self.shapes)
        captions, scenes = list(scenes), list(scenes.values())
        if self.drawn:
            gallery = drawings.gallery(self.artists, self.cache)
            drawn = tasks.distinct(lambda i: drawings.draw((self.seed, 1, number, i), gallery), self.drawn,
                                   drawing_tasks.caption)
            rng = np.random.default_rng((self.seed, 3, number))
            wrong = drawing_tasks.wrong_captions(list(drawn.values())[:self.wrong], rng, gallery.names)
            captions += list(drawn)[:self.captioned] + [caption for caption in wrong if caption not in drawn]
            scenes += drawn.values()
        examples = patch_labels.scene_examples(scenes, self.codes_of)
        examples += [patch_labels.easy_example((self.seed, 1, number, i)) for i in range(self.easy)]
        examples += [patch_labels.text_example((self.seed, 1, number, i)) for i in range(self.text)]
        pictures, labels = zip(*examples)
        return {"pixels": np.stack(pictures), "labels": np.stack(labels),
                "ids": caption_ids(captions, self.tokenizer, self.cfg.text_config)}

    def examples(self, batch):
        return len(batch["pixels"])

    def identity(self):
        names = ("seed", "shapes", "drawn", "captioned", "wrong", "easy", "text", "artists")
        return {"stage": "contrastive", **{name: getattr(self, name) for name in names}}

    def loss_and_gradient(self, p, batch):
        """The loss () and the tree of gradients."""
        cfg, captions = self.cfg.vision_config, self.shapes + self.captioned
        features, pull_tower = siglip.vision_tower(scaled(batch["pixels"]), p["vision_model"], cfg)
        images, pull_pool = siglip.attention_pool(features[:captions], p["vision_model"]["head"], cfg)
        texts, pull_texts = siglip.encode_text(batch["ids"], p, self.cfg)
        loss, pull = losses.siglip_loss(images, texts, p["logit_scale"], p["logit_bias"])
        patch_loss, pull_patches = patch_labels.loss_of(features, batch["labels"], p["patch_head"])

        dimages, dtexts, dscale, dbias = pull(1.0)
        dfeatures, dpatch_head = pull_patches(1.0)
        dpooled, dhead = pull_pool(dimages)
        dfeatures[:captions] += dpooled
        dtower = pull_tower(dfeatures)[1]
        grads = {"vision_model": {**dtower, "head": dhead}, **pull_texts(dtexts), "patch_head": dpatch_head,
                 "logit_scale": dscale, "logit_bias": dbias}
        return loss + patch_loss, grads


@dataclass(frozen=True)
class PrefixLM:
    """Stage 2: `pictures` pictures a batch, with several prompts about each, so that the tower runs once for all.

    `sources`: {name: (share of the pictures, prompts about each)} of "world", "drawings", "text", "easy_vqa" and
    "easy_vqa_like". The drawings are by these `artists`.
    """
    cfg: object
    tokenizer: object
    seed: int
    pictures: int
    sources: dict
    codes_of: object = None
    artists: tuple = drawings.TRAINED_ON
    cache: object = artwork.CACHE

    def example(self, source, rng, name):
        """A picture from a source, and prompts about it as (prefix, suffix); of a scene the first is its caption."""
        count = self.sources[source][1]
        if source == "world":
            scene = world.draw(name)
            others = [tasks.sample(scene, rng, self.codes_of) for _ in range(count - 1)]
            return scene.image, [tasks.caption(scene, rng), *others]
        if source == "drawings":
            gallery = drawings.gallery(self.artists, self.cache)
            scene = drawings.draw(name, gallery)
            others = [drawing_tasks.sample(scene, rng, gallery.names, self.codes_of) for _ in range(count - 1)]
            return scene.image, [drawing_tasks.caption(scene), *others]
        if source == "text":
            picture, text = world.draw_text(name)
            return picture, [tasks.ocr(text)]
        if source == "easy_vqa":
            picture, pairs = easy_vqa.train_example(rng, world.SIDE)
            return picture, [pairs[i] for i in rng.choice(len(pairs), size=min(count, len(pairs)), replace=False)]
        return easy_vqa.synthetic(name, "train", world.SIDE, count)

    def batch(self, number):
        """Pictures (B,height,width,3) of bytes, and the prompts in groups of similar length, so that little is padding.

        A token of an answer of n tokens weighs 1/√n. This lies between the paper's mean over each example, where a
        long caption counts no more than a "yes", and the mean over all tokens, where the "yes" hardly counts.
        """
        rng = np.random.default_rng((self.seed, 2, number))
        shares = np.array([share for share, _ in self.sources.values()])
        names = rng.choice(list(self.sources), size=self.pictures, p=shares / shares.sum())
        drawn = [self.example(name, rng, (self.seed, 2, number, i)) for i, name in enumerate(names)]
        t = self.tokenizer
        rows = [(i, [t.bos_id, *t.encode(prefix + "\n")], [*t.encode(suffix), t.eos_id])
                for i, (_, pairs) in enumerate(drawn) for prefix, suffix in pairs]
        rows.sort(key=lambda row: len(row[1]) + len(row[2]))
        total = sum(len(suffix) ** 0.5 for _, _, suffix in rows)
        return {"pixels": np.stack([picture for picture, _ in drawn]),
                "groups": [self.padded(part, total) for part in (rows[:len(rows) // 2], rows[len(rows) // 2:]) if part]}

    def padded(self, rows, total):
        """Rows (picture, prefix ids, suffix ids) as arrays; the weights of all groups together sum to 1."""
        lengths = np.array([len(prefix) + len(suffix) for _, prefix, suffix in rows])
        ids = np.full((len(rows), lengths.max()), self.tokenizer.pad_id)
        weights = np.zeros(ids.shape, dtype=np.float32)
        for row, weight, (_, prefix, suffix) in zip(ids, weights, rows):
            end = len(prefix) + len(suffix)
            row[:end] = prefix + suffix
            weight[len(prefix):end] = len(suffix) ** -0.5 / total
        patches = self.cfg.vision_config.num_patches
        return {"picture": np.array([i for i, _, _ in rows]), "ids": ids, "lengths": lengths, "weights": weights,
                "prefix_len": patches + np.array([len(prefix) for _, prefix, _ in rows])}

    def examples(self, batch):
        return sum(len(group["ids"]) for group in batch["groups"])

    def identity(self):
        return {"stage": "prefix-lm", "seed": self.seed, "pictures": self.pictures, "sources": self.sources,
                "artists": self.artists}

    def loss_and_gradient(self, p, batch):
        """The loss () and the tree of gradients.

        The tower's gradient for a picture is the sum over its prompts. It is computed as a product with the one-hot
        matrix of prompts and pictures, which (unlike adding row by row) gives the same bits on every run on a GPU.
        """
        features, pull_tower = paligemma.image_features(scaled(batch["pixels"]), p, self.cfg)
        loss, dfeatures, grads = 0, 0, None
        for group in batch["groups"]:
            picture = group["picture"]
            group_loss, pull = paligemma.suffix_loss(features[picture], group["ids"], group["lengths"],
                                                     group["prefix_len"], p, self.cfg, group["weights"])
            drows, group_grads = pull(1.0)
            one_hot = (picture == np.arange(features.shape[0], like=features)[:, None]).astype(features.dtype)
            dfeatures = dfeatures + (one_hot @ drows.reshape(picture.shape[0], -1)).reshape(features.shape)
            loss = loss + group_loss
            grads = group_grads if grads is None else add_trees(grads, group_grads)
        return loss, {**pull_tower(dfeatures)[1], **grads}
