"""Two recordings of the same run: which activation is the first to differ, and what usually is wrong there?

    python run.py photo.png "caption en" --dump ours.safetensors
    python -m minipali compare ours.safetensors theirs.safetensors

Each file holds activations under the names of the modules that gave them. The exit status is 1 if one differs.
"""
import argparse
import math
import textwrap

from minipali.errors import InputError, Parser, path_name
from minipali.looking.compare import Recording, compare, first_divergence
from minipali.looking.taps import usual_cause


def _tolerance(text):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text:.20}: expected a number between 0 and 1, such as 1e-5")
    return value


def _only(which, names):
    """The line that says what could not be compared."""
    shown = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
    return f"only in {which}, or of no known module: {len(names)} ({shown})"


def _verdict(rows, first):
    """What the table says, in a few lines."""
    if first is None:
        return f"All {len(rows)} agree."
    before = max((row.used for row in rows[:rows.index(first)]), default=0.0)
    lines = [f"The first to differ: {first.name}"]
    if rows.index(first):
        lines.append(f"The one before it, {rows[rows.index(first) - 1].name}, still agrees.")
    if first.used < 4 * before:
        lines.append(f"The difference grew slowly ({100 * before:.0f} % of the tolerance before it): this may be "
                     "rounding that adds up. Compute both in float64 to know, or give --tolerance.")
    cause = first.note if first.note.startswith(("shape", "not all")) else usual_cause(first.name)
    lines.append(f"What is usually wrong there: {cause}.")
    return "\n".join(textwrap.fill(line, 110, subsequent_indent="    ", break_long_words=False) for line in lines)


def main(argv):
    parser = Parser("minipali compare", "Two recordings of the same run: which activation is the first to differ, and "
                    "what usually is wrong there? The exit status is 1 if one differs.",
                    '  python run.py photo.png "caption en" --dump ours.safetensors\n'
                    "  python -m minipali compare ours.safetensors theirs.safetensors")
    parser.add_argument("a", type=path_name, metavar="A",
                        help="a safetensors file: of run.py --dump, or with the same names")
    parser.add_argument("b", type=path_name, metavar="B", help="another")
    parser.add_argument("--tolerance", type=_tolerance, metavar="X",
                        help="largest difference allowed, as a fraction of an array's largest value "
                             "(default: 1e-9 for float64, 2e-5 for float32, 0.03 for 16 bits)")
    args = parser.parse_args(argv)
    rows, only_a, only_b = compare(Recording(args.a), Recording(args.b), args.tolerance)
    if not rows:
        raise InputError(f"{args.a} and {args.b}: no name in common, expected those of the checkpoint's modules, such "
                         "as language_model.model.layers.0.mlp")
    width = max(len(row.name) for row in rows)
    print(f"{'activation':{width}}  {'shape':>18}  {'largest Δ':>9}  tolerance used")
    first = first_divergence(rows)
    for row in rows:
        used = "beyond it" if math.isinf(row.used) else f"{100 * row.used:.3g} %"
        mark = "  <- the first to differ" if row is first else "  <-" if row.used > 1 else ""
        note = f"  ({row.note})" if row.note else ""
        print(f"{row.name:{width}}  {list(row.shape)!s:>18}  {row.difference:9.1e}  {used:>14}{note}{mark}")
    for which, names in [("A", only_a), ("B", only_b)]:
        if names:
            print(_only(which, names))
    print(_verdict(rows, first))
    return int(first is not None)
