"""How the tests run: `python -m pytest` from the top of the repository, any warning is a failure.

Hypothesis draws few examples by default; `HYPOTHESIS_PROFILE=ci` draws many, the same each time, and `deep` very many.
"""
import os
import sys
from pathlib import Path

from hypothesis import HealthCheck, Phase, settings

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

slow_is_fine = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("dev", max_examples=5, deadline=None, suppress_health_check=slow_is_fine)
settings.register_profile("ci", max_examples=100, deadline=None, derandomize=True, print_blob=True,
                          suppress_health_check=slow_is_fine)
settings.register_profile("deep", max_examples=2000, deadline=None, suppress_health_check=slow_is_fine)
# For tests/mutations: that an example fails is enough, nobody needs the smallest.
settings.register_profile("mutation", max_examples=8, deadline=None, suppress_health_check=slow_is_fine, database=None,
                          phases=[Phase.explicit, Phase.generate])
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "error")
