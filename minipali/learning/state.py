"""What an unfinished run needs to go on, as one file: weights, the optimizer's averages, the number of steps done."""
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from minipali.errors import InputError
from minipali.files import make_folder, replacing


def save_state(path, arrays, about):
    """Weights and averages as one safetensors file; `about` says what they belong to. Raises InputError if it cannot."""
    make_folder(Path(path).parent)
    with replacing(path) as file:
        try:
            save_file(arrays, file.name, metadata={"about": json.dumps(about)})
        except SafetensorError as error:
            raise InputError(f"{path}: the training state cannot be written ({error})") from None


def load_state(path, about):
    """The arrays and the number of steps done; raises InputError if the file belongs to another run than `about`."""
    try:
        with safe_open(path, framework="np") as file:
            found = json.loads(file.metadata()["about"])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no dict
        step = found.pop("step")
    except (SafetensorError, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not a training state ({error})") from None
    about = json.loads(json.dumps(about))  # as the file tells it, where a tuple is a list
    differing = sorted(key for key in {*found, *about} if found.get(key) != about.get(key))
    if differing:
        raise InputError(f"{path}: belongs to a run with another {', '.join(differing)}; give another folder or delete it")
    return arrays, step
