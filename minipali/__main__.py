"""The commands: `python -m minipali` lists them, `python -m minipali COMMAND …` runs one."""
import importlib
import sys

from minipali.errors import InputError, prepare_process, run_command

COMMANDS = {
    "inspect": "what a checkpoint holds, without loading it",
    "evaluate": "measure what the shipped model knows",
    "train": "train the shipped model from nothing, or fine-tune any PaliGemma",
    "zero-shot": "compare a picture with captions",
    "xray": "write a page for the browser that shows how an answer came about",
    "lens": "where each token of an answer looked, and what the model would have said after each layer",
    "compare": "set two recordings of activations side by side and name the first that differs",
    "exercise": "write a function of this repository anew, and have it checked",
    "lab": "put a classic bug into the running model and see what it does",
    "bench": "how fast a checkpoint answers here, against the machine's limits and against transformers",
    "figures": "draw the course's figures again and rewrite the numbers of its text",
}


def run(argv):
    """List the commands, or run the first word's with the other words."""
    if not argv or argv[0] in ("-h", "--help"):
        for name, line in COMMANDS.items():
            print(f"python -m minipali {name:10} {line}")
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        raise InputError(f"{name:.80}: no such command, expected one of {', '.join(COMMANDS)}")
    # Imported when it is known what is needed, and here, so that what goes wrong with it is said in one line.
    importlib.import_module("minipali.backend").keep_freed_memory()
    return importlib.import_module(f"minipali.commands.{name.replace('-', '_')}").main(rest)


def main(argv):
    """The exit status. Errors are those of "minipali COMMAND", as its --help calls it."""
    name = argv[0] if argv and argv[0] in COMMANDS else ""
    return run_command(f"minipali {name}".strip(), run, argv)


if __name__ == "__main__":
    prepare_process()
    sys.exit(main(sys.argv[1:]))
