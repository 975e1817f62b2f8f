"""Named activations: the model says `x = tap("mlp", x)`, and whoever wants to see records.

    with record() as activations:
        prefill(...)
    activations["vision_tower.vision_model.encoder.layers.0.mlp"]

The names are the checkpoint's module paths, so two implementations can be compared without a table of names.
`tap(name, x)` returns x, so whoever reads the model may ignore it. When nobody records, it keeps nothing.
"""
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

ATTENTION = "attn_weights"  # large, one number for each pair of tokens and each head, so kept on request only

_path = []          # the modules that we are inside of, outermost first
_recorder = None    # what is recording, if anything


class scope:
    """`with scope("layers", 3):` every tap inside is named below `layers.3`."""

    def __init__(self, *names):
        self.names = names

    def __enter__(self):
        _path.extend(self.names)

    def __exit__(self, *_):
        del _path[-len(self.names):]


class _Recorder:
    """The dict that is being filled, and what goes into it; the arguments are those of `record`."""

    def __init__(self, attention, steps, only):
        self.activations, self.attention, self.steps, self.only = {}, attention, steps, only

    def keep(self, name, x):
        """Put an array under its full name, unless it was not asked for."""
        if name.endswith(ATTENTION) and not self.attention or self.only is not None and not self.only(name):
            return
        if self.steps:
            self.activations.setdefault(name, []).append(x)
        else:
            self.activations.setdefault(name, x)


def tap(name, x):
    """Record `x` under its full path if anybody is recording; return it as it is."""
    if _recorder is not None:
        _recorder.keep(".".join(map(str, [*_path, name])), x)
    return x


@contextmanager
def record(attention: bool = False, steps: bool = False,
           only: Callable[[str], object] | None = None) -> Iterator[dict[str, Any]]:
    """Collect the tapped activations, in the order of execution, into the dict that this yields.

    A name keeps what came first: of an answer, the prefill, and not the tokens that were decoded after it.
    `attention`: the attention weights as well, as `….self_attn.attn_weights`, (B,N,T,S).
    `steps`: each name holds a list, what the prefill gave and then what each step of decoding gave.
    `only`: a function of the full name that says what to keep; of a large model everything is gigabytes.
    """
    global _recorder
    outer, _recorder = _recorder, _Recorder(attention, steps, only)
    try:
        yield _recorder.activations
    finally:
        _recorder = outer
