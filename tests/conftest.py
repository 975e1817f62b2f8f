"""How the tests run: `python -m pytest` from the top of the repository, any warning is a failure.

Hypothesis draws few examples by default; `HYPOTHESIS_PROFILE=ci` draws many, the same each time, and `deep` very many.
"""
import faulthandler
import importlib.util
import json
import os
import signal
import sys
import time

# Before NumPy is imported: matrices as small as these are slower with two threads, and one test alone then takes ten
# times the processor's time, in every process that the tests start.
for name in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(name, "1")

# ruff: noqa: E402 - the imports come after that
import numpy as np
import pytest
from helpers import ROOT, one_line
from hypothesis import HealthCheck, Phase, settings
from PIL import Image

import run
from minipali.checkpoint.config import parse_config
from minipali.learning.initialize import random_params
from minipali.small_world.recipe import SIGLIP, write_pair

slow_is_fine = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("dev", max_examples=5, deadline=None, suppress_health_check=slow_is_fine)
settings.register_profile("ci", max_examples=100, deadline=None, derandomize=True, print_blob=True,
                          suppress_health_check=slow_is_fine)
settings.register_profile("deep", max_examples=2000, deadline=None, suppress_health_check=slow_is_fine)
# For tests/mutations: that an example fails is enough, nobody needs the smallest.
settings.register_profile("mutation", max_examples=8, deadline=None, suppress_health_check=slow_is_fine, database=None,
                          phases=[Phase.explicit, Phase.generate])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


pytest_plugins = ["two_at_once"]
clock = {"set": -1000.0}
LONGEST = 180  # seconds that a test may take, where it says nothing else, on a machine that is busy with other things


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests as well that take minutes")


def pytest_runtest_setup(item):
    if item.get_closest_marker("slow") and not item.config.getoption("--slow"):
        pytest.skip("takes minutes; run with --slow")
    if item.get_closest_marker("gpu") and importlib.util.find_spec("cupy") is None:
        pytest.skip("needs a GPU and CuPy")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A test that hangs fails after its time, as @pytest.mark.limit(seconds) gives it, and the others go on."""
    marker = item.get_closest_marker("limit")
    seconds = marker.args[0] if marker else LONGEST

    def stop(*_):
        pytest.fail(f"took longer than {seconds} s")
    # Python code is interrupted by an alarm. What hangs in a library, or on Windows, ends the whole run. To set this
    # second clock takes a millisecond: it is set anew once a minute, not for every test.
    if seconds > LONGEST or time.monotonic() - clock["set"] > 60:
        clock["set"] = time.monotonic()
        faulthandler.dump_traceback_later(2 * seconds + 60, exit=True, file=sys.__stderr__)
    alarm = getattr(signal, "SIGALRM", None)
    before = alarm and signal.signal(alarm, stop)
    if alarm:
        signal.alarm(seconds)
    try:
        return (yield)
    finally:
        if alarm:
            signal.alarm(0)
            signal.signal(alarm, before)


# --- run.py, for the tests of several files

@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture(scope="session")
def pair_folder(tmp_path_factory):
    """A contrastive pair as the training writes it, of the shipped sizes, with the first weights."""
    folder = tmp_path_factory.mktemp("pair")
    write_pair(folder, random_params(parse_config(SIGLIP), np.random.default_rng(0)), ROOT / "weights")
    return folder


@pytest.fixture
def call(capsys):
    """run.py in this process: (status, stdout, stderr)."""
    def call(*argv):
        capsys.readouterr()
        status = run.main([str(word) for word in argv])
        return status, *capsys.readouterr()
    return call


@pytest.fixture
def ask(call):
    """A question that is answered, silently: what it prints, or the object that --json prints."""
    def ask(*argv):
        status, out, err = call(*argv)
        assert (status, err) == (0, "")
        assert out.endswith("\n")
        return json.loads(out) if "--json" in argv else out[:-1]
    return ask


@pytest.fixture
def refusal(call):
    """The one line about input that cannot be used."""
    def refusal(*argv):
        status, out, err = call(*argv)
        assert status == 2 and out == ""
        return one_line(err)
    return refusal
