"""Questions about pictures, from a request to results: run.py without its options and without printing."""
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minipali.backend import to_host
from minipali.decoding.batch import answer_all, in_one_prompt
from minipali.decoding.generate import Answer, generate
from minipali.decoding.loaded_model import check_ids, encode_prompt, is_text_model, open_model
from minipali.decoding.sampling import Decoding
from minipali.errors import InputError, Progress
from minipali.files import replacing
from minipali.inputs.folder import picture_files
from minipali.inputs.image import open_image
from minipali.outputs.boxes import parse
from minipali.outputs.draw import draw_detections
from minipali.outputs.masks import Shapes
from minipali.outputs.picture_file import save_picture
from minipali.trace import record


@dataclass(frozen=True)
class Request:
    """What is asked, and how it is to be answered.

    Each of `prompts`, a text or a tuple of token ids, is asked about each of `images`, files or folders of them; the
    pictures `beside` follow it in every prompt. Without images the language model goes on from the prompt alone.
    """
    model: str | Path
    images: tuple = ()
    prompts: tuple = ("caption en",)
    beside: tuple = ()
    several: bool = False       # many pictures: an unreadable one is skipped, and `save_image` is a folder
    decoding: Decoding = Decoding()
    beams: int = 1
    best_of: int = 1
    constrain: bool = False
    scored: tuple = ()          # texts whose log-probability is wanted, in place of an answer
    dtype: str = "float32"
    backend: str = "numpy"
    weights: str | None = None  # the form in which matrices are held, None as choice.py chooses
    masks: bool = False         # whether <seg> codes are to be decoded
    save_image: Path | None = None
    dump: Path | None = None
    logprobs: bool = True       # whether the probability of every token is wanted
    xray: str | Path | None = None  # the page for the browser
    thorough: bool = False      # whether that page has what takes long with a large model
    every_step: bool = False    # whether `progress` gets a line for each step of a beam search


@dataclass(frozen=True)
class Result:
    """One answer. `prompt` is None where token ids were given, `image` where there is no picture; `ids_only`: the model
    has no tokenizer, and `text` is empty.

    `masks` has for each of `detections` an array (height, width) or None. `several`: (text, Answer) of all beams or
    samples, the likeliest first, or of all texts that were scored, in their order.
    """
    image: str | None
    prompt: str | None
    prompt_ids: list
    answer: Answer
    text: str
    detections: list
    masks: list
    load_seconds: float
    vision_seconds: float
    several: tuple = ()
    ids_only: bool = False


def ask(request: Request, progress: Progress | None = None,
        on_text: Callable[[str], None] | None = None) -> Iterator[Result]:
    """Yield a Result for each prompt about each picture, the prompts of one picture one after another.

    `on_text(piece)` is called with each piece of a single answer as it is decoded. Raises InputError for whatever
    cannot be used, if possible before the weights are read. With `several` an unreadable picture is reported to
    `progress` and skipped.
    """
    progress = progress or Progress("", wanted=False)
    if request.images and is_text_model(request.model):
        raise InputError(f"{request.model}: a text model, which sees no picture; give --no-image and a PROMPT alone")
    many = request.several or len(request.prompts) > 1
    results = _each(request, progress) if many else _one(request, progress, on_text or (lambda piece: None))
    while True:
        # NumPy's warnings of an overflow are not shown; `generate` raises InputError where the result is not finite.
        with np.errstate(all="ignore"):
            result = next(results, None)
        if result is None:
            return
        yield result


def _open_questions(request, progress):
    """The model, still without its weights, and what is asked as token ids, checked as far as that is cheap."""
    pictures = 1 + len(request.beside) if request.images else 0
    model = open_model(request.model, request.backend)
    if model.tokenizer is None and any(isinstance(prompt, str) for prompt in request.prompts):
        raise InputError(f"PROMPT: {model.path} has no tokenizer.json or tokenizer.model; run.py --prompt-ids takes "
                         "token ids")
    prompts = [encode_prompt(prompt, model, pictures, progress) if isinstance(prompt, str) else list(prompt)
               for prompt in request.prompts]
    for ids in prompts:
        check_ids(ids, model.cfg, pictures)
    return model, prompts


def _interpret(answer, model, size, shapes):
    """What the tokens of an answer say: the text, the objects in it, and for each its mask or None."""
    text = model.tokenizer.decode(answer.ids) if model.tokenizer else ""
    detections = parse(text, *size[::-1]) if size else []  # Pillow's size is (width, height)
    return text, detections, shapes.masks(detections, *size[::-1]) if shapes else [None] * len(detections)


def _text(prompt):
    return prompt if isinstance(prompt, str) else None


# --- one question about one picture, or about none --------------------------------------------------------------------

def _one(request, progress, on_text):
    """Yield the Result of one question. What is cheap to check comes first, and the weights are read last."""
    started = time.perf_counter()
    images = [open_image(path) for path in [*request.images, *request.beside]]
    model, [ids] = _open_questions(request, progress)
    grammar = _grammar(ids, model) if request.constrain else None
    patches = model.cfg.vision_config.num_patches if images else 0
    scored_ids = _encoded_answers(request.scored, len(images) * patches + len(ids), model)
    model = model.with_weights(request.dtype, request.weights)
    pixels = np.stack([model.preprocessor(image) for image in images]).astype(request.dtype) if images else None
    loaded = time.perf_counter()
    image = os.fspath(request.images[0]) if images else None
    progress(f"{image or 'no picture'}: read by {request.model}, which took {loaded - started:.2f} s to load "
             f"({model.weights})")

    with record() if request.dump else nullcontext() as activations:
        features = model.features_of(pixels) if images else model.no_picture(1)
        if request.beside:
            features = in_one_prompt(features[:1], features[1:])
        seen = time.perf_counter()
        answer, several = _decode(request, model, features, ids, scored_ids, grammar, progress, on_text)
    text, detections, masks = "", [], []
    if not scored_ids:
        shapes = Shapes(model, progress) if images and request.masks else None
        text, detections, masks = _interpret(answer, model, images[0].size if images else None, shapes)
    if request.dump:
        _dump(request.dump, activations, pixels, [model.cfg.image_token_index] * features.shape[1] + ids)
    if request.save_image:
        save_picture(draw_detections(images[0], detections, masks), request.save_image)
    if request.xray:
        from minipali.looking.page import write_page  # few want it
        write_page(request.xray, model, images, pixels, ids, _text(request.prompts[0]), answer, request.thorough,
                   progress)
    yield Result(image, _text(request.prompts[0]), ids, answer, text, detections, masks, loaded - started,
                  seen - loaded, several, model.tokenizer is None)


def _grammar(ids, model):
    from minipali.decoding.grammar import Grammar  # few need it
    return Grammar(ids, model)


def _encoded_answers(texts, prefix_length, model):
    if not texts:
        return []
    from minipali.decoding.search import encode_answer  # few need it
    return [encode_answer(text, prefix_length, model) for text in texts]


def _decode(request, model, features, ids, scored_ids, grammar, progress, on_text):
    """-> the Answer, and (text, Answer) of all beams, samples or scored texts, if several were wanted."""
    stream = model.tokenizer.decode_stream() if model.tokenizer else None

    def on_token(_, token):
        on_text(stream.push(token) if stream else f"{token} ")

    if not scored_ids and max(request.beams, request.best_of) == 1:
        [answer] = generate(model, features, [ids], request.decoding, on_token, grammar, request.logprobs)
        on_text(stream.finish() if stream else "")
        return answer, ()
    from minipali.decoding.search import beam_search, best_of, score  # few need it

    def text_of(answer):
        return model.tokenizer.decode(answer.ids) if model.tokenizer else ""

    def shown(answer):
        text = repr(text_of(answer)) if model.tokenizer else " ".join(map(str, answer.ids))
        return f"{answer.logprob:.3f} {text}" + (" (ended)" if answer.stopped_by == "eos" else "")

    def on_step(live, ended):
        if request.every_step:
            progress("beams: " + ", ".join(map(shown, live + ended)))

    if scored_ids:
        answers = score(model, features, ids, scored_ids)
        return answers[0], tuple(zip(request.scored, answers))
    if request.beams > 1:
        answers = beam_search(model, features, ids, request.beams, request.decoding.max_new_tokens, grammar, on_step)
    else:
        answers = best_of(model, features, ids, request.best_of, request.decoding, grammar)
    for answer in answers:
        progress(f"log-probability {shown(answer)}")
    for token in answers[0].ids:
        on_token(0, token)
    on_text(stream.finish() if stream else "")
    return answers[0], tuple((text_of(answer), answer) for answer in answers)


def _dump(path, activations, pixels, ids):
    """The recorded activations, the picture, if there is one, and the ids as one safetensors file."""
    from safetensors.numpy import save  # only needed here
    arrays = {**to_host(activations), "input_ids": np.array([ids])}
    if pixels is not None:
        arrays["pixel_values"] = pixels
    content = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    with replacing(path) as file:
        file.write(content)


# --- several questions, several pictures ------------------------------------------------------------------------------

def _folder_for(folder, paths):
    """Make the folder for the pictures with boxes; InputError if two of them would have one name."""
    names = [Path(path).name for path in paths]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"--save-image: two pictures are called {twice}, and one would take the other's place")
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made, expected a folder for several pictures "
                         f"({error.strerror})") from None


def _each(request, progress):
    """Yield the Result of every question about every picture, with a line of progress."""
    started, unusable = time.perf_counter(), 0
    paths, passed_over = picture_files(request.images)
    beside = [open_image(path) for path in request.beside]
    if not request.several:
        open_image(paths[0])  # if the only picture cannot be read, neither need the model be
    model, prompts = _open_questions(request, progress)
    if request.save_image and request.several:
        _folder_for(request.save_image, paths)
    model = model.with_weights(request.dtype, request.weights)
    loaded, shapes = time.perf_counter() - started, Shapes(model, progress) if request.masks else None
    progress(f"{len(paths)} pictures, {passed_over} other files passed over, {len(prompts)} questions: "
             f"read by {request.model}, which took {loaded:.2f} s to load ({model.weights})")

    def skip(error):
        nonlocal unusable
        if not request.several:
            raise error
        progress.complain(error)
        unusable += 1

    answered = answer_all(model, paths, prompts, model.features(beside) if beside else None, request.decoding, skip,
                          request.logprobs)
    for count, (path, size, vision, answers) in enumerate(answered, 1):
        progress.clear()
        all_detections, all_masks = [], []
        for prompt, ids, answer in zip(request.prompts, prompts, answers):
            text, detections, masks = _interpret(answer, model, size, shapes)
            all_detections += detections
            all_masks += masks
            yield Result(os.fspath(path), _text(prompt), ids, answer, text, detections, masks, loaded, vision,
                         ids_only=model.tokenizer is None)
        if request.save_image:
            to = request.save_image / f"{Path(path).name}.boxes.png" if request.several else request.save_image
            save_picture(draw_detections(open_image(path), all_detections, all_masks), to)
        progress.update(f"{count + unusable} of {len(paths)} pictures, {time.perf_counter() - started:.0f} s")
    progress(f"{len(paths) - unusable} pictures answered about in {time.perf_counter() - started:.1f} s")
