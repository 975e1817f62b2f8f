"""Folders in the hub's layout: mapped, strict, sharded, and written whole."""
import numpy as np
import pytest
from helpers import refused
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from small_models import (
    EMBED,
    LM_HEAD,
    PALIGEMMA_2,
    SIGLIP_CONFIG,
    VISION_CONFIG,
    assert_same,
    random_arrays,
    write_folder,
    write_shards,
)

from minipali.checkpoint import safetensors_file as weights
from minipali.checkpoint.config import parse_config
from minipali.checkpoint.hub import inventory, load, save
from minipali.checkpoint.safetensors_file import from_bfloat16, read_header, to_bfloat16
from minipali.checkpoint.tensors import flatten, unflatten

HEAD_PROBE = "vision_tower.vision_model.head.probe"


def test_load_is_bitwise_and_in_place(tmp_path):
    """float32 asked for as float32 is the file itself: no copy, and nobody can write to it."""
    arrays = random_arrays(PALIGEMMA_2)
    folder = write_folder(tmp_path, arrays)
    cfg, params = load(folder)
    assert cfg == parse_config(PALIGEMMA_2)
    assert_same(params, arrays)
    for name, x in flatten(params).items():
        base = x
        while isinstance(base.base, np.ndarray):
            base = base.base
        assert isinstance(base, np.memmap), name
        assert not x.flags.writeable and x.flags.aligned, name
    changed = arrays[EMBED] + 1
    stored = read_header(folder / "model.safetensors")[EMBED]
    with open(folder / "model.safetensors", "r+b") as file:
        file.seek(stored.start)
        file.write(changed.tobytes())
    np.testing.assert_array_equal(flatten(params)[EMBED], changed)


def test_load_float64(tmp_path):
    """float64 is the same numbers, as copies."""
    arrays = random_arrays(PALIGEMMA_2)
    _, params = load(write_folder(tmp_path, arrays), np.float64)
    assert_same(params, {name: x.astype(np.float64) for name, x in arrays.items()})


@pytest.mark.parametrize("config", [PALIGEMMA_2, SIGLIP_CONFIG], ids=["paligemma", "siglip"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_save_load(tmp_path, monkeypatch, config, dtype):
    """What is saved comes back rounded to the file's dtype and no further; the safetensors package reads it too."""
    monkeypatch.setattr(weights, "CHUNK", 7)  # so that these small tensors are read in several pieces
    arrays = random_arrays(config)
    rounded = {name: from_bfloat16(to_bfloat16(x)) if dtype == "bfloat16" else x.astype(dtype).astype(np.float32)
               for name, x in arrays.items()}
    save(tmp_path / "new" / "folder", config, unflatten(arrays), dtype)
    cfg, params = load(tmp_path / "new" / "folder")
    assert cfg == parse_config(config)
    assert_same(params, rounded)
    tensors = read_header(tmp_path / "new" / "folder" / "model.safetensors").values()
    assert min(stored.start for stored in tensors) % 8 == 0  # so that float32 can be used where it lies
    with safe_open(tmp_path / "new" / "folder" / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"} and set(file.keys()) == set(arrays)
    if dtype != "bfloat16":
        for name, x in load_file(tmp_path / "new" / "folder" / "model.safetensors").items():
            np.testing.assert_array_equal(x, arrays[name].astype(dtype), strict=True)


def test_save_is_all_or_nothing(tmp_path):
    """A save that fails half-way leaves the folder as it was."""
    params = unflatten(random_arrays(PALIGEMMA_2))
    save(tmp_path, PALIGEMMA_2, params, "float32")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(TypeError):
        save(tmp_path, PALIGEMMA_2 | {"unserializable": object()}, params, "bfloat16")
    with pytest.raises(ValueError):
        save(tmp_path, PALIGEMMA_2, params | {"last": np.array("text")}, "float32")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert "cannot be written" in refused(save, tmp_path / "config.json" / "x", PALIGEMMA_2, params, "float32")


def test_buffers_are_ignored(tmp_path):
    """Old files store what is computed: position numbers and rotary frequencies."""
    arrays = random_arrays(PALIGEMMA_2)
    buffers = {"vision_tower.vision_model.embeddings.position_ids": np.arange(4)[None],
               "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(3, np.float32)}
    folder = write_folder(tmp_path, arrays | buffers)
    assert_same(load(folder)[1], arrays)
    assert inventory(folder).keys() == arrays.keys()


def test_output_head(tmp_path):
    """Stored beside the table that it is tied to it is left out; untied it is a parameter of its own."""
    arrays = random_arrays(PALIGEMMA_2)
    with_head = arrays | {LM_HEAD: arrays[EMBED]}
    assert_same(load(write_folder(tmp_path, with_head))[1], arrays)
    assert_same(load(write_folder(tmp_path, with_head, PALIGEMMA_2 | {"tie_word_embeddings": False}))[1], with_head)
    assert "1 unexpected" in refused(load, write_folder(tmp_path, arrays | {LM_HEAD: arrays[EMBED][:3]}))
    assert "1 missing" in refused(load, write_folder(tmp_path, arrays, PALIGEMMA_2 | {"tie_word_embeddings": False}))


def test_pooling_head(tmp_path):
    """PaliGemma never pools: a head that the config allows is left out, one that it denies is refused."""
    arrays = random_arrays(PALIGEMMA_2)
    with_head = arrays | {HEAD_PROBE: np.zeros((1, 1, 12), np.float32)}
    allowed = PALIGEMMA_2 | {"vision_config": VISION_CONFIG | {"vision_use_head": True}}
    assert_same(load(write_folder(tmp_path, with_head, allowed))[1], arrays)
    assert f"1 unexpected ({HEAD_PROBE})" in refused(load, write_folder(tmp_path, with_head))


def test_strict(tmp_path):
    """Everything that is wrong is counted, and the first of it named, in one line."""
    arrays = random_arrays(PALIGEMMA_2)
    wrong = {name: x for name, x in arrays.items() if ".mlp.fc1." not in name}
    wrong["language_model.model.norm.weight"] = np.zeros((4, 4), np.float32)
    wrong["multi_modal_projector.linear.bias"] = np.zeros(16, np.int32)
    wrong["extra\n.tensor"] = np.zeros(1, np.float32)
    message = refused(load, write_folder(tmp_path, wrong))
    assert str(tmp_path) in message
    assert "4 missing (vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight, " in message and "…" in message
    assert r"1 unexpected (extra\n.tensor)" in message
    assert "1 misshapen (language_model.model.norm.weight [4, 4] where [16] belongs)" in message
    assert "(multi_modal_projector.linear.bias I32)" in message


def test_other_family(tmp_path):
    """PaliGemma 2's extra norms under a PaliGemma config are refused, not dropped: the text would be nonsense."""
    first = PALIGEMMA_2 | {"text_config": PALIGEMMA_2["text_config"] | {"model_type": "gemma"}}
    assert "6 unexpected" in refused(load, write_folder(tmp_path, random_arrays(PALIGEMMA_2), first))
    assert "6 missing" in refused(load, write_folder(tmp_path, random_arrays(first), PALIGEMMA_2))


def test_same_parameter_twice(tmp_path):
    arrays = random_arrays(PALIGEMMA_2)
    twice = arrays | {"model.language_model.embed_tokens.weight": arrays[EMBED]}
    message = refused(load, write_folder(tmp_path, twice))
    assert EMBED in message and "model.language_model.embed_tokens.weight" in message


def in_two(arrays):
    """Two shards, and the index that describes them."""
    names = list(arrays)
    shards = {"a.safetensors": {name: arrays[name] for name in names[:20]},
              "b.safetensors": {name: arrays[name] for name in names[20:]}}
    return shards, {name: file for file, tensors in shards.items() for name in tensors}


def test_shards(tmp_path):
    """Shards with their index, and the same files without one, are the single file."""
    arrays = random_arrays(PALIGEMMA_2)
    folder = write_shards(tmp_path, *in_two(arrays))
    assert_same(load(folder)[1], arrays)
    (folder / "model.safetensors.index.json").unlink()
    assert_same(load(folder)[1], arrays)


def test_broken_shards(tmp_path):
    """What an index says is checked tensor by tensor, and it can name nothing outside its folder."""
    arrays = random_arrays(PALIGEMMA_2)
    shards, where = in_two(arrays)
    first, *_, last = arrays

    def fails(weight_map):
        return refused(load, write_shards(tmp_path / "model", shards, weight_map))

    assert "c.safetensors: no such file" in fails(where | {first: "c.safetensors"})
    assert f"a.safetensors: holds {first}, which model.safetensors.index.json places in b" in fails(
        where | {first: "b.safetensors"})
    assert "does not name" in fails({name: file for name, file in where.items() if name != last})
    assert "b.safetensors: lost.weight is missing" in fails(where | {"lost.weight": "b.safetensors"})
    assert "weight_map" in fails([])
    assert "weight_map" in fails({first: 3})
    save_file(shards["a.safetensors"], tmp_path / "a.safetensors")
    for outside in ["../a.safetensors", str(tmp_path / "a.safetensors"), r"..\a.safetensors", "", "..", "model.bin",
                    "x" * 5000 + ".safetensors", "a\0.safetensors", "\ud800.safetensors"]:
        fails(where | {first: outside})
    (tmp_path / "model" / "model.safetensors.index.json").write_text("{")
    assert "not valid JSON" in refused(load, tmp_path / "model")


def test_unusable_folders(tmp_path):
    """No such folder, a file, an empty folder, a folder where the file should be, no config."""
    assert "no such folder" in refused(load, tmp_path / "nothing")
    assert "no such folder" in refused(load, tmp_path / ("x" * 300))
    (tmp_path / "file").write_text("")
    assert "this is a file" in refused(load, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "found neither" in refused(load, tmp_path / "empty")
    (tmp_path / "empty" / "model.safetensors").mkdir()
    assert "cannot be read" in refused(load, tmp_path / "empty")
    folder = write_folder(tmp_path / "model", random_arrays(PALIGEMMA_2))
    (folder / "config.json").unlink()
    assert "config.json: no such file" in refused(load, folder)
