"""The contrastive pair: what its numbers are, and from which files it can be read."""
import json
from pathlib import Path

import numpy as np
import pytest
from golden.make_captions_golden import (
    CAPTIONS,
    KINDS,
    config,
    pictures,
    weights,
    write_tokenizer,
)
from golden.make_tokenizer_golden import awkward
from helpers import GOLDEN_FILES, assert_close
from npz_models import to_big_vision, write_npz

from minipali.checkpoint.config import parse_config
from minipali.checkpoint.hub import save
from minipali.checkpoint.tensors import flatten
from minipali.decoding.pair import load_pair
from minipali.errors import InputError
from minipali.inputs.sentencepiece import SentencePieceTokenizer
from minipali.small_world import scores

GOLDEN = json.loads((GOLDEN_FILES / "captions.json").read_text(encoding="utf-8"))["cases"]


def write_pair_npz(path, kind):
    """A small SigLIP as big_vision writes it, its tokenizer beside it."""
    size = write_tokenizer(path.parent, kind)
    write_npz(path, to_big_vision(flatten(weights(size)), parse_config(config(size))))
    return size


def test_pair_answers_with_cosines_and_bias(pair_folder):
    """Row i, column j: picture i, caption j; captions are cleaned before they are read."""
    pair = load_pair(pair_folder)
    shown, captions = scores.held_out((3,), 3)
    table = pair.logits(shown, [*captions, "RED!"])
    assert table.shape == (3, 4)
    images, texts = pair.images(shown), pair.texts([*captions, "red"])
    cosine = images @ texts.T / np.linalg.norm(images, axis=1)[:, None] / np.linalg.norm(texts, axis=1)
    assert_close("table", table, np.exp(pair.params["logit_scale"]) * cosine + pair.params["logit_bias"], "formula")


@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_of_big_vision_answers_as_the_hubs_folder(kind, tmp_path):
    """An .npz with its tokenizer beside it, whichever file that is."""
    write_pair_npz(tmp_path / "siglip.npz", kind)
    pair = load_pair(tmp_path / "siglip.npz")
    assert (type(pair.tokenizer) is SentencePieceTokenizer) == (kind == "siglip 1")
    assert_close(kind, pair.logits(pictures(), CAPTIONS), GOLDEN[kind]["logits"], "golden")


def test_a_bare_model_file_will_do(tmp_path):
    """spiece.model as it comes from big_vision, without what the hub puts beside it."""
    write_pair_npz(tmp_path / "siglip.npz", "siglip 1")
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "spiece.model").rename(tmp_path / "sentencepiece.model")
    found = load_pair(tmp_path / "siglip.npz").logits(pictures(), CAPTIONS)
    assert_close("logits", found, GOLDEN["siglip 1"]["logits"], "golden")


def test_a_tokenizer_without_a_stop_token_answers(tmp_path):
    """Its captions end without one, as the hub's processor leaves them."""
    spec = awkward("bytes")
    names = {"<eos>": "<end>"}
    spec["model"]["vocab"] = {names.get(token, token): id for token, id in spec["model"]["vocab"].items()}
    spec["added_tokens"] = [token | {"content": names.get(token["content"], token["content"])}
                            for token in spec["added_tokens"]]
    size = max(token["id"] for token in spec["added_tokens"]) + 1
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), encoding="utf-8")
    save(tmp_path, config(size), weights(size), "float32")
    pair = load_pair(tmp_path)
    assert pair.tokenizer.eos_id is None
    assert np.isfinite(pair.logits(pictures(), ["a", "b"])).all()


def test_what_cannot_be_a_pair_is_said_in_one_line(tmp_path):
    """No such folder, no tokenizer, a tokenizer of another model, another kind of model in an .npz."""
    def refusal(path):
        with pytest.raises(InputError) as caught:
            load_pair(path).texts(["abc"])
        assert "\n" not in str(caught.value)
        return str(caught.value)
    assert refusal(tmp_path / "none") == f"{tmp_path / 'none'}: no such folder"
    assert refusal(tmp_path / "none.npz") == f"{tmp_path / 'none.npz'}: no such file"
    write_npz(tmp_path / "siglip.npz", to_big_vision(flatten(weights(9)), parse_config(config(9))))
    assert refusal(tmp_path / "siglip.npz").startswith(f"{tmp_path}: no tokenizer for captions, expected tokenizer")
    write_tokenizer(tmp_path, "siglip 2")
    assert "outside the model's vocabulary, 0 to 8" in refusal(tmp_path / "siglip.npz")
    for path in Path(tmp_path).glob("tokenizer*"):
        path.write_bytes(b"{")
    assert "tokenizer" in refusal(tmp_path / "siglip.npz")
