"""minipali/model/README.md: every block is run, every number is checked, every figure is drawn again."""
import re
import xml.etree.ElementTree as ElementTree

import pytest
from helpers import ROOT
from pages import differing_lines, prose, shell

from minipali.commands import figures
from minipali.looking.exercise_list import EXERCISES
from minipali.looking.lab import BUGS
from minipali.looking.pages import FENCE, missing_excerpts, run_page, scratch

FOLDER = ROOT / "minipali" / "model"
COURSE = (FOLDER / "README.md").read_text(encoding="utf-8")
SECTIONS = re.split(r"^## ", COURSE, flags=re.MULTILINE)[1:]
AGAIN = "run `python -m minipali figures` and look at what has changed"
# Numbers of other people, each with where it is from. All others are values of the page's code.
QUOTED = {"1,024": "PaliGemma's location tokens", "1,152": "SigLIP So400m's width", "2,048": "Gemma 2B's width",
          "1,023": "1,024 captions less one", "22,000": "SigLIP's batches", "1.00": "the cosine of a row with itself",
          "0.05": "a bound chosen here", "5,900": "weights/README.md: how the tower was exchanged",
          "89.7": "weights/README.md: before the training that followed"}


def test_blocks_numbers_and_anchors():
    """What the page's code prints, the values in its text, the lines that its links lead to."""
    with scratch():
        page = run_page(COURSE, FOLDER, shell)
    assert page == COURSE, f"{AGAIN}: {differing_lines(COURSE, page)}"


def test_excerpts_stand_in_their_files():
    assert sum(kind == "py" for kind, _ in FENCE.findall(COURSE)) >= 10
    assert list(missing_excerpts(COURSE, FOLDER)) == []


def test_numbers_in_the_text():
    """Whoever writes a measured number into the text by hand will see it age."""
    written = set(re.findall(r"(?<![\w.-])\d+\.\d+|\d{1,3}(?:,\d{3})+", re.sub(r"section \d+\.\d+", "", prose(COURSE))))
    arxiv = set(re.findall(r"\b\d{4}\.\d{5}\b", COURSE))
    assert written - arxiv <= set(QUOTED), written - arxiv - set(QUOTED)


@pytest.mark.parametrize("section", SECTIONS, ids=lambda text: text.split("\n")[0])
def test_each_section_is_whole(section):
    """An idea, a figure, code, a measurement, something to try, the mistake, the source."""
    assert re.search(r"!\[[^]]{20,}\]\(figures/\w+\.svg\)", section)
    for part in ("**In the code:**", "**Measured:**", "**Try:**", "**The mistake:**", "**Do it:**",
                 "**Where it comes from:**"):
        assert part in section, part
    assert re.search(r"\.py#L\d+-L\d+", section) and "```text" in section


def test_exercises_and_bugs_have_these_names():
    written = "".join(re.findall(r"\*\*Do it:\*\* .*", COURSE))
    named = set(re.findall(r"[ `]([\w-]+)`", written))
    assert named <= {exercise.name for exercise in EXERCISES} | {bug.name for bug in BUGS}
    assert len(named) >= 30


def numbers_apart(text):
    """A drawing as its text without numbers, and the numbers."""
    pattern = r"-?\d+(?:\.\d+)?"
    return re.sub(pattern, "#", text), [float(x) for x in re.findall(pattern, text)]


@pytest.fixture(scope="module")
def drawn():
    return figures.all_drawings()


def test_figures_are_what_is_drawn_today(drawn):
    """The same elements and words; places and percentages may differ in the last digit, as sums of floats do."""
    committed = {path.name: path.read_text(encoding="utf-8") for path in (FOLDER / "figures").iterdir()}
    assert set(committed) == set(drawn) and set(re.findall(r"figures/(\w+\.svg)", COURSE)) == set(drawn)
    for name, text in drawn.items():
        words, numbers = numbers_apart(text)
        old_words, old_numbers = numbers_apart(committed[name])
        assert words == old_words and len(numbers) == len(old_numbers), f"{name}: {AGAIN}"
        assert all(abs(a - b) <= 0.11 for a, b in zip(numbers, old_numbers)), f"{name}: {AGAIN}"


def test_figures_are_light_and_fit_a_phone(drawn):
    """Below 50 KB each; 480 wide, so the smallest letters, 14, are 10 pixels on a phone; nothing leaves the paper."""
    for name, text in drawn.items():
        assert len(text) < 50_000, name
        root = ElementTree.fromstring(text)
        width, height = map(float, root.get("viewBox").split()[2:])
        assert width == 480 and "prefers-color-scheme:dark" in text
        for element in root.iter():
            tag = element.tag.rpartition("}")[2]
            if tag == "text":
                assert float(element.get("font-size")) >= 14, name
                half = 0.27 * float(element.get("font-size")) * len(element.text)
                middle = float(element.get("x")) + {"start": half, "end": -half}.get(element.get("text-anchor"), 0)
                assert middle - half >= -4 and middle + half <= width + 8, f"{name}: {element.text!r}"
            if tag in ("text", "rect"):
                assert 0 <= float(element.get("y", 0)) <= height, name


def test_the_command_draws_into_any_folder(tmp_path, capsys, monkeypatch, drawn):
    monkeypatch.setattr(figures, "all_drawings", lambda: drawn)
    figures.main([str(tmp_path / "new")])
    assert {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "new").iterdir()} == drawn
    assert len(capsys.readouterr().out.splitlines()) == len(drawn)


def test_a_changed_number_is_noticed(tmp_path):
    """The page runner itself: outputs, values and anchors are made again, text that is no output stays."""
    (tmp_path / "code.py").write_text("a = 1\n\n\ndef f(x):\n    return x\n", encoding="utf-8")
    page = ("[`f`](code.py#L9-L10) gives 7<!--= f(2) -->\n\n```python\ndef f(x):\n    return 2 * x\n```\n\n"
            "then 8<!--= f(2) --> and\n\n```python\nprint(f(3))\n```\n\n```text\n5\n```\n\n```text\nstays\n```\n\n"
            "```sh\nsay x\nsay y\n```\n\n```text\n```\n\n```sh slow\nsay no\n```\n\n```py\nreturn x\n```\n")
    with pytest.raises(NameError):
        run_page(page, tmp_path)
    page = page.replace("7<!--= f(2) -->", "it")
    new = run_page(page, tmp_path, lambda line: f"{line[-1]}!\n")
    assert new == (page.replace("L9-L10", "L4-L5").replace("8<!--", "4<!--").replace("text\n5", "text\n6")
                   .replace("say y\n```\n\n```text\n", "say y\n```\n\n```text\nx!\ny!\n"))
    assert list(missing_excerpts(page, tmp_path)) == []
    assert list(missing_excerpts(page.replace("return x", "return z"), tmp_path)) == [("code.py", "return z\n")]
