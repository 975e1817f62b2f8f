"""The weights that training starts from."""
import numpy as np
import pytest
from small_models import PALIGEMMA_2, SIGLIP_CONFIG

from minipali.checkpoint.config import parse_config
from minipali.checkpoint.tensors import flatten, param_shapes
from minipali.learning.initialize import random_params


@pytest.mark.parametrize("config", [PALIGEMMA_2, SIGLIP_CONFIG], ids=["paligemma", "siglip"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_random_params(config, dtype):
    """Matrices keep the size of what goes through them; norms, biases and SigLIP's scalars start where they should."""
    cfg = parse_config(config)
    params = flatten(random_params(cfg, np.random.default_rng(3), dtype))
    assert {name: x.shape for name, x in params.items()} == param_shapes(cfg)
    assert all(x.dtype == dtype for x in params.values())
    readers = [x.ravel() * np.sqrt(x.shape[1]) for name, x in params.items()
               if name.endswith(("q_proj.weight", "fc1.weight", "gate_proj.weight"))]
    assert abs(np.concatenate(readers).std() - 1) < 0.1
    for name, x in params.items():
        if name.startswith("logit"):
            assert x == pytest.approx(np.log(10) if name == "logit_scale" else -10)
        elif x.ndim == 1:
            vision_norm = "norm" in name and not name.startswith("language_model") and name.endswith(".weight")
            assert (x == (1 if vision_norm else 0)).all(), name
    again = flatten(random_params(cfg, np.random.default_rng(3), dtype))
    assert all((again[name] == x).all() for name, x in params.items())
