"""In which form the weights are held: as the file has them, unless they do not fit into memory, or as the user says."""
import math
import re
from collections import Counter
from pathlib import Path

from minipali.checkpoint.read_matrices import TABLES, form_of, stays_matrix
from minipali.checkpoint.safetensors_file import ITEM_BYTES

WEIGHTS = {"float32": "F32", "bfloat16": "BF16", "int8": "I8"}  # the forms, and their dtype in a file
SMALL = 1 << 28  # bytes of matrices up to which plain float32 arrays are as quick, and simpler


def free_memory():
    """The bytes that the system can give without swapping; infinite where it does not say."""
    try:
        free = 1024 * int(re.search(r"MemAvailable:\s*(\d+)", Path("/proc/meminfo").read_text())[1])
    except (OSError, TypeError):
        return math.inf
    try:  # a container may get less than the machine has
        return min(free, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):
        return free


def bytes_of(stored, dtype):
    """The size of a tensor of a file in the given dtype."""
    return math.prod(stored.shape) * ITEM_BYTES[dtype]


def choose_weights(tensors: dict, asked: str | None = None, free: float | None = None) -> tuple[str | None, str]:
    """The form of a checkpoint's matrices and one line that says it; `tensors`: those of `open_any`.

    The form is one of WEIGHTS, or None for plain float32 arrays. `asked`: the form that the user wants; `free`: the
    memory there is, by default as the system says. int8, which is not exact, is chosen only where nothing else fits.
    """
    matrices = [stored for name, stored in tensors.items() if stays_matrix(name, stored.shape)]
    counts = Counter()  # bytes, without the tables, which are bfloat16 in a file of int8 as well
    for stored in [one for one in matrices if not one.name.endswith(TABLES)] or matrices:
        counts[stored.dtype] += bytes_of(stored, stored.dtype)
    stored_as = counts.most_common(1)[0][0] if counts else "F32"
    as_stored = next((form for form, dtype in WEIGHTS.items() if dtype == stored_as), None)
    free = free_memory() if free is None else free

    def size_in(form):
        return sum(bytes_of(one, WEIGHTS[form_of(one.name, form, one.dtype)]) for one in matrices)

    def line(form, why):
        return f"weights: {size_in(form) / 1e9:.1f} GB of {form}, {why}"

    if asked is not None:
        lies = asked == as_stored
        return asked, line(asked, "as they lie in the file" if lies else f"made from the file's {stored_as}")
    if sum(bytes_of(one, one.dtype) for one in matrices) <= SMALL and as_stored != "int8":
        return None, f"weights: {size_in('float32') / 1e6:.0f} MB of float32"
    form = as_stored or "float32"
    size = size_in(form)
    if size > free >= size_in("int8"):
        return "int8", line("int8", f"since {size / 1e9:.1f} GB of {form} do not fit into {free / 1e9:.1f} GB of free "
                            f"memory (--weights {form} reads them from the disk for each token)")
    return form, line(form, "as they lie in the file" if as_stored else f"made from the file's {stored_as}")
