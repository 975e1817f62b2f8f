"""No comment about a shape lies: every `# (…) -> (…)` of the model and its gradients against runs whose sizes differ.

And the order of reading: each function of the core uses only those above it.
"""
import ast
import inspect
import io
import re
import sys
import tokenize

import numpy as np
import pytest
from helpers import ROOT, random_batch, random_params, random_pixels
from small_models import model_config, pair_config

from minipali import model
from minipali.checkpoint import vae_oid
from minipali.learning import backward
from minipali.learning.backward import gemma as backward_gemma
from minipali.learning.backward import losses as backward_losses
from minipali.learning.backward import ops as backward_ops
from minipali.learning.backward import paligemma as backward_paligemma
from minipali.learning.backward import siglip as backward_siglip
from minipali.learning.backward import vq_vae as backward_vq_vae
from minipali.model import gemma, losses, ops, paligemma, siglip, vq_vae
from minipali.model.gemma import KVCache

CORE = [ops, siglip, gemma, paligemma, losses]
FORWARD = [*CORE, vq_vae]
BACKWARD = [backward_ops, backward_siglip, backward_gemma, backward_paligemma, backward_losses, backward_vq_vae]
LEGEND = set(re.findall(r"\b([A-Z])  \w", model.__doc__))
WORDS = {"height", "width", "size", "rows", "columns", "in", "out", "k", "texts"}
LINE = re.compile(r"# (\(.*\) -> \(.*\))")
TRAILING = re.compile(r"^ +(\w+) = .*  # \(([^()]*)\)$")


def documented(modules):
    """(where it lives, its name, its shape line) for each function whose source has one."""
    for holder in [*modules, *([KVCache] if gemma in modules else [])]:
        for name, function in vars(holder).items():
            if inspect.isfunction(function) and function.__module__ == getattr(holder, "__module__", holder.__name__):
                lines = LINE.findall(inspect.getsource(function))
                if lines:
                    yield holder, name, lines[0]


def letters(spec):
    return re.findall(r"[A-Za-z]+", spec)


def assert_shape(shape, spec, sizes):
    """`shape` is what `spec`, "B,P+T,D", says; a letter without a size yet gets that of what it meets."""
    dims = [d.strip().replace("·", "*").replace("/", "//") for d in spec.split(",") if d.strip()]
    if "..." in dims:
        dims, shape = dims[1:], shape[len(shape) - len(dims) + 1:]
    assert len(dims) == len(shape), f"{shape} is not ({spec})"
    for dim, size in zip(dims, shape):
        if [dim] == letters(dim):
            assert sizes.setdefault(dim, size) == size, f"{shape} is not ({spec}) with {sizes}"
        elif set(letters(dim)) <= set(sizes):
            assert eval(dim, {}, dict(sizes)) == size, f"{shape} is not ({spec}) with {sizes}"


def with_checked_shapes(function, line, sizes, seen):
    """The same function, each call held against its shape line, starting from the letters whose `sizes` are known.

    What a gradient returns is (y, pull): the line is that of y, and what pull gives has the shapes of what came in.
    """
    inputs, outputs = (re.findall(r"\((.*?)\)", side) for side in line.split("->"))
    signature = inspect.signature(function)
    has_pull = function.__module__.startswith(backward.__name__)

    def checked(*args, **kwargs):
        given = signature.bind(*args, **kwargs).arguments
        arrays = [x for x in given.values() if isinstance(x, np.ndarray)]
        known = {**sizes, **{key: x for key, x in given.items() if isinstance(x, int) and key in WORDS}}
        result = function(*args, **kwargs)
        y, pull = result if has_pull else (result, None)
        results = y if isinstance(y, tuple) else (y,)
        for x, spec in [*zip(arrays, inputs), *zip(results, outputs, strict=True)]:
            try:
                assert_shape(np.shape(x), spec, known)
            except AssertionError as error:
                raise AssertionError(f"{function.__module__}.{function.__qualname__}  # {line}: {error}") from None
        seen.add((function.__module__, function.__qualname__))

        def checked_pull(*dy):
            gradients = pull(*dy)
            parts = gradients if isinstance(gradients, tuple) else (gradients,)
            shapes = [part.shape for part in parts if not isinstance(part, dict)]
            inputs = [x.shape for x in arrays if x.dtype.kind == "f"]  # ids have no gradient
            assert shapes == inputs[:len(shapes)], f"{function.__qualname__}: pull gives {shapes}"
            return gradients
        return (y, checked_pull) if has_pull else result
    return checked


def check_all(monkeypatch, modules, sizes, run):
    """Hold every call of `run` against the shape lines of `modules`; each function that has one must be called."""
    functions, seen = list(documented(modules)), set()
    for holder, name, line in functions:
        original = vars(holder)[name]
        # siglip.heads serves both towers, so its letters start free.
        known = sizes.get(holder.__name__.rpartition(".")[2], {}) if name != "heads" else {}
        checked = with_checked_shapes(original, line, known, seen)
        for user in [*FORWARD, *BACKWARD, KVCache]:
            if vars(user).get(name) is original:
                monkeypatch.setattr(user, name, checked)
    run()
    documented_names = {(vars(holder)[name].__module__, name) for holder, name, _ in functions}
    assert len(seen) == len(functions), f"called: {sorted(seen)}; documented: {sorted(documented_names)}"


CONFIG, PAIR = model_config("gemma2"), pair_config()
SIZES = {"siglip": {"D": 24, "N": 8, "F": 17, "P": 9}, "paligemma": {"D": 20, "P": 9, "V": 31},
         "gemma": {"D": 20, "N": 12, "K": 4, "H": 6, "F": 44, "V": 31}}


def setting():
    """Parameters of both models, five pictures, and an uneven batch of text."""
    rng = np.random.default_rng(0)
    p, pair = random_params(CONFIG, rng), random_params(PAIR, rng)
    return rng, p, pair, random_pixels(CONFIG, 5, rng), random_batch(CONFIG, 5, rng)


def mask_codec():
    return np.random.default_rng(0).random((2, 64, 64), np.float32), vae_oid.read(ROOT / "weights" / "vae-oid.npz")


def run_forward():
    rng, p, pair, pixels, (ids, lengths, prompt_lengths) = setting()
    features = paligemma.image_features(pixels, p, CONFIG)
    x = paligemma.forward(features, ids, lengths, prompt_lengths + features.shape[1], p, CONFIG)
    gemma.output_logits(x, paligemma.output_head(p, CONFIG), CONFIG.text_config)
    cache = KVCache(features, 5, 50, CONFIG.text_config)
    paligemma.prefill(features, ids[:, :prompt_lengths.max()], prompt_lengths, p, CONFIG, cache)
    paligemma.decode(ids[:, :2], p, CONFIG, cache)
    images = siglip.encode_image(random_pixels(PAIR, 5, rng), pair, PAIR)
    texts = siglip.encode_text(rng.integers(0, 29, (5, 7)), pair, PAIR)
    losses.clip_loss(images, texts, pair["logit_scale"])
    losses.siglip_loss(images[:3], texts, pair["logit_scale"], pair["logit_bias"])
    losses.siglip_loss_chunked(images, texts, pair["logit_scale"], pair["logit_bias"], 2)
    losses.cross_entropy(rng.standard_normal((5, 31)), rng.integers(0, 31, 5))
    masks, codec = mask_codec()
    vq_vae.decode(vq_vae.encode(masks, codec), codec)


def run_backward():
    """Forward and back through everything; what a pull of a part returns is checked on the way."""
    rng, p, pair, pixels, (ids, lengths, prompt_lengths) = setting()
    features, pull_features = backward_paligemma.image_features(pixels, p, CONFIG)
    weights = (np.arange(ids.shape[1]) < lengths[:, None]) * 1.0
    loss, pull = backward_paligemma.suffix_loss(features, ids, lengths, prompt_lengths + features.shape[1], p, CONFIG,
                                                weights)
    pull_features(pull(1.0)[0])
    images, pull_images = backward_siglip.encode_image(random_pixels(PAIR, 5, rng), pair, PAIR)
    texts, pull_texts = backward_siglip.encode_text(rng.integers(0, 29, (5, 7)), pair, PAIR)
    scale, bias = pair["logit_scale"], pair["logit_bias"]
    dimages, dtexts, _ = backward_losses.clip_loss(images, texts, scale)[1](1.0)
    backward_losses.siglip_loss(images[:3], texts, scale, bias)[1](1.0)
    backward_losses.siglip_loss_chunked(images, texts, scale, bias, 2)[1](1.0)
    pull_images(dimages)
    pull_texts(dtexts)
    x = rng.standard_normal((3, 4))
    backward_ops.softmax(x)[1](x)
    backward_ops.log_sum_exp(x)[1](x[:, 0])
    masks, codec = mask_codec()
    backward_vq_vae.vq_vae_loss(masks, codec, 0.25)[1]()


def test_shape_lines(monkeypatch):
    check_all(monkeypatch, FORWARD, SIZES, run_forward)


def test_shape_lines_of_the_gradients(monkeypatch):
    check_all(monkeypatch, BACKWARD, SIZES, run_backward)


@pytest.mark.parametrize("module", BACKWARD, ids=lambda module: module.__name__.rpartition(".")[2])
def test_a_gradient_has_its_partners_line(module):
    """Each function that has a partner with a shape line has that line."""
    partner = FORWARD[BACKWARD.index(module)]
    forward, ours = ({name: line for _, name, line in documented([m])} for m in (partner, module))
    both = [name for name in forward if getattr(vars(module).get(name), "__module__", "") == module.__name__]
    assert {name: ours.get(name) for name in both} == {name: forward[name] for name in both}


def trailing_shapes():
    """{(file, line after which it holds): (variable, spec)} for each `x = …  # (B,T,D)`."""
    found = {}
    for module in FORWARD:
        for number, text in enumerate(inspect.getsource(module).splitlines(), 1):
            match = TRAILING.match(text)
            if match:
                found[module.__file__, number] = match.groups()
    return found


def test_trailing_shapes():
    """A shape behind an assignment is that of the variable, in the letters that the function itself has by then."""
    expected, seen = trailing_shapes(), set()
    assert len(expected) > 10

    def trace_lines(frame, event, _):
        last = frame.f_locals and lines.get(frame)
        if last is not None:
            name, spec = expected[last]
            sizes = {key: x for key, x in frame.f_locals.items() if isinstance(x, int) and key in LEGEND | WORDS}
            if "N" in sizes and "K" in sizes:
                sizes["G"] = sizes["N"] // sizes["K"]
            assert_shape(frame.f_locals[name].shape, spec, sizes)
            seen.add(last)
        here = frame.f_code.co_filename, frame.f_lineno
        lines[frame] = here if event == "line" and here in expected else None
        return trace_lines

    lines, before = {}, sys.gettrace()
    files = {file for file, _ in expected}
    sys.settrace(lambda frame, event, arg: trace_lines if frame.f_code.co_filename in files else None)
    try:
        run_forward()
    finally:
        sys.settrace(before)
    assert seen == set(expected)


@pytest.mark.parametrize("module", [*FORWARD, *BACKWARD], ids=lambda module: module.__name__)
def test_letters_are_in_the_legend(module):
    """Capitals are those of minipali/model/__init__.py; what is no letter is a word with a plain meaning."""
    assert {"B", "T", "S", "D", "N", "K", "G", "H", "F", "V", "P", "C"} <= LEGEND
    source = inspect.getsource(module)
    specs = [*LINE.findall(source), *(m[2] for m in map(TRAILING.match, source.splitlines()) if m)]
    for spec in specs:
        assert set(letters(spec)) <= LEGEND | WORDS, spec


def shapes_in(source):
    """What stands as (a,b,c) in the comments and docstrings of a file: the parts of each shape."""
    texts = [token.string for token in tokenize.generate_tokens(io.StringIO(source).readline)
             if token.type == tokenize.COMMENT]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            texts.append(ast.get_docstring(node) or "")
    for text in texts:
        for spec in re.findall(r"\(([^()]*,[^()]*)\)", re.sub(r"\((\w+\+\w+)\)", r"\1", text)):
            parts = [part.strip() for part in spec.split(",")]
            if all(re.fullmatch(r"[\w+·*/]*|\.\.\.", part) for part in parts):
                yield parts


@pytest.mark.parametrize("path", sorted((ROOT / "minipali").rglob("*.py")), ids=lambda path: path.stem)
def test_letters_are_in_the_legend_in_every_room(path):
    """A capital in a shape is a letter of the legend, or the name of a constant such as SIDE; all else is in words.

    S counts keys: a picture's sides are words.
    """
    for parts in shapes_in(path.read_text(encoding="utf-8")):
        assert not {"3", "S"} <= set(parts), f"{path.name}: ({','.join(parts)})"
        for name in [name for part in parts for name in letters(part)]:
            assert name in LEGEND or not name.isupper() or len(name) > 2, f"{path.name}: ({','.join(parts)})"


def test_each_function_uses_only_those_above_it():
    """In the order of reading; what a function calls, and every module that the file imports, has been read before."""
    known = {"minipali.parallel", "minipali.trace"}
    for module in CORE:
        tree, defined = ast.parse(inspect.getsource(module)), set()
        own = {node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        for node in tree.body:
            if isinstance(node, ast.ImportFrom):
                assert node.module in known, f"{module.__name__} imports {node.module}, which is read later"
            elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                used = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)} & own - {node.name}
                assert used <= defined, f"{module.__name__}.{node.name} uses {used - defined}, defined below it"
                defined.add(node.name)
        known.add(module.__name__)
