"""`python -m minipali inspect`."""
import json

import numpy as np
from small_models import EMBED, PALIGEMMA_2, entry, random_arrays, raw_file, write_folder

from minipali.checkpoint.config import parse_config
from minipali.checkpoint.hub import inventory, load, open_checkpoint
from minipali.checkpoint.tensors import count_parameters, param_shapes
from minipali.commands import inspect
from minipali.errors import run_command


def test_summary(tmp_path, capsys):
    """The command prints a checkpoint's sizes and condensed shapes, and one line of error for what it cannot read."""
    folder = write_folder(tmp_path, random_arrays(PALIGEMMA_2))
    cfg, _ = open_checkpoint(folder)
    inspect.main([str(folder)])
    out = capsys.readouterr().out
    count, tensors = count_parameters(cfg), len(param_shapes(cfg))
    assert out.startswith(f"PaliGemma 2: {count:,} parameters in {tensors} tensors")
    assert "   3 x F32  [24, 16]             language_model.model.layers.*.self_attn.q_proj.weight\n" in out
    assert run_command("minipali inspect", inspect.main, [str(tmp_path / "nothing")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.endswith("nothing: no such folder\n") and captured.err.count("\n") == 1


def test_inspecting_reads_no_tensor(tmp_path):
    """A file whose tensors are a hole on the disk, larger than memory, is described all the same."""
    header, end = {}, 0
    config = PALIGEMMA_2 | {"text_config": PALIGEMMA_2["text_config"] | {"vocab_size": 2**25, "hidden_size": 1024}}
    for name, shape in param_shapes(parse_config(config)).items():
        size = 4 * int(np.prod(shape, dtype=object))
        header[name] = entry(end, end + size, shape=shape)
        end += size
    (tmp_path / "config.json").write_text(json.dumps(config))
    with open(tmp_path / "model.safetensors", "wb") as file:
        head = json.dumps(header).encode()
        file.write(raw_file(head + b" " * (-len(head) % 8)))
        file.truncate(file.tell() + end)
    assert inventory(tmp_path)[EMBED] == ("F32", (2**25, 1024))
    assert next(inspect.summary(tmp_path)).startswith("PaliGemma 2: 34,3")
    assert load(tmp_path)[1]["language_model"]["model"]["embed_tokens"]["weight"][2**24, :3].tolist() == [0, 0, 0]
