"""Seeded bugs of minipali/looking/ and of the recorder that it reads."""
from seeded import Bug

BUGS = [
    Bug("trace.py", "attention weights in every recording", "if name.endswith(ATTENTION) and not self.attention or ",
        "if "),
    Bug("trace.py", "steps that overwrite one another", "self.activations.setdefault(name, []).append(x)",
        "self.activations[name] = [x]"),
    Bug("model/ops.py", "attention weights under another name", "tap(ATTENTION, attention_weights(",
        "tap(ATTENTION + \"_\", attention_weights("),
    Bug("looking/taps.py", "their names left as they are", "    name = canonical(f\"{name}.\")[:-1]", "    name = name"),
    Bug("looking/taps.py", "layers in the order of their digits", "match[1], int(match[2])", "match[1], match[2]"),
    Bug("looking/compare.py", "the first position of several logits", "x[..., -1, :] if x.ndim > min", "x[..., 0, :] if x.ndim > min"),
    Bug("looking/compare.py", "the tolerance of the finer dtype", "TOLERANCES[min(precision", "TOLERANCES[max(precision"),
    Bug("looking/compare.py", "numbers that are none agree", "    if not all(f.all() for f in finite):", "    if False:"),
    Bug("looking/compare.py", "a difference without its scale", "difference / (tolerance * largest)", "difference / tolerance"),
    Bug("looking/gather.py", "the scores one token late", "x[0, len(prompt) - 1:len(prompt) - 1 + count]",
        "x[0, len(prompt):len(prompt) + count]"),
    Bug("looking/gather.py", "attention of the token that was written", "self.patches + self.first + np.arange",
        "self.patches + self.first + 1 + np.arange"),
    Bug("looking/gather.py", "the stream without what attention added", "rows[-1] + added[P:]", "rows[-1]"),
    Bug("looking/logit_lens.py", "a lens without the last norm",
        "    x = rms_norm(x, **model.params", "    rms_norm(x, **model.params"),
    Bug("looking/logit_lens.py", "ranks that count from the end", "(scores > chosen)", "(scores < chosen)"),
    Bug("looking/lens.py", "BOS counted with the prompt", "bos = int(seen.prompt[0] ==", "bos = 0 * int(seen.prompt[0] =="),
]
