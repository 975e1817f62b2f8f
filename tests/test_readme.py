"""What the README says of the repository is so."""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LISTED = dict(re.findall(r"^\| \[(\S+)\]\(\1\) \| (\d+) \|", README, re.MULTILINE))


def test_every_room_and_every_file_of_the_core_is_listed():
    core = {f"minipali/model/{name}.py" for name in ("ops", "siglip", "gemma", "paligemma", "losses")}
    assert set(LISTED) == core
    rooms = {f"minipali/{path.parent.name}" for path in (ROOT / "minipali").glob("*/__init__.py")}
    assert {room for _, room in re.findall(r"^\| \[(minipali/\w+)/\]\((\S+)\)", README, re.MULTILINE)} == rooms


@pytest.mark.parametrize("name", LISTED)
def test_line_counts(name):
    assert len((ROOT / name).read_text(encoding="utf-8").splitlines()) == int(LISTED[name])


def test_the_core_can_be_read_in_one_sitting():
    """About 600 lines; features belong in the other rooms."""
    assert sum(int(lines) for name, lines in LISTED.items() if name.startswith("minipali/model/")) <= 620


@pytest.mark.parametrize("page", ["README.md", "weights/README.md"])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / page).parent / target).exists(), target


def test_the_two_commands():
    """The set-up as it is promised: two commands, what the first prints between them."""
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    assert [kind for kind, _ in blocks[:3]] == ["sh", "text", "sh"]
    assert blocks[0][1] == "pip install -r requirements.txt && python run.py\n" and blocks[2][1] == "python -m pytest\n"


def test_core_imports_no_other_room():
    """No import runs from the core to another room, the tracer's taps and the decorator for rows excepted."""
    for path in (ROOT / "minipali" / "model").glob("*.py"):
        for module in re.findall(r"^\s*(?:from|import) (minipali\.\S+)", path.read_text(encoding="utf-8"), re.MULTILINE):
            known = module in ("minipali.trace", "minipali.parallel")
            assert known or module.startswith("minipali.model"), f"{path.name}: {module}"
