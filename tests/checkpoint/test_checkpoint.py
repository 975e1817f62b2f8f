"""The way in: a folder or an .npz, by the same functions."""
import numpy as np
import pytest
from helpers import refused
from npz_models import to_big_vision, write_npz
from small_models import PALIGEMMA_2, SIGLIP_CONFIG, assert_same, random_arrays, write_folder

from minipali.checkpoint import folder_of, load_any, open_any, stored_dtype
from minipali.checkpoint.config import parse_config


@pytest.mark.parametrize("config", [PALIGEMMA_2 | {"image_token_index": 30}, SIGLIP_CONFIG], ids=["paligemma", "siglip"])
@pytest.mark.parametrize("name", ["x.npz", "X.NPZ"])
def test_either_kind(tmp_path, config, name):
    """Both hold the same parameters, and are told apart by the ending alone, whatever its case."""
    cfg, arrays = parse_config(config), random_arrays(config)
    folder = write_folder(tmp_path / "folder.1", arrays, config)
    write_npz(tmp_path / "x.npz", to_big_vision(arrays, cfg)).rename(tmp_path / name)
    for path, beside in [(folder, folder), (str(folder), folder), (tmp_path / name, tmp_path)]:
        assert folder_of(path) == beside
        assert stored_dtype(path) == "float32"
        for dtype in [np.float32, np.float64]:
            found, params = load_any(path, dtype)
            assert type(found) is type(cfg) and found.vision_config == cfg.vision_config
            assert_same(params, {key: x.astype(dtype) for key, x in arrays.items()})
    assert len(open_any(folder)[1]) == len(arrays)


def test_neither_kind(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"")
    for path, message in [("none.npz", "none.npz: no such file"), ("none", "none: no such folder"),
                          ("model.bin", "model.bin: expected a folder")]:
        for function in [open_any, load_any, stored_dtype]:
            assert message in refused(function, tmp_path / path)
