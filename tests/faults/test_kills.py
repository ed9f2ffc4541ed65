"""Killed before any of its file operations, a run that is started again ends like one that nobody disturbed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parents[2]
MEMORY = Path("/dev/shm")
PARTS = {"workspace": 13, "refit": 9}
"""Of how many points one is tried; all of them in the profile ``thorough``."""


def is_thorough():
    return settings.get_current_profile_name() == "thorough"


def examined(scenario):
    parts = 1 if is_thorough() else PARTS.get(scenario, 1)
    command = [
        sys.executable,
        str(Path(__file__).parent / "kill_harness.py"),
        scenario,
        "--share",
        f"{parts // 2}/{parts}",
    ]
    if os.access(MEMORY, os.W_OK):  # nothing here tests the disk
        command += ["--folder", str(MEMORY)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("scenario", "least"),
    [
        ("circuit", 15),
        ("head", 40),
        ("new head", 30),
        ("fit", 30),
        ("cache", 60),
        ("coupled", 50),
        ("denoiser", 30),
        ("workspace", 150),
        ("refit", 100),
    ],
)
def test_a_kill_anywhere_is_survived(scenario, least):
    """Weights and tables are the same to the last bit, nothing is left over, and what was there is there until then."""
    found = examined(scenario)
    assert found["points"] >= least  # else the harness has gone blind
    assert not found["failures"]
