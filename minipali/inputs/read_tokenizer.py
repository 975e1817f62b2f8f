"""The tokenizer of a model's folder: which file it is in, and what the files beside it say of its tokens."""
from pathlib import Path

from minipali.errors import InputError
from minipali.files import read_json
from minipali.inputs.sentencepiece import SentencePieceTokenizer
from minipali.inputs.tokenizer import Tokenizer
from minipali.inputs.unigram import Unigram

# In the order in which they are looked for. spiece.model is the hub's name for T5's and SigLIP 1's, sentencepiece.model
# the one under which big_vision finds them.
READERS = {"tokenizer.json": Tokenizer, "tokenizer.model": SentencePieceTokenizer,
           "spiece.model": SentencePieceTokenizer, "sentencepiece.model": SentencePieceTokenizer}


def read_declarations(folder: Path) -> dict:
    """The fields of tokenizer_config.json, and of the older special_tokens_map.json where the former is silent.

    A token is declared by its name or by an object whose `content` is the name. Raises InputError for files that
    cannot be read.
    """
    fields = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        if not path.exists():
            continue
        values = read_json(path)
        if not isinstance(values, dict):
            raise InputError(f"{path}: expected an object of fields")
        fields |= {key: value for key, value in values.items() if value is not None}
    return {key: value.get("content") if isinstance(value, dict) else value for key, value in fields.items()}


def read_tokenizer(folder: str | Path) -> Tokenizer | None:
    """The tokenizer of a model's folder, or None if it has none.

    Its stop, padding and first tokens are those that the folder's files declare, else those of the tokenizer's own
    file. Its `kind` is the class that they name; without a name it follows from how it works: of the two generations
    of SigLIP, the first has a unigram model, the second Gemma's byte-pair encoding. Raises InputError.
    """
    folder = Path(folder)
    declared = read_declarations(folder)
    kind = declared.get("tokenizer_class")
    kind = kind.removesuffix("Fast") if isinstance(kind, str) else None
    names = list(READERS)
    if kind == "SiglipTokenizer":  # the tokenizer.json beside it was made from it, and knows fewer characters
        names.sort(key=lambda name: name != "spiece.model")
    for name in names:
        if (folder / name).exists():
            tokenizer = READERS[name].from_file(folder / name)
            break
    else:
        return None
    unigram = isinstance(tokenizer.model, Unigram)
    tokenizer.kind = kind or ("SiglipTokenizer" if unigram else "GemmaTokenizer")
    if tokenizer.kind == "SiglipTokenizer":  # T5's file has a <pad> with id 0, but SigLIP pads with the stop token
        tokenizer.pad_id = tokenizer.eos_id
    for part in ("bos", "eos", "pad"):
        token = declared.get(f"{part}_token")
        if isinstance(token, str):
            tokenizer.declare(**{part: token})
    tokenizer.keeps_case = declared.get("do_lower_case") is False
    return tokenizer
