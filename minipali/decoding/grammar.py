"""Constrained decoding: the answer to "detect" or "segment" can then be nothing but objects of what was asked for.

    answer = nothing | object | object " ; " answer
    object = ymin xmin ymax xmax (sixteen <seg>) " " label        with ymin < ymax and xmin < xmax, as `locations` reads

After each token, a finite-state machine over token ids says which may come next, and the logits of all others become
-inf: that holds the model to the form, whether the next token is then the best, drawn, or one of a beam. It adds no
knowledge: a model that sees no cat still has to put its box somewhere, unless the answer stays empty.
"""
from minipali.checkpoint import folder_of, vae_oid
from minipali.decoding.loaded_model import Model, check_vocabulary
from minipali.errors import InputError
from minipali.outputs.boxes import CODES, LAST

MOST_CODES = 128  # <seg> tokens of the published vocabulary


def code_count(model: Model) -> int:
    """How many codes a mask may have: those of the code book that lies beside the model, if there is one."""
    book = model.path and folder_of(model.path) / "vae-oid.npz"
    return min(MOST_CODES, vae_oid.book_size(book)) if book and book.exists() else MOST_CODES


class Grammar:
    """What may follow a prompt, given as its ids, such as "detect cat ; dog". Raises InputError for other prompts.

    The state of the machine is the part of the object that has been written so far. It follows from the ids, so no
    state has to be carried along when beams change places.
    """

    def __init__(self, prompt: list, model: Model):
        if model.tokenizer is None:
            raise InputError("--constrain: the model's folder has no tokenizer.json or tokenizer.model")
        prompt = model.tokenizer.decode(prompt).strip()
        task, _, things = prompt.partition(" ")
        labels = dict.fromkeys(" ".join(thing.split()) for thing in things.split(";"))
        labels.pop("", None)
        if task not in ("detect", "segment") or not labels:
            raise InputError(f'--constrain: expected a prompt such as "detect cat ; dog" or "segment cat", '
                           f"found {prompt!r:.60}")
        self.places = self._ids(model, [f"<loc{i:04d}>" for i in range(LAST + 1)])
        self.codes = self._ids(model, [f"<seg{i:03d}>" for i in range(code_count(model))]) if task == "segment" else []
        self.head = 4 + (CODES if self.codes else 0)  # tokens before the label
        self.stops = set(model.cfg.eos_token_ids)
        # A label is spelled as in training, where it was tokenized together with what follows: before ";" it may fall
        # into other tokens than at the end. So no path of single tokens is put together here, but whole texts.
        encode = model.tokenizer.encode
        self.again = {tuple(encode(f" {label} ; ")) for label in labels}
        self.last = {(*encode(f" {label}"), stop) for label in labels for stop in self.stops}
        used = set().union(*self.again, *self.last)
        if not used.isdisjoint([*self.places, *self.codes]):
            raise InputError(f"--constrain: <loc> and <seg> cannot be labels of a box, found {prompt!r:.60}")
        check_vocabulary("--constrain", {*used, *self.places, *self.codes}, model.cfg)
        self.shortest = self.head + min(map(len, self.last))  # tokens of an object, the stop token included

    @staticmethod
    def _ids(model, names):
        ids = [model.tokenizer.id_of(name) for name in names]
        if None in ids:
            raise InputError(f"--constrain: the model's tokenizer has no {names[ids.index(None)]}")
        return ids

    def allowed(self, ids, left):
        """The ids that may follow `ids`, which this has allowed, if there is room for `left` more, stop token included.

        A token that can no longer become a whole answer in the room that is left is not allowed either.
        """
        state = ()
        for id in ids:
            state = (*state, id)
            if state[self.head:] in self.again:
                state = ()
        if not ids and left < self.shortest:
            return sorted(self.stops)
        if len(state) < 2:  # ymin and xmin: something must be left above them
            return self.places[:LAST] + ([] if ids else sorted(self.stops))
        if len(state) < 4:
            return self.places[self.places.index(state[-2]) + 1:]
        if len(state) < self.head:
            return self.codes
        label = state[self.head:]
        paths = [(path, len(path)) for path in self.last] + [(path, len(path) + self.shortest) for path in self.again]
        return sorted({path[len(label)] for path, length in paths
                       if path[:len(label)] == label and length - len(label) <= left})
