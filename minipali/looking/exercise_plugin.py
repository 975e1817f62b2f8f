"""For pytest: puts the reader's function into the package before any test imports it (`-p` on the command line)."""
import contextlib
import importlib
import os
import pkgutil

import minipali.learning.backward
import minipali.model
from minipali.looking.exercise import installed, load
from minipali.looking.exercise_list import named

_stack = contextlib.ExitStack()


def pytest_configure(config):
    """Import the rooms that the function is used in, then exchange it everywhere."""
    name, _, path = os.environ["MINIPALI_EXERCISE"].partition("=")
    for package in (minipali.model, minipali.learning.backward):
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package.__name__}.{module.name}")
    for other in ("minipali.decoding.generate", "minipali.decoding.sampling", "minipali.outputs.boxes"):
        importlib.import_module(other)
    exercise = named(name)
    _stack.enter_context(installed(exercise, load(path, exercise)))


def pytest_unconfigure(config):
    """Put the original back."""
    _stack.close()
