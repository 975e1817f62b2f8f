"""The X-ray page: one HTML file that needs nothing else, no network, no server, no build.

The data are one safetensors file in base64, which the page's script reads in about fifteen lines (page/data.js). The
policy in the page's head allows exactly this one script and this one style sheet, by their hashes, and no connection:
a token that looks like markup stays text.
"""
import base64
import hashlib
import html
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import save

from minipali.decoding.generate import Answer
from minipali.decoding.loaded_model import Model
from minipali.files import replacing
from minipali.looking.gather import observe
from minipali.looking.xray import Xray

FOLDER = Path(__file__).resolve().parent / "page"
SCRIPTS = ["data.js", "drawing.js", "picture.js", "language.js", "numbers.js", "tour.js"]


def _read(name):
    return (FOLDER / name).read_text(encoding="utf-8")


def _hash(text):
    """A script or a style sheet as the policy names it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def render(xray):
    """The page as text: the same text for the same answer of the same model."""
    style, script = _read("style.css"), "\n".join(map(_read, SCRIPTS))
    script = f'"use strict";\n(() => {{\n{script}\n}})();\n'
    policy = (f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src blob:; "
              "base-uri 'none'; form-action 'none'")
    title = f"X-ray: {xray.texts['question'] or 'an answer'}"
    page = _read("page.html")
    texts = json.dumps(xray.texts, ensure_ascii=True, separators=(",", ":"), default=float)
    around = len(page) + len(style.encode()) + len(script.encode()) + len(policy) + 3 * len(title) + 2000
    arrays = xray.fitted(xray.limit - around - len(texts) * 4 // 3 * 11 // 10)
    blob = save({name: np.ascontiguousarray(x) for name, x in arrays.items()}, {"texts": texts})
    parts = {"POLICY": html.escape(policy), "TITLE": html.escape(title), "STYLE": style, "SCRIPT": script,
             "DATA": base64.b64encode(blob).decode()}
    for name, content in parts.items():
        before, mark, after = page.partition(f"@@{name}@@")
        assert mark, name
        page = before + content + after
    return page


def write_page(path: str | Path, model: Model, pictures: Sequence[Image.Image], pixels: np.ndarray | None,
               prompt: list[int], question: str | None, answer: Answer, thorough: bool = False,
               say: Callable[[str], None] = lambda text: None) -> None:
    """Look at an answer once more and write its page.

    `model` with its weights, `pictures` of Pillow and their `pixels` (images,3,size,size), or none and None; `prompt`
    ids, `question` the text of the prompt or None, `answer` the Answer of `generate`.
    """
    seen = observe(model, pixels, prompt, answer)
    content = render(Xray(seen, pictures, question, thorough, say))
    with replacing(path) as file:
        file.write(content.encode())
