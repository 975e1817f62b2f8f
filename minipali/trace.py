"""Named activations: the model says `x = tap("mlp", x)`, and whoever wants to see records.

    with record() as activations:
        prefill(...)
    activations["vision_tower.vision_model.encoder.layers.0.mlp"]

The names are the checkpoint's module paths, so two implementations can be compared without a table of names.
`tap(name, x)` returns x, so whoever reads the model may ignore it. When nobody records, it keeps nothing.
"""
from contextlib import contextmanager

_path = []          # the modules that we are inside of, outermost first
_recorder = None    # the dict that is being filled, if any


class scope:
    """`with scope("layers", 3):` every tap inside is named below `layers.3`."""

    def __init__(self, *names):
        self.names = names

    def __enter__(self):
        _path.extend(self.names)

    def __exit__(self, *_):
        del _path[-len(self.names):]


def tap(name, x):
    """Record `x` under its full path if anybody is recording; return it as it is."""
    if _recorder is not None:
        _recorder.setdefault(".".join(map(str, [*_path, name])), x)
    return x


@contextmanager
def record():
    """Collect every tapped activation, in the order of execution, into the dict that this yields.

    A name keeps what came first: of an answer, the prefill, and not the tokens that were decoded after it.
    """
    global _recorder
    outer, _recorder = _recorder, {}
    try:
        yield _recorder
    finally:
        _recorder = outer
