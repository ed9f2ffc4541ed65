"""On a full disk, and under a limit on the size of files: one clear line, nothing half done, and it goes on later."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def examined(kind, folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(Path(__file__).parent / "small_disk.py"), kind, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def mounts(tmp_path):
    """Skip where this user may not mount anything."""
    done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount a file system: {done.stderr.strip()}")
    subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_limit_on_the_size_of_files_is_survived(tmp_path):
    found = examined("limit", tmp_path)
    assert found["tried"] >= 15
    assert not found["failures"]


@pytest.mark.usefixtures("mounts")
def test_a_full_disk_is_survived(tmp_path):
    found = examined("mount", tmp_path)
    assert found["tried"] >= 10
    assert not found["failures"]
