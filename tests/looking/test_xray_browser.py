"""The X-ray page in a real browser: every panel drawn, every control does what it says, the keyboard alone suffices."""
import base64
import json
import re
import time

import numpy as np
import pytest
from browser import CHROMIUM, Browser
from helpers import ROOT

from minipali.decoding.generate import generate
from minipali.decoding.loaded_model import encode_prompt, load_model
from minipali.decoding.sampling import Decoding, candidates
from minipali.inputs.image import open_image
from minipali.looking.gather import decoder_attention, observe, token_texts
from minipali.looking.logit_lens import logit_lens
from minipali.looking.page import render
from minipali.looking.xray import Xray

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")

PROMPTS = {"caption": "caption en", "answer": "answer en how many shapes are there?", "detect": "detect heart",
           "segment": "segment heart"}
WIDTHS = [390, 1280]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The pages of four prompts about a bundled picture: {name: (path, what was seen)}."""
    folder, model = tmp_path_factory.mktemp("pages"), load_model(ROOT / "weights")
    picture, made = open_image(ROOT / "weights" / "examples" / "shapes.png"), {}
    pixels = model.preprocessor(picture)[None]
    for name, prompt in PROMPTS.items():
        ids = encode_prompt(prompt, model)
        [answer] = generate(model, model.features_of(pixels), [ids], Decoding(max_new_tokens=64))
        seen, path = observe(model, pixels, ids, answer), folder / f"{name}.html"
        path.write_text(render(Xray(seen, [picture], prompt)), encoding="utf-8")
        made[name] = path, seen
    return made


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def page(browser, pages):
    """The caption's page on a wide screen; no message may come of what a test does with it."""
    browser.messages.clear()
    browser.open(pages["caption"][0].as_uri(), 1280, dark=False)
    ready(browser)
    yield browser
    assert browser.messages == []


def ready(browser):
    """Wait for the pictures that the page carries, which a browser decodes in its own time."""
    for _ in range(100):
        if browser.evaluate("location.hash.length > 5"):
            break
        time.sleep(0.02)
    time.sleep(0.1)


def state(browser):
    return {name: int(value) for name, value in re.findall(r"(\w)=(-?\d+)", browser.evaluate("location.hash"))}


def text(browser, selector):
    return browser.evaluate(f"document.querySelector({json.dumps(selector)}).innerText")


def slide(browser, panel, number, value):
    """Move a panel's slider to a value, as the mouse does."""
    browser.evaluate(f"""(() => {{ const input = document.querySelectorAll("#{panel} input")[{number}];
      input.value = {value}; input.dispatchEvent(new Event("input")); }})()""")


# The pixels of every canvas in sight, as one text for each panel: what has changed is seen by comparing.
DRAWN = """Object.fromEntries([...document.querySelectorAll("section:not([hidden])")].map((section) => [section.id,
  section.querySelector(".body").innerText + [...section.querySelectorAll("canvas")].map((c) => c.toDataURL()).join() +
  [...section.querySelectorAll("svg")].map((s) => s.outerHTML).join()]))"""


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_panel_is_drawn(browser, pages, name, width):
    """In the light and in the dark; the page follows the system while it is open."""
    browser.messages.clear()
    browser.open(pages[name][0].as_uri(), width, dark=False)
    ready(browser)
    drawn_well(browser, name, width, dark=False)
    browser.appearance(width, dark=True)
    time.sleep(0.1)
    drawn_well(browser, name, width, dark=True)


def drawn_well(browser, name, width, dark):
    """No message, nothing wider than the screen, no empty panel, no blank canvas, no target too small for a finger."""
    assert browser.messages == []
    assert browser.evaluate("document.documentElement.scrollWidth") == width, "wider than the screen"
    assert browser.evaluate("document.querySelectorAll('*').length") < 2000
    hidden = {"boxes"} if name in ("caption", "answer") else {"left-out"}
    assert set(browser.evaluate("[...document.querySelectorAll('section[hidden]')].map((s) => s.id)")) == hidden
    panels = browser.evaluate("""[...document.querySelectorAll("section:not([hidden])")].map((section) => [section.id,
      section.querySelector(".body").innerText.length + section.querySelectorAll(".body canvas").length,
      [...section.querySelectorAll(".body canvas")].filter((c) => c.offsetParent && new Set(new Uint32Array(
        c.getContext("2d").getImageData(0, 0, c.width, c.height).data.buffer)).size < 2).length])""")
    assert all(size > 20 for _, size, _ in panels), panels
    assert sum(blank for _, _, blank in panels) == 0, panels
    paper = browser.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(18, 22, 28)" if dark else "rgb(255, 255, 255)")
    small = browser.evaluate("""[...document.querySelectorAll("button, select, summary, input[type=range]")].filter(
      (e) => e.offsetParent && e.getBoundingClientRect().height < 43.5).length""")
    assert small == 0, "targets of less than 44 pixels"


@pytest.mark.parametrize("name", PROMPTS)
def test_the_page_is_small(pages, name):
    assert pages[name][0].stat().st_size < 400_000


def test_a_token_is_chosen(page, pages):
    """By click; every panel about the token follows, and the link says so."""
    _, seen = pages["caption"]
    before = page.evaluate(DRAWN)
    page.click("#tokens button:nth-child(4)")
    assert state(page)["t"] == 3 and text(page, "[aria-checked=true]").startswith("␣heart")
    after = page.evaluate(DRAWN)
    moved = {panel for panel in after if after[panel] != before[panel]}
    assert moved >= {"answer", "picture", "sequence", "attention", "stream", "lens", "next", "cache", "rope", "norm"}
    assert f"number {seen.steps[3]} of the vocabulary" in text(page, "#answer")


def test_layer_and_head_are_chosen(page):
    for label, name, value in [("Layer", "l", 1), ("Head", "h", 2)]:
        before = page.evaluate(DRAWN)
        page.evaluate(f"(() => {{ const s = document.querySelector('select[aria-label={label}]'); s.value = {value};"
                      "s.dispatchEvent(new Event('change')); })()")
        assert state(page)[name] == value
        after = page.evaluate(DRAWN)
        assert {panel for panel in after if after[panel] != before[panel]} >= {"picture", "attention", "rope"}
    assert text(page, "#attention .note").startswith("Layer 1, head 2.")


def test_the_numbers_are_the_models(page, pages):
    """What is printed for a layer and a head, beside what was recorded."""
    _, seen = pages["caption"]
    page.evaluate("location.hash = '#t=5&l=1&h=2&p=3&v=1'")
    time.sleep(0.1)
    row = decoder_attention(seen)[1, 2, 5]
    shares = re.findall(r"([\d.]+) %", text(page, "#attention .bars"))
    P, end = seen.patches, seen.patches + len(seen.prompt)
    expected = [row[:P].sum(), row[P], row[P + 1:end].sum(), row[end:].sum()]
    assert np.abs(np.array(shares, float) / 100 - expected).max() < 0.012
    lens, at = logit_lens(seen), len(seen.prompt) - 1 + 5
    cells = page.evaluate("[...document.querySelectorAll('#lens td.here')].map((td) => td.firstChild.data)")
    assert [cell.replace("␣", " ").replace("⏎", "\n") for cell in cells] == token_texts(seen.model, lens.top[:, at])


def test_the_sliders_choose_as_the_model_does(page, pages):
    """Temperature, top-k and top-p against decoding/sampling.py, on a step that is not certain."""
    _, seen = pages["caption"]
    best_two = np.sort(seen.logits, -1)[:, -2:]
    step = int(np.argmin(best_two[:, 1] - best_two[:, 0]))
    page.evaluate(f"location.hash = '#t={step}'")
    for sliders, (temperature, top_k, top_p) in [((19, 50, 1), (2.0, None, 1.0)), ((14, 5, 1), (1.5, 5, 1.0)),
                                                 ((19, 50, 0.8), (2.0, None, 0.8)), ((19, 7, 0.6), (2.0, 7, 0.6))]:
        for number, value in enumerate(sliders):
            slide(page, "next", number, value)
        shown = text(page, "#next .bars").splitlines()
        found = [line for line in shown if "logit" in line]
        tokens, probabilities = candidates(seen.logits[step], temperature, top_k, top_p)
        chances = dict(zip(tokens.tolist(), probabilities))
        ten = np.argsort(-seen.logits[step], kind="stable")[:10]
        for line, token in zip(found, ten.tolist()):
            if token not in chances:
                assert line.startswith("cut off"), (line, temperature, top_k, top_p)
            elif not line.startswith(("<", ">")):
                assert abs(float(line.split(" %")[0]) / 100 - chances[token]) < 0.006, (line, chances[token])


def test_switches(page):
    """Causal or not, softmax or sigmoid, one scale, one cell moved: each changes its own panel and no other."""
    def changed(panel, number=0):
        before = page.evaluate(DRAWN)
        page.evaluate(f"document.querySelectorAll('#{panel} .check input')[{number}].click()")
        after = page.evaluate(DRAWN)
        return {name for name in after if after[name] != before[name]}

    found = []
    for step in (1, 2, 3):  # one token of the answer sets the scale for all, and at this one nothing changes
        page.evaluate(f"location.hash = '#t={step}'")
        found += [changed("picture"), changed("picture")]
    assert {"picture"} in found and all(names <= {"picture"} for names in found)
    for panel, number in [("sequence", 0), ("contrast", 0), ("contrast", 1)]:
        assert changed(panel, number) == {panel}
    columns = page.evaluate("""[...document.querySelectorAll("#contrast tr")].slice(1).map(
      (tr) => tr.children[1].classList.contains("settled"))""")
    assert sum(columns) > 1, "under the softmax one cell moves others"


def test_patches_are_chosen_by_click_and_by_arrows(page):
    page.click("#picture canvas", 0.01, 0.01)
    assert state(page)["p"] == 0
    page.click("#picture canvas", 0.99, 0.99)
    last = state(page)["p"]
    side = round((last + 1) ** 0.5)
    assert side * side == last + 1
    page.evaluate("document.querySelector('#picture canvas').focus()")
    for key, expected in [("ArrowRight", last), ("ArrowLeft", last - 1), ("ArrowUp", last - 1 - side)]:
        page.press(key)
        assert state(page)["p"] == expected
    assert f"row {side - 1}, column {side - 1}" in text(page, "#patch")


def test_erasing_shows_the_new_answer(page, pages):
    """Each window of the grid: what the page says is what the model said."""
    blob = re.search(r'id="data">([^<]*)<', pages["caption"][0].read_text(encoding="utf-8"))[1]
    raw = base64.b64decode(blob)
    texts = json.loads(json.loads(raw[8:8 + int.from_bytes(raw[:8], "little")])["__metadata__"]["texts"])
    side, original = texts["grid"], texts["text"][texts["prompt"]:]
    for window in [0, side - 2, (side - 1) ** 2 - 1]:
        row, column = divmod(window, side - 1)
        erased = texts["answers"][texts["erased"][window]]
        page.evaluate(f"location.hash = '#p={row * side + column}'")
        time.sleep(0.05)
        said = page.evaluate("document.querySelectorAll('#picture .sentence')[0].textContent")
        assert said == ("".join(texts["tokens"][i] for i in erased) or "(no answer)")
        marks = page.evaluate("[...document.querySelectorAll('#picture .sentence mark')].map((m) => m.textContent)")
        new = {texts["tokens"][i] for i in set(erased) - set(original)}
        assert new <= set(marks) and (erased != original or not marks)


def test_vision_layers_kernels_and_code(page):
    before = page.evaluate(DRAWN)
    page.click("#vision figure button")
    assert state(page)["v"] == 0 and "vision layer 0" in text(page, "#vision .note")
    page.click("#patch button.kernel:nth-child(3)")
    after = page.evaluate(DRAWN)
    assert {name for name in after if after[name] != before[name]} == {"vision", "patch"}
    page.click("#attention summary")
    assert "minipali/model/ops.py:" in text(page, "#attention details")
    assert "def attention_weights" in text(page, "#attention pre")
    page.click("#attention .tap button")
    time.sleep(0.1)
    assert text(page, "#attention .tap button") in ("Copied", "Selected: copy it")
    assert 'activations["language_model.model.layers.' in text(page, "#attention .tap code")


def test_the_dial_turns_both_hands_alike(page):
    """Both tokens moved by the same distance: the picture of the hands turns, the products stay."""
    numbers = page.evaluate("document.querySelector('#rope .bars').innerText")
    hands = page.evaluate("document.querySelector('.dial').innerHTML")
    slide(page, "rope", 2, 7)
    assert page.evaluate("document.querySelector('#rope .bars').innerText") == numbers
    assert page.evaluate("document.querySelector('.dial').innerHTML") != hands
    for number in (0, 1):
        slide(page, "rope", number, 2)
    assert "pair 2 turns by" in text(page, "#rope .note")


def test_the_keyboard_alone_suffices(page):
    """Tab reaches every control, and it has a frame; arrows, Enter and space work them; the tour has its keys."""
    page.evaluate("document.activeElement.blur()")
    page.press("Tab")
    assert page.evaluate("document.activeElement.id") == "tour-start"
    page.press("Enter")
    stops = page.evaluate("document.querySelector('#tour p').textContent")
    assert stops.startswith("1 of 10.") and not page.evaluate("document.getElementById('tour').hidden")
    for number in range(2, 11):
        page.press("Enter")
        assert page.evaluate("document.querySelector('#tour p').textContent").startswith(f"{number} of 10.")
        top = page.evaluate("document.querySelector('.touring').getBoundingClientRect().top")
        assert -400 < top < 800
    page.press("Escape")
    assert page.evaluate("document.getElementById('tour').hidden")
    assert page.evaluate("document.activeElement.id") == "tour-start"
    reached = set()
    for _ in range(150):
        page.press("Tab")
        kind = page.evaluate("""(() => { const e = document.activeElement; if (e === document.body) return null;
          const style = getComputedStyle(e), section = e.closest("section");
          return [e.tagName + (e.type || ""), section ? section.id : "bar", style.outlineStyle !== "none"]; })()""")
        if kind is None:
            break
        assert kind[2], f"no frame around {kind}"
        reached.add((kind[0], kind[1]))
    assert {("BUTTONbutton", "bar"), ("SELECTselect-one", "bar"), ("CANVAS", "picture"), ("INPUTrange", "next"),
            ("INPUTrange", "rope"), ("INPUTcheckbox", "sequence"), ("SUMMARY", "lens"), ("INPUTcheckbox", "contrast"),
            ("BUTTONbutton", "patch"), ("BUTTONbutton", "vision")} <= reached
    page.evaluate("document.querySelector('#tokens [aria-checked=true]').focus()")
    for key, expected in [("Home", 0), ("ArrowRight", 1), ("ArrowLeft", 0)]:
        page.press(key)
        assert state(page)["t"] == expected
        assert page.evaluate("document.activeElement.getAttribute('aria-checked')") == "true"
    page.evaluate("document.querySelector('#sequence .check input').focus()")
    page.press(" ")
    assert page.evaluate("document.querySelector('#sequence .check input').checked")
    page.evaluate("document.querySelector('#next input').focus()")
    before = text(page, "#next output")
    page.press("ArrowRight")
    assert text(page, "#next output") != before


def test_play(page):
    page.evaluate("location.hash = '#t=0'")
    page.click("#choices button")
    time.sleep(1.2)
    assert state(page)["t"] == 1
    page.click("#choices button")
    time.sleep(1.0)
    assert state(page)["t"] == 1


def test_a_link_carries_the_state(browser, pages):
    wanted = {"t": 2, "l": 1, "h": 3, "p": 12, "v": 2}
    link = "&".join(f"{name}={value}" for name, value in wanted.items())
    browser.open(f"{pages['caption'][0].as_uri()}#{link}", 1280, dark=False)
    ready(browser)
    assert state(browser) == wanted
    browser.open(f"{pages['caption'][0].as_uri()}#t=999&l=-7&x=1&p=abc", 1280, dark=False)
    ready(browser)
    found = state(browser)
    assert found["t"] == len(pages["caption"][1].steps) - 1 and found["l"] == -1


def test_tokens_are_text(browser, tmp_path, pages):
    """A prompt and tokens that look like markup, and a hostile name of a model, stay what they are."""
    _, seen = pages["answer"]
    evil = '<img src=x onerror="alert(1)"></script><script>alert(2)</script>'
    made = Xray(seen, [open_image(ROOT / "weights" / "examples" / "shapes.png")], evil)
    made.texts["model"] = evil
    made.texts["tokens"] = [evil + token for token in made.texts["tokens"]]
    path = tmp_path / "evil.html"
    path.write_text(render(made), encoding="utf-8")
    browser.messages.clear()
    browser.open(path.as_uri(), 390, dark=False)
    ready(browser)
    assert browser.messages == [] and browser.evaluate("document.querySelectorAll('img, script').length") == 2
    assert evil in text(browser, "#asked") and evil in browser.evaluate("document.title")
    assert browser.evaluate("document.documentElement.scrollWidth") == 390
