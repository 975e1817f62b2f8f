"""The state of an unfinished run, as one file: weights, the optimizer's averages, the number of steps done."""
import json
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from minipali.checkpoint.safetensors_file import SAVED_AS, write_safetensors
from minipali.errors import InputError
from minipali.files import make_folder, replacing


def save_state(path, arrays, about):
    """Weights and averages, of one dtype, as a safetensors file; `about` says what they belong to.

    They are written as they lie in memory, without a copy. Raises InputError if the file cannot be written.
    """
    make_folder(Path(path).parent)
    dtype = next(iter(arrays.values())).dtype
    with replacing(path) as file:
        write_safetensors(file, arrays, SAVED_AS[dtype.name], {"about": json.dumps(about)})


def read_state(path: str | Path) -> tuple[dict[str, np.ndarray], dict]:
    """The arrays, and what they belong to, with the number of steps done as "step"; InputError if it is no state."""
    try:
        with safe_open(path, framework="np") as file:
            about = json.loads(file.metadata()["about"])
            about["step"] + 0  # raises unless it is a dict with a number
            return {name: file.get_tensor(name) for name in file.keys()}, about  # noqa: SIM118 - it is no dict
    except (SafetensorError, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a training state ({error})") from None


def load_state(path, about):
    """The arrays and the number of steps done; raises InputError if the file belongs to another run than `about`."""
    arrays, stored = read_state(path)
    step = stored.pop("step")
    about = json.loads(json.dumps(about))  # as JSON stores it, where a tuple is a list
    # While the rate is at its peak (see Schedule.fall) nothing yet depends on the last step's number.
    open_end = all(run.get("fall") is not None and step <= run.get("steps", 0) - run["fall"] for run in (stored, about))
    differing = sorted(key for key in {*stored, *about} if stored.get(key) != about.get(key)
                       and not (open_end and key in ("steps", "fall")))
    if differing:
        raise InputError(f"{path}: belongs to a run with another {', '.join(differing)}; "
                         "give another folder or delete it")
    return arrays, step
