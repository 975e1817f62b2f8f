"""Seeded bugs of minipali/looking/ and of the recorder that it reads."""
from seeded import Bug

BUGS = [
    Bug("trace.py", "attention weights in every recording", "if name.endswith(ATTENTION) and not self.attention or ",
        "if "),
    Bug("trace.py", "steps that overwrite one another", "self.activations.setdefault(name, []).append(x)",
        "self.activations[name] = [x]"),
    Bug("model/ops.py", "attention weights under another name", "tap(ATTENTION, attention_weights(",
        "tap(ATTENTION + \"_\", attention_weights("),
]
