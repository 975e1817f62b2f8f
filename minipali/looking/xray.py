"""All that the X-ray page shows of one answer, as named arrays and one object of texts, small enough to be mailed.

Probabilities are kept as round(255 sqrt(p)) in one byte (off by 0.4 % at most, and small ones survive), vectors as
float16 or as bytes with a scale. What does not fit into the limit is left out, the heads of single layers first, and
the page says so.
"""
import io

import numpy as np
from PIL import Image

from minipali.checkpoint.tensors import count_parameters, family
from minipali.errors import InputError
from minipali.looking import panels
from minipali.looking.attribution import erase, gradient_times_input, patch_map, windows
from minipali.looking.gather import decoder_attention, token_texts, vision_attention
from minipali.looking.logit_lens import logit_lens, picture_lens, row_names
from minipali.looking.sources import sources
from minipali.outputs.boxes import parse
from minipali.outputs.masks import Shapes

SMALL_PAGE, LARGE_PAGE = 400_000, 5_000_000  # bytes of a page, for up to 100 patches a picture and for more
PATIENCE = 2e12   # operations from which gradients, or erasing, are left out unless asked for: about a minute
LARGEST_PICTURE = 448


def as_byte(probabilities):
    """0..1 -> a byte that keeps the small ones apart: p = (byte / 255)²."""
    return np.rint(255 * np.sqrt(np.clip(probabilities, 0, 1))).astype(np.uint8)


def scaled_bytes(x):
    """Vectors (..., D) as signed bytes, and the scale of each: x = byte · scale."""
    scale = np.abs(x).max(-1) / 127
    return np.rint(x / np.maximum(scale, 1e-30)[..., None]).astype(np.int8), scale.astype(np.float32)


class TokenTexts:
    """Tokens as texts, each kept once: arrays of ids become arrays of places in `texts`."""

    def __init__(self, model):
        self.model, self.places, self.texts = model, {}, []

    def __call__(self, ids):
        ids = np.asarray(ids)
        for i in dict.fromkeys(ids.reshape(-1).tolist()):
            if i not in self.places:
                self.places[i] = len(self.texts)
                self.texts += token_texts(self.model, [i])
        return np.array([self.places[i] for i in ids.reshape(-1).tolist()], np.uint16).reshape(ids.shape)


def spread(layers):
    """Layers in the order in which they are kept: the last, the first, the middle, then the others."""
    return list(dict.fromkeys([layers - 1, 0, layers // 2, *range(layers)]))


def picture_bytes(picture, size):
    """The picture as the model saw it, a square: PNG if that is small, JPEG if not."""
    side, buffer = min(size, LARGEST_PICTURE), io.BytesIO()
    picture = picture.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
    picture.save(buffer, "PNG", optimize=True)
    if buffer.tell() > 10_000:
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=88)
    return np.frombuffer(buffer.getvalue(), np.uint8)


class Xray:
    """What the page shows of one answer: `arrays`, which it must have, `optional` ones, and `texts`."""

    def __init__(self, seen, pictures, question, thorough=False, say=lambda text: None):
        """`pictures`: the Pillow pictures of seen.pixels; `question`: the prompt, or None where ids were given;
        `thorough`: whether what takes minutes is computed as well; `say` hears what is being done."""
        self.seen, self.pictures, self.thorough, self.say = seen, pictures, thorough, say
        self.tokens, self.arrays, self.optional, self.left_out = TokenTexts(seen.model), {}, {}, {}
        vision, text = seen.model.cfg.vision_config, seen.model.cfg.text_config
        self.texts = {
            "model": str(seen.model.path.name or seen.model.path), "family": family(seen.model.cfg),
            "parameters": count_parameters(seen.model.cfg), "question": question,
            "text": self.tokens(seen.text).tolist(), "steps": self.tokens(seen.steps).tolist(), "ids": list(seen.steps),
            "textIds": seen.text, "prompt": len(seen.prompt), "prefix": seen.prefix_length,
            "bos": int(seen.prompt[0] == seen.model.cfg.bos_token_id), "patches": seen.patches,
            "layers": text.num_hidden_layers, "heads": text.num_attention_heads, "kvHeads": text.num_key_value_heads,
            "headDim": text.head_dim, "width": text.hidden_size, "scale": text.query_pre_attn_scalar ** -0.5,
            "softcap": text.attn_logit_softcapping, "thetas": text.rope_thetas, "factors": text.rope_factors,
            "eps": text.rms_norm_eps, "tied": seen.model.cfg.tie_word_embeddings, "windows": text.sliding_windows,
            "temperatures": panels.TEMPERATURES, "rows": row_names(text.num_hidden_layers)}
        if vision and seen.patches:
            self.texts |= {
                "grid": round(vision.num_patches ** 0.5), "pictures": len(pictures), "patch": vision.patch_size,
                "size": vision.image_size, "visionLayers": vision.num_hidden_layers,
                "visionHeads": vision.num_attention_heads, "visionWidth": vision.hidden_size,
                "pictureSizes": [picture.size for picture in pictures]}
        self._language()
        if "grid" in self.texts:
            self._picture()
            self._attribution()
            self._contrast()
            self._boxes()
        else:
            self.left_out |= dict.fromkeys(["picture", "patch", "vision", "contrast", "boxes"], "there is no picture")
        self.texts |= {"leftOut": self.left_out, "sources": sources(), "tour": self._tour(),
                       "tokens": self.tokens.texts}

    def _language(self):
        """What every model has."""
        seen, a = self.seen, self.arrays
        self.say("the language model's panels")
        attention = decoder_attention(seen)
        for layer in range(len(attention)):
            self.optional[f"decoder.mean.{layer}"] = as_byte(attention[layer].mean(0))
        a["decoder.all"] = as_byte(attention.mean((0, 1)))
        logits, ids, rest = panels.next_tokens(seen)
        a |= {"next.logits": logits.astype(np.float32), "next.tokens": self.tokens(ids),
              "next.rest": np.maximum(rest, -1e30).astype(np.float32)}
        lens = logit_lens(seen)
        a |= {"lens.top": self.tokens(lens.top), "lens.probability": lens.probability.astype(np.float32),
              "lens.rank": lens.rank.astype(np.int32), "lens.final": lens.final.astype(np.float32)}
        a["stream.size"], a["stream.added"] = (x.astype(np.float32) for x in panels.stream_sizes(seen))
        before, factors = panels.norms(seen)
        values, a["norm.scale"] = scaled_bytes(before)
        self.optional |= {f"norm.before.{layer}": values[layer] for layer in range(len(attention))}
        a["norm.rms"] = np.sqrt((before.astype(np.float64) ** 2).mean(-1)).astype(np.float32)
        a["norm.factor"] = factors.astype(np.float16)
        content, self.texts["bytesPerToken"] = panels.cache_content(seen)
        a["cache.content"] = content.astype(np.float16)
        made, self.texts["maskOfLayer"] = panels.masks(seen)
        for number, mask in enumerate(made):
            self.optional[f"mask.{number}"] = np.packbits(mask, axis=1)
        for layer in range(len(attention)):
            q, k, _ = panels.rotated(seen, layer)
            self.optional |= {f"rope.q.{layer}": q.astype(np.float16), f"rope.k.{layer}": k.astype(np.float16),
                              f"decoder.heads.{layer}": as_byte(attention[layer])}
        looked = attention[..., :seen.patches].mean((0, 1))
        self.best_step = int(looked.max(-1).argmax()) if seen.patches else 0
        self.best_patch = int(looked[self.best_step].argmax()) if seen.patches else 0

    def _picture(self):
        """What the vision tower made of the first picture."""
        seen, a = self.seen, self.arrays
        self.say("the picture's panels")
        for number, picture in enumerate(self.pictures):
            a[f"picture.{number}"] = picture_bytes(picture, self.texts["size"])
        rows, kernels, responses = panels.patch_kernels(seen)
        flat = kernels.reshape(len(kernels), -1)
        a["patch.kernels"] = np.rint(127.5 + 127.5 * flat / np.abs(flat).max(-1, keepdims=True)).astype(np.uint8)
        a["patch.responses"] = responses.astype(np.float32)
        self.texts["kernelRows"] = rows.tolist()
        tokens = seen.activations["vision_tower.vision_model.embeddings"][0]
        self.optional["patch.tokens"], a["patch.scale"] = scaled_bytes(tokens)
        a["vision.colors"] = np.rint(255 * panels.token_colors(seen)).astype(np.uint8)
        a["lens.picture"] = self.tokens(picture_lens(seen))
        weights = vision_attention(seen)
        for layer in range(len(weights)):
            self.optional |= {f"vision.mean.{layer}": as_byte(weights[layer].mean(0)),
                              f"vision.heads.{layer}": as_byte(weights[layer])}
        alike = panels.position_neighbors(seen.model)
        self.optional["patch.neighbors"] = np.rint(127.5 + 127.5 * alike).astype(np.uint8)
        if len(self.pictures) > 1:
            self.left_out["vision of the other pictures"] = "patches, vision layers and erasing show the first picture"

    def _attribution(self):
        """Gradients and erasing, unless they take too long."""
        seen, side = self.seen, self.texts["grid"]
        tokens, work = seen.patches + len(seen.text), 2 * self.texts["parameters"]
        if self._patient("gradient", 3 * len(seen.steps) * tokens * work):
            self.say("gradients")
            self.arrays["gradient"] = gradient_times_input(seen).astype(np.float32)
        if side > 1 and self._patient("erasing", 3 * len(windows(side)) * tokens * work):
            self.say("erasing")
            drop, answers = erase(seen)
            self.arrays["erase.map"] = np.clip(patch_map(drop, side), -6e4, 6e4).astype(np.float16)
            stopped, length = len(seen.steps) > len(seen.answer), len(seen.answer)
            self.texts["changed"] = sum((ids if stopped else ids[:length]) != seen.answer for ids in answers)
            different = list(dict.fromkeys(map(tuple, answers)))
            self.texts["answers"] = [self.tokens(ids).tolist() for ids in different]
            self.texts["erased"] = [different.index(tuple(ids)) for ids in answers]
        elif side == 1:
            self.left_out["erasing"] = "the picture is a single patch"

    def _patient(self, what, operations):
        """Whether the work is little enough, or asked for; if not, the page says so."""
        if self.thorough or operations <= PATIENCE:
            return True
        self.left_out[what] = f"it takes about {operations / 1e12:,.0f} trillion operations; --thorough computes it"
        return False

    def _contrast(self):
        try:
            captions, cosines, scale, bias, shown = panels.contrast(self.seen, self.pictures)
        except InputError as error:
            self.left_out["contrast"] = str(error)
            return
        self.arrays["contrast.cosines"] = cosines.astype(np.float32)
        for number, picture in enumerate(shown[1:], 1):
            self.arrays[f"contrast.picture.{number}"] = picture_bytes(picture.resize((64, 64)), 64)
        self.texts["contrast"] = {"captions": captions, "scale": scale, "bias": bias, "pictures": len(shown)}

    def _boxes(self):
        """Boxes as fractions of the picture, and masks as bits of the picture's square."""
        model, side = self.seen.model, min(self.texts["size"], LARGEST_PICTURE)
        detections = parse(model.tokenizer.decode(self.seen.answer), 1, 1) if model.tokenizer else []
        if not detections:
            self.left_out["boxes"] = "the answer names no boxes; ask: detect THING, or segment THING"
            return
        pixels = parse(model.tokenizer.decode(self.seen.answer), side, side)
        shapes = Shapes(model).masks(pixels, side, side)
        self.texts["boxes"] = [{"label": one.label, "box": one.box, "mask": mask is not None}
                               for one, mask in zip(detections, shapes)]
        self.texts["maskSide"] = side
        for number, mask in enumerate(shapes):
            if mask is not None:
                self.arrays[f"boxes.mask.{number}"] = np.packbits(mask, axis=1)

    def _tour(self):
        """Where the tour goes: the step that looked at one place most, that place, and the last layer."""
        return {"step": self.best_step, "patch": self.best_patch, "layer": self.texts["layers"] - 1}

    def fitted(self, room):
        """The arrays that fit into `room` bytes of base64: all that must be there, then the optional ones by worth."""
        kept, room = dict(self.arrays), room * 3 // 4 - sum(x.nbytes + 90 for x in self.arrays.values())
        for name, x in sorted(self.optional.items(), key=lambda item: self._worth(item[0])):
            if x.nbytes + 90 <= room:
                kept[name], room = x, room - x.nbytes - 90
        return kept

    def _worth(self, name):
        """A sort key, smaller is better: masks, means and the last layer, three layers' heads, all other layers."""
        kind, _, layer = name.rpartition(".")
        kinds = ["mask", "decoder.mean", "patch", "vision.mean", "norm.before", "rope.q", "rope.k", "decoder.heads",
                 "vision.heads"]
        if kinds.index(kind) < 3:
            return 0, kinds.index(kind), name
        layers = self.texts["visionLayers" if kind.startswith("vision") else "layers"]
        order = spread(layers).index(int(layer))
        if kind == "vision.mean" or order == 0 and not kind.endswith("heads"):
            return 1, order, name
        return 2 + (order >= 3), order, kinds.index(kind)

    @property
    def limit(self):
        """The bytes that the whole page may have."""
        grid = self.texts.get("grid", 0)
        return SMALL_PAGE if grid * grid <= 100 else LARGE_PAGE
