"""The commands: `python -m minipali` lists them, `python -m minipali COMMAND …` runs one."""
import importlib
import sys

from minipali.errors import InputError, run_command

COMMANDS = {
    "inspect": "what a checkpoint holds, without loading it",
    "evaluate": "measure what the shipped model knows",
    "train": "train the shipped model from nothing, or fine-tune any PaliGemma",
    "zero-shot": "compare a picture with captions",
    "exercise": "write a function of this repository anew, and have it checked",
    "lab": "put a classic bug into the running model and see what it does",
}


def main(argv):
    if not argv or argv[0] in ("-h", "--help"):
        for name, line in COMMANDS.items():
            print(f"python -m minipali {name:10} {line}")
        return 0
    name, *rest = argv
    if name not in COMMANDS:
        return run_command("minipali", unknown, [name])
    module = importlib.import_module(f"minipali.commands.{name.replace('-', '_')}")
    return run_command(f"minipali {name}", module.main, rest)


def unknown(argv):
    raise InputError(f"{argv[0]}: no such command, expected one of {', '.join(COMMANDS)}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
