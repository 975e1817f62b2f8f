"""The two stages of training, as in the paper: what a batch holds, and what its loss and gradient are.

1. `Contrastive`: the vision tower learns to tell pictures apart by their captions (SigLIP's sigmoid loss), and what lies
   on each patch.
2. `PrefixLM`: the whole model learns to answer prompts about pictures, with the loss on the answer alone.

A batch depends on nothing but the seed and its number, so a run that was stopped goes on with exactly the batches that
it would have seen, and any process can draw any of them. Batches are always drawn on the host; losses
run where the weights are.
"""
import functools
import re
from dataclasses import dataclass

import numpy as np

from minipali.checkpoint import vae_oid
from minipali.inputs.captions import caption_ids
from minipali.learning.backward import losses, paligemma, siglip
from minipali.model import vq_vae as segmentation
from minipali.small_world import artwork, drawing_tasks, drawings, easy_vqa, tasks, world
from minipali.small_world import patch_labels as patches

MEAN, STD = 0.5, 0.5  # of the preprocessor: pixels from 0..255 to -1..1


@dataclass(frozen=True)
class WordTokenizer:
    """The tokenizer with a memory for words. It is exact only where no token reaches across a space, as in ours."""
    tokenizer: object

    @functools.cached_property
    def _known(self):
        return {}

    def __getattr__(self, name):
        return getattr(object.__getattribute__(self, "tokenizer"), name)

    def encode(self, text):
        ids = []
        for word in re.findall(r"<\w+>| ?[^ <]+|.", text, re.DOTALL):
            if word not in self._known:
                self._known[word] = self.tokenizer.encode(word)
            ids += self._known[word]
        return ids


def scaled(pixels):
    """uint8 pictures as the vision tower wants them."""  # (B,S,S,3) -> (B,3,S,S)
    return ((pixels.astype(np.float32) / 255 - MEAN) / STD).transpose(0, 3, 1, 2)


def added(a, b):
    """The sum of two trees of arrays."""
    if isinstance(a, dict):
        return {key: added(a[key], b[key]) for key in a}
    return [added(x, y) for x, y in zip(a, b)] if isinstance(a, list) else a + b


@functools.cache
def _autoencoder(path):
    return vae_oid.read(path)


@dataclass(frozen=True)
class MaskCodes:
    """Masks (...,64,64) to their codes (...,16). It holds the file's name alone, so that it can go to other processes."""
    path: object

    def __call__(self, masks):
        codes = segmentation.encode(masks.reshape(-1, *masks.shape[-2:]), _autoencoder(self.path))
        return codes.reshape(*masks.shape[:-2], -1).tolist()


@dataclass(frozen=True)
class Contrastive:
    """Stage 1: scenes with different captions, every patch of which is also asked what lies on it.

    A batch has `shapes` scenes of shapes and `drawn` scenes of drawings by these `artists`; all of the former and the
    first `captioned` of the latter are told from one another by their captions, and from `wrong` captions that
    nearly fit. The other drawings, `easy` pictures like those of easy-VQA and `text` pictures of letters are for the
    patches alone. The parameters need a layer "patch_head" for the answers, which `train` adds and takes off again.
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
        """Pictures (B,S,S,3) of bytes, the labels (B,P,questions) of their patches, and the ids (n,T) of captions, no two
        alike: each would be the other's wrong answer. The first `captioned` + `shapes` belong to pictures, in order."""
        scenes = tasks.distinct(lambda i: world.draw((self.seed, 1, number, i)), self.shapes)
        captions, scenes = list(scenes), list(scenes.values())
        if self.drawn:
            gallery = drawings.gallery(self.artists, self.cache)
            more = tasks.distinct(lambda i: drawings.draw((self.seed, 1, number, i), gallery), self.drawn,
                                  drawing_tasks.caption)
            wrong = drawing_tasks.wrong_captions(list(more.values())[:self.wrong], np.random.default_rng(
                (self.seed, 3, number)), gallery.names)
            captions += list(more)[:self.captioned] + [caption for caption in wrong if caption not in more]
            scenes += more.values()
        shown = patches.scene_examples(scenes, self.codes_of)
        shown += [patches.easy_example((self.seed, 1, number, i)) for i in range(self.easy)]
        shown += [patches.text_example((self.seed, 1, number, i)) for i in range(self.text)]
        pictures, labels = zip(*shown)
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
        local, pull_local = patches.loss_of(features, batch["labels"], p["patch_head"])

        dimages, dtexts, dscale, dbias = pull(1.0)
        dfeatures, dpatch_head = pull_local(1.0)
        dpooled, dhead = pull_pool(dimages)
        dfeatures[:captions] += dpooled
        dtower = pull_tower(dfeatures)[1]
        return loss + local, {"vision_model": {**dtower, "head": dhead}, **pull_texts(dtexts), "patch_head": dpatch_head,
                              "logit_scale": dscale, "logit_bias": dbias}


@dataclass(frozen=True)
class PrefixLM:
    """Stage 2: `pictures` pictures a batch, with several prompts about each, so that the tower runs once for all.

    `sources`: {"world" | "drawings" | "text" | "easy_vqa" | "easy_vqa_like": (share of the pictures, prompts about each)}.
    The drawings are by these `artists`.
    """
    cfg: object
    tokenizer: object
    seed: int
    pictures: int
    sources: dict
    codes_of: object = None
    artists: tuple = drawings.TRAINED_ON
    cache: object = artwork.CACHE

    def draw(self, source, rng, name):
        """A picture from a source and its prompts as (prefix, suffix); a scene is always asked for its caption."""
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
            picture, asked = easy_vqa.train_example(rng, world.SIDE)
            return picture, [asked[i] for i in rng.choice(len(asked), size=min(count, len(asked)), replace=False)]
        return easy_vqa.synthetic(name, "train", world.SIDE, count)

    def batch(self, number):
        """Pictures (B,S,S,3) of bytes, and the prompts in groups of similar length, so that little is padding.

        A token of an answer of n tokens weighs 1/√n: between the paper's mean over each example, where a long
        caption teaches no more than a "yes", and the mean over all tokens, where the "yes" hardly counts.
        """
        rng = np.random.default_rng((self.seed, 2, number))
        shares = np.array([share for share, _ in self.sources.values()])
        names = rng.choice(list(self.sources), size=self.pictures, p=shares / shares.sum())
        drawn = [self.draw(name, rng, (self.seed, 2, number, i)) for i, name in enumerate(names)]
        t = self.tokenizer
        rows = [(i, [t.bos_id, *t.encode(prefix + "\n")], [*t.encode(suffix), t.eos_id])
                for i, (_, asked) in enumerate(drawn) for prefix, suffix in asked]
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

        The tower's gradient for a picture is the sum over its prompts: a product with the table of who asked about
        what, which (unlike adding row by row) gives the same bits on every run of a GPU.
        """
        features, pull_tower = paligemma.image_features(scaled(batch["pixels"]), p, self.cfg)
        loss, dfeatures, grads = 0, 0, None
        for group in batch["groups"]:
            picture = group["picture"]
            part, pull = paligemma.suffix_loss(features[picture], group["ids"], group["lengths"], group["prefix_len"],
                                               p, self.cfg, group["weights"])
            dasked, more = pull(1.0)
            asked = (picture == np.arange(features.shape[0], like=features)[:, None]).astype(features.dtype)
            dfeatures = dfeatures + (asked @ dasked.reshape(picture.shape[0], -1)).reshape(features.shape)
            loss, grads = loss + part, more if grads is None else added(grads, more)
        return loss, {**pull_tower(dfeatures)[1], **grads}
