"""Files of every format, damaged at random: an error of our own or a model that may be, soon and in little memory.

1,000 files; 100,000 with HYPOTHESIS_PROFILE=thorough.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARES = 2
NUM_FILES = 100_000 if os.environ.get("HYPOTHESIS_PROFILE") == "thorough" else 1_000


@pytest.mark.parametrize("share", range(SHARES))
def test_damaged_files_are_refused_in_words_or_are_what_they_were(share):
    first, last = (NUM_FILES * number // SHARES for number in (share, share + 1))
    command = [sys.executable, "-W", "ignore", Path(__file__).with_name("fuzz_harness.py"), str(first), str(last)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["failures"] == []
    assert found["refused"] + found["loaded"] == found["files"] == last - first
    assert found["refused"] > found["files"] / 2
