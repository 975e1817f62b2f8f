"""Draw the figures of the course again, and rewrite what its code prints.

    python -m minipali figures            the figures in minipali/model/figures, the numbers in the two READMEs
    python -m minipali figures FOLDER     the figures alone, into another folder
"""
from pathlib import Path

from minipali.errors import Parser, path_name
from minipali.files import make_folder, replacing
from minipali.looking.figures import DRAWINGS
from minipali.looking.measured import drawings
from minipali.looking.pages import ROOT, run_page, scratch

FIGURES = ROOT / "minipali" / "model" / "figures"
PAGES = [ROOT / "minipali" / "model" / "README.md", ROOT / "README.md"]


def all_drawings():
    """{file name: SVG text} of every figure of the course."""
    return {f"{name}.svg": str(drawing) for name, drawing in
            [*((name, draw()) for name, draw in DRAWINGS.items()), *drawings().items()]}


def write(path, text):
    with replacing(path) as file:
        file.write(text.encode("utf-8"))
    print(path)


def main(argv):
    parser = Parser("minipali figures", __doc__.split("\n")[0], "  python -m minipali figures\n"
                    "  python -m minipali figures drawings")
    parser.add_argument("folder", nargs="?", type=path_name, metavar="FOLDER", help="draw there, and rewrite no page")
    args = parser.parse_args(argv)
    folder = Path(args.folder) if args.folder else FIGURES
    make_folder(folder)
    for name, text in all_drawings().items():
        write(folder / name, text)
    for page in [] if args.folder else PAGES:
        with scratch():
            text = run_page(page.read_text(encoding="utf-8"), page.parent)
        write(page, text)
