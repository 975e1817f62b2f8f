"""What the README says of the repository is so, and every command in it does what is shown."""
import importlib
import re
import shlex
import sys

import pytest
from helpers import ROOT
from pages import differing_lines, shell
from PIL import Image

import run
from minipali.__main__ import COMMANDS
from minipali.looking.exercise_list import EXERCISES
from minipali.looking.lab import BUGS
from minipali.looking.pages import FENCE, run_page, scratch

README = (ROOT / "README.md").read_text(encoding="utf-8")
LISTED = dict(re.findall(r"^\| \[(\S+)\]\(\1\) \| (\d+)<!--", README, re.MULTILINE))
BLOCKS = FENCE.findall(README)
AGAIN = "run `python -m minipali figures` and look at what has changed"


def test_every_room_and_every_file_of_the_core_is_listed():
    core = {f"minipali/model/{name}.py" for name in ("ops", "siglip", "gemma", "paligemma", "losses")}
    assert set(LISTED) == core
    rooms = {f"minipali/{path.parent.name}" for path in (ROOT / "minipali").glob("*/__init__.py")}
    assert {room for _, room in re.findall(r"^\| \[(minipali/\w+)/\]\((\S+)\)", README, re.MULTILINE)} == rooms


@pytest.mark.parametrize("name", LISTED)
def test_line_counts(name):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) == int(LISTED[name]), AGAIN


def test_the_core_can_be_read_in_one_sitting():
    """About 600 lines; features belong in the other rooms."""
    assert sum(int(lines) for name, lines in LISTED.items() if name.startswith("minipali/model/")) <= 620


def heading_anchors(text):
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in headings}


@pytest.mark.parametrize("page", ["README.md", "weights/README.md", "minipali/model/README.md"])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", FENCE.sub("", text)):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if anchor and path.suffix == ".md":
            assert anchor in heading_anchors(path.read_text(encoding="utf-8")), anchor


def test_the_two_commands():
    """The set-up as it is promised: two commands, what the first prints between them."""
    blocks = [block for block in BLOCKS if block[0] in ("sh", "text")]
    assert [kind for kind, _ in blocks[:3]] == ["sh", "text", "sh"]
    assert blocks[0][1] == "pip install -r requirements.txt && python run.py\n" and blocks[2][1] == "python -m pytest\n"


def test_blocks_print_what_is_shown():
    """The walk, and every command that has its output under it."""
    with scratch():
        page = run_page(README, ROOT, shell)
    assert page == README, f"{AGAIN}: {differing_lines(README, page)}"


def test_the_walk_is_short():
    """About fourteen statements: what is imported is not counted."""
    walk = next(code for kind, code in BLOCKS if kind == "python")
    lines = [line for line in walk.splitlines() if line and not re.match(r"from |import ", line)]
    assert len(lines) <= 14 and walk.count("\n") <= 24


def test_the_failures_are_failures():
    said, right = (re.findall(rf"^{word}: +(.*)$", README, re.MULTILINE) for word in ("said", "right"))
    assert len(said) == len(right) == 2 and all(a != b for a, b in zip(said, right))


def commands():
    """Every line that starts a program: of the blocks, and in the text between backticks."""
    text = re.sub(r"\n", " ", FENCE.sub("", README))
    written = [line for kind, code in BLOCKS if kind.split()[:1] == ["sh"] for line in code.splitlines()]
    return written + re.findall(r"`((?:python|run\.py) [^`]*)`", text)


@pytest.mark.parametrize("line", sorted(set(commands())))
def test_commands_are_spelled_right(line, capsys):
    """Also those that need weights or hours: every option is known, every file of the repository is there."""
    words = shlex.split(line.rpartition("&& ")[2])
    if words[0] == "python":
        words = words[1:]
    if words[:2] == ["-m", "pytest"] or words[0] in ("tests/mutations/run.py",):
        # Where seeded bugs are tried the tests run in a copy without tests/mutations.
        assert all((ROOT / word).exists() for word in words if word.endswith(".py") and "mutations" not in word)
    elif words[0] == "run.py":
        run.options().parse_intermixed_args(words[1:] if "--help" not in words else [])
    elif words[0] != "-m":
        assert (ROOT / words[0]).exists(), line
    else:
        assert words[1] == "minipali" and (len(words) == 2 or words[2] in COMMANDS), line
        if len(words) > 2:
            with pytest.raises(SystemExit):
                importlib.import_module(f"minipali.commands.{words[2].replace('-', '_')}").main(["--help"])
            known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
            assert {word for word in words if word.startswith("--")} <= known, line
            if words[2] in ("exercise", "lab") and len(words) > 3:
                names = {one.name for one in (EXERCISES if words[2] == "exercise" else BUGS)}
                assert words[3] in names, line


def test_the_table_has_every_option():
    rows = re.findall(r"^\| (`--.*?) \|", README, re.MULTILINE)
    assert sorted(re.findall(r"--[\w-]+", " ".join(rows))) == sorted(
        option for action in run.options()._actions for option in action.option_strings if option.startswith("--")
        and option != "--help")


def test_the_hooks_for_another_implementation():
    """The block for PyTorch, where torch and transformers are installed: no row of the comparison differs."""
    why = "needs torch and transformers, which are no requirements of this package"
    torch = pytest.importorskip("torch", reason=why)
    transformers = pytest.importorskip("transformers", reason=why)
    [code] = [code for kind, code in BLOCKS if kind == "python torch"]
    with scratch():
        processor = transformers.AutoProcessor.from_pretrained("weights")
        model = transformers.PaliGemmaForConditionalGeneration.from_pretrained(
            "weights", dtype=torch.float32, attn_implementation="eager")
        inputs = processor(text="<image>caption en", images=Image.open("weights/examples/shapes.png").convert("RGB"),
                           return_tensors="pt")
        importlib.import_module("safetensors.torch")
        exec(code, {"torch": torch, "safetensors": sys.modules["safetensors"], "model": model, "inputs": inputs})
        shell('python run.py weights/examples/shapes.png "caption en" --dump ours.safetensors')
        assert "differ" not in shell("python -m minipali compare ours.safetensors theirs.safetensors").splitlines()[-1]


def test_core_imports_no_other_room():
    """No import runs from the core to another room, trace.py and parallel.py excepted."""
    for path in (ROOT / "minipali" / "model").glob("*.py"):
        source = path.read_text(encoding="utf-8")
        for module in re.findall(r"^\s*(?:from|import) (minipali\.\S+)", source, re.MULTILINE):
            known = module in ("minipali.trace", "minipali.parallel")
            assert known or module.startswith("minipali.model"), f"{path.name}: {module}"
