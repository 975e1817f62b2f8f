"""Folders in the hub's layout: mapped, strict, sharded, and written whole."""
import json

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
from minipali.checkpoint.hub import inventory, load, open_checkpoint, save
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


TEXT_ONLY = PALIGEMMA_2["text_config"]


@pytest.mark.parametrize("config", [PALIGEMMA_2, TEXT_ONLY], ids=["paligemma", "gemma"])
def test_output_head(tmp_path, config):
    """Beside the table that it is tied to an equal one is left out; one that differs in a single bit is used."""
    arrays = random_arrays(config)
    assert load(write_folder(tmp_path, arrays, config))[0].tie_word_embeddings
    with_head = arrays | {LM_HEAD: arrays[EMBED].copy()}
    cfg, params = load(write_folder(tmp_path, with_head, config))
    assert cfg.tie_word_embeddings
    assert_same(params, arrays)
    untied = config | {"tie_word_embeddings": False}
    assert_same(load(write_folder(tmp_path, with_head, untied))[1], with_head)
    for row, column in [(0, 0), (13, 7), (-1, -1)]:
        other = arrays[EMBED].copy()
        other[row, column] = np.nextafter(other[row, column], np.float32(9))
        cfg, params = load(write_folder(tmp_path, arrays | {LM_HEAD: other}, config))
        assert not cfg.tie_word_embeddings
        assert_same(params, arrays | {LM_HEAD: other})
        assert open_checkpoint(tmp_path)[0] == load(tmp_path)[0] == parse_config(untied)
    assert "1 unexpected" in refused(load, write_folder(tmp_path, arrays | {LM_HEAD: arrays[EMBED][:3]}, config))
    integers = arrays | {LM_HEAD: arrays[EMBED].astype(np.int32)}
    assert f"1 unexpected ({LM_HEAD})" in refused(load, write_folder(tmp_path, integers, config))
    assert f"1 missing ({LM_HEAD})" in refused(load, write_folder(tmp_path, arrays, untied))


def test_output_head_of_another_dtype(tmp_path, monkeypatch):
    """The numbers are compared, not the bytes; in several pieces, and anew when the file has changed."""
    monkeypatch.setattr(weights, "CHUNK", 7)
    arrays = {name: x.astype(np.float16).astype(np.float32) for name, x in random_arrays(PALIGEMMA_2).items()}
    folder = write_folder(tmp_path, arrays | {LM_HEAD: arrays[EMBED].astype(np.float16)})
    assert load(folder)[0].tie_word_embeddings
    other = arrays[EMBED].astype(np.float64)
    other[-1, -1] += 1e-12
    assert not load(write_folder(tmp_path, arrays | {LM_HEAD: other}))[0].tie_word_embeddings
    # bfloat16, where the last bit alone differs, and a NaN that is the same in both.
    bits = to_bfloat16(arrays[EMBED])
    bits[0, 0] = 0x7FC0
    other = bits.copy()
    other[-1, -1] ^= 1
    for name, table in [("same", bits), ("other", other)]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(PALIGEMMA_2))
        with open(tmp_path / name / "model.safetensors", "wb") as file:
            both = {EMBED: from_bfloat16(bits), LM_HEAD: from_bfloat16(table)}
            weights.write_safetensors(file, arrays | both, "BF16")
        assert load(tmp_path / name)[0].tie_word_embeddings == (name == "same")


@pytest.mark.parametrize("config", [PALIGEMMA_2, TEXT_ONLY], ids=["paligemma", "gemma"])
@pytest.mark.parametrize("name", ["lm_head.weight", LM_HEAD])
def test_the_table_under_its_other_name(tmp_path, config, name):
    """safetensors keeps one name of a tensor that has two, and it may be that of the output head."""
    arrays = random_arrays(config)
    stored = {key: x for key, x in arrays.items() if key != EMBED} | {name: arrays[EMBED]}
    cfg, params = load(write_folder(tmp_path, stored, config))
    assert cfg.tie_word_embeddings
    assert_same(params, arrays)
    assert inventory(tmp_path).keys() == {key: 0 for key in arrays if key != EMBED}.keys() | {LM_HEAD}
    message = refused(load, write_folder(tmp_path, stored, config | {"tie_word_embeddings": False}))
    assert f"1 missing ({EMBED})" in message


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


def test_indexes_that_differ_from_their_files(tmp_path):
    """As the hub reads them: a tied head named and stored nowhere, a buffer or such a head stored and not named."""
    arrays = random_arrays(PALIGEMMA_2)
    shards, where = in_two(arrays)
    named = {LM_HEAD: "b.safetensors", "lm_head.weight": "a.safetensors",
             "language_model.model.layers.0.self_attn.rotary_emb.inv_freq": "a.safetensors"}
    assert_same(load(write_shards(tmp_path, shards, where | named))[1], arrays)
    buffer = {"vision_tower.vision_model.embeddings.position_ids": np.arange(4)[None]}
    shards["a.safetensors"] |= buffer | {"lm_head.weight": arrays[EMBED]}
    assert_same(load(write_shards(tmp_path, shards, where))[1], arrays)
    shards["a.safetensors"]["lm_head.weight"] = arrays[EMBED] + 1
    assert not load(write_shards(tmp_path, shards, where))[0].tie_word_embeddings
    untied = PALIGEMMA_2 | {"tie_word_embeddings": False}
    del shards["a.safetensors"]["lm_head.weight"]
    assert f"1 missing ({LM_HEAD})" in refused(load, write_shards(tmp_path, shards, where | named, untied))


def test_broken_shards(tmp_path):
    """What an index says is checked tensor by tensor."""
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
    (tmp_path / "model" / "model.safetensors.index.json").write_text("{")
    assert "not valid JSON" in refused(load, tmp_path / "model")


def test_an_index_names_files_of_its_own_folder(tmp_path):
    """Files elsewhere that hold exactly what the index says are refused by their names, unread."""
    arrays = random_arrays(PALIGEMMA_2)
    shards, where = in_two(arrays)
    folder = write_shards(tmp_path / "model", shards, where)
    (folder / "sub").mkdir()
    for place in [tmp_path, folder / "sub"]:
        save_file(shards["a.safetensors"], place / "a.safetensors")
        save_file(shards["a.safetensors"], place / "a.bin")
    save_file(shards["a.safetensors"], folder / "a.bin")
    for outside in ["../a.safetensors", str(tmp_path / "a.safetensors"), "sub/a.safetensors", "./a.safetensors",
                    "a.bin", r"..\a.safetensors", "", "..", "x" * 5000 + ".safetensors", "a\0.safetensors"]:
        moved = {name: outside if file == "a.safetensors" else file for name, file in where.items()}
        message = refused(load, write_shards(folder, {}, moved))
        assert message.startswith(f"{folder / 'model.safetensors.index.json'}: ")
        assert "is no name of a safetensors file in this folder" in message
    moved = {name: "\ud800.safetensors" for name in where}
    assert "no such file" in refused(load, write_shards(folder, {}, moved))


def test_files_that_are_no_shards(tmp_path):
    """Without an index every *.safetensors counts, but what macOS puts beside them on other systems' disks."""
    arrays = random_arrays(PALIGEMMA_2)
    folder = write_shards(tmp_path, *in_two(arrays))
    (folder / "model.safetensors.index.json").unlink()
    for name in ["._a.safetensors", ".b.safetensors.part"]:
        (folder / name).write_bytes(b"\0\5\x16\7\0\2\0\0Mac OS X        ")
    assert_same(load(folder)[1], arrays)
    save_file({"x": np.zeros(1)}, folder / "c.safetensors")
    assert "1 unexpected (x)" in refused(load, folder)


def test_links_as_the_hubs_cache_has_them(tmp_path):
    """snapshots/…/model.safetensors is a link into blobs/, whose names say nothing; a broken one is told apart."""
    arrays = random_arrays(PALIGEMMA_2)
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    write_folder(blobs, arrays)
    for name, blob in [("model.safetensors", "0f3a"), ("config.json", "77c1")]:
        (blobs / name).rename(blobs / blob)
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    assert_same(load(snapshot)[1], arrays)
    (blobs / "0f3a").unlink()
    assert f"{snapshot / 'model.safetensors'}: a link to a file that does not exist" in refused(load, snapshot)
    (snapshot / "a.safetensors").symlink_to("../../blobs/77c1")
    assert "model.safetensors: a link to a file" in refused(load, snapshot)


@pytest.mark.parametrize(("files", "message"), [
    (["adapter_config.json", "adapter_model.safetensors"], "an adapter without its model, expected a whole one"),
    (["config.json", "pytorch_model.bin"], "expected *.safetensors and found pytorch_model.bin"),
    (["config.json", "consolidated.00.pth"], "found consolidated.00.pth"), (["model.gguf"], "found model.gguf"),
    (["flax_model.msgpack"], "found flax_model.msgpack"), (["pt_224.npz"], "to use pt_224.npz, give its own path"),
    (["config.json"], "found neither")])
def test_folders_of_other_formats(tmp_path, files, message):
    """One line says what lies there and what is needed."""
    for name in files:
        (tmp_path / name).write_text("{}")
    assert refused(load, tmp_path).startswith(f"{tmp_path}: ") and message in refused(load, tmp_path)


def test_an_adapter_beside_its_model_is_passed_over(tmp_path):
    arrays = random_arrays(PALIGEMMA_2)
    folder = write_folder(tmp_path, arrays)
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    save_file({"base_model.model.x.lora_A.weight": np.zeros((2, 2))}, folder / "adapter_model.safetensors")
    assert_same(load(folder)[1], arrays)


def test_a_lora_that_is_not_merged(tmp_path):
    arrays = random_arrays(PALIGEMMA_2) | {"model.language_model.layers.0.self_attn.q_proj.lora_A.default.weight":
                                           np.zeros((2, 16), np.float32)}
    assert "q_proj.lora_A.default.weight is half of a LoRA" in refused(load, write_folder(tmp_path, arrays))


def test_a_failing_map(tmp_path, monkeypatch):
    """Out of address space, or a disk that cannot be mapped; only what is used in place is mapped at all."""
    def fails(*_, **__):
        raise OSError(12, "Cannot allocate memory")

    folder = write_folder(tmp_path, random_arrays(PALIGEMMA_2))
    monkeypatch.setattr(weights.np, "memmap", fails)
    assert refused(load, folder) == (
        f"{folder / 'model.safetensors'}: cannot be mapped into memory (Cannot allocate memory)")
    assert load(folder, np.float64)


def test_a_file_that_ends_early(tmp_path, monkeypatch):
    """Cut short after its header was read, as by a download that starts again."""
    folder = write_folder(tmp_path, random_arrays(PALIGEMMA_2))
    _, tensors = open_checkpoint(folder)
    path = folder / "model.safetensors"
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 100)
    last = max(tensors.values(), key=lambda stored: stored.start)
    assert refused(weights.read_tensor, last, None, np.float64) == f"{path}: {last.name}: the file ends too early"
    path.unlink()
    assert "cannot be read (No such file" in refused(weights.read_tensor, last, None, np.float64)


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
