import os

import pytest
import torch
from hypothesis import HealthCheck, settings

slow_draws = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
settings.register_profile("quick", max_examples=60, deadline=None, derandomize=True, suppress_health_check=slow_draws)
settings.register_profile("thorough", max_examples=10_000, deadline=None, suppress_health_check=slow_draws)


def pytest_configure(config):
    if not config.getoption("--hypothesis-profile", None):  # the command line goes before the environment
        settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="module")
def one_thread():
    """For circuits so small that threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
