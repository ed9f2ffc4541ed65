import os
import sys
from typing import NamedTuple

import pytest
import torch
from fake_hub import fake_hub  # noqa: F401  - a fixture
from hypothesis import HealthCheck, settings
from pretended_device import DEVICE, Autocast, Generator, PretendedDevice

slow_draws = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
settings.register_profile("quick", max_examples=60, deadline=None, derandomize=True, suppress_health_check=slow_draws)
settings.register_profile("thorough", max_examples=10_000, deadline=None, suppress_health_check=slow_draws)


def pytest_configure(config):
    if not config.getoption("--hypothesis-profile", None):  # the command line goes before the environment
        settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))
    num_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    if num_workers > 1:  # threads of several processes would wait for each other
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_workers))


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


@pytest.fixture
def run_program(monkeypatch, capsys):
    """Run ``unfactor`` with arguments; return its exit code, standard output and standard error."""
    from diffusion.app import cli

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["unfactor", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return call


class Elsewhere(NamedTuple):
    device: torch.device
    pretended: PretendedDevice | None = None

    def generator(self, seed=0):
        return torch.Generator(self.device).manual_seed(seed)


@pytest.fixture(params=["pretended", pytest.param("cuda", marks=pytest.mark.gpu)])
def elsewhere(request, monkeypatch):
    """Another device than the CPU: one that is pretended, and a GPU where there is one."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        yield Elsewhere(torch.device("cuda", torch.cuda.current_device()))
        return
    for module, name, value in (
        (torch, "Generator", Generator),
        (torch, "autocast", Autocast),
        (torch.amp, "autocast", Autocast),
    ):
        monkeypatch.setattr(module, name, value)
    with PretendedDevice() as pretended:
        yield Elsewhere(DEVICE, pretended)
